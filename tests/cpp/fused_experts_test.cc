// fused_experts: close to the layer's definition in double, and as a composition bit for bit that of the
// public ops. transpose_experts: exact.

#include "moecore/fused_experts.h"

#include <cmath>
#include <cstring>
#include <string>
#include <string_view>

#include "moecore/finalize.h"
#include "moecore/grouped_gemm.h"
#include "moecore/permute.h"
#include "moecore/plan.h"
#include "moecore/quantize.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantized_operand.h"

namespace moecore::test {
namespace {

struct LayerCase {
  RoutingCase routing;
  std::int64_t hidden = 48, inter = 40;
  Activation activation{};
  std::optional<DType> bias{};
  DType weight_type = DType::kF32;
  DType id_type = DType::kI32;
  bool weight_on_input = false;
  bool residual = false;
  std::int64_t first_expert = 0;
  std::optional<std::vector<std::int32_t>> expert_map{};
  std::optional<std::int64_t> num_local{};
  Place place{};

  std::int64_t num_experts() const { return num_local.value_or(routing.num_experts); }

  friend std::ostream& operator<<(std::ostream& out, const LayerCase& c) {
    return out << c.routing << " H=" << c.hidden << " I=" << c.inter << " kind "
               << static_cast<int>(c.activation.kind) << " order " << static_cast<int>(c.activation.order)
               << (c.bias ? " bias" : "") << (c.weight_on_input ? " weight on input" : "")
               << (c.residual ? " residual" : "") << (c.expert_map ? " map" : "") << " first "
               << c.first_expert << " " << c.place.name;
  }
};

// The unit roundoff of a type that an intermediate result is rounded to.
double roundoff(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}

// The inputs of one call, on the host and on the device.
struct Layer {
  Array x, weights, ids, w13, w2;
  std::optional<Array> w13_bias, w2_bias, residual;
  Tensor x_tensor, weight_tensor, id_tensor, w13_tensor, w2_tensor;
  std::optional<Tensor> w13_bias_tensor, w2_bias_tensor, residual_tensor, map_tensor;

  Layer(const LayerCase& c, Device device, DType dtype, Random random)
      : x(random.floats({c.routing.num_tokens, c.hidden}, dtype)),
        weights(random.floats({c.routing.num_tokens, c.routing.top_k}, c.weight_type, 0, 1)),
        ids(c.routing.ids()),
        w13(random.floats({c.num_experts(), c.activation.gated() ? 2 * c.inter : c.inter, c.hidden}, dtype,
                          -0.3, 0.3)),
        w2(random.floats({c.num_experts(), c.hidden, c.inter}, dtype, -0.3, 0.3)),
        x_tensor(device, dtype, x, c.place),
        weight_tensor(device, c.weight_type, weights),
        id_tensor(device, c.id_type, ids),
        w13_tensor(device, dtype, w13, c.place),
        w2_tensor(device, dtype, w2, c.place) {
    if (c.bias) {
      w13_bias = random.floats({c.num_experts(), w13.shape[1]}, *c.bias, -0.5, 0.5);
      w2_bias = random.floats({c.num_experts(), c.hidden}, *c.bias, -0.5, 0.5);
      w13_bias_tensor.emplace(device, *c.bias, *w13_bias);
      w2_bias_tensor.emplace(device, *c.bias, *w2_bias);
    }
    if (c.residual) {
      residual = random.floats({c.routing.num_tokens, c.hidden}, dtype);
      residual_tensor.emplace(device, dtype, *residual, c.place);
    }
    if (c.expert_map) {
      Array map({static_cast<std::int64_t>(c.expert_map->size())});
      for (std::int64_t i = 0; i < map.size(); ++i) map[i] = (*c.expert_map)[static_cast<std::size_t>(i)];
      map_tensor.emplace(device, DType::kI32, map);
    }
  }

