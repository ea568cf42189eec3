// The largest magnitudes of runs of 16-bit elements, which are ordered like integers: for AVX2 and everything
// above it. bytes_baseline.inl documents the API.

MOECORE_INLINE __m256i load_magnitudes(const std::uint16_t* p) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7FFF));
}

inline std::uint16_t max_magnitude(const std::uint16_t* p, std::int64_t n) {
  __m256i most = _mm256_setzero_si256(), other = most;
  std::int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    most = _mm256_max_epu16(most, load_magnitudes(p + 16 * i));
    other = _mm256_max_epu16(other, load_magnitudes(p + 16 * i + 16));
  }
  if (i < n) most = _mm256_max_epu16(most, load_magnitudes(p + 16 * i));
  most = _mm256_max_epu16(most, other);
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  // There is an instruction for the least of eight.
  return static_cast<std::uint16_t>(
      ~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1))), 0));
}

// Sixteen maxima at once: what is left of two vectors is put side by side and halved together, from 16
// candidates a block down to one. Two vectors at a time, 3 instructions halve them; a block of 16 by itself
// takes 8.
MOECORE_INLINE __m256i halve_vectors(__m256i a, __m256i b) {
  return _mm256_max_epu16(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
MOECORE_INLINE __m256i halve_lanes(__m256i a, __m256i b) {
  return _mm256_max_epu16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
MOECORE_INLINE __m256i halve_quads(__m256i a, __m256i b) {
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  return _mm256_max_epu16(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                          _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xDD)));
}
MOECORE_INLINE __m256i halve_pairs(__m256i a, __m256i b) {
  return _mm256_max_epu16(_mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA),
                          _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA));
}

template <class Count>
MOECORE_INLINE void block_maxima_of(const std::uint16_t* p, std::int64_t blocks, Count n,
                                    std::uint16_t* out) {
  auto block = [&](int b) MOECORE_INLINE_LAMBDA {
    const std::uint16_t* at = p + 16 * n * b;
    __m256i most = load_magnitudes(at);
    for (std::int64_t i = 1; i < n; ++i) most = _mm256_max_epu16(most, load_magnitudes(at + 16 * i));
    return most;
  };
  // Block b in the one 128-bit lane, b + 8 in the other; the rest keeps to the order of a lane's words.
  auto two = [&](int b) MOECORE_INLINE_LAMBDA { return halve_vectors(block(b), block(b + 8)); };
  auto four = [&](int b) MOECORE_INLINE_LAMBDA { return halve_lanes(two(b), two(b + 2)); };
  auto eight = [&](int b) MOECORE_INLINE_LAMBDA { return halve_quads(four(b), four(b + 4)); };
  for (; blocks >= 16; blocks -= 16, p += 256 * n, out += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halve_pairs(eight(0), eight(1)));
  for (; blocks > 0; --blocks, p += 16 * n) *out++ = max_magnitude(p, n);
}

// Blocks of few vectors take no longer than their loads when there is no loop over them.
inline void block_maxima(const std::uint16_t* p, std::int64_t blocks, std::int64_t n, std::uint16_t* out) {
  if (n == 1)
    block_maxima_of(p, blocks, std::integral_constant<std::int64_t, 1>{}, out);
  else if (n == 2)
    block_maxima_of(p, blocks, std::integral_constant<std::int64_t, 2>{}, out);
  else if (n == 8)
    block_maxima_of(p, blocks, std::integral_constant<std::int64_t, 8>{}, out);
  else
    block_maxima_of(p, blocks, n, out);
}
