#pragma once
// Grouped GEMM on Hopper, e4m3 x e4m3 with many rows an expert: tokens are the tensor cores' A (M) operand,
// weights their B (N), K = 128 a step. A tile has 128 tokens, 64 for each warpgroup, and 192 weight rows.
//
// The adding threads limit fp8 (sm90_fp8.cuh says why they add): of the 768 clocks that the tensor cores need
// for a step, half are a warpgroup's own, so all that it does besides must fit into the other half. Therefore
//   - a thread's products belong to two tokens, and their scales times those of a run of 64 weight rows are
//     four numbers; with tokens as columns, every product would need a scale product of its own;
//   - whole rounds of the ring are unrolled, so that the places of a step are constants, and what is the same
//     for a warp is known to be so (descriptors stay in uniform registers): 140 instructions a step, 96 of
//     them additions, where there were 166;
//   - the products of half of the weight rows are added while the tensor cores work on the other half.
// A step takes 820 clocks, where it took 933.
//
// Rows and the scales of 128-blocks come as boxes only, so both must stand in order, scales in columns. A
// warp leaves its 16 tokens of a tile in shared memory and has the copy engine store them beside the next
// tile; the rows of a tile's last 16 that are not all there, it stores itself. A warpgroup whose tokens lie
// behind the tile's end steps through the ring: to give it half of the weight rows of the other's tokens
// instead is no faster (docs/architecture.md).

#include "cuda/grouped_gemm/sm90_fp8_scales.cuh"
#include "cuda/grouped_gemm/sm90_pipeline.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

/// A step of it.
template <bool kBlockScales>
struct Fp8PrefillLoop : NoPrefetch {
  static constexpr Family kFamily = Family::kFp8;
  static constexpr bool kExtras = kBlockScales, kSharedSources = false, kQuantizesOut = false;
  using Element = std::uint8_t;
  using Out = __nv_bfloat16;
  static constexpr int kStepElements = 128, kStepK = 128, kWeightLineBytes = kLineBytes, kTokenLines = 1;
  static constexpr int kWeightRows = tile_config(kFamily, Tiling::kPrefill).rows(), kRuns = kWeightRows / 64;
  static_assert(kWeightRows % 64 == 0);

  /// With blocks, the scales of a step: of the tokens, those of the tile from row % kScalesAhead on, and of
  /// every run of 64 weight rows; when gated of its first and its second eights, which are gate and up in the
  /// order of the checkpoint.
  template <int kMaxTokens>
  struct Extra {
    alignas(128) float tokens[kBlockScales ? tile_config(kFamily, Tiling::kPrefill).scale_box() : 0];
    float weights[kBlockScales ? 2 * kRuns : 0];
  };

  /// Lane l copies the l-th of the weights.
  template <class Engine>
  class Gather {
   public:
    __device__ Gather(const Engine& engine, const Work& work, int lane) : engine_(engine), lane_(lane) {
      if constexpr (kBlockScales)
        if (work.tile.rows > 0 && lane < (Engine::Form::kGated ? 2 : 1) * kRuns)
          weight_ = weight_block_scale<kRuns>(engine, work, lane);
    }
    __device__ __forceinline__ void copy(int stage, int) {
      if constexpr (kBlockScales)
        if (weight_) {
          copy_4(smem_address(&engine_.s.extra[stage].weights[lane_]), weight_, 4);
          weight_ += engine_.args.weight_scales.col_pitch;
        }
    }

   private:
    const Engine& engine_;
    const int lane_;
    const std::byte* weight_ = nullptr;  // of the step
  };
};

/// What a warpgroup has of a tile: 64 tokens. Thread (warp w, lane l) of it holds tokens 16w + l/4 (and + 8)
/// of weight rows 8g + 2(l%4) (and + 1): d[4g], d[4g + 1] and, eight tokens down, d[4g + 2], d[4g + 3].
template <class Engine>
class Fp8PrefillPart {
 public:
  __device__ __forceinline__ Fp8PrefillPart(const Engine& engine, const Tile& tile, int warpgroup)
      : engine_(engine),
        tile_(tile),
        tokens_(tile_address(engine.s.tokens[0][0] + warpgroup * 64 * kLineBytes)) {}

