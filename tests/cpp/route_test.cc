// route: ids exact wherever rounding cannot turn them, weights within the bound of an f32 evaluation.

#include "moecore/route.h"

#include <cmath>

#include "moecore/error.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

const double kNaN = std::nan("");
constexpr double kInf = INFINITY;

class Route : public OnDeviceDType {
 protected:
  struct Outputs {
    Array weights, ids;
  };

  Outputs run(const Array& logits, const oracle::RouteSpec& spec, const Place& place = {},
              int num_threads = 0) {
    const std::int64_t num_tokens = logits.shape[0];
    const Tensor logits_tensor(device(), dtype(), logits, place);
    Tensor weights(device(), DType::kF32, {num_tokens, spec.top_k}, place),
        ids(device(), DType::kI32, {num_tokens, spec.top_k}, place);
    RouteOptions options{.scoring = spec.scoring,
                         .num_groups = spec.num_groups,
                         .topk_groups = spec.topk_groups,
                         .group_score = spec.group_score,
                         .renormalize = spec.renormalize,
                         .scale = spec.scale};
    std::optional<Tensor> bias, padding;
    if (spec.bias) {
      bias.emplace(device(), DType::kF32, *spec.bias);
      options.bias = bias->read_only();
    }
    if (spec.is_padding) {
      padding.emplace(device(), DType::kU8, *spec.is_padding);
      options.is_padding = padding->read_only();
    }
    route(logits_tensor.read_only(), weights, ids, options, Call(device(), 0, num_threads));
    EXPECT_TRUE(weights.surroundings_intact());
    EXPECT_TRUE(ids.surroundings_intact());
    return {weights.get(), ids.get()};
  }

  void expect_route(const Array& logits, const oracle::RouteSpec& spec, const Place& place = {}) {
    Outputs out = run(logits, spec, place);
    oracle::RouteResult expected = oracle::route(logits, spec);
    std::int64_t ambiguous = 0;
    for (std::int64_t t = 0; t < logits.shape[0]; ++t) {
      if (!expected.ambiguous[static_cast<std::size_t>(t)]) continue;
      ++ambiguous;
      for (std::int64_t j = 0; j < spec.top_k; ++j) {
        out.ids.at(t, j) = expected.ids.at(t, j);
        out.weights.at(t, j) = expected.weights.value.at(t, j);
      }
    }
    EXPECT_LE(ambiguous, 1 + logits.shape[0] / 4) << "the case proves nothing";
    EXPECT_TRUE(equal(out.ids, expected.ids)) << "ids";
    EXPECT_TRUE(within(out.weights, expected.weights, DType::kF32)) << "weights";
  }

  // Rows of distinct values (as far as `dtype` has enough of them), in random order.
  Array distinct_logits(Random& random, std::int64_t num_tokens, std::int64_t num_experts) {
    Array logits({num_tokens, num_experts});
    for (std::int64_t t = 0; t < num_tokens; ++t)
      for (std::int64_t e = 0; e < num_experts; ++e) {
        const double grid = static_cast<double>(e) * 8 / static_cast<double>(num_experts) - 4;
        const std::int64_t other = random.below(e + 1);
        logits.at(t, e) = logits.at(t, other);
        logits.at(t, other) = oracle::round_to(dtype(), grid);
      }
    return logits;
  }

  void expect_ids(const Array& logits, const oracle::RouteSpec& spec, std::vector<double> ids) {
    const std::int64_t num_tokens = logits.shape[0];
    EXPECT_TRUE(equal(run(logits, spec).ids, Array({num_tokens, spec.top_k}, std::move(ids))));
  }
};

TEST_P(Route, MatchesTheOracle) {
  Random random(1);
  for (std::int64_t e : {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 100, 128, 256, 257, 2048})
    for (std::int64_t k : {1, 2, 8, 10})
      for (std::int64_t t : {0, 1, 7, 40}) {
        if (k > e) continue;
        for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
          for (bool renormalize : {false, true}) {
            SCOPED_TRACE(::testing::Message()
                         << "T=" << t << " E=" << e << " K=" << k << " sigmoid "
                         << (scoring == Scoring::kSigmoid) << " renormalize " << renormalize);
            expect_route(random.floats({t, e}, dtype(), -6, 6), {.top_k = k,
                                                                 .scoring = scoring,
                                                                 .renormalize = renormalize,
                                                                 .scale = renormalize ? 2.5f : 1.0f});
          }
      }
}

