// Vectors of 4 floats in the compilers' portable vector extension, and the reference text for the API that
// every vec_<isa>.inl provides:
//
//   W                        floats in a vector
//   Vec, Ints, Mask          W floats, W i32, W truth values
//   load, store              float, F16 or BF16 in memory, unaligned; narrowing rounds to nearest even, keeps
//                            denormals, overflows to infinity and turns a NaN into a quiet one
//   fma                      a * b + c rounded once, on every level
//   add_product              the same where a * b is exact
//   min, max                 a < b ? a : b and a > b ? a : b, so b when either is NaN
//   select                   m ? a : b
//   bits_of                  lane i of a mask as bit i
//   swap_lanes<S>            lane i receives lane i ^ S
//   deinterleave             2 * W consecutive floats -> those at even and those at odd places
//
// Included inside a namespace, once per target file.

inline constexpr int W = 4;

typedef float RawFloats __attribute__((vector_size(16)));
typedef std::int32_t RawInts __attribute__((vector_size(16)));

struct Vec {
  RawFloats v;
};
struct Ints {
  RawInts v;
};
struct Mask {
  RawInts v;  // 0 or -1
};

MOECORE_INLINE Vec set(float x) {
  return {RawFloats{x, x, x, x}};
}
MOECORE_INLINE Ints set_int(std::int32_t x) {
  return {RawInts{x, x, x, x}};
}

MOECORE_INLINE Vec operator+(Vec a, Vec b) {
  return {a.v + b.v};
}
MOECORE_INLINE Vec operator-(Vec a, Vec b) {
  return {a.v - b.v};
}
MOECORE_INLINE Vec operator*(Vec a, Vec b) {
  return {a.v * b.v};
}
MOECORE_INLINE Vec operator/(Vec a, Vec b) {
  return {a.v / b.v};
}
MOECORE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < W; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
MOECORE_INLINE Vec add_product(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}

MOECORE_INLINE Mask operator<(Vec a, Vec b) {
  return {a.v < b.v};
}
MOECORE_INLINE Mask operator>(Vec a, Vec b) {
  return {a.v > b.v};
}
MOECORE_INLINE Mask operator>=(Vec a, Vec b) {
  return {a.v >= b.v};
}
MOECORE_INLINE Mask operator&(Mask a, Mask b) {
  return {a.v & b.v};
}
MOECORE_INLINE unsigned bits_of(Mask m) {
  return (m.v[0] & 1u) | (m.v[1] & 2u) | (m.v[2] & 4u) | (m.v[3] & 8u);
}

MOECORE_INLINE Ints as_ints(Vec a) {
  return {(RawInts)a.v};
}
MOECORE_INLINE Vec as_floats(Ints a) {
  return {(RawFloats)a.v};
}
MOECORE_INLINE Ints operator+(Ints a, Ints b) {
  return {a.v + b.v};
}
MOECORE_INLINE Ints operator-(Ints a, Ints b) {
  return {a.v - b.v};
}
template <int N>
MOECORE_INLINE Ints shift_left(Ints a) {
  return {a.v << N};
}
template <int N>
MOECORE_INLINE Ints shift_right(Ints a) {  // keeps the sign
  return {a.v >> N};
}

MOECORE_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {(RawFloats)(((RawInts)a.v & m.v) | ((RawInts)b.v & ~m.v))};
}
MOECORE_INLINE Vec min(Vec a, Vec b) {
  return select(a < b, a, b);
}
MOECORE_INLINE Vec max(Vec a, Vec b) {
  return select(a > b, a, b);
}
MOECORE_INLINE Vec abs(Vec a) {
  return {(RawFloats)((RawInts)a.v & 0x7fffffff)};
}

template <int S>
MOECORE_INLINE Vec swap_lanes(Vec a) {
  return {RawFloats{a.v[S], a.v[1 ^ S], a.v[2 ^ S], a.v[3 ^ S]}};
}
MOECORE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  even.v = RawFloats{a.v[0], a.v[2], b.v[0], b.v[2]};
  odd.v = RawFloats{a.v[1], a.v[3], b.v[1], b.v[3]};
}

MOECORE_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r.v, p, sizeof r.v);
  return r;
}
MOECORE_INLINE void store(float* p, Vec a) {
  std::memcpy(p, &a.v, sizeof a.v);
}

typedef std::uint32_t RawUnsigned __attribute__((vector_size(16)));

MOECORE_INLINE RawUnsigned load_u16(const std::uint16_t* p) {
  return RawUnsigned{p[0], p[1], p[2], p[3]};
}
MOECORE_INLINE void store_u16(std::uint16_t* p, RawUnsigned a) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<std::uint16_t>(a[i]);
}

MOECORE_INLINE Vec load(const BF16* p) {
  return {(RawFloats)(load_u16(&p->bits) << 16)};
}
MOECORE_INLINE void store(BF16* p, Vec a) {
  const RawUnsigned x = (RawUnsigned)a.v;
  const RawUnsigned is_nan = (RawUnsigned)((x & 0x7fffffffu) > 0x7f800000u);
  const RawUnsigned rounded = x + 0x7fffu + ((x >> 16) & 1u), quieted = x | 0x00400000u;
  store_u16(&p->bits, ((quieted & is_nan) | (rounded & ~is_nan)) >> 16);
}

// f16 by integer and exact float steps. A denormal is mantissa * 2^-24: its bits under the exponent of 2^-14
// make 2^-14 + mantissa * 2^-24, from which 2^-14 is subtracted.
MOECORE_INLINE Vec load(const F16* p) {
  const RawUnsigned h = load_u16(&p->bits);
  const RawUnsigned sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const RawUnsigned exponent = h & 0x7c00u;
  const RawUnsigned is_special = (RawUnsigned)(exponent == 0x7c00u), is_small = (RawUnsigned)(exponent == 0u);
  const RawUnsigned is_nan = (RawUnsigned)((h & 0x7fffu) > 0x7c00u);
  // Re-bias by 127 - 15; infinity and NaN get the all-ones exponent, a NaN its quiet bit.
  const RawUnsigned normal = magnitude + (112u << 23) + (is_special & (112u << 23)) +
                             ((magnitude ^ 0x00400000u) & is_nan & 0x00400000u);
  const RawFloats two_m14 = (RawFloats)(RawUnsigned{} + (113u << 23));
  const RawUnsigned small = (RawUnsigned)((RawFloats)(magnitude + (113u << 23)) - two_m14);
  return {(RawFloats)(sign | (small & is_small) | (normal & ~is_small))};
}
MOECORE_INLINE void store(F16* p, Vec a) {
  const RawUnsigned x = (RawUnsigned)a.v;
  const RawUnsigned sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  const RawUnsigned is_nan = (RawUnsigned)(magnitude > 0x7f800000u);
  const RawUnsigned is_large = (RawUnsigned)(magnitude >= 0x477ff000u);  // 65520 and up round to infinity
  const RawUnsigned is_small = (RawUnsigned)(magnitude < (113u << 23));  // below 2^-14
  const RawUnsigned normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has the spacing 2^-24 of f16 denormals, so adding it rounds the sum where the result needs it.
  const RawFloats half = (RawFloats)(RawUnsigned{} + (126u << 23));
  const RawUnsigned small = (RawUnsigned)((RawFloats)magnitude + half) - (126u << 23);
  RawUnsigned h = (small & is_small) | (normal & ~is_small);
  h = (is_large & 0x7c00u) | (h & ~is_large);
  h = (is_nan & (0x7e00u | ((magnitude >> 13) & 0x3ffu))) | (h & ~is_nan);
  store_u16(&p->bits, sign | h);
}