  __device__ __forceinline__ void compute(typename Engine::Ring& at) const {
    constexpr int kStages = Engine::kConfig.stages;
    float d[kSums] = {};
    for (int left = engine_.steps; left > 0;) {
      if (at.stage == 0 && left >= kStages) {  // whole rounds of the ring, whose places are constants
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) step(stage, at.phase, d);
        at.advance(kStages);
        left -= kStages;
      } else {
        step(uniform(at.stage), at.phase, d);
        at.advance();
        --left;
      }
    }
    if (elect_one()) wait_for_stores_to_read();  // of the tile before, from the warp's buffer
    finish(d);
    store(d);
  }

 private:
  using Loop = typename Engine::Loop;
  using Out = typename Loop::Out;
  static constexpr bool kBlockScales = Loop::kExtras;
  static constexpr int kWeightRows = Loop::kWeightRows, kRuns = Loop::kRuns;
  static constexpr bool kGated = Engine::Form::kGated;
  static constexpr int kSums = kWeightRows / 2, kGroups = kWeightRows / 8;
  static constexpr int kHalves = 2;

  /// d += the products of the step in a stage of the ring.
  __device__ __forceinline__ void step(int stage, std::uint32_t phase, float (&d)[kSums]) const {
    auto& s = engine_.s;
    const std::uint32_t tokens = tokens_ + stage * (sizeof(s.tokens[0]) / 16);
    const std::uint32_t weights = tile_address(s.weights[0]) + stage * (sizeof(s.weights[0]) / 16);
    float p[kHalves][kSums / kHalves];
    barrier_wait(&s.full[stage], phase);
    const Scales scales(s.extra[stage], tile_.row % kScalesAhead + token());
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      using Multiply = Wgmma<E4m3Codes, kWeightRows / kHalves>;
      const std::uint32_t rows = weights + half * (kWeightRows / kHalves * kLineBytes / 16);
      Multiply::template op<false>(p[half], tile_descriptor(tokens), tile_descriptor(rows));
#pragma unroll
      for (int kk = 1; kk < kLineBytes / 32; ++kk)
        Multiply::op(p[half], tile_descriptor(tokens + kk * 2), tile_descriptor(rows + kk * 2));
      wgmma_commit();
    }
    wgmma_wait<1>();
    scales.add(p[0], d, 0);
    wgmma_wait<0>();
    __syncwarp();  // all lanes have read the scales
    engine_.release(stage);
    scales.add(p[1], d, kSums / kHalves);
  }

  /// The scales of a step that a thread's sums need.
  class Scales {
   public:
    template <class Extra>
    __device__ __forceinline__ Scales(const Extra& extra, int token) {
      if constexpr (kBlockScales) {
        tokens_[0] = extra.tokens[token];
        tokens_[1] = extra.tokens[token + 8];
#pragma unroll
        for (int i = 0; i < kRuns * kEights; ++i) weights_[i] = extra.weights[i];
      }
    }
    /// The sums from `first` on += p times the scales.
    template <int kCount>
    __device__ __forceinline__ void add(const float (&p)[kCount], float (&d)[kSums], int first) const {
      if constexpr (kBlockScales) {
        float scale[kRuns * kEights][2];
#pragma unroll
        for (int i = 0; i < 2 * kRuns * kEights; ++i) scale[i / 2][i % 2] = tokens_[i % 2] * weights_[i / 2];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int at = first + i;
          d[at] = __fmaf_rn(p[i], scale[at / kRunSums * kEights + at / 4 % kEights][at / 2 % 2], d[at]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) d[first + i] += p[i];
      }
    }

   private:
    static constexpr int kEights = kGated ? 2 : 1, kRunSums = kSums / kRuns;
    float tokens_[2], weights_[kRuns * kEights];
  };

  /// The first of this thread's two tokens.
  __device__ __forceinline__ int token() const { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
  /// Of this warp: 16 tokens of kWeightRows columns.
  __device__ __forceinline__ std::byte* buffer() const {
    constexpr int kWarpBytes = sizeof(engine_.s.buffer) / Engine::kConsumerWarps;
    static_assert(kWarpBytes == 16 * kWeightRows * sizeof(Out));
    return engine_.s.buffer[0][0] + threadIdx.x / 32 * kWarpBytes;
  }

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
          [&](std::int64_t row) { return row_scale(engine_.args.weight_scales, row, tile_.expert); },
          [&](int i, float scale) { d[i] *= scale; });
    if (e.bias)
      for_weight_rows([&](std::int64_t row) { return bias_of<Out>(e, tile_.expert, static_cast<int>(row)); },
                      [&](int i, float bias) { d[i] += bias; });
  }

  /// Router weight of a token, and its scale where it is of the row.
  __device__ __forceinline__ float token_factor(int token) const {
    float factor = token < tile_.rows ? row_weight(engine_.args.epilogue, tile_.row + token) : 0.0f;
    if constexpr (!kBlockScales) factor *= row_scale(engine_.args.x_scales, engine_.x_row(tile_, token), 0);
    return factor;
  }

  /// value(row) of every weight row, read once by the warp, goes to apply(i, value) of the sums i it has.
  template <class Value, class Apply>
  __device__ __forceinline__ void for_weight_rows(const Value& value, const Apply& apply) const {
    auto* values = reinterpret_cast<float*>(buffer());
    const int lane = threadIdx.x % 32;
    __syncwarp();  // what the buffer held has been read
#pragma unroll
    for (int row = 0; row < kWeightRows; row += 32)
      values[row + lane] = value(engine_.tile_row(tile_, row + lane));
    __syncwarp();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 two = reinterpret_cast<const float2*>(values)[g * 4 + lane % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) apply(g * 4 + i, i % 2 ? two.y : two.x);
    }
  }

  /// A warp's 16 tokens by way of its buffer, in boxes of 16 tokens.
  __device__ __forceinline__ void store(const float (&d)[kSums]) const {
    constexpr int kBoxColumns = kGated ? 32 : 64, kBoxes = Engine::kTileColumns / kBoxColumns;
    constexpr int kPieces = kBoxColumns / 8, kBoxBytes = 16 * kBoxColumns * sizeof(Out);
    const EpilogueArgs& e = engine_.args.epilogue;
    const int warp = threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));  // else the addresses below are kept from tile to tile, and spilled
    // This thread's two columns of a group of eight of out, of its first or second token.
    auto pack = [&](int group, int half) {
      if constexpr (kGated) {
        const float *a = d + group * 8 + half * 2, *b = a + 4;
        return pack_pair<Out>(activate_eights<typename Engine::Form>(e, a[0], b[0]),
                              activate_eights<typename Engine::Form>(e, a[1], b[1]));
      } else {
        const float* a = d + group * 4 + half * 2;
        return pack_pair<Out>(Engine::Form::apply(e, a[0]), Engine::Form::apply(e, a[1]));
      }
    };
    std::byte* to = buffer();
    __syncwarp();  // what the buffer held has been read
