#include "cuda/grouped_gemm/sm90.cuh"

namespace moecore::cuda::sm90 {

template Kernel kernel<DType::kBF16, Tiling::kDecode, false>();
template Kernel kernel<DType::kBF16, Tiling::kDecode, true>();

}  // namespace moecore::cuda::sm90
