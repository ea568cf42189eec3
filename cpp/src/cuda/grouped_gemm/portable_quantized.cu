// The portable engine on quantised operands: every pair of forms, any K, N, alignment and pitch of scales.
//
// As in portable.cu a block of four warps computes 128 weight rows x kTokens tokens from a ring of three
// steps, here of 64 columns. Rows lie in shared memory as they lie in memory, codes as codes, so that the
// ring holds few bytes, and become fragments on the way to registers:
//   x of f16, bf16   codes of weights as x's type, mma.sync m16n8k16;
//   x of codes       both as f16, which holds every e4m3 and e2m1 value;
//   x of f32         fma.
// Of every 16 columns thread q of four owns 4q .. 4q+3 in both operands, which is as good an order of K for
// the MMA as any and lets a thread read neighbours.
//
// Scales never enter the operands: the products of kUnit columns, which share their scales, are summed alone
// and join the sum in one multiply-add by the scales. So codes are exact in any 16-bit type, scales may be as
// extreme as their format allows, and a unit is the longest run of f32 additions without them.
//
// The scales of a step travel through registers: thread t reads those of weight row t and of token t while an
// earlier step is multiplied, and leaves them in shared memory as f32.

#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/operands.cuh"
#include "cuda/grouped_gemm/portable.cuh"
#include "cuda/grouped_gemm/portable.h"
#include "cuda/types.cuh"

namespace moecore::cuda::portable {
namespace {

constexpr int kStep = 64;  // columns

/// Rows of one step in shared memory, padded so that the rows of a fragment fall into different banks.
template <class Stored>
struct Rows {
  static constexpr int kBytes = kStep * kBits<Stored> / 8;
  static constexpr int kPitch = kBytes + (kBits<Stored> == 16 ? 32 : 16);
  static constexpr int kPieces = kBytes / 16;
  static constexpr int kAtOnce = kThreads / kPieces;  // rows that the block's threads copy together
};

template <class X, class W, int kUnit, int kTokens>
struct Smem {
  static constexpr int kUnits = kStep / kUnit;
  alignas(16) std::byte weights[kStages][kTileRows * Rows<W>::kPitch];
  alignas(16) std::byte tokens[kStages][kTokens * Rows<X>::kPitch];
  float weight_scales[kStages][kUnits][kTileRows];
  float token_scales[kStages][kUnits][kTokens];
  int group_tiles[kMaxExpertGroups];
};

/// 16 bytes of a row, from byte `at`; `from` null or `at` behind the row's `bytes`: zeros. `tail`: the last
/// byte holds one e2m1 only.
template <class Stored>
__device__ __forceinline__ void load_piece(std::byte* to, const std::byte* from, int at, int bytes,
                                           bool aligned, bool tail) {
  const int left = from ? max(0, min(16, bytes - at)) : 0;
  if (aligned) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(smem_address(to)),
                 "l"(left ? from + at : nullptr), "r"(left)
                 : "memory");
    return;
  }
  using Element = std::conditional_t<kBits<Stored> == 32, std::uint32_t,
                                     std::conditional_t<kBits<Stored> == 16, std::uint16_t, std::uint8_t>>;
#pragma unroll
  for (int i = 0; i < 16; i += sizeof(Element)) {
    Element v = i < left ? *reinterpret_cast<const Element*>(from + at + i) : Element{0};
    if (tail && at + i == bytes - 1) v &= 0x0F;
    *reinterpret_cast<Element*>(to + i) = v;
  }
}

/// The scales of one row, unit by unit.
template <int kUnit>
struct ScaleReader {
  static constexpr int kUnits = kStep / kUnit;
  const std::byte* row = nullptr;
  std::int64_t pitch = 0;  // from block to block
  int units_per_block = 1;
  DType type = DType::kF32;

