// What the ops that move and weigh rows refuse.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "moecore/moecore.h"
#include "support/refusals.h"

namespace moecore::test {
namespace {

struct ShuffleRowsArgs {
  Tensor x_memory = zeros(DType::kF32, {4, 6}), map_memory = zeros(DType::kI32, {3}),
         out_memory{kCpu, DType::kF32, {3, 6}};
  TensorView x = x_memory.read_only(), map = map_memory.read_only(), out = out_memory;
  ExecContext context{};
  void call() { shuffle_rows(x, map, out, context); }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, ShuffleRows) {
  using A = ShuffleRowsArgs;
  expect_refusals<A>(
      "shuffle_rows",
      {
          {"rank of x",
           [](A& a) { a.x = flattened(a.x); },
           Error::kInvalidArgument,
           {"x is f32[4] cpu", "2 dimensions"}},
          {"type of map",
           [](A& a) { a.map = retyped(a.map, DType::kF32); },
           Error::kInvalidType,
           {"map is f32[3] cpu", "i32|i64"}},
          {"type of out",
           [](A& a) { a.out = retyped(a.out, DType::kI32); },
           Error::kInvalidType,
           {"out is i32[3,6]", "dtype of x, f32"}},
          {"rows of out",
           [](A& a) { a.out = resized(a.out, 0, 2); },
           Error::kInvalidArgument,
           {"out is f32[2,6]", "len(map) = 3"}},
          {"width of out",
           [](A& a) { a.out = resized(a.out, 1, 5); },
           Error::kInvalidArgument,
           {"out is f32[3,5]", "shape[1]", "6"}},
          {"device of x",
           [](A& a) { a.x = on_gpu(a.x); },
           Error::kInvalidArgument,
           {"x is f32[4,6] cuda:0", "a tensor on cpu"}},
          {"device of out",
           [](A& a) { a.out = on_gpu(a.out); },
           Error::kInvalidArgument,
           {"out is f32[3,6] cuda:0", "a tensor on cpu"}},
          {"read-only out",
           [](A& a) { a.out = frozen(a.out); },
           Error::kInvalidArgument,
           {"out is f32[3,6] cpu (read-only)", "writable"}},
          {"no data", [](A& a) { a.x = null(a.x); }, Error::kInvalidArgument, {"x is", "real memory"}},
          {"strided columns",
           [](A& a) { a.x = restrided(a.x, 1, 2); },
           Error::kInvalidArgument,
           {"x is", "strides [6,2]", "dense last dimension"}},
          {"overlapping rows of out",
           [](A& a) { a.out = restrided(a.out, 0, 3); },
           Error::kInvalidArgument,
           {"out is", "strides [3,1]", "do not overlap"}},
          {"broadcast out",
           [](A& a) { a.out = restrided(a.out, 0, 0); },
           Error::kInvalidArgument,
           {"out is", "do not overlap"}},
          {"out in the memory of x",
           [](A& a) { a.x = a.out; },
           Error::kInvalidArgument,
           {"out is f32[3,6] cpu in the memory of x", "memory of its own"}},
      });
}

struct Fp4ShuffleArgs : ShuffleRowsArgs {
  Fp4ShuffleArgs() {
    x = retyped(x, DType::kE2M1);
    out = retyped(out, DType::kE2M1);
  }
};

TEST(Contract, ShuffleRowsOfHalfBytes) {
  using A = Fp4ShuffleArgs;
  expect_refusals<A>("shuffle_rows", {
                                         {"odd width",
                                          [](A& a) {
                                            a.x = resized(a.x, 1, 5);
                                            a.out = resized(a.out, 1, 5);
                                          },
                                          Error::kInvalidArgument,
                                          {"x.shape[1] is 5", "even"}},
                                         {"odd pitch of x",
                                          [](A& a) { a.x = restrided(a.x, 0, 7); },
                                          Error::kInvalidArgument,
                                          {"x.strides[0] is 7", "even"}},
                                         {"odd pitch of out",
                                          [](A& a) { a.out = restrided(a.out, 0, 7); },
                                          Error::kInvalidArgument,
                                          {"out.strides[0] is 7", "even"}},
                                     });
}

struct PermuteArgs {
  Tensor x_memory = zeros(DType::kF16, {3, 8}), offsets_memory = zeros(DType::kI32, {3}),
         scales_memory = zeros(DType::kI32, {3}), row_token_memory = zeros(DType::kI32, {6}),
         slot_row_memory = zeros(DType::kI32, {3, 2}), rows_memory{kCpu, DType::kF16, {6, 8}};
  TensorView x = x_memory.read_only(), rows = rows_memory;
  Plan plan{offsets_memory, scales_memory, row_token_memory, slot_row_memory};
  void call() { permute(x, plan, rows); }
  std::vector<const Tensor*> outputs() const { return {&rows_memory}; }
};

TEST(Contract, Permute) {
  using A = PermuteArgs;
  expect_refusals<A>("permute",
                     {
                         {"type of row_token",
                          [](A& a) { a.plan.row_token = retyped(a.plan.row_token, DType::kI64); },
                          Error::kInvalidType,
                          {"row_token is i64[6]", "i32"}},
                         {"type of slot_row",
                          [](A& a) { a.plan.slot_row = retyped(a.plan.slot_row, DType::kF32); },
                          Error::kInvalidType,
                          {"slot_row is f32[3,2]", "i32"}},
                         {"tokens of slot_row",
                          [](A& a) { a.plan.slot_row = resized(a.plan.slot_row, 0, 2); },
                          Error::kInvalidArgument,
                          {"slot_row is i32[2,2]", "num_tokens = 3"}},
                         {"strided slot_row",
                          [](A& a) { a.plan.slot_row = restrided(a.plan.slot_row, 0, 3); },
                          Error::kInvalidArgument,
                          {"slot_row.strides[0] is 3", "dense"}},
                         {"rows of a different plan",
                          [](A& a) {
                            a.plan.row_token = resized(a.plan.row_token, 0, 5);
                            a.rows = resized(a.rows, 0, 5);
                          },
                          Error::kInvalidArgument,
                          {"row_token is i32[5]", "num_tokens * top_k = 6"}},
                         {"rows of the output",
                          [](A& a) { a.rows = resized(a.rows, 0, 7); },
                          Error::kInvalidArgument,
                          {"rows is f16[7,8]", "len(row_token) = 6"}},
                         {"width of the output",
                          [](A& a) { a.rows = resized(a.rows, 1, 7); },
                          Error::kInvalidArgument,
                          {"rows is f16[6,7]", "hidden = 8"}},
                         {"type of the output",
                          [](A& a) { a.rows = retyped(a.rows, DType::kBF16); },
                          Error::kInvalidType,
                          {"rows is bf16[6,8]", "dtype of x, f16"}},
                         {"empty expert_offsets",
                          [](A& a) { a.plan.expert_offsets = resized(a.plan.expert_offsets, 0, 0); },
                          Error::kInvalidArgument,
                          {"expert_offsets"}},
                     });
}

struct ActivateArgs {
  Tensor x_memory = zeros(DType::kBF16, {4, 12}), offsets_memory = zeros(DType::kI32, {3}),
         out_memory{kCpu, DType::kBF16, {4, 6}};
  TensorView x = x_memory.read_only(), out = out_memory;
  Activation activation{};
  std::optional<TensorView> offsets = offsets_memory.read_only();
  void call() { activate(x, out, activation, offsets); }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, Activate) {
  using A = ActivateArgs;
  expect_refusals<A>("activate", {
                                     {"type of x",
                                      [](A& a) { a.x = retyped(a.x, DType::kI16); },
                                      Error::kInvalidType,
                                      {"x is i16[4,12]", "f32|f16|bf16"}},
                                     {"type of out",
                                      [](A& a) { a.out = retyped(a.out, DType::kF16); },
                                      Error::kInvalidType,
                                      {"out is f16[4,6]", "dtype of x, bf16"}},
                                     {"odd width",
                                      [](A& a) { a.x = resized(a.x, 1, 11); },
                                      Error::kInvalidArgument,
                                      {"x.shape[1] is 11", "even"}},
                                     {"width of out",
                                      [](A& a) { a.out = resized(a.out, 1, 5); },
                                      Error::kInvalidArgument,
                                      {"out is bf16[4,5]", "inter = 6"}},
                                     {"width of out, plain",
                                      [](A& a) { a.activation.order = GateOrder::kPlain; },
                                      Error::kInvalidArgument,
                                      {"out is bf16[4,6]", "inter = 12"}},
                                     {"rows of out",
                                      [](A& a) { a.out = resized(a.out, 0, 3); },
                                      Error::kInvalidArgument,
                                      {"out is bf16[3,6]", "num_rows = 4"}},
                                     {"type of expert_offsets",
                                      [](A& a) { a.offsets = retyped(*a.offsets, DType::kI64); },
                                      Error::kInvalidType,
                                      {"expert_offsets is i64[3]", "i32"}},
                                     {"empty expert_offsets",
                                      [](A& a) { a.offsets = resized(*a.offsets, 0, 0); },
                                      Error::kInvalidArgument,
                                      {"expert_offsets", "num_experts + 1"}},
                                     {"limit zero",
                                      [](A& a) { a.activation.limit = 0; },
                                      Error::kInvalidArgument,
                                      {"limit is 0", "positive"}},
                                     {"limit negative",
                                      [](A& a) { a.activation.limit = -7; },
                                      Error::kInvalidArgument,
                                      {"limit is -7", "positive"}},
                                     {"limit NaN",
                                      [](A& a) { a.activation.limit = NAN; },
                                      Error::kInvalidArgument,
                                      {"limit is", "positive"}},
                                     {"alpha not finite",
                                      [](A& a) { a.activation.alpha = INFINITY; },
                                      Error::kInvalidArgument,
                                      {"alpha is inf", "finite"}},
                                     {"beta not finite",
                                      [](A& a) { a.activation.beta = NAN; },
                                      Error::kInvalidArgument,
                                      {"beta is", "finite"}},
                                 });
}

struct FinalizeArgs {
  Tensor rows_memory = zeros(DType::kBF16, {6, 8}), slots_memory = zeros(DType::kI32, {3, 2}),
         weights_memory = zeros(DType::kF32, {3, 2}), residual_memory = zeros(DType::kBF16, {3, 7}),
         out_memory{kCpu, DType::kBF16, {3, 7}};
  TensorView rows = rows_memory.read_only(), slots = slots_memory.read_only(), out = out_memory;
  FinalizeOptions options{.weights = weights_memory.read_only(), .residual = residual_memory.read_only()};
  void call() { finalize(rows, slots, out, options); }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, Finalize) {
  using A = FinalizeArgs;
  expect_refusals<A>("finalize",
                     {
                         {"type of rows",
                          [](A& a) { a.rows = retyped(a.rows, DType::kE5M2); },
                          Error::kInvalidType,
                          {"rows is e5m2[6,8]", "f32|f16|bf16|e4m3"}},
                         {"type of out",
                          [](A& a) { a.out = retyped(a.out, DType::kF16); },
                          Error::kInvalidType,
                          {"out is f16[3,7]", "dtype of rows, bf16"}},
                         {"type of slot_row",
                          [](A& a) { a.slots = retyped(a.slots, DType::kU32); },
                          Error::kInvalidType,
                          {"slot_row is u32[3,2]", "i32|i64"}},
                         {"tokens of out",
                          [](A& a) { a.out = resized(a.out, 0, 4); },
                          Error::kInvalidArgument,
                          {"out is bf16[4,7]", "num_tokens = 3"}},
                         {"out wider than rows",
                          [](A& a) { a.out = restrided(resized(a.out, 1, 9), 0, 9); },
                          Error::kInvalidArgument,
                          {"out.shape[1] is 9", "at most rows.shape[1] = 8"}},
                         {"out in the memory of rows",
                          [](A& a) { a.rows = a.out; },
                          Error::kInvalidArgument,
                          {"out is bf16[3,7] cpu in the memory of rows", "memory of its own"}},
                         {"type of weights",
                          [](A& a) { a.options.weights = retyped(*a.options.weights, DType::kI32); },
                          Error::kInvalidType,
                          {"weights is i32[3,2]", "f32|f16|bf16"}},
                         {"tokens of weights",
                          [](A& a) { a.options.weights = resized(*a.options.weights, 0, 2); },
                          Error::kInvalidArgument,
                          {"weights is f32[2,2]", "num_tokens = 3"}},
                         {"top_k of weights",
                          [](A& a) { a.options.weights = resized(*a.options.weights, 1, 1); },
                          Error::kInvalidArgument,
                          {"weights is", "top_k = 2"}},
                         {"type of residual",
                          [](A& a) { a.options.residual = retyped(*a.options.residual, DType::kF16); },
                          Error::kInvalidType,
                          {"residual is f16[3,7]", "dtype of out, bf16"}},
                         {"width of residual",
                          [](A& a) { a.options.residual = resized(*a.options.residual, 1, 6); },
                          Error::kInvalidArgument,
                          {"residual is bf16[3,6]", "hidden = 7"}},
                         {"tokens of residual",
                          [](A& a) { a.options.residual = resized(*a.options.residual, 0, 2); },
                          Error::kInvalidArgument,
                          {"residual is bf16[2,7]", "num_tokens = 3"}},
                     });
}

struct FinalizeCodesArgs {
  Tensor rows_memory{kCpu, DType::kE4M3, {6, 200}},
      slots_memory = zeros(DType::kI32, {3, 2}), weights_memory = zeros(DType::kF32, {3, 2}),
      residual_memory = zeros(DType::kBF16, {3, 130}), row_scales_memory = zeros(DType::kF32, {6, 2}),
      out_memory{kCpu, DType::kE4M3, {3, 130}}, out_scales_memory{kCpu, DType::kF32, {3, 2}};
  TensorView rows = rows_memory.read_only(), slots = slots_memory.read_only(), out = out_memory;
  FinalizeOptions options{.weights = weights_memory.read_only(),
                          .residual = residual_memory.read_only(),
                          .row_scales = row_scales_memory.read_only(),
                          .out_scales = out_scales_memory};
  void call() { finalize(rows, slots, out, options); }
  std::vector<const Tensor*> outputs() const { return {&out_memory, &out_scales_memory}; }
};

TEST(Contract, FinalizeOfCodes) {
  using A = FinalizeCodesArgs;
  expect_refusals<A>("finalize",
                     {
                         {"type of out",
                          [](A& a) { a.out = retyped(a.out, DType::kE5M2); },
                          Error::kInvalidType,
                          {"out is e5m2[3,130]", "f32|f16|bf16|e4m3"}},
                         {"cast_weights",
                          [](A& a) { a.options.cast_weights = true; },
                          Error::kInvalidArgument,
                          {"cast_weights is true", "false for an e4m3 out"}},
                         {"type of residual",
                          [](A& a) { a.options.residual = retyped(*a.options.residual, DType::kF16); },
                          Error::kInvalidType,
                          {"residual is f16[3,130]", "bf16 beside an e4m3 out"}},
                         {"row_scales of rows that have none",
                          [](A& a) { a.rows = a.residual_memory, a.out = retyped(a.out, DType::kBF16); },
                          Error::kInvalidType,
                          {"rows is bf16", "e4m3 with row_scales"}},
                         {"out_scales of an out that has none",
                          [](A& a) {
                            a.options.residual.reset();
                            a.out = retyped(a.out, DType::kBF16);
                          },
                          Error::kInvalidType,
                          {"out is bf16", "e4m3 with out_scales"}},
                         {"type of row_scales",
                          [](A& a) { a.options.row_scales = retyped(*a.options.row_scales, DType::kI32); },
                          Error::kInvalidType,
                          {"row_scales is i32[6,2]", "f32"}},
                         {"rows of row_scales",
                          [](A& a) { a.options.row_scales = resized(*a.options.row_scales, 0, 5); },
                          Error::kInvalidArgument,
                          {"row_scales is f32[5,2]", "num_rows = 6"}},
                         {"blocks of row_scales",
                          [](A& a) { a.options.row_scales = resized(*a.options.row_scales, 1, 1); },
                          Error::kInvalidArgument,
                          {"row_scales is f32[6,1]", "ceil(columns / 128) = 2"}},
                         {"blocks of out_scales",
                          [](A& a) { a.options.out_scales = resized(*a.options.out_scales, 1, 1); },
                          Error::kInvalidArgument,
                          {"out_scales is f32[3,1]", "ceil(columns / 128) = 2"}},
                         {"rows of column-major scales",
                          [](A& a) {
                            a.options.scale_layout = ScaleLayout::kColumnMajor;
                            a.options.row_scales.reset();
                            a.options.out_scales = resized(*a.options.out_scales, 0, 2);
                          },
                          Error::kInvalidArgument,
                          {"out_scales is f32[2,2]", "shape[1] >= 3"}},
                         {"read-only out_scales",
                          [](A& a) { a.options.out_scales = frozen(*a.options.out_scales); },
                          Error::kInvalidArgument,
                          {"out_scales is", "writable"}},
                         {"scale_layout",
                          [](A& a) { a.options.scale_layout = ScaleLayout::kSwizzled128x4; },
                          Error::kInvalidArgument,
                          {"scale_layout is 1", "linear or column_major"}},
                     });
}

struct TransposeArgs {
  Tensor src_memory = zeros(DType::kF16, {2, 3, 5}), dst_memory{kCpu, DType::kF16, {2, 5, 3}};
  TensorView src = src_memory.read_only(), dst = dst_memory;
  void call() { transpose_experts(src, dst); }
  std::vector<const Tensor*> outputs() const { return {&dst_memory}; }
};

TEST(Contract, TransposeExperts) {
  using A = TransposeArgs;
  expect_refusals<A>("transpose_experts", {
                                              {"type",
                                               [](A& a) { a.dst = retyped(a.dst, DType::kBF16); },
                                               Error::kInvalidType,
                                               {"dst is bf16[2,5,3]", "dtype of src, f16"}},
                                              {"half bytes",
                                               [](A& a) {
                                                 a.src = retyped(a.src, DType::kE2M1);
                                                 a.dst = retyped(a.dst, DType::kE2M1);
                                               },
                                               Error::kInvalidType,
                                               {"src is e2m1[2,3,5]", "8 to 64 bits"}},
                                              {"experts",
                                               [](A& a) { a.dst = resized(a.dst, 0, 1); },
                                               Error::kInvalidArgument,
                                               {"dst is f16[1,5,3]", "num_experts = 2"}},
                                              {"rows",
                                               [](A& a) { a.dst = resized(a.dst, 1, 4); },
                                               Error::kInvalidArgument,
                                               {"dst is f16[2,4,3]", "src.shape[2] = 5"}},
                                              {"columns",
                                               [](A& a) { a.dst = resized(a.dst, 2, 2); },
                                               Error::kInvalidArgument,
                                               {"dst is f16[2,5,2]", "src.shape[1] = 3"}},
                                              {"rank",
                                               [](A& a) { a.src.ndim = 2; },
                                               Error::kInvalidArgument,
                                               {"src is f16[2,3]", "3 dimensions"}},
                                          });
}

// With `explain` an op says what it would do, validates all the same, and runs nothing.
TEST(Contract, ExplainRunsNothing) {
  std::string text;
  ShuffleRowsArgs args;
  args.context.explain = &text;
  args.call();
  EXPECT_NE(text.find("permute"), std::string::npos) << text;
  EXPECT_TRUE(args.out_memory.untouched());
  args.out = resized(args.out, 0, 2);
  EXPECT_THROW(args.call(), InvalidArgument);
}

}  // namespace
}  // namespace moecore::test
