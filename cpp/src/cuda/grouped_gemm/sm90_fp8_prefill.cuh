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
// Rows come as boxes only, so they must stand in order. A tile of at most 64 tokens is shared the other way:
// both warpgroups have all of its tokens and half of its weight rows each.

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

  template <class Engine>
  static __device__ __forceinline__ void compute(const Engine& engine, const Work& work,
                                                 typename Engine::Ring& at) {
    // One value for all lanes: descriptors then take the uniform registers' instructions.
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (work.tile.rows > warpgroup * 64) {
      Part<Engine, kWeightRows>(engine, work.tile, warpgroup * 64, 0).compute(work, at);
      return;
    }
    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&engine.s.full[at.stage], at.phase);
      if (threadIdx.x % 32 == 0) barrier_arrive(&engine.s.empty[at.stage]);
      at.advance();
    }
  }

 private:
  /// What a warpgroup has of a tile: 64 tokens and kRows weight rows. Thread (warp w, lane l) of it holds
  /// tokens 16w + l/4 (and + 8) of weight rows 8g + 2(l%4) (and + 1): d[4g], d[4g + 1] and, eight tokens
  /// down, d[4g + 2], d[4g + 3].
  template <class Engine, int kRows>
  class Part {
   public:
    __device__ __forceinline__ Part(const Engine& engine, const Tile& tile, int first_token, int first_row)
        : engine_(engine), tile_(tile), first_token_(first_token), first_row_(first_row) {}

    __device__ __forceinline__ void compute(const Work& work, typename Engine::Ring& at) const {
      auto& s = engine_.s;
      float d[kSums] = {}, p[kSums];
#pragma unroll 4
      for (int k = work.begin; k < work.end; ++k) {
        barrier_wait(&s.full[at.stage], at.phase);
        const Scales scales(s.extra[at.stage], token(), first_row_);
        const int stage = __shfl_sync(~0u, at.stage, 0);
        const std::uint64_t tokens = tile_descriptor(s.tokens[stage][0] + first_token_ * kLineBytes);
        const std::uint64_t weights = tile_descriptor(s.weights[stage] + first_row_ * kLineBytes);
        wgmma_fence();
        Wgmma<E4m3Codes, kRows>::template op<false>(p, tokens, weights);
#pragma unroll
        for (int kk = 1; kk < kLineBytes / 32; ++kk)
          Wgmma<E4m3Codes, kRows>::op(p, tokens + kk * 2, weights + kk * 2);
        wgmma_commit();
        wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[at.stage]);
        at.advance();
        scales.add(p, d);
      }
      finish(d);
      store(d);
    }

   private:
    static constexpr bool kGated = Engine::Form::kGated;
    static constexpr int kSums = kRows / 2, kGroups = kRows / 8;
    static constexpr int kColumns = kGated ? kRows / 2 : kRows;  // of out

    /// The scales of a step that a thread's sums need.
    class Scales {
     public:
      template <class Extra>
      __device__ __forceinline__ Scales(const Extra& extra, int token, int first_row) {
        if constexpr (kBlockScales) {
          tokens_[0] = extra.tokens[token];
          tokens_[1] = extra.tokens[token + 8];
#pragma unroll
          for (int i = 0; i < kRuns * kEights; ++i)
            weights_[i] = extra.weights[(first_row + i / kEights * kRunRows) / 64 * kEights + i % kEights];
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
            for (int i = 0; i < kRunSums; ++i)
              d[run * kRunSums + i] =
                  __fmaf_rn(p[run * kRunSums + i], scale[i / 4 % kEights][i / 2 % 2], d[run * kRunSums + i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kSums; ++i) d[i] += p[i];
        }
      }

     private:
      static constexpr int kEights = kGated ? 2 : 1, kRunRows = kRows / kRuns, kRunSums = kRunRows / 2;
      static_assert(64 % kRunRows == 0);
      float tokens_[2], weights_[kRuns * kEights];
    };

    /// The first of this thread's two tokens.
    __device__ __forceinline__ int token() const {
      return first_token_ + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    }
    /// Of this warp.
    __device__ __forceinline__ std::byte* buffer() const {
      static_assert(sizeof(engine_.s.buffer) >= Engine::kConsumerWarps * kWarpBytes);
      return engine_.s.buffer[0][0] + threadIdx.x / 32 * kWarpBytes;
    }
    static constexpr int kWarpBytes = 1024;

    /// What applies to the whole depth: scales where they are of rows, router weights, bias.
    __device__ __forceinline__ void finish(float (&d)[kSums]) const {
      const EpilogueArgs& e = engine_.args.epilogue;
      if (!kBlockScales || e.row_weights) {
        const float factors[2] = {token_factor(token()), token_factor(token() + 8)};
#pragma unroll
        for (int i = 0; i < kSums; ++i) d[i] *= factors[i / 2 % 2];
      }
      if constexpr (!kBlockScales)
        for_weight_rows(
            [&](std::int64_t row) { return scale_of(engine_.args.weight_scales, row, tile_.expert); },
            [&](int i, float scale) { d[i] *= scale; });
      if (e.bias)
        for_weight_rows(
            [&](std::int64_t row) { return bias_of<Out>(e, tile_.expert, static_cast<int>(row)); },
            [&](int i, float bias) { d[i] += bias; });
    }

    /// Router weight of a token, and its scale where it is of the row.
    __device__ __forceinline__ float token_factor(int token) const {
      float factor = token < tile_.rows ? row_weight(engine_.args.epilogue, tile_.row + token) : 0.0f;
      if constexpr (!kBlockScales) factor *= scale_of(engine_.args.x_scales, engine_.x_row(tile_, token), 0);
      return factor;
    }
    static __device__ __forceinline__ float scale_of(const ScaleArgs& s, std::int64_t row, int expert) {
      return __ldg(reinterpret_cast<const float*>(s.data + expert * s.expert_pitch + row * s.row_pitch));
    }

    /// value(row) of every weight row, read once by the warp, goes to apply(i, value) of the sums i it has.
    template <class Value, class Apply>
    __device__ __forceinline__ void for_weight_rows(const Value& value, const Apply& apply) const {
      auto* values = reinterpret_cast<float*>(buffer());
      const int lane = threadIdx.x % 32;
      __syncwarp();  // what the buffer held has been read
#pragma unroll
      for (int row = 0; row < kRows; row += 32)
        values[row + lane] = value(weight_row(first_row_ + row + lane));
      __syncwarp();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float2 two = reinterpret_cast<const float2*>(values)[g * 4 + lane % 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) apply(g * 4 + i, i % 2 ? two.y : two.x);
      }
    }

    /// Row of the expert's weights that a row of the tile is; the last one beyond them.
    __device__ __forceinline__ std::int64_t weight_row(int row) const {
      const EpilogueArgs& e = engine_.args.epilogue;
      const int column = min(
          e.columns - 1, tile_.weight_tile * Engine::kTileColumns + (kGated ? row / 16 * 8 + row % 8 : row));
      if constexpr (!kGated) return column;
      return ((row % 16 < 8) != e.swapped ? e.gate_first : e.up_first) + std::int64_t{column} * e.row_step;
    }

    /// A warp stores its 16 tokens through its buffer, 32 or 16 columns at a time. A row's pieces of 16 bytes
    /// are swizzled so that eight rows of a matrix fall into different banks.
    __device__ __forceinline__ void store(const float (&d)[kSums]) const {
      constexpr int kChunkColumns = kColumns % 32 == 0 ? 32 : 16, kPieces = kChunkColumns / 8;
      const EpilogueArgs& e = engine_.args.epilogue;
      const int lane = threadIdx.x % 32;
      auto offset = [](int row, int piece) {
        return row * (16 * kPieces) + (piece ^ (row / (8 / kPieces) & (kPieces - 1))) * 16;
      };
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
      const int token = first_token_ + threadIdx.x % 128 / 32 * 16 + lane / kPieces;
      const int column = tile_.weight_tile * Engine::kTileColumns + (kGated ? first_row_ / 2 : first_row_) +
                         lane % kPieces * 8;
      Out* out = static_cast<Out*>(e.out) + (tile_.row + token) * e.out_stride + column;
#pragma unroll
      for (int c = 0; c < kColumns / kChunkColumns; ++c) {
        __syncwarp();  // what the buffer held has been read
#pragma unroll
        for (int i = 0; i < kPieces; i += 2) {
          const int g = c * kPieces + i;
          const std::uint32_t v[4] = {pack(g, 0), pack(g, 1), pack(g + 1, 0), pack(g + 1, 1)};
          store_matrices<false>(smem_address(buffer()) + offset(lane % 16, i + lane / 16), v);
        }
        __syncwarp();
#pragma unroll
        for (int row = 0; row < 16; row += 32 / kPieces)
          if (token + row < tile_.rows && column + c * kChunkColumns < e.columns)
            *reinterpret_cast<uint4*>(out + row * e.out_stride + c * kChunkColumns) =
                *reinterpret_cast<const uint4*>(buffer() + offset(row + lane / kPieces, lane % kPieces));
      }
    }

    const Engine& engine_;
    const Tile& tile_;
    const int first_token_, first_row_;
  };
};

}  // namespace moecore::cuda::sm90
