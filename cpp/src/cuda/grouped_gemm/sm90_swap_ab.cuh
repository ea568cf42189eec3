#pragma once
// Grouped GEMM on Hopper with weights as the tensor cores' A (M) operand and tokens as their B (N) operand
// ("swap-AB"), so that a tile computes its weight rows for any multiple of 8 tokens; the width is chosen tile
// by tile inside the kernel. sm90_pipeline.cuh says how the block works.
//
// The two values of a gated column meet in one thread, and a warpgroup's blocks make 32 or 64 adjacent
// columns of out. The epilogue goes from registers through transposing buffers of 16 tokens x 64 columns or
// 32 x 32, so that whole lines of out, or halves, are written.
//
// Stream-K: a run of steps starts inside a tile; that part's f32 sums go to the block's slot of the
// workspace. The block that has the tile's first step adds the slots of the blocks behind it in their order:
// no atomics, the same bits on every run. A block waits only for sums that others leave before they wait
// themselves.
//
// Its loops (sm90_float.cuh, sm90_fp8.cuh, sm90_decoded.cuh) add to what the pipeline asks of them:
//   Widths<tiling>           of token tiles that are compiled
//   multiply<N>(...)         the ring's steps of one work item, into d
//
// Sums run in ascending k. With whole tiles the bits of a row depend on x, the weights and K alone; with
// stream-K they also depend on where the tile is cut, that is on the counts of all experts.

#include <utility>

#include "cuda/grouped_gemm/sm90_pipeline.cuh"

namespace moecore::cuda::sm90 {

/// 8, 16, ... up to the widest token tile.
template <class Eighths>
struct EveryWidth;
template <int... kEighths>
struct EveryWidth<std::integer_sequence<int, kEighths...>> {
  using type = std::integer_sequence<int, 8 * (kEighths + 1)...>;
};
template <Family kFamily, Tiling kTiling>
using every_width = typename EveryWidth<std::make_integer_sequence<
    int, kTileConfigs[static_cast<int>(kFamily)][static_cast<int>(kTiling)].max_tokens / 8>>::type;

template <class Loop, class Form_, Tiling kTiling_>
struct SwapAb : Pipeline<Loop, Form_, kTiling_> {
  using Base = Pipeline<Loop, Form_, kTiling_>;
  using Base::args;
  using Base::first_step;
  using Base::kBlockRows;
  using Base::kBlocks;
  using Base::kConfig;
  using Base::kMaxTokens;
  using Base::kTileColumns;
  using Base::kTileRows;
  using Base::kTiling;
  using Base::kWarpgroups;
  using Base::s;
  using Base::sharing;
  using Base::steps;
  using Base::tile_row;
  using typename Base::Form, typename Base::Ring, typename Base::Shared, typename Base::T;
  static constexpr bool kEveryWidth = typename Loop::template Widths<kTiling>{}.size() == kMaxTokens / 8;
  static constexpr int kStoredColumns = Form::kGated ? 32 * kBlocks : 64;  // by a warpgroup at a time

  /// Weight row of a block that this consumer thread holds as `half` 0 or, eight rows down, 1.
  __device__ __forceinline__ std::int64_t weight_row(const Tile& tile, int block, int half) const {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
    return tile_row(tile, block * kBlockRows + warpgroup * 64 + warp * 16 + threadIdx.x % 32 / 4 + half * 8);
  }

  // ---- the computing warpgroups
  __device__ __forceinline__ void compute() {
    Ring at;
    for (;;) {
      barrier_wait(&s.full[at.stage], at.phase);
      const Work work = this->work_in(at.stage);
      if (work.tile.rows == 0) return;
      if (Base::kPairs && work.tile.rows == kGoesAlong)
        Base::pass_over(work, at);
      else
        compute_of_width(work, (work.tile.rows + 7) / 8, at, typename Loop::template Widths<kTiling>{});
    }
  }

  /// The narrowest of the widths that holds the tile.
  template <int... kWidths>
  __device__ __forceinline__ void compute_of_width(const Work& work, int eighths, Ring& at,
                                                   std::integer_sequence<int, kWidths...>) {
    if constexpr (kEveryWidth)
      ((eighths == kWidths / 8 ? (compute<kWidths>(work, at), true) : false) || ...);
    else
      ((eighths <= kWidths / 8 ? (compute<kWidths>(work, at), true) : false) || ...);
  }

  template <int kTokens>
  __device__ __forceinline__ void compute(const Work& work, Ring& at) {
    float d[kBlocks][kTokens / 2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) d[m][i] = 0.0f;

    Loop::template multiply<kTokens>(*this, work, at, d);

    // Phase 2: parts of a tile meet, then the epilogue.
    if constexpr (kConfig.shares)
      if (!add_parts<kTokens>(work, d)) return;
    if (args.epilogue.row_weights) scale_rows<kTokens>(work.tile, d);
    store_products<kTokens>(work.tile, d);
  }

  /// Router weights on the products. Apart from the epilogue, whose loop must not branch on every value.
  template <int kTokens>
  __device__ __forceinline__ void scale_rows(const Tile& tile, float (&d)[kBlocks][kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      const int token = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const float w = token < tile.rows ? row_weight(args.epilogue, tile.row + token) : 0.0f;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        d[m][i / 2 * 4 + i % 2] *= w;
        d[m][i / 2 * 4 + i % 2 + 2] *= w;
      }
    }
  }

