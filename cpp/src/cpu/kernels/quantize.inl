// The vectorised steps of quantize and dequantize, on a piece of one row of up to kQuantizePiece columns.
// They follow core/numeric.h bit for bit; what a step is for stands in moecore/quantize.h.

/// e4m3 codes of y: to nearest even, saturating, NaN = 0x7F. The magnitudes they stand for go to `value`.
MOECORE_INLINE Ints encode_e4m3(Vec y, Vec& value) {
  const Vec a = min(abs(y), set(448.0f));  // NaN becomes 448 and is mended below
  const Ints e = as_ints(max(as_floats(as_ints(a) & set_int(0x7F800000)), set(0x1p-6f)));
  const Ints magic =
      e + set_int(20 << 23);  // adding 2^(exponent + 20) leaves three bits behind the leading one
  const Vec sum = a + as_floats(magic);
  value = sum - as_floats(magic);
  const Ints code = as_ints(sum) - magic + shift_right<20>(e) - set_int(968);
  const Ints sign = shift_right<24>(as_ints(y)) & set_int(0x80);
  return as_ints(select(y >= y, as_floats(code | sign), as_floats(set_int(0x7F))));
}

/// e2m1 codes of y: to nearest even, saturating, NaN = 7. See numeric::f32_to_e2m1.
MOECORE_INLINE Ints encode_e2m1(Vec y) {
  constexpr float kOne = 8388608.0f;
  const Vec a = abs(y);
  const Vec low = fma(a, set(2.0f), set(kOne)), mid = a + set(kOne + 2.0f);
  const Vec high = fma(a, set(0.5f), set(kOne + 4.0f));
  const Ints code = as_ints(min(min(min(low, mid), high), set(kOne + 7.0f))) & set_int(7);
  const Ints sign = shift_right<28>(as_ints(y)) & set_int(8);
  return as_ints(select(y >= y, as_floats(code | sign), as_floats(set_int(7))));
}

/// 0 .. 255 as floats: under the exponent of 2^23, less 2^23.
MOECORE_INLINE Vec byte_to_float(Ints code) {
  return as_floats(code | set_int(0x4B000000)) - set(8388608.0f);
}

MOECORE_INLINE Vec decode_e4m3(Ints code) {
  const Ints magnitude = code & set_int(0x7F);
  const Vec steps = byte_to_float(magnitude);
  const Vec normal = as_floats(shift_left<20>(magnitude) + set_int(120 << 23));
  Vec a = select(steps < set(8.0f), steps * set(0x1p-9f), normal);
  a = select(steps > set(126.0f), as_floats(set_int(0x7FC00000)), a);
  return as_floats(as_ints(a) | shift_left<24>(code & set_int(0x80)));
}

MOECORE_INLINE Vec decode_e2m1(Ints code) {
  const Ints magnitude = code & set_int(7);
  const Vec steps = byte_to_float(magnitude);
  const Vec normal = as_floats(shift_left<22>(magnitude) + set_int(126 << 23));
  const Vec a = select(steps < set(2.0f), steps * set(0.5f), normal);
  return as_floats(as_ints(a) | shift_left<28>(code & set_int(8)));
}

/// amax[b] = largest |x| of block b that is not NaN; NaN if there is none. amax is written up to W floats
/// beyond the last block.
template <class T>
void amax_of(const T* x, std::int64_t n, std::int64_t block, float* amax) {
  const Vec none = set(-1.0f);  // below every magnitude: what is left of a block of NaNs
  std::int64_t b = 0;
  for (std::int64_t begin = 0; begin < n; begin += block, ++b) {
    const std::int64_t end = begin + block < n ? begin + block : n;
    Vec most = none;
    std::int64_t i = begin;
    for (; i + W <= end; i += W) most = max(abs(load(x + i)), most);
    if (i < end) {
      float last[W];
      store(last, none);
      store_n(last, abs(load_n(x + i, end - i)), end - i);
      most = max(load(last), most);
    }
    store(amax + b, max_lanes(most));  // the other lanes are overwritten by the blocks they belong to
  }
  for (std::int64_t i = 0; i < b; i += W) {
    const Vec a = load(amax + i);
    store(amax + i, select(a < set(0.0f), as_floats(set_int(0x7FC00000)), a));
  }
}

