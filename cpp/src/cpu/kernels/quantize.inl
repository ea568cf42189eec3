// The vectorised steps of quantize and dequantize, on a piece of one row of up to kQuantizePiece columns.
// They follow core/numeric.h bit for bit; what a step is for stands in moecore/quantize.h.

struct Minifloat {
  int mantissa, least;     // bits; exponent of the smallest normal
  int code_bits, largest;  // without the sign; the largest code
  int value;               // of the largest
};
inline constexpr Minifloat kE4m3{3, -6, 7, 0x7E, 448}, kE2m1{1, 0, 3, 7, 6};

/// The power of two of a magnitude's leading one, at least that of the smallest normal.
template <Minifloat f>
MOECORE_INLINE Vec leading_power(Vec a) {
  return as_floats(max(as_ints(a) & set_int(0x7F800000), set_int((127 + f.least) << 23)));
}

/// Times a magnitude's leading power, this is what it is added to.
template <Minifloat f>
constexpr float count_from() {
  constexpr int kShift = 23 - f.mantissa, kFirst = (127 + f.least + kShift) << f.mantissa;
  return (1 << kShift) * (1 + (0x10000 - kFirst) * 0x1p-23f);
}

/// Codes of magnitudes below 2^100, to nearest even and not yet saturated: modulo 2^16 a code is the low word
/// of what comes out plus 2^(mantissa - 7) times the high one.
///
/// A magnitude of exponent e is added to 2^(e + 23 - mantissa), which leaves that many bits behind its
/// leading one, and below the smallest normal no finer ones. Then the last bits count its steps, 2^mantissa
/// to a power of two, and the exponent counts those powers. The count begins at -kFirst, so that the codes do
/// at 0.
template <Minifloat f>
MOECORE_INLINE Ints count_steps(Vec a) {
  return as_ints(add_product(leading_power<f>(a), set(count_from<f>()), a));
}

/// What the code of a magnitude stands for, where it does not saturate.
template <Minifloat f>
MOECORE_INLINE Vec rounded(Vec a) {
  return add_product(leading_power<f>(a), set(-count_from<f>()), as_floats(count_steps<f>(a)));
}

/// Codes of any y: saturating, with signs, NaN = 0x7F or 7. See numeric::f32_to_e4m3 and _e2m1.
template <Minifloat f>
MOECORE_INLINE Ints encode(Vec y) {
  constexpr int kMask = (1 << f.code_bits) - 1;
  const Ints steps = count_steps<f>(min(abs(y), set(static_cast<float>(f.value))));
  const Ints code = (steps + shift_right<23 - f.mantissa>(steps)) & set_int(kMask);
  const Ints sign = shift_right<31 - f.code_bits>(as_ints(y)) & set_int(kMask + 1);
  return as_ints(select(y >= y, as_floats(code | sign), as_floats(set_int(kMask))));
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
  std::int64_t blocks = n / block;
  block_maxima(&x->bits, blocks, block / 16, &most->bits);
  if (const std::int64_t left = n - blocks * block; left > 0) {
    const T* rest = x + blocks * block;
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

template <Minifloat f>
MOECORE_INLINE void store_codes(std::uint8_t* out, std::int64_t i, Vec y) {
  if constexpr (f.code_bits == 3)
    store_nibbles(out + i / 2, encode<f>(y));
  else
    store_bytes(out + i, encode<f>(y));
}

/// Columns from `i` (where a vector begins) to n, whatever they and their factors are.
template <Minifloat f, class T>
void encode_rest(const T* x, std::int64_t i, std::int64_t n, int block_bits, const float* factor,
                 std::uint8_t* out) {
  for (; i + W <= n; i += W) store_codes<f>(out, i, load(x + i) * set(factor[i >> block_bits]));
  if (i < n) {
    std::uint8_t last[W];
    store_codes<f>(last, 0, load_n(x + i, n - i) * set(factor[i >> block_bits]));
    constexpr bool kNibbles = f.code_bits == 3;
    // A nibble behind the last element is the code of a zero, but 0 * factor may be NaN.
    if (kNibbles && (n - i) % 2 == 1) last[(n - i) / 2] &= 0x0F;
    std::memcpy(out + (kNibbles ? i / 2 : i), last,
                static_cast<std::size_t>(kNibbles ? (n - i + 1) / 2 : n - i));
  }
}

/// Columns whose magnitudes times their factors are below 2^16, where factors are not negative: a pair's
/// codes are put together, saturated and given their signs as the upper bits of words, and nothing looks for
/// NaN. What stands at `next` is brought into L2 meanwhile. Returns the columns done.
template <Minifloat f, class T>
std::int64_t encode_bounded(const T* x, std::int64_t n, int block_bits, const float* factor, const T* next,
                            std::uint8_t* out) {
  constexpr int kLow = 1 << (15 - f.code_bits), kHigh = kLow >> (7 - f.mantissa);
  auto encode = [&](std::int64_t i, Vec scale) MOECORE_INLINE_LAMBDA {
    Vec a, b;
    const Words signs = load_pair(x + i, a, b);
    const Words codes = pack(sum_words(count_steps<f>(a * scale), kLow, kHigh),
                             sum_words(count_steps<f>(b * scale), kLow, kHigh));
    return shift_right<15 - f.code_bits>(with_signs(min(codes, set_words(f.largest * kLow)), signs));
  };
  constexpr int kStep = 4 * W, kLine = 64 / sizeof(T);
  auto run = [&](auto scale_at) MOECORE_INLINE_LAMBDA {
    std::int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int line = 0; line < kStep; line += kLine) __builtin_prefetch(next + i + line, 0, 2);
      const Words first = encode(i, scale_at(i)), second = encode(i + 2 * W, scale_at(i + 2 * W));
      if constexpr (f.code_bits == 3)
        store_nibbles(out + i / 2, first, second);
      else
        store_bytes(out + i, first, second);
    }
    return i;
  };
  if (2 * W > 16 && block_bits == 4)
    return run([&](std::int64_t i) MOECORE_INLINE_LAMBDA { return set_pair(factor + i / 16); });
  return run([&](std::int64_t i) MOECORE_INLINE_LAMBDA { return set(factor[i >> block_bits]); });
}