TEST_P(Route, SelectsEveryExpertWhenKIsE) {
  Random random(2);
  for (std::int64_t e : {1, 3, 17, 64, 300})
    for (bool renormalize : {false, true})
      expect_route(random.floats({5, e}, dtype(), -3, 3), {.top_k = e, .renormalize = renormalize});
}

TEST_P(Route, TakesStridedAndUnalignedRows) {
  Random random(3);
  for (const Place& place : places(dtype()))
    for (std::int64_t e : {5, 64, 129}) {
      Place aligned = place;
      aligned.byte_offset = place.byte_offset ? 4 : 0;  // of every type of the call
      expect_route(random.floats({9, e}, dtype(), -4, 4), {.top_k = 4}, aligned);
    }
}

TEST_P(Route, BiasSelectsButDoesNotWeigh) {
  Random random(4);
  for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
    for (std::int64_t e : {4, 31, 64, 256, 384}) {
      SCOPED_TRACE(e);
      expect_route(random.floats({64, e}, dtype(), -3, 3),
                   {.top_k = 4, .scoring = scoring, .bias = random.floats({e}, DType::kF32, -1, 1)});
    }
  // A bias that overrules every score.
  expect_ids(Array({1, 4}, {3, 2, 1, 0}), {.top_k = 2, .bias = Array({4}, {-9, -9, 8, 9})}, {3, 2});
}

TEST_P(Route, IdentityTakesTheLogitsAsScores) {
  Random random(11);
  for (std::int64_t e : {4, 31, 256})
    for (bool renormalize : {false, true}) {
      SCOPED_TRACE(e);
      oracle::RouteSpec spec{
          .top_k = 4, .scoring = Scoring::kIdentity, .renormalize = renormalize, .scale = 2.5f};
      expect_route(random.floats({33, e}, dtype(), 0.01, 1), spec);
      spec.bias = random.floats({e}, DType::kF32, -1, 1);
      expect_route(random.floats({33, e}, dtype(), 0.01, 1), spec);
    }
}

TEST_P(Route, LimitsToGroups) {
  struct Shape {
    std::int64_t experts, groups, topk_groups, top_k;
  };
  Random random(5);
  for (Shape s : {Shape{8, 2, 1, 2},
                  {16, 4, 2, 3},
                  {12, 12, 5, 5},
                  {64, 4, 4, 8},
                  {160, 8, 3, 6},
                  {256, 8, 4, 8},
                  {30, 5, 2, 12},
                  {2048, 32, 8, 16}})
    for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
      for (GroupScore group_score : {GroupScore::kTop2Sum, GroupScore::kMax})
        for (bool with_bias : {false, true}) {
          SCOPED_TRACE(::testing::Message() << "E=" << s.experts << " groups " << s.groups << " top "
                                            << s.topk_groups << " K=" << s.top_k << " bias " << with_bias);
          oracle::RouteSpec spec{.top_k = s.top_k,
                                 .scoring = scoring,
                                 .num_groups = s.groups,
                                 .topk_groups = s.topk_groups,
                                 .group_score = group_score,
                                 .renormalize = true,
                                 .scale = 2.5f};
          if (with_bias) spec.bias = random.floats({s.experts}, DType::kF32, -1, 1);
          expect_route(distinct_logits(random, 24, s.experts), spec);
        }
}

TEST_P(Route, TiesGoToTheLowerExpert) {
  // The same logit at every position of a vector and in its tail is the same key.
  for (std::int64_t e : {1, 2, 5, 16, 19, 64, 67, 257})
    for (double logit : {0.0, 1.5, -3.25}) {
      SCOPED_TRACE(e);
      const std::int64_t k = std::min<std::int64_t>(e, 6);
      std::vector<double> lowest;
      for (std::int64_t j = 0; j < k; ++j) lowest.push_back(static_cast<double>(j));
      const Array logits({1, e}, logit);
      expect_ids(logits, {.top_k = k}, lowest);
      expect_ids(logits, {.top_k = k, .scoring = Scoring::kSigmoid}, lowest);
      expect_ids(logits, {.top_k = k, .scoring = Scoring::kSigmoid, .bias = Array({e}, 0.125)}, lowest);
      expect_ids(logits, {.top_k = k, .bias = Array({e}, -0.125)}, lowest);
    }
  expect_ids(Array({1, 6}, {1, 2, 1, 2, 1, 2}), {.top_k = 5}, {1, 3, 5, 0, 2});
  // Both zeros are one value.
  expect_ids(Array({1, 4}, {-0.0, 0.0, -0.0, 0.0}), {.top_k = 3}, {0, 1, 2});
}

