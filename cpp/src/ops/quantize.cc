#include "ops/quantize.h"

#include <algorithm>

#include "core/check.h"
#include "ops/activate.h"

namespace moecore {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

using ByteTypes = Table<DType::kU8, DType::kE8M0, DType::kE4M3>;

std::int64_t scale_cols(const QuantFormat& format, std::int64_t cols) {
  return format.block() == 0 ? 1 : ceil_div(cols, format.block());
}

/// Codes [rows, cols]: checked, then as elements of the format.
TensorView check_data(const Check& check, const QuantFormat& format, const TensorView& data,
                      Check::Access access) {
  const DType want = format.data_dtype();
  const DType types[] = {want, DType::kU8};
  check.tensor("data", data, types, 2, access);
  const TensorView codes = as_codes(data, want);
  if (want == DType::kE2M1) {
    check.that(codes.shape[1] % 2 == 0, "data.shape[1]", codes.shape[1], "an even number of e2m1 elements");
    check.that(codes.strides[0] % 2 == 0, "data.strides[0]", codes.strides[0],
               "an even number of e2m1 elements");
  }
  return codes;
}

ExpertRowsRef check_experts(const Check& check, const ExpertRows& rows, std::int64_t num_rows,
                            ScaleLayout layout) {
  ExpertRowsRef ref;
  if (rows.row_counts) {
    check.tensor("row_counts", *rows.row_counts, I32Type::kRows, 1);
    ref.num_experts = rows.row_counts->shape[0];
    check.that(ref.num_experts > 0 && num_rows % ref.num_experts == 0, "len(row_counts)", ref.num_experts,
               "a divisor of the number of rows, " + std::to_string(num_rows));
    check.that(!rows.expert_offsets, "expert_offsets", 1, "none beside row_counts");
    ref.row_counts = static_cast<const std::int32_t*>(rows.row_counts->data);
    ref.group_rows = num_rows / ref.num_experts;
    return ref;
  }
  if (!rows.expert_offsets) return ref;
  check.tensor("expert_offsets", *rows.expert_offsets, I32Type::kRows, 1);
  check.that(rows.expert_offsets->shape[0] >= 2, "len(expert_offsets)", rows.expert_offsets->shape[0],
             "num_experts + 1");
  ref.num_experts = rows.expert_offsets->shape[0] - 1;
  ref.expert_offsets = static_cast<const std::int32_t*>(rows.expert_offsets->data);
  if (is_swizzled(layout)) {
    check.that(rows.scale_offsets.has_value(), "scale_offsets", 0,
               "i32 [num_experts + 1] for a swizzled layout");
    check.tensor("scale_offsets", *rows.scale_offsets, I32Type::kRows, 1);
    check.dim("scale_offsets", *rows.scale_offsets, 0, ref.num_experts + 1, "num_experts + 1");
    ref.scale_offsets = static_cast<const std::int32_t*>(rows.scale_offsets->data);
  }
  return ref;
}

/// The scales of `rows` rows of `cols` columns of codes.
ScaleRef check_scales(const Check& check, std::string_view arg, const QuantFormat& format,
                      const TensorView& scales, const ExpertRowsRef& experts, std::int64_t rows,
                      std::int64_t cols, Check::Access access) {
  const DType want = format.scale_dtype();
  const DType types[] = {want, want == DType::kF32 ? DType::kF32 : DType::kU8};
  check.tensor(arg, scales, types, 2, access);
  const int bytes = bit_width(want) / 8;
  ScaleRef ref{.data = static_cast<std::byte*>(scales.data),
               .layout = format.layout,
               .bytes = bytes,
               .cols = scale_cols(format, cols),
               .pitch = scales.strides[0] * bytes,
               .rows = scales.shape[0]};
  switch (format.layout) {
    case ScaleLayout::kLinear:
      check.dim(arg, scales, 0,
                format.kind == QuantKind::kFp8 && format.granularity == Granularity::kTensor ? 1 : rows,
                "num_rows");
      check.dim(arg, scales, 1, ref.cols, "blocks of a row");
      break;
    case ScaleLayout::kColumnMajor:
      ref.rows = scales.shape[1] / (bytes == 4 ? 1 : kScaleWord);
      check.dim(arg, scales, 0, bytes == 4 ? ref.cols : ref.words(),
                "blocks of a row (e8m0: a quarter of them)");
      check.that(ref.rows >= rows && scales.shape[1] % (bytes == 4 ? 1 : kScaleWord) == 0, "scales.shape[1]",
                 scales.shape[1],
                 "at least num_rows = " + std::to_string(rows) + " scales (e8m0: words of 4)");
      break;
    default: {
      check.dim(arg, scales, 1, ref.words() * kScaleWord, "blocks of a row rounded up to 4");
      check.that(scales.is_dense(), "scales.strides[0]", scales.strides[0],
                 "a dense swizzled block of scales");
      const std::int64_t multiple = scale_row_multiple(format.layout);
      if (experts.expert_offsets) {
        const std::int64_t bound = expert_scale_rows(rows, experts.num_experts);
        check.that(scales.shape[0] >= bound, "scales.shape[0]", scales.shape[0],
                   "at least expert_scale_rows(num_rows, num_experts) = " + std::to_string(bound));
      } else if (experts.row_counts) {
        check.dim(arg, scales, 0, experts.num_experts * round_up(experts.group_rows, multiple),
                  "num_experts * rows of a group, rounded up to the tile");
      } else {
        check.dim(arg, scales, 0, round_up(rows, multiple), "num_rows rounded up to the tile");
      }
    }
  }
  return ref;
}

/// Where scales of experts go is in the offsets. A wrong one leads out of the tensor, so on the CPU, where
/// they can be read, they are looked at.
void check_scale_offsets(const Check& check, const ExpertRowsRef& experts, const ScaleRef& scales) {
  if (!experts.scale_offsets || !check.reads()) return;
  const std::int64_t multiple = scale_row_multiple(scales.layout);
  std::int64_t least = 0;
  for (std::int64_t e = 0; e <= experts.num_experts; ++e) {
    const std::int64_t begin = experts.scale_offsets[e];
    if (begin < least || begin > scales.rows || begin % multiple != 0)
      check.fail("scale_offsets[" + std::to_string(e) + "]", std::to_string(begin),
                 "a multiple of " + std::to_string(multiple) + " from " + std::to_string(least) +
                     " to scales.shape[0] = " + std::to_string(scales.rows) +
                     ", as plan() gives with a scale_alignment of 128");
    if (e < experts.num_experts)
      least = begin + std::max<std::int64_t>(
                          0, std::int64_t{experts.expert_offsets[e + 1]} - experts.expert_offsets[e]);
  }
}

const float* check_global_scale(const Check& check, const QuantFormat& format,
                                const std::optional<TensorView>& scale, const ExpertRowsRef& experts,
                                bool& per_expert) {
  if (!scale) return nullptr;
  check.that(format.kind == QuantKind::kNvfp4, "global_scale", 1, "none (it belongs to nvfp4)");
  check.tensor("global_scale", *scale, F32Type::kRows, 1);
  const std::int64_t n = scale->shape[0];
  check.that(n == 1 || (n > 0 && n == experts.num_experts), "len(global_scale)", n, "1 or num_experts");
  per_expert = n > 1;
  return static_cast<const float*>(scale->data);
}

/// What quantize and its fused forms share. `cols` are the columns that reach the codes.
QuantizeProblem make_problem(const Check& check, const TensorView& x, std::int64_t cols,
                             const TensorView& data, const TensorView& scales, const QuantFormat& format,
                             const ExpertRows& rows, const std::optional<TensorView>& global_scale) {
  check_format(check, format);
  const TensorView codes = check_data(check, format, data, Check::Access::kOut);
  check.that(codes.shape[1] >= cols, "data.shape[1]", codes.shape[1],
             "at least the " + std::to_string(cols) + " columns to quantise");
  QuantizeProblem p{.format = format,
                    .x = x.data,
                    .dtype = x.dtype,
                    .x_stride = x.strides[0],
                    .rows = x.shape[0],
                    .cols = cols,
                    .data = static_cast<std::uint8_t*>(codes.data),
                    .data_pitch = codes.strides[0] * bit_width(codes.dtype) / 8,
                    .out_rows = codes.shape[0],
                    .padded_cols = codes.shape[1]};
  p.experts = check_experts(check, rows, p.out_rows, format.layout);
  p.scales = check_scales(check, "scales", format, scales, p.experts, p.out_rows, p.padded_cols,
                          format.static_scale ? Check::Access::kIn : Check::Access::kOut);
  check_scale_offsets(check, p.experts, p.scales);
  p.global_scale = check_global_scale(check, format, global_scale, p.experts, p.global_scale_per_expert);
  return p;
}

}  // namespace

