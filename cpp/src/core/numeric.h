#pragma once
// Conversions between f32 and the small formats, bit for bit: the one written form of each rounding rule.
//
// Everything is constexpr, branch-free and independent of hardware and rounding flags other than the default
// round-to-nearest-even. docs/formats.md has the tables. Narrow codes come in the low bits of a byte.
//
//   e4m3  1-4-3, bias 7, no infinity, NaN 0x7F/0xFF, largest 448, smallest normal 2^-6, smallest 2^-9
//   e5m2  1-5-2, bias 15, infinity 0x7C, largest 57344, smallest normal 2^-14, smallest 2^-16
//   e2m1  1-2-1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; no NaN
//   e8m0  2^(byte - 127), 0xFF = NaN; byte 0 is 2^-127, not 0

#include <bit>
#include <cstdint>

namespace moecore::numeric {

constexpr std::uint32_t bits(float x) {
  return std::bit_cast<std::uint32_t>(x);
}
constexpr float from_bits(std::uint32_t u) {
  return std::bit_cast<float>(u);
}

inline constexpr std::uint32_t kSignBit = 0x80000000u;
inline constexpr std::uint32_t kInfinityBits = 0x7F800000u;
inline constexpr std::uint32_t kNanBits = 0x7FC00000u;

constexpr bool is_nan(float x) {
  return (bits(x) & ~kSignBit) > kInfinityBits;
}

constexpr float bf16_to_f32(std::uint16_t h) {
  return from_bits(static_cast<std::uint32_t>(h) << 16);
}

/// Round to nearest even; a NaN stays a quiet NaN.
constexpr std::uint16_t f32_to_bf16(float x) {
  const std::uint32_t u = bits(x);
  const std::uint32_t rounded = u + 0x7FFFu + ((u >> 16) & 1u);
  return static_cast<std::uint16_t>((is_nan(x) ? u | 0x00400000u : rounded) >> 16);
}

constexpr float f16_to_f32(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  // A denormal is magnitude * 2^-24: its bits under the exponent of 2^-14 stand for 2^-14 + magnitude *
  // 2^-24.
  const std::uint32_t small = bits(from_bits((113u << 23) | magnitude << 13) - from_bits(113u << 23));
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const std::uint32_t special = (magnitude << 13) | kInfinityBits | (magnitude > 0x7C00u ? 0x00400000u : 0u);
  return from_bits(sign | (magnitude < 0x0400u ? small : magnitude >= 0x7C00u ? special : normal));
}

/// Round to nearest even, overflow to infinity; a NaN stays a quiet NaN.
constexpr std::uint16_t f32_to_f16(float x) {
  const std::uint32_t sign = bits(x) >> 16 & 0x8000u, a = bits(x) & ~kSignBit;
  // 0.5 has the spacing 2^-24 of f16 denormals, so adding it rounds where the result needs it.
  const std::uint32_t small = bits(from_bits(a) + 0.5f) - bits(0.5f);
  const std::uint32_t normal = (a - (112u << 23) + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  const std::uint32_t nan = 0x7E00u | ((a >> 13) & 0x3FFu);
  const std::uint32_t magnitude = a > kInfinityBits  ? nan
                                  : a >= 0x477FF000u ? 0x7C00u  // 65520 and up
                                  : a < (113u << 23) ? small
                                                     : normal;
  return static_cast<std::uint16_t>(sign | magnitude);
}

namespace detail {

// An 8-bit format with kMantissa bits of mantissa and the given bias. Adding 2^(e + 23 - kMantissa) to a
// number of exponent e leaves exactly kMantissa bits behind its leading one, rounded to nearest even by the
// adder; below the smallest normal the spacing stays that of the smallest normal.
template <int kMantissa, int kBias>
constexpr std::uint32_t round_to_minifloat(std::uint32_t magnitude, std::uint32_t largest_bits,
                                           std::uint32_t largest_code) {
  constexpr std::uint32_t kSmallest = static_cast<std::uint32_t>(128 - kBias) << 23;
  const std::uint32_t clamped = magnitude < largest_bits ? magnitude : largest_bits;
  const std::uint32_t exponent = clamped & kInfinityBits;
  const std::uint32_t e = exponent > kSmallest ? exponent : kSmallest;
  const std::uint32_t magic = e + (static_cast<std::uint32_t>(23 - kMantissa) << 23);
  const std::uint32_t steps = bits(from_bits(clamped) + from_bits(magic)) - magic;
  const std::uint32_t code = steps + (e >> (23 - kMantissa)) - ((128u - kBias) << kMantissa);
  return code < largest_code ? code : largest_code;
}

}  // namespace detail

/// Round to nearest even, saturating: |x| >= 448 and infinity give 0x7E with the sign, NaN gives 0x7F.
constexpr std::uint8_t f32_to_e4m3(float x) {
  const std::uint32_t u = bits(x), magnitude = u & ~kSignBit;
  const std::uint32_t code = detail::round_to_minifloat<3, 7>(magnitude, bits(448.0f), 0x7Eu);
  return static_cast<std::uint8_t>(magnitude > kInfinityBits ? 0x7Fu : code | (u >> 24 & 0x80u));
}

/// Round to nearest even, saturating: |x| >= 57344 and infinity give 0x7B with the sign, NaN gives 0x7F.
constexpr std::uint8_t f32_to_e5m2(float x) {
  const std::uint32_t u = bits(x), magnitude = u & ~kSignBit;
  const std::uint32_t code = detail::round_to_minifloat<2, 15>(magnitude, bits(57344.0f), 0x7Bu);
  return static_cast<std::uint8_t>(magnitude > kInfinityBits ? 0x7Fu : code | (u >> 24 & 0x80u));
}

/// Round to nearest, ties to the even code, saturating at 6; the sign of a zero is kept; NaN gives 0x7.
///
/// The code is 2a up to a = 2, a + 2 up to 4 and a / 2 + 4 from there: the least of three lines, each rounded
/// by adding it to 2^23 (plus an even number), where floats are one apart.
constexpr std::uint8_t f32_to_e2m1(float x) {
  constexpr float kOne = 8388608.0f;  // 2^23
  const std::uint32_t u = bits(x);
  const float a = from_bits(u & ~kSignBit);
  const float low = a * 2.0f + kOne, mid = a + (kOne + 2.0f), high = a * 0.5f + (kOne + 4.0f);
  float code = low < mid ? low : mid;
  code = code < high ? code : high;
  code = code < kOne + 7.0f ? code : kOne + 7.0f;  // NaN takes this branch
  return static_cast<std::uint8_t>((bits(code) & 7u) | (is_nan(x) ? 0u : u >> 28 & 8u));
}

/// Round toward +infinity, saturating at 0xFE, sign ignored; NaN gives 0xFF.
constexpr std::uint8_t f32_to_e8m0_up(float x) {
  const std::uint32_t a = bits(x) & ~kSignBit, exponent = a >> 23, mantissa = a & 0x7FFFFFu;
  const std::uint32_t up = exponent + (mantissa > (exponent == 0 ? 0x400000u : 0u) ? 1u : 0u);
  return static_cast<std::uint8_t>(a > kInfinityBits ? 0xFFu : up < 0xFEu ? up : 0xFEu);
}

/// Round to nearest power of two, 1.5 * 2^n up, saturating at 0xFE, sign ignored; NaN gives 0xFF.
constexpr std::uint8_t f32_to_e8m0_nearest(float x) {
  const std::uint32_t a = bits(x) & ~kSignBit, exponent = a >> 23, mantissa = a & 0x7FFFFFu;
  const std::uint32_t nearest = exponent + (mantissa >= (exponent == 0 ? 0x600000u : 0x400000u) ? 1u : 0u);
  return static_cast<std::uint8_t>(a > kInfinityBits ? 0xFFu : nearest < 0xFEu ? nearest : 0xFEu);
}

constexpr float e4m3_to_f32(std::uint8_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7Fu;
  const std::uint32_t small = bits(static_cast<float>(magnitude) * 0x1p-9f);
  const std::uint32_t normal = (magnitude << 20) + (120u << 23);
  return from_bits(sign | (magnitude == 0x7Fu ? kNanBits : magnitude < 8u ? small : normal));
}

constexpr float e5m2_to_f32(std::uint8_t code) {
  return f16_to_f32(static_cast<std::uint16_t>(code << 8));
}

constexpr float e2m1_to_f32(std::uint8_t code) {
  const std::uint32_t sign = (code & 8u) << 28, magnitude = code & 7u;
  const std::uint32_t normal = (magnitude << 22) + (126u << 23);
  return from_bits(sign | (magnitude < 2u ? magnitude * bits(0.5f) : normal));
}

constexpr float e8m0_to_f32(std::uint8_t code) {
  return from_bits(code == 0xFFu ? kNanBits
                   : code == 0u  ? 0x00400000u
                                 : static_cast<std::uint32_t>(code) << 23);
}

/// How a block's largest magnitude becomes an e8m0 scale: the exponent field of (bits + carry), less
/// `offset`, clamped to [0, 254]. `carry` decides from which mantissa on the exponent is taken one higher.
struct PowerOfTwoRule {
  std::uint32_t carry = 0;
  std::int32_t offset = 0;
  std::int32_t lowest = 0;
};

/// Infinity gives 0xFE, NaN 0xFF.
constexpr std::uint8_t power_of_two_scale(float amax, PowerOfTwoRule rule) {
  const std::uint32_t a = bits(amax) & ~kSignBit;
  const std::int32_t e = static_cast<std::int32_t>((a + rule.carry) >> 23) - rule.offset;
  const std::int32_t finite = e < rule.lowest ? rule.lowest : e;
  return static_cast<std::uint8_t>(a > kInfinityBits ? 0xFF : a == kInfinityBits ? 0xFE : finite);
}

/// 2^(127 - e), the exact reciprocal of an e8m0 scale; 0 for e = 0 (its reciprocal 2^127 would turn a block
/// that is all but zero into large codes), NaN for e = 0xFF.
constexpr float power_of_two_reciprocal(std::uint8_t e) {
  const std::uint32_t normal = (254u - e) << 23;
  return from_bits(e == 0xFFu ? kNanBits : e == 0u ? 0u : e == 0xFEu ? 0x00400000u : normal);
}

// amax / 448 is m / 1.75 * 2^(E - 8): at most one power of two above E - 8, reached when m > 1.75.
inline constexpr PowerOfTwoRule kScaleBy448{.carry = 0x7FFFFFu - 0x600000u, .offset = 8};
// amax / 6 likewise, with m > 1.5.
inline constexpr PowerOfTwoRule kScaleBy6Up{.carry = 0x7FFFFFu - 0x400000u, .offset = 2};
// The largest code is 6; [6, 7) is clipped to it and from 7 on the scale doubles.
inline constexpr PowerOfTwoRule kScaleBy6Nearest{.carry = 0x800000u - 0x600000u, .offset = 2};
inline constexpr PowerOfTwoRule kScaleBy6Floor{.carry = 0, .offset = 2};

}  // namespace moecore::numeric
