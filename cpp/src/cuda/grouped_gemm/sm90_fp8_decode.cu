#include "cuda/grouped_gemm/sm90_fp8.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel fp8_kernel<false, Tiling::kDecode, false>() {
  return kernel<Fp8Loop<false>, Tiling::kDecode, false>();
}
template <>
Kernel fp8_kernel<false, Tiling::kDecode, true>() {
  return kernel<Fp8Loop<false>, Tiling::kDecode, true>();
}
template <>
Kernel fp8_kernel<true, Tiling::kDecode, false>() {
  return kernel<Fp8Loop<true>, Tiling::kDecode, false>();
}
template <>
Kernel fp8_kernel<true, Tiling::kDecode, true>() {
  return kernel<Fp8Loop<true>, Tiling::kDecode, true>();
}

}  // namespace moecore::cuda::sm90
