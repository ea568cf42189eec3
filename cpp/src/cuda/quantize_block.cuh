#pragma once
// The rules of quantize on the device: from 16 columns to their largest magnitude, from a block's largest
// magnitude to its scale, from a scale to codes. The kernels of quantize and whoever quantises what it has
// just computed share them, and so the bits.

#include <cstdint>
#include <type_traits>

#include "core/numeric.h"
#include "cuda/device/convert.cuh"
#include "cuda/device/fp8_fp4.cuh"
#include "cuda/device/math.cuh"
#include "cuda/quantize_policy.h"
#include "cuda/scale_rule.h"

namespace moecore::cuda {

enum class Encoding { kTensor, kToken, kBlock128, kNvfp4, kMxfp8, kMxfp4 };

constexpr bool is_fp4(Encoding e) {
  return e == Encoding::kNvfp4 || e == Encoding::kMxfp4;
}
/// Units of a block.
constexpr int units_of_block(Encoding e) {
  return e == Encoding::kBlock128 ? 8 : e == Encoding::kMxfp8 || e == Encoding::kMxfp4 ? 2 : 1;
}

/// Pairs of 16-bit elements, for the instructions that do two at once.
template <class T>
using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

/// 16 elements as they are in memory: half the registers that floats would take for 16-bit types.
template <class T>
struct alignas(16) Unit {
  T values[kUnit];

  __device__ __forceinline__ float operator[](int e) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction on the word, not two on its half
      const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(values)[e / 2];
      return __uint_as_float(e % 2 ? word & 0xFFFF0000u : word << 16);
    } else {
      return dev::to_f32(values[e]);
    }
  }

  /// Rounds elements e and e + 1, e even.
  __device__ __forceinline__ void set_two(int e, float a, float b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      reinterpret_cast<__nv_bfloat162*>(values)[e / 2] = __floats2bfloat162_rn(a, b);
    else if constexpr (std::is_same_v<T, __half>)
      reinterpret_cast<__half2*>(values)[e / 2] = __floats2half2_rn(a, b);
    else
      values[e] = a, values[e + 1] = b;
  }
};

/// Largest magnitude of a unit, NaN where there is one.
template <class T>
__device__ __forceinline__ float amax_or_nan(const Unit<T>& unit) {
  if constexpr (sizeof(T) == 2) {
    const auto* pairs = reinterpret_cast<const Two<T>*>(unit.values);
    Two<T> of_two[kUnit / 4];
#pragma unroll
    for (int i = 0; i < kUnit / 4; ++i) of_two[i] = dev::larger_or_nan(pairs[2 * i], pairs[2 * i + 1]);
    const Two<T> amax = __habs2(dev::larger_or_nan(dev::larger_or_nan(of_two[0], of_two[1]),
                                                   dev::larger_or_nan(of_two[2], of_two[3])));
    return dev::to_f32(__hmax_nan(amax.x, amax.y));
  } else {
    float amax = fabsf(unit[0]);
#pragma unroll
    for (int e = 1; e < kUnit; ++e) amax = dev::max_or_nan(amax, fabsf(unit[e]));
    return amax;
  }
}

/// The largest that is not NaN, NaN if there is none: what a scale is made from.
template <class T>
__device__ __forceinline__ float amax_beside_nan(const Unit<T>& unit) {
  float amax = fabsf(unit[0]);
#pragma unroll
  for (int e = 1; e < kUnit; ++e) amax = fmaxf(amax, fabsf(unit[e]));
  return amax;
}

template <class T>
__device__ __forceinline__ float unit_amax(const Unit<T>& unit) {
  const float amax = amax_or_nan(unit);
  return amax >= 0.0f ? amax : amax_beside_nan(unit);
}

__device__ __forceinline__ float reciprocal(float scale) {
  return scale == 0.0f ? 0.0f : __frcp_rn(scale);
}

__device__ __forceinline__ float clamp_amax(const ScaleRule& rule, float amax) {
  return fminf(amax > rule.amax_floor ? amax : rule.amax_floor, rule.amax_cap);
}

/// A block's scale (a byte or the bits of an f32) and the factor that brings its elements to codes.
struct BlockScale {
  std::uint32_t bits;
  float factor;
};

