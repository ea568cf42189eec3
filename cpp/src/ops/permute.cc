#include "ops/permute.h"

#include "core/check.h"
#include "core/table.h"
#include "moecore/permute.h"

namespace moecore {
namespace {

// Bytes of n elements of a row; e2m1 packs two to the byte.
std::int64_t row_bytes(std::int64_t n, DType dtype) {
  return n * bit_width(dtype) / 8;
}

// Checks x, map and out, and fills what both entries share.
PermuteProblem make_problem(const Check& check, const TensorView& x, std::string_view map_arg,
                            const TensorView& map, std::string_view out_arg, const TensorView& out) {
  check.tensor("x", x, 2);
  check.tensor(map_arg, map, IndexTypes::kRows, 1);
  check.tensor(out_arg, out, 2, Check::Access::kOut);
  check.same_dtype(out_arg, out, "x", x);
  check.dim(out_arg, out, 0, map.shape[0], map_arg == "map" ? "len(map)" : "len(row_token)");
  check.dim(out_arg, out, 1, x.shape[1], "hidden");
  if (x.dtype == DType::kE2M1) {
    check.that(x.shape[1] % 2 == 0, "x.shape[1]", x.shape[1], "an even number of e2m1 elements");
    check.that(x.strides[0] % 2 == 0, "x.strides[0]", x.strides[0], "an even number of e2m1 elements");
    check.that(out.strides[0] % 2 == 0, "out.strides[0]", out.strides[0], "an even number of e2m1 elements");
  }
  return {.x = static_cast<const std::byte*>(x.data),
          .x_rows = x.shape[0],
          .x_pitch = row_bytes(x.strides[0], x.dtype),
          .out = static_cast<std::byte*>(out.data),
          .out_rows = out.shape[0],
          .out_pitch = row_bytes(out.strides[0], x.dtype),
          .row_bytes = row_bytes(x.shape[1], x.dtype),
          .map = IndexRef(map)};
}

}  // namespace

void shuffle_rows(const TensorView& x, const TensorView& map, const TensorView& out, const ExecContext& ctx) {
  const Check check("shuffle_rows", ctx);
  const PermuteProblem problem = make_problem(check, x, "map", map, "out", out);
  run_on_backend(cpu::permute, cuda::permute, problem, ctx);
}

void permute(const TensorView& x, const Plan& plan, const TensorView& rows, const ExecContext& ctx) {
  const Check check("permute", ctx);
  check.tensor("row_token", plan.row_token, I32Type::kRows, 1);
  check.tensor("slot_row", plan.slot_row, I32Type::kRows, 2);
  check.tensor("expert_offsets", plan.expert_offsets, I32Type::kRows, 1);
  check.that(plan.expert_offsets.shape[0] >= 1, "len(expert_offsets)", plan.expert_offsets.shape[0],
             "num_experts + 1");
  PermuteProblem problem = make_problem(check, x, "row_token", plan.row_token, "rows", rows);
  check.dim("slot_row", plan.slot_row, 0, x.shape[0], "num_tokens");
  check.that(plan.slot_row.is_dense(), "slot_row.strides[0]", plan.slot_row.strides[0], "a dense slot_row");
  check.dim("row_token", plan.row_token, 0, plan.slot_row.numel(), "num_tokens * top_k");
  problem.slot_row = static_cast<const std::int32_t*>(plan.slot_row.data);
  problem.top_k = plan.slot_row.shape[1];
  problem.num_rows =
      static_cast<const std::int32_t*>(plan.expert_offsets.data) + plan.expert_offsets.shape[0] - 1;
  run_on_backend(cpu::permute, cuda::permute, problem, ctx);
}

}  // namespace moecore
