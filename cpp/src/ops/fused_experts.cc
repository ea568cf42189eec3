// fused_experts: validates the whole layer first, then hands it to the engine that runs a few routes in one
// piece, or carves the workspace and runs the ops in turn.

#include "moecore/fused_experts.h"

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/strides.h"
#include "core/table.h"
#include "moecore/finalize.h"
#include "moecore/grouped_gemm.h"
#include "moecore/permute.h"
#include "moecore/plan.h"
#include "moecore/quantize.h"
#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/fused_experts.h"
#include "ops/grouped_gemm.h"
#include "ops/plan_quantize.h"
#include "ops/quantize.h"

namespace moecore {
namespace {

std::size_t align_up(std::size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// The operand of a product as quantize() leaves it: one row of codes and scales for each row of a matrix. The
// scales of 128-blocks can stand in columns, too, in the same memory.
struct QuantizedRows {
  TensorView codes, scales, column_scales;
};

// What the layer quantises to: scales in the layout that the product reads, f32 where they are powers of two
// of a 128-block.
QuantFormat layer_format(QuantFormat f, ScaleLayout layout = ScaleLayout::kLinear) {
  f.layout = layout;
  f.e8m0_scales = false;
  return f;
}

// The tensors of one call inside the workspace. Built over a null base to learn the size.
struct Layout {
  Plan plan;
  TensorView row_weights, inter_rows, out_rows;  // inter_rows: unused where a product leaves codes
  // With an x_format. in_order: the rows of x in the order of the plan, where out_rows will be.
  QuantizedRows x, in_order, inter;
  // Workspaces of the ops, which run one after the other. A product's reaches over its neighbour, rows that
  // are not needed yet (out_rows during the first, but for in_order) or no longer (inter_rows, once
  // quantised).
  std::span<std::byte> scratch, scratch1, scratch1_in_order, scratch2;
  std::size_t bytes = 0;

  Layout(std::byte* base, std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts,
         std::int64_t hidden, std::int64_t width, DType dtype, DType weight_dtype, Device device,
         const std::optional<QuantFormat>& x_format, const std::optional<QuantFormat>& weight_format) {
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
    auto take_quantized = [&](std::int64_t m, std::int64_t cols) -> QuantizedRows {
      const QuantFormat f = layer_format(*x_format);
      QuantizedRows taken;
      taken.codes = take(DType::kU8, {m, cols * bit_width(f.data_dtype()) / 8});
      const auto [scale_rows, scale_cols] = scale_shape(f, m, cols);
      if (operand_form(f) == OperandForm::kFp8Block128) {  // columns are padded: they need as much or more
        const auto [blocks, padded] = scale_shape(layer_format(f, ScaleLayout::kColumnMajor), m, cols);
        taken.column_scales = take(f.scale_dtype(), {blocks, padded});
        taken.scales =
            TensorView::dense(taken.column_scales.data, f.scale_dtype(), {scale_rows, scale_cols}, device);
      } else {
        taken.scales = take(f.scale_dtype(), {scale_rows, scale_cols});
      }
      return taken;
    };
    if (x_format) {
      x = take_quantized(num_tokens, hidden);
      inter = take_quantized(rows, width);
    }
    auto gemm_bytes = [&](std::int64_t n, std::int64_t k) {
      return grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype, device, x_format, weight_format);
    };
    const std::size_t out_begin = bytes;
    if (x_format) in_order = take_quantized(rows, hidden);
    const std::size_t in_order_end = bytes;
    bytes = out_begin;
    out_rows = take(dtype, {rows, hidden});
    const std::size_t scratch_begin = bytes;
    auto beyond = [](std::size_t need, std::size_t neighbour) {
      return need > neighbour ? need - neighbour : 0;
    };
    const std::size_t inter_bytes = align_up(static_cast<std::size_t>(rows * width * bit_width(dtype) / 8));
    // 2 * width bounds the first GEMM's rows of weights for gated and plain activations alike.
    bytes += align_up(std::max({plan_workspace_bytes(num_tokens, top_k, num_experts, device),
                                beyond(std::max(gemm_bytes(2 * width, hidden), gemm_bytes(width, hidden)),
                                       scratch_begin - in_order_end),
                                beyond(gemm_bytes(hidden, width), x_format ? inter_bytes : 0)}));
    const std::size_t scratch_end = bytes;
    inter_rows = take(dtype, {rows, width});
    auto span = [&](std::size_t begin, std::size_t end) {
      return std::span(base ? base + begin : nullptr, end - begin);
    };
    scratch = span(scratch_begin, scratch_end);
    scratch1 = span(out_begin, scratch_end);
    scratch1_in_order = span(in_order_end, scratch_end);
    scratch2 = span(scratch_begin, x_format ? bytes : scratch_end);
  }
};

/// The form that an engine takes which runs the layer in one piece.
FusedExpertsProblem decode_problem(const Check& check, const TensorView& x, const TensorView& weights,
                                   const TensorView& ids, const TensorView& w13, const TensorView& w2,
                                   const Experts& experts, const TensorView& out,
                                   const FusedExpertsOptions& options) {
  FusedExpertsProblem p{.ids = IndexRef(ids),
                        .ids_stride = ids.strides[0],
                        .first_expert = options.first_expert,
                        .weights = weights.data,
                        .weight_dtype = weights.dtype,
                        .weights_stride = weights.strides[0],
                        .weight_on_input = options.apply_router_weight_on_input,
                        .out = out.data,
                        .out_stride = stride(out, 0),
                        .num_tokens = x.shape[0],
                        .top_k = ids.shape[1],
                        .num_experts = experts.num_experts(),
                        .hidden = x.shape[1],
                        .inter = experts.inter()};
  if (options.expert_map) {
    p.expert_map = static_cast<const std::int32_t*>(options.expert_map->data);
    p.num_global = options.expert_map->shape[0];
  }
  if (options.residual) {
    p.residual = options.residual->data;
    p.residual_stride = options.residual->strides[0];
  }
  auto product = [&](const TensorView& matrix, const std::optional<OperandScales>& scales,
                     const std::optional<TensorView>& bias) {
    GroupedGemmProblem g{.dtype = x.dtype,
                         .weights = matrix.data,
                         .weight_expert_stride = stride(matrix, 0),
                         .weight_row_stride = stride(matrix, 1),
                         .num_experts = matrix.shape[0],
                         .n = matrix.shape[1],
                         .k = matrix.shape[2]};
    g.x_scales.form = form_of(options.x_format);
    if (scales) g.weight_scales = check_operand_scales(check, "weight_scales", *scales, matrix);
    if (bias) {
      g.bias = bias->data;
      g.bias_dtype = bias->dtype;
      g.bias_stride = bias->strides[0];
    }
    return g;
  };
  p.up = product(w13, experts.w13_scales, experts.w13_bias);
  p.up.x = x.data;
  p.up.x_stride = stride(x, 0);
  p.up.activation = experts.activation;
  p.down = product(w2, experts.w2_scales, experts.w2_bias);
  return p;
}

// The formats of the layer: scales of both matrices, then what x and the inter rows are quantised to. Returns
// that of the weights.
std::optional<QuantFormat> check_formats(const Check& check, const TensorView& w13, const TensorView& w2,
                                         const Experts& experts, const FusedExpertsOptions& options) {
  const std::optional<OperandScales>&s13 = experts.w13_scales, &s2 = experts.w2_scales;
  if (s13) check_operand_scales(check, "w13_scales", *s13, w13);
  if (s2) check_operand_scales(check, "w2_scales", *s2, w2);
  const FormPair forms{form_of(options.x_format), form_of(s13)};
  if (form_of(s2) != forms.weights)
    check.fail("w2_scales.format", name(form_of(s2)), "that of w13, " + std::string(name(forms.weights)));
  check_forms(check, "x_format x w13_scales.format", forms);

  if (options.x_format) check_format(check, layer_format(*options.x_format));
  const bool is_static = options.x_format && options.x_format->static_scale;
  auto check_scale = [&](std::string_view arg, const std::optional<TensorView>& scale) {
    if (!scale) {
      if (is_static) check.fail(arg, "missing", "f32 [1,1] for a static scale");
    } else if (is_static) {
      check.tensor(arg, *scale, F32Type::kRows, 2);
      check.dim(arg, *scale, 0, 1, "a static scale");
      check.dim(arg, *scale, 1, 1, "a static scale");
    } else {
      check.that(forms.x == OperandForm::kNvfp4, arg, 1, "none (it belongs to fp8_tensor_static and nvfp4)");
      check.tensor(arg, *scale, F32Type::kRows, 1);
      check.dim(arg, *scale, 0, 1, "a global scale");
    }
  };
  check_scale("x_scale", options.x_scale);
  check_scale("inter_scale", options.inter_scale);
  if (forms.x == OperandForm::kNvfp4)
    check.that(w2.shape[2] % 2 == 0, "w2.shape[2]", w2.shape[2], "an even number of e2m1 elements");
  return s13 ? std::optional(s13->format) : std::nullopt;
}

// Plans and quantises the tokens in one launch where an engine can, and says whether it did.
bool plan_beside_quantize(const TensorView& ids, const Plan& out, const PlanOptions& options,
                          const TensorView& x, const TensorView& codes, const OperandScales& scales,
                          const ExecContext& ctx) {
  if (ctx.device.type != DeviceType::kCUDA) return false;
  const PlanQuantizeProblem problem{
      .plan = make_plan_problem(Check("plan", ctx), ids, out, options, ctx),
      .tokens = make_quantize_problem(Check("quantize", ctx), x, codes, scales.scales, scales.format,
                                      {.global_scale = scales.global_scale})};
  const std::string why = cuda::plan_quantize(problem, ctx);
  if (!why.empty() && ctx.explain)
    ctx.explain->append("fused_experts: plan, then quantize; not one launch: " + why + "\n");
  return why.empty();
}

// Has the product leave its rows as the next one's codes where an engine can, which keeps a pass over them,
// and says whether it does.
bool leave_codes(GroupedGemmProblem& product, const TensorView& codes, const OperandScales& scales,
                 const ExecContext& ctx) {
  if (ctx.device.type != DeviceType::kCUDA) return false;
  product.quantized_out = {.format = scales.format,
                           .codes = static_cast<std::uint8_t*>(codes.data),
                           .pitch = codes.strides[0],
                           .scales = static_cast<float*>(scales.scales.data),
                           .scale_pitch = scales.scales.strides[0]};
  const std::string why = cuda::quantized_out_refusal(product, ctx);
  if (why.empty()) return true;
  product.quantized_out.reset();
  if (ctx.explain)
    ctx.explain->append(
        "fused_experts: a pass quantises the rows between the products; not the first one: " + why + "\n");
  return false;
}

}  // namespace

std::size_t fused_experts_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k,
                                          std::int64_t num_experts, std::int64_t hidden, std::int64_t inter,
                                          DType dtype, Device device,
                                          const std::optional<QuantFormat>& x_format,
                                          const std::optional<QuantFormat>& weight_format) {
  const Layout layout(nullptr, num_tokens, top_k, num_experts, hidden, inter, dtype, DType::kF32, device,
                      x_format, weight_format);
  const bool on_cuda = device.type == DeviceType::kCUDA;
  return std::max(layout.bytes, on_cuda ? cuda::decode_workspace_bytes(num_tokens, top_k, inter) : 0);
}

