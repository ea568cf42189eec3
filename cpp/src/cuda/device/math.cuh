#pragma once
// exp, logistic products and the normal distribution in f32: operation for operation those of
// cpu/simd/math.inl, so that both engines give the same bits. Comparisons are written so that NaN passes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moecore::cuda::dev {

__device__ __forceinline__ float min_or_second(float a, float b) {
  return a < b ? a : b;
}
__device__ __forceinline__ float max_or_second(float a, float b) {
  return a > b ? a : b;
}

/// NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

/// Of each half the larger magnitude, NaN if either is; its sign means nothing. From sm_86 on one
/// instruction, where taking the magnitudes first makes two of every element pair.
template <class Two>
__device__ __forceinline__ Two larger_or_nan(Two a, Two b) {
#if __CUDA_ARCH__ >= 860
  std::uint32_t r;
  const std::uint32_t x = reinterpret_cast<const std::uint32_t&>(a),
                      y = reinterpret_cast<const std::uint32_t&>(b);
  if constexpr (std::is_same_v<Two, __half2>)
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  else
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return reinterpret_cast<const Two&>(r);
#else
  return __hmax2_nan(__habs2(a), __habs2(b));
#endif
}

/// A number in two factors, `scale` a power of two: a product below 2^-126 is rounded once.
struct Scaled {
  float value, scale;

  __device__ __forceinline__ float product() const { return value * scale; }
};

/// e^x = 2^n * p, where p = e^r, x = n * ln 2 + r and |r| <= ln 2 / 2.
struct ReducedExp {
  // Adding 1.5 * 2^23 rounds to a whole number in the low mantissa bits.
  static constexpr float kMagic = 12582912.0f;
  float shifted, p;  // n + kMagic
};
__device__ __forceinline__ ReducedExp reduced_exp(float x) {
  const float shifted = __fmaf_rn(x, 0x1.715476p+0f, ReducedExp::kMagic), n = shifted - ReducedExp::kMagic;
  float r = __fmaf_rn(n, -0x1.62e430p-1f, x);
  r = __fmaf_rn(n, 0x1.05c610p-29f, r);
  float q = 0.0013814486131f;
  q = __fmaf_rn(q, r, 0.00836878055309f);
  q = __fmaf_rn(q, r, 0.0416683938952f);
  q = __fmaf_rn(q, r, 0.166665201068f);
  q = __fmaf_rn(q, r, 0.499999934136f);
  return {shifted, __fmaf_rn(r * r, q, r) + 1.0f};
}

/// e^x in two factors. NaN, infinities, overflow and denormal results as in the exact function.
__device__ __forceinline__ Scaled scaled_exp(float x) {
  const auto [shifted, p] = reduced_exp(min_or_second(130.0f, max_or_second(-176.1f, x)));
  // 2^n as two powers: each a normal number, or 0 for n < -252.
  const int whole = __float_as_int(shifted) - __float_as_int(ReducedExp::kMagic), half = whole >> 1;
  return {p * __int_as_float((half + 127) << 23), __int_as_float((whole - half + 127) << 23)};
}

__device__ __forceinline__ float exp(float x) {
  return scaled_exp(x).product();
}

/// 1 / (1 + e) or e / (1 + e) for e in [0, 1], rounded once: n is 1 or e, d the rounded 1 + e. Without the
/// branches of the general division, so that several overlap. Exhaustive over e and over reciprocals that are
/// off by one unit: the correction is right for all but 1 / (2 - 2^-23), where the exact quotient lies just
/// above a tie.
__device__ __forceinline__ float divide_by_one_plus(float n, float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  r = __fmaf_rn(__fmaf_rn(-d, r, 1.0f), r, r);
  const float q = n * r, corrected = __fmaf_rn(__fmaf_rn(-d, q, n), r, q);
  return d == 0x1.fffffep+0f && n == 1.0f ? 0x1.000002p-1f : corrected;
}

/// 1 / (1 + e^-x), to the last bits also where it is tiny. NaN passes.
__device__ __forceinline__ float sigmoid(float x) {
  const float e = exp(-fabsf(x));
  return divide_by_one_plus(x < 0.0f ? e : 1.0f, 1.0f + e);
}

/// 1 / d for normal d, rounded once; 0 where that is below 2^-126. What the compiler makes of __frcp_rn,
/// without its range checks.
__device__ __forceinline__ float reciprocal_of_normal(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
}

