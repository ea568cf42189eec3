// finalize: out[t,h] = RN(sum_j w[t,j] * rows[slot_row[t,j], h] (+ residual[t,h])), an f32 fma chain in slot
// order.
//
// Grid (slices, tokens): a thread owns kWidth neighbouring columns of one token. Every warp reads the token's
// slots for itself, 32 at a time and one a lane, and hands them round by shuffles, so no barrier stands
// between the indices and the rows. kSlots rows are in flight before their fmas; the passes follow each other
// in slot order, so the sum's bits depend on the inputs alone.
//
// The direct form is for top_k 2, 4 and 8, with slots and weights in whole vectors: every thread reads them
// for itself and has all rows in flight, of as many tokens as make eight rows when tokens are many. It is a
// quarter of the instructions, which for few tokens is what the time goes into: each is fetched for the first
// time.
//
// kWidth elements are one 16-byte vector, or are accessed one by one: a single column, and 4 of e4m3, so that
// the 128 columns of a scale stay within a warp in either case.

#include <limits>
#include <string>
#include <type_traits>

#include "core/table.h"
#include "cuda/device/convert.cuh"
#include "cuda/device/fp8_fp4.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/finalize_policy.h"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"
#include "moecore/quantize.h"

namespace moecore::cuda {
namespace {

struct FinalizeArgs {
  const void* rows;
  std::int64_t num_rows, rows_stride;
  BlockScales<const float> row_scales;
  const void* slot_row;
  bool index_is_i64;
  std::int64_t slot_stride;
  const void* weights;
  DType weight_dtype;
  bool cast_weights;
  std::int64_t weights_stride;
  const void* residual;
  std::int64_t residual_stride;
  void* out;
  std::int64_t out_stride;
  BlockScales<float> out_scales;
  std::int64_t padded_scale_rows;
  float amax_floor, amax_cap;
  std::int64_t num_tokens, hidden;
  int top_k;
};

template <class T>
inline constexpr bool kIsE4M3 = std::is_same_v<T, dev::E4M3>;

// One slot of a token as an operand of the chain. fma(-0, +0, acc) is acc for every acc, so a dead slot takes
// part with a weight of -0 and zeros for its row, and the chain has no branch.
struct Slot {
  std::int64_t row = -1;  // -1 when dead
  float weight = -0.0f;
};

template <class Out>
__device__ __forceinline__ Slot load_slot(const FinalizeArgs& args, std::int64_t t, int j) {
  const std::int64_t at = t * args.slot_stride + j;
  const std::int64_t row = args.index_is_i64 ? static_cast<const std::int64_t*>(args.slot_row)[at]
                                             : static_cast<const std::int32_t*>(args.slot_row)[at];
  float w = 1.0f;
  if (args.weights) {
    w = load_f32(args.weights, args.weight_dtype, t * args.weights_stride + j);
    if constexpr (!kIsE4M3<Out>)
      if (args.cast_weights) w = dev::to_f32(dev::from_f32<Out>(w));
  }
  Slot slot;
  if (row >= 0 && row < args.num_rows) slot = {row, w};
  return slot;
}

// Neighbouring columns, as they lie in memory: whole 16-byte vectors, or of single elements the first n.
template <class T, int kWidth, bool kVectors>
struct Columns {
  static constexpr int kPerAccess = kVectors ? 16 / sizeof(T) : 1;
  using Access = dev::Pack<T, kPerAccess>;

  alignas(kVectors ? 16 : 4) Access parts[kWidth / kPerAccess] = {};

