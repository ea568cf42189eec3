#pragma once
// Single instructions that CUDA C++ does not spell.

#include <cstdint>

#include "cuda/device/async.cuh"

namespace moecore::cuda::dev {

/// A value that all lanes have, so that the compiler knows it too: for addresses in uniform registers.
__device__ __forceinline__ int uniform(int value) {
  return __shfl_sync(~0u, value, 0);
}

/// True for one lane of the warp, always the same. Of code under it the compiler knows that one thread runs
/// it, so that the operands of the copy engine's instructions take a move to uniform registers each; under a
/// condition on the lane's number every such instruction stands in a loop over the lanes, some 200 clocks.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
  std::uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p,0xFFFFFFFF;\nselp.u32 %0,1,0,p;\n}" : "=r"(elected));
  return elected != 0;
#else
  return threadIdx.x % 32 == 0;
#endif
}

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

/// Asks the L2 cache for the line of global memory that `p` points into.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// The two halves of a barrier over all threads of the cluster. Writes before the arrival of one thread are
/// visible after the wait of another.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
/// The first half, ordering no writes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// ---- words that blocks of a cluster send into each other's shared memory, where a barrier counts bytes. A
// cluster's barrier that made written words visible would compile to a fence of the whole GPU.

/// By one thread of a block, before cluster_arrive_relaxed() of all; who sends has passed cluster_wait().
__device__ __forceinline__ void init_words(std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  barrier_init(barrier, 1);
  barrier_init_fence();
#endif
}
/// By one thread, after a barrier of the block. Words may have come before.
__device__ __forceinline__ void expect_words(std::uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  barrier_arrive_expect(barrier, bytes);
#endif
}
/// The word `to` and its barrier are those of block `rank`, by the addresses that they have in this one.
__device__ __forceinline__ void send_word(const int* to, int value, const std::uint64_t* barrier,
                                          unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 to, barrier; mapa.shared::cluster.u32 to,%0,%3; mapa.shared::cluster.u32 barrier,%2,%3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [to],%1,[barrier]; }" ::"r"(
          smem_address(to)),
      "r"(value), "r"(smem_address(barrier)), "r"(rank)
      : "memory");
#endif
}
/// Until all bytes are there.
__device__ __forceinline__ void await_words(std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  unsigned done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p,[%1],0; selp.u32 "
        "%0,1,0,p; }"
        : "=r"(done)
        : "r"(smem_address(barrier))
        : "memory");
  } while (!done);
#endif
}

}  // namespace moecore::cuda::dev
