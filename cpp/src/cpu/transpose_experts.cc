// transpose_experts on the CPU: dst[e,c,r] = src[e,r,c].
//
// A tile is L rows by L columns, L elements to a cache line, so that every line of src and of dst is touched
// once. It is transposed into a buffer in the L1 cache by blocks of 16-byte vectors and leaves it by whole
// lines. Tiles that follow each other share their rows of src, which keeps the hardware prefetcher on L
// streams.

#include "ops/transpose_experts.h"

#include <algorithm>
#include <cstring>

#include "cpu/explain.h"
#include "cpu/stream.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

constexpr std::int64_t kLine = 64, kVector = 16;

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVector)));
};

// a0 b0 a1 b1 ... of the low and of the high halves.
template <class T, std::size_t... I>
void interleave(typename VectorOf<T>::Type a, typename VectorOf<T>::Type b, typename VectorOf<T>::Type& low,
                typename VectorOf<T>::Type& high, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
}

// N x N elements, N = 16 bytes of them. Interleaving row i with row i + N/2, log2 N times, is a
// transposition.
template <class T>
void transpose_block(const std::byte* src, std::int64_t src_pitch, std::byte* dst, std::int64_t dst_pitch) {
  constexpr int n = kVector / sizeof(T);
  typename VectorOf<T>::Type rows[n], mixed[n];
  for (int i = 0; i < n; ++i) std::memcpy(&rows[i], src + i * src_pitch, kVector);
  for (int step = 1; step < n; step *= 2) {
    for (int i = 0; i < n / 2; ++i)
      interleave<T>(rows[i], rows[i + n / 2], mixed[2 * i], mixed[2 * i + 1], std::make_index_sequence<n>());
    std::copy_n(mixed, n, rows);
  }
  for (int i = 0; i < n; ++i) std::memcpy(dst + i * dst_pitch, &rows[i], kVector);
}

// Elements one by one, for the edges.
template <class T>
void transpose_edge(const std::byte* src, std::int64_t src_pitch, std::byte* dst, std::int64_t dst_pitch,
                    std::int64_t rows, std::int64_t cols) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t c = 0; c < cols; ++c)
    for (std::int64_t r = 0; r < rows; ++r)
      std::memcpy(dst + c * dst_pitch + r * size, src + r * src_pitch + c * size, sizeof(T));
}

template <class T>
void transpose(const TransposeProblem& p, const ExecContext& ctx) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t kTile = kLine / size, kBlock = kVector / size;
  // A task is one tile high and up to 4096 columns wide.
  constexpr std::int64_t kTaskColumns = 4096 / kTile * kTile;
  const std::int64_t row_tiles = (p.rows + kTile - 1) / kTile;
  const std::int64_t column_tasks = (p.cols + kTaskColumns - 1) / kTaskColumns;
  const std::int64_t tasks = p.num_experts * row_tiles * column_tasks;
  if (explain(ctx, "transpose_experts", "tiles of 64-byte lines", threads_for(ctx, tasks))) return;
  const bool streams = outgrows_cache(p.num_experts * p.rows * p.cols * size);
  const std::int64_t src_pitch = p.src_row_stride * size, dst_pitch = p.dst_row_stride * size;

  parallel_for(ctx, tasks, [&](std::int64_t task, int) {
    const std::int64_t e = task / (row_tiles * column_tasks);
    const std::int64_t r = task / column_tasks % row_tiles * kTile, c0 = task % column_tasks * kTaskColumns;
    const std::int64_t c1 = std::min(c0 + kTaskColumns, p.cols), rows = std::min(kTile, p.rows - r);
    for (std::int64_t c = c0; c < c1; c += kTile) {
      const std::byte* src = p.src + e * p.src_expert_stride * size + r * src_pitch + c * size;
      std::byte* dst = p.dst + e * p.dst_expert_stride * size + c * dst_pitch + r * size;
      const std::int64_t cols = std::min(kTile, c1 - c);
      if (rows < kTile || cols < kTile) {
        transpose_edge<T>(src, src_pitch, dst, dst_pitch, rows, cols);
        continue;
      }
      alignas(kLine) std::byte tile[kTile * kLine];
      for (std::int64_t i = 0; i < kTile; i += kBlock)
        for (std::int64_t j = 0; j < kTile; j += kBlock)
          transpose_block<T>(src + i * src_pitch + j * size, src_pitch, tile + j * kLine + i * size, kLine);
      for (std::int64_t j = 0; j < kTile; ++j)
        streams ? stream_copy(dst + j * dst_pitch, tile + j * kLine, kLine)
                : static_cast<void>(std::memcpy(dst + j * dst_pitch, tile + j * kLine, kLine));
    }
    stream_fence();
  });
}

}  // namespace

void transpose_experts(const TransposeProblem& p, const ExecContext& ctx) {
  switch (p.element_bytes) {
    case 1:
      return transpose<std::uint8_t>(p, ctx);
    case 2:
      return transpose<std::uint16_t>(p, ctx);
    case 4:
      return transpose<std::uint32_t>(p, ctx);
    case 8:
      return transpose<std::uint64_t>(p, ctx);
  }
}

}  // namespace moecore::cpu
