// permute, shuffle_rows: exact movement of every element type, at any width, pitch and alignment.

#include "moecore/permute.h"

#include <cstring>

#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

std::vector<DType> all_types() {
  std::vector<DType> types;
  for (int i = 0; i < kNumDTypes; ++i) types.push_back(static_cast<DType>(i));
  return types;
}

// Any byte offset is allowed here, also one that misaligns the elements.
std::vector<Place> byte_places(DType dtype) {
  std::vector<Place> list = places(dtype);
  list.push_back({"odd address", 2, 1});
  return list;
}

using Bytes = std::vector<std::byte>;

Bytes gathered(const Bytes& x, std::size_t width, std::int64_t x_rows, const Array& map) {
  Bytes out(width * static_cast<std::size_t>(map.size()));
  for (std::int64_t d = 0; d < map.size(); ++d)
    if (map[d] >= 0 && map[d] < static_cast<double>(x_rows) && width > 0)
      std::memcpy(out.data() + static_cast<std::size_t>(d) * width,
                  x.data() + static_cast<std::size_t>(map[d]) * width, width);
  return out;
}

class PermuteShuffleRows : public OnDeviceDType {
 protected:
  // One call with random bytes; `map` may point anywhere.
  void expect_gather(std::int64_t x_rows, std::int64_t width, const Array& map, DType map_type,
                     const Place& x_place, const Place& out_place) {
    SCOPED_TRACE(::testing::Message()
                 << "S=" << x_rows << " C=" << width << " D=" << map.size() << " map " << name(map_type)
                 << ", x " << x_place.name << ", out " << out_place.name);
    Tensor x(device(), dtype(), {x_rows, width}, x_place),
        out(device(), dtype(), {map.size(), width}, out_place);
    const std::size_t row_bytes =
        static_cast<std::size_t>(width) * static_cast<std::size_t>(bit_width(dtype())) / 8;
    const Bytes bytes =
        Random(static_cast<std::uint64_t>(width)).bytes(row_bytes * static_cast<std::size_t>(x_rows));
    x.set_bytes(bytes);
    const Tensor map_tensor(device(), map_type, map);
    shuffle_rows(x.read_only(), map_tensor.read_only(), out, Call(device()));
    EXPECT_EQ(out.get_bytes(), gathered(bytes, row_bytes, x_rows, map));
    EXPECT_TRUE(out.surroundings_intact());
    EXPECT_TRUE(x.untouched());
  }
};

TEST_P(PermuteShuffleRows, MovesRowsExactly) {
  Random random(3);
  for (std::int64_t width : widths()) {
    if (bit_width(dtype()) < 8) width *= 2;
    for (const Place& place : byte_places(dtype()))
      expect_gather(5, width, random.integers({9}, -2, 6), DType::kI32, place, place);
  }
}

TEST_P(PermuteShuffleRows, PitchesAndAlignmentsMayDiffer) {
  const Array map = Random(4).integers({13}, -1, 7);
  for (const Place& x_place : byte_places(dtype()))
    for (const Place& out_place : byte_places(dtype()))
      for (std::int64_t width : {2, 34, 520}) expect_gather(7, width, map, DType::kI64, x_place, out_place);
}

TEST_P(PermuteShuffleRows, EmptySidesWork) {
  for (std::int64_t width : {0, 2, 64}) {
    expect_gather(4, width, Array({0}), DType::kI32, {}, {});
    expect_gather(0, width, Array({3}, 0.0), DType::kI32, {}, {});  // nothing to read: zeros
    expect_gather(0, width, Array({0}), DType::kI64, {}, {});
  }
}

TEST_P(PermuteShuffleRows, OutOfRangeEntriesGiveZeros) {
  const Array map({8}, {-1, 4, -2147483648.0, 2147483647, 0, 3, 5, -5});
  for (DType map_type : {DType::kI32, DType::kI64}) expect_gather(4, 66, map, map_type, {}, {});
  // Entries whose low 32 bits would be valid.
  expect_gather(4, 66, Array({4}, {4294967296.0, -4294967295.0, 1, 0x1p40}), DType::kI64, {}, {});
}

INSTANTIATE_TEST_SUITE_P(, PermuteShuffleRows, ::testing::ValuesIn(devices_times(all_types())),
                         device_dtype_name);