  __device__ ScaleReader(const ScaleArgs& s, int expert, std::int64_t r) : pitch(s.col_pitch), type(s.dtype) {
    if (r < 0) return;
    row = s.data + expert * s.expert_pitch + r / s.block_rows * s.row_pitch;
    if (s.block_cols) units_per_block = s.block_cols / kUnit;
  }
  __device__ void read(int first_column, int k, std::uint32_t (&bits)[kUnits]) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = first_column + u * kUnit;
      bits[u] = row && column < k ? read_scale(row + column / kUnit / units_per_block * pitch, type) : 0;
    }
  }
};

template <class X, class W, int kUnit, int kTokens>
__device__ __forceinline__ void multiply(const Smem<X, W, kUnit, kTokens>& s, int stage,
                                         float (&c)[2][kTokens / 8][4]) {
  constexpr bool kScaledX = std::is_same_v<X, E4m3Codes> || std::is_same_v<X, E2m1Codes>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const std::byte* weights = s.weights[stage] + (warp * 32 + g) * Rows<W>::kPitch;
  const std::byte* tokens = s.tokens[stage];
#pragma unroll
  for (int u = 0; u < kStep / kUnit; ++u) {
    float row_scale[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) row_scale[i / 2][i % 2] = s.weight_scales[stage][u][warp * 32 + i * 8 + g];
    auto join = [&](int n, const float (&p)[2][4]) {
      const float2 scale = kScaledX ? reinterpret_cast<const float2*>(s.token_scales[stage][u])[n * 4 + q]
                                    : float2{1.0f, 1.0f};
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float rows = row_scale[m][j / 2], columns = j % 2 ? scale.y : scale.x;
          c[m][n][j] = kScaledX ? __fmaf_rn(p[m][j] * rows, columns, c[m][n][j])
                                : __fmaf_rn(p[m][j], rows, c[m][n][j]);
        }
    };
    if constexpr (std::is_same_v<X, float>) {
      float p[kTokens / 8][2][4] = {};
#pragma unroll 2
      for (int k = u * kUnit; k < (u + 1) * kUnit; ++k) {
        float a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = element<W>(weights + i * 8 * Rows<W>::kPitch, k);
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float b = element<X>(tokens + (n * 8 + q * 2 + j) * Rows<X>::kPitch, k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              p[n][i / 2][i % 2 * 2 + j] = __fmaf_rn(a[i], b, p[n][i / 2][i % 2 * 2 + j]);
          }
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) join(n, p[n]);
    } else {
      using T = std::conditional_t<kScaledX, __half, X>;
      unsigned a[kUnit / 16][2][4];
#pragma unroll
      for (int h = 0; h < kUnit / 16; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint2 v =
              four_elements<T, W>(weights + i * 8 * Rows<W>::kPitch, (u * kUnit / 16 + h) * 4 + q);
          a[h][i / 2][i % 2] = v.x;
          a[h][i / 2][i % 2 + 2] = v.y;
        }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        float p[2][4] = {};
#pragma unroll
        for (int h = 0; h < kUnit / 16; ++h) {
          const uint2 b =
              four_elements<T, X>(tokens + (n * 8 + g) * Rows<X>::kPitch, (u * kUnit / 16 + h) * 4 + q);
#pragma unroll
          for (int m = 0; m < 2; ++m) mma(p[m], a[h][m], b.x, b.y, T{});
        }
        join(n, p);
      }
    }
  }
}

