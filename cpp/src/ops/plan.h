#pragma once
// The validated form of plan.

#include <cstddef>
#include <cstdint>

#include "core/check.h"
#include "core/index.h"
#include "moecore/plan.h"
#include "ops/backend.h"

namespace moecore {

inline constexpr std::int64_t kMaxScaleAlignment = 1024;

struct PlanProblem {
  IndexRef ids;  // [T,K], rows ids_stride apart
  std::int64_t ids_stride = 0;
  std::int64_t num_tokens = 0;
  std::int64_t top_k = 0;
  std::int64_t num_experts = 0;
  const std::int32_t* expert_map = nullptr;  // [num_global] or none
  std::int64_t num_global = 0;
  std::int64_t first_expert = 0;
  std::int64_t scale_alignment = 128;
  std::int32_t* expert_offsets = nullptr;  // [E+1]
  std::int32_t* scale_offsets = nullptr;   // [E+1]
  std::int32_t* row_token = nullptr;       // [R]
  std::int32_t* slot_row = nullptr;        // [T,K] dense
  std::int32_t* row_route = nullptr;       // [R] or none
  std::int32_t* problem_sizes1 = nullptr;  // [E,3] or none
  std::int32_t* problem_sizes2 = nullptr;  // [E,3] or none
  std::int64_t hidden = 0;
  std::int64_t inter = 0;
  bool gated = true;
  bool swap_ab = false;
};

/// Checks the arguments of plan, its workspace included.
PlanProblem make_plan_problem(const Check& check, const TensorView& ids, const Plan& out,
                              const PlanOptions& options, const ExecContext& ctx);

namespace cpu {
BackendFn<PlanProblem> plan;
std::size_t plan_workspace_bytes(std::int64_t num_routes, std::int64_t num_experts);
}  // namespace cpu
namespace cuda {
BackendFn<PlanProblem> plan;
std::size_t plan_workspace_bytes(std::int64_t num_routes, std::int64_t num_experts);
}  // namespace cuda

}  // namespace moecore
