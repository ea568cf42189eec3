// plan_quantize: what a layer of few tokens in fp8_block128 begins with, in one launch. Both halves are short
// and read only what the layer is given, so one's latency hides the other's.
//
// grid (1, parts of a row, 1 + tokens), blocks as wide as plan's:
//   block (0, 0, 0)      plans, by the device code of plan
//   block (0, p, 1 + t)  quantises part p of token t, 16 columns a thread, by that of quantize
// The others with z = 0 have nothing to do.

#include <string>

#include "cuda/plan.cuh"
#include "cuda/plan_quantize_policy.h"
#include "cuda/policy_override.h"
#include "cuda/quantize_kernels.cuh"
#include "cuda/runtime.h"

namespace moecore::cuda {
namespace {

__device__ __forceinline__ void begin() {
  dev::wait_for_predecessor();
  dev::release_successor();
}

__global__ void __launch_bounds__(kPlanMaxThreads)
    plan_quantize_kernel(const __grid_constant__ PlanArgs plan, const __grid_constant__ QuantizeArgs tokens,
                         const bool tiny) {
  extern __shared__ std::uint64_t smem[];
  if (blockIdx.z > 0) {
    begin();
    const Columns<Encoding::kBlock128, 1> columns(tokens);
    const auto token = static_cast<int>(blockIdx.z - 1);
    Unit<__nv_bfloat16> v[1];
    load_source<__nv_bfloat16, Source::kRows, true>(tokens, token, columns.first, v[0]);
    quantize_task<__nv_bfloat16, Encoding::kBlock128, Source::kRows, true, false>(
        tokens, columns, v, Global{}, token, tokens.scales.data + tokens.map.of_row(token), 0, 0, [](int) {});
  } else if (blockIdx.y == 0) {
    if (tiny) {
      begin();
      plan_tiny(plan);
    } else {
      plan_single<1, 1, 1>(plan, smem, [] { begin(); });
    }
  }
}

std::string describe(const PlanQuantizePolicy& policy) {
  return "cuda, one launch: plan in a block beside blocks for each token, threads=" +
         std::to_string(policy.plan.threads) + " tiny=" + std::to_string(policy.plan.tiny);
}

}  // namespace

std::string plan_quantize(const PlanQuantizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("plan_quantize", ctx);
  const TuningSizes sizes{.rows = p.plan.num_tokens,
                          .width = p.tokens.padded_cols,
                          .experts = p.plan.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const PlanQuantizePolicy policy = tuned("plan_quantize", sizes, ctx, [&](std::string_view text) {
    PlanQuantizePolicy chosen = select_plan_quantize_policy(p);
    override_policy("plan_quantize", text, {{"fused", &chosen.fused, {0, 1}}});
    return chosen;
  });
  if (const std::string_view why = plan_quantize_refusal(policy, p); !why.empty()) return std::string(why);
  if (explained(ctx, "plan_quantize", [&] { return describe(policy); })) return "";

  const std::int64_t num_routes = p.plan.num_tokens * p.plan.top_k;
  const LaunchConfig config{
      .grid = dim3(1, static_cast<unsigned>(token_parts(policy, p)),
                   static_cast<unsigned>(1 + p.plan.num_tokens)),
      .block = dim3(policy.plan.threads),
      .smem_bytes = policy.plan.tiny ? 0 : plan_smem_bytes(policy.plan, num_routes, p.plan.num_experts),
      .stream = stream(ctx),
      .dependent = true};
  const DeviceGuard guard(device);
  launch("plan_quantize", device, config, plan_quantize_kernel, make_plan_args(p.plan, policy.plan, nullptr),
         make_quantize_args(p.tokens), policy.plan.tiny != 0);
  return "";
}

}  // namespace moecore::cuda