  __device__ __forceinline__ void load(const T* p, int n) {
#pragma unroll
    for (int i = 0; i < kWidth / kPerAccess; ++i)
      if (kVectors || i < n) parts[i] = reinterpret_cast<const Access*>(p)[i];
  }
  __device__ __forceinline__ void store(T* p, int n) const {
#pragma unroll
    for (int i = 0; i < kWidth / kPerAccess; ++i)
      if (kVectors || i < n) reinterpret_cast<Access*>(p)[i] = parts[i];
  }
  __device__ __forceinline__ void to_f32(float (&x)[kWidth]) const {
    if constexpr (kIsE4M3<T>) {
      const auto* words = reinterpret_cast<const std::uint32_t*>(parts);
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const float2 two = dev::e4m3x2_to_f32(words[i / 4] >> 8 * (i % 4) & 0xFFFFu);
        x[i] = two.x, x[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = dev::to_f32(parts[i / kPerAccess].values[i % kPerAccess]);
    }
  }
  __device__ __forceinline__ void from_f32(const float (&x)[kWidth]) {
    if constexpr (kIsE4M3<T>) {
#pragma unroll
      for (int i = 0; i < kWidth / 4; ++i)
        reinterpret_cast<std::uint32_t*>(parts)[i] = dev::e4m3x4(x + 4 * i);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) parts[i / kPerAccess].values[i % kPerAccess] = dev::from_f32<T>(x[i]);
    }
  }
};

// The scale of the block of 128 columns around a thread's columns, stored; returns its reciprocal. Every lane
// of the warp takes part.
template <int kWidth>
__device__ __forceinline__ float scale_block(const FinalizeArgs& args, const float (&acc)[kWidth],
                                             std::int64_t t, std::int64_t column, bool active) {
  constexpr int kLanes = static_cast<int>(kFinalizeScaleBlock) / kWidth;
  float amax = -1.0f;  // stays that when all are NaN
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (active) amax = fmaxf(amax, fabsf(acc[i]));
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(dev::kWholeWarp, amax, step));
  const float scale = __fdiv_rn(fminf(fmaxf(amax, args.amax_floor), args.amax_cap), 448.0f);
  if (active && threadIdx.x % kLanes == 0) {
    float* scales = args.out_scales.data + column / kFinalizeScaleBlock * args.out_scales.block_stride;
    scales[t * args.out_scales.row_stride] = scale;
    if (t == args.num_tokens - 1)
      for (std::int64_t pad = args.num_tokens; pad < args.padded_scale_rows; ++pad)
        scales[pad * args.out_scales.row_stride] = 0.0f;
  }
  return __frcp_rn(scale);
}

// The offset of no row. Others may be negative: rows in descending order lie below their base.
constexpr std::int64_t kNoRow = std::numeric_limits<std::int64_t>::min();

// Resident threads hide the latency of the rows: fewer rows in flight per thread leave registers for more
// threads.
template <int kSlots>
inline constexpr int kBlocksPerSm = kSlots == 8   ? 3
                                    : kSlots == 4 ? 4
                                                  : 6;

template <class Row, class Out, bool kVectors, int kSlots>
__global__ void __launch_bounds__(kFinalizeMaxThreads, kBlocksPerSm<kSlots>)
    finalize_kernel(const FinalizeArgs args) {
  using Residual = std::conditional_t<kIsE4M3<Out>, __nv_bfloat16, Out>;
  constexpr int kWidth = kVectors ? 16 / sizeof(Row) : kIsE4M3<Row> ? 4 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * blockDim.x * kWidth; begin < args.hidden;
       begin += static_cast<std::int64_t>(gridDim.x) * blockDim.x * kWidth) {
    const std::int64_t c = begin + threadIdx.x * kWidth;
    const int n = static_cast<int>(min(static_cast<std::int64_t>(kWidth), args.hidden - c));
    const bool active = n > 0;
    const Row* rows = static_cast<const Row*>(args.rows) + c;
    for (std::int64_t t = blockIdx.y; t < args.num_tokens; t += gridDim.y) {
      float acc[kWidth] = {};
      for (int first = 0; first < args.top_k; first += 32) {
        Slot slot;
        if (first + lane < args.top_k) slot = load_slot<Out>(args, t, first + lane);
        const std::int64_t offset = slot.row < 0 ? kNoRow : slot.row * args.rows_stride;
        const int slots = min(32, args.top_k - first);
        for (int k = 0; k < slots; k += kSlots) {
          Columns<Row, kWidth, kVectors> v[kSlots];
          float w[kSlots];
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const std::int64_t from = __shfl_sync(dev::kWholeWarp, offset, k + i);
            if (active && from != kNoRow) v[i].load(rows + from, n);
            w[i] = __shfl_sync(dev::kWholeWarp, slot.weight, k + i);
            if constexpr (kIsE4M3<Row>) {
              const std::int64_t row = __shfl_sync(dev::kWholeWarp, slot.row, k + i);
              if (args.row_scales.data && active && row >= 0)
                w[i] = __fmul_rn(
                    w[i], args.row_scales.data[row * args.row_scales.row_stride +
                                               c / kFinalizeScaleBlock * args.row_scales.block_stride]);
            }
          }
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            float x[kWidth];
            v[i].to_f32(x);
#pragma unroll
            for (int e = 0; e < kWidth; ++e) acc[e] = __fmaf_rn(w[i], x[e], acc[e]);
          }
        }
      }
      if (args.residual && active) {
        Columns<Residual, kWidth, kVectors> r;
        r.load(static_cast<const Residual*>(args.residual) + t * args.residual_stride + c, n);
        float x[kWidth];
        r.to_f32(x);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) acc[e] = __fadd_rn(acc[e], x[e]);
      }
      if constexpr (kIsE4M3<Out>)
        if (args.out_scales.data) {
          const float factor = scale_block<kWidth>(args, acc, t, c, active);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) acc[e] = __fmul_rn(acc[e], factor);
        }
      Columns<Out, kWidth, kVectors> result;
      result.from_f32(acc);
      if (active) result.store(static_cast<Out*>(args.out) + t * args.out_stride + c, n);
    }
  }
}

