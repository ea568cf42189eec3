#include "cuda/grouped_gemm/sm90_fp8_prefill.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel fp8_kernel<false, Tiling::kPrefill, false>() {
  return fp8_prefill_kernel<false, false>();
}
template <>
Kernel fp8_kernel<false, Tiling::kPrefill, true>() {
  return fp8_prefill_kernel<false, true>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, false>() {
  return fp8_prefill_kernel<true, false>();
}
template <>
Kernel fp8_kernel<true, Tiling::kPrefill, true>() {
  return fp8_prefill_kernel<true, true>();
}

}  // namespace moecore::cuda::sm90
