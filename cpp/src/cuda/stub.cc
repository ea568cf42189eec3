// The whole CUDA engine of a build without CUDA: every entry says so.

#include "core/index.h"
#include "moecore/error.h"
#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/fused_experts.h"
#include "ops/grouped_gemm.h"
#include "ops/info.h"
#include "ops/permute.h"
#include "ops/plan.h"
#include "ops/plan_quantize.h"
#include "ops/quantize.h"
#include "ops/route.h"
#include "ops/route_plan.h"
#include "ops/transpose_experts.h"

namespace moecore::cuda {
namespace {

constexpr char kWhy[] =
    "this build of moecore has no CUDA engine (MOECORE_CUDA=OFF, or AUTO where no nvcc or GPU was found)";

[[noreturn]] void refuse(const char* op) {
  throw BackendError(std::string(op) + ": " + kWhy + "; the CPU engine is available: pass CPU tensors");
}

}  // namespace

void route(const RouteProblem&, const ExecContext&) {
  refuse("route");
}
void plan(const PlanProblem&, const ExecContext&) {
  refuse("plan");
}
void route_plan(const RoutePlanProblem&, const ExecContext&) {
  refuse("route_plan");
}
std::string plan_quantize(const PlanQuantizeProblem&, const ExecContext&) {
  refuse("plan_quantize");
}
void permute(const PermuteProblem&, const ExecContext&) {
  refuse("permute");
}
void activate(const ActivateProblem&, const ExecContext&) {
  refuse("activate");
}
void grouped_gemm(const GroupedGemmProblem&, const ExecContext&) {
  refuse("grouped_gemm");
}
std::string quantized_out_refusal(const GroupedGemmProblem&, const ExecContext&) {
  refuse("grouped_gemm");
}
XLayout preferred_x_layout(const GroupedGemmProblem&, const ExecContext&) {
  refuse("grouped_gemm");
}
void finalize(const FinalizeProblem&, const ExecContext&) {
  refuse("finalize");
}
std::string run_decode(const FusedExpertsProblem&, const ExecContext&) {
  refuse("fused_experts");
}
std::size_t decode_workspace_bytes(std::int64_t, std::int64_t, std::int64_t) {
  refuse("fused_experts");
}
void transpose_experts(const TransposeProblem&, const ExecContext&) {
  refuse("transpose_experts");
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
std::size_t plan_workspace_bytes(std::int64_t, std::int64_t) {
  refuse("plan");
}
std::size_t grouped_gemm_workspace_bytes(std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType,
                                         FormPair) {
  refuse("grouped_gemm");
}
Roof measure_roof(int) {
  refuse("measure_roof");
}

int device_count(std::string* why) {
  if (why) *why = kWhy;
  return 0;
}

}  // namespace moecore::cuda
