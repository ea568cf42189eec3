// What the products and the layer refuse.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "moecore/moecore.h"
#include "support/refusals.h"

namespace moecore::test {
namespace {

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

// With `explain` the layer names its parts, and runs none of them.
TEST(Contract, ExplainOfTheLayerRunsNothing) {
  std::string text;
  FusedExpertsArgs layer;
  layer.context.context().explain = &text;
  layer.call();
  for (const char* op : {"plan", "grouped_gemm", "finalize"})
    EXPECT_NE(text.find(op), std::string::npos) << text;
  EXPECT_TRUE(layer.out_memory.untouched());
}

}  // namespace
}  // namespace moecore::test
