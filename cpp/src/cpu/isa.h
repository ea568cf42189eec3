#pragma once
// Which instruction set the CPU engine runs on. Each level includes the ones before it.

#include <cstdint>
#include <string_view>

namespace moecore::cpu {

enum class Isa : std::uint8_t {
  kBaseline,    // what the compiler assumes (SSE2 on x86-64), GCC vector extensions
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // and AVX512-BF16
  kAmx,         // and AMX-TILE, AMX-BF16
};
inline constexpr int kNumIsas = static_cast<int>(Isa::kAmx) + 1;

std::string_view name(Isa isa);

/// The best level this CPU and kernel offer, lowered by MOECORE_CPU_ISA (a name). Read once.
Isa active_isa();

/// The best level this CPU and kernel offer.
Isa best_isa();

}  // namespace moecore::cpu
