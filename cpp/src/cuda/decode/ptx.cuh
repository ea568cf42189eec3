#pragma once
// The instructions of the decode kernel that CUDA C++ does not spell. sm_90 and newer.

#include <cstdint>

#include "cuda/device/async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/ptx.cuh"

namespace moecore::cuda::decode {

using dev::barrier_arrive;
using dev::barrier_arrive_expect;
using dev::barrier_init;
using dev::barrier_wait;
using dev::elect_one;
using dev::load_acquire;
using dev::mma;
using dev::policy_evict_first;
using dev::smem_address;
using dev::store_release;
using dev::uniform;

// ---- mbarriers

/// Over some warps of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies to shared memory, by addresses: multiples of 16 bytes between multiples of 16

__device__ __forceinline__ void copy_row(std::uint32_t to, const void* from, int bytes,
                                         std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
/// The L2 cache follows the policy.
__device__ __forceinline__ void copy_row(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier,
                                         std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0],[%1],%2,[%3],%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
/// Between ordinary writes to global memory and copies of what they wrote.
__device__ __forceinline__ void fence_proxy() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// ---- global memory that other blocks write during the kernel

__device__ __forceinline__ unsigned load_relaxed(const unsigned* p) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
/// Lighter than __threadfence, which is sequentially consistent.
__device__ __forceinline__ void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
__device__ __forceinline__ void add_relaxed(unsigned* p, unsigned value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(value) : "memory");
}

// ---- shared memory that other warps of the block write

__device__ __forceinline__ void store_release_block(int* p, int value) {
  asm volatile("st.release.cta.shared.s32 [%0],%1;" ::"r"(smem_address(p)), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire_block(const int* p) {
  int value;
  asm volatile("ld.acquire.cta.shared.s32 %0,[%1];" : "=r"(value) : "r"(smem_address(p)) : "memory");
  return value;
}

}  // namespace moecore::cuda::decode
