#include "cuda/grouped_gemm/sm90_float.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel float_kernel<DType::kBF16, Tiling::kPrefill, false>() {
  return kernel<FloatLoop<__nv_bfloat16>, Tiling::kPrefill, false>();
}
template <>
Kernel float_kernel<DType::kBF16, Tiling::kPrefill, true>() {
  return kernel<FloatLoop<__nv_bfloat16>, Tiling::kPrefill, true>();
}

}  // namespace moecore::cuda::sm90
