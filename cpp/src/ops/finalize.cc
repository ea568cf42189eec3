#include "ops/finalize.h"

#include "core/check.h"
#include "moecore/finalize.h"

namespace moecore {

void finalize(const TensorView& rows, const TensorView& slot_row, const TensorView& out,
              const FinalizeOptions& options, const ExecContext& ctx) {
  const Check check("finalize", ctx);
  check.tensor("rows", rows, FinalizeTypes::kRows, 2);
  check.tensor("slot_row", slot_row, IndexTypes::kRows, 2);
  check.tensor("out", out, FinalizeTypes::kRows, 2, Check::Access::kOut);
  check.same_dtype("out", out, "rows", rows);
  check.dim("out", out, 0, slot_row.shape[0], "num_tokens");
  check.that(out.shape[1] <= rows.shape[1], "out.shape[1]", out.shape[1],
             "at most rows.shape[1] = " + std::to_string(rows.shape[1]));
  FinalizeProblem problem{.rows = rows.data,
                          .num_rows = rows.shape[0],
                          .rows_stride = rows.strides[0],
                          .slot_row = IndexRef(slot_row),
                          .slot_stride = slot_row.strides[0],
                          .out = out.data,
                          .out_stride = out.strides[0],
                          .dtype = rows.dtype,
                          .num_tokens = slot_row.shape[0],
                          .top_k = slot_row.shape[1],
                          .hidden = out.shape[1]};
  if (options.weights) {
    const TensorView& weights = *options.weights;
    check.tensor("weights", weights, WeightTypes::kRows, 2);
    check.dim("weights", weights, 0, problem.num_tokens, "num_tokens");
    check.dim("weights", weights, 1, problem.top_k, "top_k");
    problem.weights = weights.data;
    problem.weight_dtype = weights.dtype;
    problem.weights_stride = weights.strides[0];
    problem.cast_weights = options.cast_weights;
  }
  if (options.residual) {
    const TensorView& residual = *options.residual;
    check.tensor("residual", residual, FinalizeTypes::kRows, 2);
    check.same_dtype("residual", residual, "out", out);
    check.dim("residual", residual, 0, problem.num_tokens, "num_tokens");
    check.dim("residual", residual, 1, problem.hidden, "hidden");
    problem.residual = residual.data;
    problem.residual_stride = residual.strides[0];
  }
  run_on_backend(cpu::finalize, cuda::finalize, problem, ctx);
}

}  // namespace moecore
