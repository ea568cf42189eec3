// Ops that have no CUDA kernel.

#include "moecore/error.h"
#include "ops/grouped_gemm.h"
#include "ops/quantize.h"

namespace moecore::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw Unsupported(std::string(op) +
                    ": has no CUDA kernel; the CUDA engine has route, plan, permute, shuffle_rows, "
                    "activate, finalize and transpose_experts");
}

}  // namespace

void grouped_gemm(const GroupedGemmProblem&, const ExecContext&) {
  refuse("grouped_gemm");
}
std::size_t grouped_gemm_workspace_bytes(std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType) {
  return 0;
}
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
