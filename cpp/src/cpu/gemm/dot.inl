// The product of one block in dot-product form: the weights stay where they are, dense along K, and a vector
// accumulator per (row, weight row) runs down K; its lanes are added up at the end.
//
// x is read once per block into a panel, in the order in which the tiles take it: for every step of K the
// vectors of a tile's rows, one after the other, padded with zeros to a whole step. A tile is up to kRows
// rows by kCols weight rows. Every (row, weight row) has an accumulator of its own that meets its operands in
// the same order in every tile shape, so the bits of a result depend on its two rows alone, not on how many
// rows the expert has or on the number of threads.
//
// Loops: depth that fits the panel > tiles of weight rows > kSumDepth > tiles of rows. A weight tile (3 x 2
// KiB of bf16) stays in L1 while the panel streams past it from L2; meanwhile the first of these passes
// prefetches the next weight tile, so that reading weights from DRAM hides behind the arithmetic.
//
// A policy P brings the element types and the arithmetic:
//   Operand (a vector of elements), Sum (a vector of f32)
//   kStep: elements in an operand; kXBytes, kWBytes: bytes of one element
//   x(p), w(p): the operand at p; zero(); multiply_add(x, w, sum); add_lanes(sum)
//   kRows, kCols: the largest tile whose sums stay in registers

inline constexpr std::int64_t kPanelBytes = 128 * 1024;  // kBlockRows x kSumDepth of f32

// panel[step * rows + i] = operand of row i.
template <class P>
void pack_rows(const std::byte* const* x, int rows, std::int64_t first, std::int64_t depth,
               typename P::Operand* panel) {
  const std::int64_t steps = depth / P::kStep, rest = depth % P::kStep;
  for (int i = 0; i < rows; ++i) {
    const std::byte* from = x[i] + first * P::kXBytes;
    typename P::Operand* to = panel + i;
    for (std::int64_t s = 0; s < steps; ++s, from += P::kStep * P::kXBytes, to += rows) *to = P::x(from);
    if (rest > 0) {
      std::byte padded[P::kStep * P::kXBytes] = {};
      std::memcpy(padded, from, static_cast<std::size_t>(rest * P::kXBytes));
      *to = P::x(padded);
    }
  }
}

template <class P, int kRows, int kCols>
MOECORE_INLINE void dot_step(const typename P::Operand* x, const std::byte* const (&w)[kCols],
                             std::int64_t w_at, typename P::Sum (&sum)[kRows][kCols]) {
  typename P::Operand wv[kCols];
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) wv[j] = P::w(w[j] + w_at);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const typename P::Operand xv = x[i];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) sum[i][j] = P::multiply_add(xv, wv[j], sum[i][j]);
  }
}

// c[i,j] = or, when not `fresh`, += the dot products of the panel at x with kCols weight rows at w.
template <class P, int kRows, int kCols, bool kPrefetch>
void dot_tile(const typename P::Operand* x, const std::byte* w, std::int64_t w_pitch, std::int64_t depth,
              bool fresh, float* c, int c_pitch) {
  typename P::Sum sum[kRows][kCols];
  const std::byte* wp[kCols];
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    wp[j] = w + j * w_pitch;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i][j] = P::zero();
  }

  constexpr std::int64_t kStepBytes = P::kStep * P::kWBytes;
  const std::int64_t whole = depth / P::kStep * kStepBytes;
  std::int64_t at = 0;
  if constexpr (kPrefetch) {  // by lines of 64 bytes
    for (; at + 64 <= whole; at += 64) {
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) __builtin_prefetch(wp[j] + at + kCols * w_pitch);
#pragma GCC unroll 8
      for (int s = 0; s < 64 / kStepBytes; ++s, x += kRows) dot_step<P>(x, wp, at + s * kStepBytes, sum);
    }
  }
  for (; at < whole; at += kStepBytes, x += kRows) dot_step<P>(x, wp, at, sum);
  if (const std::int64_t rest = depth % P::kStep; rest > 0) {
    std::byte padded[kCols][kStepBytes] = {};
    for (int j = 0; j < kCols; ++j) {
      std::memcpy(padded[j], wp[j] + whole, static_cast<std::size_t>(rest * P::kWBytes));
      wp[j] = padded[j];
    }
    dot_step<P>(x, wp, 0, sum);
  }

