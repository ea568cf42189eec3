// Decoding by table, inside the 128-bit lanes of a vector of bytes.
//
// The upper half of an f32 holds every value of e2m1 and e4m3. Its two bytes are looked up for all bytes of a
// vector at once, then zipped into words; the words at even places become floats by a shift, those at odd
// places by a mask. What comes out lies in this order, with D = 0 .. 3 and a lane's first element in front:
//   e2m1, of 32 elements a lane: 16h + 4D + (0, 2) for h = 0, 1; then 16h + 4D + (1, 3)
//   e4m3, of 16 elements a lane: 8h + 2D + (0, 1) for h = 0, 1; then the same of the second half of the step
//
// e4m3 is s eeee mmm = (s eee)(e mmm), two nibbles. Its exponent's bias is 7, f32's 127, and 120 is even: so
// the first byte depends on (s eee) alone, the second on (e mmm) alone, except where eee is 0: there the
// value is (e mmm) * 2^-9, in subnormals as in the binade above them. Lookups that do not apply give 0
// through the index's highest bit, and what is looked up is combined by OR.
//
// Over a file's Bytes: bytes_at, table, lane_tables, all_bytes, &, |, ^, +, equal, lookup, high_nibbles,
// interleave_low and _high, low_words, high_words; and load_lanes, transpose_lanes, even_and_odd.

inline constexpr int kDecodeStep = 8 * W, kDecodeParts = 4;

struct ByteTable {
  alignas(16) std::uint8_t bytes[16];
};

// Byte `which` (1 is the upper) of the upper half of an f32, for 16 values.
template <class F>
constexpr ByteTable half_table(int which, F value) {
  ByteTable t{};
  for (std::uint8_t i = 0; i < 16; ++i)
    t.bytes[i] = static_cast<std::uint8_t>(numeric::bits(value(i)) >> (16 + 8 * which));
  return t;
}
constexpr float small_e4m3(std::uint8_t n) {
  return static_cast<float>(n) * 0x1p-9f;
}
inline constexpr ByteTable kSmallLow = half_table(0, small_e4m3);
inline constexpr ByteTable kSmallHigh = half_table(1, small_e4m3);
// (s eee): the sign and half of eeee + 120; only the sign where eee is 0.
inline constexpr ByteTable kNormalHigh = [] {
  ByteTable t{};
  for (int i = 0; i < 16; ++i)
    t.bytes[i] = static_cast<std::uint8_t>((i & 8) << 4 | (i & 7 ? (i & 7) + 60 : 0));
  return t;
}();
// (e mmm): the last bit of the exponent and the mantissa.
inline constexpr ByteTable kNormalLow = [] {
  ByteTable t{};
  for (int i = 0; i < 16; ++i) t.bytes[i] = static_cast<std::uint8_t>(i << 4);
  return t;
}();

// The upper halves of every e2m1 times every scale, which hold the products: e8m0 is a power of two and e4m3
// has four bits.
struct ScaledTables {
  struct {
    ByteTable low, high;
  } of[256];

  explicit ScaledTables(float (*scale)(std::uint8_t)) {
    for (int s = 0; s < 256; ++s) {
      auto product = [&](std::uint8_t code) {
        return numeric::e2m1_to_f32(code) * scale(static_cast<std::uint8_t>(s));
      };
      of[s] = {half_table(0, product), half_table(1, product)};
    }
  }
};
inline const ScaledTables& tables_of(int block) {
  static const ScaledTables e8m0(numeric::e8m0_to_f32), e4m3(numeric::e4m3_to_f32);
  return block == 16 ? e4m3 : e8m0;
}
inline constexpr bool kHasTables = true;

// A step of e4m3 lies in one block. One of e2m1 has a table for every lane of 32 columns and, where blocks
// are half a lane, for every half of one.
struct Scales {
  Vec factor;
  Bytes low[2], high[2];
};
struct ScaleLanes {
  int shift;  // from a column to its block; no block: to 0
  const ScaledTables& tables;

  explicit ScaleLanes(int block)
      : shift(block ? __builtin_ctz(static_cast<unsigned>(block)) : 62), tables(tables_of(block)) {}

  template <Scaling scaling>
  MOECORE_INLINE Scales at(const float* scale, const std::uint8_t* bytes, std::int64_t k) const {
    Scales s;
    if constexpr (scaling == Scaling::kProduct) s.factor = set(scale[k >> shift]);
    if constexpr (scaling == Scaling::kTable32 || scaling == Scaling::kTable16) {
      constexpr int kHalves = scaling == Scaling::kTable16 ? 2 : 1;
      const std::uint8_t* index = bytes + (k >> shift);
      for (int h = 0; h < 2; ++h) {
        s.low[h] = lane_tables(tables.of[0].low.bytes, index + h % kHalves, kHalves);
        s.high[h] = lane_tables(tables.of[0].high.bytes, index + h % kHalves, kHalves);
      }
    }
    return s;
  }
};

// Part i = 0 .. 3 of a step as words: two vectors of floats.
template <bool e2m1, int i>
MOECORE_INLINE Bytes decode_words(const std::uint8_t* codes, const Scales& scales) {
  Bytes low, high;
  if constexpr (e2m1) {
    const Bytes v = bytes_at(codes), nibbles = i < 2 ? v & all_bytes(15) : high_nibbles(v);
    low = lookup(scales.low[i % 2], nibbles);
    high = lookup(scales.high[i % 2], nibbles);
  } else {
    const Bytes v = bytes_at(codes + i / 2 * 4 * W), magnitude = v & all_bytes(0x7F);
    // Its low nibble is (e mmm), its highest bit whether eee is not 0.
    const Bytes normal = magnitude + all_bytes(0x70), small = normal ^ all_bytes(-0x80);
    const Bytes nan = equal(magnitude, all_bytes(0x7F));
    high = lookup(table(kNormalHigh.bytes), high_nibbles(v)) | lookup(table(kSmallHigh.bytes), normal) | nan;
    low = lookup(table(kNormalLow.bytes), small) | lookup(table(kSmallLow.bytes), normal);
  }
  return i % 2 == 0 ? interleave_low(low, high) : interleave_high(low, high);
}

template <bool e2m1, Scaling scaling, int i, class Sink>
MOECORE_INLINE void decode_part(const std::uint8_t* codes, const Scales& scales, Sink sink) {
  const Bytes words = decode_words<e2m1, i>(codes, scales);
  Vec even = low_words(words), odd = high_words(words);
  if constexpr (scaling == Scaling::kProduct) {
    even = even * scales.factor;
    odd = odd * scales.factor;
  }
  sink(2 * i, even);
  sink(2 * i + 1, odd);
}

template <bool e2m1>
MOECORE_INLINE void arrange(const float* in, float* out) {
  if constexpr (e2m1) {
    for (int h = 0; h < 2; ++h) {
      Vec v[4];
      for (int q = 0; q < 4; ++q) v[q] = load_lanes(in + 16 * h + 4 * q, 32);
      transpose_lanes(v);
      for (int q = 0; q < 4; ++q) store(out + (2 * h + q / 2 + q % 2 * 4) * W, v[q]);
    }
  } else {
    for (int part = 0; part < 2; ++part)
      for (int h = 0; h < 2; ++h) {
        const float* from = in + part * 4 * W + 8 * h;
        Vec even, odd;
        even_and_odd(load_lanes(from, 16), load_lanes(from + 4, 16), even, odd);
        store(out + (4 * part + 2 * h) * W, even);
        store(out + (4 * part + 2 * h + 1) * W, odd);
      }
  }
}
