// plan: a stable counting sort of the routes by expert.
//
// Order inside an expert is by route. A tile of routes is ranked without atomics: warp w owns the routes
// [w * 32 * rounds, ...) of the tile in rounds of 32; in a round the lanes with the same expert find each
// other (ballots over the bits of the expert), a lane's rank is the number of them below it plus the warp's
// count of the rounds before. Summing the warps' counts per expert in order then gives the stable rank in the
// tile.
//
//   tiny          up to 32 routes: neither counts nor barriers. Every warp holds all routes, a lane each, and
//                 a thread compares its expert with them.
//   one launch    one block, or one cluster whose blocks send each other their counts. A block with many
//                 routes orders them in shared memory before it writes their rows, because an SM is slow to
//                 scatter words.
//   two launches  plan_count_kernel leaves counts[block][expert] of every block's contiguous share of the
//                 routes; plan_place_kernel sums those of the blocks before it, then ranks tile by tile.

#include <string>

#include "core/table.h"
#include "cuda/plan.cuh"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "moecore/error.h"

namespace moecore::cuda {
namespace {

__global__ void __launch_bounds__(kPlanMaxThreads) plan_tiny_kernel(const PlanArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  plan_tiny(args);
}

template <int kRounds, int kBlocks, int kExperts>
__global__ void __launch_bounds__(kPlanMaxThreads) plan_single_kernel(const PlanArgs args) {
  extern __shared__ std::uint64_t smem[];
  plan_single<kRounds, kBlocks, kExperts>(args, smem, [] {
    dev::wait_for_predecessor();
    dev::release_successor();
  });
}

__global__ void __launch_bounds__(kPlanTileThreads) plan_count_kernel(const PlanArgs args) {
  extern __shared__ std::uint64_t smem[];
  auto* counts = reinterpret_cast<std::int32_t*>(smem);
  for (int e = threadIdx.x; e < args.num_experts; e += kPlanTileThreads) counts[e] = 0;
  __syncthreads();
  dev::wait_for_predecessor();
  dev::release_successor();
  const unsigned begin = blockIdx.x * args.routes_per_block;
  const unsigned end = min(begin + args.routes_per_block, args.num_routes);
#pragma unroll 4
  for (unsigned r = begin + threadIdx.x; r < end; r += kPlanTileThreads) {
    const int e = expert_of(args, r);
    if (e >= 0) atomicAdd(&counts[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < args.num_experts; e += kPlanTileThreads)
    args.counts[static_cast<std::int64_t>(blockIdx.x) * args.num_experts + e] = counts[e];
}

template <int kExperts>
__global__ void __launch_bounds__(kPlanTileThreads) plan_place_kernel(const PlanArgs args) {
  constexpr int kRounds = kPlanTileRounds;
  constexpr int kNumWarps = kPlanTileThreads / 32;
  extern __shared__ std::uint64_t smem[];
  std::uint64_t* scratch = smem;
  auto* offsets =
      reinterpret_cast<std::int32_t*>(scratch + 32);  // where the block's next row of an expert goes
  auto* counts = reinterpret_cast<std::uint16_t*>(offsets + args.num_experts);
  auto* before =
      reinterpret_cast<std::int32_t*>(counts);  // rows of the blocks before this one; counts come later
  const int warp = static_cast<int>(threadIdx.x) / 32;
  dev::wait_for_predecessor();
  dev::release_successor();

  // Phase 1: totals and the sums of the blocks before this one. The blocks' counts are read by groups of
  // threads that take every num_groups-th block and add up in shared memory; integer sums do not depend on
  // the order.
  auto* totals = offsets;
  for (int e = threadIdx.x; e < args.num_experts; e += kPlanTileThreads) totals[e] = before[e] = 0;
  __syncthreads();
  const int num_blocks = static_cast<int>(gridDim.x), self = static_cast<int>(blockIdx.x);
  const int width = min(kPlanTileThreads, (args.num_experts + 31) / 32 * 32);
  const int num_groups = kPlanTileThreads / width, group = static_cast<int>(threadIdx.x) / width;
  for (int e = static_cast<int>(threadIdx.x) % width; e < args.num_experts && group < num_groups;
       e += width) {
    int total = 0, below = 0;
#pragma unroll 16
    for (int b = group; b < num_blocks; b += num_groups) {
      const int count = args.counts[b * args.num_experts + e];
      total += count;
      below += b < self ? count : 0;
    }
    atomicAdd(&totals[e], total);
    atomicAdd(&before[e], below);
  }
  __syncthreads();
  // Phase 2: offsets of the experts, then of this block's part of each.
  const int num_rows = scan_experts<kExperts>(args, totals, scratch, self == 0);
  __syncthreads();
  for (int e = threadIdx.x; e < args.num_experts; e += kPlanTileThreads) offsets[e] += before[e];

  // Phase 3: tile by tile.
  const unsigned share = self * args.routes_per_block;
  const unsigned share_end = min(share + args.routes_per_block, args.num_routes);
  for (unsigned begin = share; begin < share_end; begin += kPlanTile) {
    Tile<kRounds> tile;
    tile.load(args, begin, share_end);
    __syncthreads();
    zero(counts, kNumWarps * args.num_experts);
    __syncthreads();
    tile.rank_in_warp(counts + warp * args.num_experts, args.num_experts);
    __syncthreads();
    int placed[kExperts] = {};
#pragma unroll
    for (int i = 0; i < kExperts; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kPlanTileThreads;
      if (e < args.num_experts) placed[i] = sum_over_warps(counts, kNumWarps, args.num_experts, e);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const unsigned r = Tile<kRounds>::route(begin, i);
      if (r >= share_end) break;
      const int e = tile.expert[i];
      const int row = e >= 0 ? offsets[e] + counts[warp * args.num_experts + e] + tile.rank[i] : -1;
      args.slot_row[r] = row;
      if (row >= 0) write_row(args, row, r);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kExperts; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kPlanTileThreads;
      if (e < args.num_experts) offsets[e] += placed[i];
    }
  }
  clear_rows(args, num_rows);
}

void launch_single(const DeviceInfo& device, const LaunchConfig& config, const PlanPolicy& policy,
                   int experts_per_thread, const PlanArgs& args) {
  visit_instance(Table<1, 2, 4, 8>{}, policy.rounds, [&]<int kRounds>() {
    visit_instance(Table<1, 4, 8, 16>{}, policy.blocks, [&]<int kBlocks>() {
      visit_instance(Table<1, kPlanMaxExpertsPerThread>{}, experts_per_thread, [&]<int kExperts>() {
        launch("plan", device, config, plan_single_kernel<kRounds, kBlocks, kExperts>, args);
      });
    });
  });
}

void launch_place(const DeviceInfo& device, const LaunchConfig& config, int experts_per_thread,
                  const PlanArgs& args) {
  visit_instance(Table<1, 2, 4>{}, experts_per_thread,
                 [&]<int kExperts>() { launch("plan", device, config, plan_place_kernel<kExperts>, args); });
}

std::string describe(const PlanPolicy& policy) {
  if (policy.tiny) return "cuda, tiny=1 threads=" + std::to_string(policy.threads);
  return std::string("cuda, tiny=0 launches=") + std::to_string(policy.launches) +
         " blocks=" + std::to_string(policy.blocks) + " threads=" + std::to_string(policy.threads) +
         " rounds=" + std::to_string(policy.rounds) + " order=" + std::to_string(policy.order);
}

std::size_t workspace_bytes(const PlanPolicy& policy, std::int64_t num_experts) {
  return policy.launches == 1 ? 0 : static_cast<std::size_t>(policy.blocks * num_experts * 4);
}

// The selected policy with the caller's changes.
PlanPolicy choose_policy(std::int64_t num_routes, std::int64_t num_experts, int max_cluster,
                         std::string_view text, const ExecContext& ctx) {
  PlanPolicy policy = select_plan_policy(num_routes, num_experts, max_cluster);
  if (text.empty()) return policy;
  override_policy("plan", text,
                  {{"tiny", &policy.tiny, {0, policy.tiny}},
                   {"launches", &policy.launches, {1, 2}},
                   {"blocks", &policy.blocks, {1, 4, 8, 16, 32, 64, 128}},
                   {"threads", &policy.threads, {32, 64, 128, 256, 512, 1024}},
                   {"rounds", &policy.rounds, {1, 2, 4, 8}},
                   {"order", &policy.order, {0, 1}}});
  const std::int64_t held = static_cast<std::int64_t>(policy.blocks) * policy.threads * policy.rounds;
  const bool holds = policy.tiny ? policy.launches == 1 && policy.blocks == 1
                     : policy.launches == 1
                         ? policy.blocks <= max_cluster && held >= num_routes &&
                               num_routes <= kPlanClusters[0].max_routes &&
                               plan_experts_per_thread(policy, num_experts) <= kPlanMaxExpertsPerThread &&
                               plan_smem_bytes(policy, num_routes, num_experts) <= kPlanSingleMaxSmem
                         : policy.threads == kPlanTileThreads && policy.rounds == kPlanTileRounds;
  if (!holds || ctx.workspace.size() < workspace_bytes(policy, num_experts))
    throw InvalidArgument(
        "plan: policy is \"" + std::string(text) +
        "\", expected launches=1 with room for all routes in one cluster, or launches=2 with "
        "threads=" +
        std::to_string(kPlanTileThreads) + " rounds=" + std::to_string(kPlanTileRounds) +
        " and a workspace of blocks * num_experts * 4 bytes");
  return policy;
}

}  // namespace

std::size_t plan_workspace_bytes(std::int64_t num_routes, std::int64_t num_experts) {
  constexpr int kWithoutClusters = 1;  // what every device can run
  return workspace_bytes(select_plan_policy(num_routes, num_experts, kWithoutClusters), num_experts);
}

void plan(const PlanProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("plan", ctx);
  const std::int64_t num_routes = p.num_tokens * p.top_k;
  const TuningSizes sizes{.rows = num_routes,
                          .experts = p.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const PlanPolicy policy = tuned("plan", sizes, ctx, [&](std::string_view text) {
    return choose_policy(num_routes, p.num_experts, device.max_cluster, text, ctx);
  });
  if (explained(ctx, "plan", [&] { return describe(policy); })) return;

  const PlanArgs args = make_plan_args(p, policy, reinterpret_cast<std::int32_t*>(ctx.workspace.data()));
  LaunchConfig config{.grid = dim3(policy.blocks),
                      .block = dim3(policy.threads),
                      .smem_bytes = plan_smem_bytes(policy, num_routes, p.num_experts),
                      .stream = stream(ctx),
                      .dependent = true};
  const int experts_per_thread = plan_experts_per_thread(policy, p.num_experts);
  const DeviceGuard guard(device);
  if (policy.tiny) {
    config.smem_bytes = 0;
    launch("plan", device, config, plan_tiny_kernel, args);
    return;
  }
  if (policy.launches == 1) {
    config.cluster = dim3(policy.blocks);
    launch_single(device, config, policy, experts_per_thread, args);
    return;
  }
  launch("plan", device, config, plan_count_kernel, args);
  launch_place(device, config, experts_per_thread, args);
}

}  // namespace moecore::cuda
