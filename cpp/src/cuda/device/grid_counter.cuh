#pragma once
// A counter that the blocks of a grid share.

#include "cuda/device/async.cuh"

namespace moecore::cuda::dev {

/// In memory that may have held anything before: it counts only while it is open. One thread of the grid
/// opens it, all that use it wait for that, and who takes the last number closes it for the grid that comes
/// next.
struct GridCounter {
  static constexpr unsigned long long kOpen = 0x6D6F65636F726521ull;

  unsigned long long state;
  unsigned next;

  __device__ __forceinline__ void open(unsigned first) {
    next = first;
    store_release(&state, kOpen);
  }
  /// An acquire: it empties the L1 cache.
  __device__ __forceinline__ void await_open() const {
    while (load_acquire(&state) != kOpen) {
    }
  }
  /// A number that nobody else gets; `last` is the one behind which nobody asks.
  __device__ __forceinline__ unsigned take(unsigned last) {
    const unsigned number = atomicAdd(&next, 1);
    if (number == last) state = 0;
    return number;
  }
};

}  // namespace moecore::cuda::dev
