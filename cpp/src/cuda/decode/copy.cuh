#pragma once
// The decode kernel's warps that fill the ring: with weight rows, and with the token rows they meet.

#include <cstddef>
#include <cstdint>

#include "cuda/decode/work.cuh"

namespace moecore::cuda::decode {

/// The weight warps: a lane of warp w copies rows w * kRows to (w + 1) * kRows - 1 of a tile and,
/// where scales travel along, the windows around theirs.
template <class Format>
__device__ void copy_weights(const DecodeArgs& args, Smem& smem, std::byte* ring, Walk walk) {
  constexpr int kRows = kTileRows / kWeightWarps;
  constexpr bool kScales = Format::kBlock > 0;
  const int first = uniform(threadIdx.x / 32 * kRows);
  const std::uint64_t policy = policy_evict_first();
  const std::uint32_t ring_at = smem_address(ring);
  Cursor stage(args.stages), landing(args.stages);
  int in_flight = 0;
  for (Tile tile; walk.next(tile);) {
    if (tile.rows == 0) continue;
    tile.begin = uniform(tile.begin);
    tile.end = uniform(tile.end);
    tile.expert = uniform(tile.expert);
    const Product& product = uniform(tile.down) ? args.down : args.up;
    const Steps& steps = product.steps;
    const std::byte* from[kRows];
    const std::byte* scales[kRows] = {};
    bool there[kRows];
    int rows = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = weight_row(product, tile, first + r);
      there[r] = row >= 0;
      rows += there[r];
      from[r] = product.weights + tile.expert * product.expert_pitch + row * product.row_pitch;
      if constexpr (kScales) scales[r] = scales_of(product, tile, first + r);
    }
    for (int k = 0; k < product.k; k += steps.depth) {
      const int depth = min(steps.depth, product.k - k), bytes = depth * Format::kBits / 8;
      barrier_wait(&smem.empty[stage.slot], stage.parity ^ 1);
      if (in_flight == args.flight) {
        barrier_wait(&smem.weights[landing.slot], landing.parity);
        landing.advance();
      } else {
        ++in_flight;
      }
      __syncwarp();  // a lane that still waits must not miss the phase that the copies end
      if (elect_one()) {
        const std::uint32_t barrier = smem_address(&smem.weights[stage.slot]);
        const std::uint32_t to = ring_at + stage.slot * args.stage_bytes;
        int all = rows * bytes;
        if constexpr (kScales) {
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (there[r]) all += scale_window<Format>(scales[r], k, depth).bytes;
        }
        barrier_arrive_expect(&smem.weights[stage.slot], all);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (!there[r]) continue;
          copy_row(to + (first + r) * steps.weight_pitch, from[r], bytes, barrier, policy);
          if constexpr (kScales) {
            const Window window = scale_window<Format>(scales[r], k, depth);
            copy_row(to + kTileRows * steps.weight_pitch + (first + r) * steps.scale_pitch, window.begin,
                     window.bytes, barrier, policy);
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kRows; ++r) from[r] += bytes;
      stage.advance();
    }
  }
}

/// The token warps: lane l of warp w copies row l * kTokenWarps + w of a pass.
__device__ inline void copy_tokens(const DecodeArgs& args, Smem& smem, std::byte* ring, const Routes& routes,
                                   int passes, Walk walk) {
  const int lane = threadIdx.x % 32, i = lane * kTokenWarps + threadIdx.x / 32 - kWeightWarps;
  Progress& progress = *args.progress;
  int ready = -1;  // passes whose intermediate rows are known to be whole; -1: no counter was looked at yet
  // A lane looks at a pass, so that one trip to the L2 cache tells of 32.
  auto await_pass = [&](int pass) {
    if (pass < ready) return;
    if (ready < 0) {
      progress.left.await_open();
      ready = 0;
    }
    while (ready <= pass) {
      const int mine = ready + lane;
      const bool whole =
          mine < passes && load_relaxed(&progress.ready[mine]) == static_cast<unsigned>(args.inter);
      const unsigned missing = ~__ballot_sync(~0u, whole);
      ready += missing ? __ffs(missing) - 1 : 32;
    }
    fence_gpu();
    __syncwarp();
    fence_proxy();
  };

  Cursor stage(args.stages);
  bool looks = true;  // at the counters
  auto leave = [&] {
    looks = false;
    await_pass(passes - 1);
    __syncwarp();
    if (lane == 0) progress.left.take(gridDim.x * kTokenWarps - 1);
  };
  for (Tile tile; walk.next(tile);) {
    const Product& product = tile.down ? args.down : args.up;
    const Steps& steps = product.steps;
    const std::byte* from;
    if (tile.rows == 0) continue;
    if (tile.down) {
      await_pass(tile.pass);
      from = args.inter_rows + (tile.row + i) * args.inter_pitch;
    } else {
      from = args.x + routes.row_token[tile.row + min(i, tile.rows - 1)] * args.x_pitch;
    }
    const int rows = __popc(__ballot_sync(~0u, i < tile.rows));
    std::byte* to = ring + kTileRows * (steps.weight_pitch + steps.scale_pitch) + i * steps.x_pitch;
    for (int k = 0; k < product.k; k += steps.depth) {
      const int bytes = min(steps.depth, product.k - k) * 2;
      barrier_wait(&smem.empty[stage.slot], stage.parity ^ 1);
      __syncwarp();
      const std::uint32_t barrier = smem_address(&smem.tokens[stage.slot]);
      if (lane == 0) barrier_arrive_expect(&smem.tokens[stage.slot], rows * bytes);
      __syncwarp();
      if (i < tile.rows)
        copy_row(smem_address(to) + stage.slot * args.stage_bytes, from + std::int64_t{k} * 2, bytes,
                 barrier);
      stage.advance();
    }
    if (looks && walk.is_last_pass(tile)) leave();
  }
  if (looks) leave();
}

}  // namespace moecore::cuda::decode
