#pragma once
// The case grids, as data. Letters as in moecore/moecore.h.

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "support/fixture.h"

namespace moecore::test {

/// Who the tokens are sent to.
enum class Routing {
  kUniform,     // K distinct experts, evenly
  kHot,         // every token to expert E-1 first
  kGaps,        // only every third expert gets anything
  kInvalid,     // some ids are -1, E, or far outside
  kAllDropped,  // no id is valid
};

struct RoutingCase {
  std::int64_t num_tokens, top_k, num_experts;
  Routing routing = Routing::kUniform;

  Array ids(std::uint64_t seed = 1) const;
};

std::ostream& operator<<(std::ostream& out, const RoutingCase& c);

/// Every T, E and K that has caught somebody: zero and one token, one expert, K = E, expert counts around the
/// widths of vectors and warps, more experts than tokens.
const std::vector<RoutingCase>& routing_cases();

/// A handful of them, for ops that cost more per row.
const std::vector<RoutingCase>& short_routing_cases();

/// Dense; rows apart; base pointer one element past a boundary; both.
std::vector<Place> places(DType dtype);

/// Row widths: tails of every vector length, one element, model sizes.
const std::vector<std::int64_t>& widths();

}  // namespace moecore::test