// N neighbouring elements, read in vectors of up to 16 bytes.
template <class T, int N>
struct Few {
  static constexpr int kAtOnce = N * sizeof(T) < 16 ? N : 16 / sizeof(T);

  dev::Pack<T, kAtOnce> parts[N / kAtOnce];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < N / kAtOnce; ++i) parts[i] = reinterpret_cast<const dev::Pack<T, kAtOnce>*>(p)[i];
  }
  __device__ __forceinline__ T operator[](int j) const { return parts[j / kAtOnce].values[j % kAtOnce]; }
};

template <class T, class Weight, int kTopK, int kTokens>
__global__ void __launch_bounds__(kFinalizeMaxThreads, 3) finalize_direct_kernel(const FinalizeArgs args) {
  constexpr int kWidth = 16 / sizeof(T);
  using Row = Columns<T, kWidth, true>;
  const std::int64_t c = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  if (c >= args.hidden) return;
  const auto* rows = reinterpret_cast<const std::byte*>(static_cast<const T*>(args.rows) + c);
  const auto pitch = static_cast<unsigned>(args.rows_stride * sizeof(T));
  auto row_at = [&](int row) {
    return reinterpret_cast<const T*>(rows + std::uint64_t{static_cast<unsigned>(row)} * pitch);
  };
  const auto* slot_row = static_cast<const std::int32_t*>(args.slot_row);
  const auto* weight = static_cast<const Weight*>(args.weights);
  const auto num_rows = static_cast<unsigned>(args.num_rows);
  const std::int64_t last = args.num_tokens - 1;
  auto add = [](float (&acc)[kWidth], float w, const Row& row) {
    float x[kWidth];
    row.to_f32(x);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) acc[e] = __fmaf_rn(w, x[e], acc[e]);
  };
  auto finish = [&](float (&acc)[kWidth], std::int64_t t) {
    if (args.residual) {
      float x[kWidth];
      Row r;
      r.load(static_cast<const T*>(args.residual) + t * args.residual_stride + c, kWidth);
      r.to_f32(x);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) acc[e] = __fadd_rn(acc[e], x[e]);
    }
    Row result;
    result.from_f32(acc);
    result.store(static_cast<T*>(args.out) + t * args.out_stride + c, kWidth);
  };
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kTokens; first <= last;
       first += static_cast<std::int64_t>(gridDim.y) * kTokens) {
    Few<std::int32_t, kTopK> slots[kTokens];
    Few<Weight, kTopK> weights[kTokens];
    bool live = true;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const std::int64_t t = kTokens == 1 ? first : min(first + i, last);
      slots[i].load(slot_row + t * args.slot_stride);
      if (weight) weights[i].load(weight + t * args.weights_stride);
    }
#pragma unroll
    for (int i = 0; i < kTokens * kTopK; ++i)
      live &= static_cast<unsigned>(slots[i / kTopK][i % kTopK]) < num_rows;
    if (!live) {
      for (int i = 0; i < kTokens && first + i <= last; ++i) {
        float acc[kWidth] = {};
#pragma unroll 1
        for (int j = 0; j < kTopK; ++j) {
          const int row = slot_row[(first + i) * args.slot_stride + j];
          if (static_cast<unsigned>(row) >= num_rows) continue;
          Row one;
          one.load(row_at(row), kWidth);
          add(acc, weight ? dev::to_f32(weight[(first + i) * args.weights_stride + j]) : 1.0f, one);
        }
        finish(acc, first + i);
      }
      continue;
    }
    Row v[kTokens][kTopK];
#pragma unroll
    for (int i = 0; i < kTokens * kTopK; ++i)
      v[i / kTopK][i % kTopK].load(row_at(slots[i / kTopK][i % kTopK]), kWidth);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (kTokens > 1 && first + i > last) break;
      float acc[kWidth] = {};
#pragma unroll
      for (int j = 0; j < kTopK; ++j) add(acc, weight ? dev::to_f32(weights[i][j]) : 1.0f, v[i][j]);
      finish(acc, first + i);
    }
  }
}

template <class T, class Weight>
auto select_direct_kernel(int top_k, int tokens) {
  switch (top_k) {
    case 2:
      return finalize_direct_kernel<T, Weight, 2, 1>;
    case 4:
      return tokens == 1 ? finalize_direct_kernel<T, Weight, 4, 1> : finalize_direct_kernel<T, Weight, 4, 2>;
    default:
      return finalize_direct_kernel<T, Weight, 8, 1>;
  }
}

