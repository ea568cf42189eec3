#include "ops/finalize.h"

#include "core/check.h"
#include "moecore/finalize.h"

namespace moecore {
namespace {

// Scales [rows, C] or, column-major, [C, P >= rows]: exactly C blocks and, of outputs, exactly `rows`.
void check_scales(const Check& check, std::string_view arg, const TensorView& scales, ScaleLayout layout,
                  std::int64_t rows, std::string_view rows_meaning, std::int64_t columns,
                  Check::Access access) {
  const bool linear = layout == ScaleLayout::kLinear;
  const int row_axis = linear ? 0 : 1, block_axis = 1 - row_axis;
  check.tensor(arg, scales, F32Type::kRows, 2, access);
  check.dim(arg, scales, block_axis, (columns + kFinalizeScaleBlock - 1) / kFinalizeScaleBlock,
            "ceil(columns / 128)");
  if (linear)
    check.dim(arg, scales, row_axis, rows, rows_meaning);
  else if (scales.shape[row_axis] < rows)
    check.fail(arg, scales.describe(), "shape[1] >= " + std::to_string(rows));
}

template <class T>
BlockScales<T> block_scales(const TensorView& scales, ScaleLayout layout) {
  if (layout == ScaleLayout::kLinear) return {static_cast<T*>(scales.data), scales.strides[0], 1};
  return {static_cast<T*>(scales.data), 1, scales.strides[0]};
}

}  // namespace

void finalize(const TensorView& rows, const TensorView& slot_row, const TensorView& out,
              const FinalizeOptions& options, const ExecContext& ctx) {
  const Check check("finalize", ctx);
  check.tensor("rows", rows, FinalizeRowTypes::kRows, 2);
  check.tensor("slot_row", slot_row, IndexTypes::kRows, 2);
  check.tensor("out", out, FinalizeRowTypes::kRows, 2, Check::Access::kOut);
  if (rows.dtype != DType::kE4M3) check.same_dtype("out", out, "rows", rows);
  check.dim("out", out, 0, slot_row.shape[0], "num_tokens");
  check.that(out.shape[1] <= rows.shape[1], "out.shape[1]", out.shape[1],
             "at most rows.shape[1] = " + std::to_string(rows.shape[1]));
  check.disjoint("out", out, "rows", rows);
  FinalizeProblem problem{.rows = rows.data,
                          .dtype = rows.dtype,
                          .num_rows = rows.shape[0],
                          .rows_stride = rows.strides[0],
                          .slot_row = IndexRef(slot_row),
                          .slot_stride = slot_row.strides[0],
                          .out = out.data,
                          .out_dtype = out.dtype,
                          .out_stride = out.strides[0],
                          .num_tokens = slot_row.shape[0],
                          .top_k = slot_row.shape[1],
                          .hidden = out.shape[1]};
  if (options.weights) {
    const TensorView& weights = *options.weights;
    check.tensor("weights", weights, WeightTypes::kRows, 2);
    check.dim("weights", weights, 0, problem.num_tokens, "num_tokens");
    check.dim("weights", weights, 1, problem.top_k, "top_k");
    if (options.cast_weights && out.dtype == DType::kE4M3)
      check.fail("cast_weights", "true", "false for an e4m3 out");
    problem.weights = weights.data;
    problem.weight_dtype = weights.dtype;
    problem.weights_stride = weights.strides[0];
    problem.cast_weights = options.cast_weights;
  }
  if (options.residual) {
    const TensorView& residual = *options.residual;
    check.tensor("residual", residual, FloatTypes::kRows, 2);
    if (out.dtype != DType::kE4M3)
      check.same_dtype("residual", residual, "out", out);
    else if (residual.dtype != residual_dtype(out.dtype))
      check.fail_type("residual", residual.describe(), "dtype bf16 beside an e4m3 out");
    check.dim("residual", residual, 0, problem.num_tokens, "num_tokens");
    check.dim("residual", residual, 1, problem.hidden, "hidden");
    problem.residual = residual.data;
    problem.residual_stride = residual.strides[0];
  }
  const ScaleLayout layout = options.scale_layout;
  if (options.row_scales || options.out_scales)
    check.that(layout == ScaleLayout::kLinear || layout == ScaleLayout::kColumnMajor, "scale_layout",
               static_cast<std::int64_t>(layout), "linear or column_major");
  if (options.row_scales) {
    if (rows.dtype != DType::kE4M3) check.fail_type("rows", rows.describe(), "dtype e4m3 with row_scales");
    check_scales(check, "row_scales", *options.row_scales, layout, problem.num_rows, "num_rows",
                 rows.shape[1], Check::Access::kIn);
    problem.row_scales = block_scales<const float>(*options.row_scales, layout);
  }
  if (options.out_scales) {
    if (out.dtype != DType::kE4M3) check.fail_type("out", out.describe(), "dtype e4m3 with out_scales");
    check_scales(check, "out_scales", *options.out_scales, layout, problem.num_tokens, "num_tokens",
                 problem.hidden, Check::Access::kOut);
    problem.out_scales = block_scales<float>(*options.out_scales, layout);
    problem.padded_scale_rows = options.out_scales->shape[layout == ScaleLayout::kLinear ? 0 : 1];
  }
  run_on_backend(cpu::finalize, cuda::finalize, problem, ctx);
}

}  // namespace moecore
