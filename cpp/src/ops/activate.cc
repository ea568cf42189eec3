#include "ops/activate.h"

#include <cmath>

#include "core/check.h"

namespace moecore {

void check_activation(const Check& check, const Activation& activation) {
  if (!(activation.limit > 0))
    check.fail("limit", std::to_string(activation.limit), "a positive number (infinity for no clamp)");
  if (!std::isfinite(activation.alpha))
    check.fail("alpha", std::to_string(activation.alpha), "a finite number");
  if (!std::isfinite(activation.beta)) check.fail("beta", std::to_string(activation.beta), "a finite number");
}

void activate(const TensorView& x, const TensorView& out, const Activation& activation,
              const std::optional<TensorView>& expert_offsets, const ExecContext& ctx) {
  const Check check("activate", ctx);
  check.tensor("x", x, ActivateTypes::kRows, 2);
  check.tensor("out", out, ActivateTypes::kRows, 2, Check::Access::kOut);
  check.same_dtype("out", out, "x", x);
  check.dim("out", out, 0, x.shape[0], "num_rows");
  if (activation.gated()) {
    check.that(x.shape[1] % 2 == 0, "x.shape[1]", x.shape[1], "2 * inter, an even number");
    check.dim("out", out, 1, x.shape[1] / 2, "inter");
  } else {
    check.dim("out", out, 1, x.shape[1], "inter");
  }
  check_activation(check, activation);
  ActivateProblem problem{.x = x.data,
                          .x_stride = x.strides[0],
                          .out = out.data,
                          .out_stride = out.strides[0],
                          .dtype = x.dtype,
                          .rows = x.shape[0],
                          .inter = out.shape[1],
                          .activation = activation};
  if (expert_offsets) {
    check.tensor("expert_offsets", *expert_offsets, I32Type::kRows, 1);
    check.that(expert_offsets->shape[0] >= 1, "len(expert_offsets)", expert_offsets->shape[0],
               "num_experts + 1");
    problem.num_rows = static_cast<const std::int32_t*>(expert_offsets->data) + expert_offsets->shape[0] - 1;
  }
  run_on_backend(cpu::activate, cuda::activate, problem, ctx);
}

}  // namespace moecore