  static std::optional<TensorView> view(const std::optional<Tensor>& t) {
    return t ? std::optional(t->read_only()) : std::nullopt;
  }
  Experts experts(const Activation& activation) const {
    return {w13_tensor.read_only(), w2_tensor.read_only(), view(w13_bias_tensor), view(w2_bias_tensor),
            activation};
  }
};

// Asks for the kernel that runs a layer in one piece, also where the composition is the faster one.
constexpr std::string_view kOneKernel = "fused_experts.fused=1";

class FusedExperts : public OnDeviceDType {
 protected:
  Array run(const LayerCase& c, const Layer& layer, int num_threads = 0, std::string_view policy = "") {
    const RoutingCase& r = c.routing;
    Tensor out(device(), dtype(), {r.num_tokens, c.hidden}, c.place);
    Call call(device(),
              fused_experts_workspace_bytes(r.num_tokens, r.top_k, c.num_experts(), c.hidden, c.inter,
                                            dtype(), device()),
              num_threads);
    call.context().policy = policy;
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  layer.experts(c.activation), out,
                  {.expert_map = Layer::view(layer.map_tensor),
                   .first_expert = c.first_expert,
                   .apply_router_weight_on_input = c.weight_on_input,
                   .residual = Layer::view(layer.residual_tensor)},
                  call);
    EXPECT_TRUE(out.surroundings_intact());
    EXPECT_TRUE(call.workspace_intact());
    return out.get();
  }

  Array compose(const LayerCase& c, const Layer& layer) {
    const std::int64_t t = c.routing.num_tokens, k = c.routing.top_k, e = c.num_experts(), rows = t * k;
    auto i32 = [&](std::vector<std::int64_t> shape) {
      return Tensor(device(), DType::kI32, std::move(shape));
    };
    Tensor offsets = i32({e + 1}), scales = i32({e + 1}), row_token = i32({rows}), slot_row = i32({t, k}),
           row_route = i32({rows});
    plan(layer.id_tensor.read_only(), {offsets, scales, row_token, slot_row, row_route},
         {.num_experts = e, .expert_map = Layer::view(layer.map_tensor), .first_expert = c.first_expert},
         Call(device(), plan_workspace_bytes(t, k, e, device())));
    GroupedGemmOptions gemm1{.bias = Layer::view(layer.w13_bias_tensor),
                             .row_token = row_token.read_only(),
                             .activation = c.activation};
    Tensor row_weights(device(), c.weight_type, {rows, 1});
    if (c.weight_on_input) {
      const Tensor by_route(device(), c.weight_type, Array({rows, 1}, layer.weights.values));
      shuffle_rows(by_route.read_only(), row_route.read_only(), row_weights, Call(device()));
      TensorView flat = row_weights.read_only();
      flat.ndim = 1;
      flat.strides[0] = 1;
      gemm1.row_weights = flat;
    }
    auto gemm = [&](const TensorView& a, const Tensor& b, Tensor& to, const GroupedGemmOptions& options) {
      const TensorView w = b.view();
      grouped_gemm(
          a, b.read_only(), offsets.read_only(), to, options,
          Call(device(), grouped_gemm_workspace_bytes(rows, w.shape[1], w.shape[2], e, dtype(), device())));
    };
    Tensor inter_rows(device(), dtype(), {rows, c.inter}), out_rows(device(), dtype(), {rows, c.hidden}),
        out(device(), dtype(), {t, c.hidden});
    gemm(layer.x_tensor.read_only(), layer.w13_tensor, inter_rows, gemm1);
    gemm(inter_rows.read_only(), layer.w2_tensor, out_rows, {.bias = Layer::view(layer.w2_bias_tensor)});
    FinalizeOptions last{.residual = Layer::view(layer.residual_tensor)};
    if (!c.weight_on_input) last.weights = layer.weight_tensor.read_only();
    finalize(out_rows.read_only(), slot_row.read_only(), out, last, Call(device()));
    return out.get();
  }

