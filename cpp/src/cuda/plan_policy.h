#pragma once
// How plan is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/plan.h"

namespace moecore::cuda {

struct PlanPolicy {
  int tiny = 0;      // 1: at most kPlanTinyMaxRoutes, every thread compares its expert with all of them
  int launches = 1;  // 1: one cluster does everything; 2: blocks count their share, a second launch places it
  int blocks = 1;    // one launch: 1 or kPlanClusterBlocks
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

// The one-launch form. One SM, or a cluster of the portable size, stays ahead of a second launch up to this
// many routes, and every architecture has this much shared memory. A cluster pays from kPlanClusterMinRoutes.
inline constexpr int kPlanClusterBlocks = 8;
inline constexpr std::int64_t kPlanSingleMaxRoutes = 8192;
inline constexpr std::int64_t kPlanClusterMinRoutes = 1024;
inline constexpr std::int64_t kPlanClusterMaxRoutes = 8192;
inline constexpr std::size_t kPlanSingleMaxSmem = 96 * 1024;

/// Routes of an expert in a block of a cluster from which ordering them pays, where experts are many: then
/// most of a sector of 32 bytes is written at once. Unordered, 8192 routes took 6.0 us on an H200 over 128
/// experts, and 4.3 over 8, which a warp's routes share.
inline constexpr std::int64_t kPlanOrderedRun = 4, kPlanOrderedMinExperts = 32;

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

inline PlanPolicy select_plan_policy(std::int64_t num_routes, std::int64_t num_experts,
                                     int compute_capability) {
  const std::int64_t expert_threads = std::min<std::int64_t>((num_experts + 31) / 32 * 32, 1024);
  if (num_routes <= kPlanTinyMaxRoutes) return {1, 1, 1, static_cast<int>(expert_threads), 1};
  const bool clusters = compute_capability >= 90 && num_routes >= kPlanClusterMinRoutes;
  const int blocks = clusters ? kPlanClusterBlocks : 1;
  if (num_routes <= (clusters ? kPlanClusterMaxRoutes : kPlanSingleMaxRoutes)) {
    // As few warps as hold the routes in few rounds, since counts are summed over the warps; a thread for
    // every expert.
    const std::int64_t share = (num_routes + blocks - 1) / blocks;
    const int order =
        !clusters || (share >= kPlanOrderedRun * num_experts && num_experts >= kPlanOrderedMinExperts);
    for (int rounds : {1, 2, 4, 8}) {
      const std::int64_t route_threads = (share + 32 * rounds - 1) / (32 * rounds) * 32;
      const PlanPolicy policy{0,      1,    blocks, static_cast<int>(std::max(route_threads, expert_threads)),
                              rounds, order};
      if (route_threads <= (rounds == 8 ? 1024 : 512) &&
          plan_smem_bytes(policy, num_routes, num_experts) <= kPlanSingleMaxSmem)
        return policy;
    }
  }
  return {0, 2, static_cast<int>(plan_blocks(num_routes)), kPlanTileThreads, kPlanTileRounds};
}

}  // namespace moecore::cuda
