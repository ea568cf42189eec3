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

/// The two halves of a barrier over all threads of the cluster. Writes before the arrival of one thread are
/// visible after the wait of another.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// What `p`, an address in this block's shared memory, holds in block `rank` of the cluster.
__device__ __forceinline__ int load_from_block(const int* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  int value;
  const auto local = static_cast<unsigned>(__cvta_generic_to_shared(p));
  asm volatile(
      "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, %1, %2; ld.shared::cluster.s32 %0, [remote]; }"
      : "=r"(value)
      : "r"(local), "r"(rank)
      : "memory");
  return value;
#else
  return rank == 0 ? *p : 0;
#endif
}

}  // namespace moecore::cuda::dev
