// The contract layer: every bad argument is refused with the promised exception, a message that names op,
// argument, value and expectation, and outputs left as they were. One table per op; each row spoils one thing
// of a good call.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <typeinfo>
#include <vector>

#include "moecore/moecore.h"
#include "support/fixture.h"

namespace moecore::test {
namespace {

constexpr Device kCpu{};

enum class Error { kInvalidArgument, kInvalidType, kBackend };

// A row of a table: how to spoil the good call, what must come, and what the message must contain.
template <class Args>
struct Bad {
  const char* claim;
  std::function<void(Args&)> spoil;
  Error error;
  std::vector<std::string> fragments;
};

template <class Args>
void expect_refusals(const std::string& op, const std::vector<Bad<Args>>& table) {
  {
    Args good;
    ASSERT_NO_THROW(good.call()) << "the good call that the table spoils";
  }
  for (const Bad<Args>& bad : table) {
    SCOPED_TRACE(op + ": " + bad.claim);
    Args args;
    bad.spoil(args);
    std::string message;
    try {
      args.call();
      ADD_FAILURE() << "was accepted";
      continue;
    } catch (const InvalidType& e) {
      EXPECT_EQ(bad.error, Error::kInvalidType);
      message = e.what();
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(bad.error, Error::kInvalidArgument);
      message = e.what();
    } catch (const BackendError& e) {
      EXPECT_EQ(bad.error, Error::kBackend);
      message = e.what();
    }
    EXPECT_EQ(message.rfind(op + ": ", 0), 0u) << message;
    for (const std::string& fragment : bad.fragments)
      EXPECT_NE(message.find(fragment), std::string::npos) << "\"" << fragment << "\" is not in: " << message;
    for (const Tensor* out : args.outputs()) EXPECT_TRUE(out->untouched());
  }
}

Tensor zeros(DType dtype, std::vector<std::int64_t> shape) {
  return {kCpu, dtype, Array(std::move(shape))};
}

// Ways to spoil a view.
TensorView retyped(TensorView v, DType dtype) {
  v.dtype = dtype;
  return v;
}
TensorView resized(TensorView v, int axis, std::int64_t n) {
  v.shape[axis] = n;
  return v;
}
TensorView flattened(TensorView v) {
  v.ndim = 1;
  return v;
}
TensorView on_gpu(TensorView v) {
  v.device = {DeviceType::kCUDA, 0};
  return v;
}
TensorView null(TensorView v) {
  v.data = nullptr;
  return v;
}
TensorView frozen(TensorView v) {
  v.read_only = true;
  return v;
}
TensorView restrided(TensorView v, int axis, std::int64_t stride) {
  v.strides[axis] = stride;
  return v;
}

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

struct PlanArgs {
  Tensor ids_memory = zeros(DType::kI32, {5, 2}), map_memory = zeros(DType::kI32, {9}),
         offsets{kCpu, DType::kI32, {5}}, scales{kCpu, DType::kI32, {5}}, row_token{kCpu, DType::kI32, {10}},
         slot_row{kCpu, DType::kI32, {5, 2}}, row_route{kCpu, DType::kI32, {10}},
         sizes1{kCpu, DType::kI32, {4, 3}}, sizes2{kCpu, DType::kI32, {4, 3}};
  TensorView ids = ids_memory.read_only();
  Plan out{offsets, scales, row_token, slot_row, row_route, sizes1, sizes2};
  PlanOptions options{.num_experts = 4, .expert_map = map_memory.read_only()};
  Call context{kCpu, plan_workspace_bytes(5, 2, 4, kCpu)};
  void call() { plan(ids, out, options, context); }
  std::vector<const Tensor*> outputs() const {
    return {&offsets, &scales, &row_token, &slot_row, &row_route, &sizes1, &sizes2};
  }
};

TEST(Contract, Plan) {
  using A = PlanArgs;
  expect_refusals<A>("plan",
                     {
                         {"type of ids",
                          [](A& a) { a.ids = retyped(a.ids, DType::kF32); },
                          Error::kInvalidType,
                          {"ids is f32[5,2]", "i32|i64"}},
                         {"rank of ids",
                          [](A& a) { a.ids = flattened(a.ids); },
                          Error::kInvalidArgument,
                          {"ids is i32[5]", "2 dimensions"}},
                         {"no experts",
                          [](A& a) { a.options.num_experts = 0; },
                          Error::kInvalidArgument,
                          {"num_experts is 0", "1 to 2048"}},
                         {"too many experts",
                          [](A& a) { a.options.num_experts = 2049; },
                          Error::kInvalidArgument,
                          {"num_experts is 2049", "1 to 2048"}},
                         {"too many routes",
                          [](A& a) { a.ids = resized(a.ids, 0, std::int64_t{1} << 30); },
                          Error::kInvalidArgument,
                          {"num_tokens * top_k is 2147483648", "2^31"}},
                         {"length of expert_offsets",
                          [](A& a) { a.out.expert_offsets = resized(a.offsets, 0, 4); },
                          Error::kInvalidArgument,
                          {"expert_offsets is i32[4]", "num_experts + 1 = 5"}},
                         {"length of scale_offsets",
                          [](A& a) { a.out.scale_offsets = resized(a.scales, 0, 4); },
                          Error::kInvalidArgument,
                          {"scale_offsets is i32[4]", "num_experts + 1 = 5"}},
                         {"length of row_token",
                          [](A& a) { a.out.row_token = resized(a.row_token, 0, 9); },
                          Error::kInvalidArgument,
                          {"row_token is i32[9]", "num_tokens * top_k = 10"}},
                         {"rows of slot_row",
                          [](A& a) { a.out.slot_row = resized(a.slot_row, 0, 4); },
                          Error::kInvalidArgument,
                          {"slot_row is i32[4,2]", "num_tokens = 5"}},
                         {"columns of slot_row",
                          [](A& a) { a.out.slot_row = restrided(resized(a.slot_row, 1, 1), 0, 1); },
                          Error::kInvalidArgument,
                          {"slot_row is", "top_k = 2"}},
                         {"type of row_token",
                          [](A& a) { a.out.row_token = retyped(a.row_token, DType::kI64); },
                          Error::kInvalidType,
                          {"row_token is i64[10]", "i32"}},
                         {"length of row_route",
                          [](A& a) { a.out.row_route = resized(a.row_route, 0, 9); },
                          Error::kInvalidArgument,
                          {"row_route is i32[9]", "10"}},
                         {"shape of problem_sizes1",
                          [](A& a) { a.out.problem_sizes1 = restrided(resized(a.sizes1, 1, 2), 0, 2); },
                          Error::kInvalidArgument,
                          {"problem_sizes1 is i32[4,2]"}},
                         {"shape of problem_sizes2",
                          [](A& a) { a.out.problem_sizes2 = resized(a.sizes2, 0, 3); },
                          Error::kInvalidArgument,
                          {"problem_sizes2 is i32[3,3]", "num_experts = 4"}},
                         {"type of expert_map",
                          [](A& a) { a.options.expert_map = retyped(a.map_memory.read_only(), DType::kI64); },
                          Error::kInvalidType,
                          {"expert_map is i64[9]", "i32"}},
                         {"strided slot_row",
                          [](A& a) { a.out.slot_row = restrided(a.slot_row, 0, 3); },
                          Error::kInvalidArgument,
                          {"slot_row is i32[5,2] cpu strides [3,1]", "dense"}},
                         {"read-only output",
                          [](A& a) { a.out.row_token = frozen(a.row_token); },
                          Error::kInvalidArgument,
                          {"row_token is", "writable"}},
                         {"device",
                          [](A& a) { a.ids = on_gpu(a.ids); },
                          Error::kInvalidArgument,
                          {"ids is i32[5,2] cuda:0", "cpu"}},
                     });
}

struct RouteArgs {
  Tensor logits_memory = zeros(DType::kBF16, {3, 8}), bias_memory = zeros(DType::kF32, {8}),
         padding_memory = zeros(DType::kU8, {3}), weights_memory{kCpu, DType::kF32, {3, 2}},
         ids_memory{kCpu, DType::kI32, {3, 2}};
  TensorView logits = logits_memory.read_only(), weights = weights_memory, ids = ids_memory;
  RouteOptions options{.bias = bias_memory.read_only(),
                       .num_groups = 4,
                       .topk_groups = 2,
                       .is_padding = padding_memory.read_only()};
  void call() { route(logits, weights, ids, options); }
  std::vector<const Tensor*> outputs() const { return {&weights_memory, &ids_memory}; }
};

TEST(Contract, Route) {
  using A = RouteArgs;
  expect_refusals<A>(
      "route",
      {
          {"type of logits",
           [](A& a) { a.logits = retyped(a.logits, DType::kI16); },
           Error::kInvalidType,
           {"logits is i16[3,8]", "f32|f16|bf16"}},
          {"type of weights",
           [](A& a) { a.weights = retyped(a.weights, DType::kI32); },
           Error::kInvalidType,
           {"weights is i32[3,2]", "f32"}},
          {"type of ids",
           [](A& a) { a.ids = retyped(a.ids, DType::kU32); },
           Error::kInvalidType,
           {"ids is u32[3,2]", "i32"}},
          {"tokens of ids",
           [](A& a) { a.ids = resized(a.ids, 0, 2); },
           Error::kInvalidArgument,
           {"ids is i32[2,2]", "num_tokens = 3"}},
          {"tokens of weights",
           [](A& a) { a.weights = resized(a.weights, 0, 2); },
           Error::kInvalidArgument,
           {"weights is f32[2,2]", "num_tokens = 3"}},
          {"top_k of weights",
           [](A& a) { a.weights = resized(a.weights, 1, 1); },
           Error::kInvalidArgument,
           {"weights is", "top_k = 2"}},
          {"too many experts",
           [](A& a) { a.logits = restrided(resized(a.logits, 1, 2049), 0, 2049); },
           Error::kInvalidArgument,
           {"num_experts is 2049", "2048"}},
          {"no experts",
           [](A& a) { a.logits = resized(a.logits, 1, 0); },
           Error::kInvalidArgument,
           {"num_experts is 0"}},
          {"top_k beyond the groups",
           [](A& a) {
             a.options.topk_groups = 1;
             a.ids = restrided(resized(a.ids, 1, 3), 0, 3);
             a.weights = restrided(resized(a.weights, 1, 3), 0, 3);
           },
           Error::kInvalidArgument,
           {"top_k is 3", "topk_groups"}},
          {"top_k beyond the experts",
           [](A& a) {
             a.ids = restrided(resized(a.ids, 1, 9), 0, 9);
             a.weights = restrided(resized(a.weights, 1, 9), 0, 9);
           },
           Error::kInvalidArgument,
           {"top_k is 9", "num_experts = 8"}},
          {"no top_k",
           [](A& a) {
             a.ids = resized(a.ids, 1, 0);
             a.weights = resized(a.weights, 1, 0);
           },
           Error::kInvalidArgument,
           {"top_k is 0"}},
          {"groups that do not divide",
           [](A& a) { a.options.num_groups = 3; },
           Error::kInvalidArgument,
           {"num_groups is 3", "divisor", "8"}},
          {"no groups", [](A& a) { a.options.num_groups = 0; }, Error::kInvalidArgument, {"num_groups is 0"}},
          {"too many chosen groups",
           [](A& a) { a.options.topk_groups = 5; },
           Error::kInvalidArgument,
           {"topk_groups is 5", "num_groups = 4"}},
          {"no chosen group",
           [](A& a) { a.options.topk_groups = 0; },
           Error::kInvalidArgument,
           {"topk_groups is 0"}},
          {"length of bias",
           [](A& a) { a.options.bias = resized(a.bias_memory, 0, 7); },
           Error::kInvalidArgument,
           {"bias is f32[7]", "num_experts = 8"}},
          {"type of bias",
           [](A& a) { a.options.bias = retyped(a.bias_memory, DType::kBF16); },
           Error::kInvalidType,
           {"bias is bf16[8]", "f32"}},
          {"length of is_padding",
           [](A& a) { a.options.is_padding = resized(a.padding_memory, 0, 2); },
           Error::kInvalidArgument,
           {"is_padding is u8[2]", "num_tokens = 3"}},
          {"type of is_padding",
           [](A& a) { a.options.is_padding = retyped(a.padding_memory, DType::kI8); },
           Error::kInvalidType,
           {"is_padding is i8[3]", "bool|u8"}},
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

struct GroupedGemmArgs {
  Tensor x_memory = zeros(DType::kF32, {5, 8}), weights_memory = zeros(DType::kF32, {3, 4, 8}),
         offsets_memory = zeros(DType::kI32, {4}), bias_memory = zeros(DType::kF32, {3, 4}),
         row_token_memory = zeros(DType::kI32, {5}), row_weights_memory = zeros(DType::kF32, {5}),
         out_memory{kCpu, DType::kF32, {5, 4}};
  TensorView x = x_memory.read_only(), weights = weights_memory.read_only(),
             offsets = offsets_memory.read_only(), out = out_memory;
  GroupedGemmOptions options{.bias = bias_memory.read_only(),
                             .row_token = row_token_memory.read_only(),
                             .row_weights = row_weights_memory.read_only()};
  Call context{kCpu, grouped_gemm_workspace_bytes(5, 4, 8, 3, DType::kF32, kCpu)};
  void call() { grouped_gemm(x, weights, offsets, out, options, context); }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, GroupedGemm) {
  using A = GroupedGemmArgs;
  expect_refusals<A>(
      "grouped_gemm",
      {
          {"type of x",
           [](A& a) { a.x = retyped(a.x, DType::kI32); },
           Error::kInvalidType,
           {"x is i32[5,8]", "f32|f16|bf16"}},
          {"type of weights",
           [](A& a) { a.weights = retyped(a.weights, DType::kBF16); },
           Error::kInvalidType,
           {"weights is bf16[3,4,8]", "dtype of x, f32"}},
          {"type of out",
           [](A& a) { a.out = retyped(a.out, DType::kF16); },
           Error::kInvalidType,
           {"out is f16[5,4]", "dtype of x, f32"}},
          {"rank of weights",
           [](A& a) { a.weights.ndim = 2; },
           Error::kInvalidArgument,
           {"weights is f32[3,4]", "3 dimensions"}},
          {"length of expert_offsets",
           [](A& a) { a.offsets = resized(a.offsets, 0, 3); },
           Error::kInvalidArgument,
           {"expert_offsets is i32[3]", "num_experts + 1 = 4"}},
          {"type of expert_offsets",
           [](A& a) { a.offsets = retyped(a.offsets, DType::kI64); },
           Error::kInvalidType,
           {"expert_offsets is i64[4]", "i32"}},
          {"depth",
           [](A& a) { a.x = resized(a.x, 1, 7); },
           Error::kInvalidArgument,
           {"x is f32[5,7]", "weights.shape[2] = 8"}},
          {"width of out",
           [](A& a) { a.out = resized(a.out, 1, 3); },
           Error::kInvalidArgument,
           {"out is f32[5,3]", "weights.shape[1] = 4"}},
          {"width of out with a gate",
           [](A& a) { a.options.activation = Activation{}; },
           Error::kInvalidArgument,
           {"out is f32[5,4]", "inter = 2"}},
          {"rows of x without a gather",
           [](A& a) {
             a.options.row_token.reset();
             a.x = resized(a.x, 0, 4);
           },
           Error::kInvalidArgument,
           {"x is f32[4,8]", "num_rows = 5"}},
          {"length of row_token",
           [](A& a) { a.options.row_token = resized(*a.options.row_token, 0, 4); },
           Error::kInvalidArgument,
           {"row_token is i32[4]", "num_rows = 5"}},
          {"type of row_token",
           [](A& a) { a.options.row_token = retyped(*a.options.row_token, DType::kI64); },
           Error::kInvalidType,
           {"row_token is i64[5]", "i32"}},
          {"type of bias",
           [](A& a) { a.options.bias = retyped(*a.options.bias, DType::kBF16); },
           Error::kInvalidType,
           {"bias is bf16[3,4]", "f32"}},
          {"experts of bias",
           [](A& a) { a.options.bias = resized(*a.options.bias, 0, 2); },
           Error::kInvalidArgument,
           {"bias is f32[2,4]", "num_experts = 3"}},
          {"width of bias",
           [](A& a) { a.options.bias = resized(*a.options.bias, 1, 3); },
           Error::kInvalidArgument,
           {"bias is f32[3,3]", "weights.shape[1] = 4"}},
          {"length of row_weights",
           [](A& a) { a.options.row_weights = resized(*a.options.row_weights, 0, 6); },
           Error::kInvalidArgument,
           {"row_weights is f32[6]", "num_rows = 5"}},
          {"strided depth of weights",
           [](A& a) { a.weights = restrided(a.weights, 2, 2); },
           Error::kInvalidArgument,
           {"weights is", "dense last dimension"}},
          {"activation parameters",
           [](A& a) { a.options.activation = Activation{.order = GateOrder::kPlain, .limit = -1}; },
           Error::kInvalidArgument,
           {"limit is -1", "positive"}},
          {"read-only out",
           [](A& a) { a.out = frozen(a.out); },
           Error::kInvalidArgument,
           {"out is", "writable"}},
      });
}

// x mxfp8 [5,64] times nvfp4 [3,4,64].
struct QuantizedGemmArgs {
  Tensor x_memory = zeros(DType::kU8, {5, 64}), x_scales_memory = zeros(DType::kU8, {5, 2}),
         weights_memory = zeros(DType::kU8, {3, 4, 32}), weight_scales_memory = zeros(DType::kU8, {3, 4, 4}),
         global_memory = zeros(DType::kF32, {3}), offsets_memory = zeros(DType::kI32, {4}),
         out_memory{kCpu, DType::kF32, {5, 4}};
  TensorView x = x_memory.read_only(), weights = weights_memory.read_only(),
             offsets = offsets_memory.read_only(), out = out_memory;
  OperandScales x_scales{QuantFormat::mxfp8(ScaleLayout::kLinear), x_scales_memory.read_only()},
      weight_scales{QuantFormat::nvfp4(ScaleLayout::kLinear), weight_scales_memory.read_only(),
                    global_memory.read_only()};
  bool coded_x = true, coded_weights = true;
  Call context{kCpu, 4096};
  void call() {
    GroupedGemmOptions options;
    if (coded_x) options.x_scales = x_scales;
    if (coded_weights) options.weight_scales = weight_scales;
    grouped_gemm(x, weights, offsets, out, options, context);
  }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, QuantizedGroupedGemm) {
  using A = QuantizedGemmArgs;
  expect_refusals<A>(
      "grouped_gemm",
      {
          {"codes without a format",
           [](A& a) { a.coded_x = false; },
           Error::kInvalidType,
           {"x is u8[5,64]", "f32|f16|bf16"}},
          {"a pair that cannot be multiplied",
           [](A& a) { a.weight_scales.format = QuantFormat::fp8_token(); },
           Error::kInvalidArgument,
           {"mxfp8 x fp8_token", "one of", "f32|f16|bf16 x mxfp4", "fp8_block128 x fp8_block128"}},
          {"quantised x with float weights",
           [](A& a) { a.coded_weights = false; },
           Error::kInvalidArgument,
           {"mxfp8 x f32|f16|bf16", "one of"}},
          {"type of the codes",
           [](A& a) { a.x = retyped(a.x, DType::kE5M2); },
           Error::kInvalidType,
           {"x is e5m2[5,64]", "e4m3|u8"}},
          {"type of the scales",
           [](A& a) { a.weight_scales.scales = retyped(a.weight_scales.scales, DType::kE8M0); },
           Error::kInvalidType,
           {"weight_scales is e8m0[3,4,4]", "e4m3|u8"}},
          {"rows of the scales",
           [](A& a) { a.x_scales.scales = resized(a.x_scales.scales, 0, 4); },
           Error::kInvalidArgument,
           {"x_scales is u8[4,2]", "= 5"}},
          {"blocks of the scales",
           [](A& a) { a.weight_scales.scales = resized(a.weight_scales.scales, 2, 2); },
           Error::kInvalidArgument,
           {"weight_scales is u8[3,4,2]", "= 4"}},
          {"swizzled scales",
           [](A& a) { a.weight_scales.format = QuantFormat::nvfp4(); },
           Error::kInvalidArgument,
           {"weight_scales.layout is swizzled", "linear"}},
          {"column-major scales of a format that has none",
           [](A& a) { a.x_scales.format.layout = ScaleLayout::kColumnMajor; },
           Error::kInvalidArgument,
           {"x_scales.layout is column_major", "linear"}},
          {"e8m0 scales of blocks",
           [](A& a) {
             a.x_scales.format = QuantFormat::fp8_block128_e8m0();
             a.weight_scales.format = QuantFormat::fp8_block128();
             a.x = resized(a.x, 1, 32);
           },
           Error::kInvalidArgument,
           {"x_scales.format is fp8_block128 with e8m0 scales", "f32 scales"}},
          {"length of the global scale",
           [](A& a) { a.weight_scales.global_scale = resized(*a.weight_scales.global_scale, 0, 2); },
           Error::kInvalidArgument,
           {"len(weight_scales.global_scale) is 2", "1 or num_experts"}},
          {"a global scale where the format has none",
           [](A& a) { a.x_scales.global_scale = a.weight_scales.global_scale; },
           Error::kInvalidArgument,
           {"x_scales.global_scale", "nvfp4"}},
          {"depth",
           [](A& a) { a.x = resized(a.x, 1, 62); },
           Error::kInvalidArgument,
           {"x is e4m3[5,62]", "weights.shape[2] = 64"}},
          {"an odd number of nibbles",
           [](A& a) { a.weights = restrided(resized(retyped(a.weights, DType::kE2M1), 2, 31), 1, 32); },
           Error::kInvalidArgument,
           {"weights.shape[2] is 31", "an even number of e2m1 elements"}},
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

struct FusedExpertsArgs {
  Tensor x_memory = zeros(DType::kF32, {3, 8}), weights_memory = zeros(DType::kF32, {3, 2}),
         ids_memory = zeros(DType::kI32, {3, 2}), w13_memory = zeros(DType::kF32, {4, 12, 8}),
         w2_memory = zeros(DType::kF32, {4, 8, 6}), w13_bias_memory = zeros(DType::kF32, {4, 12}),
         w2_bias_memory = zeros(DType::kF32, {4, 8}), residual_memory = zeros(DType::kF32, {3, 8}),
         out_memory{kCpu, DType::kF32, {3, 8}};
  TensorView x = x_memory.read_only(), weights = weights_memory.read_only(), ids = ids_memory.read_only(),
             out = out_memory;
  Experts experts{w13_memory.read_only(), w2_memory.read_only(), w13_bias_memory.read_only(),
                  w2_bias_memory.read_only()};
  FusedExpertsOptions options{.residual = residual_memory.read_only()};
  Tensor w13_scale_memory = zeros(DType::kF32, {4, 12}), w2_scale_memory = zeros(DType::kF32, {4, 8});
  TensorView w13_scales = w13_scale_memory.read_only(), w2_scales = w2_scale_memory.read_only();
  /// Codes in place of the weights, with a scale for each output channel.
  void quantize(const QuantFormat& format) {
    experts.w13 = retyped(experts.w13, DType::kE4M3);
    experts.w2 = retyped(experts.w2, DType::kE4M3);
    experts.w13_scales = OperandScales{format, w13_scales};
    experts.w2_scales = OperandScales{format, w2_scales};
  }
  Call context{kCpu, fused_experts_workspace_bytes(3, 2, 4, 8, 6, DType::kF32, kCpu)};
  void call() { fused_experts(x, weights, ids, experts, out, options, context); }
  std::vector<const Tensor*> outputs() const { return {&out_memory}; }
};

TEST(Contract, FusedExperts) {
  using A = FusedExpertsArgs;
  expect_refusals<A>("fused_experts",
                     {
                         {"type of x",
                          [](A& a) { a.x = retyped(a.x, DType::kI32); },
                          Error::kInvalidType,
                          {"x is i32[3,8]", "f32|f16|bf16"}},
                         {"type of w13",
                          [](A& a) { a.experts.w13 = retyped(a.experts.w13, DType::kBF16); },
                          Error::kInvalidType,
                          {"w13 is bf16[4,12,8]", "dtype of x, f32"}},
                         {"type of w2",
                          [](A& a) { a.experts.w2 = retyped(a.experts.w2, DType::kF16); },
                          Error::kInvalidType,
                          {"w2 is f16[4,8,6]", "dtype of x, f32"}},
                         {"type of out",
                          [](A& a) { a.out = retyped(a.out, DType::kBF16); },
                          Error::kInvalidType,
                          {"out is bf16[3,8]", "dtype of x, f32"}},
                         {"type of ids",
                          [](A& a) { a.ids = retyped(a.ids, DType::kF32); },
                          Error::kInvalidType,
                          {"ids is f32[3,2]", "i32|i64"}},
                         {"tokens of ids",
                          [](A& a) { a.ids = resized(a.ids, 0, 2); },
                          Error::kInvalidArgument,
                          {"ids is i32[2,2]", "num_tokens = 3"}},
                         {"top_k of weights",
                          [](A& a) { a.weights = resized(a.weights, 1, 1); },
                          Error::kInvalidArgument,
                          {"weights is", "top_k = 2"}},
                         {"hidden of w13",
                          [](A& a) { a.experts.w13 = resized(a.experts.w13, 2, 7); },
                          Error::kInvalidArgument,
                          {"w13 is f32[4,12,7]", "hidden = 8"}},
                         {"width of w13",
                          [](A& a) { a.experts.w13 = resized(a.experts.w13, 1, 11); },
                          Error::kInvalidArgument,
                          {"w13 is f32[4,11,8]", "2 * inter = 12"}},
                         {"width of a plain w13",
                          [](A& a) { a.experts.activation.order = GateOrder::kPlain; },
                          Error::kInvalidArgument,
                          {"w13 is f32[4,12,8]", "inter = 6"}},
                         {"experts of w2",
                          [](A& a) { a.experts.w2 = resized(a.experts.w2, 0, 3); },
                          Error::kInvalidArgument,
                          {"w2 is f32[3,8,6]", "num_experts = 4"}},
                         {"hidden of w2",
                          [](A& a) { a.experts.w2 = resized(a.experts.w2, 1, 7); },
                          Error::kInvalidArgument,
                          {"w2 is f32[4,7,6]", "hidden = 8"}},
                         {"hidden of out",
                          [](A& a) { a.out = resized(a.out, 1, 7); },
                          Error::kInvalidArgument,
                          {"out is f32[3,7]", "hidden = 8"}},
                         {"width of w13_bias",
                          [](A& a) { a.experts.w13_bias = resized(*a.experts.w13_bias, 1, 11); },
                          Error::kInvalidArgument,
                          {"w13_bias is f32[4,11]", "12"}},
                         {"type of w2_bias",
                          [](A& a) { a.experts.w2_bias = retyped(*a.experts.w2_bias, DType::kF16); },
                          Error::kInvalidType,
                          {"w2_bias is f16[4,8]", "f32"}},
                         {"activation",
                          [](A& a) { a.experts.activation.alpha = NAN; },
                          Error::kInvalidArgument,
                          {"alpha", "finite"}},
                         {"codes without a format",
                          [](A& a) { a.experts.w13 = retyped(a.experts.w13, DType::kE4M3); },
                          Error::kInvalidType,
                          {"w13 is e4m3[4,12,8]", "f32|f16|bf16"}},
                         {"codes beside floats",
                          [](A& a) {
                            a.experts.w13 = retyped(a.experts.w13, DType::kE4M3);
                            a.experts.w13_scales = OperandScales{QuantFormat::fp8_token(), a.w13_scales};
                          },
                          Error::kInvalidArgument,
                          {"w2_scales.format is f32|f16|bf16", "that of w13, fp8_token"}},
                         {"scales of w13",
                          [](A& a) {
                            a.quantize(QuantFormat::fp8_token());
                            a.experts.w13_scales->scales = resized(a.w13_scales, 1, 11);
                          },
                          Error::kInvalidArgument,
                          {"w13_scales is f32[4,11]", "= 12"}},
                         {"quantised x with float weights",
                          [](A& a) { a.options.x_format = QuantFormat::fp8_token(); },
                          Error::kInvalidArgument,
                          {"fp8_token x f32|f16|bf16", "one of"}},
                         {"a static scale that is missing",
                          [](A& a) {
                            a.quantize(QuantFormat::fp8_token());
                            a.options.x_format = QuantFormat::fp8_tensor_static();
                          },
                          Error::kInvalidArgument,
                          {"x_scale is missing", "f32 [1,1]"}},
                         {"a scale that the format has no use for",
                          [](A& a) {
                            a.quantize(QuantFormat::fp8_token());
                            a.options.x_format = QuantFormat::fp8_token();
                            a.options.inter_scale = a.w2_scales;
                          },
                          Error::kInvalidArgument,
                          {"inter_scale", "fp8_tensor_static and nvfp4"}},
                         {"residual",
                          [](A& a) { a.options.residual = resized(*a.options.residual, 1, 7); },
                          Error::kInvalidArgument,
                          {"residual is f32[3,7]", "hidden = 8"}},
                         {"strided weights on the input",
                          [](A& a) {
                            a.options.apply_router_weight_on_input = true;
                            a.weights = restrided(a.weights, 0, 1);
                          },
                          Error::kInvalidArgument,
                          {"weights.strides[0] is 1", "dense"}},
                         {"no workspace",
                          [](A& a) { a.context.context().workspace = {}; },
                          Error::kInvalidArgument,
                          {"workspace is 0 bytes", "at least"}},
                         {"a workspace that is a byte short",
                          [](A& a) {
                            auto& w = a.context.context().workspace;
                            w = w.first(w.size() - 1);
                          },
                          Error::kInvalidArgument,
                          {"workspace is", "at least"}},
                         {"a misaligned workspace",
                          [](A& a) {
                            auto& w = a.context.context().workspace;
                            w = {w.data() + 1, w.size()};
                          },
                          Error::kInvalidArgument,
                          {"workspace is misaligned", "256"}},
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
  const ExecContext context{.explain = &text};
  ShuffleRowsArgs args;
  args.context = context;
  args.call();
  EXPECT_NE(text.find("permute"), std::string::npos) << text;
  EXPECT_TRUE(args.out_memory.untouched());
  args.out = resized(args.out, 0, 2);
  EXPECT_THROW(args.call(), InvalidArgument);

  FusedExpertsArgs layer;
  layer.context.context().explain = &text;
  text.clear();
  layer.call();
  for (const char* op : {"plan", "grouped_gemm", "finalize"})
    EXPECT_NE(text.find(op), std::string::npos) << text;
  EXPECT_TRUE(layer.out_memory.untouched());
}

// A GPU would fault on it, and every later call of the process with it.
TEST(Contract, MisalignedElementsAreRefusedOnCuda) {
  const Device gpu{DeviceType::kCUDA, 0};
  alignas(16) std::byte memory[64] = {};
  const TensorView rows = TensorView::dense(static_cast<void*>(memory), DType::kF16, {2, 2}, gpu);
  const TensorView slots = TensorView::dense(static_cast<void*>(memory + 16), DType::kI32, {1, 2}, gpu);
  const TensorView out = TensorView::dense(static_cast<void*>(memory + 32), DType::kF16, {1, 2}, gpu);
  const TensorView weights = TensorView::dense(static_cast<void*>(memory + 50), DType::kF32, {1, 2}, gpu);
  try {
    finalize(rows, slots, out, {.weights = weights}, {.device = gpu});
    FAIL() << "took f32 weights at an odd multiple of two bytes";
  } catch (const InvalidArgument& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("finalize: weights is f32[1,2] cuda:0 at a misaligned address"), std::string::npos)
        << text;
    EXPECT_NE(text.find("a multiple of 4"), std::string::npos) << text;
  }
}

// A build or machine without a GPU says so, and what was compiled in.
TEST(Contract, MissingGpuIsABackendError) {
  if (cuda_device_count() > 0) GTEST_SKIP() << "this machine has a GPU";
  const Device gpu{DeviceType::kCUDA, 0};
  float memory[8] = {};
  std::int32_t map[2] = {};
  try {
    shuffle_rows(TensorView::dense(static_cast<void*>(memory), DType::kF32, {2, 2}, gpu),
                 TensorView::dense(static_cast<void*>(map), DType::kI32, {2}, gpu),
                 TensorView::dense(static_cast<void*>(memory + 4), DType::kF32, {2, 2}, gpu),
                 {.device = gpu});
    FAIL() << "ran on a GPU that is not there";
  } catch (const BackendError& e) {
    EXPECT_NE(std::string(e.what()).find("permute: "), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace moecore::test
