// The product of one block in dot-product form: the weights stay where they are, dense along K, and a vector
// accumulator per (row, weight row) runs down K; its lanes are added up at the end.
//
// x is read once per block into a panel, in the order in which the tiles take it: for every step of K the
// vectors of a tile's rows, one after the other, padded with zeros to a whole step. A tile is up to kRows
// rows by kCols weight rows. Every (row, weight row) has an accumulator of its own that meets its operands in
// the same order in every tile shape, so the bits of a result depend on its two rows alone, not on how many
// rows the expert has or on the number of threads.
//
// Loops: depth that fits the panel > tiles of weight rows > kSumDepth > groups of rows. A weight tile (3 x 2
// KiB of bf16) stays in L1 while the panel streams past it from L2; meanwhile the first of these passes
// prefetches the next weight tile, so that reading weights from DRAM hides behind the arithmetic. It goes to
// L2: beside this tile and the panel L1 has no room for it (a Zen 4 core reads 29 GB/s so, 24 with L1 as the
// aim).
//
// A policy P brings the element types and the arithmetic:
//   Operand (a vector of elements), Sum (a vector of f32)
//   kStep: elements in an operand; kXBytes, kWBytes: bytes of one element
//   x(p), w(p): the operand at p; zero(); multiply_add(x, w, sum); add_lanes(sum)
//   kRows, cols(rows): the shapes of tiles whose sums stay in registers
//   kDecodes: weights are codes, and w reads what decode.inl makes of a tile's; x may be codes as well

inline constexpr std::int64_t kPanelBytes = 128 * 1024;  // kBlockRows x kSumDepth of f32

// panel[step * rows + i] = operand of row row0 + i.
template <class P>
void pack_rows(const Product& p, int row0, int rows, std::int64_t first, std::int64_t depth,
               typename P::Operand* panel) {
  const std::int64_t steps = depth / P::kStep, rest = depth % P::kStep;
  for (int i = 0; i < rows; ++i) {
    const std::byte* from = p.x[row0 + i] + first * P::kXBytes;
    typename P::Operand* to = panel + i;
    for (std::int64_t s = 0; s < steps; ++s, from += P::kStep * P::kXBytes, to += rows) *to = P::x(from);
    if (rest > 0) {
      std::byte padded[P::kStep * P::kXBytes] = {};
      std::memcpy(padded, from, static_cast<std::size_t>(rest * P::kXBytes));
      *to = P::x(padded);
    }
  }
}

