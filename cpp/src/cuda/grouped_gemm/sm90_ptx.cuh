#pragma once
// Hopper's asynchronous instructions: mbarriers, copies, flags, warpgroups.

#include <cuda.h>

#include <cstdint>

#include "cuda/device/async.cuh"
#include "cuda/device/ptx.cuh"

namespace moecore::cuda::sm90 {

using dev::barrier_arrive;
using dev::barrier_arrive_expect;
using dev::barrier_init;
using dev::barrier_init_fence;
using dev::barrier_wait;
using dev::elect_one;
using dev::load_acquire;
using dev::policy_evict_first;
using dev::smem_address;
using dev::store_release;
using dev::uniform;

// ---- mbarriers

/// What `address` in this block's shared memory is in that of block `rank` of the cluster.
__device__ __forceinline__ std::uint32_t address_in_block(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
/// Arrives at a barrier of the cluster, for copies that other threads will start. With .release.cluster it
/// would compile to a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_in_cluster(std::uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _,[%0];" ::"r"(address) : "memory");
}
__device__ __forceinline__ std::uint32_t cluster_blocks() {
  std::uint32_t n;
  asm volatile("mov.u32 %0,%%cluster_nctarank;" : "=r"(n));
  return n;
}
/// Arrives once all earlier cp.async of this thread have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier))
               : "memory");
}

// ---- copies

/// One box of a 5-D tensor map. With a policy, the L2 cache follows it.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, std::uint64_t* barrier, int c0,
                                         int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%3,%4,%5,%6,%7}],[%2];" ::"r"(smem_address(to)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, std::uint64_t* barrier, int c0,
                                         int c1, int c2, int c3, int c4, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0],[%1,{%3,%4,%5,%6,%7}],[%2],%8;" ::"r"(smem_address(to)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}
/// The same into both blocks of a cluster, at the same places of their shared memory.
__device__ __forceinline__ void copy_box_to_pair(void* to, const CUtensorMap* map, std::uint64_t* barrier,
                                                 int c0, int c1, int c2, int c3, int c4) {
  constexpr std::uint16_t kBlocks = 3;
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0],[%1,{%3,%4,%5,%6,%7}],[%2],%8;" ::"r"(smem_address(to)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(kBlocks)
      : "memory");
}
/// One box of a 2-D tensor map.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, std::uint64_t* barrier, int c0,
                                         int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%3,%4}],[%2];" ::"r"(smem_address(to)),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
/// One box of a 2-D tensor map the other way, what lies outside clipped. A group of copies belongs to its
/// thread, which made what it copies visible by fence_async_proxy().
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0,{%2,%3}],[%1];" ::"l"(map),
               "r"(smem_address(from)), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until this thread's groups have read shared memory.
__device__ __forceinline__ void wait_for_stores_to_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/// Until they are done.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// 16 bytes, of which the first `bytes` are read and the rest are zero.
__device__ __forceinline__ void copy_16(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// 4 bytes likewise.
__device__ __forceinline__ void copy_4(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// Orders shared memory seen so far before the tensor core's own reads.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- warpgroups

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0,128;" ::"r"(warpgroup + 1) : "memory");
}
/// All warpgroups that compute.
template <int kWarpgroups>
__device__ __forceinline__ void computing_sync() {
  asm volatile("bar.sync %0,%1;" ::"n"(kWarpgroups + 1), "n"(128 * kWarpgroups) : "memory");
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// The half of a tile's descriptor that says where it stands, in units of 16 bytes: to walk through a tile or
/// from one to the next, add to it.
__device__ __forceinline__ std::uint32_t tile_address(const void* p) {
  return ((smem_address(p) & 0x3FFFFu) >> 4) + (1u << 16);
}
/// Descriptor of a K-major tile in the 128-byte swizzle: rows of 128 bytes, groups of eight rows 1024 bytes
/// apart.
__device__ __forceinline__ std::uint64_t tile_descriptor(std::uint32_t address) {
  return address | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ std::uint64_t tile_descriptor(const void* p) {
  return tile_descriptor(tile_address(p));
}

/// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&v)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ uint4 load_16(std::uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
/// Where piece `piece` of 16 bytes of a row of kPieces stands, swizzled as the copy engine has it, so that
/// eight rows of a matrix fall into different banks.
template <int kPieces>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * (16 * kPieces) + (piece ^ (row / (8 / kPieces) & (kPieces - 1))) * 16;
}
/// Stores four 8x8 matrices of 16-bit elements, transposed or not; lane l gives the address of row l % 8 of
/// matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void store_matrices(std::uint32_t to, const std::uint32_t (&v)[4]) {
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

}  // namespace moecore::cuda::sm90