  // The layer in double, with the error of each stage carried into the next.
  Bounded reference(const LayerCase& c, const Layer& layer, int scale_roundings = 0) {
    const std::int64_t t = c.routing.num_tokens, k = c.routing.top_k, rows = t * k;
    const oracle::PlanResult p = oracle::plan(
        layer.ids,
        {.num_experts = c.num_experts(), .expert_map = c.expert_map, .first_expert = c.first_expert});
    oracle::GemmSpec gemm1{.bias = layer.w13_bias,
                           .row_token = p.row_token,
                           .activation = c.activation,
                           .scale_roundings = scale_roundings};
    if (c.weight_on_input) {
      gemm1.row_weights = Array({rows});
      for (std::int64_t r = 0; r < rows; ++r)
        if (p.row_route[r] >= 0)
          (*gemm1.row_weights)[r] = layer.weights[static_cast<std::int64_t>(p.row_route[r])];
    }
    const double u = roundoff(dtype());
    auto after_rounding = [&](Bounded& b) {
      for (std::int64_t i = 0; i < b.value.size(); ++i)
        b.bound[i] += u * (std::fabs(b.value[i]) + b.bound[i]) + 0x1p-25;
    };
    Bounded inter = oracle::grouped_gemm(layer.x, layer.w13, p.expert_offsets, rows, gemm1);
    after_rounding(inter);
    Bounded outer = oracle::grouped_gemm(inter.value, layer.w2, p.expert_offsets, rows,
                                         {.bias = layer.w2_bias, .scale_roundings = scale_roundings});
    Array magnitude = layer.w2;
    for (double& v : magnitude.values) v = std::fabs(v);
    const Bounded carried = oracle::grouped_gemm(inter.bound, magnitude, p.expert_offsets, rows, {});
    for (std::int64_t i = 0; i < outer.bound.size(); ++i) outer.bound[i] += carried.value[i] * (1 + 1e-3);
    after_rounding(outer);

    Bounded out{Array({t, c.hidden}), Array({t, c.hidden})};
    for (std::int64_t i = 0; i < t; ++i)
      for (std::int64_t h = 0; h < c.hidden; ++h) {
        double sum = 0, error = 0, absolute = 0;
        for (std::int64_t j = 0; j < k; ++j) {
          const auto row = static_cast<std::int64_t>(p.slot_row.at(i, j));
          if (row < 0) continue;
          const double w = c.weight_on_input ? 1 : layer.weights.at(i, j);
          sum += w * outer.value.at(row, h);
          absolute += std::fabs(w * outer.value.at(row, h));
          error += std::fabs(w) * outer.bound.at(row, h);
        }
        if (c.residual) {
          sum += layer.residual->at(i, h);
          absolute += std::fabs(layer.residual->at(i, h));
        }
        out.value.at(i, h) = sum;
        out.bound.at(i, h) = error + oracle::kF32Roundoff * static_cast<double>(k + 1) * (absolute + error);
      }
    return out;
  }

