#pragma once
// Single instructions that CUDA C++ does not spell.

namespace moecore::cuda::dev {

/// Waits until every kernel before this one in the stream has finished and its writes are visible. The first
/// thing each thread of a dependent kernel does before it reads or writes global memory.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel of the stream start its prologue. Visibility is unaffected: it still waits for the
/// end.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moecore::cuda::dev
