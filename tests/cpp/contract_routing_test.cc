// What route and plan refuse.

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "moecore/moecore.h"
#include "support/refusals.h"

namespace moecore::test {
namespace {

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

}  // namespace
}  // namespace moecore::test