#pragma unroll
    for (int g = 0; g < Engine::kTileColumns / 8; g += 2) {
      const std::uint32_t v[4] = {pack(g, 0), pack(g, 1), pack(g + 1, 0), pack(g + 1, 1)};
      store_matrices<false>(
          smem_address(to + g / kPieces * kBoxBytes) + swizzled<kPieces>(lane % 16, g % kPieces + lane / 16),
          v);
    }
    const int column = tile_.weight_tile * Engine::kTileColumns, row = tile_.row + warp * 16;
    const int rows = tile_.rows - warp * 16;
    if (rows >= 16) {
      fence_async_proxy();
      __syncwarp();
      if (elect_one()) {
#pragma unroll
        for (int b = 0; b < kBoxes; ++b)
          if (column + b * kBoxColumns < e.columns)
            store_box(&engine_.maps.out, to + b * kBoxBytes, column + b * kBoxColumns, row);
        commit_stores();
      }
      return;
    }
    __syncwarp();
    Out* out = static_cast<Out*>(e.out) + row * e.out_stride;
    for (int i = lane; i < rows * (Engine::kTileColumns / 8); i += 32) {
      const int r = i / (Engine::kTileColumns / 8), piece = i % (Engine::kTileColumns / 8);
      if (column + piece * 8 < e.columns)
        *reinterpret_cast<uint4*>(out + r * e.out_stride + column + piece * 8) =
            *reinterpret_cast<const uint4*>(to + piece / kPieces * kBoxBytes +
                                            swizzled<kPieces>(r, piece % kPieces));
    }
  }

  const Engine& engine_;
  const Tile& tile_;
  const std::uint32_t tokens_;  // of the ring's first stage
};

template <bool kBlockScales, class Form>
struct Fp8Prefill : Pipeline<Fp8PrefillLoop<kBlockScales>, Form, Tiling::kPrefill> {
  using Base = Pipeline<Fp8PrefillLoop<kBlockScales>, Form, Tiling::kPrefill>;
  using Base::s;

  __device__ __forceinline__ void compute() {
    const int warpgroup = uniform(threadIdx.x / 128);
    typename Base::Ring at;
    for (;;) {
      barrier_wait(&s.full[at.stage], at.phase);
      const Work work = this->work_in(at.stage);
      const int rows = uniform(work.tile.rows);
      if (rows == 0) break;
      if (rows > warpgroup * 64)
        Fp8PrefillPart<Base>(*this, work.tile, warpgroup).compute(at);
      else
        this->pass_over(work, at);
    }
    if (elect_one()) wait_for_stores();
  }
};

template <bool kBlockScales, bool kGated>
Kernel fp8_prefill_kernel() {
  return kernel_of<Fp8Prefill<kBlockScales, std::conditional_t<kGated, SigmoidGate, Linear>>>();
}

}  // namespace moecore::cuda::sm90
