#pragma once
// The main loops of bf16 x mxfp4 and bf16 x nvfp4: codes become bf16 in registers, the tensor cores' A
// operand, and are never written anywhere else. K = 128 a step; a warp has 16 weight rows.
//
// A thread of a quad owns 32 neighbouring columns of rows r and r + 8, 16 bytes of codes each, which it
// decodes word by word into the fragments of two k16 steps. So the k-th column of an MMA is not the k-th of
// the step: x comes in the order that column_of() gives (prepare_x.cu). Of a word's nibbles n0 .. n7 the
// pairs (n_i, n_i+4) are the ones that one shift brings into place. The scales of these rows and columns are
// a byte or two of a step each, which the thread reads from global memory itself.
//
// e2m1 as the exponent and the top of the mantissa of bf16 is its value times 2^-126; one packed multiply
// brings it to code * scale * 2^-kExponent, exactly, subnormal or not:
//   mxfp4  by 2^(E - 3) for E < 128, else by 2^124 and 2^(E - 127): code * scale / 4 fills bf16's range
//   nvfp4  by S * 2^112: code * S * 2^-14
// The sum is multiplied by what is missing at the end.
//
// Few tokens (decode): mma.sync in four warpgroups. Registers as wgmma's operand make a chain out of decoding
// and multiplying, and the latency of its instructions is what limits the loop; four warps on a scheduler
// instead of two, which need not keep in step, hide it. T = 64 of gpt-oss on an H200: 3.3 TB/s of weights;
// two warpgroups of wgmma read a quarter less.
// Many tokens (prefill): wgmma in three warpgroups, up to 192 tokens, decoding a word while the tensor cores
// work on the one before. T = 16384 of gpt-oss: 660 TFLOP/s; with 128 tokens a tile a fifth less.

#include "cuda/device/mma.cuh"
#include "cuda/grouped_gemm/operands.cuh"
#include "cuda/grouped_gemm/prepare_x.h"
#include "cuda/grouped_gemm/sm90_swap_ab.cuh"
#include "cuda/grouped_gemm/wgmma.cuh"

namespace moecore::cuda::sm90 {

__device__ __forceinline__ std::uint32_t multiply_bf16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
  asm("mul.rn.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// The scales of this thread's two rows and columns, read from global memory kAhead steps before their use. A
/// row's K / 32 bytes start anywhere, so no copy engine takes them, and only these threads want them.
template <bool kMx, int kAhead>
class ScaleStream {
 public:
  static constexpr int kColumns = kMx ? 32 : 16, kBytes = 32 / kColumns, kStepBytes = 4 * kBytes;
  /// The code of 32 columns or, nvfp4, the two codes.
  using Codes = std::uint32_t[2];

  template <class Engine>
  __device__ ScaleStream(const Engine& engine, const Work& work) {
    const ScaleArgs& scales = engine.args.weight_scales;
    const int at = work.begin * kStepBytes + kBytes * (threadIdx.x % 4);
    left_ = (engine.args.weight_k + kColumns - 1) / kColumns - at;
    const std::byte* expert = scales.data + work.tile.expert * scales.expert_pitch + at;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_[i] = expert + engine.weight_row(work.tile, 0, i) * scales.row_pitch;
      asm volatile("" : "+l"(row_[i]));  // in registers: else its sum is made anew for every load
    }
    asm volatile("" : "+r"(left_));
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      codes_[j][0] = codes_[j][1] = kMx ? 127 : 0x3838;
      load(j, j);
    }
  }

