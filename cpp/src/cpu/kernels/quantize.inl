// The vectorised steps of quantize and dequantize, on a piece of one row of up to kQuantizePiece columns.
// They follow core/numeric.h bit for bit; what a step is for stands in moecore/quantize.h.

inline constexpr int kE4m3Bias = 968;  // (121 - 1) * 8 + 8, what e4m3_biased() adds to a code

/// Code + kE4m3Bias of magnitudes: to nearest even, saturating; what a NaN gives is unspecified. The value
/// that the code stands for goes to `value`.
MOECORE_INLINE Ints e4m3_biased(Vec magnitude, Vec& value) {
  const Vec a = min(magnitude, set(448.0f));
  const Ints e = as_ints(max(as_floats(as_ints(a) & set_int(0x7F800000)), set(0x1p-6f)));
  const Ints magic =
      e + set_int(20 << 23);  // adding 2^(exponent + 20) leaves three bits behind the leading one
  const Vec sum = a + as_floats(magic);
  value = sum - as_floats(magic);
  return as_ints(sum) - magic + shift_right<20>(e);
}

/// e4m3 codes of any y: NaN = 0x7F.
MOECORE_INLINE Ints encode_e4m3(Vec y, Vec& value) {
  const Ints code = e4m3_biased(abs(y), value) - set_int(kE4m3Bias);
  const Ints sign = shift_right<24>(as_ints(y)) & set_int(0x80);
  return as_ints(select(y >= y, as_floats(code | sign), as_floats(set_int(0x7F))));
}

/// e2m1 codes of magnitudes: to nearest even, saturating, NaN = 7. See numeric::f32_to_e2m1.
MOECORE_INLINE Ints e2m1_magnitude(Vec a) {
  constexpr float kOne = 8388608.0f;
  const Vec low = fma(a, set(2.0f), set(kOne)), mid = a + set(kOne + 2.0f);
  const Vec high = fma(a, set(0.5f), set(kOne + 4.0f));
  return as_ints(min(min(min(low, mid), high), set(kOne + 7.0f))) & set_int(7);
}

