// The engine that takes every problem on every architecture from sm_80 on: any K, N, alignment and
// activation.
// (Quantised operands: portable_quantized.cu.)
//
// As in the Hopper engine the weights are the MMA's rows and the tokens its columns. A block of four warps
// computes 128 weight rows x kTokens tokens, 32 rows a warp, from a ring of three steps of 64 bytes of K:
//   bf16, f16   mma.sync m16n8k16, fragments by ldmatrix;
//   f32         fma on the same fragments, in ascending k.
// A row of shared memory is 64 bytes of K and 16 of padding, so that eight rows of a fragment fall into
// different banks. Rows reach it by 16-byte cp.async, or element by element when they are not aligned;
// everything beyond K, N or the tile's rows is zero.

#include <cstdio>

#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/portable.cuh"
#include "cuda/grouped_gemm/portable.h"
#include "cuda/policy_override.h"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

using namespace portable;

constexpr int kStepBytes = 64;  // of K
constexpr int kPitch = kStepBytes + 16;
constexpr int kPieces = kStepBytes / 16;

__device__ __forceinline__ void load_fragments(const std::byte* p, unsigned (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(smem_address(p)));
}
/// One step: 32 weight rows times kTokens tokens.
template <class T, int kTokens>
__device__ __forceinline__ void multiply(const std::byte* weights, const std::byte* tokens,
                                         float (&c)[2][kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kStepBytes; k += 32) {
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_fragments(weights + (m * 16 + lane % 16) * kPitch + k + lane / 16 * 16, a[m]);
#pragma unroll
      for (int n = 0; n < kTokens / 16; ++n) {
        unsigned b[4];
        load_fragments(tokens + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 16, b);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(c[m][2 * n], a[m], b[0], b[1], T{});
          mma(c[m][2 * n + 1], a[m], b[2], b[3], T{});
        }
      }
    }
  } else {
    auto element = [](const std::byte* rows, int row, int k) {
      return *reinterpret_cast<const float*>(rows + row * kPitch + k * 4);
    };
#pragma unroll 4
    for (int k = 0; k < kStepBytes / 4; ++k) {
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = element(weights, i * 8 + lane / 4, k);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float b = element(tokens, n * 8 + lane % 4 * 2 + j, k);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            c[i / 2][n][i % 2 * 2 + j] = __fmaf_rn(a[i], b, c[i / 2][n][i % 2 * 2 + j]);
        }
    }
  }
}

/// 16 bytes of a row's K into shared memory; `from` null: zeros.
template <class T, bool kAligned>
__device__ __forceinline__ void load_piece(std::byte* to, const T* from, int k, int k_end) {
  constexpr int kElements = 16 / sizeof(T);
  const int left = from ? min(kElements, k_end - k) : 0;
  if constexpr (kAligned) {
    const int bytes = max(left, 0) * static_cast<int>(sizeof(T));
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(smem_address(to)),
                 "l"(bytes ? from + k : nullptr), "r"(bytes)
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) reinterpret_cast<T*>(to)[i] = i < left ? from[k + i] : T(0.0f);
  }
}

