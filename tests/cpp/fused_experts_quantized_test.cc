// fused_experts with quantised weights: as a composition bit for bit that of the public ops; close to the
// layer in double where rows stay floats.

#include <cmath>
#include <limits>
#include <string>

#include "moecore/finalize.h"
#include "moecore/grouped_gemm.h"
#include "moecore/permute.h"
#include "moecore/plan.h"
#include "moecore/quantize.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/layer_test.h"
#include "support/oracle.h"
#include "support/quantized_operand.h"

namespace moecore::test {
namespace {

// One layer with quantised weights, and activations where the pair has them so.
struct QuantizedLayer {
  const LayerCase& c;
  const FormatPair& pair;
  Layer layer;
  Operand w13, w2;
  std::optional<Tensor> x_scale, inter_scale;

  QuantizedLayer(const LayerCase& layer_case, const FormatPair& formats, Device device, DType dtype,
                 Random random)
      : c(layer_case),
        pair(formats),
        layer(c, device, dtype, random),
        w13({.format = pair.weights, .float_type = dtype, .shape = layer.w13.shape, .place = c.place},
            random),
        w2({.format = pair.weights, .float_type = dtype, .shape = layer.w2.shape, .place = c.place}, random) {
    // Small, so that the products of integers stay where every type has room.
    for (double& v : layer.x.values) v = oracle::round_to(dtype, v * 0x1p-6);
    layer.x_tensor.set(layer.x);
    layer.w13 = w13.values;
    layer.w2 = w2.values;
    w13.upload(device);
    w2.upload(device);
    if (pair.x && pair.x->kind == QuantKind::kNvfp4) {
      x_scale.emplace(device, DType::kF32, Array({1}, 37.0));
      inter_scale.emplace(device, DType::kF32, Array({1}, 0.75));
    } else if (pair.x && pair.x->static_scale) {
      x_scale.emplace(device, DType::kF32, Array({1, 1}, 0x1p-12));
      inter_scale.emplace(device, DType::kF32, Array({1, 1}, 0.0625));
    }
  }

  Experts experts() const {
    Experts e = layer.experts(c.activation);
    e.w13 = w13.view();
    e.w2 = w2.view();
    e.w13_scales = w13.scale_view();
    e.w2_scales = w2.scale_view();
    return e;
  }
  FusedExpertsOptions options() const {
    return {.expert_map = Layer::view(layer.map_tensor),
            .first_expert = c.first_expert,
            .apply_router_weight_on_input = c.weight_on_input,
            .residual = Layer::view(layer.residual_tensor),
            .x_format = pair.x,
            .x_scale = Layer::view(x_scale),
            .inter_scale = Layer::view(inter_scale)};
  }

  std::size_t workspace_bytes() const {
    const RoutingCase& r = c.routing;
    const TensorView x = layer.x_tensor.view();
    return fused_experts_workspace_bytes(r.num_tokens, r.top_k, c.num_experts(), c.hidden, c.inter, x.dtype,
                                         x.device, pair.x, pair.weights);
  }
  void run_into(Tensor& out, const ExecContext& context) const {
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  experts(), out, options(), context);
  }
  // With `explain` the layer says what it would run.
  Array run(std::string_view policy = "", std::string* explain = nullptr) const {
    const TensorView x = layer.x_tensor.view();
    Tensor out(x.device, x.dtype, {c.routing.num_tokens, c.hidden});
    Call call(x.device, workspace_bytes());
    call.context().policy = policy;
    call.context().explain = explain;
    run_into(out, call);
    EXPECT_TRUE(out.surroundings_intact());
    EXPECT_TRUE(call.workspace_intact());
    return out.get();
  }

