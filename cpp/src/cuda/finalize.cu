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
__global__ void __launch_bounds__(kMaxThreads) finalize_kernel(const FinalizeArgs args) {
  using Vector = dev::Pack<T, kWidth>;
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; c < args.columns;
       c += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const T* rows = static_cast<const T*>(args.rows) + c * kWidth;
    for (std::int64_t t = blockIdx.y; t < args.num_tokens; t += gridDim.y) {
      Vector residual;
      if (args.residual)
        residual = *reinterpret_cast<const Vector*>(static_cast<const T*>(args.residual) +
                                                    t * args.residual_stride + c * kWidth);
      float acc[kWidth] = {};
      for (int k = 0; k < args.top_k; k += kSlots) {
        // Phase 1: indices and weights, then every live row of the pass.
        std::int64_t row[kSlots];
        float w[kSlots];
#pragma unroll
        for (int j = 0; j < kSlots; ++j)
          row[j] = k + j < args.top_k ? load_index(args, t * args.slot_stride + k + j) : -1;
#pragma unroll
        for (int j = 0; j < kSlots; ++j)
          w[j] = k + j < args.top_k ? load_weight<T>(args, t * args.weights_stride + k + j) : 0.0f;
        Vector v[kSlots];
#pragma unroll
        for (int j = 0; j < kSlots; ++j)
          if (row[j] >= 0 && row[j] < args.num_rows)
            v[j] = *reinterpret_cast<const Vector*>(rows + row[j] * args.rows_stride);
        // Phase 2: the chain.
#pragma unroll
        for (int j = 0; j < kSlots; ++j)
          if (row[j] >= 0 && row[j] < args.num_rows)
#pragma unroll
            for (int i = 0; i < kWidth; ++i) acc[i] = __fmaf_rn(w[j], dev::to_f32(v[j].values[i]), acc[i]);
      }
      Vector result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (args.residual) acc[i] = __fadd_rn(acc[i], dev::to_f32(residual.values[i]));
        result.values[i] = dev::from_f32<T>(acc[i]);
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
  return std::string("cuda, ") + (policy.vectors ? "16-byte vectors" : "single elements") + ", " +
         std::to_string(policy.slots) + " rows in flight, " + std::to_string(policy.threads) + " threads, " +
         std::to_string(policy.slices) + " blocks a token";
}

}  // namespace

void finalize(const FinalizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("finalize", ctx);
  const FinalizePolicy policy = select_finalize_policy(p, device.num_sms);
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
    const LaunchConfig config{
        .grid = dim3(policy.slices, static_cast<unsigned>(std::min<std::int64_t>(p.num_tokens, 65535))),
        .block = dim3(policy.threads),
        .stream = stream(ctx),
        .dependent = true};
    launch("finalize", device, config,
           policy.vectors ? select_kernel<T, kWidth>(policy.slots) : select_kernel<T, 1>(policy.slots), args);
  });
}

}  // namespace moecore::cuda