template <class X, class W, int kUnit, int kTokens>
__global__ void __launch_bounds__(kThreads)
    quantized_kernel(const __grid_constant__ GroupedGemmArgs args, const DType out_type, const bool aligned) {
  extern __shared__ __align__(16) std::byte raw[];
  using Shared = Smem<X, W, kUnit, kTokens>;
  Shared& s = *reinterpret_cast<Shared*>(raw);
  dev::wait_for_predecessor();
  dev::release_successor();
  count_group_tiles(args, s.group_tiles);
  __syncthreads();

  const int steps = (args.k + kStep - 1) / kStep, thread = threadIdx.x;
  const int weight_bytes = (args.k * kBits<W> + 7) / 8,
            token_bytes = static_cast<int>((std::int64_t{args.k} * kBits<X> + 7) / 8);
  const bool tail = kBits<X> == 4 && args.k % 2;
  TileCursor cursor(args, s.group_tiles);
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Tile tile = cursor.find(number);
    if (tile.rows == 0) return;

    // The rows that this thread copies, and the two whose scales it reads.
    constexpr int kWeightRows = kTileRows / Rows<W>::kAtOnce,
                  kTokenRows = (kTokens + Rows<X>::kAtOnce - 1) / Rows<X>::kAtOnce;
    const std::byte* weight_rows[kWeightRows];
    const std::byte* token_rows[kTokenRows];
    const int weight_row = thread / Rows<W>::kPieces, weight_piece = thread % Rows<W>::kPieces * 16;
    const int token_row = thread / Rows<X>::kPieces, token_piece = thread % Rows<X>::kPieces * 16;
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      const std::int64_t row =
          weight_row_of(args.epilogue, tile.weight_tile, weight_row + i * Rows<W>::kAtOnce);
      weight_rows[i] =
          row < 0
              ? nullptr
              : static_cast<const std::byte*>(args.weights) +
                    (tile.expert * args.weight_expert_stride + row * args.weight_row_stride) * kBits<W> / 8;
    }
#pragma unroll
    for (int i = 0; i < kTokenRows; ++i) {
      const std::int64_t row = token_row_of(args, tile, token_row + i * Rows<X>::kAtOnce);
      token_rows[i] =
          row < 0 ? nullptr : static_cast<const std::byte*>(args.x) + row * args.x_stride * kBits<X> / 8;
    }
    auto load = [&](int step) {
      if (step < steps) {
        const int stage = step % kStages;
#pragma unroll
        for (int i = 0; i < kWeightRows; ++i)
          load_piece<W>(
              s.weights[stage] + (weight_row + i * Rows<W>::kAtOnce) * Rows<W>::kPitch + weight_piece,
              weight_rows[i], step * Rows<W>::kBytes + weight_piece, weight_bytes, aligned, false);
#pragma unroll
        for (int i = 0; i < kTokenRows; ++i)
          if (token_row + i * Rows<X>::kAtOnce < kTokens)
            load_piece<X>(
                s.tokens[stage] + (token_row + i * Rows<X>::kAtOnce) * Rows<X>::kPitch + token_piece,
                token_rows[i], step * Rows<X>::kBytes + token_piece, token_bytes, aligned && !tail, tail);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };

    const ScaleReader<kUnit> weight_scales(args.weight_scales, tile.expert,
                                           weight_row_of(args.epilogue, tile.weight_tile, thread));
    const ScaleReader<kUnit> token_scales(
        args.x_scales, 0, args.x_scales.data && thread < kTokens ? token_row_of(args, tile, thread) : -1);
    struct StepScales {
      std::uint32_t weight[kStep / kUnit], token[kStep / kUnit];
    };
    auto read_scales = [&](int step) {
      StepScales bits;
      weight_scales.read(step * kStep, args.k, bits.weight);
      token_scales.read(step * kStep, args.k, bits.token);
      return bits;
    };
    auto store_scales = [&](int step, const StepScales& bits) {
#pragma unroll
      for (int u = 0; u < kStep / kUnit; ++u) {
        s.weight_scales[step % kStages][u][thread] = scale_to_f32(bits.weight[u], weight_scales.type);
        if (thread < kTokens)
          s.token_scales[step % kStages][u][thread] = scale_to_f32(bits.token[u], token_scales.type);
      }
    };

    float c[2][kTokens / 8][4] = {};
    for (int step = 0; step < kStages - 1; ++step) {
      load(step);
      store_scales(step, read_scales(step));
    }
    for (int step = 0; step < steps; ++step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // the step has landed, and everyone is done with the stage that is loaded next
      load(step + kStages - 1);
      const StepScales next = read_scales(step + kStages - 1);
      multiply<X, W, kUnit, kTokens>(s, step % kStages, c);
      store_scales(step + kStages - 1, next);
    }
    __syncthreads();

    if (args.weight_scales.global_scale || args.x_scales.global_scale) {
      const float factor = global_factor(args, tile.expert);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) c[i / (kTokens / 2)][i / 4 % (kTokens / 8)][i % 4] *= factor;
    }
    if constexpr (std::is_same_v<X, E4m3Codes> || std::is_same_v<X, E2m1Codes>) {
      if (out_type == DType::kF32)
        store<float, kTokens>(args.epilogue, tile, c);
      else if (out_type == DType::kF16)
        store<__half, kTokens>(args.epilogue, tile, c);
      else
        store<__nv_bfloat16, kTokens>(args.epilogue, tile, c);
    } else {
      store<X, kTokens>(args.epilogue, tile, c);
    }
  }
}

