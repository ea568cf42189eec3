#pragma once
// The decode kernel's warps behind the products: bias, activation, the weighted sum, and who tells of them.

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/decode/work.cuh"
#include "cuda/grouped_gemm/epilogue.cuh"

namespace moecore::cuda::decode {

inline constexpr int kBarrierEpilogues = 1;  // named barrier 0 is __syncthreads

/// The product of weight row `row`, row `i` of the tile, with one token.
template <class Format>
__device__ __forceinline__ float sum_partials(const Product& product, const Partials& partials, int expert,
                                              int row, int i, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMmaWarps; ++w) sum += partials.sums[w][i][token];
  if constexpr (Format::kRowScales)
    sum *= *reinterpret_cast<const float*>(product.row_scales + expert * product.row_scale_expert_pitch +
                                           row * product.row_scale_pitch);
  if constexpr (Format::kGlobalScales)
    if (product.global_scales)
      sum *= __frcp_rn(product.global_scales[product.global_scale_per_expert ? expert : 0]);
  return sum;
}

/// The epilogue warps.
template <class T, class Format>
__device__ void finish(const DecodeArgs& args, Smem& smem, const Routes& routes, T* products, Walk walk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kFirstEpilogueWarp;
  const Partials& partials = smem.partials[warp];
  std::uint32_t parity = 0;
  int tile_number = 0;

  auto finish_tile = [&](const Tile& tile) {
    const Product& product = tile.down ? args.down : args.up;
    const EpilogueArgs& e = product.epilogue;
    const int log2_width = e.gated ? 3 : 4;
#pragma unroll 1
    for (int i = lane; i < tile.rows << log2_width; i += 32) {
      const int at = i & ((1 << log2_width) - 1), token = i >> log2_width, column = tile.begin + at;
      if (column >= tile.end) continue;
      const int row = tile.row + token, route = routes.row_route[row];
      const float weight = args.weight_on_input && !tile.down ? routes.weight[route] : 1.0f;
      // Of the gate, then of the up part.
      float value[2] = {};
#pragma unroll 1
      for (int half = 0; half < (e.gated ? 2 : 1); ++half) {
        const int matrix_row = !e.gated ? column : (half ? e.up_first : e.gate_first) + column * e.row_step;
        const float sum = sum_partials<Format>(product, partials, tile.expert, matrix_row,
                                               at + half * (kTileRows / 2), token);
        const float y = __fmaf_rn(sum, weight, bias_of<T>(e, tile.expert, matrix_row));
        half ? value[1] = y : value[0] = y;
      }
      if (tile.down) {
        products[route * kTileRows + at] = dev::from_f32<T>(value[0]);
        continue;
      }
      const float y = args.sigmoid_gate ? SigmoidGate::apply(e, value[0], value[1])
                                        : apply_activation(e, value[0], value[1]);
      reinterpret_cast<T*>(args.inter_rows + row * args.inter_pitch)[column] = dev::from_f32<T>(y);
    }
  };
  // out[begin .. end) of all tokens, from the products of all passes.
  auto combine = [&](int begin, int end) {
    named_barrier(kBarrierEpilogues, kEpilogueWarps * 32);
#pragma unroll 1
    for (int i = warp * 32 + lane; i < args.num_tokens * kTileRows; i += kEpilogueWarps * 32) {
      const int t = i / kTileRows, at = i % kTileRows, column = begin + at;
      if (column >= end) continue;
      float sum = 0.0f;
#pragma unroll 2
      for (int j = 0; j < args.top_k; ++j) {
        const int route = t * args.top_k + j;
        const float weight = args.weight_on_input ? 1.0f : routes.weight[route];
        const float next = __fmaf_rn(weight, dev::to_f32(products[route * kTileRows + at]), sum);
        sum = routes.expert[route] >= 0 ? next : sum;
      }
      if (args.residual)
        sum = __fadd_rn(sum,
                        dev::to_f32(static_cast<const T*>(args.residual)[t * args.residual_stride + column]));
      static_cast<T*>(args.out)[t * args.out_stride + column] = dev::from_f32<T>(sum);
    }
    named_barrier(kBarrierEpilogues, kEpilogueWarps * 32);
  };

  for (Tile tile; walk.next(tile);) {
    if (tile.rows > 0 && tile_number++ % kEpilogueWarps == warp) {
      barrier_wait(&smem.summed[warp], parity);
      parity ^= 1;
      finish_tile(tile);
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(&smem.taken[warp]);
        if (!tile.down) store_release_block(&smem.stored[warp], (tile_number - 1) / kEpilogueWarps + 1);
      }
    }
    if (walk.is_last_pass(tile)) combine(tile.begin, tile.end);
  }
}

/// The publisher: adds to the passes' counters the columns that the epilogue warps have stored. A fence takes
/// a microsecond or more under load, so one covers all tiles that are there.
__device__ inline void publish(const DecodeArgs& args, Smem& smem, Walk walk) {
  if (threadIdx.x % 32 != 0) return;
  Progress& progress = *args.progress;
  int tile_number = 0, pass = 0, columns = 0;
  auto is_stored = [&] {
    return load_acquire_block(&smem.stored[tile_number % kEpilogueWarps]) > tile_number / kEpilogueWarps;
  };
  auto flush = [&] {
    if (columns > 0) add_relaxed(&progress.ready[pass], static_cast<unsigned>(columns));
    columns = 0;
  };
  int fenced = 0;  // tiles that a fence covers
  for (Tile tile; walk.next(tile) && !tile.down;) {
    // Not earlier: only a block with columns to tell of can be sure that the others wait for it.
    if (tile_number == 0) progress.left.await_open();
    if (tile_number == fenced) {
      flush();
      while (!is_stored()) __nanosleep(20);
      const int first = tile_number;
      while (++tile_number - first < kEpilogueWarps && is_stored()) {
      }
      fenced = tile_number;
      tile_number = first;
      fence_gpu();
    }
    if (tile.pass != pass) flush();
    pass = tile.pass;
    columns += tile.end - tile.begin;
    ++tile_number;
  }
  flush();
}

}  // namespace moecore::cuda::decode
