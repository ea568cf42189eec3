#pragma once
// How plan is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "ops/plan.h"

namespace moecore::cuda {

struct PlanPolicy {
  int tiny = 0;      // 1: at most kPlanTinyMaxRoutes, every thread compares its expert with all of them
  int launches = 1;  // 1: one cluster does everything; 2: blocks count their share, a second launch places it
  int blocks = 1;    // one launch: 1, or those of a cluster: 4, 8 or 16
  int threads = 1024;
  int rounds = 1;  // routes that a thread ranks at a time: 1, 2, 4 or 8
  int order = 0;   // one launch: 1: a block orders its routes before it writes their rows
};

inline constexpr std::int64_t kPlanTinyMaxRoutes = 32;

// The two-launch form. Every block of the second launch sums the counts of all blocks, so more blocks cost
// more there than they save: 128 of them are enough to place a route per clock cycle.
inline constexpr int kPlanMaxBlocks = 128;
inline constexpr int kPlanTileThreads = 512;
inline constexpr int kPlanTileRounds = 2;
inline constexpr std::int64_t kPlanTile = kPlanTileThreads * kPlanTileRounds;

// The one-launch form, and the shared memory that every architecture has for it: the first row that holds the
// problem. More blocks rank their routes sooner, and each has every expert's count to send and to add up. 16
// are beyond the portable size, and not every device has a place for them. On an H200, us, and where two
// launches take over:
//   routes x experts    512     1024    2048    4096    4096    8192    8192    8192    16384   32768   32768
//                       x 128   x 128   x 256   x 128   x 256   x 8     x 128   x 256   x 256   x 8     x 128
//   1 block             2.14    2.72    4.14    5.82    6.31    8.45    9.71    10.6
//   4                   1.75    2.02    2.90    3.51    3.76    4.04    4.65    5.04    7.60    10.0    11.6
//   8                   1.82    1.90    2.51    2.86    3.12    3.04    3.63    4.07    5.23    6.00    6.95
//   16                  2.13    2.17    2.80    2.60    3.16    2.37    3.21    3.89    4.64    4.26    5.05
//   two launches                                                                        8.14    5.29    7.89
struct PlanCluster {
  int blocks;
  std::int64_t min_routes, min_routes_per_expert, max_routes;
};
inline constexpr PlanCluster kPlanClusters[] = {
    {16, 4096, 32, 32768}, {8, 1024, 4, 16384}, {4, 257, 0, 8192}, {1, 0, 0, 8192}};
inline constexpr std::size_t kPlanSingleMaxSmem = 96 * 1024;

/// Routes of a block from which it pays to order them before their rows are written: an SM is slow to scatter
/// words, and few experts scatter less. 512 of 8192 over 256 experts: 3.9 us instead of 4.5; 256 of 4096 over
/// 128: 2.6 instead of 2.8; 2048 of 32768 over 8: 5.3 instead of 6.0. In one block 512: 2.3 instead of 2.4.
constexpr std::int64_t plan_ordered_routes(int blocks, std::int64_t num_experts) {
  return blocks == 1 ? 512 : num_experts >= 32 ? 256 : 2048;
}

constexpr std::int64_t plan_blocks(std::int64_t num_routes) {
  return std::clamp<std::int64_t>((num_routes + kPlanTile - 1) / kPlanTile, 1, kPlanMaxBlocks);
}

/// Shared memory: scan scratch and a barrier, expert offsets, in a cluster every block's counts, per-warp
/// counts and, where a block orders its routes, their order.
constexpr std::size_t plan_smem_bytes(const PlanPolicy& policy, std::int64_t num_routes,
                                      std::int64_t num_experts) {
  const bool one_launch = policy.launches == 1;
  const std::int64_t share = (num_routes + policy.blocks - 1) / policy.blocks, per_warp = 32 * policy.rounds;
  const std::int64_t warps = one_launch ? (share + per_warp - 1) / per_warp : policy.threads / 32;
  const std::int64_t counts = (warps * num_experts * 2 + 15) / 16 * 16;
  const std::int64_t row_order = one_launch && policy.order ? share * 4 : 0;
  const std::int64_t block_counts = one_launch && policy.blocks > 1 ? policy.blocks * num_experts * 4 : 0;
  return static_cast<std::size_t>(34 * 8 + num_experts * 4 + block_counts + counts + row_order);
}

/// Experts of a thread: the instance of a kernel. The one-launch form has them for up to two.
inline constexpr int kPlanMaxExpertsPerThread = 2;
constexpr int plan_experts_per_thread(const PlanPolicy& policy, std::int64_t num_experts) {
  const auto threads = static_cast<std::int64_t>(policy.threads);
  return static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>((num_experts + threads - 1) / threads)));
}

/// Threads of a block for so many experts.
constexpr int plan_expert_threads(std::int64_t num_experts) {
  return static_cast<int>(std::min<std::int64_t>((num_experts + 31) / 32 * 32, 1024));
}

/// One block that ranks all routes in one round, for launches of which plan is a part.
constexpr PlanPolicy one_round_plan_policy(std::int64_t num_routes, int threads) {
  return {num_routes <= kPlanTinyMaxRoutes, 1, 1, threads, 1, 0};
}

/// Whether a launch of which plan is a part can have this one: its block has a thread for every expert.
constexpr bool plan_is_a_part(const PlanPolicy& policy, std::int64_t num_experts) {
  return policy.tiny || plan_experts_per_thread(policy, num_experts) == 1;
}

/// `max_cluster`: the most blocks that a cluster has on the device; 1 where there are none.
inline PlanPolicy select_plan_policy(std::int64_t num_routes, std::int64_t num_experts, int max_cluster) {
  const std::int64_t expert_threads = plan_expert_threads(num_experts);
  if (num_routes <= kPlanTinyMaxRoutes)
    return one_round_plan_policy(num_routes, static_cast<int>(expert_threads));
  for (const PlanCluster& c : kPlanClusters) {
    if (c.blocks > max_cluster ||
        num_routes < std::max(c.min_routes, c.min_routes_per_expert * num_experts) ||
        num_routes > c.max_routes)
      continue;
    // As few warps as hold the routes in few rounds, since counts are summed over the warps; a thread for
    // every expert.
    const std::int64_t share = (num_routes + c.blocks - 1) / c.blocks;
    const int order = share >= plan_ordered_routes(c.blocks, num_experts);
    for (const auto& [rounds, most_threads] : {std::pair{1, 256}, {2, 512}, {4, 512}, {8, 1024}}) {
      const std::int64_t route_threads = (share + 32 * rounds - 1) / (32 * rounds) * 32;
      const auto threads = static_cast<int>(std::max(route_threads, expert_threads));
      const PlanPolicy policy{0, 1, c.blocks, threads, rounds, order};
      if (route_threads <= most_threads &&
          plan_smem_bytes(policy, num_routes, num_experts) <= kPlanSingleMaxSmem)
        return policy;
    }
  }
  return {0, 2, static_cast<int>(plan_blocks(num_routes)), kPlanTileThreads, kPlanTileRounds};
}

}  // namespace moecore::cuda
