#pragma once
// Loops at the peak bf16 rate of the levels that have bf16 products. Each returns the flops it did.

#include <cstdint>

namespace moecore::cpu {

/// AVX512-BF16: vdpbf16ps on registers.
double bf16_dot_flops(std::int64_t rounds, float* sink);

/// AMX: tdpbf16ps on tiles.
double amx_flops(std::int64_t rounds, float* sink);

}  // namespace moecore::cpu
