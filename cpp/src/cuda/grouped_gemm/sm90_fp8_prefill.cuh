#pragma once
// The main loop of e4m3 x e4m3 for many rows an expert: tokens are the tensor cores' A (M) operand, weights
// their B (N), K = 128 a step. A tile has 128 tokens, 64 for each warpgroup, and 192 weight rows.
//
// The adding threads limit fp8 (sm90_fp8.cuh says why they add), so this loop makes them few instructions: a
// thread's products belong to two tokens, and their scales times those of a run of 64 weight rows are four
// numbers. With tokens as columns, every product needs a scale product of its own: 1440 clocks for what takes
// 970 here, of 770 in the tensor cores. Scales are read before the products begin, so that a stage is free as
// soon as the products are there, not only after their addition.
//
// Rows come as boxes only, so they must stand in order. A warpgroup whose tokens lie behind the tile's end
// steps through the ring.

#include "cuda/grouped_gemm/sm90.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

template <bool kBlockScales>
struct Fp8PrefillLoop {
  static constexpr Family kFamily = Family::kFp8;
  static constexpr bool kSharedSources = false, kQuantizesOut = false;
  using Element = std::uint8_t;
  using Out = __nv_bfloat16;
  static constexpr int kStepElements = 128, kStepK = 128, kWeightLineBytes = kLineBytes, kTokenLines = 1;
  static constexpr int kWeightRows = tile_config(kFamily, Tiling::kPrefill).rows(), kRuns = kWeightRows / 64;
  static constexpr int kSums = kWeightRows / 2;  // of a thread
  static_assert(kWeightRows % 64 == 0);

  template <Tiling>
  using Widths = std::integer_sequence<int, tile_config(kFamily, Tiling::kPrefill).max_tokens>;

  /// With blocks, the scales of a step: of the tokens, and of every run of 64 weight rows; when gated of its
  /// first and its second eights, which are gate and up in the order of the checkpoint.
  template <int kMaxTokens>
  struct Extra {
    float tokens[kBlockScales ? kMaxTokens : 0];
    float weights[kBlockScales ? 2 * kRuns : 0];
  };

  /// Thread t copies the scales of tokens t and t + 96, and the t-th of the weights.
  template <class Engine>
  class Gather {
   public:
    __device__ Gather(const Engine& engine, const Work& work, int thread) : engine_(engine), thread_(thread) {
      if constexpr (kBlockScales) {
        const ScaleArgs &x = engine.args.x_scales, &w = engine.args.weight_scales;
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          if (const int token = thread + i * kGatherThreads; token < work.tile.rows)
            token_[i] = x.data + engine.x_row(work.tile, token) * x.row_pitch + work.begin * x.col_pitch;
        if (thread < (kGated ? 2 : 1) * kRuns) {
          const EpilogueArgs& e = engine.args.epilogue;
          const int run = kGated ? thread / 2 : thread;
          const int column = min(e.columns - 1, work.tile.weight_tile * Engine::kTileColumns +
                                                    run * (Engine::kTileColumns / kRuns));
          const int first = (thread % 2 == 0) != e.swapped ? e.gate_first : e.up_first;
          const int row = kGated ? first + column * e.row_step : column;
          weight_ =
              w.data + work.tile.expert * w.expert_pitch + row / 128 * w.row_pitch + work.begin * w.col_pitch;
        }
      }
    }
    __device__ __forceinline__ void copy(int stage, int) {
      if constexpr (kBlockScales) {
        auto& to = engine_.s.extra[stage];
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          if (token_[i]) {
            copy_4(smem_address(&to.tokens[thread_ + i * kGatherThreads]), token_[i], 4);
            token_[i] += engine_.args.x_scales.col_pitch;
          }
        if (weight_) {
          copy_4(smem_address(&to.weights[thread_]), weight_, 4);
          weight_ += engine_.args.weight_scales.col_pitch;
        }
      }
    }

   private:
    static constexpr bool kGated = Engine::Form::kGated;
    static constexpr int kTokens = (Engine::kMaxTokens + kGatherThreads - 1) / kGatherThreads;
    const Engine& engine_;
    const int thread_;
    const std::byte *token_[kTokens] = {}, *weight_ = nullptr;  // of the step
  };