void check_format(const Check& check, const QuantFormat& f) {
  const bool block128 = f.kind == QuantKind::kFp8 && f.granularity == Granularity::kBlock128;
  if (f.kind == QuantKind::kFp8) {
    if (!(f.amax_floor >= 1e-30f && f.amax_floor <= f.amax_cap))
      check.fail("amax_floor", std::to_string(f.amax_floor), "1e-30 to amax_cap");
    if (!(f.amax_cap <= std::numeric_limits<float>::max()))
      check.fail("amax_cap", std::to_string(f.amax_cap), "a finite number");
    if (is_swizzled(f.layout)) check.fail("layout", "swizzled", "linear or column_major for fp8");
  }
  if (f.static_scale && (f.kind != QuantKind::kFp8 || f.granularity != Granularity::kTensor))
    check.fail("static_scale", "set", "fp8 with granularity tensor");
  if ((f.power_of_two || f.e8m0_scales) && !block128)
    check.fail("power_of_two", "set", "fp8 with granularity block128");
  if (f.layout == ScaleLayout::kColumnMajor && !block128)
    check.fail("layout", "column_major", "linear or swizzled (column_major is for fp8 block128)");
}

std::int64_t QuantFormat::block() const {
  switch (kind) {
    case QuantKind::kFp8:
      return granularity == Granularity::kBlock128 ? 128 : 0;
    case QuantKind::kNvfp4:
      return 16;
    default:
      return 32;
  }
}