class PermutePlan : public OnDeviceDType {};

TEST_P(PermutePlan, GathersTokensAndZeroesUnownedRows) {
  for (const RoutingCase& c : short_routing_cases())
    for (std::int64_t width : {1, 24, 257})
      for (const Place& place : places(dtype())) {
        SCOPED_TRACE(::testing::Message() << c << " H=" << width << " " << place.name);
        const oracle::PlanResult p = oracle::plan(c.ids(), {.num_experts = c.num_experts});
        const Array values = Random(5).floats({c.num_tokens, width}, dtype());
        const Tensor x(device(), dtype(), values, place), offsets(device(), DType::kI32, p.expert_offsets),
            scales(device(), DType::kI32, p.scale_offsets), row_token(device(), DType::kI32, p.row_token),
            slot_row(device(), DType::kI32, p.slot_row);
        Tensor rows(device(), dtype(), {c.num_tokens * c.top_k, width}, place);
        permute(x.read_only(), {offsets, scales, row_token, slot_row}, rows, Call(device()));
        EXPECT_TRUE(equal(rows.get(), oracle::shuffle_rows(values, p.row_token)));
        EXPECT_TRUE(rows.surroundings_intact());
      }
}

// Scales beside rows: the parameter is their element.
class PermuteScales : public OnDeviceDType {
 protected:
  struct Moved {
    Tensor tensor;
    Bytes bytes;
    std::size_t row_bytes;
  };
  Moved random_rows(DType type, std::int64_t rows, std::int64_t width, const Place& place) {
    Moved m{Tensor(device(), type, {rows, width}, place),
            {},
            static_cast<std::size_t>(width * bit_width(type) / 8)};
    m.bytes = Random(static_cast<std::uint64_t>(width)).bytes(m.row_bytes * static_cast<std::size_t>(rows));
    m.tensor.set_bytes(m.bytes);
    return m;
  }
};

TEST_P(PermuteScales, GoWithTheirRows) {
  for (const RoutingCase& c : short_routing_cases())
    for (std::int64_t width : {0, 256, 7168})
      for (std::int64_t blocks : {0, 1, 3, 56})
        for (const Place& place : byte_places(dtype())) {
          if (width > 256 && c.num_tokens > 100) continue;
          SCOPED_TRACE(::testing::Message() << c << " H=" << width << " B=" << blocks << " " << place.name);
          const oracle::PlanResult p = oracle::plan(c.ids(), {.num_experts = c.num_experts});
          const Tensor offsets(device(), DType::kI32, p.expert_offsets),
              scale_offsets(device(), DType::kI32, p.scale_offsets),
              row_token(device(), DType::kI32, p.row_token), slot_row(device(), DType::kI32, p.slot_row);
          const Moved x = random_rows(DType::kE4M3, c.num_tokens, width, {}),
                      scales = random_rows(dtype(), c.num_tokens, blocks, place);
          const std::int64_t num_rows = c.num_tokens * c.top_k;
          for (bool by_map : {false, true}) {
            Tensor rows(device(), DType::kE4M3, {num_rows, width}),
                row_scales(device(), dtype(), {num_rows, blocks}, place);
            if (by_map)
              shuffle_rows(x.tensor.read_only(), scales.tensor.read_only(), row_token.read_only(), rows,
                           row_scales, Call(device()));
            else
              permute(x.tensor.read_only(), scales.tensor.read_only(),
                      {offsets, scale_offsets, row_token, slot_row}, rows, row_scales, Call(device()));
            EXPECT_EQ(rows.get_bytes(), gathered(x.bytes, x.row_bytes, c.num_tokens, p.row_token));
            EXPECT_EQ(row_scales.get_bytes(),
                      gathered(scales.bytes, scales.row_bytes, c.num_tokens, p.row_token));
            EXPECT_TRUE(rows.surroundings_intact());
            EXPECT_TRUE(row_scales.surroundings_intact());
          }
        }
}

INSTANTIATE_TEST_SUITE_P(, PermuteScales,
                         ::testing::ValuesIn(devices_times({DType::kF32, DType::kE8M0, DType::kBF16})),
                         device_dtype_name);

INSTANTIATE_TEST_SUITE_P(, PermutePlan, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
