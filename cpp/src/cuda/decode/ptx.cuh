#pragma once
// The instructions of the decode kernel that CUDA C++ does not spell. sm_90 and newer.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moecore::cuda::decode {

__device__ __forceinline__ std::uint32_t smem_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(smem_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(smem_address(barrier)) : "memory");
}
/// Arrives, and makes the phase wait for `bytes` of copies too. The barrier by its address in shared memory.
__device__ __forceinline__ void barrier_arrive_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
        : "=r"(done)
        : "r"(smem_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
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
__device__ __forceinline__ std::uint64_t policy_evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  return policy;
}
/// Between ordinary writes to global memory and copies of what they wrote.
__device__ __forceinline__ void fence_proxy() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// ---- global memory that other blocks write during the kernel

__device__ __forceinline__ void store_release(unsigned long long* p, unsigned long long value) {
  asm volatile("st.release.gpu.global.u64 [%0],%1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* p) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0,[%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
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

// ---- 16 x 8 x 16 products. Lane 4g + q holds of rows g and g + 8 the columns 2q and 2q + 1.

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                    __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace moecore::cuda::decode
