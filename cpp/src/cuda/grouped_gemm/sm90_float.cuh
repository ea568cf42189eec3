#pragma once
// The main loop of bf16 x bf16 and f16 x f16: both operands from shared memory, K = 64 a step.

#include "cuda/grouped_gemm/sm90_swap_ab.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

template <class T>
struct FloatLoop : NoPrefetch {
  static constexpr Family kFamily = Family::kFloat;
  static constexpr bool kExtras = false, kSharedSources = false, kQuantizesOut = false;
  using Element = T;
  using Out = T;
  static constexpr int kStepK = 64, kStepElements = 64, kWeightLineBytes = kLineBytes, kTokenLines = 1;

  template <Tiling kTiling>
  using Widths = every_width<kFamily, kTiling>;

  template <int kMaxTokens>
  using Extra = NoExtra;
  template <class Engine>
  using Gather = NoGather;

  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply(const Engine& engine, const Work& work,
                                                  typename Engine::Ring& at,
                                                  float (&d)[Engine::kBlocks][kTokens / 2]) {
    auto& s = engine.s;
    const int warpgroup = threadIdx.x / 128;
    // One group of wgmma stays in flight: once the next is issued, the stage before is free.
    int previous = 0;
    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&s.full[at.stage], at.phase);
      if (!engine.boxes) fence_async_proxy();
      const std::uint64_t weights = tile_descriptor(s.weights[at.stage] + warpgroup * 64 * kLineBytes);
      const std::uint64_t tokens = tile_descriptor(s.tokens[at.stage]);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kLineBytes / 32; ++kk)
#pragma unroll
        for (int m = 0; m < Engine::kBlocks; ++m)
          Wgmma<T, kTokens>::op(d[m], weights + m * (Engine::kWarpgroups * 64 * kLineBytes / 16) + kk * 2,
                                tokens + kk * 2);
      wgmma_commit();
      wgmma_wait<1>();
      if (k > work.begin) engine.release(previous);
      previous = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    engine.release(previous);
  }
};

}  // namespace moecore::cuda::sm90
