#pragma once
// Scans and reductions over a warp and over a block.

#include <cstdint>

namespace moecore::cuda::dev {

inline constexpr unsigned kWholeWarp = 0xFFFFFFFF;

/// Inclusive prefix sum over the lanes of a warp.
template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/// Exclusive prefix sum over the threads of a block of whole warps; `total` gets the sum of all. Only the
/// first `holders` warps have values other than 0. `scratch` holds 32 values and may be used again after the
/// next barrier.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* scratch, T* total, int holders) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T inclusive = warp_inclusive_scan(value);
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  constexpr int kFew = 8;  // whose sums every thread reads, in a third of the time that shuffles take
  if (holders <= kFew) {
    T all = 0, before = 0;
#pragma unroll
    for (int w = 0; w < kFew; ++w) {
      const T sum = w < holders ? scratch[w] : T{};
      all += sum;
      before += w < warp ? sum : T{};
    }
    *total = all;
    return inclusive - value + before;
  }
  const T sums = warp_inclusive_scan(lane < holders ? scratch[lane] : T{});
  *total = __shfl_sync(kWholeWarp, sums, 31);
  const T before = __shfl_sync(kWholeWarp, sums, warp > 0 ? warp - 1 : 0);
  return inclusive - value + (warp > 0 ? before : T{});
}

}  // namespace moecore::cuda::dev
