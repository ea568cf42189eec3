#pragma once
// What the portable engine's kernels share: the tile, the way from sums to elements of out.
//
// A block of four warps computes 128 weight rows x kTokens tokens, 32 rows a warp, as two blocks of 16 rows;
// c[2][kTokens / 8][4] holds a warp's sums. Of a block and eight tokens, c[0] and c[1] are row lane / 4 of
// tokens 2 (lane % 4) and + 1, c[2] and c[3] the row eight further down.

#include "cuda/activation.cuh"
#include "cuda/device/async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/grouped_gemm/epilogue.cuh"
#include "cuda/grouped_gemm/tiles.cuh"

namespace moecore::cuda::portable {

using dev::mma;
using dev::smem_address;

inline constexpr int kThreads = 128;
inline constexpr int kTileRows = 128;
inline constexpr int kStages = 3;

template <class T, int kTokens>
__device__ __forceinline__ void store(const EpilogueArgs& e, const Tile& tile,
                                      const float (&c)[2][kTokens / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* out = static_cast<T*>(e.out);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int row16 = warp * 2 + m;  // sixteen weight rows: eight columns when gated
    const int column = e.gated ? (tile.weight_tile * kTileRows / 16 + row16) * 8 + lane / 4
                               : tile.weight_tile * kTileRows + row16 * 16 + lane / 4;
    const BiasPair bias = e.gated ? bias_pair<T, SigmoidGate>(e, tile.expert, column)
                                  : bias_pair<T, Linear>(e, tile.expert, column);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = n * 8 + lane % 4 * 2 + j;
        if (token >= tile.rows) continue;
        const float w = row_weight(e, tile.row + token);
        const float first = __fmaf_rn(c[m][n][j], w, bias.first),
                    second = __fmaf_rn(c[m][n][2 + j], w, bias.second);
        T* to = out + (tile.row + token) * e.out_stride + column;
        if (e.gated) {
          if (column < e.columns) to[0] = dev::from_f32<T>(apply_activation(e, first, second));
        } else {
          if (column < e.columns)
            to[0] = dev::from_f32<T>(e.activated ? apply_activation(e, first, 0.0f) : first);
          if (column + 8 < e.columns)
            to[8] = dev::from_f32<T>(e.activated ? apply_activation(e, second, 0.0f) : second);
        }
      }
  }
}

/// Row of an expert's weights that row `row` of a weight tile stands for, -1 beyond them. When gated, eight
/// gate rows and eight up rows alternate.
__device__ __forceinline__ std::int64_t weight_row_of(const EpilogueArgs& e, int weight_tile, int row) {
  const int column =
      weight_tile * (e.gated ? kTileRows / 2 : kTileRows) + (e.gated ? row / 16 * 8 + row % 8 : row);
  if (column >= e.columns) return -1;
  if (!e.gated) return column;
  return (row % 16 < 8 ? e.gate_first : e.up_first) + std::int64_t{column} * e.row_step;
}

/// Row of x that row `row` of a token tile stands for, -1 beyond the tile.
__device__ __forceinline__ std::int64_t token_row_of(const GroupedGemmArgs& args, const Tile& tile, int row) {
  if (row >= tile.rows) return -1;
  return args.row_token ? args.row_token[tile.row + row] : tile.row + row;
}

}  // namespace moecore::cuda::portable
