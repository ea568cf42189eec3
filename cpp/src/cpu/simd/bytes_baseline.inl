// Byte and nibble codes in vectors of integers, and the reference text for the API that every bytes_<isa>.inl
// adds to its vec_<isa>.inl:
//
//   &, |                     of Ints
//   load_bytes, store_bytes  W unsigned bytes, which the lanes hold as 0 .. 255
//   load_nibbles             W nibbles from W / 2 bytes, the even lane in the low half
//   store_nibbles            the inverse, for lanes of 0 .. 15

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
