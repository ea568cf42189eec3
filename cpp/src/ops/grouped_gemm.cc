#include "ops/grouped_gemm.h"

#include "core/check.h"
#include "moecore/grouped_gemm.h"
#include "ops/activate.h"
#include "ops/finalize.h"

namespace moecore {

std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, Device device) {
  return device.type == DeviceType::kCUDA ? cuda::grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype)
                                          : cpu::grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype);
}

void grouped_gemm(const TensorView& x, const TensorView& weights, const TensorView& expert_offsets,
                  const TensorView& out, const GroupedGemmOptions& options, const ExecContext& ctx) {
  const Check check("grouped_gemm", ctx);
  check.tensor("x", x, GroupedGemmTypes::kRows, 2);
  check.tensor("weights", weights, GroupedGemmTypes::kRows, 3);
  check.tensor("expert_offsets", expert_offsets, I32Type::kRows, 1);
  check.tensor("out", out, GroupedGemmTypes::kRows, 2, Check::Access::kOut);
  check.same_dtype("weights", weights, "x", x);
  check.same_dtype("out", out, "x", x);
  const std::int64_t num_experts = weights.shape[0], n = weights.shape[1], k = weights.shape[2];
  const std::int64_t num_rows = out.shape[0];
  check.dim("expert_offsets", expert_offsets, 0, num_experts + 1, "num_experts + 1");
  check.dim("x", x, 1, k, "weights.shape[2]");

  GroupedGemmProblem problem{.dtype = x.dtype,
                             .x = x.data,
                             .x_rows = x.shape[0],
                             .x_stride = x.strides[0],
                             .weights = weights.data,
                             .weight_expert_stride = weights.strides[0],
                             .weight_row_stride = weights.strides[1],
                             .expert_offsets = static_cast<const std::int32_t*>(expert_offsets.data),
                             .num_experts = num_experts,
                             .num_rows = num_rows,
                             .n = n,
                             .k = k,
                             .activation = options.activation,
                             .offsets_settled = options.offsets_settled,
                             .out = out.data,
                             .out_stride = out.strides[0]};
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
    if (options.bias->dtype != DType::kF32) check.same_dtype("bias", *options.bias, "x", x);
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
  check.workspace(grouped_gemm_workspace_bytes(num_rows, n, k, num_experts, x.dtype, ctx.device));
  run_on_backend(cpu::grouped_gemm, cuda::grouped_gemm, problem, ctx);
}

}  // namespace moecore
