#pragma once
// The main loop of bf16 x mxfp4 and bf16 x nvfp4: codes become bf16 in registers, wgmma's A operand, and are
// never written anywhere else. K = 128 a step.
//
// A thread of a quad owns 32 neighbouring columns of its rows, 16 bytes of codes, which it decodes word by
// word into the fragments of two k16 steps. So the k-th column of an MMA is not the k-th of the step: x comes
// in the order that column_of() gives (prepare_x.cu). Of a word's nibbles n0 .. n7 the pairs (n_i, n_i+4) are
// the ones that one shift brings into place.
//
// e2m1 as the exponent and the top of the mantissa of bf16 is its value times 2^-126; one packed multiply
// brings it to code * scale * 2^-kExponent, exactly, subnormal or not:
//   mxfp4  by 2^(E - 3) for E < 128, else by 2^124 and 2^(E - 127): code * scale / 4 fills bf16's range
//   nvfp4  by S * 2^112: code * S * 2^-14
// The sum is multiplied by what is missing at the end.

#include "cuda/grouped_gemm/operands.cuh"
#include "cuda/grouped_gemm/prepare_x.h"
#include "cuda/grouped_gemm/sm90.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

__device__ __forceinline__ std::uint32_t multiply_bf16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
  asm("mul.rn.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// Nibbles kPair and kPair + 4 of a word, as the signs, exponents and mantissas of a pair of bf16. A product
/// moves sign and magnitude by two distances at once, and leaves the integer pipe for masks.
template <int kPair>
__device__ __forceinline__ std::uint32_t e2m1_fields(std::uint32_t word) {
  const std::uint32_t nibbles = (kPair < 2 ? word : word >> 8) & (kPair % 2 ? 0x00F000F0u : 0x000F000Fu);
  return nibbles * (kPair % 2 ? 0x0104u : 0x1040u) & 0x81C081C0u;
}

template <OperandForm kWeights>
struct DecodedLoop {
  static constexpr bool kMx = kWeights == OperandForm::kMxfp4;
  static constexpr Family kFamily = Family::kDecoded;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  using Element = __nv_bfloat16;
  using Out = __nv_bfloat16;
  static constexpr int kStepK = kDecodedStepK, kStepElements = kStepK / 2, kWeightLineBytes = kStepK / 2,
                       kTokenLines = 2;
  // More of them, and ptxas serialises wgmma.
  template <Tiling kTiling>
  using Widths = std::conditional_t<kTiling == Tiling::kDecode, std::integer_sequence<int, 8, 16, 32>,
                                    std::integer_sequence<int, 24, 48, 72, 96, 112>>;
  static constexpr int kExponent = kMx ? 2 : 14;
  static constexpr int kScaleBytes = kMx ? kStepK / 32 : kStepK / 16;  // of a row's step

  /// Of every weight row the two words that hold the step's scales; those of mxfp4 need not start one.
  template <int kMaxTokens>
  struct Extra {
    uint2 scales[kTileRows];
  };

  /// Thread t copies the scales of rows t, t + 96 and t + 192.
  template <class Engine>
  struct Gather {
    const Engine& engine;
    const int thread;
    const Tile& tile;

    __device__ Gather(const Engine& engine, const Work& work, int thread)
        : engine(engine), thread(thread), tile(work.tile) {}
    __device__ void copy(int stage, int k) {
      const ScaleArgs& scales = engine.args.weight_scales;
      const std::byte* expert = scales.data + tile.expert * scales.expert_pitch + k * kScaleBytes;
      const int left = (engine.args.weight_k + kScaleColumns - 1) / kScaleColumns - k * kScaleBytes;
#pragma unroll 1  // few registers: the token rows have them
      for (int row = thread; row < kTileRows; row += kGatherThreads) {
        const std::byte* from = expert + engine.tile_row(tile, row) * scales.row_pitch;
        const int skipped = kMx ? static_cast<int>(reinterpret_cast<std::uintptr_t>(from) & 3) : 0;
        const int bytes = left + skipped;
        const std::uint32_t to = smem_address(&engine.s.extra[stage].scales[row]);
        copy_4(to, from - skipped, min(4, bytes));
        copy_4(to + 4, from - skipped + (bytes > 4 ? 4 : 0), max(0, min(4, bytes - 4)));
      }
    }
    static constexpr int kScaleColumns = kMx ? 32 : 16;
  };

  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply(const Engine& engine, const Work& work,
                                                  typename Engine::Ring& at,
                                                  float (&d)[kBlocks][kTokens / 2]) {
    auto& s = engine.s;
    const int warpgroup = threadIdx.x / 128, q = threadIdx.x % 4;
    const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // of block 0
    // mxfp4: where in the two words this thread's scale is.
    [[maybe_unused]] std::uint32_t byte[kBlocks][2];
    if constexpr (kMx) {
      const ScaleArgs& scales = engine.args.weight_scales;
      const auto base =
          reinterpret_cast<std::uintptr_t>(scales.data + work.tile.expert * scales.expert_pitch);
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i)
        byte[i / 2][i % 2] = static_cast<std::uint32_t>(
            ((base + engine.weight_row(work.tile, i / 2, i % 2) * scales.row_pitch) & 3) + q);
    }

    int previous = 0;
    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&s.full[at.stage], at.phase);
      fence_async_proxy();
      auto scale_words = [&](int m, int half) { return s.extra[at.stage].scales[m * 128 + row + half * 8]; };
      [[maybe_unused]] std::uint32_t exponents[kBlocks][2] = {}, any = 0;
      if constexpr (kMx) {
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
          const uint2 words = scale_words(i / 2, i % 2);
          any |= exponents[i / 2][i % 2] = __byte_perm(words.x, words.y, byte[i / 2][i % 2]) & 0xFF;
        }
      }
      const std::uint64_t tokens[2] = {tile_descriptor(s.tokens[at.stage][0]),
                                       tile_descriptor(s.tokens[at.stage][1])};
      auto run = [&](const auto& factor_of) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const uint4* rows =
              reinterpret_cast<const uint4*>(s.weights[at.stage] + (m * 128 + row) * kWeightLineBytes) + q;
          const decltype(factor_of(0, 0)) factors[2] = {factor_of(m, 0), factor_of(m, 1)};
          const uint4 first = rows[0], second = rows[8 * kWeightLineBytes / 16];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const std::uint32_t word[2] = {reinterpret_cast<const std::uint32_t*>(&first)[v],
                                           reinterpret_cast<const std::uint32_t*>(&second)[v]};
            std::uint32_t a[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              a[0][half] = factors[half](e2m1_fields<0>(word[half]), v);
              a[0][half + 2] = factors[half](e2m1_fields<1>(word[half]), v);
              a[1][half] = factors[half](e2m1_fields<2>(word[half]), v);
              a[1][half + 2] = factors[half](e2m1_fields<3>(word[half]), v);
            }
            wgmma_fence();