  /// Of step j of kAhead.
  __device__ __forceinline__ const Codes& operator[](int j) const { return codes_[j]; }
  /// Behind step j: sends for those of the step kAhead further.
  __device__ __forceinline__ void refill(int j) { load(j, j + kAhead); }
  /// mxfp4: whether a code of the kAhead steps is too large for one factor.
  __device__ __forceinline__ bool large() const {
    std::uint32_t any = 0;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) any |= codes_[j][0] | codes_[j][1];
    return any & 0x80;
  }
  /// After kAhead steps.
  __device__ __forceinline__ void advance() {
    left_ -= kAhead * kStepBytes;
    row_[0] += kAhead * kStepBytes;
    row_[1] += kAhead * kStepBytes;
  }

 private:
  /// Beyond K, where codes and x are zero, an earlier scale of the row serves.
  __device__ __forceinline__ void load(int j, int step) {
    if (left_ > step * kStepBytes) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kMx)
          asm volatile("ld.global.nc.L2::128B.u8 %0,[%1];"
                       : "=r"(codes_[j][i])
                       : "l"(row_[i] + step * kStepBytes));
        else
          asm volatile("ld.global.nc.L2::128B.u16 %0,[%1];"
                       : "=r"(codes_[j][i])
                       : "l"(row_[i] + step * kStepBytes));
      }
    }
  }

  const std::byte* row_[2];
  int left_;  // bytes of a row
  Codes codes_[kAhead];
};

template <OperandForm kWeights>
struct DecodedLoop {
  static constexpr bool kMx = kWeights == OperandForm::kMxfp4;
  static constexpr Family kFamily = Family::kDecoded;
  static constexpr bool kExtras = false, kSharedSources = true, kQuantizesOut = false;
  using Element = __nv_bfloat16;
  using Out = __nv_bfloat16;
  static constexpr int kStepK = kDecodedStepK, kStepElements = kStepK / 2, kWeightLineBytes = kStepK / 2,
                       kTokenLines = 2;
  // The wide loop is one for all widths: they differ in a wgmma.
  template <Tiling kTiling>
  using Widths = std::conditional_t<kTiling == Tiling::kDecode, every_width<kFamily, kTiling>,
                                    std::integer_sequence<int, tile_config(kFamily, kTiling).max_tokens>>;
  static constexpr int kExponent = kMx ? 2 : 14;

  template <int kMaxTokens>
  using Extra = NoExtra;
  template <class Engine>
  using Gather = NoGather;

