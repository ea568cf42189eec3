// Byte and nibble codes in vectors of 8 integers. bytes_baseline.inl documents the API.

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {_mm256_and_si256(a.v, b.v)};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {_mm256_or_si256(a.v, b.v)};
}

MOECORE_INLINE __m128i narrow_to_u16(Ints a) {
  return _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
}

MOECORE_INLINE Ints load_bytes(const std::uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Ints a) {
  const __m128i words = narrow_to_u16(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
MOECORE_INLINE Ints load_nibbles(const std::uint8_t* p) {
  std::int32_t packed;
  std::memcpy(&packed, p, sizeof packed);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return {_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(packed), shifts), _mm256_set1_epi32(15))};
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Ints a) {
  // Pairs as even + 16 * odd, then the low byte of each of the four sums.
  const __m128i pairs = _mm_madd_epi16(narrow_to_u16(a), _mm_set1_epi32(1 | 16 << 16));
  const __m128i low = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const std::int32_t packed = _mm_cvtsi128_si32(_mm_shuffle_epi8(pairs, low));
  std::memcpy(p, &packed, sizeof packed);
}
