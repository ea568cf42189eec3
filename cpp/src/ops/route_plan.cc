#include "ops/route_plan.h"

#include "moecore/route_plan.h"

namespace moecore {

void route_plan(const TensorView& logits, const TensorView& weights, const TensorView& ids, const Plan& out,
                const RouteOptions& route_options, const PlanOptions& plan_options, const ExecContext& ctx) {
  const Check check("route_plan", ctx);
  const RoutePlanProblem problem{
      .route = make_route_problem(check, logits, weights, ids, route_options),
      .plan = make_plan_problem(check, ids, out, plan_options, ctx),
  };
  run_on_backend(cpu::route_plan, cuda::route_plan, problem, ctx);
}

}  // namespace moecore
