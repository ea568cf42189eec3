// route_plan: the outputs of route and of plan, bit by bit, in one launch or two.

#include "moecore/route_plan.h"

#include <cmath>
#include <utility>

#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

// Logits of distinct sevenths, shuffled, with some that are equal or not finite.
Array random_logits(std::uint64_t seed, std::int64_t num_tokens, std::int64_t num_experts) {
  Random random(seed);
  Array logits = random.integers({num_tokens, num_experts}, -40, 40);
  for (double& x : logits.values) {
    x /= 8;
    if (random.below(200) == 0) x = random.below(2) ? INFINITY : std::nan("");
  }
  return logits;
}

class RoutePlan : public OnDevice {
 protected:
  struct Options {
    std::int64_t num_tokens, num_experts, top_k;
    RouteOptions route{};
    PlanOptions plan{};
    bool has_bias = false;
    bool has_padding = false;
    std::string policy{};
  };

  // All nine outputs of the two ops.
  struct Outputs {
    Tensor weights, ids, offsets, scales, row_token, slot_row, row_route, sizes1, sizes2;

    Outputs(Device device, const Options& o)
        : weights(device, DType::kF32, {o.num_tokens, o.top_k}),
          ids(device, DType::kI32, {o.num_tokens, o.top_k}),
          offsets(device, DType::kI32, {o.plan.num_experts + 1}),
          scales(device, DType::kI32, {o.plan.num_experts + 1}),
          row_token(device, DType::kI32, {o.num_tokens * o.top_k}),
          slot_row(device, DType::kI32, {o.num_tokens, o.top_k}),
          row_route(device, DType::kI32, {o.num_tokens * o.top_k}),
          sizes1(device, DType::kI32, {o.plan.num_experts, 3}),
          sizes2(device, DType::kI32, {o.plan.num_experts, 3}) {}
    Plan plan() { return {offsets, scales, row_token, slot_row, row_route, sizes1, sizes2}; }
    std::vector<const Tensor*> all() const {
      return {&weights, &ids, &offsets, &scales, &row_token, &slot_row, &row_route, &sizes1, &sizes2};
    }
  };

  void expect_composition(Options o) {
    SCOPED_TRACE(::testing::Message() << "T=" << o.num_tokens << " E=" << o.num_experts << " K=" << o.top_k
                                      << " local " << o.plan.num_experts << " " << o.policy);
    const auto seed = static_cast<std::uint64_t>(o.num_tokens * 31 + o.num_experts);
    const Tensor logits(device(), DType::kF32, random_logits(seed, o.num_tokens, o.num_experts));
    std::optional<Tensor> bias, padding;
    if (o.has_bias) {
      bias.emplace(device(), DType::kF32, Random(seed).floats({o.num_experts}, DType::kF32));
      o.route.bias = bias->read_only();
    }
    if (o.has_padding) {
      padding.emplace(device(), DType::kU8, Random(seed).integers({o.num_tokens}, 0, 1));
      o.route.is_padding = padding->read_only();
    }
    o.plan.hidden = 64, o.plan.inter = 32;
    const std::size_t bytes = plan_workspace_bytes(o.num_tokens, o.top_k, o.plan.num_experts, device());
    Outputs one(device(), o), two(device(), o);
    Call call(device(), bytes);
    call.context().policy = o.policy;
    route_plan(logits.read_only(), one.weights, one.ids, one.plan(), o.route, o.plan, call);
    const Call parts(device(), bytes);
    route(logits.read_only(), two.weights, two.ids, o.route, parts);
    plan(two.ids.read_only(), two.plan(), o.plan, parts);
    for (std::size_t i = 0; i < one.all().size(); ++i) {
      EXPECT_EQ(one.all()[i]->get_bytes(), two.all()[i]->get_bytes()) << "output " << i;
      EXPECT_TRUE(one.all()[i]->surroundings_intact());
    }
    EXPECT_TRUE(call.workspace_intact());
  }
};

TEST_P(RoutePlan, GivesTheBitsOfTheTwoOps) {
  for (std::int64_t num_experts : {1, 5, 32, 128, 200, 256, 300})
    for (std::int64_t top_k : {1, 2, 8, 10})
      for (std::int64_t num_tokens : {0, 1, 3, 4, 5, 8, 9, 16, 40, 300}) {
        if (top_k > num_experts) continue;
        for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
          expect_composition({.num_tokens = num_tokens,
                              .num_experts = num_experts,
                              .top_k = top_k,
                              .route = {.scoring = scoring, .renormalize = true},
                              .plan = {.num_experts = num_experts}});
      }
}

TEST_P(RoutePlan, TakesTheOptionsOfBoth) {
  for (std::int64_t num_tokens : {1, 4, 8, 100}) {
    const RouteOptions grouped{
        .scoring = Scoring::kSigmoid, .num_groups = 8, .topk_groups = 4, .renormalize = true, .scale = 2.5f};
    expect_composition({.num_tokens = num_tokens,
                        .num_experts = 256,
                        .top_k = 8,
                        .route = grouped,
                        .plan = {.num_experts = 256},
                        .has_bias = true,
                        .has_padding = true});
    // A rank of 4 that holds experts 64 .. 127, and other scale alignments.
    for (std::int64_t alignment : {1, 7, 128})
      expect_composition({.num_tokens = num_tokens,
                          .num_experts = 256,
                          .top_k = 8,
                          .route = grouped,
                          .plan = {.num_experts = 64, .first_expert = 64, .scale_alignment = alignment}});
  }
}

TEST_P(RoutePlan, FollowsAnExpertMap) {
  // To every third expert, and to more than a block has threads.
  Array few({128}, -1.0), many({128});
  for (std::int64_t e = 0; e < 128; e += 3) few[e] = static_cast<double>(e / 3);
  for (std::int64_t e = 0; e < 128; ++e) many[e] = static_cast<double>(8 * e);
  for (const auto& [values, num_local] : {std::pair{few, 43}, {many, 1017}}) {
    const Tensor map(device(), DType::kI32, values);
    for (std::int64_t num_tokens : {2, 8, 60})
      expect_composition({.num_tokens = num_tokens,
                          .num_experts = 128,
                          .top_k = 6,
                          .plan = {.num_experts = num_local, .expert_map = map.read_only()}});
  }
}

TEST_P(RoutePlan, RepeatsTheSameBits) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "the CPU runs the two ops";
  for (const char* policy : {"fused=0", "fused=1"})
    for (int repeat = 0; repeat < 20; ++repeat)
      expect_composition(
          {.num_tokens = 16, .num_experts = 128, .top_k = 8, .plan = {.num_experts = 128}, .policy = policy});
}

INSTANTIATE_TEST_SUITE_P(, RoutePlan, ::testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace moecore::test
