#pragma once
// The expert layer as one persistent kernel, for a handful of tokens: routing, both products, the weighted
// sum.
//
// At these sizes the layer is a read of the touched experts' weights, so everything serves one stream that
// never stops. A block per SM, 19 warps:
//   0-3     copy weight rows into a ring of stages, whose depth covers the time that anything else takes;
//   4-5     copy into the same stages the token rows that the weights are multiplied with;
//   6-9     epilogues, a tile each in turn: sum of the partial products, bias, activation;
//   10      tells the other blocks which intermediate columns are there;
//   11-18   mma.sync on the stages: 16 weight rows x 8 tokens, every warp its share of a step's depth.
//
// Work. The routes are sorted by expert into passes of at most `rows` rows of one expert. Block b owns of
// every pass's intermediate columns the range [(F(b) + pass) / passes, (F(b + 1) + pass) / passes), where
// F(b) is its share of all columns of all passes: neighbours differ by at most one column in all, and every
// block reads of every expert. Then it owns columns [H b / B, H (b + 1) / B) of out, for all passes, so that
// out's weighted sum needs no other block. F is shifted so that blocks with fewer columns of out have more of
// the others.
//   up:    for each pass, for each tile of up to 8 gate and 8 up rows (16 without a gate), for each step of k
//   down:  for each tile of up to 16 columns of out, for each pass, for each step of k
// All warps walk this list for themselves.
//
// Between the products stands no barrier: a block adds the columns it has stored to a counter of the pass,
// and warps 4-5 wait until a pass is whole, in the order in which blocks make them. Weights of the second
// product are on their way meanwhile.
//
// Rounding: products in f32 (a warp's chunks in ascending k, then the warps in order), rounded once to T
// after bias and activation, and once after the second bias; the sum over a token's slots is an f32 fma chain
// in slot order. Nothing depends on which block does what, so the bits are the same on every run; they may
// differ from those of the composition in the order of the sums along k.

#include <cstddef>
#include <cstdint>

#include "cuda/decode/copy.cuh"
#include "cuda/decode/finish.cuh"
#include "cuda/decode/formats.cuh"
#include "cuda/decode/multiply.cuh"
#include "cuda/decode/work.cuh"
#include "cuda/device/ptx.cuh"

namespace moecore::cuda::decode {

template <class T, class Format>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte memory[];
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  const int num_routes = args.num_tokens * args.top_k, warp = threadIdx.x / 32;
  const Routes routes(memory + routes_offset(), num_routes);
  T* products = reinterpret_cast<T*>(memory + products_offset(num_routes));
  std::byte* ring = memory + ring_offset(num_routes);

  if (threadIdx.x < kMaxStages) {
    barrier_init(&smem.weights[threadIdx.x], kWeightWarps);
    barrier_init(&smem.tokens[threadIdx.x], kTokenWarps);
    barrier_init(&smem.empty[threadIdx.x], kMmaWarps);
    if (threadIdx.x < kEpilogueWarps) {
      barrier_init(&smem.summed[threadIdx.x], kMmaWarps);
      barrier_init(&smem.taken[threadIdx.x], 1);
    }
    fence_proxy();
  }
  dev::wait_for_predecessor();
  dev::release_successor();
  const int passes = sort_routes(args, smem, routes);
  if (blockIdx.x == 0 && warp == kFirstEpilogueWarp) {
    Progress& progress = *args.progress;
    for (int i = threadIdx.x % 32; i < passes; i += 32) progress.ready[i] = 0;
    __syncwarp();
    if (threadIdx.x % 32 == 0) progress.left.open(0);
  }
  const Walk walk(args, smem, routes, passes);
  if (warp < kWeightWarps)
    copy_weights<Format>(args, smem, ring, walk);
  else if (warp < kFirstEpilogueWarp)
    copy_tokens(args, smem, ring, routes, passes, walk);
  else if (warp < kPublisherWarp)
    finish<T, Format>(args, smem, routes, products, walk);
  else if (warp == kPublisherWarp)
    publish(args, smem, walk);
  else
    multiply<T, Format>(args, smem, ring, walk);
#endif
}

}  // namespace moecore::cuda::decode
