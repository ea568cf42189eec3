#pragma once
// Conversions of elements to and from f32 (round to nearest even), and vectors of elements.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moecore::cuda::dev {

__device__ __forceinline__ float to_f32(float x) {
  return x;
}
__device__ __forceinline__ float to_f32(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_f32<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Converted by fp8_fp4.cuh, two or four at a time.
struct E4M3 {
  unsigned char bits;
};

/// N elements of T as one aligned vector.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

}  // namespace moecore::cuda::dev
