#include "cuda/grouped_gemm/sm90.cuh"

namespace moecore::cuda::sm90 {

template Kernel kernel<DType::kF16, Tiling::kPrefill, false>();
template Kernel kernel<DType::kF16, Tiling::kPrefill, true>();

}  // namespace moecore::cuda::sm90
