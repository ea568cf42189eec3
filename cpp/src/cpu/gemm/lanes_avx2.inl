// What decode_lanes.inl needs of AVX2.

struct Bytes {
  __m256i v;
};
MOECORE_INLINE Bytes bytes_at(const std::uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
/// 16 bytes in every lane.
MOECORE_INLINE Bytes table(const std::uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))};
}
/// Lane l: 16 bytes at p + 32 * index[l * step].
MOECORE_INLINE Bytes lane_tables(const std::uint8_t* p, const std::uint8_t* index, int step) {
  auto at = [&](int lane) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(p + 32 * index[lane * step]));
  };
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1)};
}
MOECORE_INLINE Bytes all_bytes(int x) {
  return {_mm256_set1_epi8(static_cast<char>(x))};
}
MOECORE_INLINE Bytes operator&(Bytes a, Bytes b) {
  return {_mm256_and_si256(a.v, b.v)};
}
MOECORE_INLINE Bytes operator|(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.v, b.v)};
}
MOECORE_INLINE Bytes operator^(Bytes a, Bytes b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
MOECORE_INLINE Bytes operator+(Bytes a, Bytes b) {
  return {_mm256_add_epi8(a.v, b.v)};
}
/// All bits set where equal.
MOECORE_INLINE Bytes equal(Bytes a, Bytes b) {
  return {_mm256_cmpeq_epi8(a.v, b.v)};
}
/// t[i] inside each lane; 0 where i has its highest bit set.
MOECORE_INLINE Bytes lookup(Bytes t, Bytes i) {
  return {_mm256_shuffle_epi8(t.v, i.v)};
}
MOECORE_INLINE Bytes high_nibbles(Bytes a) {
  return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))};
}
/// Bytes 0 .. 7 of each lane of a and b as words: a's byte below b's.
MOECORE_INLINE Bytes interleave_low(Bytes a, Bytes b) {
  return {_mm256_unpacklo_epi8(a.v, b.v)};
}
/// Bytes 8 .. 15.
MOECORE_INLINE Bytes interleave_high(Bytes a, Bytes b) {
  return {_mm256_unpackhi_epi8(a.v, b.v)};
}
/// Words as upper halves of floats: those at even places, those at odd places.
MOECORE_INLINE Vec low_words(Bytes a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))};
}
MOECORE_INLINE Vec high_words(Bytes a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(-0x10000)))};
}

/// Lane l: four floats at p + l * stride.
MOECORE_INLINE Vec load_lanes(const float* p, int stride) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1)};
}
/// Inside each lane, element j of v[i] and element i of v[j] change places.
MOECORE_INLINE void transpose_lanes(Vec (&v)[4]) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0].v, v[1].v)),
                b = _mm256_castps_pd(_mm256_unpacklo_ps(v[2].v, v[3].v)),
                c = _mm256_castps_pd(_mm256_unpackhi_ps(v[0].v, v[1].v)),
                d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2].v, v[3].v));
  v[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
  v[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  v[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
  v[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}
/// Inside each lane: elements 0 and 2 of a, then of b; 1 and 3.
MOECORE_INLINE void even_and_odd(Vec a, Vec b, Vec& even, Vec& odd) {
  even.v = _mm256_shuffle_ps(a.v, b.v, 0x88);
  odd.v = _mm256_shuffle_ps(a.v, b.v, 0xDD);
}
