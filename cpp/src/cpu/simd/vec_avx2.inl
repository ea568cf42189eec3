// Vectors of 8 floats: AVX2, FMA, F16C. vec_baseline.inl documents the API.

inline constexpr int W = 8;

struct Vec {
  __m256 v;
};
struct Ints {
  __m256i v;
};
struct Mask {
  __m256 v;  // all zeros or all ones a lane
};

MOECORE_INLINE Vec set(float x) {
  return {_mm256_set1_ps(x)};
}
MOECORE_INLINE Ints set_int(std::int32_t x) {
  return {_mm256_set1_epi32(x)};
}

MOECORE_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
MOECORE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
MOECORE_INLINE Vec add_product(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

MOECORE_INLINE Mask operator<(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
MOECORE_INLINE Mask operator>(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)};
}
MOECORE_INLINE Mask operator>=(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)};
}
MOECORE_INLINE Mask operator&(Mask a, Mask b) {
  return {_mm256_and_ps(a.v, b.v)};
}
MOECORE_INLINE unsigned bits_of(Mask m) {
  return static_cast<unsigned>(_mm256_movemask_ps(m.v));
}

MOECORE_INLINE Ints as_ints(Vec a) {
  return {_mm256_castps_si256(a.v)};
}
MOECORE_INLINE Vec as_floats(Ints a) {
  return {_mm256_castsi256_ps(a.v)};
}
MOECORE_INLINE Ints operator+(Ints a, Ints b) {
  return {_mm256_add_epi32(a.v, b.v)};
}
MOECORE_INLINE Ints operator-(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.v, b.v)};
}
template <int N>
MOECORE_INLINE Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
MOECORE_INLINE Ints shift_right(Ints a) {
  return {_mm256_srai_epi32(a.v, N)};
}

MOECORE_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, m.v)};
}
MOECORE_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
MOECORE_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
MOECORE_INLINE Vec abs(Vec a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}

template <int S>
MOECORE_INLINE Vec swap_lanes(Vec a) {
  if constexpr (S == 4)
    return {_mm256_permute2f128_ps(a.v, a.v, 1)};
  else
    return {_mm256_permute_ps(a.v, S | (1 ^ S) << 2 | (2 ^ S) << 4 | (3 ^ S) << 6)};
}
MOECORE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  // In 128-bit halves: a0 a1 b0 b1 -> a0 b0 | a1 b1, put in order by moving 64-bit pairs.
  const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
  even.v = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8));
  odd.v = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8));
}

MOECORE_INLINE Vec load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
MOECORE_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v);
}
MOECORE_INLINE Vec load(const F16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
MOECORE_INLINE void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
MOECORE_INLINE Vec load(const BF16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}
MOECORE_INLINE void store(BF16* p, Vec a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quieted = _mm256_or_si256(x, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quieted, is_nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
