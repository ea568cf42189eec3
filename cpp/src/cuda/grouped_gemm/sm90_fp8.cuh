#pragma once
// The main loop of e4m3 x e4m3: both operands from shared memory, K = 128 a step.
//
// wgmma keeps some 13 bits behind the leading one of its partial sums of fp8 products, so a step's products
// are summed alone and join the sum as f32: multiplied by the scales of the step (block128), or as they are,
// the scales of rows following at the end. The two blocks of weight rows have partial sums of their own, so
// that the tensor cores work on one while the other's are added.

#include "cuda/grouped_gemm/sm90.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

template <bool kBlockScales>
struct Fp8Loop {
  static constexpr Family kFamily = Family::kFp8;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  using Element = std::uint8_t;
  using Out = __nv_bfloat16;
  static constexpr int kStepK = 128, kStepElements = 128, kWeightLineBytes = kLineBytes, kTokenLines = 1;

  template <Tiling kTiling>
  using Widths = every_width<kFamily, kTiling>;

  /// The tokens' scales, of the step or, without blocks, of their rows.
  template <int kMaxTokens>
  struct Extra {
    alignas(16) float token_scales[kMaxTokens];
  };

  /// Thread t copies the scales of tokens t and t + 96.
  template <class Engine>
  struct Gather {
    static constexpr int kScales = (Engine::kMaxTokens + kGatherThreads - 1) / kGatherThreads;
    const Engine& engine;
    const int thread, tokens;
    int row[kScales];

    __device__ Gather(const Engine& engine, const Tile& tile, int thread)
        : engine(engine), thread(thread), tokens((tile.rows + 7) / 8 * 8) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) row[i] = engine.x_row(tile, thread + i * kGatherThreads);
    }
    __device__ void copy(int stage, int k) {
      const ScaleArgs& scales = engine.args.x_scales;
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        const int token = thread + i * kGatherThreads;
        if (token < tokens)
          copy_4(smem_address(&engine.s.extra[stage].token_scales[token]),
                 scales.data + row[i] * scales.row_pitch + k * scales.col_pitch, 4);
      }
    }
  };

  /// The scales of a thread's weight rows: two with blocks, whose rows share them, else four.
  template <class Engine>
  struct WeightScales {
    const Engine& engine;
    const std::byte* first;  // scale of row(0)
    int behind[4];           // bytes from there to that of row(i)
    float next[4];

    __device__ WeightScales(const Engine& engine, const Work& work) : engine(engine) {
      const ScaleArgs& scales = engine.args.weight_scales;
      auto scale_row = [&](int i) {
        return kBlockScales ? engine.weight_row(work.tile, kGated ? 0 : i, kGated ? i : 0) / 128
                            : engine.weight_row(work.tile, i / 2, i % 2);
      };
      const std::int64_t row = scale_row(0);
      first = scales.data + work.tile.expert * scales.expert_pitch + row * scales.row_pitch;
#pragma unroll
      for (int i = 0; i < kCount; ++i) behind[i] = static_cast<int>((scale_row(i) - row) * scales.row_pitch);
      read(work.begin);
    }
    __device__ void read(int k) {
      const std::byte* from = first + k * engine.args.weight_scales.col_pitch;
#pragma unroll
      for (int i = 0; i < kCount; ++i) next[i] = __ldg(reinterpret_cast<const float*>(from + behind[i]));
    }
    static constexpr bool kGated = Engine::Form::kGated;
    static constexpr int kCount = kBlockScales ? 2 : 4;
    /// Which of `next` belongs to a block's row or the one eight further down.
    static __device__ constexpr int index(int block, int half) {
      return kBlockScales ? (kGated ? half : block) : 2 * block + half;
    }
  };

  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply(const Engine& engine, const Work& work,
                                                  typename Engine::Ring& at,
                                                  float (&d)[kBlocks][kTokens / 2]) {
    using Scales = WeightScales<Engine>;
    auto& s = engine.s;
    const int warpgroup = threadIdx.x / 128, q = threadIdx.x % 4;
    float p[kBlocks][kTokens / 2];
    auto issue = [&](int stage, int m) {
      const std::uint64_t rows =
          tile_descriptor(s.weights[stage] + (m * kWarpgroups + warpgroup) * 64 * kLineBytes);
      const std::uint64_t tokens = tile_descriptor(s.tokens[stage]);
      wgmma_fence();
      Wgmma<E4m3Codes, kTokens>::template op<false>(p[m], rows, tokens);
#pragma unroll
      for (int kk = 1; kk < kLineBytes / 32; ++kk)
        Wgmma<E4m3Codes, kTokens>::op(p[m], rows + kk * 2, tokens + kk * 2);
      wgmma_commit();
    };
    auto token_scales = [&](int stage, int g) {
      return reinterpret_cast<const float2*>(s.extra[stage].token_scales)[g * 4 + q];
    };
    auto add = [&](int stage, int m, const float (&w)[Scales::kCount]) {
#pragma unroll
      for (int g = 0; g < kTokens / 8; ++g) {
        if constexpr (kBlockScales) {
          const float2 t = token_scales(stage, g);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            d[m][g * 4 + i] =
                __fmaf_rn(p[m][g * 4 + i], w[Scales::index(m, i / 2)] * (i % 2 ? t.y : t.x), d[m][g * 4 + i]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][g * 4 + i] += p[m][g * 4 + i];
        }
      }
    };

    auto scale_rows = [&](const float (&w)[Scales::kCount], int stage) {
#pragma unroll
      for (int i = 0; i < kBlocks * kTokens / 2; ++i) {
        const int m = i / (kTokens / 2), j = i % (kTokens / 2);
        const float2 t = token_scales(stage, j / 4);
        d[m][j] *= w[Scales::index(m, j / 2 % 2)] * (j % 2 ? t.y : t.x);
      }
    };

    Scales weight_scales(engine, work);
    for (int k = work.begin; k < work.end; ++k) {
      float w[Scales::kCount];
      barrier_wait(&s.full[at.stage], at.phase);
      fence_async_proxy();
      issue(at.stage, 0);
      issue(at.stage, 1);
#pragma unroll
      for (int j = 0; j < Scales::kCount; ++j) w[j] = weight_scales.next[j];
      if (kBlockScales && k + 1 < work.end) weight_scales.read(k + 1);
      wgmma_wait<1>();
      add(at.stage, 0, w);
      wgmma_wait<0>();
      add(at.stage, 1, w);
      if (!kBlockScales && k + 1 == work.end) scale_rows(w, at.stage);
      if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[at.stage]);
      at.advance();
    }
  }
};

}  // namespace moecore::cuda::sm90
