// route_plan on the CPU: one after the other.

#include "ops/route_plan.h"

namespace moecore::cpu {

void route_plan(const RoutePlanProblem& p, const ExecContext& ctx) {
  route(p.route, ctx);
  plan(p.plan, ctx);
}

}  // namespace moecore::cpu
