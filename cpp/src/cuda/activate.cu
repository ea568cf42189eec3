// activate: out[r,i] = f(gate) * (up + beta) on rows of 2*I (or f(x) on rows of I) columns, in f32, rounded
// once.
//
// Grid (slices, rows): a thread owns kWidth neighbouring columns, reads one vector of gates and one of ups
// (interleaved: the two vectors that hold the pairs of its columns) and writes one vector, for kRows rows at
// a time. All loads stand before the arithmetic: left to itself the compiler reads the ups when the gates are
// done, and a row costs two latencies of memory.

#include <algorithm>
#include <string>

#include "core/table.h"
#include "cuda/activate_policy.h"
#include "cuda/activation.cuh"
#include "cuda/device/convert.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

constexpr int kMaxThreads = 256;

struct ActivateArgs {
  const void* x;
  std::int64_t x_stride;
  void* out;
  std::int64_t out_stride;
  std::int64_t rows, inter;
  const std::int32_t* num_rows;
  GateOrder order;
  // A thread's columns i, i + 1, ... are made of the vectors at i * step + first and i * step + second.
  int step;
  std::int64_t first, second;
  ActivationParams params;
};

/// kBare: gates and ups in halves of a row, and neither limit nor beta changes anything.
template <class T, int kWidth, ActivationKind kKind, bool kBare, int kRows>
__global__ void __launch_bounds__(kMaxThreads, kRows == 1 ? 6 : 4) activate_kernel(const ActivateArgs args) {
  using Vector = dev::Pack<T, kWidth>;
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  const T* x = static_cast<const T*>(args.x) + i * args.step;
  T* out = static_cast<T*>(args.out) + i;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * kRows;
  dev::wait_for_predecessor();
  dev::release_successor();
  if (i >= args.inter) return;
  std::int64_t rows = args.rows;
  if (args.num_rows) rows = min(rows, static_cast<std::int64_t>(*args.num_rows));

  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.y) * kRows; row < rows; row += step) {
    Vector first[kRows], second[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* from = x + (kRows == 1 ? row : min(row + r, rows - 1)) * args.x_stride;
      first[r] = *reinterpret_cast<const Vector*>(from + args.first);
      if (kBare || args.order != GateOrder::kPlain)
        second[r] = *reinterpret_cast<const Vector*>(from + args.second);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kRows > 1 && row + r >= rows) break;
      Vector result;
      switch (kBare ? GateOrder::kGateUp : args.order) {
        case GateOrder::kPlain:
#pragma unroll
          for (int e = 0; e < kWidth; ++e)
            result.values[e] =
                dev::from_f32<T>(activate_plain<kKind>(dev::to_f32(first[r].values[e]), args.params));
          break;
        case GateOrder::kInterleaved: {
          auto pair = [&](int e) {
            return dev::to_f32(e < kWidth ? first[r].values[e] : second[r].values[e - kWidth]);
          };
#pragma unroll
          for (int e = 0; e < kWidth; ++e)
            result.values[e] =
                dev::from_f32<T>(activate_gated<kKind>(pair(2 * e), pair(2 * e + 1), args.params));
          break;
        }
        default:
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            const float gate = dev::to_f32(first[r].values[e]), up = dev::to_f32(second[r].values[e]);
            result.values[e] = dev::from_f32<T>(kBare ? activate_and_mul<kKind>(gate, up, args.params.alpha)
                                                      : activate_gated<kKind>(gate, up, args.params));
          }
      }
      *reinterpret_cast<Vector*>(out + (row + r) * args.out_stride) = result;
    }
  }
}

template <class T, int kWidth, ActivationKind kKind, bool kBare = false>
auto select_kernel(int rows) {
  return rows == 2 ? activate_kernel<T, kWidth, kKind, kBare, 2>
                   : activate_kernel<T, kWidth, kKind, kBare, 1>;
}

std::string describe(const ActivatePolicy& policy) {
  return "cuda, vectors=" + std::to_string(policy.vectors) + " threads=" + std::to_string(policy.threads) +
         " rows=" + std::to_string(policy.rows);
}

}  // namespace

void activate(const ActivateProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("activate", ctx);
  const TuningSizes sizes{
      .rows = p.rows, .width = p.inter, .sms = device.num_sms, .capability = device.compute_capability};
  const ActivatePolicy policy = tuned("activate", sizes, ctx, [&](std::string_view text) {
    return choose_activate_policy(p, device.num_sms, device.max_threads_per_sm, text);
  });
  if (explained(ctx, "activate", [&] { return describe(policy); })) return;
  if (p.rows == 0 || p.inter == 0) return;

  const DeviceGuard guard(device);
  visit_instance(ActivateTypes{}, p.dtype, [&]<DType D>() {
    using T = cuda_t<D>;
    constexpr int kWidth = 16 / sizeof(T);
    const int width = policy.vectors ? kWidth : 1;
    const GateOrder order = p.activation.order;
    const bool interleaved = order == GateOrder::kInterleaved;
    const ActivateArgs args{.x = p.x,
                            .x_stride = p.x_stride,
                            .out = p.out,
                            .out_stride = p.out_stride,
                            .rows = p.rows,
                            .inter = p.inter,
                            .num_rows = p.num_rows,
                            .order = order,
                            .step = interleaved ? 2 : 1,
                            .first = order == GateOrder::kUpGate ? p.inter : 0,
                            .second = interleaved                   ? width
                                      : order == GateOrder::kGateUp ? p.inter
                                                                    : 0,
                            .params = activation_params(p.activation)};
    const std::int64_t slice = static_cast<std::int64_t>(policy.threads) * width;
    const LaunchConfig config{
        .grid = dim3(static_cast<unsigned>((p.inter + slice - 1) / slice),
                     static_cast<unsigned>(std::min((p.rows + policy.rows - 1) / policy.rows, kMaxGridY))),
        .block = dim3(policy.threads),
        .stream = stream(ctx),
        .dependent = true};
    visit_activation(p.activation.kind, [&]<ActivationKind kKind>() {
      if constexpr (kKind == ActivationKind::kSilu) {
        const bool halves = order == GateOrder::kGateUp || order == GateOrder::kUpGate;
        if (policy.vectors && halves && changes_nothing(args.params))
          return launch("activate", device, config, select_kernel<T, kWidth, kKind, true>(policy.rows), args);
      }
      launch("activate", device, config,
             policy.vectors ? select_kernel<T, kWidth, kKind>(policy.rows)
                            : activate_kernel<T, 1, kKind, false, 1>,
             args);
    });
  });
}

}  // namespace moecore::cuda
