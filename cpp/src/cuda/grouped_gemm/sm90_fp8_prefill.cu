#include "cuda/grouped_gemm/sm90_fp8.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel fp8_kernel<false, Tiling::kPrefill, false>() {
  return kernel<Fp8Loop<false>, Tiling::kPrefill, false>();
}
template <>
Kernel fp8_kernel<false, Tiling::kPrefill, true>() {
  return kernel<Fp8Loop<false>, Tiling::kPrefill, true>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, false>() {
  return kernel<Fp8Loop<true>, Tiling::kPrefill, false>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, true>() {
  return kernel<Fp8Loop<true>, Tiling::kPrefill, true>();
}

}  // namespace moecore::cuda::sm90
