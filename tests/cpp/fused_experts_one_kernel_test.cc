// fused_experts as one kernel: close to the layer in double, whatever the routing and the policy.

#include <string>
#include <string_view>

#include "support/cases.h"
#include "support/compare.h"
#include "support/layer_test.h"

namespace moecore::test {
namespace {

class FusedExpertsOneKernel : public LayerTest {
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
  for (const char* choice :
       {"fused_experts.row_bytes=512", "fused_experts.row_bytes=2048", "fused_experts.rows=1",
        "fused_experts.rows=4", "fused_experts.stages=2", "fused_experts.stages=3 fused_experts.rows=8"}) {
    const std::string policy = std::string(kOneKernel) + " " + choice;
    EXPECT_TRUE(is_taken(c, policy)) << policy;
    EXPECT_TRUE(within(run(c, layer, 0, policy), expected, dtype())) << policy;
  }
}

// Ids that a token repeats: rows of one expert beyond the number of tokens.
TEST_P(FusedExpertsOneKernel, RepeatedIds) {
  LayerCase c{.routing = {2, 6, 4}, .hidden = 64, .inter = 48};
  Layer layer(c, device(), dtype(), Random(4));
  for (double& id : layer.ids.values) id = 2;
  layer.id_tensor.set(layer.ids);
  EXPECT_TRUE(within(run(c, layer, 0, kOneKernel), reference(c, layer), dtype()));
}

TEST_P(FusedExpertsOneKernel, IsTakenForOneTokenOrOnRequest) {
  const LayerCase c{.routing = {1, 4, 8}, .hidden = 256, .inter = 128},
      two{.routing = {2, 4, 8}, .hidden = 256, .inter = 128};
  EXPECT_TRUE(is_taken(c));
  EXPECT_TRUE(is_taken(two));
  // A policy that says nothing: the default, whatever MOECORE_TUNING says.
  EXPECT_TRUE(is_taken(c, " "));
  EXPECT_FALSE(is_taken(two, " "));
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

INSTANTIATE_TEST_SUITE_P(, FusedExpertsOneKernel, ::testing::ValuesIn(one_kernel_types()), device_dtype_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FusedExpertsOneKernel);

}  // namespace
}  // namespace moecore::test