#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      float& to = c[i * c_pitch + j];
      to = (fresh ? 0.0f : to) + P::add_lanes(sum[i][j]);
    }
}

// A tile of `rows` <= kRows rows; the switch over the row count, unrolled.
template <class P, int kRows, int kCols>
void dot_few(const typename P::Operand* x, std::int64_t step, int rows, const std::byte* w,
             std::int64_t w_pitch, std::int64_t depth, bool fresh, float* c, int c_pitch) {
  if (rows == kRows)
    dot_tile<P, kRows, kCols, true>(x + step * kRows, w, w_pitch, depth, fresh, c, c_pitch);
  else if constexpr (kRows > 1)
    dot_few<P, kRows - 1, kCols>(x, step, rows, w, w_pitch, depth, fresh, c, c_pitch);
}

// Every row of the panel, from `step` on, against one tile of weight rows.
template <class P, int kCols>
void dot_rows(const typename P::Operand* panel, std::int64_t panel_steps, std::int64_t step, int rows,
              const std::byte* w, std::int64_t w_pitch, std::int64_t depth, bool fresh, float* c,
              int c_pitch) {
  dot_few<P, P::kRows, kCols>(panel, step, std::min(rows, P::kRows), w, w_pitch, depth, fresh, c, c_pitch);
  int row = P::kRows;
  for (; row + P::kRows <= rows; row += P::kRows)
    dot_tile<P, P::kRows, kCols, false>(panel + row * panel_steps + step * P::kRows, w, w_pitch, depth, fresh,
                                        c + row * c_pitch, c_pitch);
  if (row < rows)
    dot_few<P, P::kRows, kCols>(panel + row * panel_steps, step, rows - row, w, w_pitch, depth, fresh,
                                c + row * c_pitch, c_pitch);
}

template <class P>
void dot_product(const Product& p) {
  using Operand = typename P::Operand;
  alignas(64) Operand panel[kPanelBytes / sizeof(Operand)];
  const std::int64_t sum_bytes = kSumDepth / P::kStep * sizeof(Operand) * p.rows;
  const std::int64_t panel_depth = kPanelBytes / sum_bytes * kSumDepth;
  for (std::int64_t start = 0; start == 0 || start < p.depth; start += panel_depth) {
    const std::int64_t packed = std::min(panel_depth, p.depth - start);
    const std::int64_t steps = (packed + P::kStep - 1) / P::kStep;
    for (int row = 0; row < p.rows; row += P::kRows)
      pack_rows<P>(p.x + row, std::min(P::kRows, p.rows - row), start, packed, panel + row * steps);

    float* c = p.c;
    for (const WeightRows& run : p.w) {
      const std::byte* w = run.data + start * P::kWBytes;
      for (int left = run.rows; left > 0;) {
        const bool full = left >= P::kCols;
        for (std::int64_t first = 0; first == 0 || first < packed; first += kSumDepth)
          (full ? dot_rows<P, P::kCols>
                : dot_rows<P, 1>)(panel, steps, first / P::kStep, p.rows, w + first * P::kWBytes, p.w_pitch,
                                  std::min(kSumDepth, packed - first), start + first == 0, c, p.c_pitch);
        const int cols = full ? P::kCols : 1;
        left -= cols;
        w += cols * p.w_pitch;
        c += cols;
      }
    }
  }
}

// The policy for float, F16 and BF16: widened to f32 vectors while they are read.
template <class T, int kTileRows>
struct Widened {
  using Operand = Vec;
  using Sum = Vec;
  static constexpr int kStep = W, kXBytes = sizeof(T), kWBytes = sizeof(T), kRows = kTileRows, kCols = 3;
  static Vec x(const std::byte* p) { return load(reinterpret_cast<const T*>(p)); }
  static Vec w(const std::byte* p) { return load(reinterpret_cast<const T*>(p)); }
  static Vec zero() { return set(0.0f); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return kFusedMultiplyAdd ? fma(a, b, sum) : a * b + sum; }
  static float add_lanes(Vec sum) {
    if constexpr (W >= 16) sum = sum + swap_lanes<(W >= 16 ? 8 : 1)>(sum);
    if constexpr (W >= 8) sum = sum + swap_lanes<(W >= 8 ? 4 : 1)>(sum);
    sum = sum + swap_lanes<2>(sum);
    return (sum + swap_lanes<1>(sum)).v[0];
  }
};
