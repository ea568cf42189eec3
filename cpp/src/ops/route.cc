#include "ops/route.h"

namespace moecore {

RouteProblem make_route_problem(const Check& check, const TensorView& logits, const TensorView& weights,
                                const TensorView& ids, const RouteOptions& options) {
  check.tensor("logits", logits, RouteTypes::kRows, 2);
  check.tensor("weights", weights, F32Type::kRows, 2, Check::Access::kOut);
  check.tensor("ids", ids, I32Type::kRows, 2, Check::Access::kOut);
  const std::int64_t num_tokens = logits.shape[0], num_experts = logits.shape[1], top_k = ids.shape[1];
  check.dim("ids", ids, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 1, top_k, "top_k");
  check.that(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts", num_experts,
             "1 to " + std::to_string(kMaxExperts));
  check.that(top_k >= 1 && top_k <= num_experts, "top_k", top_k,
             "1 to num_experts = " + std::to_string(num_experts));
  check.that(options.num_groups >= 1 && num_experts % options.num_groups == 0, "num_groups",
             options.num_groups, "a divisor of num_experts = " + std::to_string(num_experts));
  check.that(options.topk_groups >= 1 && options.topk_groups <= options.num_groups, "topk_groups",
             options.topk_groups, "1 to num_groups = " + std::to_string(options.num_groups));
  check.that(top_k <= options.topk_groups * (num_experts / options.num_groups), "top_k", top_k,
             "at most the experts of topk_groups groups = " +
                 std::to_string(options.topk_groups * (num_experts / options.num_groups)));
  if (options.bias) {
    check.tensor("bias", *options.bias, F32Type::kRows, 1);
    check.dim("bias", *options.bias, 0, num_experts, "num_experts");
  }
  if (options.is_padding) {
    check.tensor("is_padding", *options.is_padding, MaskTypes::kRows, 1);
    check.dim("is_padding", *options.is_padding, 0, num_tokens, "num_tokens");
  }
  return {
      .logits = logits.data,
      .dtype = logits.dtype,
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .logits_stride = logits.strides[0],
      .weights = static_cast<float*>(weights.data),
      .weights_stride = weights.strides[0],
      .ids = static_cast<std::int32_t*>(ids.data),
      .ids_stride = ids.strides[0],
      .top_k = top_k,
      .scoring = options.scoring,
      .group_score = options.group_score,
      .bias = options.bias ? static_cast<const float*>(options.bias->data) : nullptr,
      .num_groups = options.num_groups,
      .topk_groups = options.topk_groups,
      .renormalize = options.renormalize,
      .scale = options.scale,
      .is_padding = options.is_padding ? static_cast<const std::uint8_t*>(options.is_padding->data) : nullptr,
  };
}

void route(const TensorView& logits, const TensorView& weights, const TensorView& ids,
           const RouteOptions& options, const ExecContext& ctx) {
  const RouteProblem problem = make_route_problem(Check("route", ctx), logits, weights, ids, options);
  run_on_backend(cpu::route, cuda::route, problem, ctx);
}

}  // namespace moecore
