#pragma once
// Weight formats of the decode kernel: how eight weights of a row, k ascending, become four registers of
// pairs of the tokens' type T, and which scales apply.
//
//   kBits          of a weight
//   kBlock         weights along k that share a scale which travels with them; 0: none does
//   kScaleBytes    of such a scale
//   kRowScales     whole rows or matrices have a scale, which the epilogue applies
//   kGlobalScales  experts have nvfp4's factor
//   Codes          eight weights in memory
//   decode(codes)  exact
//   scale(p)       of a block of at least a chunk, as f32; smaller blocks' are applied in
//   decode_scaled(codes, p)

#include <cstddef>
#include <cstdint>

#include "cuda/device/convert.cuh"

namespace moecore::cuda::decode {

/// Weights of type T themselves.
template <class T>
struct FloatWeights {
  static constexpr int kBits = 16, kBlock = 0, kScaleBytes = 0;
  static constexpr bool kRowScales = false, kGlobalScales = false;
  using Codes = uint4;

  static __device__ __forceinline__ uint4 decode(const uint4& codes) { return codes; }
};

/// Two e4m3 codes as a pair of T. Every e4m3 value is one of f16 and of bf16; NaN stays NaN.
template <class T>
__device__ __forceinline__ unsigned e4m3_pair(unsigned codes) {
  unsigned pair;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(pair) : "h"(static_cast<std::uint16_t>(codes)));
#else
  pair = codes;
#endif
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
    const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
    return reinterpret_cast<const unsigned&>(narrow);
  }
  return pair;
}

/// e4m3. kScaleBlock 128: an f32 scale for every 128 of a row.
template <class T, int kScaleBlock>
struct Fp8Weights {
  static constexpr int kBits = 8, kBlock = kScaleBlock, kScaleBytes = 4;
  static constexpr bool kRowScales = kBlock == 0, kGlobalScales = false;
  using Codes = uint2;

  static __device__ __forceinline__ uint4 decode(const uint2& codes) {
    return {e4m3_pair<T>(codes.x), e4m3_pair<T>(codes.x >> 16), e4m3_pair<T>(codes.y),
            e4m3_pair<T>(codes.y >> 16)};
  }
  static __device__ __forceinline__ float scale(const std::byte* p) {
    return *reinterpret_cast<const float*>(p);
  }
};

/// Eight e2m1 codes as four pairs of T. A magnitude's three bits select its bytes out of eight, a byte
/// permute for four codes at a time; signs are the top bits of the codes, moved above the upper bytes.
template <class T>
__device__ __forceinline__ uint4 e2m1_pairs(unsigned codes) {
  // The magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6: upper and lower bytes. Those of f16 have no lower ones.
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr unsigned kUpper[] = {kBf16 ? 0x3F3F3F00u : 0x3E3C3800u, kBf16 ? 0x40404040u : 0x46444240u};
  constexpr unsigned kLower[] = {kBf16 ? 0xC0800000u : 0u, kBf16 ? 0xC0804000u : 0u};
  constexpr unsigned kInterleaveLow = 0x5140, kInterleaveHigh = 0x7362;  // bytes 0, 1 or 2, 3 of each in turn
  const unsigned magnitudes = codes & 0x77777777u, evens = codes << 4;
  auto four = [&](unsigned select, unsigned signs, unsigned& first, unsigned& second) {
    const unsigned upper = __byte_perm(kUpper[0], kUpper[1], select) | (signs & 0x80808080u);
    const unsigned lower = kBf16 ? __byte_perm(kLower[0], kLower[1], select) : 0;
    first = __byte_perm(lower, upper, kInterleaveLow);
    second = __byte_perm(lower, upper, kInterleaveHigh);
  };
  uint4 pairs;
  four(magnitudes, __byte_perm(evens, codes, kInterleaveLow), pairs.x, pairs.y);
  four(magnitudes >> 16, __byte_perm(evens, codes, kInterleaveHigh), pairs.z, pairs.w);
  return pairs;
}

/// e2m1 with an e8m0 scale for every 32 of a row.
template <class T>
struct Mxfp4Weights {
  static constexpr int kBits = 4, kBlock = 32, kScaleBytes = 1;
  static constexpr bool kRowScales = false, kGlobalScales = false;
  using Codes = unsigned;

  static __device__ __forceinline__ uint4 decode(unsigned codes) { return e2m1_pairs<T>(codes); }
  static __device__ __forceinline__ float scale(const std::byte* p) {
    const unsigned code = static_cast<unsigned>(*p);
    // 0 is 2^-127, a subnormal number, 255 NaN.
    return __uint_as_float(code << 23 | (code - 1 < 254 ? 0u : 0x00400000u));
  }
};

/// e2m1 with an e4m3 scale for every 16 of a row.
template <class T>
struct Nvfp4Weights {
  static constexpr int kBits = 4, kBlock = 16, kScaleBytes = 1;
  static constexpr bool kRowScales = false, kGlobalScales = true;
  using Codes = unsigned;

  static __device__ __forceinline__ uint4 decode(unsigned codes) { return e2m1_pairs<T>(codes); }
  /// The codes' values times the scale at p: at most six significant bits, exact in T.
  static __device__ __forceinline__ uint4 decode_scaled(unsigned codes, const std::byte* p) {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    const unsigned code = static_cast<unsigned>(*p), scale = e4m3_pair<T>(code | code << 8);
    uint4 pairs = decode(codes);
    for (unsigned* v : {&pairs.x, &pairs.y, &pairs.z, &pairs.w}) {
      const Pair product = __hmul2(reinterpret_cast<const Pair&>(*v), reinterpret_cast<const Pair&>(scale));
      *v = reinterpret_cast<const unsigned&>(product);
    }
    return pairs;
  }
};

}  // namespace moecore::cuda::decode