  void expect_layer(const LayerCase& c) {
    SCOPED_TRACE(::testing::Message() << c);
    const Layer layer(c, device(), dtype(), Random(17));
    const Array composed = run(c, layer, 0, "fused_experts.fused=0");
    EXPECT_TRUE(equal(composed, compose(c, layer))) << "against the composition of the public ops";
    const Bounded expected = reference(c, layer);
    EXPECT_TRUE(within(composed, expected, dtype())) << "against the layer in double";
    if (device().type == DeviceType::kCUDA) {
      EXPECT_TRUE(within(run(c, layer, 0, kOneKernel), expected, dtype()))
          << "one kernel against the layer in double";
    }
  }
};

TEST_P(FusedExperts, AnyRouting) {
  for (const RoutingCase& routing : short_routing_cases()) expect_layer({.routing = routing});
  expect_layer({.routing = {3, 0, 4}, .residual = true});
  expect_layer({.routing = {70, 8, 64}, .hidden = 64, .inter = 32});
}

TEST_P(FusedExperts, EveryActivation) {
  for (ActivationKind kind : {ActivationKind::kSilu, ActivationKind::kGelu, ActivationKind::kGeluTanh,
                              ActivationKind::kQuickGelu, ActivationKind::kRelu, ActivationKind::kRelu2})
    for (GateOrder order :
         {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain})
      expect_layer({.routing = {9, 2, 5}, .activation = {.kind = kind, .order = order}});
  for (GateOrder order : {GateOrder::kGateUp, GateOrder::kInterleaved})
    expect_layer({.routing = {9, 2, 5}, .activation = Activation::gpt_oss(order), .bias = dtype()});
}

TEST_P(FusedExperts, OddShapesAndLayouts) {
  for (const Place& place : places(dtype()))
    for (auto [hidden, inter] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {33, 17}, {100, 7}, {65, 129}})
      expect_layer({.routing = {11, 3, 6}, .hidden = hidden, .inter = inter, .place = place});
}

TEST_P(FusedExperts, BiasResidualAndWeightTypes) {
  for (DType weight_type : float_types())
    for (DType id_type : {DType::kI32, DType::kI64})
      for (bool residual : {false, true})
        for (std::optional<DType> bias :
             {std::optional<DType>{}, std::optional{DType::kF32}, std::optional{dtype()}}) {
          LayerCase c{
              .routing = {10, 2, 4, Routing::kInvalid}, .weight_type = weight_type, .id_type = id_type};
          c.residual = residual;
          c.bias = bias;
          expect_layer(c);
        }
}

TEST_P(FusedExperts, RouterWeightOnTheInput) {
  for (const RoutingCase& routing :
       {RoutingCase{12, 1, 4}, {12, 2, 4}, {20, 3, 6, Routing::kInvalid}, {0, 1, 2}})
    for (DType weight_type : float_types()) {
      LayerCase c{.routing = routing, .weight_type = weight_type, .weight_on_input = true};
      expect_layer(c);
      c.bias = DType::kF32;
      c.residual = true;
      expect_layer(c);
    }
}

TEST_P(FusedExperts, LocalExpertsOnly) {
  for (std::int64_t first : {0, 4, 12, 16}) {
    LayerCase c{.routing = {30, 4, 16}, .first_expert = first, .num_local = 4};
    expect_layer(c);
  }
  LayerCase c{.routing = {30, 2, 6}, .expert_map = {{-1, 2, -1, 0, 1, -1}}, .num_local = 3};
  expect_layer(c);
  c.residual = true;
  expect_layer(c);
}

TEST_P(FusedExperts, ShardsAddUpToTheLayer) {
  // Expert parallelism: with weights that are powers of two and f32 sums of few terms, the parts of the
  // experts give what the whole gives, up to the rounding of the final additions.
  const LayerCase whole{.routing = {25, 4, 8}};
  const Layer layer(whole, device(), dtype(), Random(17));
  const Bounded expected = reference(whole, layer);
  Bounded sum{Array(expected.value.shape), expected.bound};
  for (std::int64_t first : {0, 3, 6}) {
    const std::int64_t count = std::min<std::int64_t>(3, 8 - first);
    auto slice = [&](const Tensor& t) {
      TensorView v = t.read_only();
      v.data = static_cast<std::byte*>(v.data) + first * v.strides[0] * bit_width(v.dtype) / 8;
      v.shape[0] = count;
      return v;
    };
    Tensor out(device(), dtype(), {25, whole.hidden});
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  {slice(layer.w13_tensor), slice(layer.w2_tensor)}, out, {.first_expert = first},
                  Call(device(), fused_experts_workspace_bytes(25, 4, count, whole.hidden, whole.inter,
                                                               dtype(), device())));
    const Array part = out.get();
    for (std::int64_t i = 0; i < part.size(); ++i) {
      sum.value[i] += part[i];
      sum.bound[i] += roundoff(dtype()) * std::fabs(part[i]);
    }
  }
  for (std::int64_t i = 0; i < sum.value.size(); ++i)
    EXPECT_LE(std::fabs(sum.value[i] - expected.value[i]), sum.bound[i]) << i;
}

