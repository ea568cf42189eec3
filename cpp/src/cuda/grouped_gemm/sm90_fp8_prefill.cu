#include "cuda/grouped_gemm/sm90_fp8_prefill.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel fp8_kernel<false, Tiling::kPrefill, false>() {
  return kernel<Fp8PrefillLoop<false>, Tiling::kPrefill, false>();
}
template <>
Kernel fp8_kernel<false, Tiling::kPrefill, true>() {
  return kernel<Fp8PrefillLoop<false>, Tiling::kPrefill, true>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, false>() {
  return kernel<Fp8PrefillLoop<true>, Tiling::kPrefill, false>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, true>() {
  return kernel<Fp8PrefillLoop<true>, Tiling::kPrefill, true>();
}

}  // namespace moecore::cuda::sm90