  /// Thread (warp w, lane l) holds tokens 16w + l/4 (and + 8) of weight rows 8g + 2(l%4) (and + 1): d[4g],
  /// d[4g + 1] and, eight tokens down, d[4g + 2], d[4g + 3].
  template <class Engine>
  static __device__ __forceinline__ void compute(const Engine& engine, const Work& work,
                                                 typename Engine::Ring& at) {
    auto& s = engine.s;
    // One value for all lanes: descriptors then take the uniform registers' instructions.
    auto uniform = [](int v) { return __shfl_sync(~0u, v, 0); };
    const int warpgroup = uniform(threadIdx.x / 128);
    auto release = [&] {
      if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[at.stage]);
      at.advance();
    };
    if (work.tile.rows <= warpgroup * 64) {
      for (int k = work.begin; k < work.end; ++k) {
        barrier_wait(&s.full[at.stage], at.phase);
        release();
      }
      return;
    }

    float d[kSums] = {}, p[kSums];
#pragma unroll 4
    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&s.full[at.stage], at.phase);
      const Scales<Engine> scales(s.extra[at.stage]);
      const int stage = uniform(at.stage);
      const std::uint64_t tokens = tile_descriptor(s.tokens[stage][0] + warpgroup * 64 * kLineBytes);
      const std::uint64_t weights = tile_descriptor(s.weights[stage]);
      wgmma_fence();
      Wgmma<E4m3Codes, kWeightRows>::template op<false>(p, tokens, weights);