DType QuantFormat::data_dtype() const {
  return kind == QuantKind::kFp8 || kind == QuantKind::kMxfp8 ? DType::kE4M3 : DType::kE2M1;
}

DType QuantFormat::scale_dtype() const {
  if (kind == QuantKind::kFp8) return e8m0_scales ? DType::kE8M0 : DType::kF32;
  return kind == QuantKind::kNvfp4 ? DType::kE4M3 : DType::kE8M0;
}

std::array<std::int64_t, 2> scale_shape(const QuantFormat& format, std::int64_t rows, std::int64_t cols) {
  const std::int64_t c = scale_cols(format, cols);
  if (format.kind == QuantKind::kFp8 && format.granularity == Granularity::kTensor) return {1, 1};
  switch (format.layout) {
    case ScaleLayout::kLinear:
      return {rows, c};
    case ScaleLayout::kColumnMajor:
      return format.e8m0_scales ? std::array{ceil_div(c, kScaleWord), kScaleWord * round_up(rows, 4)}
                                : std::array{c, round_up(rows, 4)};
    default:
      return {round_up(rows, scale_row_multiple(format.layout)), round_up(c, kScaleWord)};
  }
}

std::int64_t expert_scale_rows(std::int64_t rows, std::int64_t num_experts) {
  return (rows + 127 * std::min(rows, num_experts)) / 128 * 128;
}

std::int64_t scale_offset(ScaleLayout layout, std::int64_t row, std::int64_t col, std::int64_t rows,
                          std::int64_t cols) {
  return scale_byte(
      {.layout = layout, .cols = cols, .pitch = layout == ScaleLayout::kLinear ? cols : 4 * rows}, 0, row,
      col);
}

