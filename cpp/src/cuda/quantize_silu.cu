// quantize: the instances that read silu of one half of a row times the other. cuda/quantize_kernels.cuh has
// the kernels.

#include "cuda/quantize_kernels.cuh"

namespace moecore::cuda {

void launch_silu_and_mul(const QuantizeLaunch& l) {
  launch_quantize<Source::kSiluAndMul>(l);
}

}  // namespace moecore::cuda
