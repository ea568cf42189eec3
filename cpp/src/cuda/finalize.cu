// finalize: out[t,h] = RN(sum_j w[t,j] * rows[slot_row[t,j], h] (+ residual[t,h])), an f32 fma chain in slot
// order.
//
// Grid (slices, tokens): a thread owns one vector of columns of one token. Every warp reads the token's slots
// for itself, 32 at a time and one a lane, and hands them round by shuffles, so no barrier stands between the
// indices and the rows. kSlots rows are in flight before their fmas; the passes follow each other in slot
// order, so the sum's bits depend on the inputs alone.

#include <string>

#include "core/table.h"
#include "cuda/device/convert.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/finalize_policy.h"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

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

// One slot of a token as an operand of the chain. fma(-0, +0, acc) is acc for every acc, so a dead slot takes
// part with a weight of -0 and zeros for its row, and the chain has no branch.
struct Slot {
  std::int64_t offset = -1;  // of its row, in elements; -1 when dead
  float weight = -0.0f;
};

template <class T>
__device__ __forceinline__ Slot load_slot(const FinalizeArgs& args, std::int64_t t, int j) {
  const std::int64_t at = t * args.slot_stride + j;
  const std::int64_t row = args.index_is_i64 ? static_cast<const std::int64_t*>(args.slot_row)[at]
                                             : static_cast<const std::int32_t*>(args.slot_row)[at];
  float w = 1.0f;
  if (args.weights) {
    const std::int64_t i = t * args.weights_stride + j;
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
    if (args.cast_weights) w = dev::to_f32(dev::from_f32<T>(w));
  }
  Slot slot;
  if (row >= 0 && row < args.num_rows) slot = {row * args.rows_stride, w};
  return slot;
}

// Resident threads hide the latency of the rows: fewer rows in flight per thread leave registers for more
// threads.
template <int kSlots>
inline constexpr int kBlocksPerSm = kSlots == 8   ? 3
                                    : kSlots == 4 ? 4
                                                  : 6;

template <class T, int kWidth, int kSlots>
__global__ void __launch_bounds__(kFinalizeMaxThreads, kBlocksPerSm<kSlots>)
    finalize_kernel(const FinalizeArgs args) {
  using Vector = dev::Pack<T, kWidth>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * blockDim.x; begin < args.columns;
       begin += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t c = begin + threadIdx.x;
    const bool active = c < args.columns;
    const T* rows = static_cast<const T*>(args.rows) + c * kWidth;
    for (std::int64_t t = blockIdx.y; t < args.num_tokens; t += gridDim.y) {
      float acc[kWidth] = {};
      for (int first = 0; first < args.top_k; first += 32) {
        Slot slot;
        if (first + lane < args.top_k) slot = load_slot<T>(args, t, first + lane);
        const int slots = min(32, args.top_k - first);
        for (int k = 0; k < slots; k += kSlots) {
          Vector v[kSlots] = {};
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const std::int64_t from = __shfl_sync(dev::kWholeWarp, slot.offset, k + i);
            if (active && from >= 0) v[i] = *reinterpret_cast<const Vector*>(rows + from);
          }
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const float w = __shfl_sync(dev::kWholeWarp, slot.weight, k + i);
#pragma unroll
            for (int e = 0; e < kWidth; ++e) acc[e] = __fmaf_rn(w, dev::to_f32(v[i].values[e]), acc[e]);
          }
        }
      }
      if (!active) continue;
      if (args.residual) {
        const Vector r = *reinterpret_cast<const Vector*>(static_cast<const T*>(args.residual) +
                                                          t * args.residual_stride + c * kWidth);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) acc[e] = __fadd_rn(acc[e], dev::to_f32(r.values[e]));
      }
      Vector result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) result.values[e] = dev::from_f32<T>(acc[e]);
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
    constexpr std::int64_t kMaxGridY = 65535;
    const std::int64_t slices = (args.columns + policy.threads - 1) / policy.threads;
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>(std::min(slices, kMaxGridY)),
                                           static_cast<unsigned>(std::min(p.num_tokens, kMaxGridY))),
                              .block = dim3(policy.threads),
                              .stream = stream(ctx),
                              .dependent = true};
    launch("finalize", device, config,
           policy.vectors ? select_kernel<T, kWidth>(policy.slots) : select_kernel<T, 1>(policy.slots), args);
  });
}

}  // namespace moecore::cuda