void fused_experts(const TensorView& x, const TensorView& weights, const TensorView& ids,
                   const Experts& experts, const TensorView& out, const FusedExpertsOptions& options,
                   const ExecContext& ctx) {
  const Check check("fused_experts", ctx);
  check.tensor("x", x, GroupedGemmTypes::kRows, 2);
  check.tensor("weights", weights, WeightTypes::kRows, 2);
  check.tensor("ids", ids, IndexTypes::kRows, 2);
  const TensorView w13 = check_operand(check, "w13", experts.w13, 3, experts.w13_scales);
  const TensorView w2 = check_operand(check, "w2", experts.w2, 3, experts.w2_scales);
  check.tensor("out", out, GroupedGemmTypes::kRows, 2, Check::Access::kOut);
  if (!experts.w13_scales) check.same_dtype("w13", w13, "x", x);
  if (!experts.w2_scales) check.same_dtype("w2", w2, "x", x);
  check.same_dtype("out", out, "x", x);
  const std::int64_t num_tokens = x.shape[0], hidden = x.shape[1], top_k = ids.shape[1];
  const std::int64_t num_experts = experts.num_experts(), inter = experts.inter();
  const std::int64_t width = experts.activation.gated() ? 2 * inter : inter;
  check.dim("ids", ids, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 0, num_tokens, "num_tokens");
  check.dim("weights", weights, 1, top_k, "top_k");
  check.dim("w13", w13, 2, hidden, "hidden");
  check.dim("w13", w13, 1, width, experts.activation.gated() ? "2 * inter" : "inter");
  check.dim("w2", w2, 0, num_experts, "num_experts");
  check.dim("w2", w2, 1, hidden, "hidden");
  const std::optional<QuantFormat> weight_format = check_formats(check, w13, w2, experts, options);
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
  check.workspace(fused_experts_workspace_bytes(num_tokens, top_k, num_experts, hidden, inter, x.dtype,
                                                ctx.device, options.x_format, weight_format));

  if (ctx.device.type == DeviceType::kCUDA) {
    const std::string why =
        cuda::run_decode(decode_problem(check, x, weights, ids, w13, w2, experts, out, options), ctx);
    if (why.empty()) return;
    if (ctx.explain)
      ctx.explain->append("fused_experts: the ops below one after the other; not one kernel: " + why + "\n");
  }

  Layout layout(ctx.workspace.data(), num_tokens, top_k, num_experts, hidden, inter, x.dtype, weights.dtype,
                ctx.device, options.x_format, weight_format);
  if (!options.apply_router_weight_on_input) layout.plan.row_route.reset();
  auto with = [&](std::span<std::byte> workspace) {
    ExecContext c = ctx;
    c.workspace = workspace;
    return c;
  };
  const ExecContext inner = with(layout.scratch);
  ExecContext of_up = with(layout.scratch1);

  GroupedGemmOptions gemm1{.bias = experts.w13_bias,
                           .row_token = layout.plan.row_token,
                           .activation = experts.activation,
                           .weight_scales = experts.w13_scales},
      gemm2{.bias = experts.w2_bias, .weight_scales = experts.w2_scales, .offsets_settled = true};
  TensorView operand1 = x, operand2 = layout.inter_rows;
  auto up_problem = [&] {
    return make_grouped_gemm_problem(Check("grouped_gemm", of_up), operand1, experts.w13,
                                     layout.plan.expert_offsets, layout.inter_rows, gemm1, of_up);
  };
  const ExecContext of_down = with(layout.scratch2);
  auto down_problem = [&] {
    return make_grouped_gemm_problem(Check("grouped_gemm", of_down), operand2, experts.w2,
                                     layout.plan.expert_offsets, layout.out_rows, gemm2, of_down);
  };
  auto preferred = [&](const auto& product, const ExecContext& of_product) {
    return ctx.device.type == DeviceType::kCUDA ? cuda::preferred_x_layout(product(), of_product) : XLayout{};
  };
  // `scale` is a static fp8 scale or nvfp4's g.
  auto scales_of = [&](const QuantizedRows& rows, const std::optional<TensorView>& scale,
                       bool in_columns = false) {
    const QuantFormat f =
        layer_format(*options.x_format, in_columns ? ScaleLayout::kColumnMajor : ScaleLayout::kLinear);
    OperandScales scales{f, f.static_scale ? *scale : in_columns ? rows.column_scales : rows.scales};
    if (f.kind == QuantKind::kNvfp4) scales.global_scale = scale;
    return scales;
  };
  if (options.x_format) {
    gemm1.x_scales = scales_of(layout.x, options.x_scale);
    gemm2.x_scales = scales_of(layout.inter, options.inter_scale);
    operand1 = layout.x.codes;
    operand2 = layout.inter.codes;
  }

  const PlanOptions plan_options{
      .num_experts = num_experts, .expert_map = options.expert_map, .first_expert = options.first_expert};
  if (!options.x_format) {
    plan(ids, layout.plan, plan_options, inner);
  } else if (!plan_beside_quantize(ids, layout.plan, plan_options, x, operand1, *gemm1.x_scales, inner)) {
    plan(ids, layout.plan, plan_options, inner);
    const XLayout wanted =
        has_dynamic_tensor_scale(*options.x_format) ? XLayout{} : preferred(up_problem, of_up);
    if (wanted.rows_in_order) {
      gemm1.row_token.reset();
      gemm1.x_scales = scales_of(layout.in_order, options.x_scale, wanted.scales_in_columns);
      operand1 = layout.in_order.codes;
      permute_quantize(x, layout.plan, operand1, gemm1.x_scales->scales, gemm1.x_scales->format, {}, inner);
      of_up = with(layout.scratch1_in_order);
    } else {
      quantize(x, operand1, gemm1.x_scales->scales, gemm1.x_scales->format,
               {.global_scale = gemm1.x_scales->global_scale}, inner);
    }
    gemm1.offsets_settled = true;  // before quantize began
  }
  if (options.apply_router_weight_on_input) {
    const std::int64_t routes = num_tokens * top_k;
    TensorView route_weights = TensorView::dense(weights.data, weights.dtype, {routes, 1}, ctx.device);
    shuffle_rows(route_weights, *layout.plan.row_route, layout.row_weights, inner);
    gemm1.row_weights = TensorView::dense(layout.row_weights.data, weights.dtype, {routes}, ctx.device);
  }

  GroupedGemmProblem up = up_problem();
  const bool leaves_codes = options.x_format && leave_codes(up, operand2, *gemm2.x_scales, of_up);
  run_on_backend(cpu::grouped_gemm, cuda::grouped_gemm, up, of_up);
  if (options.x_format && !leaves_codes) {
    gemm2.x_scales =
        scales_of(layout.inter, options.inter_scale, preferred(down_problem, of_down).scales_in_columns);
    quantize(layout.inter_rows, operand2, gemm2.x_scales->scales, gemm2.x_scales->format,
             {.rows = {.expert_offsets = layout.plan.expert_offsets},
              .global_scale = gemm2.x_scales->global_scale},
             inner);
  }
  run_on_backend(cpu::grouped_gemm, cuda::grouped_gemm, down_problem(), of_down);

  FinalizeOptions last{.residual = options.residual};
  if (!options.apply_router_weight_on_input) last.weights = weights;
  finalize(layout.out_rows, layout.plan.slot_row, out, last, inner);
}

}  // namespace moecore
