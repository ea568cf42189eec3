#include "ops/plan.h"

#include <limits>

#include "core/table.h"
#include "ops/route.h"

namespace moecore {
namespace {

// An i32 output of the plan: checked, then its data pointer.
std::int32_t* output(const Check& check, std::string_view arg, const TensorView& t, int ndim,
                     std::int64_t length, std::string_view meaning) {
  check.tensor(arg, t, I32Type::kRows, ndim, Check::Access::kOut);
  check.dim(arg, t, 0, length, meaning);
  if (!t.is_dense()) check.fail(arg, t.describe(), "a dense tensor");
  return static_cast<std::int32_t*>(t.data);
}

}  // namespace

std::size_t plan_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts,
                                 Device device) {
  return device.type == DeviceType::kCUDA ? cuda::plan_workspace_bytes(num_tokens * top_k, num_experts)
                                          : cpu::plan_workspace_bytes(num_tokens * top_k, num_experts);
}

PlanProblem make_plan_problem(const Check& check, const TensorView& ids, const Plan& out,
                              const PlanOptions& options, const ExecContext& ctx) {
  check.tensor("ids", ids, IndexTypes::kRows, 2);
  const std::int64_t num_tokens = ids.shape[0], top_k = ids.shape[1], num_routes = num_tokens * top_k;
  const std::int64_t num_experts = options.num_experts;
  check.that(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts", num_experts,
             "1 to " + std::to_string(kMaxExperts));
  check.that(options.scale_alignment >= 1 && options.scale_alignment <= kMaxScaleAlignment, "scale_alignment",
             options.scale_alignment, "1 to " + std::to_string(kMaxScaleAlignment));
  // The last offset must fit an i32 for every routing.
  const std::int64_t max_routes =
      std::numeric_limits<std::int32_t>::max() - (options.scale_alignment - 1) * num_experts;
  check.that(num_routes <= max_routes, "num_tokens * top_k", num_routes,
             "at most 2^31 - 1 - (scale_alignment - 1) * num_experts = " + std::to_string(max_routes));
  if (options.expert_map) check.tensor("expert_map", *options.expert_map, I32Type::kRows, 1);

  PlanProblem problem;
  problem.expert_offsets =
      output(check, "expert_offsets", out.expert_offsets, 1, num_experts + 1, "num_experts + 1");
  problem.scale_offsets =
      output(check, "scale_offsets", out.scale_offsets, 1, num_experts + 1, "num_experts + 1");
  problem.row_token = output(check, "row_token", out.row_token, 1, num_routes, "num_tokens * top_k");
  problem.slot_row = output(check, "slot_row", out.slot_row, 2, num_tokens, "num_tokens");
  check.dim("slot_row", out.slot_row, 1, top_k, "top_k");
  if (out.row_route)
    problem.row_route = output(check, "row_route", *out.row_route, 1, num_routes, "num_tokens * top_k");
  if (out.problem_sizes1) {
    problem.problem_sizes1 =
        output(check, "problem_sizes1", *out.problem_sizes1, 2, num_experts, "num_experts");
    check.dim("problem_sizes1", *out.problem_sizes1, 1, 3, "(m, n, k)");
  }
  if (out.problem_sizes2) {
    problem.problem_sizes2 =
        output(check, "problem_sizes2", *out.problem_sizes2, 2, num_experts, "num_experts");
    check.dim("problem_sizes2", *out.problem_sizes2, 1, 3, "(m, n, k)");
  }
  check.workspace(plan_workspace_bytes(num_tokens, top_k, num_experts, ctx.device));

  problem.ids = IndexRef(ids);
  problem.ids_stride = ids.strides[0];
  problem.num_tokens = num_tokens;
  problem.top_k = top_k;
  problem.num_experts = num_experts;
  if (options.expert_map) {
    problem.expert_map = static_cast<const std::int32_t*>(options.expert_map->data);
    problem.num_global = options.expert_map->shape[0];
  }
  problem.first_expert = options.first_expert;
  problem.scale_alignment = options.scale_alignment;
  problem.hidden = options.hidden;
  problem.inter = options.inter;
  problem.gated = options.gated;
  problem.swap_ab = options.swap_ab;
  return problem;
}

void plan(const TensorView& ids, const Plan& out, const PlanOptions& options, const ExecContext& ctx) {
  const PlanProblem problem = make_plan_problem(Check("plan", ctx), ids, out, options, ctx);
  run_on_backend(cpu::plan, cuda::plan, problem, ctx);
}

}  // namespace moecore
