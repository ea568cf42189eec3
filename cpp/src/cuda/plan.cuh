#pragma once
// The device code of plan that one block or one cluster runs: plan.cu and route_plan.cu make kernels of it.

#include <algorithm>
#include <cstdint>

#include "cuda/device/division.cuh"
#include "cuda/device/local_expert.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/plan_policy.h"
#include "ops/route.h"

namespace moecore::cuda {

inline constexpr int kPlanMaxThreads = 1024;

struct PlanArgs {
  const void* ids;
  bool ids_are_i64;
  std::int64_t ids_stride;
  unsigned num_routes, top_k;
  dev::Divisor by_top_k, by_alignment;
  int num_experts;
  const std::int32_t* expert_map;
  std::int64_t num_global, first_expert;
  std::int32_t *expert_offsets, *scale_offsets, *row_token, *slot_row, *row_route, *sizes1, *sizes2;
  std::int32_t scale_alignment, n1, hidden, inter;
  bool swap_ab;
  std::int32_t* counts;  // [blocks, num_experts]
  unsigned routes_per_block;
  int expert_warps;  // warps whose threads have experts
  bool order;        // one launch: blocks order their routes
};

// The local expert of route r, or -1.
__device__ inline int expert_of(const PlanArgs& args, unsigned r) {
  std::int64_t i = r;
  if (args.ids_stride != args.top_k) {
    const unsigned t = args.by_top_k.divide(r);
    i = t * args.ids_stride + (r - t * args.top_k);
  }
  return dev::local_expert(args, i);
}

// What a thread knows of its routes in a tile: route round * 32 + lane of the warp's part.
template <int kRounds>
struct Tile {
  int expert[kRounds];
  int rank[kRounds];  // among the warp's routes of the same expert

  static __device__ unsigned route(unsigned begin, int round) {
    return begin + (threadIdx.x / 32 * kRounds + round) * 32 + threadIdx.x % 32;
  }

  __device__ void load(const PlanArgs& args, unsigned begin, unsigned end) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
      expert[i] = route(begin, i) < end ? expert_of(args, route(begin, i)) : -1;
  }

  // Adds the warp's routes to its zeroed counts[num_experts].
  __device__ void rank_in_warp(std::uint16_t* counts, int num_experts) {
    // The lanes with the same expert, bit by bit: the match instruction takes a step for every distinct
    // value. Experts of -1 are no expert's lanes: the bits of num_experts hold a value that none has.
    const int bits = 32 - __clz(num_experts);
    unsigned same[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) same[i] = dev::kWholeWarp;
#pragma unroll 4
    for (int b = 0; b < bits; ++b) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const bool bit = (expert[i] >= 0 ? expert[i] : num_experts) >> b & 1;
        const unsigned vote = __ballot_sync(dev::kWholeWarp, bit);
        same[i] &= bit ? vote : ~vote;
      }
    }
    const unsigned below = (1u << threadIdx.x % 32) - 1;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int before = expert[i] >= 0 ? counts[expert[i]] : 0;
      rank[i] = before + __popc(same[i] & below);
      __syncwarp();
      if (expert[i] >= 0 && (same[i] & below) == 0)
        counts[expert[i]] = static_cast<std::uint16_t>(before + __popc(same[i]));
      __syncwarp();
    }
  }
};

// Turns the warps' counts of expert e into their exclusive sums; returns the expert's count in the tile.
__device__ inline int sum_over_warps(std::uint16_t* counts, int num_warps, int num_experts, int e) {
  constexpr int kAtOnce = 8;  // read before any is written: each wait is for eight
  int sum = 0;
  for (int begin = 0; begin < num_warps; begin += kAtOnce) {
    std::uint16_t* own = counts + begin * num_experts + e;
    int count[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) count[w] = begin + w < num_warps ? own[w * num_experts] : 0;
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (begin + w < num_warps) own[w * num_experts] = static_cast<std::uint16_t>(sum);
      sum += count[w];
    }
  }
  return sum;
}

// A row that route r owns.
__device__ __forceinline__ void write_row(const PlanArgs& args, int row, unsigned r) {
  args.row_token[row] = static_cast<std::int32_t>(args.by_top_k.divide(r));
  if (args.row_route) args.row_route[row] = static_cast<std::int32_t>(r);
}