  /// The first part of a tile gets the sums of the others and returns true; the others leave theirs.
  template <int kTokens>
  __device__ __forceinline__ bool add_parts(const Work& work, float (&d)[kBlocks][kTokens / 2]) {
    constexpr int kFloats = kBlocks * kTokens / 2;
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    float* sums = sharing.sums + warpgroup * (Sharing::kSlotFloats / kWarpgroups) + thread;
    if (work.begin > 0) {
      float* mine = sums + blockIdx.x * Sharing::kSlotFloats;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) __stcg(mine + i * 128, d[i / (kTokens / 2)][i % (kTokens / 2)]);
      __threadfence();
      warpgroup_sync(warpgroup);
      if (thread == 0) store_release(&sharing.flags[kWarpgroups * blockIdx.x + warpgroup], Sharing::kRaised);
      return false;
    }
    const int tile_end = (work.number + 1) * steps;
    int reached = work.number * steps + work.end;
    for (int block = blockIdx.x + 1; reached < tile_end; ++block) {
      const int block_end = min(tile_end, first_step(block + 1));
      if (block_end == reached) continue;  // it has no steps at all
      reached = block_end;
      unsigned long long* flag = &sharing.flags[kWarpgroups * block + warpgroup];
      while (load_acquire(flag) != Sharing::kRaised) {
      }
      const float* theirs = sums + block * Sharing::kSlotFloats;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) d[i / (kTokens / 2)][i % (kTokens / 2)] += __ldcg(theirs + i * 128);
      warpgroup_sync(warpgroup);
      if (thread == 0) *flag = 0;
    }
    return true;
  }

  /// Of a block, thread (warp w, lane l) holds rows 16w + l/4 (and + 8) of tokens 8g + 2(l%4) (and + 1):
  /// d[m][4g], d[m][4g + 1] and, eight rows down, d[m][4g + 2], d[m][4g + 3].
  template <int kTokens>
  __device__ __forceinline__ void store_products(const Tile& tile, const float (&d)[kBlocks][kTokens / 2]) {
    const EpilogueArgs& e = args.epilogue;
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if constexpr (Form::kGated) {
      const int column = tile.weight_tile * kTileColumns + warpgroup * kStoredColumns;
      BiasPair bias[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        bias[m] = bias_pair<T, Form>(e, tile.expert, column + warp * (8 * kBlocks) + m * 8 + lane / 4);
      auto pack = [&](int g, int m) {
        const float a0 = d[m][g * 4] + bias[m].first, a1 = d[m][g * 4 + 1] + bias[m].first;
        const float b0 = d[m][g * 4 + 2] + bias[m].second, b1 = d[m][g * 4 + 3] + bias[m].second;
        return pack_pair<T>(activate_eights<Form>(e, a0, b0), activate_eights<Form>(e, a1, b1));
      };
      if constexpr (Shared::kQuantizesOut)
        if (args.quantized_out.codes) return store_quantized<kTokens>(*this, tile, pack);
      warpgroup_sync(warpgroup);  // the buffers of the tile before have been read
      store_columns<kTokens, 0>(tile, column, pack);
    } else {
      warpgroup_sync(warpgroup);
      auto store_block = [&]<int kBlock>() {
        const int column = tile.weight_tile * kTileRows + kBlock * kBlockRows + warpgroup * 64;
        const BiasPair bias = bias_pair<T, Form>(e, tile.expert, column + warp * 16 + lane / 4);
        store_columns<kTokens, kBlock>(tile, column, [&](int g, int half) {
          const float b = half ? bias.second : bias.first;
          const float* p = d[kBlock] + g * 4 + 2 * half;
          return pack_pair<T>(Form::apply(e, p[0] + b), Form::apply(e, p[1] + b));
        });
      };
      store_block.template operator()<0>();
      if constexpr (kBlocks == 2) store_block.template operator()<1>();
    }
  }

  /// A warpgroup's columns of all tokens, the kBlock-th of a tile. pack(g, half): this lane's two tokens of
  /// group g in its column of the left or right eight of the warp's columns.
  template <int kTokens, int kBlock, class Pack>
  __device__ __forceinline__ void store_columns(const Tile& tile, int first_column, const Pack& pack) {
    // A matrix holds eight tokens of eight columns; a warp stores four at once.
    constexpr int kHalves = kStoredColumns / 32, kGroupsAtOnce = 4 / kHalves;
    constexpr int kGroups = kTokens / 8, kChunks = (kGroups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    constexpr int kPieces = kStoredColumns / 8;  // of 16 bytes in a row
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32,
              lane = thread % 32;
    auto offset = [](int row, int piece) { return swizzled<kPieces>(row, piece); };
    const int to = offset(lane % (8 * kGroupsAtOnce), warp * kHalves + lane / (8 * kGroupsAtOnce));
    const int row = thread / kPieces, column = first_column + thread % kPieces * 8;
    T* out = static_cast<T*>(args.epilogue.out) + tile.row * args.epilogue.out_stride + column;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int token = c * 8 * kGroupsAtOnce;
      if constexpr (!kEveryWidth)
        if (token >= tile.rows) break;
      // Two buffers take turns, also from block to block: who writes one has passed the barrier behind its
      // reads.
      std::byte* buffer = s.buffer[warpgroup][(kBlock * kChunks + c) % 2];
      std::uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int g = c * kGroupsAtOnce + i % kGroupsAtOnce;
        v[i] = g < kGroups ? pack(g, i / kGroupsAtOnce) : 0;
      }
      store_matrices<true>(smem_address(buffer) + to, v);
      warpgroup_sync(warpgroup);
      if (token + row < tile.rows && column < args.epilogue.columns)
        *reinterpret_cast<uint4*>(out + (token + row) * args.epilogue.out_stride) =
            *reinterpret_cast<const uint4*>(buffer + offset(row, thread % kPieces));
    }
  }
};

template <class Loop, Tiling kTiling, bool kGated>
Kernel kernel() {
  return kernel_of<SwapAb<Loop, std::conditional_t<kGated, SigmoidGate, Linear>, kTiling>>();
}

}  // namespace moecore::cuda::sm90
