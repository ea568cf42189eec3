// The grouped GEMM's kernels for AMX: bf16 on tiles, f32 and f16 as in AVX-512.
//
// A tile multiplication adds A[16 x 32] * B[32 x 16] to C[16 x 16] of f32. A is 16 weight rows where they
// lie; B is 16 rows of x, packed once per block: word [k/2][row] holds the pair (k, k+1). So C stands
// transposed, [weight row][row], and is turned around at the end. The inner loop multiplies 2 x 2 tiles: four
// loads feed four multiplications. Sums over K continue in f32 across depth blocks, so a result's bits depend
// on its two rows alone. Denormals are taken as zero by the instruction.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/gemm/kernels.h"
#include "cpu/simd/target.h"

namespace moecore::cpu::gemm {
namespace {

constexpr int kTile = 16;                // rows of every tile; its width is kChunk bf16 or 16 f32
constexpr int kChunk = 32;               // depth of a tile multiplication
constexpr int kChunkBytes = kChunk * 2;  // = 64, a row of any tile
constexpr int kTileBytes = kTile * kChunkBytes;
constexpr int kDepthChunks = 16;    // depth block: 32 rows x 512 k of x are 32 KiB, which L1 holds
constexpr int kPrefetchChunks = 2;  // how far ahead weights are prefetched: 128 bytes of each row

// What ldtilecfg reads: all eight tiles 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// A depth block of x in the layout of B: [row group][chunk][k/2][16 rows][2].
struct XPanel {
  alignas(64) std::byte tiles[kMaxBlockRows / kTile][kDepthChunks][kTileBytes];
};
// Results as the tiles leave them: [row group][weight row][16 rows]. A run of weight rows starts at a
// multiple of 16.
struct Results {
  alignas(64) float tiles[kMaxBlockRows / kTile][kMaxBlockCols + 2 * kTile][kTile];
};

MOECORE_TARGET_BEGIN("amx-tile,amx-bf16,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

// Element j of v[i] and element i of v[j] change places.
MOECORE_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  // v[4q + c]: rows 4q .. 4q+3 of column 4l + c in 128-bit lane l.
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    v[4 * q + 0] = _mm512_unpacklo_epi64(t[4 * q], t[4 * q + 2]);
    v[4 * q + 1] = _mm512_unpackhi_epi64(t[4 * q], t[4 * q + 2]);
    v[4 * q + 2] = _mm512_unpacklo_epi64(t[4 * q + 1], t[4 * q + 3]);
    v[4 * q + 3] = _mm512_unpackhi_epi64(t[4 * q + 1], t[4 * q + 3]);
  }
  // Now a transpose of 4 x 4 lanes for every c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);           // lanes 0 2 of q 0, 0 2 of q 1
    t[4 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);       // lanes 1 3
    t[8 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);  // the same of q 2 and q 3
    t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);           // lane 0 of q 0 .. 3
    v[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);       // lane 2
    v[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);  // lane 1
    v[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// One group of up to 16 rows of x, `depth` elements from `first` on; absent rows and the tail are zeros.
void pack_group(const std::byte* const* x, int rows, std::int64_t first, std::int64_t depth,
                std::byte (*tiles)[kTileBytes]) {
  for (std::int64_t k = 0; k < depth; k += kChunk, ++tiles) {
    const std::int64_t left = depth - k;
    const __mmask32 mask = left >= kChunk ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    __m512i v[16];
    for (int i = 0; i < kTile; ++i)
      v[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, x[i] + (first + k) * 2) : _mm512_setzero_si512();
    transpose(v);
    for (int i = 0; i < kTile; ++i) _mm512_store_si512(*tiles + i * kChunkBytes, v[i]);
  }
}

// 16 * kTiles weight rows at w against kGroups row groups of the panel, over `chunks` chunks. With `next`,
// the weight rows that come afterwards, weights are prefetched.
template <int kTiles, int kGroups>
void multiply(const std::byte* w, const std::byte* next, std::int64_t pitch, const XPanel& x, int group,
              int chunks, bool fresh, Results& c, int col) {
  const std::byte* x0 = x.tiles[group][0];
  const std::byte* x1 = x.tiles[group + kGroups - 1][0];
  float* c0 = c.tiles[group][col];
  float* c1 = c.tiles[group + kGroups - 1][col];
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c0, kChunkBytes);
    if constexpr (kGroups == 2) _tile_loadd(1, c1, kChunkBytes);
    if constexpr (kTiles == 2) _tile_loadd(2, c0 + kTile * kTile, kChunkBytes);
    if constexpr (kTiles == 2 && kGroups == 2) _tile_loadd(3, c1 + kTile * kTile, kChunkBytes);
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (next) {
      const int ahead = chunk + kPrefetchChunks;
      const std::byte* p = ahead < chunks ? w + ahead * kChunkBytes : next + (ahead - chunks) * kChunkBytes;
      for (int i = 0; i < kTiles * kTile; ++i) _mm_prefetch(p + i * pitch, _MM_HINT_T0);
    }
    const std::byte* a = w + chunk * kChunkBytes;
    _tile_loadd(4, a, pitch);
    _tile_loadd(6, x0 + chunk * kTileBytes, kChunkBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kGroups == 2) {
      _tile_loadd(7, x1 + chunk * kTileBytes, kChunkBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTiles == 2) {
      _tile_loadd(5, a + kTile * pitch, pitch);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c0, kChunkBytes);
  if constexpr (kGroups == 2) _tile_stored(1, c1, kChunkBytes);
  if constexpr (kTiles == 2) _tile_stored(2, c0 + kTile * kTile, kChunkBytes);
  if constexpr (kTiles == 2 && kGroups == 2) _tile_stored(3, c1 + kTile * kTile, kChunkBytes);
}

// The same against every row group; the first pass prefetches.
template <int kTiles>
void multiply_groups(const std::byte* w, const std::byte* next, std::int64_t pitch, const XPanel& x,
                     int groups, int chunks, bool fresh, Results& c, int col) {
  int group = 0;
  for (; group + 2 <= groups; group += 2)
    multiply<kTiles, 2>(w, group == 0 ? next : nullptr, pitch, x, group, chunks, fresh, c, col);
  if (group < groups)
    multiply<kTiles, 1>(w, group == 0 ? next : nullptr, pitch, x, group, chunks, fresh, c, col);
}

// A run of weight rows against the panel. Rows that do not fill a tile, and depths that do not fill a chunk,
// are padded with zeros in a copy of 16 rows.
void multiply_run(const std::byte* w, int rows, std::int64_t pitch, const XPanel& x, int groups,
                  std::int64_t depth, bool fresh, Results& c, int col) {
  const int chunks = static_cast<int>((depth + kChunk - 1) / kChunk);
  int row = 0;
  if (depth % kChunk == 0) {
    for (; row + 2 * kTile <= rows; row += 2 * kTile) {
      const std::byte* at = w + row * pitch;
      const std::byte* next = row + 4 * kTile <= rows ? at + 2 * kTile * pitch : at;
      multiply_groups<2>(at, next, pitch, x, groups, chunks, fresh, c, col + row);
    }
    for (; row + kTile <= rows; row += kTile) {
      const std::byte* at = w + row * pitch;
      multiply_groups<1>(at, at, pitch, x, groups, chunks, fresh, c, col + row);
    }
  }
  for (; row < rows; row += kTile) {
    alignas(64) std::byte padded[kTile][kDepthChunks * kChunkBytes] = {};
    for (int i = 0; i < std::min(kTile, rows - row); ++i)
      std::memcpy(padded[i], w + (row + i) * pitch, static_cast<std::size_t>(depth * 2));
    multiply_groups<1>(padded[0], nullptr, sizeof padded[0], x, groups, chunks, fresh, c, col + row);
  }
}

// c[row][col ..] = the results of 16 weight rows; may write up to 15 columns more.
void turn_around(const Results& results, int from, int rows, float* c, int c_pitch) {
  for (int group = 0; group * kTile < rows; ++group) {
    __m512i v[16];
    for (int i = 0; i < kTile; ++i) v[i] = _mm512_load_si512(results.tiles[group][from + i]);
    transpose(v);
    for (int i = 0; i < std::min(kTile, rows - group * kTile); ++i)
      _mm512_storeu_si512(c + (group * kTile + i) * c_pitch, v[i]);
  }
}

void tile_product(const Product& p) {
  XPanel panel;
  Results results;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (std::int64_t start = 0; start == 0 || start < p.depth; start += kDepthChunks * kChunk) {
    const std::int64_t depth = std::min<std::int64_t>(p.depth - start, kDepthChunks * kChunk);
    for (int row = 0; row < p.rows; row += kTile)
      pack_group(p.x + row, std::min(kTile, p.rows - row), start, depth, panel.tiles[row / kTile]);
    int col = 0;
    for (const WeightRows& run : p.w) {
      multiply_run(run.data + start * 2, run.rows, p.w_pitch, panel, (p.rows + kTile - 1) / kTile, depth,
                   start == 0, results, col);
      col += (run.rows + kTile - 1) / kTile * kTile;
    }
  }
  _tile_release();

  int from = 0;
  float* c = p.c;
  for (const WeightRows& run : p.w) {
    for (int row = 0; row < run.rows; row += kTile)
      turn_around(results, from + row, p.rows, c + row, p.c_pitch);
    from += (run.rows + kTile - 1) / kTile * kTile;
    c += run.rows;
  }
}

MOECORE_TARGET_END
}  // namespace

const KernelTable& amx_kernels() {
  static const KernelTable table = [] {
    KernelTable t = avx512_bf16_kernels();
    t.bf16.name = "bf16 tiles";
    t.bf16.product = tile_product;
    t.bf16.max_rows = kMaxBlockRows;
    t.bf16.max_cols = kMaxBlockCols;
    return t;
  }();
  return table;
}

}  // namespace moecore::cpu::gemm

#endif