template <class X, class W, int kUnit, int kTokens>
void run_width(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  GroupedGemmArgs args = device_args(p);
  args.tiles = {.max_tokens = kTokens, .weight_tiles = static_cast<int>((p.n + kTileRows - 1) / kTileRows)};
  const auto kernel = quantized_kernel<X, W, kUnit, kTokens>;
  constexpr std::size_t kSmem = sizeof(Smem<X, W, kUnit, kTokens>);
  const int blocks =
      blocks_per_sm("grouped_gemm", device, reinterpret_cast<const void*>(kernel), kThreads, kSmem);
  launch("grouped_gemm", device,
         {.grid = dim3(device.num_sms * blocks),
          .block = dim3(kThreads),
          .smem_bytes = kSmem,
          .stream = stream(ctx),
          .dependent = true},
         kernel, args, p.dtype, rows_aligned(p));
}

template <class X, class W, int kUnit>
void run(const GroupedGemmProblem& p, int tokens, const DeviceInfo& device, const ExecContext& ctx) {
  tokens == kNarrow ? run_width<X, W, kUnit, kNarrow>(p, device, ctx)
                    : run_width<X, W, kUnit, kWide>(p, device, ctx);
}

template <class X>
void run_float_x(const GroupedGemmProblem& p, int tokens, const DeviceInfo& device, const ExecContext& ctx) {
  switch (p.weight_scales.form) {
    case OperandForm::kMxfp4:
      return run<X, E2m1Codes, 32>(p, tokens, device, ctx);
    case OperandForm::kNvfp4:
      return run<X, E2m1Codes, 16>(p, tokens, device, ctx);
    default:
      return run<X, E4m3Codes, 32>(p, tokens, device, ctx);
  }
}

}  // namespace

void run_quantized(const GroupedGemmProblem& p, int tokens, const DeviceInfo& device,
                   const ExecContext& ctx) {
  const bool mxfp4 = p.weight_scales.form == OperandForm::kMxfp4;
  switch (p.x_scales.form) {
    case OperandForm::kFloat:
      return visit_instance(GroupedGemmTypes{}, p.dtype,
                            [&]<DType D>() { run_float_x<cuda_t<D>>(p, tokens, device, ctx); });
    case OperandForm::kMxfp8:
      return mxfp4 ? run<E4m3Codes, E2m1Codes, 32>(p, tokens, device, ctx)
                   : run<E4m3Codes, E2m1Codes, 16>(p, tokens, device, ctx);
    case OperandForm::kNvfp4:
      return run<E2m1Codes, E2m1Codes, 16>(p, tokens, device, ctx);
    default:
      return run<E4m3Codes, E4m3Codes, 32>(p, tokens, device, ctx);
  }
}

}  // namespace moecore::cuda::portable
