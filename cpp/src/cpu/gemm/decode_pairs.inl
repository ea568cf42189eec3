// The product of a block whose weights are codes, for AVX512-BF16 and VBMI: codes become pairs of bf16, in
// which e2m1 and e4m3 are exact, and meet x as such. Scales stay out of it: the sums of a step, in which a
// lane sees one block, are multiplied by them. x is bf16 or codes as well.
//
// A step of 128 columns is four vectors of pairs. Their columns, which x is packed in the order of:
//   e2m1   vector v has columns 4i + v, i = 0 .. 31: nibble v of every word. A lane sees eight neighbours.
//   e4m3   vectors 0 and 1 have columns 16i + (0 .. 7) and 16i + (8 .. 15), i = 0 .. 3, vectors 2 and 3 the
//          same of the second half.
//
// Loops and promises are those of dot.inl: every (row, weight row) has a sum of its own, lanes are added
// after kSumDepth, and no result depends on the number of rows. Codes are decoded again for every group of
// rows: that is 8 instructions beside 5 for each row.

inline constexpr int kStepVectors = 4;

struct ByteTable128 {
  alignas(64) std::uint8_t bytes[128];
};
// Byte `which` (1 is the upper) of the magnitudes of e4m3 in bf16.
constexpr ByteTable128 e4m3_table(int which) {
  ByteTable128 t{};
  for (int i = 0; i < 128; ++i)
    t.bytes[i] = static_cast<std::uint8_t>(
        numeric::bits(numeric::e4m3_to_f32(static_cast<std::uint8_t>(i))) >> (16 + 8 * which));
  return t;
}
inline constexpr ByteTable128 kE4m3Low = e4m3_table(0), kE4m3High = e4m3_table(1);

struct E4m3Tables {
  __m512i lows[2] = {_mm512_load_si512(kE4m3Low.bytes), _mm512_load_si512(kE4m3Low.bytes + 64)};
  __m512i highs[2] = {_mm512_load_si512(kE4m3High.bytes), _mm512_load_si512(kE4m3High.bytes + 64)};

  // Of every byte's magnitude.
  MOECORE_INLINE __m512i low_of(__m512i codes) const {
    return _mm512_permutex2var_epi8(lows[0], codes, lows[1]);
  }
  MOECORE_INLINE __m512i high_of(__m512i codes) const {
    return _mm512_permutex2var_epi8(highs[0], codes, highs[1]);
  }
};

inline constexpr int kOrAnd = 0xF8;  // of a ternary operation: a | (b & c)

struct E4m3Pairs : E4m3Tables {
  static constexpr bool kE2m1 = false;

  MOECORE_INLINE void decode(const std::uint8_t* codes, __m512i (&w)[kStepVectors]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(codes + 64 * half), low = low_of(v);
      const __m512i high = _mm512_ternarylogic_epi32(high_of(v), v, _mm512_set1_epi8(-0x80), kOrAnd);
      w[2 * half] = _mm512_unpacklo_epi8(low, high);
      w[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
    }
  }
  MOECORE_INLINE static void arrange(const __m512i (&in)[kStepVectors], __m512i (&out)[kStepVectors]) {
    for (int v = 0; v < kStepVectors; v += 2) {
      out[v] = _mm512_shuffle_i64x2(in[v], in[v + 1], 0x88);
      out[v + 1] = _mm512_shuffle_i64x2(in[v], in[v + 1], 0xDD);
    }
  }
};

struct E2m1Pairs {
  static constexpr bool kE2m1 = true;

  // An index is the low five bits of a word, of which the fifth belongs to the next nibble.
  static constexpr auto kValues = [] {
    std::array<std::uint16_t, 32> values{};
    for (std::uint8_t i = 0; i < 32; ++i)
      values[i] = static_cast<std::uint16_t>(numeric::bits(numeric::e2m1_to_f32(i & 15)) >> 16);
    return values;
  }();
  __m512i values = _mm512_loadu_si512(kValues.data());

  MOECORE_INLINE void decode(const std::uint8_t* codes, __m512i (&w)[kStepVectors]) const {
    const __m512i v = _mm512_loadu_si512(codes);
    w[0] = _mm512_permutexvar_epi16(v, values);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), values);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), values);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), values);
  }
  MOECORE_INLINE static void arrange(const __m512i (&in)[kStepVectors], __m512i (&out)[kStepVectors]) {
    // Words v, 4 + v, ... of two vectors in the lower half, and of the next two in the upper one.
    alignas(64) static constexpr auto kEvery4th = [] {
      std::array<std::uint16_t, 32> at{};
      for (int i = 0; i < 32; ++i) at[i] = static_cast<std::uint16_t>(4 * (i % 16));
      return at;
    }();
    const __m512i first = _mm512_load_si512(kEvery4th.data());
    for (int v = 0; v < kStepVectors; ++v) {
      const __m512i at = _mm512_add_epi16(first, _mm512_set1_epi16(static_cast<short>(v)));
      out[v] = _mm512_mask_blend_epi32(0xFF00, _mm512_permutex2var_epi16(in[0], at, in[1]),
                                       _mm512_permutex2var_epi16(in[2], at, in[3]));
    }
  }
};

