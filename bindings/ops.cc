// One m.def per op. Outputs are arguments; nothing here validates, allocates results or picks a kernel.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <charconv>
#include <cstdint>
#include <string_view>

#include "choices.h"
#include "moecore/moecore.h"
#include "op_call.h"

namespace moecore::python {

Device parse_device(std::string_view text) {
  if (text == "cpu") return {};
  if (text == "cuda") return {DeviceType::kCUDA, 0};
  if (text.substr(0, 5) == "cuda:") {
    int index = -1;
    const char* end = text.data() + text.size();
    if (std::from_chars(text.data() + 5, end, index).ptr == end && index >= 0)
      return {DeviceType::kCUDA, index};
  }
  throw InvalidArgument("device is \"" + std::string(text) +
                        "\", expected \"cpu\", \"cuda\" or \"cuda:<index>\"");
}

namespace {

using namespace nb::literals;
using OptionalTensor = std::optional<TensorArg>;
using OptionalFloat = std::optional<float>;

}  // namespace

// Parameters left out take the values of the kind: gpt-oss's for swiglu_oai, neutral ones for the others.
Activation parse_activation(const char* op, const char* argument, std::string_view kind,
                            std::string_view order, OptionalFloat alpha, OptionalFloat beta,
                            OptionalFloat limit) {
  const auto parsed_kind = parse<ActivationKind>(op, argument, kind,
                                                 {{"silu", ActivationKind::kSilu},
                                                  {"gelu", ActivationKind::kGelu},
                                                  {"gelu_tanh", ActivationKind::kGeluTanh},
                                                  {"quick_gelu", ActivationKind::kQuickGelu},
                                                  {"relu", ActivationKind::kRelu},
                                                  {"relu2", ActivationKind::kRelu2},
                                                  {"swiglu_oai", ActivationKind::kSwigluOai}});
  Activation activation;
  if (parsed_kind == ActivationKind::kSwigluOai) activation = Activation::gpt_oss();
  activation.kind = parsed_kind;
  activation.order = parse<GateOrder>(op, "order", order,
                                      {{"gate_up", GateOrder::kGateUp},
                                       {"up_gate", GateOrder::kUpGate},
                                       {"interleaved", GateOrder::kInterleaved},
                                       {"plain", GateOrder::kPlain}});
  if (alpha) activation.alpha = *alpha;
  if (beta) activation.beta = *beta;
  if (limit) activation.limit = *limit;
  return activation;
}

namespace {

// Of an op that may do without: none, and none of its parameters.
std::optional<Activation> parse_optional_activation(const char* op, std::optional<std::string_view> kind,
                                                    std::string_view order, OptionalFloat alpha,
                                                    OptionalFloat beta, OptionalFloat limit) {
  if (kind) return parse_activation(op, "activation", *kind, order, alpha, beta, limit);
  const char* given = order != "gate_up" ? "order"
                      : alpha            ? "alpha"
                      : beta             ? "beta"
                      : limit            ? "limit"
                                         : nullptr;
  if (given)
    throw InvalidArgument(std::string(op) + ": " + given +
                          " is given, expected none: there is no activation");
  return std::nullopt;
}

DType parse_dtype_name(std::string_view text) {
  if (const auto dtype = parse_dtype(text)) return *dtype;
  throw InvalidArgument("dtype is \"" + std::string(text) + "\", expected a moecore dtype such as \"bf16\"");
}

RouteOptions route_options(const OpCall& call, const char* op, std::string_view scoring,
                           const OptionalTensor& bias, std::int64_t num_groups, std::int64_t topk_groups,
                           std::string_view group_score, bool renormalize, float scale,
                           const OptionalTensor& is_padding) {
  return {
      .scoring = parse<Scoring>(
          op, "scoring", scoring,
          {{"softmax", Scoring::kSoftmax}, {"sigmoid", Scoring::kSigmoid}, {"identity", Scoring::kIdentity}}),
      .bias = call.in("bias", bias),
      .num_groups = num_groups,
      .topk_groups = topk_groups,
      .group_score = parse<GroupScore>(op, "group_score", group_score,
                                       {{"top2_sum", GroupScore::kTop2Sum}, {"max", GroupScore::kMax}}),
      .renormalize = renormalize,
      .scale = scale,
      .is_padding = call.in("is_padding", is_padding)};
}

void bind_route(nb::module_& m) {
  m.def(
      "route",
      [](const TensorArg& logits, const TensorArg& weights, const TensorArg& ids, std::string_view scoring,
         const OptionalTensor& bias, std::int64_t num_groups, std::int64_t topk_groups,
         std::string_view group_score, bool renormalize, float scale, const OptionalTensor& is_padding,
         StreamArg stream) {
        OpCall call("route", logits, stream);
        const TensorView& logits_view = call.in("logits", logits);
        const TensorView& weights_view = call.in("weights", weights);
        const TensorView& ids_view = call.in("ids", ids);
        const RouteOptions options = route_options(call, "route", scoring, bias, num_groups, topk_groups,
                                                   group_score, renormalize, scale, is_padding);
        call.run([&](const ExecContext& ctx) { route(logits_view, weights_view, ids_view, options, ctx); });
      },
      "logits"_a, "weights"_a, "ids"_a, nb::kw_only(), "scoring"_a = "softmax", "bias"_a = nb::none(),
      "num_groups"_a = 1, "topk_groups"_a = 1, "group_score"_a = "top2_sum", "renormalize"_a = false,
      "scale"_a = 1.0f, "is_padding"_a = nb::none(), "stream"_a = nb::none());
}

// What plan() and route_plan() fill.
Plan plan_tensors(const OpCall& call, const TensorArg& expert_offsets, const TensorArg& scale_offsets,
                  const TensorArg& row_token, const TensorArg& slot_row, const OptionalTensor& row_route,
                  const OptionalTensor& problem_sizes1, const OptionalTensor& problem_sizes2) {
  return {.expert_offsets = call.in("expert_offsets", expert_offsets),
          .scale_offsets = call.in("scale_offsets", scale_offsets),
          .row_token = call.in("row_token", row_token),
          .slot_row = call.in("slot_row", slot_row),
          .row_route = call.in("row_route", row_route),
          .problem_sizes1 = call.in("problem_sizes1", problem_sizes1),
          .problem_sizes2 = call.in("problem_sizes2", problem_sizes2)};
}

// Their workspace. What cannot be sized is about to be refused by the op.
void plan_workspace(OpCall& call, const OptionalTensor& workspace, const TensorView& ids,
                    std::int64_t num_experts) {
  const bool sized = ids.ndim == 2 && num_experts > 0;
  call.workspace(
      workspace,
      sized ? plan_workspace_bytes(ids.shape[0], ids.shape[1], num_experts, call.context().device) : 0);
}

void bind_plan(nb::module_& m) {
  m.def(
      "plan",
      [](const TensorArg& ids, const TensorArg& expert_offsets, const TensorArg& scale_offsets,
         const TensorArg& row_token, const TensorArg& slot_row, const OptionalTensor& row_route,
         const OptionalTensor& problem_sizes1, const OptionalTensor& problem_sizes2, std::int64_t num_experts,
         const OptionalTensor& expert_map, std::int64_t first_expert, std::int64_t scale_alignment,
         std::int64_t hidden, std::int64_t inter, bool gated, bool swap_ab, const OptionalTensor& workspace,
         StreamArg stream) {
        OpCall call("plan", ids, stream);
        const TensorView& ids_view = call.in("ids", ids);
        const Plan out = plan_tensors(call, expert_offsets, scale_offsets, row_token, slot_row, row_route,
                                      problem_sizes1, problem_sizes2);
        const PlanOptions options{.num_experts = num_experts,
                                  .expert_map = call.in("expert_map", expert_map),
                                  .first_expert = first_expert,
                                  .scale_alignment = scale_alignment,
                                  .hidden = hidden,
                                  .inter = inter,
                                  .gated = gated,
                                  .swap_ab = swap_ab};
        plan_workspace(call, workspace, ids_view, num_experts);
        call.run([&](const ExecContext& ctx) { plan(ids_view, out, options, ctx); });
      },
      "ids"_a, "expert_offsets"_a, "scale_offsets"_a, "row_token"_a, "slot_row"_a, "row_route"_a = nb::none(),
      "problem_sizes1"_a = nb::none(), "problem_sizes2"_a = nb::none(), nb::kw_only(), "num_experts"_a,
      "expert_map"_a = nb::none(), "first_expert"_a = 0, "scale_alignment"_a = 128, "hidden"_a = 0,
      "inter"_a = 0, "gated"_a = true, "swap_ab"_a = false, "workspace"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "plan_workspace_bytes",
      [](std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts, std::string_view device) {
        return plan_workspace_bytes(num_tokens, top_k, num_experts, parse_device(device));
      },
      "num_tokens"_a, "top_k"_a, "num_experts"_a, "device"_a = "cpu");
}

void bind_route_plan(nb::module_& m) {
  m.def(
      "route_plan",
      [](const TensorArg& logits, const TensorArg& weights, const TensorArg& ids,
         const TensorArg& expert_offsets, const TensorArg& scale_offsets, const TensorArg& row_token,
         const TensorArg& slot_row, const OptionalTensor& row_route, const OptionalTensor& problem_sizes1,
         const OptionalTensor& problem_sizes2, std::string_view scoring, const OptionalTensor& bias,
         std::int64_t num_groups, std::int64_t topk_groups, std::string_view group_score, bool renormalize,
         float scale, const OptionalTensor& is_padding, std::int64_t num_experts,
         const OptionalTensor& expert_map, std::int64_t first_expert, std::int64_t scale_alignment,
         std::int64_t hidden, std::int64_t inter, bool gated, bool swap_ab, const OptionalTensor& workspace,
         StreamArg stream) {
        OpCall call("route_plan", logits, stream);
        const TensorView& logits_view = call.in("logits", logits);
        const TensorView& weights_view = call.in("weights", weights);
        const TensorView& ids_view = call.in("ids", ids);
        const RouteOptions options = route_options(call, "route_plan", scoring, bias, num_groups, topk_groups,
                                                   group_score, renormalize, scale, is_padding);
        const Plan out = plan_tensors(call, expert_offsets, scale_offsets, row_token, slot_row, row_route,
                                      problem_sizes1, problem_sizes2);
        const PlanOptions plan_options{.num_experts = num_experts,
                                       .expert_map = call.in("expert_map", expert_map),
                                       .first_expert = first_expert,
                                       .scale_alignment = scale_alignment,
                                       .hidden = hidden,
                                       .inter = inter,
                                       .gated = gated,
                                       .swap_ab = swap_ab};
        plan_workspace(call, workspace, ids_view, num_experts);
        call.run([&](const ExecContext& ctx) {
          route_plan(logits_view, weights_view, ids_view, out, options, plan_options, ctx);
        });
      },
      "logits"_a, "weights"_a, "ids"_a, "expert_offsets"_a, "scale_offsets"_a, "row_token"_a, "slot_row"_a,
      "row_route"_a = nb::none(), "problem_sizes1"_a = nb::none(), "problem_sizes2"_a = nb::none(),
      nb::kw_only(), "scoring"_a = "softmax", "bias"_a = nb::none(), "num_groups"_a = 1, "topk_groups"_a = 1,
      "group_score"_a = "top2_sum", "renormalize"_a = false, "scale"_a = 1.0f, "is_padding"_a = nb::none(),
      "num_experts"_a, "expert_map"_a = nb::none(), "first_expert"_a = 0, "scale_alignment"_a = 128,
      "hidden"_a = 0, "inter"_a = 0, "gated"_a = true, "swap_ab"_a = false, "workspace"_a = nb::none(),
      "stream"_a = nb::none());
}

void bind_permute(nb::module_& m) {
  m.def(
      "shuffle_rows",
      [](const TensorArg& x, const TensorArg& map, const TensorArg& out, const OptionalTensor& scales,
         const OptionalTensor& out_scales, StreamArg stream) {
        OpCall call("shuffle_rows", x, stream);
        const TensorView &x_view = call.in("x", x), &map_view = call.in("map", map),
                         &out_view = call.in("out", out);
        const auto in_view = call.in("scales", scales), scales_view = call.in("out_scales", out_scales);
        if (in_view.has_value() != scales_view.has_value())
          throw InvalidArgument(
              "shuffle_rows: one of scales and out_scales is None, expected both or neither");
        call.run([&](const ExecContext& ctx) {
          in_view ? shuffle_rows(x_view, *in_view, map_view, out_view, *scales_view, ctx)
                  : shuffle_rows(x_view, map_view, out_view, ctx);
        });
      },
      "x"_a, "map"_a, "out"_a, nb::kw_only(), "scales"_a = nb::none(), "out_scales"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "permute",
      [](const TensorArg& x, const TensorArg& row_token, const TensorArg& slot_row,
         const TensorArg& expert_offsets, const TensorArg& rows, const OptionalTensor& scales,
         const OptionalTensor& row_scales, StreamArg stream) {
        OpCall call("permute", x, stream);
        const TensorView &x_view = call.in("x", x), &rows_view = call.in("rows", rows);
        Plan plan;
        plan.expert_offsets = call.in("expert_offsets", expert_offsets);
        plan.row_token = call.in("row_token", row_token);
        plan.slot_row = call.in("slot_row", slot_row);
        const auto in_view = call.in("scales", scales), scales_view = call.in("row_scales", row_scales);
        if (in_view.has_value() != scales_view.has_value())
          throw InvalidArgument("permute: one of scales and row_scales is None, expected both or neither");
        call.run([&](const ExecContext& ctx) {
          in_view ? permute(x_view, *in_view, plan, rows_view, *scales_view, ctx)
                  : permute(x_view, plan, rows_view, ctx);
        });
      },
      "x"_a, "row_token"_a, "slot_row"_a, "expert_offsets"_a, "rows"_a, nb::kw_only(),
      "scales"_a = nb::none(), "row_scales"_a = nb::none(), "stream"_a = nb::none());
}

void bind_activate(nb::module_& m) {
  m.def(
      "activate",
      [](const TensorArg& x, const TensorArg& out, std::string_view kind, std::string_view order,
         OptionalFloat alpha, OptionalFloat beta, OptionalFloat limit, const OptionalTensor& expert_offsets,
         StreamArg stream) {
        OpCall call("activate", x, stream);
        const TensorView &x_view = call.in("x", x), &out_view = call.in("out", out);
        const Activation parsed = parse_activation("activate", "kind", kind, order, alpha, beta, limit);
        const auto offsets = call.in("expert_offsets", expert_offsets);
        call.run([&](const ExecContext& ctx) { activate(x_view, out_view, parsed, offsets, ctx); });
      },
      "x"_a, "out"_a, nb::kw_only(), "kind"_a, "order"_a, "alpha"_a = nb::none(), "beta"_a = nb::none(),
      "limit"_a = nb::none(), "expert_offsets"_a = nb::none(), "stream"_a = nb::none());
}

using OptionalFormat = std::optional<QuantFormat>;

// The scales of an operand with a format; what belongs together must come together.
std::optional<OperandScales> operand_scales(const OpCall& call, const char* op, const char* format_name,
                                            const OptionalFormat& format, const char* scales_name,
                                            const OptionalTensor& scales, const char* global_name,
                                            const OptionalTensor& global_scale) {
  const auto scales_view = call.in(scales_name, scales), global_view = call.in(global_name, global_scale);
  if (!format) {
    if (scales_view || global_view)
      throw InvalidArgument(std::string(op) + ": " + format_name + " is None, expected a format with " +
                            (scales_view ? scales_name : global_name));
    return {};
  }
  if (!scales_view)
    throw InvalidArgument(std::string(op) + ": " + scales_name + " is None, expected scales with " +
                          format_name);
  return OperandScales{*format, *scales_view, global_view};
}

// Elements in a row of an operand: bytes hold two codes of fp4.
std::int64_t depth_of(const TensorView& t, const OptionalFormat& format) {
  const std::int64_t k = t.shape[t.ndim - 1];
  return format && t.dtype == DType::kU8 ? k * 8 / bit_width(format->data_dtype()) : k;
}

void bind_grouped_gemm(nb::module_& m) {
  m.def(
      "grouped_gemm",
      [](const TensorArg& x, const TensorArg& weights, const TensorArg& expert_offsets, const TensorArg& out,
         const OptionalTensor& bias, const OptionalTensor& row_token,
         std::optional<std::string_view> activation, std::string_view order, OptionalFloat alpha,
         OptionalFloat beta, OptionalFloat limit, const OptionalTensor& row_weights,
         const OptionalFormat& x_format, const OptionalTensor& x_scales, const OptionalTensor& x_global_scale,
         const OptionalFormat& weight_format, const OptionalTensor& weight_scales,
         const OptionalTensor& weight_global_scale, const OptionalTensor& workspace, StreamArg stream) {
        OpCall call("grouped_gemm", x, stream);
        const TensorView &x_view = call.in("x", x), &weights_view = call.in("weights", weights),
                         &offsets_view = call.in("expert_offsets", expert_offsets),
                         &out_view = call.in("out", out);
        GroupedGemmOptions options{.bias = call.in("bias", bias),
                                   .row_token = call.in("row_token", row_token),
                                   .row_weights = call.in("row_weights", row_weights)};
        options.x_scales = operand_scales(call, "grouped_gemm", "x_format", x_format, "x_scales", x_scales,
                                          "x_global_scale", x_global_scale);
        options.weight_scales =
            operand_scales(call, "grouped_gemm", "weight_format", weight_format, "weight_scales",
                           weight_scales, "weight_global_scale", weight_global_scale);
        options.activation = parse_optional_activation("grouped_gemm", activation, order, alpha, beta, limit);
        const bool sized = weights_view.ndim == 3 && out_view.ndim == 2;
        call.workspace(workspace, sized ? grouped_gemm_workspace_bytes(
                                              out_view.shape[0], weights_view.shape[1],
                                              depth_of(weights_view, weight_format), weights_view.shape[0],
                                              out_view.dtype, call.context().device, x_format, weight_format)
                                        : 0);
        call.run([&](const ExecContext& ctx) {
          grouped_gemm(x_view, weights_view, offsets_view, out_view, options, ctx);
        });
      },
      "x"_a, "weights"_a, "expert_offsets"_a, "out"_a, nb::kw_only(), "bias"_a = nb::none(),
      "row_token"_a = nb::none(), "activation"_a = nb::none(), "order"_a = "gate_up", "alpha"_a = nb::none(),
      "beta"_a = nb::none(), "limit"_a = nb::none(), "row_weights"_a = nb::none(), "x_format"_a = nb::none(),
      "x_scales"_a = nb::none(), "x_global_scale"_a = nb::none(), "weight_format"_a = nb::none(),
      "weight_scales"_a = nb::none(), "weight_global_scale"_a = nb::none(), "workspace"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "grouped_gemm_workspace_bytes",
      [](std::int64_t rows, std::int64_t n, std::int64_t k, std::int64_t num_experts, std::string_view dtype,
         std::string_view device, const OptionalFormat& x_format, const OptionalFormat& weight_format) {
        return grouped_gemm_workspace_bytes(rows, n, k, num_experts, parse_dtype_name(dtype),
                                            parse_device(device), x_format, weight_format);
      },
      "rows"_a, "n"_a, "k"_a, "num_experts"_a, "dtype"_a, "device"_a = "cpu", "x_format"_a = nb::none(),
      "weight_format"_a = nb::none());
}

void bind_finalize(nb::module_& m) {
  m.def(
      "finalize",
      [](const TensorArg& rows, const TensorArg& slot_row, const TensorArg& out,
         const OptionalTensor& weights, bool cast_weights, const OptionalTensor& residual,
         const OptionalTensor& row_scales, const OptionalTensor& out_scales, std::string_view scale_layout,
         StreamArg stream) {
        const char* op = out_scales ? "finalize_quantize" : "finalize";
        OpCall call(op, rows, stream);
        const TensorView &rows_view = call.in("rows", rows), &slot_view = call.in("slot_row", slot_row),
                         &out_view = call.in("out", out);
        const FinalizeOptions options{
            .weights = call.in("weights", weights),
            .cast_weights = cast_weights,
            .residual = call.in("residual", residual),
            .row_scales = call.in("row_scales", row_scales),
            .out_scales = call.in("out_scales", out_scales),
            .scale_layout = parse<ScaleLayout>(
                op, "scale_layout", scale_layout,
                {{"linear", ScaleLayout::kLinear}, {"column_major", ScaleLayout::kColumnMajor}})};
        call.run([&](const ExecContext& ctx) { finalize(rows_view, slot_view, out_view, options, ctx); });
      },
      "rows"_a, "slot_row"_a, "out"_a, nb::kw_only(), "weights"_a = nb::none(), "cast_weights"_a = false,
      "residual"_a = nb::none(), "row_scales"_a = nb::none(), "out_scales"_a = nb::none(),
      "scale_layout"_a = "linear", "stream"_a = nb::none());
}

void bind_fused_experts(nb::module_& m) {
  m.def(
      "fused_experts",
      [](const TensorArg& x, const TensorArg& weights, const TensorArg& ids, const TensorArg& w13,
         const TensorArg& w2, const TensorArg& out, std::string_view activation, std::string_view order,
         OptionalFloat alpha, OptionalFloat beta, OptionalFloat limit, const OptionalTensor& w13_bias,
         const OptionalTensor& w2_bias, const OptionalTensor& expert_map, std::int64_t first_expert,
         bool apply_router_weight_on_input, const OptionalTensor& residual, const OptionalFormat& x_format,
         const OptionalTensor& x_scale, const OptionalTensor& inter_scale,
         const OptionalFormat& weight_format, const OptionalTensor& w13_scales,
         const OptionalTensor& w2_scales, const OptionalTensor& w13_global_scale,
         const OptionalTensor& w2_global_scale, const OptionalTensor& workspace, StreamArg stream) {
        OpCall call("fused_experts", x, stream);
        const TensorView &x_view = call.in("x", x), &weights_view = call.in("weights", weights),
                         &ids_view = call.in("ids", ids), &out_view = call.in("out", out);
        const Experts experts{
            .w13 = call.in("w13", w13),
            .w2 = call.in("w2", w2),
            .w13_bias = call.in("w13_bias", w13_bias),
            .w2_bias = call.in("w2_bias", w2_bias),
            .activation =
                parse_activation("fused_experts", "activation", activation, order, alpha, beta, limit),
            .w13_scales = operand_scales(call, "fused_experts", "weight_format", weight_format, "w13_scales",
                                         w13_scales, "w13_global_scale", w13_global_scale),
            .w2_scales = operand_scales(call, "fused_experts", "weight_format", weight_format, "w2_scales",
                                        w2_scales, "w2_global_scale", w2_global_scale)};
        const FusedExpertsOptions options{.expert_map = call.in("expert_map", expert_map),
                                          .first_expert = first_expert,
                                          .apply_router_weight_on_input = apply_router_weight_on_input,
                                          .residual = call.in("residual", residual),
                                          .x_format = x_format,
                                          .x_scale = call.in("x_scale", x_scale),
                                          .inter_scale = call.in("inter_scale", inter_scale)};
        const bool sized = ids_view.ndim == 2 && experts.w13.ndim == 3 && experts.w2.ndim == 3;
        call.workspace(workspace, sized ? fused_experts_workspace_bytes(
                                              ids_view.shape[0], ids_view.shape[1], experts.num_experts(),
                                              experts.hidden(), experts.inter(), x_view.dtype,
                                              call.context().device, x_format, weight_format)
                                        : 0);
        call.run([&](const ExecContext& ctx) {
          fused_experts(x_view, weights_view, ids_view, experts, out_view, options, ctx);
        });
      },
      "x"_a, "weights"_a, "ids"_a, "w13"_a, "w2"_a, "out"_a, nb::kw_only(), "activation"_a, "order"_a,
      "alpha"_a = nb::none(), "beta"_a = nb::none(), "limit"_a = nb::none(), "w13_bias"_a = nb::none(),
      "w2_bias"_a = nb::none(), "expert_map"_a = nb::none(), "first_expert"_a = 0,
      "apply_router_weight_on_input"_a = false, "residual"_a = nb::none(), "x_format"_a = nb::none(),
      "x_scale"_a = nb::none(), "inter_scale"_a = nb::none(), "weight_format"_a = nb::none(),
      "w13_scales"_a = nb::none(), "w2_scales"_a = nb::none(), "w13_global_scale"_a = nb::none(),
      "w2_global_scale"_a = nb::none(), "workspace"_a = nb::none(), "stream"_a = nb::none());
  m.def(
      "fused_experts_workspace_bytes",
      [](std::int64_t num_tokens, std::int64_t top_k, std::int64_t num_experts, std::int64_t hidden,
         std::int64_t inter, std::string_view dtype, std::string_view device, const OptionalFormat& x_format,
         const OptionalFormat& weight_format) {
        return fused_experts_workspace_bytes(num_tokens, top_k, num_experts, hidden, inter,
                                             parse_dtype_name(dtype), parse_device(device), x_format,
                                             weight_format);
      },
      "num_tokens"_a, "top_k"_a, "num_experts"_a, "hidden"_a, "inter"_a, "dtype"_a, "device"_a = "cpu",
      "x_format"_a = nb::none(), "weight_format"_a = nb::none());
  m.def(
      "transpose_experts",
      [](const TensorArg& src, const TensorArg& dst, StreamArg stream) {
        OpCall call("transpose_experts", src, stream);
        const TensorView &src_view = call.in("src", src), &dst_view = call.in("dst", dst);
        call.run([&](const ExecContext& ctx) { transpose_experts(src_view, dst_view, ctx); });
      },
      "src"_a, "dst"_a, nb::kw_only(), "stream"_a = nb::none());
}

}  // namespace

void bind_ops(nb::module_& m) {
  bind_route(m);
  bind_plan(m);
  bind_route_plan(m);
  bind_permute(m);
  bind_activate(m);
  bind_grouped_gemm(m);
  bind_finalize(m);
  bind_fused_experts(m);
}

}  // namespace moecore::python
