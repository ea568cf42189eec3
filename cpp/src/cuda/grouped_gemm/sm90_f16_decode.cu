#include "cuda/grouped_gemm/sm90_float.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel float_kernel<DType::kF16, Tiling::kDecode, false>() {
  return kernel<FloatLoop<__half>, Tiling::kDecode, false>();
}
template <>
Kernel float_kernel<DType::kF16, Tiling::kDecode, true>() {
  return kernel<FloatLoop<__half>, Tiling::kDecode, true>();
}

}  // namespace moecore::cuda::sm90
