// Bytes, nibbles and words in vectors of 16 integers and 32 words. bytes_baseline.inl documents the API.

MOECORE_INLINE Ints operator&(Ints a, Ints b) {
  return {_mm512_and_si512(a.v, b.v)};
}
MOECORE_INLINE Ints operator|(Ints a, Ints b) {
  return {_mm512_or_si512(a.v, b.v)};
}
MOECORE_INLINE Ints min(Ints a, Ints b) {
  return {_mm512_min_epi32(a.v, b.v)};
}
MOECORE_INLINE Ints max(Ints a, Ints b) {
  return {_mm512_max_epi32(a.v, b.v)};
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

struct Words {
  __m512i v;
};

MOECORE_INLINE Words set_words(int x) {
  return {_mm512_set1_epi16(static_cast<short>(x))};
}
MOECORE_INLINE Words min(Words a, Words b) {
  return {_mm512_min_epu16(a.v, b.v)};
}

// The order of a pair: of every eight elements a has the first four and b the others, which is what unpacking
// words gives and what packing them again undoes.
MOECORE_INLINE Words load_pair(const BF16* p, Vec& a, Vec& b) {
  const __m512i w = _mm512_loadu_si512(p);
  const __m512i magnitude = _mm512_and_si512(w, _mm512_set1_epi16(0x7FFF)), zero = _mm512_setzero_si512();
  a.v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, magnitude));
  b.v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, magnitude));
  return {w};
}
MOECORE_INLINE Words load_pair(const F16* p, Vec& a, Vec& b) {
  const __m512i w = _mm512_loadu_si512(p);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i halves = _mm512_permutexvar_epi64(order, _mm512_and_si512(w, _mm512_set1_epi16(0x7FFF)));
  a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  return {w};
}
MOECORE_INLINE Words load_pair(const float* p, Vec& a, Vec& b) {
  const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
  const __m512 x = _mm512_shuffle_f32x4(low, high, 0x88), y = _mm512_shuffle_f32x4(low, high, 0xDD);
  a = abs(Vec{x});
  b = abs(Vec{y});
  return {_mm512_packs_epi32(_mm512_srai_epi32(_mm512_castps_si512(x), 16),
                             _mm512_srai_epi32(_mm512_castps_si512(y), 16))};
}
MOECORE_INLINE Vec set_pair(const float* f) {
  return {_mm512_mask_broadcastss_ps(_mm512_set1_ps(f[0]), 0xFF00, _mm_load_ss(f + 1))};
}
MOECORE_INLINE Ints sum_words(Ints a, int low, int high) {
  return {_mm512_madd_epi16(a.v, _mm512_set1_epi32(low | high << 16))};
}
MOECORE_INLINE Words pack(Ints a, Ints b) {
  return {_mm512_packus_epi32(a.v, b.v)};
}
MOECORE_INLINE Words with_signs(Words w, Words signs) {
  constexpr int kOrAnd = 0xF8;  // a | (b & c)
  return {_mm512_ternarylogic_epi32(w.v, signs.v, _mm512_set1_epi16(-0x8000), kOrAnd)};
}
template <int N>
MOECORE_INLINE Words shift_right(Words a) {
  return {_mm512_srli_epi16(a.v, N)};
}
MOECORE_INLINE void store_bytes(std::uint8_t* p, Words w, Words v) {
  _mm512_storeu_si512(
      p, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(w.v, v.v)));
}
MOECORE_INLINE void store_nibbles(std::uint8_t* p, Words w, Words v) {
  // Pairs as even + 16 * odd, and the low bytes of those.
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_packus_epi16(w.v, v.v), _mm512_set1_epi16(1 | 16 << 8));
  const __m512i bytes = _mm512_packus_epi16(pairs, pairs);
  // Four bytes of w, four of v and both again, in each lane.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes)));
}
