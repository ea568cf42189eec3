#include "cuda/grouped_gemm/sm90_decoded.cuh"

namespace moecore::cuda::sm90 {

template <>
Kernel decoded_kernel<OperandForm::kMxfp4, Tiling::kPrefill, false>() {
  return kernel<DecodedLoop<OperandForm::kMxfp4>, Tiling::kPrefill, false>();
}
template <>
Kernel decoded_kernel<OperandForm::kMxfp4, Tiling::kPrefill, true>() {
  return kernel<DecodedLoop<OperandForm::kMxfp4>, Tiling::kPrefill, true>();
}
template <>
Kernel decoded_kernel<OperandForm::kNvfp4, Tiling::kPrefill, false>() {
  return kernel<DecodedLoop<OperandForm::kNvfp4>, Tiling::kPrefill, false>();
}
template <>
Kernel decoded_kernel<OperandForm::kNvfp4, Tiling::kPrefill, true>() {
  return kernel<DecodedLoop<OperandForm::kNvfp4>, Tiling::kPrefill, true>();
}

}  // namespace moecore::cuda::sm90