/// 1 / (1 + e^-(y + y_lo)), 0 where that is below 2^-126; y_lo is what rounding y left over.
__device__ __forceinline__ float logistic(float y, float y_lo) {
  const float x = fminf(88.5f, fmaxf(-60.0f, -y));
  constexpr float kMagic = 12582912.0f;
  const float shifted = __fmaf_rn(x, 0x1.715476p+0f, kMagic), n = shifted - kMagic;
  const float r = __fmaf_rn(n, -0x1.62e430p-1f, x) - y_lo;
  float p = 0.00829027221f;
  p = __fmaf_rn(p, r, 0.0418981612f);
  p = __fmaf_rn(p, r, 0.166676387f);
  p = __fmaf_rn(p, r, 0.499991477f);
  p = __fmaf_rn(p, r, 0.999999702f);
  p = __fmaf_rn(p, r, 1.0f);
  return reciprocal_of_normal(1.0f + __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23)));
}

/// e^-(t + t_lo), where t_lo is what rounding t left over.
__device__ __forceinline__ Scaled exp_minus(float t, float t_lo) {
  const Scaled e = scaled_exp(-t);
  return {__fmaf_rn(e.value, -t_lo, e.value), e.scale};
}

/// x / (1 + e^-x).
__device__ __forceinline__ float silu(float x) {
  return x * logistic(x, 0.0f);
}

/// x / (1 + e^(-alpha x)).
__device__ __forceinline__ float swish(float x, float alpha) {
  const float y = alpha * x;
  // Beyond 110 the logistic is 0 or 1, and the remainder of an overflowed product would be infinite.
  return x * logistic(y, fabsf(y) < 110.0f ? __fmaf_rn(alpha, x, -y) : 0.0f);
}

/// x * Phi(x).
__device__ __forceinline__ float gelu(float x) {
  // q = Phi(-t) = e^(-t^2 / 2) * R(t), 0 for t > 18.8.
  const float t = min_or_second(20.0f, fabsf(x));
  const float square = t * t, square_lo = __fmaf_rn(t, t, -square);
  const Scaled e = exp_minus(0.5f * square, 0.5f * square_lo);
  const float t4 = t + 4.0f, s = (t - 4.0f) / t4;
  float p = -0.000131967562031f;
  p = __fmaf_rn(p, s, 0.0001793636191f);
  p = __fmaf_rn(p, s, 0.00156992668645f);
  p = __fmaf_rn(p, s, -0.00351255910153f);
  p = __fmaf_rn(p, s, -0.00752527428465f);
  p = __fmaf_rn(p, s, 0.0604038318745f);
  p = __fmaf_rn(p, s, -0.186523440931f);
  p = __fmaf_rn(p, s, 0.387136901077f);
  p = __fmaf_rn(p, s, -0.607896588291f);
  p = __fmaf_rn(p, s, 0.755285135384f);
  const float q = e.value * p / t4;
  const bool negative = x < 0.0f;
  return x * (negative ? q : 1.0f - q * e.scale) * (negative ? e.scale : 1.0f);
}

/// x / (1 + e^-y), y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
  // y = t * (c0 + c1 t^2) with what each step lost; at t = 20 the exponential is 0.
  const float t = min_or_second(20.0f, fabsf(x));
  constexpr float c0 = 0x1.988454p+0f, c0_lo = -0x1.857936p-25f;
  constexpr float c1 = 0x1.2444f2p-4f, c1_lo = 0x1.49b16ap-29f;
  const float square = t * t, square_lo = __fmaf_rn(t, t, -square);
  const float cubic = c1 * square;
  const float cubic_lo = __fmaf_rn(c1, square_lo, __fmaf_rn(c1_lo, square, __fmaf_rn(c1, square, -cubic)));
  const float large = max_or_second(c0, cubic), small = min_or_second(c0, cubic), p = large + small;
  const float p_lo = (small - (p - large)) + (c0_lo + cubic_lo);
  const float y = t * p, y_lo = __fmaf_rn(t, p_lo, __fmaf_rn(t, p, -y));
  return x * logistic(x < 0.0f ? -y : y, x < 0.0f ? -y_lo : y_lo);
}

}  // namespace moecore::cuda::dev
