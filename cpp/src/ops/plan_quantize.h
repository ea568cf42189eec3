#pragma once
// What a quantised layer begins with, as an engine takes it that does both at once: the plan of the ids, and
// the tokens' codes. Neither reads what the other writes.

#include <string>

#include "ops/plan.h"
#include "ops/quantize.h"

namespace moecore {

struct PlanQuantizeProblem {
  PlanProblem plan{};
  QuantizeProblem tokens{};
};

namespace cuda {
/// Does both in one launch (or explains it), or leaves everything untouched and says why not.
std::string plan_quantize(const PlanQuantizeProblem& problem, const ExecContext& ctx);
}  // namespace cuda

}  // namespace moecore
