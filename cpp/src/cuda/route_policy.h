#pragma once
// How route is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "ops/route.h"

namespace moecore::cuda {

inline constexpr int kRouteMaxThreads = 128;

struct RoutePolicy {
  int per_lane = 1;  // experts that a lane holds in registers: 1, 2, 4, ... 64
  int threads = 32;  // of a block; a warp routes one token after the other
  int blocks = 1;
};

inline RoutePolicy select_route_policy(std::int64_t num_tokens, std::int64_t num_experts, int num_sms) {
  constexpr int kWarpsPerSm = 32;  // more tokens than this queue behind them, with their logits prefetched
  RoutePolicy policy;
  while (policy.per_lane * 32 < num_experts) policy.per_lane *= 2;
  while (policy.threads < kRouteMaxThreads &&
         num_tokens > static_cast<std::int64_t>(policy.threads / 32) * num_sms)
    policy.threads *= 2;
  const std::int64_t warps = policy.threads / 32;
  policy.blocks = static_cast<int>(
      std::clamp<std::int64_t>((num_tokens + warps - 1) / warps, 1, num_sms * (kWarpsPerSm / warps)));
  return policy;
}

}  // namespace moecore::cuda