// The same where the weights are codes: in the order in which they are decoded, up to a whole step of it.
template <class P>
void pack_arranged(const Product& p, int row0, int rows, std::int64_t first, std::int64_t depth, Vec* panel) {
  const auto arrange_step = p.w_codes->e2m1 ? arrange<true> : arrange<false>;
  for (int i = 0; i < rows; ++i) {
    Vec* to = panel + i;
    for (std::int64_t k = 0; k < depth; k += kDecodedDepth) {
      alignas(64) float in_order[kDecodedDepth], arranged[kDecodeStep];
      const std::int64_t n = std::min(kDecodedDepth, depth - k), whole = whole_steps(n);
      if (p.x_codes)
        decode_in_order(*p.x_codes, p.x[row0 + i], p.x_scales[row0 + i], first + k, n, in_order);
      else
        widen(reinterpret_cast<const typename P::X*>(p.x[row0 + i]) + first + k, in_order, n);
      std::fill(in_order + n, in_order + whole, 0.0f);
      for (std::int64_t step = 0; step < whole; step += kDecodeStep) {
        arrange_step(in_order + step, arranged);
        for (int v = 0; v < kDecodeStep; v += W, to += rows) *to = load(arranged + v);
      }
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

// Weight rows and result columns of a tile.
struct Tile {
  const std::byte* w;
  std::int64_t w_pitch;  // from one of its weight rows to the next
  std::int64_t next;     // from a weight row to that of the next tile
  int c_step;            // from one of its columns to the next
};

// c[i, j] = or, when not `fresh`, += the dot products of the panel at x with the tile's weight rows.
template <class P, int kRows, int kCols, bool kPrefetch>
void dot_tile(const typename P::Operand* x, const Tile& tile, std::int64_t depth, bool fresh, float* c,
              int c_pitch) {
  typename P::Sum sum[kRows][kCols];
  const std::byte* wp[kCols];
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    wp[j] = tile.w + j * tile.w_pitch;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i][j] = P::zero();
  }

  constexpr std::int64_t kStepBytes = P::kStep * P::kWBytes;
  const std::int64_t whole = depth / P::kStep * kStepBytes;
  std::int64_t at = 0;
  if constexpr (kPrefetch) {  // by lines of 64 bytes
    for (; at + 64 <= whole; at += 64) {
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) __builtin_prefetch(wp[j] + at + tile.next, 0, 2);
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
      float& to = c[i * c_pitch + j * tile.c_step];
      to = (fresh ? 0.0f : to) + P::add_lanes(sum[i][j]);
    }
}

// How the rows of a block are divided into tiles: as evenly as they go, so that no tile is left with a row or
// two whose chains of additions are too few to fill the pipeline.
struct Groups {
  int count, size, larger;  // the first `larger` groups have size + 1 rows

  Groups(int rows, int most) : count((rows + most - 1) / most), size(rows / count), larger(rows % count) {}
  int rows(int group) const { return size + (group < larger ? 1 : 0); }
  int first(int group) const { return group * size + (group < larger ? group : larger); }
};

// A panel: the groups of x one after the other, each with `steps` steps.
template <class P>
struct Panel {
  const typename P::Operand* data;
  std::int64_t steps;
  Groups groups;
};

// Part of a panel, `depth` elements from step `step` on, against one tile. The largest group has kRows rows.
template <class P, int kRows, int kCols>
void dot_groups(const Panel<P>& x, std::int64_t step, const Tile& tile, std::int64_t depth, bool fresh,
                float* c, int c_pitch) {
  const Groups& g = x.groups;
  for (int group = 0; group < g.count; ++group) {
    const int first = g.first(group), rows = g.rows(group);
    const typename P::Operand* from = x.data + x.steps * first + step * rows;
    float* to = c + first * c_pitch;
    if (rows < kRows)
      dot_tile<P, (kRows > 1 ? kRows - 1 : 1), kCols, false>(from, tile, depth, fresh, to, c_pitch);
    else if (group > 0)
      dot_tile<P, kRows, kCols, false>(from, tile, depth, fresh, to, c_pitch);
    else
      dot_tile<P, kRows, kCols, !P::kDecodes>(from, tile, depth, fresh, to, c_pitch);
  }
}

// The panel against a run of weight rows. The rows of a tile stand a kCols-th of the run apart, so that the
// tiles walk down kCols streams of consecutive addresses, which is how the hardware's prefetchers are
// fastest.
template <class P, int kRows>
void dot_run(const Product& p, const Panel<P>& x, const WeightRows& run, std::int64_t start,
             std::int64_t packed, float* c) {
  constexpr int kCols = P::cols(kRows);
  const int tiles = run.rows / kCols;
  for (int t = 0; t < tiles + run.rows % kCols; ++t) {
    const bool full = t < tiles;
    const int col = full ? t : kCols * tiles + (t - tiles);
    for (std::int64_t first = 0; first == 0 || first < packed; first += kSumDepth) {
      const Tile tile{run.data + col * p.w_pitch + (start + first) * P::kWBytes, tiles * p.w_pitch, p.w_pitch,
                      tiles};
      const auto multiply = full ? dot_groups<P, kRows, kCols> : dot_groups<P, kRows, 1>;
      multiply(x, first / P::kStep, tile, std::min(kSumDepth, packed - first), start + first == 0, c + col,
               p.c_pitch);
    }
  }
}

// Codes that one group of rows meets straight from the registers they are decoded in. The same sums in the
// same order as dot_tile on what decode_run stores.
template <class P, bool e2m1, Scaling scaling, int kRows, int kCols>
void decoding_tile(const Vec* x, const CodeRun (&w)[kCols], const ScaleLanes& lanes, std::int64_t depth,
                   bool fresh, float* c, int c_pitch, int c_step) {
  Vec sum[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) sum[i][j] = P::zero();

  // The columns take turns part by part, so that their chains of additions overlap.
  constexpr std::int64_t kAhead = 1024;  // bytes of each row
  const std::uint8_t* codes[kCols];
  std::uint8_t padded[kCols][kDecodeStep];
  for (std::int64_t k = 0; k < depth; k += kDecodeStep, x += kDecodeStep / W * kRows) {
    Scales scales[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      codes[j] = w[j].codes + (e2m1 ? k / 2 : k);
      __builtin_prefetch(codes[j] + kAhead);
      scales[j] = lanes.template at<scaling>(w[j].scale, w[j].scale_bytes, k);
    }
    if (const std::int64_t left = depth - k; left < kDecodeStep)
      for (int j = 0; j < kCols; ++j) {
        std::memset(padded[j], 0, sizeof padded[j]);
        std::memcpy(padded[j], codes[j], static_cast<std::size_t>(e2m1 ? left / 2 : left));
        codes[j] = padded[j];
      }
    for_parts([&](auto part) MOECORE_INLINE_LAMBDA {
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j)
        decode_part<e2m1, scaling, part()>(codes[j], scales[j], [&](int v, Vec wv) MOECORE_INLINE_LAMBDA {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) sum[i][j] = P::multiply_add(x[v * kRows + i], wv, sum[i][j]);
        });
    });
  }