TEST_P(Route, TiedGroupsGoToTheLowerGroup) {
  for (GroupScore group_score : {GroupScore::kTop2Sum, GroupScore::kMax})
    for (std::int64_t group : {1, 3, 4, 20}) {
      const std::int64_t e = 6 * group;
      std::vector<double> lowest;
      for (std::int64_t j = 0; j < 2 * group; ++j) lowest.push_back(static_cast<double>(j));
      for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
        expect_ids(Array({1, e}, 0.5),
                   {.top_k = 2 * group,
                    .scoring = scoring,
                    .num_groups = 6,
                    .topk_groups = 2,
                    .group_score = group_score},
                   lowest);
    }
}

TEST_P(Route, DuplicateMaximaCountTwice) {
  // Sums of the two largest: 2+2 beats 3+0.5, so group 1 wins with kTop2Sum; with kMax group 0 does.
  const Array logits({1, 6}, {2, -1, -1, 1.5, 1.5, -9});
  expect_ids(logits, {.top_k = 2, .scoring = Scoring::kSigmoid, .num_groups = 2, .topk_groups = 1}, {3, 4});
  expect_ids(logits,
             {.top_k = 2,
              .scoring = Scoring::kSigmoid,
              .num_groups = 2,
              .topk_groups = 1,
              .group_score = GroupScore::kMax},
             {0, 1});
}

TEST_P(Route, UnselectableExpertsRankTheirGroupLast) {
  // Group 0 has the largest key, but only one that can be selected: the sum of two is -infinity.
  const Array logits({1, 6}, {4, kNaN, kInf, 1, 0.5, -1});
  const oracle::RouteSpec spec{.top_k = 2, .scoring = Scoring::kSigmoid, .num_groups = 2, .topk_groups = 1};
  expect_ids(logits, spec, {3, 4});
  oracle::RouteSpec by_max = spec;
  by_max.group_score = GroupScore::kMax;
  expect_ids(logits, by_max, {0, -1});
  // When every group ranks last, the lower groups win.
  const Array none({1, 8}, {kNaN, 1, kNaN, 2, 3, kNaN, kNaN, 4});
  expect_ids(none, {.top_k = 4, .scoring = Scoring::kSigmoid, .num_groups = 4, .topk_groups = 2},
             {3, 1, -1, -1});
  Random random(12);
  Array many = random.floats({40, 32}, dtype(), -3, 3);
  for (double& v : many.values)
    if (random.below(2)) v = kNaN;
  for (GroupScore group_score : {GroupScore::kTop2Sum, GroupScore::kMax})
    expect_route(many, {.top_k = 6,
                        .scoring = Scoring::kSigmoid,
                        .num_groups = 8,
                        .topk_groups = 3,
                        .group_score = group_score,
                        .renormalize = true});
}

TEST_P(Route, NonFiniteIsNeverSelected) {
  for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
    for (bool renormalize : {false, true}) {
      const oracle::RouteSpec spec{.top_k = 3, .scoring = scoring, .renormalize = renormalize};
      expect_route(Array({4, 5}, {kNaN,  1,     2,     3,     4,      //
                                  kInf,  1,     -kInf, 3,     kNaN,   // two left for three slots
                                  kNaN,  kNaN,  kInf,  kInf,  -kInf,  // none left
                                  -kInf, -kInf, 0,     -kInf, -kInf}),
                   spec);
      oracle::RouteSpec biased = spec;
      biased.bias = Array({5}, {0, kNaN, kInf, -kInf, 0});
      expect_route(Array({2, 5}, {1, 2, 3, 4, 5, kNaN, 1, 1, 1, kInf}), biased);
    }
}

TEST_P(Route, ExtremeLogitsStayFinite) {
  const double big = dtype() == DType::kF16 ? 60000 : oracle::round_to(dtype(), 1e38);
  for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid})
    for (bool renormalize : {false, true})
      expect_route(Array({3, 4}, {big, -big, 0, 1, -big, -big, -big, -big, 88, -88, -100, 100}),
                   {.top_k = 4, .scoring = scoring, .renormalize = renormalize});
}

TEST_P(Route, PaddingTokensGetNothing) {
  Random random(6);
  for (std::int64_t e : {3, 64, 257})
    expect_route(random.floats({6, e}, dtype(), -2, 2),
                 {.top_k = 3, .renormalize = true, .is_padding = Array({6}, {0, 1, 0, 255, 1, 0})});
}

