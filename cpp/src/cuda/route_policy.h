#pragma once
// How route is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "ops/route.h"

namespace moecore::cuda {

inline constexpr int kRouteMaxThreads = 128;

enum class RouteForm { kGeneral, kPacked, kThread, kBlock };

struct RoutePolicy {
  RouteForm form = RouteForm::kGeneral;
  int lanes = 32;    // of a token: thread form 1, packed 8, 16 or 32, block form 64 to 256, general 32
  int per_lane = 1;  // experts of a lane: thread form 8 or 16, packed 4, 8 or 16, general 1, 2, 4, ... 64
  int threads = 32;  // of a block
  int blocks = 1;
};

/// Whether experts can be ordered without dividing every score by a sum.
inline bool orders_by_own_score(const RouteProblem& p) {
  return p.scoring != Scoring::kSoftmax || (!p.bias && p.num_groups == 1);
}

/// Experts that a lane has in the packed form; 0 where the problem is not for it.
inline std::int64_t packed_experts_per_lane(const RouteProblem& p, int lanes) {
  constexpr std::int64_t kMaxSlots = 16, kMaxPackedExperts = 512;
  const bool grouped = p.num_groups > 1;
  if (p.num_experts > kMaxPackedExperts || p.top_k > kMaxSlots) return 0;
  if (!orders_by_own_score(p)) return 0;
  if (!grouped) return (p.num_experts + lanes - 1) / lanes;
  if (p.num_groups > lanes || lanes % p.num_groups != 0) return 0;
  const std::int64_t group_lanes = lanes / p.num_groups, group_size = p.num_experts / p.num_groups;
  return group_size % group_lanes == 0 ? group_size / group_lanes : 0;
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

/// The packed form with `lanes` lanes a token, or the general form where it cannot be.
inline RoutePolicy packed_route_policy(const RouteProblem& p, int lanes, int num_sms) {
  RoutePolicy policy{.form = RouteForm::kPacked, .lanes = lanes, .per_lane = lanes == 16 ? 8 : 4};
  const std::int64_t needed = packed_experts_per_lane(p, lanes);
  const int most = lanes == 8 ? 4 : 16;
  while (policy.per_lane < needed && policy.per_lane < most) policy.per_lane *= 2;
  if (needed == 0 || policy.per_lane < needed) return general_route_policy(p, num_sms);
  const std::int64_t warps = (p.num_tokens * lanes + 31) / 32;
  while (policy.threads < kRouteMaxThreads &&
         warps > static_cast<std::int64_t>(policy.threads / 32) * num_sms)
    policy.threads *= 2;
  const std::int64_t per_block = policy.threads / 32;
  policy.blocks = static_cast<int>(std::clamp<std::int64_t>((warps + per_block - 1) / per_block, 1, 1 << 20));
  return policy;
}

inline constexpr int kMaxThreadExperts = 16, kMaxThreadSlots = 8;

/// A thread a token, or the general form where it cannot be.
inline RoutePolicy thread_route_policy(const RouteProblem& p, int num_sms) {
  if (p.num_experts > kMaxThreadExperts || p.top_k > kMaxThreadSlots || p.num_groups > 1 ||
      !orders_by_own_score(p))
    return general_route_policy(p, num_sms);
  RoutePolicy policy{.form = RouteForm::kThread, .lanes = 1, .per_lane = p.num_experts <= 8 ? 8 : 16};
  while (policy.threads < kRouteMaxThreads &&
         p.num_tokens > static_cast<std::int64_t>(policy.threads) * num_sms)
    policy.threads *= 2;
  policy.blocks = static_cast<int>(
      std::clamp<std::int64_t>((p.num_tokens + policy.threads - 1) / policy.threads, 1, 1 << 20));
  return policy;
}

inline constexpr int kMaxBlockWarps = 8;

/// A block a token, or the general form where it cannot be: more than 32 candidates would be left to rank.
inline RoutePolicy block_route_policy(const RouteProblem& p, int num_sms) {
  constexpr std::int64_t kMaxSlots = 16, kMaxCandidates = 32;
  const std::int64_t warps = (p.num_experts + 31) / 32;
  const bool grouped = p.num_groups > 1;
  const std::int64_t lists = grouped ? p.topk_groups : warps;
  if (p.num_tokens > 1 << 30 || warps < 2 || warps > kMaxBlockWarps || p.top_k > kMaxSlots ||
      lists * p.top_k > kMaxCandidates || (grouped && p.num_experts != 32 * p.num_groups) ||
      !orders_by_own_score(p))
    return general_route_policy(p, num_sms);
  const int threads = static_cast<int>(32 * warps);
  return {.form = RouteForm::kBlock,
          .lanes = threads,
          .threads = threads,
          .blocks = static_cast<int>(std::max<std::int64_t>(p.num_tokens, 1))};
}

inline RoutePolicy select_route_policy(const RouteProblem& p, int num_sms) {
  // More lanes take less time for a token and more instructions: a block while an SM has up to 3 tokens, a
  // warp up to 16, and a warp always for the many scores of grouped selection. On an H200, us, in blocks and
  // in warps: E128 K8 1.57 and 1.66 for 64 tokens, 1.80 and 1.77 for 384, 3.12 and 1.92 for 1024; grouped
  // E256 1.77 and 2.27, 2.53 and 2.69, 4.19 and 3.09.
  auto at_most_per_sm = [&](std::int64_t n) { return p.num_tokens <= n * num_sms; };
  const bool few_experts = p.num_experts <= 32;
  RoutePolicy policy = thread_route_policy(p, num_sms);
  if (policy.form == RouteForm::kGeneral && at_most_per_sm(3)) policy = block_route_policy(p, num_sms);
  if (policy.form != RouteForm::kGeneral || (few_experts && at_most_per_sm(16))) return policy;
  for (int lanes : {few_experts ? 8 : at_most_per_sm(16) || p.num_groups > 1 ? 32 : 16, 32}) {
    policy = packed_route_policy(p, lanes, num_sms);
    if (policy.form == RouteForm::kPacked) break;
  }
  return policy;
}

}  // namespace moecore::cuda