  // Rows as the operand of a product: their codes and scales, or themselves.
  struct Rows {
    Tensor data, scales;
    std::optional<OperandScales> view;
  };
  Rows quantized(const Tensor& rows, const std::optional<Tensor>& scale, const ExpertRows& which) const {
    const TensorView v = rows.read_only();
    if (!pair.x) return {Tensor(v.device, DType::kU8, {0}), Tensor(v.device, DType::kF32, {0}), {}};
    QuantFormat f = *pair.x;
    f.layout = ScaleLayout::kLinear;
    f.e8m0_scales = false;  // f32 powers of two
    const auto shape = scale_shape(f, v.shape[0], v.shape[1]);
    Rows to{Tensor(v.device, DType::kU8, {v.shape[0], is_fp4(f) ? v.shape[1] / 2 : v.shape[1]}),
            Tensor(v.device, f.scale_dtype() == DType::kF32 ? DType::kF32 : DType::kU8, {shape[0], shape[1]}),
            {}};
    QuantizeOptions options{.rows = which};
    if (f.kind == QuantKind::kNvfp4) options.global_scale = Layer::view(scale);
    const TensorView scales = f.static_scale ? scale->view() : to.scales.view();
    quantize(v, to.data, scales, f, options, Call(v.device));
    to.view = OperandScales{f, scales, options.global_scale};
    return to;
  }

  Array compose() const {
    const std::int64_t t = c.routing.num_tokens, k = c.routing.top_k, e = c.num_experts(), rows = t * k;
    const Device device = layer.x_tensor.view().device;
    const DType dtype = layer.x_tensor.view().dtype;
    auto i32 = [&](std::vector<std::int64_t> shape) { return Tensor(device, DType::kI32, std::move(shape)); };
    Tensor offsets = i32({e + 1}), scale_offsets = i32({e + 1}), row_token = i32({rows}),
           slot_row = i32({t, k}), row_route = i32({rows});
    plan(layer.id_tensor.read_only(), {offsets, scale_offsets, row_token, slot_row, row_route},
         {.num_experts = e, .expert_map = Layer::view(layer.map_tensor), .first_expert = c.first_expert},
         Call(device, plan_workspace_bytes(t, k, e, device)));
    auto gemm = [&](const Tensor& floats, const Rows& a, const Operand& w, Tensor& to,
                    GroupedGemmOptions options) {
      options.x_scales = a.view;
      options.weight_scales = w.scale_view();
      const std::int64_t n = w.values.shape[1], depth = w.values.shape[2];
      grouped_gemm(
          a.view ? a.data.read_only() : floats.read_only(), w.view(), offsets.read_only(), to, options,
          Call(device, grouped_gemm_workspace_bytes(rows, n, depth, e, dtype, device, pair.x, pair.weights)));
    };
    GroupedGemmOptions gemm1{.bias = Layer::view(layer.w13_bias_tensor),
                             .row_token = row_token.read_only(),
                             .activation = c.activation};
    Tensor row_weights(device, c.weight_type, {rows, 1});
    if (c.weight_on_input) {
      const Tensor by_route(device, c.weight_type, Array({rows, 1}, layer.weights.values));
      shuffle_rows(by_route.read_only(), row_route.read_only(), row_weights, Call(device));
      TensorView flat = row_weights.read_only();
      flat.ndim = 1;
      flat.strides[0] = 1;
      gemm1.row_weights = flat;
    }
    Tensor inter_rows(device, dtype, {rows, c.inter}), out_rows(device, dtype, {rows, c.hidden}),
        out(device, dtype, {t, c.hidden});
    gemm(layer.x_tensor, quantized(layer.x_tensor, x_scale, {}), w13, inter_rows, gemm1);
    gemm(inter_rows, quantized(inter_rows, inter_scale, {.expert_offsets = offsets.read_only()}), w2,
         out_rows, {.bias = Layer::view(layer.w2_bias_tensor)});
    FinalizeOptions last{.residual = Layer::view(layer.residual_tensor)};
    if (!c.weight_on_input) last.weights = layer.weight_tensor.read_only();
    finalize(out_rows.read_only(), slot_row.read_only(), out, last, Call(device));
    return out.get();
  }
};

class FusedExpertsQuantized : public LayerTest {};

TEST_P(FusedExpertsQuantized, IsTheComposition) {
  std::vector<FormatPair> pairs = format_pairs();
  pairs.push_back(
      {"fp8 tensor static x fp8 token", QuantFormat::fp8_tensor_static(), QuantFormat::fp8_token()});
  pairs.push_back({"nvfp4 swizzled x nvfp4", QuantFormat::nvfp4(), QuantFormat::nvfp4(ScaleLayout::kLinear)});
  pairs.push_back({"fp8 e8m0 x fp8 block128", QuantFormat::fp8_block128_e8m0(), QuantFormat::fp8_block128()});
  for (const FormatPair& pair : pairs) {
    std::vector<LayerCase> cases;
    for (const RoutingCase& routing : {RoutingCase{1, 2, 8},
                                       {0, 2, 4},
                                       {40, 4, 17, Routing::kInvalid},
                                       {33, 2, 5, Routing::kGaps},
                                       {5, 2, 6, Routing::kAllDropped}})
      cases.push_back({.routing = routing, .hidden = 160, .inter = 136, .residual = true});
    cases.push_back({.routing = {19, 2, 4}, .hidden = 64, .inter = 34, .weight_on_input = true});
    cases.push_back({.routing = {9, 3, 5},
                     .hidden = 96,
                     .inter = 130,
                     .activation = Activation::gpt_oss(),
                     .bias = dtype(),
                     .place = places(dtype())[1]});
    for (const LayerCase& c : cases) {
      SCOPED_TRACE(::testing::Message() << pair.name << " " << c);
      const QuantizedLayer quantized(c, pair, device(), dtype(), Random(17));
      const Array out = quantized.run("fused_experts.fused=0");
      EXPECT_TRUE(equal(out, quantized.compose())) << "against the composition of the public ops";
      if (!pair.x) {
        EXPECT_TRUE(within(out, reference(c, quantized.layer, 8), dtype())) << "against the layer in double";
      }
    }
  }
}

// fp8_block128 in fewer launches: few tokens are quantised beside the plan, and on Hopper the first product's
// tiles leave their rows as codes. Against the forms with passes of their own and against the public ops.
class FusedExpertsCodes : public LayerTest {
 protected:
  const FormatPair block128{"fp8 block128", QuantFormat::fp8_block128(), QuantFormat::fp8_block128()};