TEST_P(FusedExperts, BitsDoNotDependOnThreadsOrRepeats) {
  const LayerCase c{.routing = {90, 4, 12}, .hidden = 96, .inter = 72};
  const Layer layer(c, device(), dtype(), Random(5));
  const Array first = run(c, layer, 1);
  for (int threads : {1, 2, 5}) EXPECT_TRUE(equal(run(c, layer, threads), first)) << threads << " threads";
}

// No op of the layer allocates, synchronises or reads results on the host: it can be captured into a CUDA
// graph, and a replay with new routing in the same tensors gives the new routing's result.
TEST_P(FusedExperts, ReplaysAsAGraph) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "graphs are a CUDA feature";
  const LayerCase c{.routing = {60, 4, 12}, .hidden = 96, .inter = 64};
  Layer layer(c, device(), dtype(), Random(6));
  Tensor out(device(), dtype(), {60, c.hidden});
  const Stream stream(device());
  Call call(device(), fused_experts_workspace_bytes(60, 4, 12, c.hidden, c.inter, dtype(), device()));
  call.context().stream = stream.get();
  const auto work = [&] {
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  layer.experts(c.activation), out, {}, call);
  };
  work();  // the first call may load kernels
  synchronize(device());
  Graph graph(stream, work);
  for (std::uint64_t seed : {1, 2, 3}) {
    layer.ids = c.routing.ids(seed);
    layer.id_tensor.set(layer.ids);
    out.poison();
    graph.launch();
    EXPECT_TRUE(equal(out.get(), run(c, layer))) << "replay " << seed;
  }
}

class FusedExpertsOneKernel : public FusedExperts {
 protected:
  std::string explain(const LayerCase& c, const Layer& layer, std::string_view policy = kOneKernel) {
    const RoutingCase& r = c.routing;
    Tensor out(device(), dtype(), {r.num_tokens, c.hidden});
    Call call(device(), fused_experts_workspace_bytes(r.num_tokens, r.top_k, c.num_experts(), c.hidden,
                                                      c.inter, dtype(), device()));
    std::string text;
    call.context().explain = &text;
    call.context().policy = policy;
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  layer.experts(c.activation), out, {}, call);
    return text;
  }
  bool is_taken(const LayerCase& c, std::string_view policy = kOneKernel) {
    return explain(c, Layer(c, device(), dtype(), Random(3)), policy).find("cuda, one kernel:") !=
           std::string::npos;
  }
};

// Model shapes, tiles and steps that do not divide, one expert with more rows than a pass, more passes than
// blocks, fewer columns than blocks.
TEST_P(FusedExpertsOneKernel, ShapesAndRoutings) {
  for (const LayerCase& c : {LayerCase{.routing = {1, 4, 8}, .hidden = 2048, .inter = 384},
                             LayerCase{.routing = {2, 2, 4}, .hidden = 512, .inter = 1544},
                             LayerCase{.routing = {3, 4, 8}, .hidden = 2880, .inter = 120},
                             LayerCase{.routing = {8, 8, 64}, .hidden = 136, .inter = 72},
                             LayerCase{.routing = {16, 4, 8, Routing::kHot}, .hidden = 256, .inter = 128},
                             LayerCase{.routing = {37, 1, 2, Routing::kHot}, .hidden = 72, .inter = 200},
                             LayerCase{.routing = {64, 8, 16}, .hidden = 128, .inter = 64},
                             LayerCase{.routing = {100, 5, 300}, .hidden = 64, .inter = 16},
                             LayerCase{.routing = {13, 4, 9, Routing::kInvalid}, .hidden = 136, .inter = 72},
                             LayerCase{.routing = {7, 3, 5, Routing::kAllDropped}, .hidden = 64, .inter = 32},
                             LayerCase{.routing = {1, 1, 1}, .hidden = 8, .inter = 8}}) {
    EXPECT_TRUE(is_taken(c)) << c;
    expect_layer(c);
  }
  for (ActivationKind kind : {ActivationKind::kSilu, ActivationKind::kRelu2}) {
    LayerCase plain{.routing = {4, 2, 6}, .hidden = 264, .inter = 520};
    plain.activation = {.kind = kind, .order = GateOrder::kPlain};
    expect_layer(plain);
  }
  LayerCase gpt_oss{.routing = {2, 4, 8}, .hidden = 720, .inter = 720};
  gpt_oss.activation = Activation::gpt_oss();
  gpt_oss.bias = dtype();
  gpt_oss.residual = true;
  expect_layer(gpt_oss);
}

