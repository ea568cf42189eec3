#pragma once
// route_plan: logits -> experts, weights and the row order, in one call.

#include "moecore/plan.h"
#include "moecore/route.h"

namespace [[gnu::visibility("default")]] moecore {

/// route(logits, weights, ids, route_options), then plan(ids, out, plan_options): the same checks and the
/// same bits. For few tokens CUDA does both in one launch, which saves the second kernel's start and its wait
/// for the ids. The workspace is plan's: plan_workspace_bytes(T, K, plan_options.num_experts, device).
void route_plan(const TensorView& logits, const TensorView& weights, const TensorView& ids, const Plan& out,
                const RouteOptions& route_options, const PlanOptions& plan_options,
                const ExecContext& ctx = {});

}  // namespace moecore
