#pragma once
// The decode kernel's warps that multiply: mma.sync on the stages of the ring.

#include <cstddef>
#include <cstdint>

#include "cuda/decode/formats.cuh"
#include "cuda/decode/work.cuh"

namespace moecore::cuda::decode {

/// What a lane reads of a step: of weight rows g and g + 8 and of token row g the eight elements from 8q of a
/// chunk on.
struct LaneView {
  const std::byte *low, *high, *token;  // of chunk 0
  const std::byte *low_scales, *high_scales;
};

/// c += weights . tokens over kCount chunks of a step: first, first + stride, ... kTail: only the first
/// `depth` of the chunk are there. The loads of all chunks stand before the first product.
template <class T, class Format, int kCount, bool kTail>
__device__ __forceinline__ void multiply_chunks(const LaneView& view, int first, int stride, int depth,
                                                float (&c)[4][4]) {
  using Codes = typename Format::Codes;
  constexpr int kChunkBytes = kChunk * Format::kBits / 8;
  const int q = threadIdx.x % 4;
  Codes low[kCount] = {}, high[kCount] = {};
  uint4 x[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chunk = first + i * stride;
    if (kTail && q * 8 >= depth) continue;
    low[i] = *reinterpret_cast<const Codes*>(view.low + chunk * kChunkBytes);
    high[i] = *reinterpret_cast<const Codes*>(view.high + chunk * kChunkBytes);
    x[i] = *reinterpret_cast<const uint4*>(view.token + chunk * kChunk * 2);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    constexpr bool kScaledParts = Format::kBlock == kChunk, kScaledCodes = Format::kBlock == kChunk / 2;
    const int chunk = first + i * stride;
    uint4 a, b;
    if constexpr (kScaledCodes) {
      a = Format::decode_scaled(low[i], view.low_scales + chunk * 2 + q / 2);
      b = Format::decode_scaled(high[i], view.high_scales + chunk * 2 + q / 2);
    } else {
      a = Format::decode(low[i]);
      b = Format::decode(high[i]);
    }
    const unsigned first_half[4] = {a.x, b.x, a.y, b.y}, second_half[4] = {a.z, b.z, a.w, b.w};
    if constexpr (kScaledParts) {
      float part[4] = {};
      mma(part, first_half, x[i].x, x[i].y, T{});
      mma(part, second_half, x[i].z, x[i].w, T{});
      const float low_scale = Format::scale(view.low_scales + chunk * Format::kScaleBytes),
                  high_scale = Format::scale(view.high_scales + chunk * Format::kScaleBytes);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        c[i % 4][n] = __fmaf_rn(part[n], n < 2 ? low_scale : high_scale, c[i % 4][n]);
    } else {
      mma(c[2 * i % 4], first_half, x[i].x, x[i].y, T{});
      mma(c[(2 * i + 1) % 4], second_half, x[i].z, x[i].w, T{});
    }
  }
}

/// Chunks first, first + stride, ... up to `chunks`, then, if it falls to this warp, the rest of `depth`.
template <class T, class Format>
__device__ __forceinline__ void multiply_strided(const LaneView& view, int first, int stride, int chunks,
                                                 int rest, float (&c)[4][4]) {
  int chunk = first;
  for (; chunk + 3 * stride < chunks; chunk += 4 * stride)
    multiply_chunks<T, Format, 4, false>(view, chunk, stride, kChunk, c);
  if (chunk + stride < chunks) {
    multiply_chunks<T, Format, 2, false>(view, chunk, stride, kChunk, c);
    chunk += 2 * stride;
  }
  if (chunk < chunks) {
    multiply_chunks<T, Format, 1, false>(view, chunk, stride, kChunk, c);
    chunk += stride;
  }
  if (chunk == chunks && rest > 0) multiply_chunks<T, Format, 1, true>(view, chunk, stride, rest, c);
}

/// The MMA warps: sums[row][token] = weights[row] . x[token], over this warp's share of every step. A lane
/// without a token reads the last one again: its columns are nobody's.
template <class T, class Format>
__device__ void multiply(const DecodeArgs& args, Smem& smem, std::byte* ring, Walk walk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kFirstMmaWarp;
  const int g = lane / 4, q = lane % 4;
  Cursor stage(args.stages), tiles(kEpilogueWarps);
  for (Tile tile; walk.next(tile);) {
    if (tile.rows == 0) continue;
    const Product& product = tile.down ? args.down : args.up;
    const Steps& steps = product.steps;
    // Where in its window a row's first scale stands: the windows begin at multiples of 16 bytes.
    unsigned shifts[2] = {};
    if constexpr (Format::kBlock > 0)
      for (int half = 0; half < 2; ++half)
        shifts[half] =
            static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(scales_of(product, tile, g + half * 8)));
    float c[4][4] = {};
    for (int k = 0; k < product.k; k += steps.depth) {
      const int depth = min(steps.depth, product.k - k);
      const std::byte* weights = ring + stage.slot * args.stage_bytes;
      const std::byte* scales = weights + kTileRows * steps.weight_pitch;
      LaneView view;
      view.low = weights + g * steps.weight_pitch + q * static_cast<int>(sizeof(typename Format::Codes));
      view.high = view.low + 8 * steps.weight_pitch;
      view.token = scales + kTileRows * steps.scale_pitch + min(g, tile.rows - 1) * steps.x_pitch + q * 16;
      if constexpr (Format::kBlock > 0) {
        const auto at = static_cast<unsigned>(k / Format::kBlock * Format::kScaleBytes);
        view.low_scales = scales + g * steps.scale_pitch + (shifts[0] + at) % 16;
        view.high_scales = scales + (g + 8) * steps.scale_pitch + (shifts[1] + at) % 16;
      }
      barrier_wait(&smem.weights[stage.slot], stage.parity);
      barrier_wait(&smem.tokens[stage.slot], stage.parity);
      if constexpr (Format::kBlock > kChunk) {
        constexpr int kSpan = Format::kBlock / kChunk;
        for (int span = warp; span * Format::kBlock < depth; span += kMmaWarps) {
          float part[4][4] = {};
          const int left = depth - span * Format::kBlock;
          multiply_strided<T, Format>(view, span * kSpan, 1, span * kSpan + min(kSpan, left / kChunk),
                                      left < Format::kBlock ? left % kChunk : 0, part);
          const float scale[2] = {Format::scale(view.low_scales + span * Format::kScaleBytes),
                                  Format::scale(view.high_scales + span * Format::kScaleBytes)};
#pragma unroll
          for (int n = 0; n < 4; ++n)
            c[0][n] = __fmaf_rn((part[0][n] + part[1][n]) + (part[2][n] + part[3][n]), scale[n / 2], c[0][n]);
        }
      } else {
        multiply_strided<T, Format>(view, warp, kMmaWarps, depth / kChunk, depth % kChunk, c);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&smem.empty[stage.slot]);
      stage.advance();
    }
    auto sum = [&](int n) { return (c[0][n] + c[1][n]) + (c[2][n] + c[3][n]); };
    barrier_wait(&smem.taken[tiles.slot], tiles.parity ^ 1);
    auto& sums = smem.partials[tiles.slot].sums[warp];
    *reinterpret_cast<float2*>(&sums[g][2 * q]) = {sum(0), sum(1)};
    *reinterpret_cast<float2*>(&sums[g + 8][2 * q]) = {sum(2), sum(3)};
    __syncwarp();
    if (lane == 0) barrier_arrive(&smem.summed[tiles.slot]);
    tiles.advance();
  }
}

}  // namespace moecore::cuda::decode
