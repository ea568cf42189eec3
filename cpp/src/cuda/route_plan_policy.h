#pragma once
// How route_plan is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "cuda/plan_policy.h"
#include "cuda/route_policy.h"
#include "ops/route_plan.h"

namespace moecore::cuda {

struct RoutePlanPolicy {
  int fused = 0;     // 1: one launch of one block; 0: route, then plan
  int per_lane = 0;  // of route's packed form with 32 lanes a token
  PlanPolicy plan{};
};

inline constexpr int kRoutePlanMaxThreads = 512;  // leaves route 128 registers
inline constexpr std::int64_t kRoutePlanMaxTokens = kRoutePlanMaxThreads / 32;

/// The one-launch form, or fused = 0 where it cannot be.
inline RoutePlanPolicy fused_route_plan_policy(const RoutePlanProblem& p) {
  const std::int64_t num_tokens = p.route.num_tokens, num_routes = num_tokens * p.route.top_k;
  const RoutePolicy route = packed_route_policy(p.route, 32, 1);
  if (route.form != RouteForm::kPacked || route.per_lane > 8 || num_tokens == 0 ||
      num_tokens > kRoutePlanMaxTokens)
    return {};
  const auto threads = static_cast<int>(std::clamp<std::int64_t>(plan_expert_threads(p.plan.num_experts),
                                                                 32 * num_tokens, kRoutePlanMaxThreads));
  const PlanPolicy plan = one_round_plan_policy(num_routes, threads);
  if (!plan_is_a_part(plan, p.plan.num_experts)) return {};
  return {.fused = 1, .per_lane = route.per_lane, .plan = plan};
}

inline RoutePlanPolicy select_route_plan_policy(const RoutePlanProblem& p) {
  // Beyond this, routing on many SMs gains more than the second launch costs.
  const std::int64_t few_tokens = p.route.num_groups > 1 ? 4 : 8;
  return p.route.num_tokens <= few_tokens ? fused_route_plan_policy(p) : RoutePlanPolicy{};
}

}  // namespace moecore::cuda
