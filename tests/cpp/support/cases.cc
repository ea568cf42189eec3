#include "support/cases.h"

#include <algorithm>

namespace moecore::test {

Array RoutingCase::ids(std::uint64_t seed) const {
  Random random(seed + static_cast<std::uint64_t>(num_tokens * 1000003 + top_k * 1009 + num_experts));
  Array ids({num_tokens, top_k});
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    // A random start and a random odd step visit K distinct experts when K <= E.
    const std::int64_t start = random.below(num_experts),
                       step = 1 + random.below(std::max<std::int64_t>(
                                      1, num_experts / std::max<std::int64_t>(1, top_k)));
    for (std::int64_t j = 0; j < top_k; ++j) {
      std::int64_t id = (start + j * step) % num_experts;
      switch (routing) {
        case Routing::kUniform:
          break;
        case Routing::kHot:
          if (j == 0) id = num_experts - 1;
          break;
        case Routing::kGaps:
          id = id / 3 * 3;
          break;
        case Routing::kInvalid: {
          constexpr std::int64_t kWrong[] = {-1, -7, 0, 1, 100000, -2147483648, 2147483647};
          const std::int64_t pick = random.below(14);
          if (pick < 7) id = pick == 2 || pick == 3 ? num_experts + pick - 2 : kWrong[pick];
          break;
        }
        case Routing::kAllDropped:
          id = random.below(2) ? -1 : num_experts;
          break;
      }
      ids.at(t, j) = static_cast<double>(id);
    }
  }
  return ids;
}

std::ostream& operator<<(std::ostream& out, const RoutingCase& c) {
  static const char* const kNames[] = {"uniform", "hot", "gaps", "invalid", "all dropped"};
  return out << "T=" << c.num_tokens << " K=" << c.top_k << " E=" << c.num_experts << " "
             << kNames[static_cast<int>(c.routing)];
}

const std::vector<RoutingCase>& routing_cases() {
  static const std::vector<RoutingCase> cases = [] {
    std::vector<RoutingCase> list;
    for (std::int64_t e : {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 256, 257})
      for (std::int64_t t : {0, 1, 7, 128, 1000})
        for (std::int64_t k : {1, 2, 8})
          if (k <= e) list.push_back({t, k, e});
    for (std::int64_t e : {1, 3, 17, 64}) list.push_back({7, e, e});  // K = E
    list.push_back({7, 0, 4});                                        // K = 0
    list.push_back({5, 3, 2048});
    list.push_back({3, 100, 128});
    for (Routing r : {Routing::kHot, Routing::kGaps, Routing::kInvalid, Routing::kAllDropped})
      for (RoutingCase c : {RoutingCase{1, 1, 1}, {7, 2, 5}, {128, 8, 64}, {1000, 4, 17}, {333, 3, 256}}) {
        c.routing = r;
        list.push_back(c);
      }
    return list;
  }();
  return cases;
}

const std::vector<RoutingCase>& short_routing_cases() {
  static const std::vector<RoutingCase> cases = {
      {0, 2, 4},
      {1, 1, 1},
      {1, 2, 8},
      {7, 3, 3},
      {7, 2, 5, Routing::kHot},
      {40, 4, 17, Routing::kInvalid},
      {33, 2, 31, Routing::kGaps},
      {5, 2, 64, Routing::kAllDropped},
      {128, 2, 4},
  };
  return cases;
}

std::vector<Place> places(DType dtype) {
  const auto element = static_cast<std::size_t>(bit_width(dtype) + 7) / 8;
  return {
      {"dense", 0, 0}, {"strided", 6, 0}, {"unaligned", 0, element}, {"strided and unaligned", 2, element}};
}

const std::vector<std::int64_t>& widths() {
  static const std::vector<std::int64_t> list = {0,  1,  2,  3,   7,   8,   15,   16,  17,
                                                 31, 33, 64, 100, 129, 360, 1025, 2880};
  return list;
}

}  // namespace moecore::test