TEST_P(FusedExpertsOneKernel, EveryPolicyGivesALayer) {
  const LayerCase c{.routing = {9, 4, 6}, .hidden = 1032, .inter = 1544};
  const Layer layer(c, device(), dtype(), Random(8));
  const Bounded expected = reference(c, layer);
  for (const char* policy :
       {"row_bytes=512", "row_bytes=2048", "rows=1", "rows=4", "stages=2", "stages=3 rows=8"})
    EXPECT_TRUE(within(run(c, layer, 0, policy), expected, dtype())) << policy;
}

// Ids that a token repeats: rows of one expert beyond the number of tokens.
TEST_P(FusedExpertsOneKernel, RepeatedIds) {
  LayerCase c{.routing = {2, 6, 4}, .hidden = 64, .inter = 48};
  Layer layer(c, device(), dtype(), Random(4));
  for (double& id : layer.ids.values) id = 2;
  layer.id_tensor.set(layer.ids);
  EXPECT_TRUE(within(run(c, layer, 0, kOneKernel), reference(c, layer), dtype()));
}

TEST_P(FusedExpertsOneKernel, IsTakenOnRequest) {
  const LayerCase c{.routing = {1, 4, 8}, .hidden = 256, .inter = 128};
  EXPECT_TRUE(is_taken(c));
  EXPECT_FALSE(is_taken(c, ""));
  EXPECT_FALSE(is_taken(c, "fused_experts.fused=0"));
}

TEST_P(FusedExpertsOneKernel, SaysWhyNot) {
  const LayerCase odd{.routing = {2, 2, 4}, .hidden = 44, .inter = 40};
  const std::string text = explain(odd, Layer(odd, device(), dtype(), Random(3)));
  EXPECT_NE(text.find("not one kernel: rows"), std::string::npos) << text;
  EXPECT_NE(text.find("grouped_gemm: "), std::string::npos) << text;
  const LayerCase many{.routing = {300, 2, 4}};
  EXPECT_NE(explain(many, Layer(many, device(), dtype(), Random(3))).find("600 routes"), std::string::npos);
}

// The blocks wait for each other through a workspace that may hold anything.
TEST_P(FusedExpertsOneKernel, ThousandReplaysOfChangingRoutings) {
  const LayerCase c{.routing = {4, 4, 24, Routing::kInvalid}, .hidden = 512, .inter = 384};
  Layer layer(c, device(), dtype(), Random(6));
  Tensor out(device(), dtype(), {4, c.hidden});
  const Stream stream(device());
  Call call(device(), fused_experts_workspace_bytes(4, 4, 24, c.hidden, c.inter, dtype(), device()));
  call.context().stream = stream.get();
  call.context().policy = kOneKernel;
  const auto work = [&] {
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  layer.experts(c.activation), out, {}, call);
  };
  work();
  synchronize(device());
  Graph graph(stream, [&] {
    for (int i = 0; i < 10; ++i) work();
  });
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    layer.ids = c.routing.ids(seed);
    layer.id_tensor.set(layer.ids);
    out.poison();
    graph.launch();
    const Array replayed = out.get();
    ASSERT_TRUE(equal(replayed, run(c, layer, 0, kOneKernel))) << "replay " << seed;
    if (seed % 20 == 0) {
      ASSERT_TRUE(within(replayed, reference(c, layer), dtype())) << "replay " << seed;
    }
  }
}