template <class T, int kTokens, bool kAligned>
__global__ void __launch_bounds__(kThreads) portable_kernel(const __grid_constant__ GroupedGemmArgs args) {
  __shared__ __align__(16) std::byte weights[kStages][kTileRows * kPitch];
  __shared__ __align__(16) std::byte tokens[kStages][kTokens * kPitch];
  __shared__ int group_tiles[kMaxExpertGroups];
  dev::wait_for_predecessor();
  dev::release_successor();
  count_group_tiles(args, group_tiles);
  __syncthreads();

  constexpr int kStepK = kStepBytes / sizeof(T);
  const int steps = (args.k + kStepK - 1) / kStepK;
  const int warp = threadIdx.x / 32, piece = threadIdx.x % kPieces;
  TileCursor cursor(args, group_tiles);
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Tile tile = cursor.find(number);
    if (tile.rows == 0) return;

    // The rows that this thread copies: r, r + 32, ...
    constexpr int kRowsAtOnce = kThreads / kPieces;
    const int r = threadIdx.x / kPieces;
    auto weight_row = [&](int i) -> const T* {
      const std::int64_t at = weight_row_of(args.epilogue, tile.weight_tile, r + i * kRowsAtOnce);
      return at < 0 ? nullptr
                    : static_cast<const T*>(args.weights) + tile.expert * args.weight_expert_stride +
                          at * args.weight_row_stride;
    };
    auto token_row = [&](int i) -> const T* {
      const std::int64_t at = token_row_of(args, tile, r + i * kRowsAtOnce);
      return at < 0 ? nullptr : static_cast<const T*>(args.x) + at * args.x_stride;
    };
    constexpr int kWeightRows = kTileRows / kRowsAtOnce,
                  kTokenRows = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
    const T* weight_rows[kWeightRows];
    const T* token_rows[kTokenRows];
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) weight_rows[i] = weight_row(i);
#pragma unroll
    for (int i = 0; i < kTokenRows; ++i) token_rows[i] = token_row(i);
    auto load = [&](int step) {
      if (step < steps) {
        const int stage = step % kStages, k = step * kStepK + piece * (16 / static_cast<int>(sizeof(T)));
#pragma unroll
        for (int i = 0; i < kWeightRows; ++i)
          load_piece<T, kAligned>(weights[stage] + (r + i * kRowsAtOnce) * kPitch + piece * 16,
                                  weight_rows[i], k, args.k);
#pragma unroll
        for (int i = 0; i < kTokenRows; ++i)
          if (r + i * kRowsAtOnce < kTokens)
            load_piece<T, kAligned>(tokens[stage] + (r + i * kRowsAtOnce) * kPitch + piece * 16,
                                    token_rows[i], k, args.k);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float c[2][kTokens / 8][4] = {};
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // the step has landed, and everyone is done with the stage that is loaded next
      load(step + kStages - 1);
      multiply<T, kTokens>(weights[step % kStages] + warp * 32 * kPitch, tokens[step % kStages], c);
    }
    __syncthreads();
    store<T, kTokens>(args.epilogue, tile, c);
  }
}

/// Widest token tile.
int tile_tokens(const GroupedGemmProblem& p, const ExecContext& ctx) {
  int tokens = p.num_rows <= kNarrow * p.num_experts ? kNarrow : kWide;
  int portable = 0;  // the Hopper engine's, which passed this problem on
  override_policy("grouped_gemm", ctx.policy,
                  {{"max_tokens", &tokens, {kNarrow, kWide}}, {"portable", &portable, {0, 1}}});
  return tokens;
}

std::string refusal(const GroupedGemmProblem& p, const DeviceInfo&, const ExecContext&) {
  if (p.num_experts > kMaxExperts) return "more than 2048 experts";
  return p.quantized_out ? "it stores floats" : "";
}

std::string describe(const GroupedGemmProblem& p, const DeviceInfo&, const ExecContext& ctx) {
  char text[128];
  std::snprintf(text, sizeof(text), "%s, %d weight rows x up to %d tokens, rows by %s",
                p.dtype == DType::kF32 && p.x_scales.form == OperandForm::kFloat ? "fma" : "mma.sync",
                kTileRows, tile_tokens(p, ctx), rows_aligned(p) ? "16-byte copies" : "single elements");
  return text;
}

template <class T, int kTokens>
void run_width(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  GroupedGemmArgs args = device_args(p);
  args.tiles = {.max_tokens = kTokens, .weight_tiles = static_cast<int>((p.n + kTileRows - 1) / kTileRows)};
  const auto kernel =
      rows_aligned(p) ? portable_kernel<T, kTokens, true> : portable_kernel<T, kTokens, false>;
  const int blocks =
      blocks_per_sm("grouped_gemm", device, reinterpret_cast<const void*>(kernel), kThreads, 0);
  launch("grouped_gemm", device,
         {.grid = dim3(device.num_sms * blocks),
          .block = dim3(kThreads),
          .stream = stream(ctx),
          .dependent = true},
         kernel, args);
}

void run(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  if (p.weight_scales.form != OperandForm::kFloat) return run_quantized(p, tile_tokens(p, ctx), device, ctx);
  visit_instance(GroupedGemmTypes{}, p.dtype, [&]<DType D>() {
    tile_tokens(p, ctx) == kNarrow ? run_width<cuda_t<D>, kNarrow>(p, device, ctx)
                                   : run_width<cuda_t<D>, kWide>(p, device, ctx);
  });
}

}  // namespace

bool portable::rows_aligned(const GroupedGemmProblem& p) {
  const std::int64_t x_bits = element_bits(p.x_scales.form, p.dtype),
                     weight_bits = element_bits(p.weight_scales.form, p.dtype);
  auto aligned = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
  return aligned(p.x) && aligned(p.weights) && p.x_stride * x_bits % 128 == 0 &&
         p.weight_row_stride * weight_bits % 128 == 0 && p.weight_expert_stride * weight_bits % 128 == 0;
}

const GroupedGemmEngine kPortableEngine{"the portable engine", refusal, describe, run};

}  // namespace moecore::cuda
