#include "cuda/grouped_gemm/sm90_float.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel float_kernel<DType::kBF16, Tiling::kDecode, false>() {
  return kernel<FloatLoop<__nv_bfloat16>, Tiling::kDecode, false>();
}
template <>
Kernel float_kernel<DType::kBF16, Tiling::kDecode, true>() {
  return kernel<FloatLoop<__nv_bfloat16>, Tiling::kDecode, true>();
}

}  // namespace moecore::cuda::sm90
