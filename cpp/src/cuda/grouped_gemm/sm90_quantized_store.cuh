#pragma once
// The end of a gated tile whose rows leave as codes: quantize() to fp8_block128, in the tile that has just
// computed them.
//
// A tile has 128 columns of out, which are one block of scales, and its eight computing warps have 16 columns
// of every token each. 32 tokens at a time:
//
//   phase 1  a warp rounds its columns to out's type, as a store would, and leaves them transposed in its
//            warpgroup's buffers, [32 tokens][64 columns]; the largest magnitude of each token among them,
//            found by shuffles, goes to maxima[token][warp]
//   phase 2  thread t of a warpgroup takes columns 16 (t % 4) and on of token t / 4: the scale from
//            the maxima of all warps, 16 codes from the buffer; the token's first thread stores the scale
//
// Scale and codes come from the device functions of quantize's own kernels, so they are the bits that
// quantize() makes of the stored rows.

#include "cuda/grouped_gemm/sm90_ptx.cuh"
#include "cuda/grouped_gemm/tiles.cuh"
#include "cuda/quantize_block.cuh"

namespace moecore::cuda::sm90 {

inline constexpr int kQuantizedTokens = 32;  // at a time
inline constexpr int kQuantizingWarps = 8;

/// The scale of a block, from the largest magnitudes that the warps have found: of what is not NaN, NaN where
/// all of it is.
template <class T>
__device__ __forceinline__ BlockScale scale_of(const ScaleRule& rule, const T (&maxima)[kQuantizingWarps]) {
  const uint4 words = *reinterpret_cast<const uint4*>(maxima);
  const auto* pairs = reinterpret_cast<const Two<T>*>(&words);
  const Two<T> most = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
  const float amax = dev::to_f32(__hmax(most.x, most.y));
  BlockScale scale;
  if (!tame_scale<Encoding::kBlock128>(rule, amax, 1.0f, 1.0f, true, scale))
    scale = block_scale<Encoding::kBlock128>(rule, amax, 1.0f, 1.0f, true);
  return scale;
}

/// pack(g, half): this lane's two tokens of group g of eight, in its column of the left or right eight of its
/// warp's columns, as T. Called by all computing warps.
template <int kTokens, class Engine, class Pack>
__device__ __forceinline__ void store_quantized(const Engine& engine, const Tile& tile, const Pack& pack) {
  using T = typename Engine::T;
  static_assert(Engine::kConsumerWarps == kQuantizingWarps && Engine::kTileColumns == 128);
  constexpr int kGroups = kTokens / 8, kGroupsAtOnce = kQuantizedTokens / 8;
  const QuantizedOutArgs& to = engine.args.quantized_out;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warpgroup = threadIdx.x / 128, row = threadIdx.x % 128 / 4, unit = threadIdx.x % 4;
  std::byte* buffer = engine.s.buffer[warpgroup][0];
  auto& maxima = engine.s.maxima;
  auto at = [&](int token, int piece) { return buffer + swizzled<8>(token, piece); };
  auto magnitudes = [](const std::uint32_t& two) { return __habs2(reinterpret_cast<const Two<T>&>(two)); };

#pragma unroll
  for (int first = 0; first < kGroups; first += kGroupsAtOnce) {
    if constexpr (!Engine::kEveryWidth)
      if (first * 8 >= tile.rows) break;
    computing_sync<Engine::kWarpgroups>();  // what stood here before has been read

    // Phase 1: two groups at a time, four matrices of eight tokens and eight columns.
#pragma unroll
    for (int pair = 0; pair < kGroupsAtOnce && first + pair < kGroups; pair += 2) {
      std::uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = first + pair + i % 2 < kGroups ? pack(first + pair + i % 2, i / 2) : 0;
      store_matrices<true>(smem_address(at(pair * 8 + lane % 16, warp % 4 * 2 + lane / 16)), v);
#pragma unroll
      for (int i = 0; i < 2 && first + pair + i < kGroups; ++i) {
        Two<T> most = __hmax2(magnitudes(v[i]), magnitudes(v[i + 2]));
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          most = __hmax2(most, __shfl_xor_sync(~0u, most, distance));
        if (lane / 4 == pair + i) {  // each of the eight lanes with these tokens knows; one stores
          maxima[(pair + i) * 8 + lane % 4 * 2][warp] = most.x;
          maxima[(pair + i) * 8 + lane % 4 * 2 + 1][warp] = most.y;
        }
      }
    }
    computing_sync<Engine::kWarpgroups>();

    // Phase 2.
    if (first * 8 + row < tile.rows) {
      const BlockScale scale = scale_of(to.rule, maxima[row]);
      Unit<T> values;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        reinterpret_cast<uint4*>(values.values)[i] = *reinterpret_cast<const uint4*>(at(row, unit * 2 + i));
      Codes codes;
      encode_any<Encoding::kBlock128>(values, scale.factor, codes);
      const std::int64_t out_row = tile.row + first * 8 + row;
      const int column = tile.weight_tile * 128 + warpgroup * 64 + unit * kUnit;
      *reinterpret_cast<uint4*>(to.codes + out_row * to.pitch + column) =
          make_uint4(codes.words[0], codes.words[1], codes.words[2], codes.words[3]);
      if (unit == 0 && warpgroup == 0)
        to.scales[out_row * to.scale_pitch + tile.weight_tile] = __uint_as_float(scale.bits);
    }
  }
}

}  // namespace moecore::cuda::sm90