template <class Row, class Out, bool kVectors>
auto select_kernel(int slots) {
  if constexpr (kIsE4M3<Row>) {
    return finalize_kernel<Row, Out, kVectors, 4>;
  } else {
    switch (slots) {
      case 1:
        return finalize_kernel<Row, Out, kVectors, 1>;
      case 2:
        return finalize_kernel<Row, Out, kVectors, 2>;
      case 4:
        return finalize_kernel<Row, Out, kVectors, 4>;
      default:
        return finalize_kernel<Row, Out, kVectors, 8>;
    }
  }
}

std::string describe(const FinalizePolicy& policy) {
  return "cuda, direct=" + std::to_string(policy.direct) + " vectors=" + std::to_string(policy.vectors) +
         " slots=" + std::to_string(policy.slots) + " threads=" + std::to_string(policy.threads);
}

}  // namespace

void finalize(const FinalizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("finalize", ctx);
  const TuningSizes sizes{.rows = p.num_tokens,
                          .width = p.hidden,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const int top_k = static_cast<int>(p.top_k);
  const FinalizePolicy policy = tuned("finalize", sizes, ctx, [&](std::string_view text) {
    FinalizePolicy chosen = select_finalize_policy(p, device.num_sms);
    const bool direct = finalize_can_be_direct(chosen, p);
    override_policy(
        "finalize", text,
        {{"direct", &chosen.direct, {0, direct ? 1 : 0, direct ? finalize_most_direct_tokens(p.top_k) : 0}},
         {"vectors", &chosen.vectors, {0, chosen.vectors}},
         {"slots", &chosen.slots, {1, 2, 4, 8}},
         {"threads", &chosen.threads, {32, 64, 96, 128, 160, 192, 224, 256}}});
    if (!chosen.vectors) chosen.direct = 0;
    return chosen;
  });
  if (explained(ctx, "finalize", [&] { return describe(policy); })) return;
  if (p.num_tokens == 0 || p.hidden == 0) {
    if (p.hidden == 0 || p.padded_scale_rows == 0) return;
    const DeviceGuard guard(device);  // column-major scales of no token
    check(cudaMemset2DAsync(p.out_scales.data, p.out_scales.block_stride * sizeof(float), 0,
                            p.padded_scale_rows * sizeof(float),
                            (p.hidden + kFinalizeScaleBlock - 1) / kFinalizeScaleBlock, stream(ctx)),
          "finalize", "zeroing scales");
    return;
  }

  constexpr QuantFormat kOutFormat{.granularity = Granularity::kBlock128};
  const FinalizeArgs args{.rows = p.rows,
                          .num_rows = p.num_rows,
                          .rows_stride = p.rows_stride,
                          .row_scales = p.row_scales,
                          .slot_row = p.slot_row.data,
                          .index_is_i64 = p.slot_row.is_i64,
                          .slot_stride = p.slot_stride,
                          .weights = p.weights,
                          .weight_dtype = p.weight_dtype,
                          .cast_weights = p.cast_weights,
                          .weights_stride = p.weights_stride,
                          .residual = p.residual,
                          .residual_stride = p.residual_stride,
                          .out = p.out,
                          .out_stride = p.out_stride,
                          .out_scales = p.out_scales,
                          .padded_scale_rows = p.padded_scale_rows,
                          .amax_floor = kOutFormat.amax_floor,
                          .amax_cap = kOutFormat.amax_cap,
                          .num_tokens = p.num_tokens,
                          .hidden = p.hidden,
                          .top_k = top_k};
  const std::int64_t slice = policy.threads * finalize_columns_per_thread(policy, p.dtype);
  const std::int64_t at_once = std::max(1, policy.direct);
  const std::int64_t groups = (p.num_tokens + at_once - 1) / at_once;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>((p.hidden + slice - 1) / slice),
                                         static_cast<unsigned>(std::min(groups, kMaxGridY))),
                            .block = dim3(policy.threads),
                            .stream = stream(ctx),
                            .dependent = true};
  const DeviceGuard guard(device);
  visit_instance(FinalizeInstances{}, FinalizeTypes{p.dtype, p.out_dtype}, [&]<FinalizeTypes types>() {
    using Row = cuda_t<types.rows>;
    using Out = cuda_t<types.out>;
    if constexpr (types.rows == types.out && types.rows != DType::kE4M3) {
      if (policy.direct) {
        const bool f32_weights = !p.weights || p.weight_dtype == DType::kF32;
        launch("finalize", device, config,
               f32_weights ? select_direct_kernel<Row, float>(args.top_k, policy.direct)
                           : select_direct_kernel<Row, Row>(args.top_k, policy.direct),
               args);
        return;
      }
    }
    launch("finalize", device, config,
           policy.vectors ? select_kernel<Row, Out, true>(policy.slots)
                          : select_kernel<Row, Out, false>(policy.slots),
           args);
  });
}

}  // namespace moecore::cuda