  static std::string explain(const QuantizedLayer& layer, std::string_view policy) {
    std::string text;
    layer.run(policy, &text);
    return text;
  }
  static bool leaves_codes(const QuantizedLayer& layer, std::string_view policy) {
    return explain(layer, policy).find("rows left as codes") != std::string::npos;
  }

  void expect_same_bits(const QuantizedLayer& layer) {
    const Array composed = layer.compose();
    EXPECT_TRUE(equal(layer.run(), composed)) << "against the composition of the public ops";
    EXPECT_TRUE(equal(layer.run("plan_quantize.fused=0"), composed)) << "plan, then quantize";
    EXPECT_TRUE(equal(layer.run("grouped_gemm.portable=1"),
                      layer.run("grouped_gemm.portable=1 plan_quantize.fused=0")))
        << "plan, then quantize, before the portable engine";
    if (explain(layer, "").find("wgmma") == std::string::npos) return;
    for (std::string_view tiles :
         {"prefill=0 grouped_gemm.stream_k=0", "prefill=0 grouped_gemm.stream_k=1",
          "prefill=0 grouped_gemm.max_tokens=8", "prefill=0 grouped_gemm.max_tokens=24", "prefill=1"}) {
      const std::string policy = "grouped_gemm." + std::string(tiles);
      const std::string apart = policy + " grouped_gemm.quantize_out=0";
      EXPECT_FALSE(leaves_codes(layer, apart));
      EXPECT_TRUE(equal(layer.run(policy), layer.run(apart))) << policy;
    }
  }
};

TEST_P(FusedExpertsCodes, AnyRoutingAndWidth) {
  for (const RoutingCase& routing : {RoutingCase{1, 2, 8},
                                     {1, 8, 8},
                                     {2, 8, 16},
                                     {31, 16, 40},
                                     {128, 4, 30},
                                     {129, 4, 30},
                                     {0, 2, 4},
                                     {5, 2, 6, Routing::kAllDropped},
                                     {40, 4, 17, Routing::kInvalid},
                                     {33, 2, 5, Routing::kGaps},
                                     {300, 2, 3, Routing::kHot},
                                     {97, 1, 1}})
    for (std::int64_t inter : {128, 384}) {
      const LayerCase c{.routing = routing, .hidden = 272, .inter = inter, .residual = true};
      SCOPED_TRACE(::testing::Message() << c);
      expect_same_bits(QuantizedLayer(c, block128, device(), dtype(), Random(17)));
    }
}

TEST_P(FusedExpertsCodes, AnyActivationAndOrder) {
  for (GateOrder order : {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved})
    for (ActivationKind kind : {ActivationKind::kSilu, ActivationKind::kGeluTanh}) {
      LayerCase c{.routing = {37, 2, 5}, .hidden = 144, .inter = 256, .weight_on_input = true};
      c.activation = {.kind = kind, .order = order};
      SCOPED_TRACE(::testing::Message() << c);
      expect_same_bits(QuantizedLayer(c, block128, device(), dtype(), Random(5)));
    }
  LayerCase c{.routing = {70, 3, 5}, .hidden = 128, .inter = 128, .activation = Activation::gpt_oss()};
  c.bias = dtype();
  expect_same_bits(QuantizedLayer(c, block128, device(), dtype(), Random(6)));
}

TEST_P(FusedExpertsCodes, LocalExperts) {
  LayerCase mapped{.routing = {21, 3, 6}, .hidden = 128, .inter = 128, .expert_map = {{2, -1, 0, -1, 1, 3}}};
  mapped.num_local = 5;  // the last of which has no rows
  expect_same_bits(QuantizedLayer(mapped, block128, device(), dtype(), Random(7)));
  LayerCase ranged{.routing = {21, 3, 9}, .hidden = 128, .inter = 256, .first_expert = 3};
  ranged.num_local = 4;
  expect_same_bits(QuantizedLayer(ranged, block128, device(), dtype(), Random(8)));
}

// Rows of zeros, of NaN, and with a single NaN or infinity; scales that are powers of two, floors and caps.
TEST_P(FusedExpertsCodes, AnyValueAndRule) {
  const LayerCase c{.routing = {19, 2, 4}, .hidden = 128, .inter = 256};
  FormatPair rules[4] = {block128, block128, block128, block128};
  rules[1].x->amax_floor = 3.0f;
  rules[2].x->amax_cap = 1.5f;
  rules[3].x->power_of_two = true;
  for (const FormatPair& rule : rules) {
    QuantizedLayer quantized(c, rule, device(), dtype(), Random(9));
    for (std::int64_t h = 0; h < c.hidden; ++h) quantized.layer.x.at(3, h) = 0;
    quantized.layer.x.at(5, 7) = std::nan("");
    quantized.layer.x.at(6, 0) = std::numeric_limits<double>::infinity();
    quantized.layer.x_tensor.set(quantized.layer.x);
    expect_same_bits(quantized);
    // An up row of the second expert: one column of its rows.
    quantized.w13.codes[static_cast<std::size_t>((2 * c.inter + c.inter + 130) * c.hidden)] = 0x7F;
    quantized.w13.decode();
    quantized.w13.upload(device());
    expect_same_bits(quantized);
  }
}

// Two layers in a row in one workspace, where each kernel may start while the one before it drains.
TEST_P(FusedExpertsCodes, ReplaysAsAGraph) {
  for (const RoutingCase& routing : {RoutingCase{1, 8, 16}, {60, 4, 12}, {200, 4, 12}}) {
    const LayerCase c{.routing = routing, .hidden = 256, .inter = 384};
    SCOPED_TRACE(::testing::Message() << c);
    QuantizedLayer first(c, block128, device(), dtype(), Random(6)),
        second(c, block128, device(), dtype(), Random(7));
    Tensor out1(device(), dtype(), {routing.num_tokens, c.hidden}),
        out2(device(), dtype(), {routing.num_tokens, c.hidden});
    const Stream stream(device());
    Call call(device(), first.workspace_bytes());
    call.context().stream = stream.get();
    const auto work = [&] {
      first.run_into(out1, call);
      second.run_into(out2, call);
    };
    work();  // the first call may load kernels
    synchronize(device());
    Graph graph(stream, work);
    for (std::uint64_t seed : {1, 2, 3}) {
      for (QuantizedLayer* quantized : {&first, &second}) {
        quantized->layer.ids = c.routing.ids(seed);
        quantized->layer.id_tensor.set(quantized->layer.ids);
      }
      out1.poison();
      out2.poison();
      graph.launch();
      EXPECT_TRUE(equal(out1.get(), first.compose())) << "replay " << seed;
      EXPECT_TRUE(equal(out2.get(), second.compose())) << "replay " << seed;
    }
  }
}

TEST_P(FusedExpertsCodes, ExplainSaysWhoQuantises) {
  auto text = [&](std::int64_t inter, std::string_view policy, const FormatPair& pair) {
    const LayerCase c{.routing = {3, 2, 4}, .hidden = 128, .inter = inter};
    return explain(QuantizedLayer(c, pair, device(), dtype(), Random(1)), policy);
  };
  const std::string narrow = text(128, "", block128);
  EXPECT_NE(narrow.find("plan_quantize: cuda, one launch"), std::string::npos) << narrow;
  EXPECT_NE(text(128, "plan_quantize.fused=0", block128).find("not one launch: the policy says fused=0"),
            std::string::npos);
  if (narrow.find("wgmma, decode: 256 weight rows") == std::string::npos)
    GTEST_SKIP() << "no tiles of 256 weight rows here: " << narrow;
  EXPECT_NE(narrow.find("rows left as codes"), std::string::npos) << narrow;
  auto reason = [&](const std::string& said, std::string_view why) {
    EXPECT_EQ(said.find("rows left as codes"), std::string::npos) << said;
    EXPECT_NE(said.find("a pass quantises the rows between the products"), std::string::npos) << said;
    EXPECT_NE(said.find(why), std::string::npos) << said;
  };
  reason(text(192, "", block128), "not a multiple of 128");
  reason(text(128, "grouped_gemm.quantize_out=0", block128), "quantize_out=0");
  reason(text(128, "grouped_gemm.portable=1", block128), "portable=1");
  reason(text(128, "", {"fp8 token", QuantFormat::fp8_token(), QuantFormat::fp8_token()}), "fp8_block128");
}

class FusedExpertsQuantizedOneKernel : public LayerTest {};

TEST_P(FusedExpertsQuantizedOneKernel, Weights) {
  for (const FormatPair& pair : format_pairs()) {
    if (pair.x) continue;
    std::vector<LayerCase> cases = {
        {.routing = {1, 2, 8}, .hidden = 1280, .inter = 640},
        {.routing = {9, 4, 16, Routing::kInvalid}, .hidden = 256, .inter = 512, .residual = true},
        {.routing = {33, 2, 4, Routing::kHot}, .hidden = 128, .inter = 384, .weight_on_input = true},
        {.routing = {5, 3, 6},
         .hidden = 480,
         .inter = 2144,
         .activation = Activation::gpt_oss(),
         .bias = dtype()}};
    for (const LayerCase& c : cases) {
      SCOPED_TRACE(::testing::Message() << pair.name << " " << c);
      const QuantizedLayer quantized(c, pair, device(), dtype(), Random(17));
      EXPECT_TRUE(within(quantized.run(kOneKernel), reference(c, quantized.layer, 8), dtype()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, FusedExpertsQuantized, ::testing::ValuesIn(devices_times(float_types())),
                         device_dtype_name);

// What fp8 x fp8 becomes on Hopper.
std::vector<DeviceDType> bf16_on_cuda() {
  std::vector<DeviceDType> types;
  for (const DeviceDType& t : one_kernel_types())
    if (t.dtype == DType::kBF16) types.push_back(t);
  return types;
}
INSTANTIATE_TEST_SUITE_P(, FusedExpertsCodes, ::testing::ValuesIn(bf16_on_cuda()), device_dtype_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FusedExpertsCodes);

INSTANTIATE_TEST_SUITE_P(, FusedExpertsQuantizedOneKernel, ::testing::ValuesIn(one_kernel_types()),
                         device_dtype_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FusedExpertsQuantizedOneKernel);

}  // namespace
}  // namespace moecore::test
