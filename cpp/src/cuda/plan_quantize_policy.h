#pragma once
// When plan and the tokens' quantize share a launch, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "cuda/plan_policy.h"
#include "cuda/quantize_policy.h"
#include "ops/plan_quantize.h"

namespace moecore::cuda {

struct PlanQuantizePolicy {
  int fused = 1;      // 1: one launch where one can be, 0: plan, then quantize
  PlanPolicy plan{};  // one block of it
};

/// Routes that one block plans in one round, beside blocks that quantise. What the launch is for are few
/// tokens: with many, plan spreads over a cluster or over two launches.
inline constexpr std::int64_t kPlanQuantizeMaxRoutes = 512;

inline PlanQuantizePolicy select_plan_quantize_policy(const PlanQuantizeProblem& p) {
  const std::int64_t num_routes = p.plan.num_tokens * p.plan.top_k;
  const auto route_threads = static_cast<int>(std::min<std::int64_t>((num_routes + 31) / 32 * 32, 1024));
  return {.plan = one_round_plan_policy(num_routes,
                                        std::max(route_threads, plan_expert_threads(p.plan.num_experts)))};
}

/// Blocks for each token, as wide as plan's block.
inline std::int64_t token_parts(const PlanQuantizePolicy& policy, const PlanQuantizeProblem& p) {
  return row_parts({.threads = policy.plan.threads}, columns_of_row(p.tokens));
}

/// Why the two are not one launch; empty where they are.
inline std::string_view plan_quantize_refusal(const PlanQuantizePolicy& policy,
                                              const PlanQuantizeProblem& p) {
  constexpr std::int64_t kMaxGrid = 65535;
  const QuantFormat& f = p.tokens.format;
  if (!policy.fused) return "the policy says fused=0";
  if (p.plan.num_tokens == 0) return "there are no tokens";
  if (p.plan.num_tokens * p.plan.top_k > kPlanQuantizeMaxRoutes)
    return "one block does not plan so many routes in one round";
  if (!plan_is_a_part(policy.plan, p.plan.num_experts)) return "there is no thread for each expert";
  if (f.kind != QuantKind::kFp8 || f.granularity != Granularity::kBlock128 || p.tokens.dtype != DType::kBF16)
    return "it quantises bf16 to fp8_block128";
  if (!whole_units(p.tokens)) return "rows of x are not aligned units of 16 columns";
  if (token_parts(policy, p) > kMaxGrid || p.plan.num_tokens >= kMaxGrid)
    return "x is too large for its grid";
  return "";
}

}  // namespace moecore::cuda
