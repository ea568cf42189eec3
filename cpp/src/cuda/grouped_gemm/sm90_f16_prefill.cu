#include "cuda/grouped_gemm/sm90_float.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel float_kernel<DType::kF16, Tiling::kPrefill, false>() {
  return kernel<FloatLoop<__half>, Tiling::kPrefill, false>();
}
template <>
Kernel float_kernel<DType::kF16, Tiling::kPrefill, true>() {
  return kernel<FloatLoop<__half>, Tiling::kPrefill, true>();
}

}  // namespace moecore::cuda::sm90
