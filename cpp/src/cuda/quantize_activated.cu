// quantize: the instances that apply an activation to what they read. cuda/quantize_kernels.cuh has the
// kernels.

#include "cuda/quantize_kernels.cuh"

namespace moecore::cuda {

void launch_activated(const QuantizeLaunch& l) {
  launch_quantize<Source::kActivation>(l);
}

void launch_amax_activated(const AmaxLaunch& l) {
  launch_amax<Source::kActivation>(l);
}

}  // namespace moecore::cuda