std::vector<DeviceDType> one_kernel_types() {
  std::vector<DeviceDType> types;
  for (const DeviceDType& t : devices_times({DType::kF16, DType::kBF16}))
    if (t.device.type == DeviceType::kCUDA) types.push_back(t);
  return types;
}
INSTANTIATE_TEST_SUITE_P(, FusedExpertsOneKernel, ::testing::ValuesIn(one_kernel_types()), device_dtype_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FusedExpertsOneKernel);

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
    return {.apply_router_weight_on_input = c.weight_on_input,
            .residual = Layer::view(layer.residual_tensor),
            .x_format = pair.x,
            .x_scale = Layer::view(x_scale),
            .inter_scale = Layer::view(inter_scale)};
  }

  Array run(std::string_view policy = "") const {
    const RoutingCase& r = c.routing;
    const Device device = layer.x_tensor.view().device;
    const DType dtype = layer.x_tensor.view().dtype;
    Tensor out(device, dtype, {r.num_tokens, c.hidden});
    Call call(device, fused_experts_workspace_bytes(r.num_tokens, r.top_k, c.num_experts(), c.hidden, c.inter,
                                                    dtype, device, pair.x, pair.weights));
    call.context().policy = policy;
    fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                  experts(), out, options(), call);
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
         {.num_experts = e}, Call(device, plan_workspace_bytes(t, k, e, device)));
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

TEST_P(FusedExperts, QuantizedIsTheComposition) {
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

TEST_P(FusedExpertsOneKernel, QuantizedWeights) {
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

INSTANTIATE_TEST_SUITE_P(, FusedExperts, ::testing::ValuesIn(devices_times(float_types())),
                         device_dtype_name);

std::vector<DType> transposable_types() {
  std::vector<DType> types;
  for (int i = 0; i < kNumDTypes; ++i)
    if (const auto d = static_cast<DType>(i); bit_width(d) >= 8 && bit_width(d) <= 64) types.push_back(d);
  return types;
}

class TransposeExperts : public OnDeviceDType {};

TEST_P(TransposeExperts, MovesEveryElement) {
  const auto size = static_cast<std::size_t>(bit_width(dtype())) / 8;
  for (std::int64_t e : {0, 1, 3})
    for (auto [rows, cols] :
         {std::pair<std::int64_t, std::int64_t>{1, 1}, {5, 3}, {16, 64}, {33, 129}, {0, 7}, {7, 0}})
      for (const Place& place : places(dtype())) {
        SCOPED_TRACE(::testing::Message() << e << "x" << rows << "x" << cols << " " << place.name);
        Tensor src(device(), dtype(), {e, rows, cols}, place), dst(device(), dtype(), {e, cols, rows}, place);
        const auto bytes = Random(1).bytes(static_cast<std::size_t>(e * rows * cols) * size);
        src.set_bytes(bytes);
        transpose_experts(src.read_only(), dst, Call(device()));
        auto expected = bytes;
        for (std::int64_t x = 0; x < e; ++x)
          for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t c = 0; c < cols; ++c)
              std::memcpy(expected.data() + static_cast<std::size_t>((x * cols + c) * rows + r) * size,
                          bytes.data() + static_cast<std::size_t>((x * rows + r) * cols + c) * size, size);
        EXPECT_EQ(dst.get_bytes(), expected);
        EXPECT_TRUE(dst.surroundings_intact());
      }
}

INSTANTIATE_TEST_SUITE_P(, TransposeExperts, ::testing::ValuesIn(devices_times(transposable_types())),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