// The grid's share of the rows that no route owns.
__device__ inline void clear_rows(const PlanArgs& args, int num_rows) {
  for (unsigned row = num_rows + blockIdx.x * blockDim.x + threadIdx.x; row < args.num_routes;
       row += gridDim.x * blockDim.x) {
    args.row_token[row] = -1;
    if (args.row_route) args.row_route[row] = -1;
  }
}

__device__ inline void zero(std::uint16_t* counts, int n) {
  // Two counts a store: n is even or the array is padded to 16 bytes.
  auto* words = reinterpret_cast<std::uint32_t*>(counts);
  for (int i = threadIdx.x; i < (n + 1) / 2; i += blockDim.x) words[i] = 0;
}

// A count and the number of scale blocks it fills in one integer, which sums both. Word is 32 bits where the
// sums fit in 16 each (the one-launch form), else 64.
template <class Word>
struct Packed {
  static constexpr int kHalf = sizeof(Word) * 4;

  static __device__ Word make(int count, int blocks) {
    return static_cast<Word>(blocks) << kHalf | static_cast<Word>(count);
  }
  static __device__ int count(Word w) { return static_cast<int>(w & ((Word{1} << kHalf) - 1)); }
  static __device__ int blocks(Word w) { return static_cast<int>(w >> kHalf); }
};

__device__ __forceinline__ int scale_blocks(const PlanArgs& args, int count) {
  return static_cast<int>(args.by_alignment.divide(static_cast<unsigned>(count + args.scale_alignment - 1)));
}

// Everything that is one entry per expert. `first` and `scale_first` are the sums over the experts before e.
__device__ inline void write_expert(const PlanArgs& args, int e, int count, int first, int scale_first) {
  args.expert_offsets[e] = first;
  args.scale_offsets[e] = scale_first;
  if (e == args.num_experts - 1) {
    args.expert_offsets[e + 1] = first + count;
    args.scale_offsets[e + 1] = scale_first + scale_blocks(args, count) * args.scale_alignment;
  }
  auto write_sizes = [&](std::int32_t* sizes, int n, int k) {
    if (!sizes) return;
    sizes[3 * e] = args.swap_ab ? n : count;
    sizes[3 * e + 1] = args.swap_ab ? count : n;
    sizes[3 * e + 2] = k;
  };
  write_sizes(args.sizes1, args.n1, args.hidden);
  write_sizes(args.sizes2, args.hidden, args.inter);
}

// The experts of a thread: kExperts consecutive ones, where there are so many. Calls f(e, i) for each, the
// thread's i-th. Loops that know kExperts are worth 7 to 10 % of a call.
template <int kExperts, class F>
__device__ __forceinline__ void for_own_experts(const PlanArgs& args, F&& f) {
  const int begin = static_cast<int>(threadIdx.x) * kExperts;
#pragma unroll
  for (int i = 0; i < kExperts; ++i)
    if (begin + i < args.num_experts) f(begin + i, i);
}

// Turns counts[e] of all experts, each written by the thread that owns e, into their first rows (visible
// after the caller's next barrier) and writes the per-expert outputs if `write`. Returns the number of owned
// rows.
template <int kExperts, class Word>
__device__ int scan_experts(const PlanArgs& args, std::int32_t* counts, Word* scratch, bool write) {
  using Pair = Packed<Word>;
  Word sum = 0;
  for_own_experts<kExperts>(args,
                            [&](int e, int) { sum += Pair::make(counts[e], scale_blocks(args, counts[e])); });
  Word total;
  Word before = dev::block_exclusive_scan(sum, scratch, &total, args.expert_warps);
  for_own_experts<kExperts>(args, [&](int e, int) {
    const int count = counts[e];
    counts[e] = Pair::count(before);
    if (write) write_expert(args, e, count, Pair::count(before), Pair::blocks(before) * args.scale_alignment);
    before += Pair::make(count, scale_blocks(args, count));
  });
  return Pair::count(total);
}