QuantizeProblem make_quantize_problem(const Check& check, const TensorView& x, const TensorView& data,
                                      const TensorView& scales, const QuantFormat& format,
                                      const QuantizeOptions& options) {
  check.tensor("x", x, QuantizeTypes::kRows, 2);
  const QuantizeProblem problem =
      make_problem(check, x, x.shape[1], data, scales, format, options.rows, options.global_scale);
  check.dim("data", data, 0, x.shape[0], "num_rows");
  return problem;
}

void quantize(const TensorView& x, const TensorView& data, const TensorView& scales,
              const QuantFormat& format, const QuantizeOptions& options, const ExecContext& ctx) {
  const QuantizeProblem problem =
      make_quantize_problem(Check("quantize", ctx), x, data, scales, format, options);
  run_on_backend(cpu::quantize, cuda::quantize, problem, ctx);
}

void activate_quantize(const TensorView& x, const Activation& activation, const TensorView& data,
                       const TensorView& scales, const QuantFormat& format, const QuantizeOptions& options,
                       const ExecContext& ctx) {
  const Check check("activate_quantize", ctx);
  check.tensor("x", x, QuantizeTypes::kRows, 2);
  check_activation(check, activation);
  if (activation.gated())
    check.that(x.shape[1] % 2 == 0, "x.shape[1]", x.shape[1], "2 * inter, an even number");
  const std::int64_t inter = activation.gated() ? x.shape[1] / 2 : x.shape[1];
  QuantizeProblem problem =
      make_problem(check, x, inter, data, scales, format, options.rows, options.global_scale);
  check.dim("data", data, 0, x.shape[0], "num_rows");
  problem.activation = activation;
  run_on_backend(cpu::quantize, cuda::quantize, problem, ctx);
}

void permute_quantize(const TensorView& x, const Plan& plan, const TensorView& data, const TensorView& scales,
                      const QuantFormat& format, const QuantizeOptions& options, const ExecContext& ctx) {
  const Check check("permute_quantize", ctx);
  check.tensor("x", x, QuantizeTypes::kRows, 2);
  check.tensor("row_token", plan.row_token, I32Type::kRows, 1);
  check.tensor("slot_row", plan.slot_row, I32Type::kRows, 2);
  check.dim("slot_row", plan.slot_row, 0, x.shape[0], "num_tokens");
  check.that(plan.slot_row.is_dense(), "slot_row.strides[0]", plan.slot_row.strides[0], "a dense slot_row");
  check.dim("row_token", plan.row_token, 0, plan.slot_row.numel(), "num_tokens * top_k");
  if (has_dynamic_tensor_scale(format))
    check.fail("format", "fp8 with a dynamic tensor scale",
               "a format whose scale is known before all rows are read");
  QuantizeProblem problem =
      make_problem(check, x, x.shape[1], data, scales, format,
                   ExpertRows{.expert_offsets = plan.expert_offsets, .scale_offsets = plan.scale_offsets},
                   options.global_scale);
  check.dim("data", data, 0, plan.row_token.shape[0], "num_tokens * top_k");
  problem.row_token = static_cast<const std::int32_t*>(plan.row_token.data);
  problem.slot_row = static_cast<const std::int32_t*>(plan.slot_row.data);
  problem.top_k = plan.slot_row.shape[1];
  run_on_backend(cpu::quantize, cuda::quantize, problem, ctx);
}