#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      float& to = c[i * c_pitch + j * c_step];
      to = (fresh ? 0.0f : to) + P::add_lanes(sum[i][j]);
    }
}

// dot_run for weights that are codes. One group of few rows decodes as it multiplies; otherwise a tile is
// decoded once, into L1, for all groups.
template <class P, bool e2m1, Scaling scaling, int kRows, int kCols>
void decoding_tile_run(const Product& p, const Panel<P>& x, const WeightRows& run, int col, int c_step,
                       std::int64_t start, std::int64_t packed, float* c) {
  const ScaleLanes lanes(p.w_codes->block);
  for (std::int64_t first = 0; first == 0 || first < packed; first += kDecodedDepth) {
    const std::int64_t depth = std::min(kDecodedDepth, packed - first);
    const bool fresh = start + first == 0;
    CodeRun codes[kCols];
    for (int j = 0; j < kCols; ++j) {
      const int n = col + j * c_step;
      codes[j].template read<scaling>(*p.w_codes, run.data + n * p.w_pitch,
                                      p.w_codes->scales_of(run.first + n), start + first, depth);
    }
    if (x.groups.count == 1 && kRows <= P::kDecodingRows) {
      decoding_tile<P, e2m1, scaling, kRows>(x.data + first / W * kRows, codes, lanes, depth, fresh, c + col,
                                             p.c_pitch, c_step);
    } else {
      alignas(64) float decoded[kCols][kDecodedDepth];
      for (int j = 0; j < kCols; ++j) decode_run<e2m1, scaling>(codes[j], lanes, depth, decoded[j]);
      const Tile tile{reinterpret_cast<const std::byte*>(decoded), sizeof decoded[0], 0, c_step};
      dot_groups<P, kRows, kCols>(x, first / P::kStep, tile, whole_steps(depth), fresh, c + col, p.c_pitch);
    }
  }
}

