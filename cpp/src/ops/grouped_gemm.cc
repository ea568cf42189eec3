#include "ops/grouped_gemm.h"

#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <string_view>

#include "core/check.h"
#include "core/strides.h"
#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/quantize.h"

namespace moecore {

std::string_view name(OperandForm form) {
  constexpr std::string_view kNames[] = {"f32|f16|bf16", "fp8_tensor", "fp8_token", "fp8_block128",
                                         "mxfp8",        "nvfp4",      "mxfp4"};
  return kNames[static_cast<int>(form)];
}

OperandForm form_of(const std::optional<OperandScales>& scales) {
  return scales ? operand_form(scales->format) : OperandForm::kFloat;
}

OperandForm form_of(const std::optional<QuantFormat>& format) {
  return format ? operand_form(*format) : OperandForm::kFloat;
}

void check_forms(const Check& check, std::string_view arg, FormPair pair) {
  if (std::ranges::find(GemmForms::kRows, pair) != GemmForms::kRows.end()) return;
  auto text = [](const FormPair& p) { return std::string(name(p.x)) + " x " + std::string(name(p.weights)); };
  std::string supported;
  for (const FormPair& row : GemmForms::kRows) supported += (supported.empty() ? "" : ", ") + text(row);
  check.fail(arg, text(pair), "one of " + supported);
}

OperandScalesRef check_operand_scales(const Check& check, const std::string& arg, const OperandScales& s,
                                      const TensorView& codes) {
  const bool is_x = codes.ndim == 2;
  const OperandForm form = operand_form(s.format);
  const bool block128 = form == OperandForm::kFp8Block128;
  const bool column_major = s.format.layout == ScaleLayout::kColumnMajor;
  if (column_major && !(is_x && block128))
    check.fail(arg + ".layout", "column_major", "linear (column_major is for fp8_block128 scales of x)");
  if (is_swizzled(s.format.layout)) check.fail(arg + ".layout", "swizzled", "linear (see convert_scales)");
  if (s.format.e8m0_scales) check.fail(arg + ".format", "fp8_block128 with e8m0 scales", "f32 scales");

  // The scales' shape: experts for weights, then rows, then columns, as far as the form has them.
  std::array<std::int64_t, 3> shape{};
  int ndim = 0;
  const std::int64_t rows = codes.shape[codes.ndim - 2], cols = codes.shape[codes.ndim - 1];
  OperandScalesRef ref{
      .form = form, .dtype = s.format.scale_dtype(), .block_rows = !is_x && block128 ? 128 : 1};
  const int block = block_cols(form);
  const std::int64_t scale_rows = (rows + ref.block_rows - 1) / ref.block_rows;
  const std::int64_t scale_cols = block ? (cols + block - 1) / block : 1;
  if (!is_x) shape[ndim++] = codes.shape[0];
  if (is_x || form != OperandForm::kFp8Tensor)
    shape[ndim++] = form == OperandForm::kFp8Tensor ? 1 : scale_rows;
  if (is_x || block) shape[ndim++] = scale_cols;
  if (column_major) std::swap(shape[0], shape[1]);

  const DType types[] = {ref.dtype, DType::kU8};
  check.tensor(arg, s.scales, std::span(types, ref.dtype == DType::kF32 ? 1 : 2), ndim);
  for (int i = 0; i < ndim; ++i) {
    if (column_major && i == 1)
      check.that(s.scales.shape[1] >= rows, arg + ".shape[1]", s.scales.shape[1], "at least the rows of x");
    else
      check.dim(arg, s.scales, i, shape[static_cast<std::size_t>(i)],
                is_x ? "as the format says for x" : "as the format says for weights");
  }
  const std::int64_t bytes = bit_width(ref.dtype) / 8;
  ref.data = static_cast<const std::byte*>(s.scales.data);
  int axis = 0;
  if (!is_x) ref.expert_pitch = s.scales.strides[axis++] * bytes;
  if (form != OperandForm::kFp8Tensor) ref.row_pitch = s.scales.strides[axis++] * bytes;
  if (block) ref.col_pitch = s.scales.strides[axis] * bytes;
  if (column_major) std::swap(ref.row_pitch, ref.col_pitch);

  if (s.global_scale) {
    check.that(form == OperandForm::kNvfp4, arg + ".global_scale", 1, "none (it belongs to nvfp4)");
    check.tensor(arg + ".global_scale", *s.global_scale, F32Type::kRows, 1);
    const std::int64_t n = s.global_scale->shape[0];
    check.that(n == 1 || (!is_x && n == codes.shape[0]), "len(" + arg + ".global_scale)", n,
               is_x ? "1" : "1 or num_experts");
    ref.global_scale = static_cast<const float*>(s.global_scale->data);
    ref.global_scale_per_expert = n > 1;
  }
  return ref;
}

TensorView check_operand(const Check& check, std::string_view arg, const TensorView& t, int ndim,
                         const std::optional<OperandScales>& scales) {
  if (!scales) {
    check.tensor(arg, t, GroupedGemmTypes::kRows, ndim);
    return t;
  }
  const DType codes = scales->format.data_dtype();
  const DType types[] = {codes, DType::kU8};
  check.tensor(arg, t, types, ndim);
  const TensorView elements = as_codes(t, codes);
  if (codes == DType::kE2M1) {
    check.that(elements.shape[ndim - 1] % 2 == 0,
               std::string(arg) + ".shape[" + std::to_string(ndim - 1) + "]", elements.shape[ndim - 1],
               "an even number of e2m1 elements");
    for (int i = 0; i < ndim - 1; ++i)
      check.that(elements.strides[i] % 2 == 0, std::string(arg) + ".strides", elements.strides[i],
                 "an even number of e2m1 elements");
  }
  return elements;
}

std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, Device device,
                                         const std::optional<QuantFormat>& x_format,
                                         const std::optional<QuantFormat>& weight_format) {
  const FormPair forms{form_of(x_format), form_of(weight_format)};
  return device.type == DeviceType::kCUDA
             ? cuda::grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype, forms)
             : cpu::grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype, forms);
}

