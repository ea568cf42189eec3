// finalize: out[t,h] = RN(sum_j w[t,j] * rows[slot_row[t,j], h] (+ residual[t,h])), an f32 fma chain in slot
// order.
//
// Grid (slices, tokens): a thread owns one vector of columns of one token. It reads the token's indices and
// weights itself (uniform over the block, served by L1), issues the loads of all live rows before the first
// fma, and stores once. More slots than a pass holds: passes follow each other in slot order, so the sum's
// bits depend on the inputs alone.

#include <string>

#include "core/table.h"
#include "cuda/device/convert.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/finalize_policy.h"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

constexpr int kMaxThreads = 256;

struct FinalizeArgs {
  const void* rows;
  std::int64_t num_rows, rows_stride;
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
  std::int64_t num_tokens, columns;  // columns in vectors
  int top_k;
};

__device__ __forceinline__ std::int64_t load_index(const FinalizeArgs& args, std::int64_t i) {
  return args.index_is_i64 ? static_cast<const std::int64_t*>(args.slot_row)[i]
                           : static_cast<const std::int32_t*>(args.slot_row)[i];
}

template <class T>
__device__ __forceinline__ float load_weight(const FinalizeArgs& args, std::int64_t i) {
  float w = 1.0f;
  if (args.weights) {
    switch (args.weight_dtype) {
      case DType::kF16:
        w = dev::to_f32(static_cast<const __half*>(args.weights)[i]);
        break;
      case DType::kBF16:
        w = dev::to_f32(static_cast<const __nv_bfloat16*>(args.weights)[i]);
        break;
      default:
        w = static_cast<const float*>(args.weights)[i];
    }
  }
  return args.cast_weights ? dev::to_f32(dev::from_f32<T>(w)) : w;
}

template <class T, int kWidth, int kSlots>
__global__ void __launch_bounds__(kMaxThreads, 3) finalize_kernel(const FinalizeArgs args) {
  using Vector = dev::Pack<T, kWidth>;
  constexpr unsigned kWholeWarp = 0xFFFFFFFF;
  const int slot_of_lane = static_cast<int>(threadIdx.x) % kSlots;
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * blockDim.x; begin < args.columns;
       begin += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t c = begin + threadIdx.x;
    const bool active = c < args.columns;
    const T* rows = static_cast<const T*>(args.rows) + c * kWidth;
    for (std::int64_t t = blockIdx.y; t < args.num_tokens; t += gridDim.y) {
      Vector residual{};
      if (active && args.residual)
        residual = *reinterpret_cast<const Vector*>(static_cast<const T*>(args.residual) +
                                                    t * args.residual_stride + c * kWidth);
      float acc[kWidth] = {};
      for (int k = 0; k < args.top_k; k += kSlots) {
        // Phase 1: a lane reads one slot. fma(-0, +0, acc) is acc for every acc, so a dead slot takes part
        // with these operands and the chain has no branch.
        const int j = k + slot_of_lane;
        std::int64_t row = -1;
        float w = 0.0f;
        if (j < args.top_k) {
          row = load_index(args, t * args.slot_stride + j);
          w = load_weight<T>(args, t * args.weights_stride + j);
        }
        const bool live = row >= 0 && row < args.num_rows;
        const std::int64_t offset = live ? row * args.rows_stride : -1;
        w = live ? w : -0.0f;
        // Phase 2: every live row of the pass.
        Vector v[kSlots] = {};
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const std::int64_t from = __shfl_sync(kWholeWarp, offset, i);
          if (active && from >= 0) v[i] = *reinterpret_cast<const Vector*>(rows + from);
        }
        // Phase 3: the chain.
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const float weight = __shfl_sync(kWholeWarp, w, i);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) acc[e] = __fmaf_rn(weight, dev::to_f32(v[i].values[e]), acc[e]);
        }
      }
      if (!active) continue;
      Vector result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (args.residual) acc[e] = __fadd_rn(acc[e], dev::to_f32(residual.values[e]));
        result.values[e] = dev::from_f32<T>(acc[e]);
      }
      *reinterpret_cast<Vector*>(static_cast<T*>(args.out) + t * args.out_stride + c * kWidth) = result;
    }
  }
}

template <class T, int kWidth>
auto select_kernel(int slots) {
  switch (slots) {
    case 1:
      return finalize_kernel<T, kWidth, 1>;
    case 2:
      return finalize_kernel<T, kWidth, 2>;
    case 4:
      return finalize_kernel<T, kWidth, 4>;
    default:
      return finalize_kernel<T, kWidth, 8>;
  }
}

std::string describe(const FinalizePolicy& policy) {
  return "cuda, vectors=" + std::to_string(policy.vectors) + " slots=" + std::to_string(policy.slots) +
         " threads=" + std::to_string(policy.threads);
}

}  // namespace

void finalize(const FinalizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("finalize", ctx);
  FinalizePolicy policy = select_finalize_policy(p, device.num_sms);
  override_policy("finalize", ctx.policy,
                  {{"vectors", &policy.vectors, {0, policy.vectors}},
                   {"slots", &policy.slots, {1, 2, 4, 8}},
                   {"threads", &policy.threads, {32, 64, 96, 128, 160, 192, 224, 256}}});
  if (explained(ctx, "finalize", [&] { return describe(policy); })) return;
  if (p.num_tokens == 0 || p.hidden == 0) return;

  const DeviceGuard guard(device);
  visit_instance(FinalizeTypes{}, p.dtype, [&]<DType D>() {
    using T = cuda_t<D>;
    constexpr int kWidth = 16 / sizeof(T);
    const FinalizeArgs args{.rows = p.rows,
                            .num_rows = p.num_rows,
                            .rows_stride = p.rows_stride,
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
                            .num_tokens = p.num_tokens,
                            .columns = policy.vectors ? p.hidden / kWidth : p.hidden,
                            .top_k = static_cast<int>(p.top_k)};
    const std::int64_t slices = (args.columns + policy.threads - 1) / policy.threads;
    const LaunchConfig config{
        .grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(slices, 65535)),
                     static_cast<unsigned>(std::min<std::int64_t>(p.num_tokens, 65535))),
        .block = dim3(policy.threads),
        .stream = stream(ctx),
        .dependent = true};
    launch("finalize", device, config,
           policy.vectors ? select_kernel<T, kWidth>(policy.slots) : select_kernel<T, 1>(policy.slots), args);
  });
}

}  // namespace moecore::cuda