#pragma unroll
      for (int kk = 1; kk < kLineBytes / 32; ++kk)
        Wgmma<E4m3Codes, kWeightRows>::op(p, tokens + kk * 2, weights + kk * 2);
      wgmma_commit();
      wgmma_wait<0>();
      release();
      scales.add(p, d);
    }

    store(engine, work.tile, d);
  }

 private:
  /// The scales of a step that a thread's sums need.
  template <class Engine>
  class Scales {
   public:
    template <class Extra>
    __device__ __forceinline__ explicit Scales(const Extra& extra) {
      if constexpr (kBlockScales) {
        tokens_[0] = extra.tokens[token_row()];
        tokens_[1] = extra.tokens[token_row() + 8];
#pragma unroll
        for (int i = 0; i < kOfWeights; ++i) weights_[i] = extra.weights[i];
      }
    }
    /// d += p times the scales.
    __device__ __forceinline__ void add(const float (&p)[kSums], float (&d)[kSums]) const {
      if constexpr (kBlockScales) {
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          float scale[kEights][2];
#pragma unroll
          for (int i = 0; i < 2 * kEights; ++i)
            scale[i / 2][i % 2] = tokens_[i % 2] * weights_[run * kEights + i / 2];
#pragma unroll
          for (int i = run * 32; i < run * 32 + 32; ++i)
            d[i] = __fmaf_rn(p[i], scale[i / 4 % kEights][i / 2 % 2], d[i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSums; ++i) d[i] += p[i];
      }
    }

   private:
    static constexpr int kEights = Engine::Form::kGated ? 2 : 1, kOfWeights = kRuns * kEights;
    float tokens_[2], weights_[kOfWeights];
  };

  /// The first of this thread's two tokens.
  static __device__ __forceinline__ int token_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

  /// Column of out that this thread's sums of group g of eight weight rows belong to, the first of two.
  template <class Engine>
  static __device__ __forceinline__ int column_of(const Tile& tile, int g) {
    return tile.weight_tile * Engine::kTileColumns + (Engine::Form::kGated ? g / 2 : g) * 8 +
           threadIdx.x % 4 * 2;
  }

  /// Weight row of column c of out in group g; the last one beyond them.
  template <class Engine>
  static __device__ __forceinline__ std::int64_t weight_row_of(const Engine& engine, int column, int g) {
    const EpilogueArgs& e = engine.args.epilogue;
    column = min(e.columns - 1, column);
    if constexpr (!Engine::Form::kGated) return column;
    return ((g % 2 == 0) != e.swapped ? e.gate_first : e.up_first) + std::int64_t{column} * e.row_step;
  }

  /// What the sums of groups [kFirst, kFirst + kGroups) of weight rows are multiplied by over the whole
  /// depth, and what is added to them. `tokens`: factors of this thread's two.
  template <int kFirst, int kGroups, class Engine>
  static __device__ __forceinline__ void finish(const Engine& engine, const Tile& tile,
                                                const float (&tokens)[2], float (&d)[kSums]) {
    const EpilogueArgs& e = engine.args.epilogue;
    if (!kBlockScales || e.row_weights) {
#pragma unroll
      for (int i = kFirst * 2; i < (kFirst + kGroups) * 2; ++i) {
        const int g = i / 2, sum = g * 4 + i % 2, column = column_of<Engine>(tile, g) + i % 2;
        float factor = 1.0f;
        if constexpr (!kBlockScales)
          factor = scale_of(engine.args.weight_scales, weight_row_of(engine, column, g), tile.expert);
        d[sum] *= factor * tokens[0];
        d[sum + 2] *= factor * tokens[1];
      }
    }
    if (e.bias) {
#pragma unroll
      for (int i = kFirst * 2; i < (kFirst + kGroups) * 2; ++i) {
        const int g = i / 2, sum = g * 4 + i % 2, column = column_of<Engine>(tile, g) + i % 2;
        const float bias = bias_of<Out>(e, tile.expert, static_cast<int>(weight_row_of(engine, column, g)));
        d[sum] += bias;
        d[sum + 2] += bias;
      }
    }
  }

  /// The scale of a row, for the whole depth. No __ldg: those of all chunks would be moved up, and spilled.
  static __device__ __forceinline__ float scale_of(const ScaleArgs& s, std::int64_t row, int expert) {
    return *reinterpret_cast<const float*>(s.data + expert * s.expert_pitch + row * s.row_pitch);
  }

  /// Router weight of a token, and without blocks its scale.
  template <class Engine>
  static __device__ __forceinline__ float token_factor(const Engine& engine, const Tile& tile, int token) {
    float factor = token < tile.rows ? row_weight(engine.args.epilogue, tile.row + token) : 0.0f;
    if constexpr (!kBlockScales) factor *= scale_of(engine.args.x_scales, engine.x_row(tile, token), 0);
    return factor;
  }

  /// A warp finishes and stores its 16 tokens, 32 columns at a time, through a buffer of its own: 64 bytes of
  /// a row at once. A row's pieces of 16 bytes are swizzled so that eight rows of a matrix fall into
  /// different banks.
  template <class Engine>
  static __device__ __forceinline__ void store(const Engine& engine, const Tile& tile, float (&d)[kSums]) {
    constexpr bool kGated = Engine::Form::kGated;
    constexpr int kChunks = Engine::kTileColumns / 32;
    const EpilogueArgs& e = engine.args.epilogue;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    static_assert(sizeof(engine.s.buffer) >= Engine::kConsumerWarps * 1024);
    std::byte* buffer = engine.s.buffer[0][0] + warp * 1024;
    auto offset = [](int row, int piece) { return row * 64 + (piece ^ (row / 2 & 3)) * 16; };
    // This thread's two columns of a group of eight of out, of its first or second token.
    auto pack = [&](int group, int half) {
      if constexpr (kGated) {
        const float *a = d + group * 8 + half * 2, *b = a + 4;
        return pack_pair<Out>(Engine::Form::apply(e, e.swapped ? b[0] : a[0], e.swapped ? a[0] : b[0]),
                              Engine::Form::apply(e, e.swapped ? b[1] : a[1], e.swapped ? a[1] : b[1]));
      } else {
        const float* a = d + group * 4 + half * 2;
        return pack_pair<Out>(Engine::Form::apply(e, a[0]), Engine::Form::apply(e, a[1]));
      }
    };
    const float factors[2] = {token_factor(engine, tile, token_row()),
                              token_factor(engine, tile, token_row() + 8)};
    const int first = tile.weight_tile * Engine::kTileColumns + lane % 4 * 8;
    Out* rows = static_cast<Out*>(e.out) + (tile.row + warp * 16 + lane / 4) * e.out_stride + first;
    auto store_chunk = [&]<int c>() {
      finish<c * kSums / 4 / kChunks, kSums / 4 / kChunks>(engine, tile, factors, d);
      __syncwarp();  // what the buffer held has been read
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int group = c * 4 + i * 2;
        const std::uint32_t v[4] = {pack(group, 0), pack(group, 1), pack(group + 1, 0), pack(group + 1, 1)};
        store_matrices<false>(smem_address(buffer) + offset(lane % 16, i * 2 + lane / 16), v);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (warp * 16 + lane / 4 + i * 8 < tile.rows && first + c * 32 < e.columns)
          *reinterpret_cast<uint4*>(rows + i * 8 * e.out_stride + c * 32) =
              *reinterpret_cast<const uint4*>(buffer + offset(lane / 4 + i * 8, lane % 4));
    };
    [&]<int... c>(std::integer_sequence<int, c...>) {
      (store_chunk.template operator()<c>(), ...);
    }(std::make_integer_sequence<int, kChunks>{});
  }
};

}  // namespace moecore::cuda::sm90