inline void quantize_amax(DType dtype, const void* x, std::int64_t n, std::int64_t block, float* amax) {
  visit_instance(QuantizeTypes{}, dtype,
                 [&]<DType d>() { amax_of(static_cast<const Element<d>*>(x), n, block, amax); });
}

template <bool e2m1>
MOECORE_INLINE void store_codes(std::uint8_t* out, std::int64_t i, Vec y) {
  Vec unused;
  if constexpr (e2m1)
    store_nibbles(out + i / 2, encode_e2m1(y));
  else
    store_bytes(out + i, encode_e4m3(y, unused));
}

template <bool e2m1, class T>
void encode_blocks(const T* x, std::int64_t n, std::int64_t block, const float* factor, std::uint8_t* out) {
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = begin + block < n ? begin + block : n;
    const Vec f = set(*factor++);
    std::int64_t i = begin;
    for (; i + W <= end; i += W) store_codes<e2m1>(out, i, load(x + i) * f);
    if (i < end) {
      std::uint8_t last[W];
      store_codes<e2m1>(last, 0, load_n(x + i, end - i) * f);
      // A nibble behind the last element is the code of a zero, but 0 * f may be NaN.
      if (e2m1 && (end - i) % 2 == 1) last[(end - i) / 2] &= 0x0F;
      std::memcpy(out + (e2m1 ? i / 2 : i), last,
                  static_cast<std::size_t>(e2m1 ? (end - i + 1) / 2 : end - i));
    }
  }
}

/// Codes of x * factor[block].
inline void quantize_encode(DType dtype, bool e2m1, const void* x, std::int64_t n, std::int64_t block,
                            const float* factor, std::uint8_t* out) {
  visit_instance(QuantizeTypes{}, dtype, [&]<DType d>() {
    const auto* values = static_cast<const Element<d>*>(x);
    e2m1 ? encode_blocks<true>(values, n, block, factor, out)
         : encode_blocks<false>(values, n, block, factor, out);
  });
}

/// nvfp4's block scales and factors for n blocks. All arrays reach up to the next multiple of W.
inline void nvfp4_scales(const float* amax, std::int64_t n, float global, std::uint8_t* scale,
                         float* factor) {
  const Vec g = set(global), rcp_g = set(1.0f) / g, sixth = set(1.0f / 6);
  for (std::int64_t i = 0; i < n; i += W) {
    const Vec wanted = g * (load(amax + i) * sixth);
    Vec s;
    store_bytes(scale + i, encode_e4m3(wanted, s));
    s = select(wanted >= wanted, s, wanted);
    store(factor + i, select(s < set(0x1p-10f), set(0.0f), set(1.0f) / (s * rcp_g)));
  }
}

template <class T>
void decode_blocks(bool e2m1, const std::uint8_t* codes, std::int64_t n, std::int64_t block,
                   const float* scale, T* out) {
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = begin + block < n ? begin + block : n;
    const Vec s = set(*scale++);
    for (std::int64_t i = begin; i < end; i += W) {
      const std::int64_t left = end - i;
      const std::uint8_t* from = codes + (e2m1 ? i / 2 : i);
      std::uint8_t last[W] = {};
      if (left < W) {
        std::memcpy(last, from, static_cast<std::size_t>(e2m1 ? (left + 1) / 2 : left));
        from = last;
      }
      store_n(out + i, (e2m1 ? decode_e2m1(load_nibbles(from)) : decode_e4m3(load_bytes(from))) * s, left);
    }
  }
}

/// out[i] = RN(code * scale[block]).
inline void dequantize_decode(DType dtype, bool e2m1, const std::uint8_t* codes, std::int64_t n,
                              std::int64_t block, const float* scale, void* out) {
  visit_instance(QuantizeTypes{}, dtype, [&]<DType d>() {
    decode_blocks(e2m1, codes, n, block, scale, static_cast<Element<d>*>(out));
  });
}
