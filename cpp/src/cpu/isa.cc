#include "cpu/isa.h"

#include <array>
#include <cstdlib>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moecore::cpu {
namespace {

constexpr std::array<std::string_view, kNumIsas> kNames = {"baseline", "avx2", "avx512", "avx512_bf16",
                                                           "amx"};

#if defined(__x86_64__)
// Linux hands out the 8 KiB of AMX tile state per process, on request.
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

// CPUID leaf 7: (subleaf 0).edx bits 22 (amx-bf16) and 24 (amx-tile). Read by hand because the names that
// __builtin_cpu_supports takes differ between compiler versions.
bool cpu_has_amx_bf16() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return ((d >> 22) & 1) && ((d >> 24) & 1);
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::kBaseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::kAvx2;
  // VBMI has every CPU with AVX512-BF16 but the first.
  if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))) return Isa::kAvx512;
  return cpu_has_amx_bf16() && request_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace

std::string_view name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = [] {
    Isa chosen = best_isa();
    if (const char* wish = std::getenv("MOECORE_CPU_ISA"))
      for (int i = 0; i < static_cast<int>(chosen); ++i)
        if (kNames[i] == wish) chosen = static_cast<Isa>(i);
    return chosen;
  }();
  return isa;
}

}  // namespace moecore::cpu
