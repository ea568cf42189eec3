#pragma once
// f32 to e4m3 and e2m1, and e4m3 back. The same bits on every architecture: where there is no instruction,
// the software form follows its rule, which is that of core/numeric.h.
//
//   e4m3  to nearest even, saturating, NaN = 0x7F   instruction from sm_89 on
//   e2m1  to nearest even, saturating, NaN = 0x7    instruction on sm_100a, sm_120a and their families

#include <cuda_fp16.h>

#include <cstdint>

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

/// The eight codes of magnitudes, none NaN, without signs: 4 sat(a / 2) + 2 sat(a / 2 - 1) + sat(a / 2 - 2),
/// each step exact but for the one that lands between integers of 2^23. Saturation comes free with a
/// multiply-add, where a minimum takes a slot of the half-rate pipe.
__device__ __forceinline__ std::uint32_t e2m1_magnitudes(const float* a) {
  constexpr float kOne = 8388608.0f;
  std::uint32_t codes = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float low = __saturatef(__fmul_rn(a[i], 0.5f));
    const float mid = __saturatef(__fmaf_rn(a[i], 0.5f, -1.0f));
    const float high = __saturatef(__fmaf_rn(a[i], 0.5f, -2.0f));
    const float sum = __fadd_rn(__fmaf_rn(mid, 2.0f, __fmaf_rn(low, 4.0f, kOne)), high);
    codes = codes * 16 + __float_as_uint(sum);
  }
  return codes - 0xFB000000u;  // eight exponents of 2^23, modulo 2^32
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
