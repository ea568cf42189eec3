// Bytes, nibbles and words in vectors of 8 integers and 16 words. bytes_baseline.inl documents the API.

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {_mm256_and_si256(a.v, b.v)};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {_mm256_or_si256(a.v, b.v)};
}
MOECORE_INLINE Ints min(Ints a, Ints b) {
  return {_mm256_min_epi32(a.v, b.v)};
}
MOECORE_INLINE Ints max(Ints a, Ints b) {
  return {_mm256_max_epi32(a.v, b.v)};
}

MOECORE_INLINE __m128i narrow_to_words(Ints a) {
  return _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
}

MOECORE_INLINE Ints load_bytes(const std::uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Ints a) {
  const __m128i words = narrow_to_words(a);
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
  const __m128i pairs = _mm_madd_epi16(narrow_to_words(a), _mm_set1_epi32(1 | 16 << 16));
  const __m128i low = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const std::int32_t packed = _mm_cvtsi128_si32(_mm_shuffle_epi8(pairs, low));
  std::memcpy(p, &packed, sizeof packed);
}

struct Words {
  __m256i v;
};

MOECORE_INLINE Words set_words(int x) {
  return {_mm256_set1_epi16(static_cast<short>(x))};
}
MOECORE_INLINE Words min(Words a, Words b) {
  return {_mm256_min_epu16(a.v, b.v)};
}

// The order of a pair is that of the 128-bit halves: a has elements 0-3 and 8-11, b 4-7 and 12-15, which is
// what unpacking words gives and what packing them again undoes.
MOECORE_INLINE Words load_pair(const BF16* p, Vec& a, Vec& b) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i magnitude = _mm256_and_si256(w, _mm256_set1_epi16(0x7FFF)), zero = _mm256_setzero_si256();
  a.v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, magnitude));
  b.v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, magnitude));
  return {w};
}
MOECORE_INLINE Words load_pair(const F16* p, Vec& a, Vec& b) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_and_si256(w, _mm256_set1_epi16(0x7FFF)), 0xD8);
  a.v = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  b.v = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  return {w};
}
MOECORE_INLINE Words load_pair(const float* p, Vec& a, Vec& b) {
  const __m256 x = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 8), 1);
  const __m256 y = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4)), _mm_loadu_ps(p + 12), 1);
  a = abs(Vec{x});
  b = abs(Vec{y});
  return {_mm256_packs_epi32(_mm256_srai_epi32(_mm256_castps_si256(x), 16),
                             _mm256_srai_epi32(_mm256_castps_si256(y), 16))};
}
MOECORE_INLINE Vec set_pair(const float* f) {
  return set(*f);
}
MOECORE_INLINE Ints sum_words(Ints a, int low, int high) {
  return {_mm256_madd_epi16(a.v, _mm256_set1_epi32(low | high << 16))};
}
MOECORE_INLINE Words pack(Ints a, Ints b) {
  return {_mm256_packus_epi32(a.v, b.v)};
}
MOECORE_INLINE Words with_signs(Words w, Words signs) {
  return {_mm256_or_si256(w.v, _mm256_and_si256(signs.v, _mm256_set1_epi16(-0x8000)))};
}
template <int N>
MOECORE_INLINE Words shift_right(Words a) {
  return {_mm256_srli_epi16(a.v, N)};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Words w, Words v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(_mm256_packus_epi16(w.v, v.v), 0xD8));
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Words w, Words v) {
  // Pairs as even + 16 * odd, and the low bytes of those.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(w.v, v.v), _mm256_set1_epi16(1 | 16 << 8));
  const __m256i bytes = _mm256_packus_epi16(pairs, pairs);
  // Four bytes of w, four of v and both again, in each half.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}