template <class P, bool e2m1, Scaling scaling, int kRows>
void decoding_run(const Product& p, const Panel<P>& x, const WeightRows& run, std::int64_t start,
                  std::int64_t packed, float* c) {
  constexpr int kCols = P::cols(kRows);
  const int tiles = run.rows / kCols;
  for (int t = 0; t < tiles; ++t)
    decoding_tile_run<P, e2m1, scaling, kRows, kCols>(p, x, run, t, tiles, start, packed, c);
  for (int n = tiles * kCols; n < run.rows; ++n)
    decoding_tile_run<P, e2m1, scaling, kRows, 1>(p, x, run, n, 1, start, packed, c);
}

template <class P, int kRows>
void dot_any_run(const Product& p, const Panel<P>& x, const WeightRows& run, std::int64_t start,
                 std::int64_t packed, float* c) {
  if constexpr (!P::kDecodes)
    dot_run<P, kRows>(p, x, run, start, packed, c);
  else if (!p.w_codes->e2m1 && p.w_codes->block == 0)
    decoding_run<P, false, Scaling::kNone, kRows>(p, x, run, start, packed, c);
  else if (!p.w_codes->e2m1)
    decoding_run<P, false, Scaling::kProduct, kRows>(p, x, run, start, packed, c);
  else if constexpr (!kHasTables)
    decoding_run<P, true, Scaling::kProduct, kRows>(p, x, run, start, packed, c);
  else if (p.w_codes->block == 32)
    decoding_run<P, true, Scaling::kTable32, kRows>(p, x, run, start, packed, c);
  else
    decoding_run<P, true, Scaling::kTable16, kRows>(p, x, run, start, packed, c);
}

// The same for the number of rows in the largest group, a switch unrolled.
template <class P, int kRows>
void dot_run_for(int rows, const Product& p, const Panel<P>& x, const WeightRows& run, std::int64_t start,
                 std::int64_t packed, float* c) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_run_for<P, kRows - 1>(rows, p, x, run, start, packed, c);
  }
  dot_any_run<P, kRows>(p, x, run, start, packed, c);
}

template <class P>
void dot_product(const Product& p) {
  using Operand = typename P::Operand;
  alignas(64) Operand data[kPanelBytes / sizeof(Operand)];
  constexpr std::int64_t kRowBytes = kSumDepth / P::kStep * sizeof(Operand);
  const std::int64_t panel_depth = kPanelBytes / (kRowBytes * p.rows) * kSumDepth;
  const Groups groups(p.rows, P::kRows);
  for (std::int64_t start = 0; start == 0 || start < p.depth; start += panel_depth) {
    const std::int64_t packed = std::min(panel_depth, p.depth - start);
    const std::int64_t padded = P::kDecodes ? whole_steps(packed) : packed;
    const Panel<P> panel{data, (padded + P::kStep - 1) / P::kStep, groups};
    for (int g = 0; g < groups.count; ++g) {
      Operand* to = data + panel.steps * groups.first(g);
      if constexpr (P::kDecodes)
        pack_arranged<P>(p, groups.first(g), groups.rows(g), start, packed, to);
      else
        pack_rows<P>(p, groups.first(g), groups.rows(g), start, packed, to);
    }
    float* c = p.c;
    for (const WeightRows& run : p.w) {
      dot_run_for<P, P::kRows>(groups.rows(0), p, panel, run, start, packed, c);
      c += run.rows;
    }
  }
}

// The policy for float, F16 and BF16: widened to f32 vectors while they are read.
template <class T, int kTileRows>
struct Widened {
  using Operand = Vec;
  using Sum = Vec;
  static constexpr int kStep = W, kXBytes = sizeof(T), kWBytes = sizeof(T), kRows = kTileRows;
  static constexpr bool kDecodes = false;
  static constexpr int cols(int rows) { return tile_cols(rows); }
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

// The policy for codes as weights: they have become f32 when the tiles read them.
template <class T, int kTileRows>
struct Decoded : Widened<T, kTileRows> {
  using X = T;
  static constexpr int kWBytes = sizeof(float);
  static constexpr bool kDecodes = true;
  static constexpr int kDecodingRows = 2;  // more rows want the registers for their sums
  static Vec w(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
};
