#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <functional>

#include "cpu/isa.h"

namespace moecore::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return kAvx512Kernels;
  if (active_isa() >= Isa::kAvx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

void sort_largest(std::int64_t* packed, std::int64_t n, std::int64_t k) {
  if (k < n) std::nth_element(packed, packed + k, packed + n, std::greater<>());
  std::sort(packed, packed + std::min(k, n), std::greater<>());
}

}  // namespace moecore::cpu
