#pragma once
// How route is launched, as a function of the problem's sizes and the device's.

#include <cstdint>

#include "ops/route.h"

namespace moecore::cuda {

struct RoutePolicy {
  int per_lane = 1;  // experts that a lane holds in registers: 1, 2, 4, ... 64
  int threads = 32;  // of a block; a warp routes one token
};

inline RoutePolicy select_route_policy(std::int64_t num_tokens, std::int64_t num_experts, int num_sms) {
  RoutePolicy policy;
  while (policy.per_lane * 32 < num_experts) policy.per_lane *= 2;
  // Wider blocks once every SM has one: fewer blocks to start.
  while (policy.threads < 128 && num_tokens > static_cast<std::int64_t>(policy.threads / 32) * num_sms * 4)
    policy.threads *= 2;
  return policy;
}

}  // namespace moecore::cuda
