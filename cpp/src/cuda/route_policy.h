#pragma once
// How route is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "ops/route.h"

namespace moecore::cuda {

inline constexpr int kRouteMaxThreads = 128;

struct RoutePolicy {
  int lanes = 0;     // that share a token: 8, 16 or 32 in the packed form; 0: the general form, a warp
  int per_lane = 1;  // experts that a lane holds in registers: 4, 8, 16 or 32 packed, general 1, 2, 4, ... 64
  int threads = 32;  // of a block
  int blocks = 1;
};

/// Experts that a lane has in the packed form; 0 where the problem is not for it.
inline std::int64_t packed_experts_per_lane(const RouteProblem& p, int lanes) {
  constexpr std::int64_t kMaxSlots = 16, kMaxPackedExperts = 512;
  const bool grouped = p.num_groups > 1;
  if (p.num_experts > kMaxPackedExperts || p.top_k > kMaxSlots) return 0;
  if (p.scoring == Scoring::kSoftmax && (p.bias || grouped)) return 0;  // divides every score
  if (!grouped) return (p.num_experts + lanes - 1) / lanes;
  if (p.num_groups > lanes || lanes % p.num_groups != 0) return 0;
  const std::int64_t group_lanes = lanes / p.num_groups, group_size = p.num_experts / p.num_groups;
  return group_size % group_lanes == 0 ? group_size / group_lanes : 0;
}

/// The packed form with `lanes` lanes a token, or lanes = 0 where it cannot be.
inline RoutePolicy packed_route_policy(const RouteProblem& p, int lanes, int num_sms) {
  RoutePolicy policy{.lanes = lanes, .per_lane = lanes == 16 ? 8 : 4};
  const std::int64_t needed = packed_experts_per_lane(p, lanes);
  const int most = lanes == 8 ? 4 : 16;
  while (policy.per_lane < needed && policy.per_lane < most) policy.per_lane *= 2;
  if (needed == 0 || policy.per_lane < needed) return {};
  const std::int64_t warps = (p.num_tokens * lanes + 31) / 32;
  while (policy.threads < kRouteMaxThreads &&
         warps > static_cast<std::int64_t>(policy.threads / 32) * num_sms)
    policy.threads *= 2;
  const std::int64_t per_block = policy.threads / 32;
  policy.blocks = static_cast<int>(std::clamp<std::int64_t>((warps + per_block - 1) / per_block, 1, 1 << 20));
  return policy;
}

inline RoutePolicy general_route_policy(const RouteProblem& p, int num_sms) {
  constexpr int kWarpsPerSm = 32;  // more tokens than this queue behind them, with their logits prefetched
  RoutePolicy policy;
  while (policy.per_lane * 32 < p.num_experts) policy.per_lane *= 2;
  while (policy.threads < kRouteMaxThreads &&
         p.num_tokens > static_cast<std::int64_t>(policy.threads / 32) * num_sms)
    policy.threads *= 2;
  const std::int64_t warps = policy.threads / 32;
  policy.blocks = static_cast<int>(
      std::clamp<std::int64_t>((p.num_tokens + warps - 1) / warps, 1, num_sms * (kWarpsPerSm / warps)));
  return policy;
}

inline RoutePolicy select_route_policy(const RouteProblem& p, int num_sms) {
  // Fewer lanes cost fewer instructions a token, more lanes less time for each: they pay while a warp a token
  // leaves the SMs room, and for the many scores of grouped selection.
  constexpr std::int64_t kFewTokensPerSm = 16, kFewExperts = 32;
  const bool few_tokens = p.num_tokens <= kFewTokensPerSm * num_sms;
  const bool few_experts = p.num_experts <= kFewExperts;
  if (few_tokens && few_experts) return general_route_policy(p, num_sms);
  const int lanes = few_experts ? 8 : few_tokens || p.num_groups > 1 ? 32 : 16;
  for (int tried : {lanes, 32}) {
    const RoutePolicy policy = packed_route_policy(p, tried, num_sms);
    if (policy.lanes > 0) return policy;
  }
  return general_route_policy(p, num_sms);
}

}  // namespace moecore::cuda