#pragma unroll
            for (int h = 0; h < 2; ++h)
              WgmmaDecoded<kTokens>::op(d[m], a[h], tokens[v / 2] + (v % 2 * 2 + h) * 2);
            wgmma_commit();
            wgmma_wait<1>();
            if (m + v == 0 && k > work.begin && threadIdx.x % 32 == 0) barrier_arrive(&s.empty[previous]);
          }
        }
      };
      // What the fields of a row are multiplied by, in words v = 0 .. 3.
      struct ByOne {
        std::uint32_t early, late;
        __device__ std::uint32_t operator()(std::uint32_t fields, int v) const {
          return multiply_bf16(fields, v < 2 ? early : late);
        }
      };
      struct ByTwo {
        std::uint32_t scale;
        __device__ std::uint32_t operator()(std::uint32_t fields, int) const {
          return multiply_bf16(multiply_bf16(fields, 0x7D807D80u), scale);
        }
      };
      auto by_one = [&](int m, int half) {
        if constexpr (kMx) {
          const std::uint32_t factor = exponents[m][half] * 0x00800080u + 0x3E003E00u;
          return ByOne{factor, factor};
        } else {
          const uint2 words = scale_words(m, half);
          // The thread's two codes in the high bytes of the halves.
          const std::uint32_t codes = __byte_perm(q < 2 ? words.x : words.y, 0, q % 2 ? 0x3424 : 0x1404);
          const std::uint32_t pair = multiply_bf16(e4m3_pair<__nv_bfloat16>(codes), 0x77807780u);
          return ByOne{__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
        }
      };
      auto by_two = [&](int m, int half) {
        const std::uint32_t e = exponents[m][half];
        return ByTwo{(e == 255 ? 0x7FC0u : e == 0 ? 0x0040u : e << 7) * 0x10001u};
      };
      if constexpr (!kMx) {
        run(by_one);
      } else if constexpr (Engine::kMaxTokens > 32) {
        run(by_two);  // the tensor cores are the limit, and a second body would serialise them
      } else if (__any_sync(~0u, any & 0x80)) {
        run(by_two);
      } else {
        run(by_one);
      }
      previous = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[previous]);
    const float factor = global_factor(engine.args, work.tile.expert) * (1 << kExponent);
#pragma unroll
    for (int i = 0; i < kBlocks * kTokens / 2; ++i) d[i / (kTokens / 2)][i % (kTokens / 2)] *= factor;
  }
};

}  // namespace moecore::cuda::sm90