void dequantize(const TensorView& data, const TensorView& scales, const TensorView& out,
                const QuantFormat& format, const QuantizeOptions& options, const ExecContext& ctx) {
  const Check check("dequantize", ctx);
  check_format(check, format);
  const TensorView codes = check_data(check, format, data, Check::Access::kIn);
  check.tensor("out", out, QuantizeTypes::kRows, 2, Check::Access::kOut);
  check.dim("out", out, 0, codes.shape[0], "num_rows");
  check.that(out.shape[1] <= codes.shape[1], "out.shape[1]", out.shape[1],
             "at most the " + std::to_string(codes.shape[1]) + " columns of data");
  DequantizeProblem p{.format = format,
                      .data = static_cast<const std::uint8_t*>(codes.data),
                      .data_pitch = codes.strides[0] * bit_width(codes.dtype) / 8,
                      .out = out.data,
                      .dtype = out.dtype,
                      .out_stride = out.strides[0],
                      .rows = out.shape[0],
                      .cols = out.shape[1]};
  p.experts = check_experts(check, options.rows, p.rows, format.layout);
  p.scales =
      check_scales(check, "scales", format, scales, p.experts, p.rows, codes.shape[1], Check::Access::kIn);
  p.global_scale =
      check_global_scale(check, format, options.global_scale, p.experts, p.global_scale_per_expert);
  run_on_backend(cpu::dequantize, cuda::dequantize, p, ctx);
}

void global_scale(const TensorView& x, const TensorView& out, const ExpertRows& rows,
                  const ExecContext& ctx) {
  const Check check("global_scale", ctx);
  check.tensor("x", x, QuantizeTypes::kRows, 2);
  check.tensor("out", out, F32Type::kRows, 1, Check::Access::kOut);
  GlobalScaleProblem p{.x = x.data,
                       .dtype = x.dtype,
                       .x_stride = x.strides[0],
                       .rows = x.shape[0],
                       .cols = x.shape[1],
                       .experts = check_experts(check, rows, x.shape[0], ScaleLayout::kLinear),
                       .out = static_cast<float*>(out.data)};
  check.that(out.shape[0] == 1 || (out.shape[0] > 0 && out.shape[0] == p.experts.num_experts), "len(out)",
             out.shape[0], "1 or num_experts");
  p.per_expert = out.shape[0] > 1;
  run_on_backend(cpu::global_scale, cuda::global_scale, p, ctx);
}

void convert_scales(const TensorView& src, ScaleLayout src_layout, const TensorView& dst,
                    ScaleLayout dst_layout, std::int64_t rows, std::int64_t cols, const ExecContext& ctx) {
  const Check check("convert_scales", ctx);
  check.that(rows >= 0, "rows", rows, "a count");
  check.that(cols >= 0, "cols", cols, "a count");
  auto check_side = [&](std::string_view arg, const TensorView& t, ScaleLayout layout, Check::Access access) {
    check.tensor(arg, t, ByteTypes::kRows, 2, access);
    ScaleRef ref{.data = static_cast<std::byte*>(t.data),
                 .layout = layout,
                 .bytes = 1,
                 .cols = cols,
                 .pitch = t.strides[0],
                 .rows = t.shape[0]};
    if (layout == ScaleLayout::kLinear) {
      check.dim(arg, t, 0, rows, "rows");
      check.dim(arg, t, 1, cols, "cols");
    } else if (layout == ScaleLayout::kColumnMajor) {
      check.dim(arg, t, 0, ref.words(), "cols / 4 rounded up");
      check.that(t.shape[1] % kScaleWord == 0 && t.shape[1] >= kScaleWord * rows, "shape[1]", t.shape[1],
                 "4 * rows or more, in words of 4");
      ref.rows = t.shape[1] / kScaleWord;
    } else {
      check.dim(arg, t, 0, round_up(rows, scale_row_multiple(layout)), "rows rounded up to the tile");
      check.dim(arg, t, 1, round_up(cols, kScaleWord), "cols rounded up to 4");
      check.that(t.is_dense(), "strides[0]", t.strides[0], "a dense swizzled block of scales");
    }
    return ref;
  };
  const ConvertScalesProblem problem{.src = check_side("src", src, src_layout, Check::Access::kIn),
                                     .dst = check_side("dst", dst, dst_layout, Check::Access::kOut),
                                     .rows = rows};
  run_on_backend(cpu::convert_scales, cuda::convert_scales, problem, ctx);
}

}  // namespace moecore