/// Codes of x * factor[i / block], where block is a power of two of at least 16. `bounded`: no factor is
/// negative and every product is below 2^16. `next` is what will be read after x.
inline void quantize_encode(DType dtype, bool e2m1, bool bounded, const void* x, std::int64_t n,
                            std::int64_t block, const float* factor, const void* next, std::uint8_t* out) {
  const int block_bits =
      __builtin_ctzll(static_cast<unsigned long long>(block));  // a division would cost as much
  visit_instance(QuantizeTypes{}, dtype, [&]<DType d>() {
    using T = Element<d>;
    const auto* values = static_cast<const T*>(x);
    auto run = [&]<Minifloat f>() {
      const std::int64_t done =
          bounded ? encode_bounded<f>(values, n, block_bits, factor, static_cast<const T*>(next), out) : 0;
      encode_rest<f>(values, done, n, block_bits, factor, out);
    };
    e2m1 ? run.template operator()<kE2m1>() : run.template operator()<kE4m3>();
  });
}

/// nvfp4's block scales and factors for n blocks; whether elements times factors stay below 2^16. All arrays
/// reach up to the next multiple of W.
inline bool nvfp4_scales(const float* amax, std::int64_t n, float global, std::uint8_t* scale,
                         float* factor) {
  const Vec g = set(global), rcp_g = set(1.0f) / g, sixth = set(1.0f / 6);
  unsigned bounded = ~0u;
  for (std::int64_t i = 0; i < n; i += W) {
    const Vec a = load(amax + i), wanted = g * (a * sixth);
    store_bytes(scale + i, encode<kE4m3>(wanted));
    // From 2^-10 down the scale is 0. Where it is NaN, so are the elements or their products with any factor.
    const Vec s = rounded<kE4m3>(min(abs(wanted), set(448.0f)));
    const Vec f = select(set(0x1p-10f) >= wanted, set(0.0f), set(1.0f) / (s * rcp_g));
    store(factor + i, f);
    bounded &= bits_of(a * f < set(0x1p16f));
  }
  return global > 0 && (bounded & ((1u << W) - 1)) == (1u << W) - 1;
}

/// e8m0 scales by `rule` and their reciprocals for n blocks. All arrays reach up to the next multiple of W.
inline void power_of_two_scales(const float* amax, std::int64_t n, numeric::PowerOfTwoRule rule,
                                std::uint8_t* scale, float* factor) {
  const Ints carry = set_int(static_cast<int>(rule.carry)), offset = set_int(rule.offset),
             lowest = set_int(rule.lowest);
  for (std::int64_t i = 0; i < n; i += W) {
    const Vec a = load(amax + i);
    const Mask infinite = a > set(0x1.fffffep127f), number = a >= set(0.0f);
    const Ints finite = max(shift_right<23>(as_ints(a) + carry) - offset, lowest);
    Vec code = select(infinite, as_floats(set_int(0xFE)), as_floats(finite));
    code = select(number, code, as_floats(set_int(0xFF)));
    store_bytes(scale + i, as_ints(code));
    Vec f = as_floats(shift_left<23>(set_int(254) - finite));
    f = select(f < set(0x1p127f), f, set(0.0f));
    f = select(infinite, set(0x1p-127f), f);
    store(factor + i, select(number, f, as_floats(set_int(0x7FC00000))));
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
