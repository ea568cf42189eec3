// Byte and nibble codes in vectors of 16 integers. bytes_baseline.inl documents the API.

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {_mm512_and_si512(a.v, b.v)};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {_mm512_or_si512(a.v, b.v)};
}

MOECORE_INLINE Ints load_bytes(const std::uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
MOECORE_INLINE Ints load_nibbles(const std::uint8_t* p) {
  std::int64_t packed;
  std::memcpy(&packed, p, sizeof packed);
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i halves = _mm512_inserti64x4(_mm512_set1_epi32(static_cast<std::int32_t>(packed)),
                                            _mm256_set1_epi32(static_cast<std::int32_t>(packed >> 32)), 1);
  return {_mm512_and_si512(_mm512_srlv_epi32(halves, shifts), _mm512_set1_epi32(15))};
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Ints a) {
  // Pairs as even + 16 * odd, then the low byte of each of the eight sums.
  const __m256i pairs = _mm256_madd_epi16(_mm512_cvtepi32_epi16(a.v), _mm256_set1_epi32(1 | 16 << 16));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(pairs));
}