GroupedGemmProblem make_grouped_gemm_problem(const Check& check, const TensorView& x_arg,
                                             const TensorView& weights_arg, const TensorView& expert_offsets,
                                             const TensorView& out, const GroupedGemmOptions& options,
                                             const ExecContext& ctx) {
  const FormPair forms{form_of(options.x_scales), form_of(options.weight_scales)};
  check_forms(check, "x_scales.format x weight_scales.format", forms);
  const TensorView x = check_operand(check, "x", x_arg, 2, options.x_scales);
  const TensorView weights = check_operand(check, "weights", weights_arg, 3, options.weight_scales);
  check.tensor("expert_offsets", expert_offsets, I32Type::kRows, 1);
  check.tensor("out", out, GroupedGemmTypes::kRows, 2, Check::Access::kOut);
  if (!options.weight_scales) check.same_dtype("weights", weights, "x", x);
  if (!options.x_scales) check.same_dtype("out", out, "x", x);
  const std::int64_t num_experts = weights.shape[0], n = weights.shape[1], k = weights.shape[2];
  const std::int64_t num_rows = out.shape[0];
  check.dim("expert_offsets", expert_offsets, 0, num_experts + 1, "num_experts + 1");
  check.dim("x", x, 1, k, "weights.shape[2]");

  GroupedGemmProblem problem{.dtype = out.dtype,
                             .x = x.data,
                             .x_rows = x.shape[0],
                             .x_stride = stride(x, 0),
                             .weights = weights.data,
                             .weight_expert_stride = stride(weights, 0),
                             .weight_row_stride = stride(weights, 1),
                             .expert_offsets = static_cast<const std::int32_t*>(expert_offsets.data),
                             .num_experts = num_experts,
                             .num_rows = num_rows,
                             .n = n,
                             .k = k,
                             .activation = options.activation,
                             .offsets_settled = options.offsets_settled,
                             .out = out.data,
                             .out_stride = stride(out, 0)};
  if (options.x_scales) problem.x_scales = check_operand_scales(check, "x_scales", *options.x_scales, x);
  if (options.weight_scales)
    problem.weight_scales = check_operand_scales(check, "weight_scales", *options.weight_scales, weights);
  if (options.row_token) {
    check.tensor("row_token", *options.row_token, I32Type::kRows, 1);
    check.dim("row_token", *options.row_token, 0, num_rows, "num_rows");
    problem.row_token = static_cast<const std::int32_t*>(options.row_token->data);
  } else {
    check.dim("x", x, 0, num_rows, "num_rows");
  }
  if (options.activation) {
    check_activation(check, *options.activation);
    if (options.activation->gated()) {
      check.that(n % 2 == 0, "weights.shape[1]", n, "2 * inter, an even number");
      check.dim("out", out, 1, n / 2, "inter");
    } else {
      check.dim("out", out, 1, n, "inter");
    }
  } else {
    check.dim("out", out, 1, n, "weights.shape[1]");
  }
  if (options.bias) {
    check.tensor("bias", *options.bias, WeightTypes::kRows, 2);
    if (options.bias->dtype != DType::kF32) check.same_dtype("bias", *options.bias, "out", out);
    check.dim("bias", *options.bias, 0, num_experts, "num_experts");
    check.dim("bias", *options.bias, 1, n, "weights.shape[1]");
    problem.bias = options.bias->data;
    problem.bias_dtype = options.bias->dtype;
    problem.bias_stride = options.bias->strides[0];
  }
  if (options.row_weights) {
    check.tensor("row_weights", *options.row_weights, WeightTypes::kRows, 1);
    check.dim("row_weights", *options.row_weights, 0, num_rows, "num_rows");
    problem.row_weights = options.row_weights->data;
    problem.row_weight_dtype = options.row_weights->dtype;
  }
  const bool on_cuda = ctx.device.type == DeviceType::kCUDA;
  check.workspace((on_cuda ? cuda::grouped_gemm_workspace_bytes : cpu::grouped_gemm_workspace_bytes)(
      num_rows, n, k, num_experts, out.dtype, forms));
  return problem;
}

void grouped_gemm(const TensorView& x, const TensorView& weights, const TensorView& expert_offsets,
                  const TensorView& out, const GroupedGemmOptions& options, const ExecContext& ctx) {
  const GroupedGemmProblem problem =
      make_grouped_gemm_problem(Check("grouped_gemm", ctx), x, weights, expert_offsets, out, options, ctx);
  run_on_backend(cpu::grouped_gemm, cuda::grouped_gemm, problem, ctx);
}

}  // namespace moecore
