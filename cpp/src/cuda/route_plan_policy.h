#pragma once
// How route_plan is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "cuda/plan_policy.h"
#include "cuda/route_policy.h"
#include "ops/route_plan.h"

namespace moecore::cuda {

struct RoutePlanPolicy {
  int fused = 0;     // 1: one launch of one block or cluster; 0: route, then plan
  int per_lane = 0;  // of route's packed form with 32 lanes a token
  PlanPolicy plan{};
};

/// Tokens that one launch takes: a block has a warp for each of its share.
inline constexpr std::int64_t kRoutePlanBlockTokens = 16;
inline constexpr std::int64_t kRoutePlanMaxTokens = 128;
inline constexpr int kRoutePlanMaxThreads = 512;  // leaves route 128 registers

/// The one-launch form, or fused = 0 where it cannot be.
inline RoutePlanPolicy fused_route_plan_policy(const RoutePlanProblem& p, int compute_capability) {
  const std::int64_t num_tokens = p.route.num_tokens, num_routes = num_tokens * p.route.top_k;
  const RoutePolicy route = packed_route_policy(p.route, 32, 1);
  const bool cluster = num_tokens > kRoutePlanBlockTokens;
  if (route.lanes == 0 || route.per_lane > 8 || num_tokens == 0 || num_tokens > kRoutePlanMaxTokens) return {};
  if (cluster && compute_capability < 90) return {};

  RoutePlanPolicy policy{.fused = 1, .per_lane = route.per_lane};
  const int blocks = cluster ? kPlanClusterBlocks : 1;
  const std::int64_t tokens = (num_tokens + blocks - 1) / blocks;
  const std::int64_t expert_threads = (p.plan.num_experts + 31) / 32 * 32;
  const auto threads =
      static_cast<int>(std::clamp<std::int64_t>(expert_threads, 32 * tokens, kRoutePlanMaxThreads));
  policy.plan = {num_routes <= kPlanTinyMaxRoutes, 1, blocks, threads, 1};
  return policy;
}

inline RoutePlanPolicy select_route_plan_policy(const RoutePlanProblem& p, int compute_capability) {
  return fused_route_plan_policy(p, compute_capability);
}

}  // namespace moecore::cuda