/// The plan of up to 32 routes by one block.
__device__ __forceinline__ void plan_tiny(const PlanArgs& args) {
  const unsigned lane = threadIdx.x % 32;
  const int num_routes = static_cast<int>(args.num_routes);
  const int expert = lane < args.num_routes ? expert_of(args, lane) : -1;
  const int key = expert >= 0 ? expert : args.num_experts;  // above every expert: counts for none

  // The lane's route: routes of lower experts, and earlier ones of its own.
  int lower = 0, rank = 0;
#pragma unroll 8
  for (int j = 0; j < num_routes; ++j) {
    const int other = __shfl_sync(dev::kWholeWarp, key, j);
    lower += other < key;
    rank += other == key && j < static_cast<int>(lane);
  }
  const int num_rows = __popc(__ballot_sync(dev::kWholeWarp, expert >= 0));
  // Every route whose rank is a multiple of the alignment opens a scale block.
  const unsigned in_block = rank - args.by_alignment.divide(rank) * args.scale_alignment;
  const unsigned opens_block = __ballot_sync(dev::kWholeWarp, expert >= 0 && in_block == 0);
  if (threadIdx.x < args.num_routes) {
    args.slot_row[lane] = expert >= 0 ? lower + rank : -1;
    if (expert >= 0) write_row(args, lower + rank, lane);
  }
  clear_rows(args, num_rows);

  for (int first = static_cast<int>(threadIdx.x - lane); first < args.num_experts;
       first += static_cast<int>(blockDim.x)) {
    const int e = first + static_cast<int>(lane);
    int count = 0, rows = 0, blocks = 0;
#pragma unroll 8
    for (int j = 0; j < num_routes; ++j) {
      const int other = __shfl_sync(dev::kWholeWarp, key, j);
      count += other == e;
      rows += other < e;
      blocks += other < e && (opens_block >> j & 1);
    }
    if (e < args.num_experts) write_expert(args, e, count, rows, blocks * args.scale_alignment);
  }
}

/// The plan by one block or one cluster of kBlocks. `smem` has plan_smem_bytes(); `ready` is called when its
/// counters are zeroed, and makes the ids of the block's share of the routes visible to it.
template <int kRounds, int kBlocks, int kExperts, class Ready>
__device__ __forceinline__ void plan_single(const PlanArgs& args, std::uint64_t* smem, Ready&& ready) {
  const unsigned self = kBlocks > 1 ? blockIdx.x : 0;
  const unsigned share = args.routes_per_block;
  const unsigned share_begin = self * share, share_end = min(share_begin + share, args.num_routes);
  const int num_warps = static_cast<int>((share + 32 * kRounds - 1) / (32 * kRounds));  // that own routes
  const int warp = static_cast<int>(threadIdx.x) / 32;
  auto* scratch = reinterpret_cast<std::uint32_t*>(smem);
  std::uint64_t* all_sent = smem + 32;
  auto* offsets = reinterpret_cast<std::int32_t*>(smem + 34);
  // The counts of every block of a cluster, each of which sends its own to all.
  auto* block_counts = offsets + args.num_experts;
  auto* row_order =
      reinterpret_cast<std::uint32_t*>(block_counts + (kBlocks > 1 ? kBlocks * args.num_experts : 0));
  auto* counts = reinterpret_cast<std::uint16_t*>(row_order + (args.order ? share : 0));
  if constexpr (kBlocks > 1) {
    if (threadIdx.x == 0) dev::init_words(all_sent);
    __syncwarp();
    dev::cluster_arrive_relaxed();
  }
  zero(counts, num_warps * args.num_experts);
  ready();

  // Phase 1: ranks inside the warps, then inside the block.
  Tile<kRounds> tile;
  tile.load(args, share_begin, share_end);
  __syncthreads();
  if (kBlocks > 1 && threadIdx.x == 0)
    dev::expect_words(all_sent, static_cast<int>(kBlocks * args.num_experts * sizeof(int)));
  if (warp < num_warps) tile.rank_in_warp(counts + warp * args.num_experts, args.num_experts);
  __syncthreads();
  if constexpr (kBlocks > 1) dev::cluster_wait();
  for_own_experts<kExperts>(args, [&](int e, int) {
    const int count = sum_over_warps(counts, num_warps, args.num_experts, e);
    offsets[e] = count;
    if constexpr (kBlocks > 1) {
#pragma unroll
      for (unsigned b = 0; b < kBlocks; ++b)
        dev::send_word(block_counts + self * args.num_experts + e, count, all_sent, b);
    }
  });
  // Phase 2: offsets of the experts, then of this block's part of each.
  int before[kExperts] = {};
  unsigned first[kExperts] = {};  // cluster: of the expert's routes in the block's own order
  unsigned num_live = 0;          // routes of the block that have a row
  if constexpr (kBlocks > 1) {
    if (args.order) {  // while the counts are on their way
      unsigned own = 0;
      for_own_experts<kExperts>(args, [&](int e, int i) {
        first[i] = own;
        own += static_cast<unsigned>(offsets[e]);
      });
      const unsigned lower = dev::block_exclusive_scan(own, scratch + 32, &num_live, args.expert_warps);
#pragma unroll
      for (unsigned& f : first) f += lower;
    }
    dev::await_words(all_sent);
    for_own_experts<kExperts>(args, [&](int e, int i) {
      int total = 0;
#pragma unroll
      for (unsigned b = 0; b < kBlocks; ++b) {
        const int count = block_counts[b * args.num_experts + e];
        total += count;
        before[i] += b < self ? count : 0;
      }
      offsets[e] = total;
    });
  }
  const int num_rows = scan_experts<kExperts>(args, offsets, scratch, self == 0);
  // Below the first row of the block's routes of an expert stands, 16 bits higher, where they are in its
  // order.
  constexpr unsigned kHalf = 16;
  if constexpr (kBlocks == 1) num_live = static_cast<unsigned>(num_rows);
  for_own_experts<kExperts>(args, [&](int e, int i) {
    const auto row = static_cast<unsigned>(offsets[e] + before[i]);
    offsets[e] = static_cast<std::int32_t>(row | (kBlocks == 1 ? row : first[i]) << kHalf);
  });
  __syncthreads();
  // Phase 3: rows of slots, routes of rows.
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const unsigned r = Tile<kRounds>::route(share_begin, i);
    if (r >= share_end) break;
    const int e = tile.expert[i];
    if (e < 0) {
      args.slot_row[r] = -1;
      continue;
    }
    const auto within = static_cast<unsigned>(counts[warp * args.num_experts + e] + tile.rank[i]);
    const unsigned at = static_cast<unsigned>(offsets[e]) + (within << kHalf | within);
    const unsigned row = at & 0xFFFF;
    args.slot_row[r] = static_cast<std::int32_t>(row);
    if (args.order)
      row_order[at >> kHalf] = row << kHalf | r;
    else
      write_row(args, static_cast<int>(row), r);
  }
  if (args.order) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < num_live; i += blockDim.x)
      write_row(args, static_cast<int>(row_order[i] >> kHalf), row_order[i] & 0xFFFF);
  }
  clear_rows(args, num_rows);
}

