#pragma once
// Codes of quantised operands as 16-bit floats, and scales as f32; both without rounding.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/grouped_gemm/args.h"

namespace moecore::cuda {

/// An operand's elements in memory: T itself, or codes.
struct E4m3Codes {};
struct E2m1Codes {};
template <class T>
inline constexpr int kBits = sizeof(T) * 8;
template <>
inline constexpr int kBits<E4m3Codes> = 8;
template <>
inline constexpr int kBits<E2m1Codes> = 4;

__device__ __forceinline__ std::uint32_t multiply_pair(std::uint32_t a, float b, __half) {
  const __half2 r = __hmul2(reinterpret_cast<const __half2&>(a), __float2half2_rn(b));
  return reinterpret_cast<const std::uint32_t&>(r);
}
__device__ __forceinline__ std::uint32_t multiply_pair(std::uint32_t a, float b, __nv_bfloat16) {
  const __nv_bfloat162 r = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), __float2bfloat162_rn(b));
  return reinterpret_cast<const std::uint32_t&>(r);
}

/// Two e4m3 codes, in the high bytes of the halves of `codes`, as a pair of T. As the exponent and the top of
/// the mantissa of T a code is its value times a power of two, subnormal or not; NaN is put in by hand.
template <class T>
__device__ __forceinline__ std::uint32_t e4m3_pair(std::uint32_t codes) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const std::uint32_t fields =
      (codes & 0x80008000u) | (codes >> (kHalf ? 1 : 4) & (kHalf ? 0x3F803F80u : 0x07F007F0u));
  const std::uint32_t nan = __vcmpeq2(codes & 0x7F007F00u, 0x7F007F00u) & 0x7FFF7FFFu;
  return multiply_pair(fields, kHalf ? 0x1p8f : 0x1p120f, T{}) | nan;
}

/// Two e2m1 codes, in the high nibbles of the halves of `codes`, as a pair of T.
template <class T>
__device__ __forceinline__ std::uint32_t e2m1_pair(std::uint32_t codes) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const std::uint32_t fields =
      (codes & 0x80008000u) | (codes >> (kHalf ? 3 : 6) & (kHalf ? 0x0E000E00u : 0x01C001C0u));
  return multiply_pair(fields, kHalf ? 0x1p14f : 0x1p126f, T{});
}

/// Elements 4i .. 4i+3 of a row in shared memory, as two pairs of T.
template <class T, class Stored>
__device__ __forceinline__ uint2 four_elements(const std::byte* row, int i) {
  if constexpr (std::is_same_v<Stored, E4m3Codes>) {
    const std::uint32_t codes = reinterpret_cast<const std::uint32_t*>(row)[i];
    return {e4m3_pair<T>(__byte_perm(codes, 0, 0x1404)), e4m3_pair<T>(__byte_perm(codes, 0, 0x3424))};
  } else if constexpr (std::is_same_v<Stored, E2m1Codes>) {
    const std::uint32_t codes = reinterpret_cast<const std::uint16_t*>(row)[i];
    return {e2m1_pair<T>((codes << 12 & 0xF000u) | codes << 24),
            e2m1_pair<T>((codes << 4 & 0xF000u) | codes << 16)};
  } else {
    return reinterpret_cast<const uint2*>(row)[i];
  }
}

/// One element of a row in shared memory.
template <class Stored>
__device__ __forceinline__ float element(const std::byte* row, int k) {
  auto low = [](std::uint32_t pair) {
    const __half2 halves = reinterpret_cast<const __half2&>(pair);
    return __low2float(halves);
  };
  if constexpr (std::is_same_v<Stored, E4m3Codes>)
    return low(e4m3_pair<__half>(static_cast<std::uint32_t>(row[k]) << 8));
  else if constexpr (std::is_same_v<Stored, E2m1Codes>)
    return low(e2m1_pair<__half>((static_cast<std::uint32_t>(row[k / 2]) >> k % 2 * 4 & 15) << 12));
  else
    return reinterpret_cast<const float*>(row)[k];
}

/// The bytes of a scale, as read.
__device__ __forceinline__ std::uint32_t read_scale(const std::byte* at, DType type) {
  return type == DType::kF32 ? __ldg(reinterpret_cast<const std::uint32_t*>(at))
                             : __ldg(reinterpret_cast<const std::uint8_t*>(at));
}

__device__ __forceinline__ float e8m0_to_f32(std::uint32_t code) {
  constexpr std::uint32_t kNan = 0x7FC00000u, kLeast = 0x00400000u;  // 2^-127 is subnormal
  return __uint_as_float(code == 255 ? kNan : code == 0 ? kLeast : code << 23);
}

__device__ __forceinline__ float scale_to_f32(std::uint32_t bits, DType type) {
  if (type == DType::kF32) return __uint_as_float(bits);
  if (type == DType::kE8M0) return e8m0_to_f32(bits);
  const std::uint32_t pair = e4m3_pair<__half>(bits << 8);
  return __low2float(reinterpret_cast<const __half2&>(pair));
}

/// What the sums of an expert are multiplied by on account of global scales.
__device__ __forceinline__ float global_factor(const GroupedGemmArgs& args, int expert) {
  float factor = 1.0f;
  if (const float* g = args.weight_scales.global_scale)
    factor = __frcp_rn(__ldg(g + (args.weight_scales.global_scale_per_expert ? expert : 0)));
  if (const float* g = args.x_scales.global_scale) factor *= __frcp_rn(__ldg(g));
  return factor;
}

}  // namespace moecore::cuda
