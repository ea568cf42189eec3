#pragma once
// The validated form of route_plan.

#include "ops/plan.h"
#include "ops/route.h"

namespace moecore {

struct RoutePlanProblem {
  RouteProblem route{};
  PlanProblem plan{};  // of the ids that route writes
};

namespace cpu {
BackendFn<RoutePlanProblem> route_plan;
}
namespace cuda {
BackendFn<RoutePlanProblem> route_plan;
}

}  // namespace moecore
