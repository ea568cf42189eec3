// activate: out[r,i] = f(gate) * (up + beta) on rows of 2*I (or f(x) on rows of I) columns, in f32, rounded
// once.
//
// A flat grid-stride loop over (row, vector of columns): a thread reads one 16-byte vector of gates and one
// of ups (interleaved: the two vectors that hold the pairs of its columns) and writes one vector.

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
  std::int64_t rows;
  std::int64_t columns;  // of out, in vectors
  std::int64_t inter;
  const std::int32_t* num_rows;
  GateOrder order;
  ActivationParams params;
};

/// kBare: halves of a row, and neither limit nor beta changes anything.
template <class T, int kWidth, ActivationKind kKind, bool kBare = false>
__global__ void __launch_bounds__(kMaxThreads) activate_kernel(const ActivateArgs args) {
  using Vector = dev::Pack<T, kWidth>;
  dev::wait_for_predecessor();
  dev::release_successor();
  std::int64_t rows = args.rows;
  if (args.num_rows) rows = min(rows, static_cast<std::int64_t>(*args.num_rows));
  const std::int64_t units = rows * args.columns;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; unit < units;
       unit += step) {
    // 32-bit division where it suffices: the 64-bit one costs as much as the activation.
    const std::int64_t row = units <= 0xFFFFFFFF
                                 ? static_cast<unsigned>(unit) / static_cast<unsigned>(args.columns)
                                 : unit / args.columns;
    const std::int64_t i = (unit - row * args.columns) * kWidth;
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    auto load = [&](std::int64_t at) { return *reinterpret_cast<const Vector*>(x + at); };
    Vector result;
    switch (kBare ? GateOrder::kGateUp : args.order) {
      case GateOrder::kPlain: {
        const Vector v = load(i);
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          result.values[e] = dev::from_f32<T>(activate_plain<kKind>(dev::to_f32(v.values[e]), args.params));
        break;
      }
      case GateOrder::kInterleaved: {
        Vector pairs[2] = {load(2 * i), load(2 * i + kWidth)};
        const T* flat = pairs[0].values;  // both vectors, one after the other
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          result.values[e] = dev::from_f32<T>(
              activate_gated<kKind>(dev::to_f32(flat[2 * e]), dev::to_f32(flat[2 * e + 1]), args.params));
        break;
      }
      default: {
        const bool gate_first = args.order == GateOrder::kGateUp;
        const Vector gates = load(gate_first ? i : i + args.inter),
                     ups = load(gate_first ? i + args.inter : i);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float gate = dev::to_f32(gates.values[e]), up = dev::to_f32(ups.values[e]);
          result.values[e] = dev::from_f32<T>(kBare ? activate_and_mul<kKind>(gate, up, args.params.alpha)
                                                    : activate_gated<kKind>(gate, up, args.params));
        }
      }
    }
    *reinterpret_cast<Vector*>(static_cast<T*>(args.out) + row * args.out_stride + i) = result;
  }
}

std::string describe(const ActivatePolicy& policy) {
  return "cuda, vectors=" + std::to_string(policy.vectors) + " threads=" + std::to_string(policy.threads) +
         ", " + std::to_string(policy.blocks) + " blocks";
}

}  // namespace

void activate(const ActivateProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("activate", ctx);
  const TuningSizes sizes{
      .rows = p.rows, .width = p.inter, .sms = device.num_sms, .capability = device.compute_capability};
  const ActivatePolicy policy = tuned("activate", sizes, ctx, [&](std::string_view text) {
    ActivatePolicy chosen = select_activate_policy(p, device.num_sms, device.max_threads_per_sm);
    override_policy(
        "activate", text,
        {{"vectors", &chosen.vectors, {0, chosen.vectors}}, {"threads", &chosen.threads, {64, 128, 256}}});
    return chosen;
  });
  if (explained(ctx, "activate", [&] { return describe(policy); })) return;
  if (p.rows == 0 || p.inter == 0) return;

  const DeviceGuard guard(device);
  visit_instance(ActivateTypes{}, p.dtype, [&]<DType D>() {
    using T = cuda_t<D>;
    constexpr int kWidth = 16 / sizeof(T);
    visit_activation(p.activation.kind, [&]<ActivationKind kKind>() {
      const ActivateArgs args{.x = p.x,
                              .x_stride = p.x_stride,
                              .out = p.out,
                              .out_stride = p.out_stride,
                              .rows = p.rows,
                              .columns = policy.vectors ? p.inter / kWidth : p.inter,
                              .inter = p.inter,
                              .num_rows = p.num_rows,
                              .order = p.activation.order,
                              .params = activation_params(p.activation)};
      const LaunchConfig config{.grid = dim3(static_cast<unsigned>(policy.blocks)),
                                .block = dim3(policy.threads),
                                .stream = stream(ctx),
                                .dependent = true};
      if constexpr (kKind == ActivationKind::kSilu) {
        const bool halves =
            p.activation.order == GateOrder::kGateUp || p.activation.order == GateOrder::kUpGate;
        if (policy.vectors && halves && changes_nothing(args.params))
          return launch("activate", device, config, activate_kernel<T, kWidth, kKind, true>, args);
      }
      launch("activate", device, config,
             policy.vectors ? activate_kernel<T, kWidth, kKind> : activate_kernel<T, 1, kKind>, args);
    });
  });
}

}  // namespace moecore::cuda
