// Ops that have no CUDA kernel.

#include "moecore/error.h"
#include "ops/activate.h"
#include "ops/grouped_gemm.h"
#include "ops/plan.h"
#include "ops/route.h"
#include "ops/transpose_experts.h"

namespace moecore::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw Unsupported(std::string(op) +
                    ": has no CUDA kernel; the CUDA engine has permute, shuffle_rows and finalize");
}

}  // namespace

void route(const RouteProblem&, const ExecContext&) {
  refuse("route");
}
void plan(const PlanProblem&, const ExecContext&) {
  refuse("plan");
}
std::size_t plan_workspace_bytes(std::int64_t, std::int64_t) {
  return 0;
}
void activate(const ActivateProblem&, const ExecContext&) {
  refuse("activate");
}
void grouped_gemm(const GroupedGemmProblem&, const ExecContext&) {
  refuse("grouped_gemm");
}
std::size_t grouped_gemm_workspace_bytes(std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType) {
  return 0;
}
void transpose_experts(const TransposeProblem&, const ExecContext&) {
  refuse("transpose_experts");
}

}  // namespace moecore::cuda
