// Ops that have no CUDA kernel.

#include "moecore/error.h"
#include "ops/quantize.h"

namespace moecore::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw Unsupported(std::string(op) +
                    ": has no CUDA kernel; the CUDA engine has route, plan, permute, shuffle_rows, "
                    "activate, finalize and transpose_experts");
}

}  // namespace

void quantize(const QuantizeProblem&, const ExecContext&) {
  refuse("quantize");
}
void dequantize(const DequantizeProblem&, const ExecContext&) {
  refuse("dequantize");
}
void global_scale(const GlobalScaleProblem&, const ExecContext&) {
  refuse("global_scale");
}
void convert_scales(const ConvertScalesProblem&, const ExecContext&) {
  refuse("convert_scales");
}

}  // namespace moecore::cuda
