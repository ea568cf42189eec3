// What needs no instruction of its own, over the API of vec_baseline.inl: partial vectors, copies that
// convert, reductions in an order that does not depend on W. Included after a vec_<isa>.inl.

/// Lanes below n from memory, the others 0. n <= W.
template <class T>
MOECORE_INLINE Vec load_n(const T* p, std::int64_t n) {
  if (n >= W) return load(p);
  T padded[W] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(padded);
}

/// Lanes below n to memory. n <= W.
template <class T>
MOECORE_INLINE void store_n(T* p, Vec a, std::int64_t n) {
  if (n >= W) return store(p, a);
  T padded[W];
  store(padded, a);
  std::memcpy(p, padded, static_cast<std::size_t>(n) * sizeof(T));
}

/// dst[i] = src[i] for i < n; dst is written up to the next multiple of W, with zeros.
template <class T>
MOECORE_INLINE void widen(const T* src, float* dst, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load_n(src + i, n - i));
}

/// The same of src[2 * i] and src[2 * i + 1].
template <class T>
MOECORE_INLINE void widen_pairs(const T* src, float* even, float* odd, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += W) {
    const std::int64_t left = 2 * (n - i);
    Vec e, o;
    deinterleave(load_n(src + 2 * i, left), left > W ? load_n(src + 2 * i + W, left - W) : set(0.0f), e, o);
    store(even + i, e);
    store(odd + i, o);
  }
}

/// dst[i] = RN(src[i]) for i < n; src is read up to the next multiple of W.
template <class T>
MOECORE_INLINE void narrow(const float* src, T* dst, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load(src + i), n - i);
}

/// The largest lane, in every lane. Lanes must not be NaN.
MOECORE_INLINE Vec max_lanes(Vec a) {
  if constexpr (W >= 16) a = max(a, swap_lanes<(W >= 16 ? 8 : 1)>(a));
  if constexpr (W >= 8) a = max(a, swap_lanes<(W >= 8 ? 4 : 1)>(a));
  a = max(a, swap_lanes<2>(a));
  return max(a, swap_lanes<1>(a));
}
