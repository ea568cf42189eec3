// What decode_lanes.inl needs of AVX-512 F, BW, DQ.

struct Bytes {
  __m512i v;
};
MOECORE_INLINE Bytes bytes_at(const std::uint8_t* p) {
  return {_mm512_loadu_si512(p)};
}
/// 16 bytes in every lane.
MOECORE_INLINE Bytes table(const std::uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))};
}
/// Lane l: 16 bytes at p + 32 * index[l * step].
MOECORE_INLINE Bytes lane_tables(const std::uint8_t* p, const std::uint8_t* index, int step) {
  auto at = [&](int lane) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(p + 32 * index[lane * step]));
  };
  __m512i v = _mm512_castsi128_si512(at(0));
  v = _mm512_inserti32x4(v, at(1), 1);
  v = _mm512_inserti32x4(v, at(2), 2);
  return {_mm512_inserti32x4(v, at(3), 3)};
}
MOECORE_INLINE Bytes all_bytes(int x) {
  return {_mm512_set1_epi8(static_cast<char>(x))};
}
MOECORE_INLINE Bytes operator&(Bytes a, Bytes b) {
  return {_mm512_and_si512(a.v, b.v)};
}
MOECORE_INLINE Bytes operator|(Bytes a, Bytes b) {
  return {_mm512_or_si512(a.v, b.v)};
}
MOECORE_INLINE Bytes operator^(Bytes a, Bytes b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
MOECORE_INLINE Bytes operator+(Bytes a, Bytes b) {
  return {_mm512_add_epi8(a.v, b.v)};
}
/// All bits set where equal.
MOECORE_INLINE Bytes equal(Bytes a, Bytes b) {
  return {_mm512_movm_epi8(_mm512_cmpeq_epi8_mask(a.v, b.v))};
}
/// t[i] inside each lane; 0 where i has its highest bit set.
MOECORE_INLINE Bytes lookup(Bytes t, Bytes i) {
  return {_mm512_shuffle_epi8(t.v, i.v)};
}
MOECORE_INLINE Bytes high_nibbles(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
/// Bytes 0 .. 7 of each lane of a and b as words: a's byte below b's.
MOECORE_INLINE Bytes interleave_low(Bytes a, Bytes b) {
  return {_mm512_unpacklo_epi8(a.v, b.v)};
}
/// Bytes 8 .. 15.
MOECORE_INLINE Bytes interleave_high(Bytes a, Bytes b) {
  return {_mm512_unpackhi_epi8(a.v, b.v)};
}
/// Words as upper halves of floats: those at even places, those at odd places.
MOECORE_INLINE Vec low_words(Bytes a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
}
MOECORE_INLINE Vec high_words(Bytes a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(-0x10000)))};
}

/// Lane l: four floats at p + l * stride.
MOECORE_INLINE Vec load_lanes(const float* p, int stride) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return {_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3)};
}
/// Inside each lane, element j of v[i] and element i of v[j] change places.
MOECORE_INLINE void transpose_lanes(Vec (&v)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0].v, v[1].v)),
                b = _mm512_castps_pd(_mm512_unpacklo_ps(v[2].v, v[3].v)),
                c = _mm512_castps_pd(_mm512_unpackhi_ps(v[0].v, v[1].v)),
                d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2].v, v[3].v));
  v[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  v[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  v[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  v[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}
/// Inside each lane: elements 0 and 2 of a, then of b; 1 and 3.
MOECORE_INLINE void even_and_odd(Vec a, Vec b, Vec& even, Vec& odd) {
  even.v = _mm512_shuffle_ps(a.v, b.v, 0x88);
  odd.v = _mm512_shuffle_ps(a.v, b.v, 0xDD);
}
