// Bytes, nibbles and 16-bit words in vectors, and the reference text for the API that every bytes_<isa>.inl
// adds to its vec_<isa>.inl:
//
//   &, |, min, max           of Ints
//   load_bytes, store_bytes  W unsigned bytes, which the lanes hold as 0 .. 255
//   load_nibbles             W nibbles from W / 2 bytes, the even lane in the low half
//   store_nibbles            the inverse, for lanes of 0 .. 15
//
//   Words                    2 * W words of 16 bits, in memory order; min of unsigned ones
//   load_pair                2 * W elements: their magnitudes as two vectors, in an order of lanes that
//                            pack() undoes, and words with their signs in the highest bits
//   set_pair                 the factor of every element of a pair in blocks of 16: *f, or, where a
//                            pair is two blocks, f[0] and f[1]
//   sum_words(a, l, h)       l times the low word of every integer plus h times the high one, both signed
//   pack                     two vectors of integers from 0 on to words, saturating
//   with_signs(w, s)         w, whose highest bits are 0, with those of s
//   shift_right<N>           of words, logical
//   store_bytes(p, w, v)     4 * W words, which are below 256
//   store_nibbles(p, w, v)   4 * W words, which are below 16, two to the byte
//   max_magnitude            the largest of 16 * n words without their highest bits
//   block_maxima             the same of `blocks` blocks, of 16 * n words each

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {a.v & b.v};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {a.v | b.v};
}

MOECORE_INLINE Ints min(Ints a, Ints b) {
  const RawInts less = a.v < b.v;
  return {(a.v & less) | (b.v & ~less)};
}
MOECORE_INLINE Ints max(Ints a, Ints b) {
  const RawInts more = a.v > b.v;
  return {(a.v & more) | (b.v & ~more)};
}

MOECORE_INLINE Ints load_bytes(const std::uint8_t* p) {
  return {RawInts{p[0], p[1], p[2], p[3]}};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Ints a) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}
MOECORE_INLINE Ints load_nibbles(const std::uint8_t* p) {
  return {RawInts{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}};
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Ints a) {
  for (int i = 0; i < W; i += 2) p[i / 2] = static_cast<std::uint8_t>(a.v[i] | a.v[i + 1] << 4);
}

typedef std::uint16_t RawWords __attribute__((vector_size(16)));
struct Words {
  RawWords v;
};

MOECORE_INLINE Words set_words(int x) {
  return {RawWords{} + static_cast<std::uint16_t>(x)};
}
MOECORE_INLINE Words min(Words a, Words b) {
  return {a.v < b.v ? a.v : b.v};
}

template <class T>
MOECORE_INLINE Words load_pair(const T* p, Vec& a, Vec& b) {
  a = abs(load(p));
  b = abs(load(p + W));
  Words high;
  for (int i = 0; i < 2 * W; ++i) {
    if constexpr (sizeof(T) == 2)
      high.v[i] = p[i].bits;
    else
      high.v[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(p[i]) >> 16);
  }
  return high;
}
MOECORE_INLINE Vec set_pair(const float* f) {
  return set(*f);
}
MOECORE_INLINE Ints sum_words(Ints a, int low, int high) {
  for (int i = 0; i < W; ++i) a.v[i] = static_cast<std::int16_t>(a.v[i]) * low + (a.v[i] >> 16) * high;
  return a;
}
MOECORE_INLINE Words pack(Ints a, Ints b) {
  Words w;
  for (int i = 0; i < W; ++i) {
    w.v[i] = static_cast<std::uint16_t>(a.v[i] > 0xFFFF ? 0xFFFF : a.v[i]);
    w.v[W + i] = static_cast<std::uint16_t>(b.v[i] > 0xFFFF ? 0xFFFF : b.v[i]);
  }
  return w;
}
MOECORE_INLINE Words with_signs(Words w, Words signs) {
  return {w.v | (signs.v & set_words(0x8000).v)};
}
template <int N>
MOECORE_INLINE Words shift_right(Words a) {
  return {a.v >> N};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Words w, Words v) {
  for (int i = 0; i < 2 * W; ++i) {
    p[i] = static_cast<std::uint8_t>(w.v[i]);
    p[2 * W + i] = static_cast<std::uint8_t>(v.v[i]);
  }
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Words w, Words v) {
  for (int i = 0; i < W; ++i) {
    p[i] = static_cast<std::uint8_t>(w.v[2 * i] | w.v[2 * i + 1] << 4);
    p[W + i] = static_cast<std::uint8_t>(v.v[2 * i] | v.v[2 * i + 1] << 4);
  }
}

MOECORE_INLINE std::uint16_t max_magnitude(const std::uint16_t* p, std::int64_t n) {
  RawWords most{};
  for (std::int64_t i = 0; i < 2 * n; ++i) {
    RawWords x;
    std::memcpy(&x, p + 8 * i, sizeof x);
    x &= 0x7FFF;
    most = x > most ? x : most;
  }
  std::uint16_t largest = 0;
  for (int i = 0; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}
MOECORE_INLINE void block_maxima(const std::uint16_t* p, std::int64_t blocks, std::int64_t n,
                                 std::uint16_t* out) {
  for (std::int64_t b = 0; b < blocks; ++b) out[b] = max_magnitude(p + 16 * n * b, n);
}