inline PlanArgs make_plan_args(const PlanProblem& p, const PlanPolicy& policy, std::int32_t* counts) {
  const std::int64_t num_routes = p.num_tokens * p.top_k;
  PlanArgs args{.ids = p.ids.data,
                .ids_are_i64 = p.ids.is_i64,
                .ids_stride = p.ids_stride,
                .num_routes = static_cast<unsigned>(num_routes),
                .top_k = static_cast<unsigned>(p.top_k),
                .by_top_k = dev::Divisor(static_cast<unsigned>(std::max<std::int64_t>(1, p.top_k))),
                .by_alignment = dev::Divisor(static_cast<unsigned>(p.scale_alignment)),
                .num_experts = static_cast<int>(p.num_experts),
                .expert_map = p.expert_map,
                .num_global = p.num_global,
                .first_expert = p.first_expert,
                .expert_offsets = p.expert_offsets,
                .scale_offsets = p.scale_offsets,
                .row_token = p.row_token,
                .slot_row = p.slot_row,
                .row_route = p.row_route,
                .sizes1 = p.problem_sizes1,
                .sizes2 = p.problem_sizes2,
                .scale_alignment = static_cast<std::int32_t>(p.scale_alignment),
                .n1 = static_cast<std::int32_t>(p.gated ? 2 * p.inter : p.inter),
                .hidden = static_cast<std::int32_t>(p.hidden),
                .inter = static_cast<std::int32_t>(p.inter),
                .swap_ab = p.swap_ab,
                .counts = counts,
                .routes_per_block = 0,
                .expert_warps = 0,
                .order = policy.order != 0};
  const std::int64_t share = (num_routes + policy.blocks - 1) / policy.blocks;
  const std::int64_t tiles = policy.launches == 1 ? share : (share + kPlanTile - 1) / kPlanTile * kPlanTile;
  args.routes_per_block = static_cast<unsigned>(tiles);
  const std::int64_t per_warp = 32 * plan_experts_per_thread(policy, p.num_experts);
  args.expert_warps = static_cast<int>((p.num_experts + per_warp - 1) / per_warp);
  return args;
}

}  // namespace moecore::cuda