  /// The first lines of scales come from memory before the main loop asks for them.
  template <class Engine>
  static __device__ __forceinline__ void prefetch(const Engine& engine, const Work& work, int thread,
                                                  int threads) {
    const ScaleArgs& scales = engine.args.weight_scales;
    const std::byte* from =
        scales.data + work.tile.expert * scales.expert_pitch + work.begin * ScaleStream<kMx, 1>::kStepBytes;
#pragma unroll 1  // few registers: the token rows have them
    for (int row = thread; row < Engine::kTileRows; row += threads)
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(from + engine.tile_row(work.tile, row) * scales.row_pitch));
  }

  /// What the fields of a row are multiplied by, in words 0, 1 and 2, 3.
  struct Factor {
    std::uint32_t early, late;
  };
  template <bool kTwice>
  static __device__ __forceinline__ Factor factor_of(std::uint32_t code) {
    if constexpr (kMx && kTwice) {
      const std::uint32_t f = (code == 255 ? 0x7FC0u : code == 0 ? 0x0040u : code << 7) * 0x10001u;
      return {f, f};
    } else if constexpr (kMx) {
      const std::uint32_t f = code * 0x00800080u + 0x3E003E00u;
      return {f, f};
    } else {
      // The codes in the high bytes of the halves.
      const std::uint32_t pair =
          multiply_bf16(e4m3_pair<__nv_bfloat16>(__byte_perm(code, 0, 0x1404)), 0x77807780u);
      return {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
    }
  }
  template <bool kTwice>
  static __device__ __forceinline__ std::uint32_t scaled(std::uint32_t fields, std::uint32_t factor) {
    return multiply_bf16(kTwice ? multiply_bf16(fields, 0x7D807D80u) : fields, factor);
  }
  /// Signs and, where the mask has them, exponents and mantissas.
  static __device__ __forceinline__ std::uint32_t fields(std::uint32_t magnitudes, std::uint32_t signs) {
    std::uint32_t r;
    asm("lop3.b32 %0,%1,%2,0x01C001C0,0xE4;" : "=r"(r) : "r"(magnitudes), "r"(signs));
    return r;
  }
  /// A word of eight codes of row `half` as its part of two k16 steps. The integer pipe is what limits tiles
  /// of few tokens, and shifts to the left are multiplications, which another has: there one of the two to
  /// the right is made of the other, 1 to 2 % off their time. Wider tiles lose 1 %.
  template <bool kTwice, bool kFew>
  static __device__ __forceinline__ void decode(std::uint32_t word, std::uint32_t factor, int half,
                                                std::uint32_t (&a)[2][4]) {
    std::uint32_t even, odd;  // signs; masked here, else the compiler masks them once for every pair
    asm("and.b32 %0,%1,0x08080808;" : "=r"(even) : "r"(word));
    asm("and.b32 %0,%1,0x80808080;" : "=r"(odd) : "r"(word));
    std::uint32_t low = word >> 6, third = word >> 2;
    if constexpr (kFew) {
      asm volatile("" : "+r"(low));
      third = low << 4;
    }
    a[0][half] = scaled<kTwice>(fields(word << 6, even << 12), factor);
    a[0][half + 2] = scaled<kTwice>(fields(word << 2, odd << 8), factor);
    a[1][half] = scaled<kTwice>(fields(third, even << 4), factor);
    a[1][half + 2] = scaled<kTwice>(fields(low, odd), factor);
  }

  /// Word v of both rows.
  template <bool kTwice, bool kFew>
  static __device__ __forceinline__ void decode_rows(const uint4 (&words)[2], int v,
                                                     const Factor (&factor)[2], std::uint32_t (&a)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      decode<kTwice, kFew>(reinterpret_cast<const std::uint32_t*>(&words[half])[v],
                           v < 2 ? factor[half].early : factor[half].late, half, a);
  }

  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply(const Engine& engine, const Work& work,
                                                  typename Engine::Ring& at,
                                                  float (&d)[Engine::kBlocks][kTokens / 2]) {
    static_assert(Engine::kBlocks == 1);
    if constexpr (Engine::kTiling == Tiling::kDecode)
      multiply_few<kTokens>(engine, work, at, d[0]);
    else
      multiply_many<kTokens>(engine, work, at, d[0]);
    const float factor = global_factor(engine.args, work.tile.expert) * (1 << kExponent);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) d[0][i] *= factor;
  }

  /// mma.sync. Lane l reads row l % 8 of the matrices l / 8 of tokens: four k8 columns, that is two k16 steps
  /// of eight tokens, at once; a word ahead.
  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply_few(const Engine& engine, const Work& work,
                                                      typename Engine::Ring& at, float (&d)[kTokens / 2]) {
    using Shared = typename Engine::Shared;
    constexpr int kAhead = 4, kGroups = kTokens / 8;
    auto& s = engine.s;
    const int lane = threadIdx.x % 32;
    std::uint32_t codes_at =
        smem_address(s.weights) + (threadIdx.x / 32 * 16 + lane / 4) * kWeightLineBytes + lane % 4 * 16;
    // Of the words 0 and 2, and 1 and 3, in a line's 128-byte swizzle.
    const std::uint32_t row_at = smem_address(s.tokens) + lane % 8 * kLineBytes;
    std::uint32_t tokens_at[2] = {row_at + (lane / 8 ^ lane % 8) * 16,
                                  row_at + (4 + lane / 8 ^ lane % 8) * 16};
    // In registers: else these sums are made anew in every step.
    asm volatile("" : "+r"(codes_at), "+r"(tokens_at[0]), "+r"(tokens_at[1]));
    ScaleStream<kMx, kAhead> scales(engine, work);

    auto multiply_step = [&]<bool kTwice>(int j) {
      barrier_wait(&s.full[at.stage], at.phase);
      const std::uint32_t codes = codes_at + at.stage * Shared::kWeightBytes;
      const uint4 words[2] = {load_16(codes), load_16(codes + 8 * kWeightLineBytes)};
      const std::uint32_t stage = at.stage * (kTokenLines * Shared::kTokenLineBytes);
      const std::uint32_t tokens[2] = {tokens_at[0] + stage, tokens_at[1] + stage};
      std::uint32_t b[2][kGroups][4];
      auto load_tokens = [&](int v) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
          load_matrices(b[v % 2][g], tokens[v % 2] + v / 2 * Shared::kTokenLineBytes + g * 8 * kLineBytes);
      };
      load_tokens(0);
      const Factor factor[2] = {factor_of<kTwice>(scales[j][0]), factor_of<kTwice>(scales[j][1])};
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (v < 3) load_tokens(v + 1);
        std::uint32_t a[2][4];
        decode_rows<kTwice, kTokens <= 8>(words, v, factor, a);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int g = 0; g < kGroups; ++g)
            dev::mma(reinterpret_cast<float (&)[4]>(d[4 * g]), a[h], b[v % 2][g][2 * h],
                     b[v % 2][g][2 * h + 1], __nv_bfloat16{});
      }
      scales.refill(j);
      __syncwarp();
      engine.release(at.stage);
      at.advance();
    };
    auto multiply_steps = [&]<bool kTwice>(int steps) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= steps) break;
        multiply_step.template operator()<kTwice>(j);
      }
    };
    for (int k = work.begin; k < work.end; k += kAhead) {
      if (kMx && __any_sync(~0u, scales.large()))
        multiply_steps.template operator()<true>(work.end - k);
      else
        multiply_steps.template operator()<false>(work.end - k);
      scales.advance();
    }
  }

  /// wgmma of the narrowest multiple of 16 tokens that holds the tile. One group stays in flight, over the
  /// other half of `a`.
  template <int kTokens, class Engine>
  static __device__ __forceinline__ void multiply_many(const Engine& engine, const Work& work,
                                                       typename Engine::Ring& at, float (&d)[kTokens / 2]) {
    auto& s = engine.s;
    const int lane = threadIdx.x % 32, sixteenths = (work.tile.rows + 15) / 16;
    const int codes_at = (threadIdx.x / 32 * 16 + lane / 4) * kWeightLineBytes + lane % 4 * 16;
    ScaleStream<kMx, 1> scales(engine, work);
    std::uint32_t a[2][2][4];
    int previous = 0;
    for (int k = work.begin; k < work.end; ++k) {
      const bool twice = kMx && __any_sync(~0u, scales.large());
      barrier_wait(&s.full[at.stage], at.phase);
      if (!engine.boxes) fence_async_proxy();
      const std::byte* codes = s.weights[at.stage] + codes_at;
      const uint4 words[2] = {*reinterpret_cast<const uint4*>(codes),
                              *reinterpret_cast<const uint4*>(codes + 8 * kWeightLineBytes)};
      const std::uint64_t tokens[2] = {tile_descriptor(s.tokens[at.stage][0]),
                                       tile_descriptor(s.tokens[at.stage][1])};
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        wgmma_wait<1>();
        if (v == 1 && k > work.begin) engine.release(previous);
        auto decode_word = [&]<bool kTwice>() {
          const Factor factor[2] = {factor_of<kTwice>(scales[0][0]), factor_of<kTwice>(scales[0][1])};
          decode_rows<kTwice, false>(words, v, factor, a[v % 2]);
        };
        if (twice)
          decode_word.template operator()<true>();
        else
          decode_word.template operator()<false>();
        with_width<1, kTokens / 16>(sixteenths, [&]<int kWidth>() {
          wgmma_fence();
#pragma unroll
          for (int h = 0; h < 2; ++h)
            WgmmaDecoded<kWidth>::op(reinterpret_cast<float (&)[kWidth / 2]>(d), a[v % 2][h],
                                     tokens[v / 2] + (v % 2 * 2 + h) * 2);
          wgmma_commit();
        });
      }
      scales.refill(0);
      scales.advance();
      previous = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    engine.release(previous);
  }

  /// f<width>() for the narrowest of the multiples of 16 that holds `sixteenths` of them.
  template <int kFirst, int kLast, class F>
  static __device__ __forceinline__ void with_width(int sixteenths, const F& f) {
    constexpr int kMiddle = (kFirst + kLast) / 2;
    if constexpr (kFirst == kLast)
      f.template operator()<16 * kFirst>();
    else if (sixteenths <= kMiddle)
      with_width<kFirst, kMiddle>(sixteenths, f);
    else
      with_width<kMiddle + 1, kLast>(sixteenths, f);
  }
};

}  // namespace moecore::cuda::sm90
