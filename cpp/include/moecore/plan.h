#pragma once
// plan: expert ids -> the row order that groups routes by expert, and every index the other ops need.

#include <cstddef>
#include <cstdint>
#include <optional>

#include "moecore/context.h"

namespace [[gnu::visibility("default")]] moecore {

/// The tensors of a plan. Route r = t*K + j; a *row* is a routed copy of a token, in expert order.
struct Plan {
  TensorView expert_offsets;  // i32 [E+1]: expert e owns rows expert_offsets[e] .. expert_offsets[e+1]-1
  TensorView scale_offsets;   // i32 [E+1]: the same with every expert's count rounded up to scale_alignment
  TensorView row_token;       // i32 [R]: token of a row; -1 for rows >= expert_offsets[E]
  TensorView slot_row;        // i32 [T,K]: row of a slot; -1 for a dropped route
  std::optional<TensorView> row_route{};  // i32 [R]: route of a row; -1 for rows >= expert_offsets[E]
  /// i32 [E,3]: (count, gated ? 2*inter : inter, hidden) and (count, hidden, inter); with swap_ab the first
  /// two columns change places.
  std::optional<TensorView> problem_sizes1{};
  std::optional<TensorView> problem_sizes2{};
};

struct PlanOptions {
  /// Local experts E. Ids outside the local range are dropped.
  std::int64_t num_experts = 0;
  /// i32 [G]: global id -> local id or -1. Without it global id g is local expert g - first_expert.
  std::optional<TensorView> expert_map{};
  std::int64_t first_expert = 0;
  /// What scale_offsets rounds every expert's count up to; 1 to 1024.
  std::int64_t scale_alignment = 128;
  /// For problem_sizes only.
  std::int64_t hidden = 0;
  std::int64_t inter = 0;
  bool gated = true;
  bool swap_ab = false;
};

/// Rows are stable by route: inside an expert they ascend in r, so the plan is the same on every run and
/// engine. Ids are i32 or i64 [T,K]; R = T*K <= 2^31 - 1 - (scale_alignment - 1)*E. T = 0 and K = 0 give an
/// empty plan.
void plan(const TensorView& ids, const Plan& out, const PlanOptions& options, const ExecContext& ctx = {});

/// Bytes of workspace that plan() needs.
std::size_t plan_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts,
                                 Device device);

}  // namespace moecore
