// route_plan: for few tokens one launch of one block that routes and plans; else route, then plan.
//
// A warp routes a token. The routes of a block's tokens are its share of the plan, so a barrier of the block
// is all that stands between the two halves.

#include <string>

#include "cuda/plan.cuh"
#include "cuda/policy_override.h"
#include "cuda/route_packed.cuh"
#include "cuda/route_plan_policy.h"
#include "cuda/runtime.h"
#include "moecore/error.h"

namespace moecore::cuda {
namespace {

template <int kPerLane, bool kSoftmax, RouteKeys kKeys>
__global__ void __launch_bounds__(kRoutePlanMaxThreads)
    route_plan_kernel(const RouteArgs route, const PlanArgs plan, bool tiny) {
  extern __shared__ std::uint64_t smem[];
  __shared__ RouteScratch scratch[kRoutePlanMaxThreads / 32];
  auto route_tokens = [&] {
    dev::wait_for_predecessor();
    dev::release_successor();
    const std::int64_t t = threadIdx.x / 32;
    if (t < route.num_tokens) route_packed<32, kPerLane, kSoftmax, kKeys>(route, t, t + 1, scratch + t);
    __syncthreads();
  };
  if (tiny) {
    route_tokens();
    plan_tiny(plan);
  } else {
    plan_single<1, 1, 1>(plan, smem, route_tokens);
  }
}

template <bool kSoftmax, RouteKeys kKeys>
auto select_kernel(int per_lane) {
  return per_lane == 4 ? route_plan_kernel<4, kSoftmax, kKeys> : route_plan_kernel<8, kSoftmax, kKeys>;
}

auto select_kernel(const RouteArgs& args, int per_lane) {
  if (args.scoring == Scoring::kSoftmax) return select_kernel<true, RouteKeys::kLogit>(per_lane);
  if (args.num_groups > 1) return select_kernel<false, RouteKeys::kGrouped>(per_lane);
  return args.bias ? select_kernel<false, RouteKeys::kScore>(per_lane)
                   : select_kernel<false, RouteKeys::kLogit>(per_lane);
}

std::string describe(const RoutePlanPolicy& policy) {
  return "cuda, fused=1 threads=" + std::to_string(policy.plan.threads) +
         " tiny=" + std::to_string(policy.plan.tiny);
}

// The selected policy with the caller's changes.
RoutePlanPolicy choose_policy(const RoutePlanProblem& p, std::string_view text) {
  RoutePlanPolicy policy = select_route_plan_policy(p);
  if (text.empty()) return policy;
  int fused = policy.fused;
  override_policy("route_plan", text, {{"fused", &fused, {0, 1}}});
  if (fused == policy.fused) return policy;
  policy = fused ? fused_route_plan_policy(p) : RoutePlanPolicy{};
  if (policy.fused != fused)
    throw InvalidArgument("route_plan: policy is \"" + std::string(text) +
                          "\", expected fused=0: one launch cannot hold the problem");
  return policy;
}

}  // namespace

void route_plan(const RoutePlanProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("route_plan", ctx);
  const TuningSizes sizes{.rows = p.route.num_tokens,
                          .experts = p.route.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const RoutePlanPolicy policy =
      tuned("route_plan", sizes, ctx, [&](std::string_view text) { return choose_policy(p, text); });
  if (!policy.fused) {
    ExecContext parts = ctx;
    parts.policy = {};  // spoke of route_plan
    route(p.route, parts);
    plan(p.plan, parts);
    return;
  }
  if (explained(ctx, "route_plan", [&] { return describe(policy); })) return;

  const RouteArgs route_args = make_route_args(p.route, 32);
  const PlanArgs plan_args = make_plan_args(p.plan, policy.plan, nullptr);
  const std::int64_t num_routes = p.route.num_tokens * p.route.top_k;
  const LaunchConfig config{
      .block = dim3(policy.plan.threads),
      .smem_bytes = policy.plan.tiny ? 0 : plan_smem_bytes(policy.plan, num_routes, p.plan.num_experts),
      .stream = stream(ctx),
      .dependent = true};
  const DeviceGuard guard(device);
  launch("route_plan", device, config, select_kernel(route_args, policy.per_lane), route_args, plan_args,
         policy.plan.tiny != 0);
}

}  // namespace moecore::cuda
