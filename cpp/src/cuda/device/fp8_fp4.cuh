#pragma once
// f32 to e4m3 and e2m1, and e4m3 back. The same bits on every architecture: where there is no instruction,
// the software form follows its rule, which is that of core/numeric.h.
//
//   e4m3  to nearest even, saturating, NaN = 0x7F   instruction from sm_89 on
//   e2m1  to nearest even, saturating, NaN = 0x7    instruction on sm_100a, sm_120a and their families

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moecore::cuda::dev {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && \
    (defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
#define MOECORE_HAS_E2M1_INSTRUCTION 1
#else
#define MOECORE_HAS_E2M1_INSTRUCTION 0
#endif

__device__ __forceinline__ std::uint32_t e4m3_software(float y) {
  const std::uint32_t u = __float_as_uint(y), magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7F;
  const std::uint32_t a = min(magnitude, __float_as_uint(448.0f));
  const std::uint32_t e = max(a & 0x7F800000u, __float_as_uint(0x1p-6f));
  const std::uint32_t magic =
      e + (20u << 23);  // adding 2^(exponent + 20) leaves three bits behind the leading one
  const std::uint32_t steps = __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(magic))) - magic;
  return (steps + (e >> 20) - 968u) | (u >> 24 & 0x80u);
}

/// Two codes, `low` in the low byte.
__device__ __forceinline__ std::uint32_t e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return e4m3_software(low) | e4m3_software(high) << 8;
#endif
}

/// One code.
__device__ __forceinline__ std::uint32_t e4m3(float y) {
#if __CUDA_ARCH__ >= 890
  std::uint32_t code;  // the whole register, which the conversion clears: nothing is left to mask
  asm("{ .reg .b16 c, zero; mov.b16 zero, 0; cvt.rn.satfinite.e4m3x2.f32 c, %1, %2; mov.b32 %0, {c, zero}; }"
      : "=r"(code)
      : "f"(0.0f), "f"(y));
  return code;
#else
  return e4m3_software(y);
#endif
}

/// Four codes.
__device__ __forceinline__ std::uint32_t e4m3x4(const float* y) {
  return e4m3x2(y[0], y[1]) | e4m3x2(y[2], y[3]) << 16;
}

/// The values of two codes, the low byte's first.
__device__ __forceinline__ float2 e4m3x2_to_f32(std::uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  __half2_raw halves;
  asm("{ .reg .b32 h; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {%0, %1}, h; }"
      : "=h"(halves.x), "=h"(halves.y)
      : "h"(static_cast<std::uint16_t>(codes)));
  return __half22float2(halves);
#else
  // As an f16 with the code's exponent and mantissa at the top of its fields, a value is 2^-8 of itself.
  auto value = [](std::uint32_t code) {
    const auto bits = static_cast<std::uint16_t>((code & 0x80u) << 8 | (code & 0x7Fu) << 7);
    return (code & 0x7Fu) == 0x7Fu ? __uint_as_float(0x7FC00000u)
                                   : __half2float(__ushort_as_half(bits)) * 256.0f;
  };
  return {value(codes & 0xFFu), value(codes >> 8 & 0xFFu)};
#endif
}

/// Eight codes, y[0] in the lowest nibble.
__device__ __forceinline__ std::uint32_t e2m1x8(const float* y) {
#if MOECORE_HAS_E2M1_INSTRUCTION
  std::uint32_t codes;
  asm("{ .reg .b8 b<4>;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3}; }"
      : "=r"(codes)
      : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
  return codes;
#else
  // The code is the least of 2a, a + 2, a / 2 + 4 and 7, each rounded by adding it to 2^23 (plus an even
  // number), where floats are one apart: it stands in the low bits of the sum. NaN falls through to 7, and
  // the product it came from has no sign bit.
  constexpr float kOne = 8388608.0f;
  std::uint32_t codes = 0, signs = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float a = fabsf(y[i]);
    const float least = fminf(fminf(__fmaf_rn(a, 2.0f, kOne), __fadd_rn(a, kOne + 2.0f)),
                              fminf(__fmaf_rn(a, 0.5f, kOne + 4.0f), kOne + 7.0f));
    codes = codes * 16 + __float_as_uint(least);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) signs = signs >> 4 | (__float_as_uint(y[i]) & 0x80000000u);
  // What the eight exponents of 2^23 add up to, modulo 2^32.
  return (codes - 0xFB000000u) | signs;
#endif
}

