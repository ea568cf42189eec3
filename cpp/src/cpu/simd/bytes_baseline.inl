// Bytes, nibbles and 16-bit words in vectors, and the reference text for the API that every bytes_<isa>.inl
// adds to its vec_<isa>.inl:
//
//   &, |                     of Ints
//   load_bytes, store_bytes  W unsigned bytes, which the lanes hold as 0 .. 255
//   load_nibbles             W nibbles from W / 2 bytes, the even lane in the low half
//   store_nibbles            the inverse, for lanes of 0 .. 15
//
//   Words                    2 * W words of 16 bits, in memory order; &, |, -, shift_right<N> (logical)
//   load_pair                2 * W elements: their magnitudes as two vectors, in whatever order of lanes
//   pack()
//                            undoes, and words with their signs in the highest bits
//   set_pair                 the factor of every element of a pair in blocks of 16: *f, or where a pair is
//   two
//                            blocks, f[0] and f[1]
//   pack                     two vectors of integers below 2^16 to words, undoing load_pair's order
//   store_bytes(p, w, v)     the low bytes of 4 * W words
//   store_nibbles(p, w, v)   the low nibbles of 4 * W words, two to the byte
//   max_magnitude            the largest of 16 * n words without their highest bits

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {a.v & b.v};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {a.v | b.v};
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
MOECORE_INLINE Words operator&(Words a, Words b) {
  return {a.v & b.v};
}
MOECORE_INLINE Words operator|(Words a, Words b) {
  return {a.v | b.v};
}
MOECORE_INLINE Words operator-(Words a, Words b) {
  return {a.v - b.v};
}
template <int N>
MOECORE_INLINE Words shift_right(Words a) {
  return {a.v >> N};
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
MOECORE_INLINE Words pack(Ints a, Ints b) {
  Words w;
  for (int i = 0; i < W; ++i) {
    w.v[i] = static_cast<std::uint16_t>(a.v[i]);
    w.v[W + i] = static_cast<std::uint16_t>(b.v[i]);
  }
  return w;
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