TEST_P(Route, BitsDoNotDependOnBatchOrThreads) {
  Random random(7);
  const Array logits = random.floats({500, 128}, dtype(), -5, 5);
  const oracle::RouteSpec spec{.top_k = 8, .renormalize = true};
  const Outputs whole = run(logits, spec);
  for (int threads : {1, 2, 5})
    for (int repeat = 0; repeat < 2; ++repeat) {
      const Outputs again = run(logits, spec, {}, threads);
      EXPECT_TRUE(equal(again.ids, whole.ids));
      EXPECT_TRUE(equal(again.weights, whole.weights));
    }
  for (std::int64_t t : {0, 1, 250, 499}) {
    const auto row = logits.values.begin() + t * 128;
    const Outputs alone = run(Array({1, 128}, std::vector<double>(row, row + 128)), spec);
    for (std::int64_t j = 0; j < 8; ++j) {
      EXPECT_EQ(alone.ids[j], whole.ids.at(t, j));
      EXPECT_EQ(alone.weights[j], whole.weights.at(t, j));
    }
  }
}

TEST_P(Route, EveryFormGivesTheBitsOfTheCpu) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "one form";
  struct Form {
    std::int64_t num_experts, top_k, num_groups = 1, topk_groups = 1;
    Scoring scoring = Scoring::kSoftmax;
    bool has_bias = false;
  };
  const std::vector<Form> forms = {{8, 2},
                                   {60, 4},
                                   {128, 8},
                                   {128, 16},
                                   {160, 6},
                                   {256, 8},
                                   {500, 8},
                                   {128, 8, 1, 1, Scoring::kSigmoid},
                                   {256, 8, 1, 1, Scoring::kSigmoid, true},
                                   {64, 6, 1, 1, Scoring::kIdentity, true},
                                   {256, 8, 8, 4, Scoring::kSigmoid, true},
                                   {256, 8, 4, 2, Scoring::kSigmoid, true},
                                   {160, 6, 8, 3, Scoring::kIdentity},
                                   {96, 5, 2, 1, Scoring::kSigmoid}};
  Random random(77);
  for (const Form& form : forms)
    for (int kind = 0; kind < 3; ++kind) {
      // Ordinary logits; few distinct ones, so that more experts tie than a list holds; far apart.
      Array logits = random.floats({203, form.num_experts}, dtype(), -5, 5);
      if (kind == 1) logits = random.integers({203, form.num_experts}, 0, 1);
      if (kind == 2)
        for (double& x : logits.values)
          x = random.below(40) == 0 ? kNaN : oracle::round_to(dtype(), x * (random.below(3) == 0 ? 60 : 1));
      std::optional<Array> bias;
      if (form.has_bias) bias = random.floats({form.num_experts}, DType::kF32, -0.5, 0.5);
      auto run_on = [&](Device on, const std::string& policy) {
        const Tensor x(on, dtype(), logits);
        Tensor weights(on, DType::kF32, {203, form.top_k}), ids(on, DType::kI32, {203, form.top_k});
        RouteOptions options{.scoring = form.scoring,
                             .num_groups = form.num_groups,
                             .topk_groups = form.topk_groups,
                             .renormalize = true,
                             .scale = 2.5f};
        std::optional<Tensor> bias_tensor;
        if (bias) {
          bias_tensor.emplace(on, DType::kF32, *bias);
          options.bias = bias_tensor->read_only();
        }
        Call call(on);
        call.context().policy = policy;
        route(x.read_only(), weights, ids, options, call);
        return Outputs{weights.get(), ids.get()};
      };
      const Outputs expected = run_on({DeviceType::kCPU, 0}, "");
      int forms_run = 0;
      for (const char* policy : {"lanes=0", "lanes=1", "lanes=8", "lanes=16", "lanes=32", "lanes=64", ""}) {
        SCOPED_TRACE(::testing::Message() << "E=" << form.num_experts << " K=" << form.top_k << " groups "
                                          << form.num_groups << " kind " << kind << " " << policy);
        try {
          const Outputs out = run_on(device(), policy);
          EXPECT_TRUE(equal(out.ids, expected.ids));
          EXPECT_TRUE(equal(out.weights, expected.weights));
          ++forms_run;
        } catch (const InvalidArgument&) {  // more experts than the form holds
        }
      }
      EXPECT_GE(forms_run, 3);
    }
}

INSTANTIATE_TEST_SUITE_P(, Route, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
