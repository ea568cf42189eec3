// Vectors of 16 floats: AVX-512 F, BW, DQ, VL. vec_baseline.inl documents the API.

inline constexpr int W = 16;

struct Vec {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

MOECORE_INLINE Vec set(float x) {
  return {_mm512_set1_ps(x)};
}
MOECORE_INLINE Ints set_int(std::int32_t x) {
  return {_mm512_set1_epi32(x)};
}

MOECORE_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
MOECORE_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
MOECORE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
MOECORE_INLINE Vec add_product(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

MOECORE_INLINE Mask operator<(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
MOECORE_INLINE Mask operator>(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
}
MOECORE_INLINE Mask operator>=(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)};
}
MOECORE_INLINE Mask operator&(Mask a, Mask b) {
  return {static_cast<__mmask16>(a.v & b.v)};
}
MOECORE_INLINE unsigned bits_of(Mask m) {
  return m.v;
}

MOECORE_INLINE Ints as_ints(Vec a) {
  return {_mm512_castps_si512(a.v)};
}
MOECORE_INLINE Vec as_floats(Ints a) {
  return {_mm512_castsi512_ps(a.v)};
}
MOECORE_INLINE Ints operator+(Ints a, Ints b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
MOECORE_INLINE Ints operator-(Ints a, Ints b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
template <int N>
MOECORE_INLINE Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
MOECORE_INLINE Ints shift_right(Ints a) {
  return {_mm512_srai_epi32(a.v, N)};
}

MOECORE_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
MOECORE_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
MOECORE_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
MOECORE_INLINE Vec abs(Vec a) {
  return {_mm512_abs_ps(a.v)};
}

template <int S>
MOECORE_INLINE Vec swap_lanes(Vec a) {
  if constexpr (S == 8)
    return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
  else if constexpr (S == 4)
    return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  else
    return {_mm512_permute_ps(a.v, S | (1 ^ S) << 2 | (2 ^ S) << 4 | (3 ^ S) << 6)};
}
MOECORE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m512i pick_even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i pick_odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  even.v = _mm512_permutex2var_ps(a.v, pick_even, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, pick_odd, b.v);
}

MOECORE_INLINE Vec load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
MOECORE_INLINE void store(float* p, Vec a) {
  _mm512_storeu_ps(p, a.v);
}
MOECORE_INLINE Vec load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
MOECORE_INLINE void store(F16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
MOECORE_INLINE Vec load(const BF16* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
}
// By integer steps also where AVX512-BF16 is on hand: its conversion flushes denormals.
MOECORE_INLINE void store(BF16* p, Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, x, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
