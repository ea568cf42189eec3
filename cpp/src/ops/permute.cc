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

// Checks rows that are moved, `out` of `rows` rows as x.
RowMove row_move(const Check& check, std::string_view x_arg, const TensorView& x, std::string_view out_arg,
                 const TensorView& out, std::int64_t rows, std::string_view rows_meaning) {
  check.tensor(x_arg, x, 2);
  check.tensor(out_arg, out, 2, Check::Access::kOut);
  check.same_dtype(out_arg, out, x_arg, x);
  check.dim(out_arg, out, 0, rows, rows_meaning);
  check.dim(out_arg, out, 1, x.shape[1], x_arg == "x" ? "hidden" : "scales.shape[1]");
  check.disjoint(out_arg, out, x_arg, x);
  if (x.dtype == DType::kE2M1) {
    auto even = [&](std::string_view arg, const char* part, std::int64_t n) {
      check.that(n % 2 == 0, std::string(arg) + part, n, "an even number of e2m1 elements");
    };
    even(x_arg, ".shape[1]", x.shape[1]);
    even(x_arg, ".strides[0]", x.strides[0]);
    even(out_arg, ".strides[0]", out.strides[0]);
  }
  return {.x = static_cast<const std::byte*>(x.data),
          .x_pitch = row_bytes(x.strides[0], x.dtype),
          .out = static_cast<std::byte*>(out.data),
          .out_pitch = row_bytes(out.strides[0], x.dtype),
          .row_bytes = row_bytes(x.shape[1], x.dtype)};
}

// A pair of tensors that may be absent.
struct Scales {
  const TensorView* in = nullptr;
  const TensorView* out = nullptr;
};

PermuteProblem make_problem(const Check& check, const TensorView& x, std::string_view map_arg,
                            const TensorView& map, std::string_view out_arg, const TensorView& out,
                            std::string_view out_scales_arg, Scales scales) {
  check.tensor("x", x, 2);
  check.tensor(map_arg, map, IndexTypes::kRows, 1);
  const std::string_view meaning = map_arg == "map" ? "len(map)" : "len(row_token)";
  PermuteProblem problem{row_move(check, "x", x, out_arg, out, map.shape[0], meaning)};
  if (scales.in) {
    problem.scales =
        row_move(check, "scales", *scales.in, out_scales_arg, *scales.out, map.shape[0], meaning);
    check.dim("scales", *scales.in, 0, x.shape[0], "x.shape[0]");
  }
  problem.x_rows = x.shape[0];
  problem.out_rows = out.shape[0];
  problem.map = IndexRef(map);
  return problem;
}

void run_shuffle_rows(const TensorView& x, const TensorView& map, const TensorView& out, Scales scales,
                      const ExecContext& ctx) {
  const Check check("shuffle_rows", ctx);
  const PermuteProblem problem = make_problem(check, x, "map", map, "out", out, "out_scales", scales);
  run_on_backend(cpu::permute, cuda::permute, problem, ctx);
}

void run_permute(const TensorView& x, const Plan& plan, const TensorView& rows, Scales scales,
                 const ExecContext& ctx) {
  const Check check("permute", ctx);
  check.tensor("row_token", plan.row_token, I32Type::kRows, 1);
  check.tensor("slot_row", plan.slot_row, I32Type::kRows, 2);
  check.tensor("expert_offsets", plan.expert_offsets, I32Type::kRows, 1);
  check.that(plan.expert_offsets.shape[0] >= 1, "len(expert_offsets)", plan.expert_offsets.shape[0],
             "num_experts + 1");
  PermuteProblem problem =
      make_problem(check, x, "row_token", plan.row_token, "rows", rows, "row_scales", scales);
  check.dim("slot_row", plan.slot_row, 0, x.shape[0], "num_tokens");
  check.that(plan.slot_row.is_dense(), "slot_row.strides[0]", plan.slot_row.strides[0], "a dense slot_row");
  check.dim("row_token", plan.row_token, 0, plan.slot_row.numel(), "num_tokens * top_k");
  problem.slot_row = static_cast<const std::int32_t*>(plan.slot_row.data);
  problem.top_k = plan.slot_row.shape[1];
  problem.num_rows =
      static_cast<const std::int32_t*>(plan.expert_offsets.data) + plan.expert_offsets.shape[0] - 1;
  run_on_backend(cpu::permute, cuda::permute, problem, ctx);
}

}  // namespace

void shuffle_rows(const TensorView& x, const TensorView& map, const TensorView& out, const ExecContext& ctx) {
  run_shuffle_rows(x, map, out, {}, ctx);
}

void shuffle_rows(const TensorView& x, const TensorView& scales, const TensorView& map, const TensorView& out,
                  const TensorView& out_scales, const ExecContext& ctx) {
  run_shuffle_rows(x, map, out, {&scales, &out_scales}, ctx);
}

void permute(const TensorView& x, const Plan& plan, const TensorView& rows, const ExecContext& ctx) {
  run_permute(x, plan, rows, {}, ctx);
}

void permute(const TensorView& x, const TensorView& scales, const Plan& plan, const TensorView& rows,
             const TensorView& row_scales, const ExecContext& ctx) {
  run_permute(x, plan, rows, {&scales, &row_scales}, ctx);
}

}  // namespace moecore