// The scales of a weight row's blocks as lanes of a step: see PairRun.
struct NoScales {
  static constexpr int kBlock = 0;
};

struct Scales128 {  // of any type, read as f32 before
  static constexpr int kBlock = 128;
  MOECORE_INLINE Vec lanes(const float* scale) const { return set(*scale); }
};

// Where byte b of a step's scales goes: in integer d, the bytes from `first` on take byte d / per_byte.
template <int first, int per_byte>
constexpr std::array<std::uint8_t, 64> spread_bytes() {
  std::array<std::uint8_t, 64> at{};
  for (int i = 0; i < 64; ++i) at[i] = static_cast<std::uint8_t>(i % 4 < first ? 0x80 : i / 4 / per_byte);
  return at;
}

struct Scales32 {  // e8m0, as exponents of f32
  static constexpr int kBlock = 32;
  static constexpr auto kSpread = spread_bytes<3, 4>();
  __m512i spread = _mm512_loadu_si512(kSpread.data());

  MOECORE_INLINE Vec lanes(const std::uint8_t* bytes) const {
    std::int32_t four;
    std::memcpy(&four, bytes, sizeof four);
    const __m512i exponent = _mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(four), spread), 1);
    const __m512i at_least = _mm512_max_epi32(exponent, _mm512_set1_epi32(0x00400000));  // byte 0: 2^-127
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(exponent, _mm512_set1_epi32(0x7F000000));
    return as_floats({_mm512_mask_mov_epi32(at_least, nan, _mm512_set1_epi32(0x7FC00000))});
  }
};

struct Scales16 : E4m3Tables {  // e4m3, as the upper halves of f32
  static constexpr int kBlock = 16;
  static constexpr auto kSpread = spread_bytes<2, 2>();
  __m512i spread = _mm512_loadu_si512(kSpread.data());

  MOECORE_INLINE Vec lanes(const std::uint8_t* bytes) const {
    std::int64_t eight;
    std::memcpy(&eight, bytes, sizeof eight);
    const __m512i codes =
        _mm512_shuffle_epi8(_mm512_set1_epi64(eight), spread);  // and zeros, which stay zero
    const __m512i magnitude = _mm512_mask_blend_epi8(0x8888888888888888, low_of(codes), high_of(codes));
    return as_floats(
        {_mm512_ternarylogic_epi32(magnitude, codes, _mm512_castps_si512(_mm512_set1_ps(-0.0f)), kOrAnd)});
  }
};

// Codes and scales of a weight row from column `first` (a multiple of kSumDepth) on, for up to kSumDepth
// columns.
template <class D, class S>
struct PairRun {
  const std::uint8_t* codes;
  const std::uint8_t* scale_bytes;  // S of bytes
  float scale[kSumDepth / 128];     // S of f32
  std::uint8_t last_codes[kDecodeStep], bytes[kSumDepth / 16 + 8];

  void read(const Codes& c, const std::byte* row, const std::byte* scales, std::int64_t first,
            std::int64_t depth) {
    codes = reinterpret_cast<const std::uint8_t*>(row) + (D::kE2m1 ? first / 2 : first);
    if (const std::int64_t left = depth % kDecodeStep; left > 0) {
      const std::int64_t whole = depth - left;
      std::memset(last_codes, 0, sizeof last_codes);
      std::memcpy(last_codes, codes + (D::kE2m1 ? whole / 2 : whole),
                  static_cast<std::size_t>(D::kE2m1 ? left / 2 : left));
    }
    if constexpr (S::kBlock > 0) {
      const std::int64_t block = first / S::kBlock, blocks = (depth + S::kBlock - 1) / S::kBlock;
      if constexpr (S::kBlock == 128) {
        read_scales(c, scales, block, blocks, scale);
      } else {
        const std::byte* from = scales + block * c.col_pitch;
        scale_bytes = reinterpret_cast<const std::uint8_t*>(from);
        if (c.col_pitch == 1 && depth % kDecodeStep == 0) return;
        std::memset(bytes, 0, sizeof bytes);
        for (std::int64_t b = 0; b < blocks; ++b) bytes[b] = static_cast<std::uint8_t>(from[b * c.col_pitch]);
        scale_bytes = bytes;
      }
    }
  }
  MOECORE_INLINE const std::uint8_t* codes_at(std::int64_t k, std::int64_t depth) const {
    return depth - k < kDecodeStep ? last_codes : codes + (D::kE2m1 ? k / 2 : k);
  }
  MOECORE_INLINE Vec scales_at(const S& s, std::int64_t k) const {
    if constexpr (S::kBlock == 128)
      return s.lanes(scale + k / 128);
    else
      return s.lanes(scale_bytes + k / S::kBlock);
  }
};