/// The value of an e4m3 code without sign.
__device__ __forceinline__ float e4m3_value(std::uint32_t code) {
#if __CUDA_ARCH__ >= 890
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(code)));
  return __half2float(__ushort_as_half(static_cast<std::uint16_t>(halves)));
#else
  const std::uint32_t magnitude = code & 0x7Fu;
  const float normal = __uint_as_float((magnitude << 20) + (120u << 23));
  const float small = static_cast<float>(magnitude) * 0x1p-9f;
  return magnitude == 0x7Fu ? __uint_as_float(0x7FC00000u) : magnitude < 8u ? small : normal;
#endif
}

/// The eight codes of magnitudes below 8, without signs: the lines of e2m1x8, whose sums are ordered like
/// integers. Below 7 there is nothing to saturate.
template <bool kBelow7>
__device__ __forceinline__ std::uint32_t e2m1_magnitudes(const float* a) {
  constexpr float kOne = 8388608.0f;
  std::uint32_t codes = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const int low = __float_as_int(__fmaf_rn(a[i], 2.0f, kOne));
    const int mid = __float_as_int(__fadd_rn(a[i], kOne + 2.0f));
    const int high = __float_as_int(__fmaf_rn(a[i], 0.5f, kOne + 4.0f));
    const int least = __vimin3_s32(low, mid, high);
    codes = codes * 16 + static_cast<std::uint32_t>(kBelow7 ? least : min(least, 0x4B000007));
  }
  return codes - 0xFB000000u;  // eight exponents of 2^23, modulo 2^32
}

/// The same for the magnitudes of eight 16-bit elements times a power of two, saturating, for products below
/// 8: the lines in the elements' own format, around the number from which on its values are one apart.
template <class Two>
__device__ __forceinline__ std::uint32_t e2m1_of_pairs(const Two* x, float factor) {
  constexpr bool kHalf = std::is_same_v<Two, __half2>;
  constexpr float kOne = kHalf ? 1024.0f : 128.0f;
  auto both = [](float value) {
    if constexpr (kHalf)
      return __float2half2_rn(value);
    else
      return __float2bfloat162_rn(value);
  };
  const Two f2 = both(factor * 2.0f), f1 = both(factor), fh = both(factor * 0.5f);
  std::uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Two a = __habs2(x[i]);
    const Two low = __hfma2(a, f2, both(kOne)), mid = __hfma2(a, f1, both(kOne + 2.0f));
    const Two high = __hfma2(a, fh, both(kOne + 4.0f));
    const Two least = __hmin2(__hmin2(__hmin2(low, mid), high), both(kOne + 7.0f));
    sums[i] = *reinterpret_cast<const std::uint32_t*>(&least);
  }
  // The low byte of each sum is a code: even columns and odd ones, each in order.
  const std::uint32_t p = __byte_perm(sums[0], sums[1], 0x6240), q = __byte_perm(sums[2], sums[3], 0x6240);
  return __byte_perm(p, q, 0x5410) + __byte_perm(p, q, 0x7632) * 16u;
}

/// The signs of eight 16-bit elements in four words, each in the highest bit of its element's nibble.
__device__ __forceinline__ std::uint32_t nibble_signs(const std::uint32_t* words) {
  // Bytes 1 and 3 of a word hold the signs of its two elements.
  const std::uint32_t p = __byte_perm(words[0], words[1], 0x7351),
                      q = __byte_perm(words[2], words[3], 0x7351);
  const std::uint32_t even = __byte_perm(p, q, 0x5410), odd = __byte_perm(p, q, 0x7632);
  return (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
}

}  // namespace moecore::cuda::dev
