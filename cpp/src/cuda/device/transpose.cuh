#pragma once
// Transposing through shared memory, so that reads and writes are both contiguous.

#include <cstdint>

namespace moecore::cuda::dev {

inline constexpr int kSquare = 32;        // rows and columns of a square
inline constexpr int kSquareThreads = 8;  // rows of threads that move one, each of 32

/// One column more, so that a column is spread over the banks.
template <class T>
using Square = T[kSquare][kSquare + 1];

/// A block of 32 x 8 threads: store(c, r, load(r, c)) for all rows r < `rows` and columns c < `cols` of a
/// square, of which a matrix may have more. Neighbouring threads load neighbouring columns and store
/// neighbouring rows. Whoever calls it again synchronises in between.
template <class T, class Load, class Store>
__device__ __forceinline__ void transpose_square(Square<T>& square, std::int64_t rows, std::int64_t cols,
                                                 const Load& load, const Store& store) {
  const int r_end = static_cast<int>(min(rows, std::int64_t{kSquare}));
  const int c_end = static_cast<int>(min(cols, std::int64_t{kSquare}));
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
#pragma unroll
  for (int i = y; i < kSquare; i += kSquareThreads)
    if (i < r_end && x < c_end) square[i][x] = load(i, x);
  __syncthreads();
#pragma unroll
  for (int i = y; i < kSquare; i += kSquareThreads)
    if (i < c_end && x < r_end) store(i, x, square[x][i]);
}

}  // namespace moecore::cuda::dev