// Rows of x, arranged: [step][vector][row], and their scales as lanes, [step][row].
struct PairPanel {
  const __m512i* x;
  const Vec* scales;
  int rows;

  PairPanel at(std::int64_t step) const {
    return {x + step * kStepVectors * rows, scales + step * rows, rows};
  }
};

// Columns [column, column + n) of a row of x, arranged; n is a step or what is left of the row.
template <class D>
MOECORE_INLINE void arranged_x(const Product& p, const D& decoder, const std::byte* row, std::int64_t column,
                               std::int64_t n, __m512i (&out)[kStepVectors]) {
  alignas(64) std::uint16_t in_order[kDecodeStep] = {};
  if (p.x_codes) {
    const bool e2m1 = p.x_codes->e2m1;
    const auto* codes = reinterpret_cast<const std::uint8_t*>(row) + (e2m1 ? column / 2 : column);
    if (e2m1 == D::kE2m1) {  // comes out of the decoder as its own weights do
      std::uint8_t padded[kDecodeStep] = {};
      if (n < kDecodeStep) {
        std::memcpy(padded, codes, static_cast<std::size_t>(e2m1 ? n / 2 : n));
        codes = padded;
      }
      return decoder.decode(codes, out);
    }
    const float one = 1;
    kernels().dequantize_decode(DType::kBF16, e2m1, codes, n, kDecodeStep, &one, in_order);
  } else {
    std::memcpy(in_order, row + column * 2, static_cast<std::size_t>(n) * 2);
  }
  __m512i in[kStepVectors];
  for (int v = 0; v < kStepVectors; ++v) in[v] = _mm512_load_si512(in_order + 32 * v);
  D::arrange(in, out);
}

template <class D>
void pack_pairs(const Product& p, int row0, int rows, std::int64_t first, std::int64_t depth, __m512i* x,
                Vec* scales) {
  const D decoder{};
  for (std::int64_t k = 0; k < depth; k += kDecodeStep, x += kStepVectors * rows, scales += rows)
    for (int i = 0; i < rows; ++i) {
      const std::int64_t n = std::min<std::int64_t>(kDecodeStep, depth - k), column = first + k;
      __m512i arranged[kStepVectors];
      arranged_x(p, decoder, p.x[row0 + i], column, n, arranged);
      for (int v = 0; v < kStepVectors; ++v) x[v * rows + i] = arranged[v];
      if (p.x_codes && p.x_codes->block > 0) {
        const int block = p.x_codes->block;
        float of_block[W] = {}, lanes[W];
        read_scales(*p.x_codes, p.x_scales[row0 + i], column / block, (n + block - 1) / block, of_block);
        for (int d = 0; d < W; ++d) lanes[d] = of_block[d * 8 / block];
        scales[i] = load(lanes);
      }
    }
}

template <class D, class S, bool kScaledX, int kRows, int kCols>
void pairs_tile(const D& decoder, const S& scaling, PairPanel x, const PairRun<D, S> (&w)[kCols],
                std::int64_t depth, bool fresh, float* c, int c_pitch, int c_step) {
  Vec sum[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) sum[i][j] = set(0.0f);

  constexpr std::int64_t kAhead = 1024;  // bytes of each row
  for (std::int64_t k = 0; k < depth; k += kDecodeStep, x = x.at(1)) {
    __m512i pairs[kCols][kStepVectors];
    Vec scale[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      const std::uint8_t* codes = w[j].codes_at(k, depth);
      for (int line = 0; line < (D::kE2m1 ? 1 : 2); ++line) __builtin_prefetch(codes + kAhead + 64 * line);
      decoder.decode(codes, pairs[j]);
      if constexpr (S::kBlock > 0) scale[j] = w[j].scales_at(scaling, k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      __m512 part[kCols];
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) part[j] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int v = 0; v < kStepVectors; ++v)
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j)
          part[j] = _mm512_dpbf16_ps(part[j], (__m512bh)x.x[v * kRows + i], (__m512bh)pairs[j][v]);
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) {
        if constexpr (S::kBlock == 0)
          sum[i][j] = sum[i][j] + Vec{part[j]};
        else
          sum[i][j] = fma(Vec{part[j]}, kScaledX ? scale[j] * x.scales[i] : scale[j], sum[i][j]);
      }
    }
  }

#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      float& to = c[i * c_pitch + j * c_step];
      to = (fresh ? 0.0f : to) + Pairs::add_lanes(sum[i][j]);
    }
}