/// e2m1 codes of any y: NaN = 7, without its sign.
MOECORE_INLINE Ints encode_e2m1(Vec y) {
  const Ints sign = shift_right<28>(as_ints(y)) & set_int(8);
  return as_ints(select(y >= y, as_floats(e2m1_magnitude(abs(y)) | sign), as_floats(set_int(7))));
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
/// beyond the last block. Returns whether every element is finite.
template <class T>
bool amax_by_floats(const T* x, std::int64_t n, std::int64_t block, float* amax) {
  const Vec none = set(-1.0f);  // below every magnitude: what is left of a block of NaNs
  Vec zero = set(0.0f);         // x - x of every element: NaN once there was an infinity or a NaN
  std::int64_t b = 0;
  for (std::int64_t begin = 0; begin < n; begin += block, ++b) {
    const std::int64_t end = begin + block < n ? begin + block : n;
    Vec most = none;
    std::int64_t i = begin;
    for (; i + W <= end; i += W) {
      const Vec v = load(x + i);
      zero = zero + (v - v);
      most = max(abs(v), most);
    }
    if (i < end) {
      const Vec v = load_n(x + i, end - i);
      zero = zero + (v - v);
      float last[W];
      store(last, none);
      store_n(last, abs(v), end - i);
      most = max(load(last), most);
    }
    store(amax + b, max_lanes(most));  // the other lanes are overwritten by the blocks they belong to
  }
  for (std::int64_t i = 0; i < b; i += W) {
    const Vec a = load(amax + i);
    store(amax + i, select(a < set(0.0f), as_floats(set_int(0x7FC00000)), a));
  }
  return bits_of(zero < set(1.0f)) == (1u << W) - 1;
}

/// The same for 16-bit elements that are all finite: their magnitudes are ordered like integers. False, and
/// nothing of use in amax, when some element is not finite.
template <class T>
bool amax_by_words(const T* x, std::int64_t n, std::int64_t block, float* amax) {
  constexpr std::uint16_t kInfinity = std::is_same_v<T, BF16> ? 0x7F80 : 0x7C00;
  T most[kQuantizeBlocks + 16] = {};
  const std::int64_t full = n / block, words = block / 16;
  auto full_blocks = [&](auto count) {
    for (std::int64_t b = 0; b < full; ++b) most[b].bits = max_magnitude(&x[b * block].bits, count);
  };
  // Blocks of few words take no longer than their loads when there is no loop over them.
  if (words == 1)
    full_blocks(std::integral_constant<std::int64_t, 1>{});
  else if (words == 2)
    full_blocks(std::integral_constant<std::int64_t, 2>{});
  else if (words == 8)
    full_blocks(std::integral_constant<std::int64_t, 8>{});
  else
    full_blocks(words);
  std::int64_t blocks = full;
  if (full * block < n) {
    const T* rest = x + full * block;
    const std::int64_t left = n - full * block;
    std::uint16_t m = max_magnitude(&rest->bits, left / 16);
    for (std::int64_t i = left / 16 * 16; i < left; ++i) {
      const std::uint16_t a = rest[i].bits & 0x7FFF;
      m = a > m ? a : m;
    }
    most[blocks++].bits = m;
  }
  widen(most, amax, blocks);
  return max_magnitude(&most->bits, (blocks + 15) / 16) < kInfinity;
}

/// Returns whether every element is finite.
inline bool quantize_amax(DType dtype, const void* x, std::int64_t n, std::int64_t block, float* amax) {
  bool finite = false;
  visit_instance(QuantizeTypes{}, dtype, [&]<DType d>() {
    const auto* values = static_cast<const Element<d>*>(x);
    if constexpr (d != DType::kF32) finite = amax_by_words(values, n, block, amax);
    if (!finite) finite = amax_by_floats(values, n, block, amax);
  });
  return finite;
}

template <bool e2m1>
MOECORE_INLINE void store_codes(std::uint8_t* out, std::int64_t i, Vec y) {
  Vec unused;
  if constexpr (e2m1)
    store_nibbles(out + i / 2, encode_e2m1(y));
  else
    store_bytes(out + i, encode_e4m3(y, unused));
}

/// Columns from `i` (where a vector begins) to n, whatever they hold.
template <bool e2m1, class T>
void encode_rest(const T* x, std::int64_t i, std::int64_t n, int block_bits, const float* factor,
                 std::uint8_t* out) {
  for (; i + W <= n; i += W) store_codes<e2m1>(out, i, load(x + i) * set(factor[i >> block_bits]));
  if (i < n) {
    std::uint8_t last[W];
    store_codes<e2m1>(last, 0, load_n(x + i, n - i) * set(factor[i >> block_bits]));
    // A nibble behind the last element is the code of a zero, but 0 * factor may be NaN.
    if (e2m1 && (n - i) % 2 == 1) last[(n - i) / 2] &= 0x0F;
    std::memcpy(out + (e2m1 ? i / 2 : i), last, static_cast<std::size_t>(e2m1 ? (n - i + 1) / 2 : n - i));
  }
}

/// Codes without signs of the finite magnitudes a * f and b * f, in memory order.
template <bool e2m1>
MOECORE_INLINE Words encode_pair(Vec a, Vec b, Vec f) {
  if constexpr (e2m1) {
    return pack(e2m1_magnitude(a * f), e2m1_magnitude(b * f));
  } else {
    Vec unused;
    return pack(e4m3_biased(a * f, unused), e4m3_biased(b * f, unused)) - set_words(kE4m3Bias);
  }
}

/// Columns of finite elements with factors that are finite and not negative: signs are put in among the
/// packed words, and nothing looks for NaN. Returns the columns done.
template <bool e2m1, class T>
std::int64_t encode_finite(const T* x, std::int64_t n, int block_bits, const float* factor,
                           std::uint8_t* out) {
  auto factor_at = [&](std::int64_t i) {
    return block_bits == 4 ? set_pair(factor + i / 16) : set(factor[i >> block_bits]);
  };
  auto encode = [&](std::int64_t i) {
    Vec a, b;
    const Words high = load_pair(x + i, a, b);
    const Words sign = e2m1 ? shift_right<12>(high) & set_words(8) : shift_right<8>(high) & set_words(0x80);
    return encode_pair<e2m1>(a, b, factor_at(i)) | sign;
  };
  std::int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const Words first = encode(i), second = encode(i + 2 * W);
    if constexpr (e2m1)
      store_nibbles(out + i / 2, first, second);
    else
      store_bytes(out + i, first, second);
  }
  return i;
}

/// Codes of x * factor[i / block], where block is a power of two of at least 16.
inline void quantize_encode(DType dtype, bool e2m1, bool finite, const void* x, std::int64_t n,
                            std::int64_t block, const float* factor, std::uint8_t* out) {
  const int block_bits =
      __builtin_ctzll(static_cast<unsigned long long>(block));  // a division would cost as much
  visit_instance(QuantizeTypes{}, dtype, [&]<DType d>() {
    const auto* values = static_cast<const Element<d>*>(x);
    auto run = [&]<bool fp4>() {
      const std::int64_t done = finite ? encode_finite<fp4>(values, n, block_bits, factor, out) : 0;
      encode_rest<fp4>(values, done, n, block_bits, factor, out);
    };
    e2m1 ? run.template operator()<true>() : run.template operator()<false>();
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