/// Of blocks that most are: no NaN, a magnitude far from the ends of f32, a positive factor, and for fp4
/// products below 7 (mxfp4: 8) with the elements. False for the others, and for some that are like most.
template <Encoding kEncoding>
__device__ __forceinline__ bool tame_scale(const ScaleRule& rule, float amax, float global, float rcp_global,
                                           bool f32_scales, BlockScale& scale) {
  if constexpr (kEncoding == Encoding::kNvfp4) {
    const std::uint32_t byte = dev::e4m3(__fmul_rn(global, __fmul_rn(amax, 1.0f / 6)));
    const float d = __fmul_rn(dev::e4m3_value(byte), rcp_global);
    scale = {byte, dev::reciprocal_of_normal(d)};
    return d >= 0x1p-100f && d <= 0x1p100f && amax * scale.factor < 7.0f;
  } else if (kEncoding == Encoding::kBlock128 && !rule.power_of_two) {
    const float clamped = fminf(fmaxf(amax, rule.amax_floor), rule.amax_cap);
    // The quotient by its remainder: right for every mantissa.
    const float q = __fmul_rn(clamped, 1.0f / 448);
    const float s = __fmaf_rn(__fmaf_rn(-448.0f, q, clamped), 1.0f / 448, q);
    scale = {__float_as_uint(s), dev::reciprocal_of_normal(s)};
    return amax >= 0.0f && clamped >= 0x1p-100f && clamped <= 0x1p100f;
  } else {
    if (kEncoding == Encoding::kBlock128)
      amax = dev::min_or_nan(dev::max_or_nan(amax, rule.amax_floor), rule.amax_cap);
    const int e =
        static_cast<int>((__float_as_uint(amax) + rule.exponent.carry) >> 23) - rule.exponent.offset;
    const int byte = max(e, rule.exponent.lowest);
    scale = {static_cast<std::uint32_t>(f32_scales ? byte << 23 : byte), __uint_as_float((254 - byte) << 23)};
    // Exponents with which twice and half of the factor are normal numbers too. NaN and infinity have others.
    return byte >= 2 && byte <= 240 && (kEncoding != Encoding::kMxfp4 || amax * scale.factor < 8.0f);
  }
}

/// Of any block. `amax` is NaN if all of it is.
template <Encoding kEncoding>
__device__ __forceinline__ BlockScale block_scale(const ScaleRule& rule, float amax, float global,
                                                  float rcp_global, bool f32_scales) {
  if constexpr (kEncoding == Encoding::kNvfp4) {
    const std::uint32_t byte = dev::e4m3(__fmul_rn(global, __fmul_rn(amax, 1.0f / 6)));
    const float s = dev::e4m3_value(byte);
    return {byte, s == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(s, rcp_global))};
  } else {
    constexpr bool kFp8 = kEncoding == Encoding::kBlock128 || kEncoding == Encoding::kToken;
    if (kFp8) amax = clamp_amax(rule, amax);
    if (kFp8 && !rule.power_of_two) {
      const float s = __fdiv_rn(amax, 448.0f);
      return {__float_as_uint(s), reciprocal(s)};
    }
    const std::uint8_t byte = numeric::power_of_two_scale(amax, rule.exponent);
    return {f32_scales ? __float_as_uint(numeric::e8m0_to_f32(byte)) : byte,
            numeric::power_of_two_reciprocal(byte)};
  }
}

/// The codes of a unit: 16 bytes of e4m3, or 8 of e2m1 in the first two words.
struct Codes {
  std::uint32_t words[4];
};

/// e2m1 codes of a unit without NaN whose scale is tame. A power of two keeps the elements' own format exact,
/// and two of them go through at once; f16 has the factor's range only near 1.
template <Encoding kEncoding, class T>
__device__ __forceinline__ void encode_tame(const Unit<T>& unit, float factor, Codes& codes) {
  const auto* words = reinterpret_cast<const std::uint32_t*>(unit.values);
  const bool by_pairs = kEncoding == Encoding::kMxfp4 &&
                        (std::is_same_v<T, __nv_bfloat16> || (factor >= 0x1p-13f && factor <= 0x1p14f));
#pragma unroll
  for (int i = 0; i < kUnit / 8; ++i) {
    std::uint32_t magnitudes;
    if (by_pairs) {
      magnitudes = dev::e2m1_of_pairs(reinterpret_cast<const Two<T>*>(words + i * 4), factor);
    } else {
      float a[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) a[e] = __fmul_rn(fabsf(unit[i * 8 + e]), factor);
      magnitudes = dev::e2m1_magnitudes<kEncoding == Encoding::kNvfp4>(a);
    }
    codes.words[i] = magnitudes | dev::nibble_signs(words + i * 4);
  }
}

/// The codes of a unit, whatever it holds.
template <Encoding kEncoding, class T>
__device__ __forceinline__ void encode_any(const Unit<T>& unit, float factor, Codes& codes) {
  constexpr bool kFp4 = is_fp4(kEncoding);
  constexpr int kPerWord = kFp4 ? 8 : 4;
#pragma unroll
  for (int i = 0; i < kUnit / kPerWord; ++i) {
    float y[kPerWord];
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) y[e] = __fmul_rn(unit[i * kPerWord + e], factor);
    codes.words[i] = kFp4 ? dev::e2m1x8(y) : dev::e4m3x4(y);
  }
}

/// Whether the elements have a shorter way to their codes when their scale is tame.
template <Encoding kEncoding, class T>
constexpr bool has_tame_codes() {
  return is_fp4(kEncoding) && sizeof(T) == 2 && !MOECORE_HAS_E2M1_INSTRUCTION;
}

}  // namespace moecore::cuda
