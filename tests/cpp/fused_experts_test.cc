// fused_experts: close to the layer's definition in double, and as a composition bit for bit that of the
// public ops.

#include <cmath>

#include "support/cases.h"
#include "support/compare.h"
#include "support/layer_test.h"

namespace moecore::test {
namespace {

class FusedExperts : public LayerTest {};

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

INSTANTIATE_TEST_SUITE_P(, FusedExperts, ::testing::ValuesIn(devices_times(float_types())),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