// The packed part of a block's rows against its weight rows.
template <class D, class S, bool kScaledX>
class PairBlock {
 public:
  static constexpr int kRows = 8;

  PairBlock(const Product& p, const __m512i* x, const Vec* scales, std::int64_t start, std::int64_t packed)
      : p_(p), groups_(p.rows, kRows), x_(x), scales_(scales), start_(start), packed_(packed) {}

  void run() const {
    float* c = p_.c;
    for (const WeightRows& run : p_.w) {
      run_rows<kRows>(run, c);
      c += run.rows;
    }
  }

 private:
  // For the number of rows in the largest group. Few rows want several streams of weights at once.
  template <int kMost>
  void run_rows(const WeightRows& run, float* c) const {
    if constexpr (kMost > 1) {
      if (groups_.rows(0) < kMost) return run_rows<kMost - 1>(run, c);
    }
    constexpr int kCols = kMost <= 2 ? 4 : 2;
    const int tiles = run.rows / kCols;
    for (int t = 0; t < tiles; ++t) run_tile<kMost, kCols>(run, t, tiles, c);
    for (int n = tiles * kCols; n < run.rows; ++n) run_tile<kMost, 1>(run, n, 1, c);
  }

  template <int kMost, int kCols>
  void run_tile(const WeightRows& run, int col, int c_step, float* c) const {
    for (std::int64_t first = 0; first == 0 || first < packed_; first += kSumDepth) {
      const std::int64_t depth = std::min(kSumDepth, packed_ - first), column = start_ + first;
      PairRun<D, S> w[kCols];
      for (int j = 0; j < kCols; ++j) {
        const int n = col + j * c_step;
        w[j].read(*p_.w_codes, run.data + n * p_.w_pitch, p_.w_codes->scales_of(run.first + n), column,
                  depth);
      }
      for (int g = 0; g < groups_.count; ++g) {
        const int row = groups_.first(g), rows = groups_.rows(g);
        const std::int64_t steps = whole_steps(packed_) / kDecodeStep;
        const PairPanel from =
            PairPanel{x_ + steps * kStepVectors * row, scales_ + steps * row, rows}.at(first / kDecodeStep);
        float* to = c + row * p_.c_pitch + col;
        constexpr int kFewer = kMost > 1 ? kMost - 1 : 1;
        const auto multiply = rows == kMost ? pairs_tile<D, S, kScaledX, kMost, kCols>
                                            : pairs_tile<D, S, kScaledX, kFewer, kCols>;
        multiply(decoder_, scaling_, from, w, depth, column == 0, to, p_.c_pitch, c_step);
      }
    }
  }

  const Product& p_;
  const Groups groups_;
  const __m512i* x_;
  const Vec* scales_;
  const std::int64_t start_, packed_;
  const D decoder_{};
  const S scaling_{};
};

template <class D, class S, bool kScaledX>
void pairs_product_of(const Product& p) {
  constexpr std::int64_t kPanelVectors = kPanelBytes / 64;
  alignas(64) __m512i x[kPanelVectors];
  alignas(64) Vec scales[kPanelVectors / kStepVectors];
  const std::int64_t panel_depth = kPanelVectors * 32 / (kSumDepth * p.rows) * kSumDepth;
  const Groups groups(p.rows, PairBlock<D, S, kScaledX>::kRows);
  for (std::int64_t start = 0; start == 0 || start < p.depth; start += panel_depth) {
    const std::int64_t packed = std::min(panel_depth, p.depth - start),
                       steps = whole_steps(packed) / kDecodeStep;
    for (int g = 0; g < groups.count; ++g)
      pack_pairs<D>(p, groups.first(g), groups.rows(g), start, packed,
                    x + steps * kStepVectors * groups.first(g), scales + steps * groups.first(g));
    PairBlock<D, S, kScaledX>(p, x, scales, start, packed).run();
  }
}

// x is bf16 or codes.
void pairs_product(const Product& p) {
  const bool scaled_x = p.x_codes && p.x_codes->block > 0;
  if (p.w_codes->block == 0) return pairs_product_of<E4m3Pairs, NoScales, false>(p);
  if (p.w_codes->block == 128)
    return scaled_x ? pairs_product_of<E4m3Pairs, Scales128, true>(p)
                    : pairs_product_of<E4m3Pairs, Scales128, false>(p);
  if (p.w_codes->block == 32)
    return scaled_x ? pairs_product_of<E2m1Pairs, Scales32, true>(p)
                    : pairs_product_of<E2m1Pairs, Scales32, false>(p);
  return scaled_x ? pairs_product_of<E2m1Pairs, Scales16, true>(p)
                  : pairs_product_of<E2m1Pairs, Scales16, false>(p);
}
