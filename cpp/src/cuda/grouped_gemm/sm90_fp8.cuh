#pragma once
// The main loop of e4m3 x e4m3 for few rows an expert: both operands from shared memory, K = 128 a step.
//
// wgmma keeps some 13 bits behind the leading one of its partial sums of fp8 products, so a step's products
// are summed alone and join the sum as f32: multiplied by the scales of the step (block128), or as they are,
// the scales of rows following at the end. The two blocks of weight rows have partial sums of their own, so
// that the tensor cores work on one while the other's are added.
//
// The scales of a step, of tokens and of weights, come through the ring, four tokens at a time: the adding
// threads are better spared addresses and waits.

#include "cuda/grouped_gemm/sm90_fp8_scales.cuh"
#include "cuda/grouped_gemm/sm90_swap_ab.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

template <bool kBlockScales>
struct Fp8Loop : NoPrefetch {
  static constexpr Family kFamily = Family::kFp8;
  static constexpr bool kExtras = kBlockScales, kSharedSources = false, kQuantizesOut = kBlockScales;
  using Element = std::uint8_t;
  using Out = __nv_bfloat16;
  static constexpr int kStepK = 128, kStepElements = 128, kWeightLineBytes = kLineBytes, kTokenLines = 1;

  template <Tiling kTiling>
  using Widths = every_width<kFamily, kTiling>;

  /// With blocks, the scales of a step. The four tokens that a thread of a quad has of every 16 stand
  /// together. Weight rows: [half of the tile's columns][gate and up, in the order of the checkpoint], or
  /// [block].
  template <int kMaxTokens>
  struct Extra {
    alignas(16) float tokens[kBlockScales ? (kMaxTokens + 15) / 16 * 16 : 0];
    alignas(8) float weights[kBlockScales ? 4 : 0];
  };
  static __device__ constexpr int place_of(int token) {
    return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
  }

  /// Thread t copies the scale of token t, and the t-th of the weights.
  template <class Engine>
  class Gather {
   public:
    __device__ Gather(const Engine& engine, const Work& work, int thread) : engine_(engine), thread_(thread) {
      if constexpr (kBlockScales) {
        const ScaleArgs& x = engine.args.x_scales;
        if (thread < (work.tile.rows + 7) / 8 * 8)
          token_ = x.data + engine.x_row(work.tile, thread) * x.row_pitch + work.begin * x.col_pitch;
        if (thread < (kGated ? 4 : 2)) weight_ = weight_block_scale<2>(engine, work, thread);
      }
    }
    __device__ __forceinline__ void copy(int stage, int) {
      if constexpr (kBlockScales) {
        auto& to = engine_.s.extra[stage];
        if (token_) {
          copy_4(smem_address(&to.tokens[place_of(thread_)]), token_, 4);
          token_ += engine_.args.x_scales.col_pitch;
        }
        if (weight_) {
          copy_4(smem_address(&to.weights[thread_]), weight_, 4);
          weight_ += engine_.args.weight_scales.col_pitch;
        }
      }
    }

   private:
    static constexpr bool kGated = Engine::Form::kGated;
    static_assert(Engine::kMaxTokens <= kGatherThreads);
    const Engine& engine_;
    const int thread_;
    const std::byte *token_ = nullptr, *weight_ = nullptr;  // of the step
  };

  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply(const Engine& engine, const Work& work,
                                                  typename Engine::Ring& at,
                                                  float (&d)[Engine::kBlocks][kTokens / 2]) {
    constexpr bool kGated = Engine::Form::kGated;
    constexpr int kGroups = kTokens / 8, kBlocks = Engine::kBlocks;
    auto& s = engine.s;
    const int warpgroup = uniform(threadIdx.x / 128), q = threadIdx.x % 4;
    float p[kBlocks][kTokens / 2];
    auto issue = [&](int stage, int m) {
      const std::uint64_t rows =
          tile_descriptor(s.weights[stage] + (m * Engine::kWarpgroups + warpgroup) * 64 * kLineBytes);
      const std::uint64_t tokens = tile_descriptor(s.tokens[stage]);
      wgmma_fence();
      Wgmma<E4m3Codes, kTokens>::template op<false>(p[m], rows, tokens);
#pragma unroll
      for (int kk = 1; kk < kLineBytes / 32; ++kk)
        Wgmma<E4m3Codes, kTokens>::op(p[m], rows + kk * 2, tokens + kk * 2);
      wgmma_commit();
    };
    auto add = [&](int m, [[maybe_unused]] const float4* tokens, [[maybe_unused]] float4 next,
                   [[maybe_unused]] float2 w) {
      if constexpr (kBlockScales) {
#pragma unroll
        for (int g = 0; g < kGroups; g += 2) {
          const float4 t = next;
          if (g + 2 < kGroups) next = tokens[g * 2 + 4];
          const float of[2][2] = {{t.x, t.y}, {t.z, t.w}};
#pragma unroll
          for (int i = g * 4; i < min(g * 4 + 8, kTokens / 2); ++i)
            d[m][i] = __fmaf_rn(p[m][i], (i / 2 % 2 ? w.y : w.x) * of[i / 4 % 2][i % 2], d[m][i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) d[m][i] += p[m][i];
      }
    };

    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&s.full[at.stage], at.phase);
      if (!engine.boxes) fence_async_proxy();
      const int stage = uniform(at.stage);
      issue(stage, 0);
      issue(stage, 1);
      // Scales of a thread's rows in the upper and the lower eight of sixteen: gate and up, or one for both.
      float2 w[kBlocks] = {};
      const float4* tokens = nullptr;
      if constexpr (kBlockScales) {
        const float2 pair =
            reinterpret_cast<const float2*>(s.extra[at.stage].weights)[kGated ? warpgroup : 0];
        w[0] = kGated ? pair : float2{pair.x, pair.x};
        w[1] = kGated ? pair : float2{pair.y, pair.y};
        tokens = reinterpret_cast<const float4*>(s.extra[at.stage].tokens) + q;
      }
      float4 first = kBlockScales ? tokens[0] : float4{};  // read while the tensor cores work
      wgmma_wait<1>();
      add(0, tokens, first, w[0]);
      if (kBlockScales) first = tokens[0];
      wgmma_wait<0>();
      add(1, tokens, first, w[1]);
      if constexpr (kBlockScales) __syncwarp();  // all lanes have read the scales
      engine.release(at.stage);
      at.advance();
    }
    if constexpr (!kBlockScales) scale_rows<kTokens>(engine, work.tile, d);
  }

  /// Scales of rows of x and of weight rows, for the whole depth.
  template <int kTokens, class Engine>
  static __device__ __forceinline__ void scale_rows(const Engine& engine, const Tile& tile,
                                                    float (&d)[Engine::kBlocks][kTokens / 2]) {
    constexpr int kBlocks = Engine::kBlocks;
    float w[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i)
      w[i] = row_scale(engine.args.weight_scales, engine.weight_row(tile, i / 2, i % 2), tile.expert);
#pragma unroll
    for (int g = 0; g < kTokens / 8; ++g) {
      const int token = g * 8 + threadIdx.x % 4 * 2;
      const float t[2] = {row_scale(engine.args.x_scales, engine.x_row(tile, token), 0),
                          row_scale(engine.args.x_scales, engine.x_row(tile, token + 1), 0)};
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) d[i / 4][g * 4 + i % 4] *= w[i / 2] * t[i % 2];
    }
  }
};

}  // namespace moecore::cuda::sm90
