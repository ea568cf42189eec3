// fused_experts: validates the whole layer first, carves the workspace, then calls the public ops in turn.
// The layer has no kernels of its own, so its bits are those of the composition.

#include "moecore/fused_experts.h"

#include <algorithm>

#include "core/check.h"
#include "core/table.h"
#include "moecore/finalize.h"
#include "moecore/grouped_gemm.h"
#include "moecore/permute.h"
#include "moecore/plan.h"
#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/grouped_gemm.h"

namespace moecore {
namespace {

std::size_t align_up(std::size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// The tensors of one call inside the workspace. Built over a null base to learn the size.
struct Layout {
  Plan plan;
  TensorView row_weights, inter_rows, out_rows;
  std::span<std::byte> scratch;  // shared by the ops, which run one after the other
  std::size_t bytes = 0;

  Layout(std::byte* base, std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts,
         std::int64_t hidden, std::int64_t inter, DType dtype, DType weight_dtype, Device device) {
    auto take = [&](DType d, std::initializer_list<std::int64_t> shape) {
      void* data = base ? base + bytes : nullptr;
      TensorView t = TensorView::dense(data, d, shape, device);
      bytes += align_up(static_cast<std::size_t>(t.numel()) * static_cast<std::size_t>(bit_width(d)) / 8);
      return t;
    };
    const std::int64_t rows = num_tokens * top_k;
    plan.expert_offsets = take(DType::kI32, {num_experts + 1});
    plan.scale_offsets = take(DType::kI32, {num_experts + 1});
    plan.row_token = take(DType::kI32, {rows});
    plan.slot_row = take(DType::kI32, {num_tokens, top_k});
    plan.row_route = take(DType::kI32, {rows});
    row_weights = take(weight_dtype, {rows, 1});
    inter_rows = take(dtype, {rows, inter});
    out_rows = take(dtype, {rows, hidden});
    // 2*inter bounds the first GEMM's width for gated and plain activations alike.
    const std::size_t scratch_bytes =
        std::max({plan_workspace_bytes(num_tokens, top_k, num_experts, device),
                  grouped_gemm_workspace_bytes(rows, 2 * inter, hidden, num_experts, dtype, device),
                  grouped_gemm_workspace_bytes(rows, inter, hidden, num_experts, dtype, device),
                  grouped_gemm_workspace_bytes(rows, hidden, inter, num_experts, dtype, device)});
    scratch = {base ? base + bytes : nullptr, scratch_bytes};
    bytes += align_up(scratch_bytes);
  }
};

}  // namespace

std::size_t fused_experts_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k,
                                          std::int64_t num_experts, std::int64_t hidden, std::int64_t inter,
                                          DType dtype, Device device) {
  return Layout(nullptr, num_tokens, top_k, num_experts, hidden, inter, dtype, DType::kF32, device).bytes;
}

void fused_experts(const TensorView& x, const TensorView& weights, const TensorView& ids,
                   const Experts& experts, const TensorView& out, const FusedExpertsOptions& options,
                   const ExecContext& ctx) {
  const Check check("fused_experts", ctx);
  check.tensor("x", x, GroupedGemmTypes::kRows, 2);
  check.tensor("weights", weights, WeightTypes::kRows, 2);
  check.tensor("ids", ids, IndexTypes::kRows, 2);
  check.tensor("w13", experts.w13, GroupedGemmTypes::kRows, 3);
  check.tensor("w2", experts.w2, GroupedGemmTypes::kRows, 3);
  check.tensor("out", out, GroupedGemmTypes::kRows, 2, Check::Access::kOut);
  check.same_dtype("w13", experts.w13, "x", x);
  check.same_dtype("w2", experts.w2, "x", x);
  check.same_dtype("out", out, "x", x);
  const std::int64_t num_tokens = x.shape[0], hidden = x.shape[1], top_k = ids.shape[1];
  const std::int64_t num_experts = experts.num_experts(), inter = experts.inter();
  const std::int64_t width = experts.activation.gated() ? 2 * inter : inter;
  check.dim("ids", ids, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 1, top_k, "top_k");
  check.dim("w13", experts.w13, 2, hidden, "hidden");
  check.dim("w13", experts.w13, 1, width, experts.activation.gated() ? "2 * inter" : "inter");
  check.dim("w2", experts.w2, 0, num_experts, "num_experts");
  check.dim("w2", experts.w2, 1, hidden, "hidden");
  check.dim("out", out, 0, num_tokens, "num_tokens");
  check.dim("out", out, 1, hidden, "hidden");
  check_activation(check, experts.activation);
  auto check_bias = [&](std::string_view arg, const std::optional<TensorView>& bias, std::int64_t n) {
    if (!bias) return;
    check.tensor(arg, *bias, WeightTypes::kRows, 2);
    if (bias->dtype != DType::kF32) check.same_dtype(arg, *bias, "x", x);
    check.dim(arg, *bias, 0, num_experts, "num_experts");
    check.dim(arg, *bias, 1, n, "its matrix's output width");
  };
  check_bias("w13_bias", experts.w13_bias, width);
  check_bias("w2_bias", experts.w2_bias, hidden);
  if (options.expert_map) check.tensor("expert_map", *options.expert_map, I32Type::kRows, 1);
  if (options.apply_router_weight_on_input)
    check.that(weights.is_dense(), "weights.strides[0]", weights.strides[0],
               "dense weights with apply_router_weight_on_input");
  if (options.residual) {
    check.tensor("residual", *options.residual, FloatTypes::kRows, 2);
    check.same_dtype("residual", *options.residual, "out", out);
    check.dim("residual", *options.residual, 0, num_tokens, "num_tokens");
    check.dim("residual", *options.residual, 1, hidden, "hidden");
  }
  check.workspace(
      fused_experts_workspace_bytes(num_tokens, top_k, num_experts, hidden, inter, x.dtype, ctx.device));

  Layout layout(ctx.workspace.data(), num_tokens, top_k, num_experts, hidden, inter, x.dtype, weights.dtype,
                ctx.device);
  if (!options.apply_router_weight_on_input) layout.plan.row_route.reset();
  ExecContext inner = ctx;
  inner.workspace = layout.scratch;

  plan(ids, layout.plan,
       {.num_experts = num_experts, .expert_map = options.expert_map, .first_expert = options.first_expert},
       inner);

  GroupedGemmOptions gemm1{
      .bias = experts.w13_bias, .row_token = layout.plan.row_token, .activation = experts.activation};
  if (options.apply_router_weight_on_input) {
    const std::int64_t routes = num_tokens * top_k;
    TensorView route_weights = TensorView::dense(weights.data, weights.dtype, {routes, 1}, ctx.device);
    shuffle_rows(route_weights, *layout.plan.row_route, layout.row_weights, inner);
    gemm1.row_weights = TensorView::dense(layout.row_weights.data, weights.dtype, {routes}, ctx.device);
  }
  grouped_gemm(x, experts.w13, layout.plan.expert_offsets, layout.inter_rows, gemm1, inner);
  grouped_gemm(layout.inter_rows, experts.w2, layout.plan.expert_offsets, layout.out_rows,
               {.bias = experts.w2_bias, .offsets_settled = true}, inner);

  FinalizeOptions last{.residual = options.residual};
  if (!options.apply_router_weight_on_input) last.weights = weights;
  finalize(layout.out_rows, layout.plan.slot_row, out, last, inner);
}

}  // namespace moecore
