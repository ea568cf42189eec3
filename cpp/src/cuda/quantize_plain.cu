// quantize: the instances that read rows as they are. cuda/quantize_kernels.cuh has the kernels.

#include "cuda/quantize_kernels.cuh"

namespace moecore::cuda {

void launch_plain(const QuantizeLaunch& l) {
  launch_quantize<Source::kRows>(l);
}

void launch_amax_plain(const AmaxLaunch& l) {
  launch_amax<Source::kRows>(l);
}

}  // namespace moecore::cuda
