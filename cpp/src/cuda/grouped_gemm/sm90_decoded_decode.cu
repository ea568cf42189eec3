#include "cuda/grouped_gemm/sm90_decoded.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel decoded_kernel<OperandForm::kMxfp4, Tiling::kDecode, false>() {
  return kernel<DecodedLoop<OperandForm::kMxfp4>, Tiling::kDecode, false>();
}
template <>
Kernel decoded_kernel<OperandForm::kMxfp4, Tiling::kDecode, true>() {
  return kernel<DecodedLoop<OperandForm::kMxfp4>, Tiling::kDecode, true>();
}
template <>
Kernel decoded_kernel<OperandForm::kNvfp4, Tiling::kDecode, false>() {
  return kernel<DecodedLoop<OperandForm::kNvfp4>, Tiling::kDecode, false>();
}
template <>
Kernel decoded_kernel<OperandForm::kNvfp4, Tiling::kDecode, true>() {
  return kernel<DecodedLoop<OperandForm::kNvfp4>, Tiling::kDecode, true>();
}

}  // namespace moecore::cuda::sm90
