// plan: exact, stable by route, every byte of every output defined.

#include "moecore/plan.h"

#include <string>

#include "moecore/error.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

class PlanOp : public OnDevice {
 protected:
  // Runs the op, compares all seven outputs with the oracle and returns them.
  oracle::PlanResult expect_plan(const Array& ids, const oracle::PlanSpec& spec, DType id_type = DType::kI32,
                                 const Place& id_place = {}, int num_threads = 0,
                                 const std::string& policy = "") {
    const std::int64_t num_tokens = ids.shape[0], top_k = ids.shape[1], routes = num_tokens * top_k;
    const std::int64_t e = spec.num_experts;
    const Tensor id_tensor(device(), id_type, ids, id_place);
    auto output = [&](std::vector<std::int64_t> shape) {
      return Tensor(device(), DType::kI32, std::move(shape));
    };
    Tensor offsets = output({e + 1}), scales = output({e + 1}), row_token = output({routes}),
           slot_row = output({num_tokens, top_k}), row_route = output({routes}), sizes1 = output({e, 3}),
           sizes2 = output({e, 3});
    PlanOptions options{.num_experts = e,
                        .first_expert = spec.first_expert,
                        .scale_alignment = spec.scale_alignment,
                        .hidden = spec.hidden,
                        .inter = spec.inter,
                        .gated = spec.gated,
                        .swap_ab = spec.swap_ab};
    std::optional<Tensor> map;
    if (spec.expert_map) {
      Array values({static_cast<std::int64_t>(spec.expert_map->size())});
      for (std::int64_t i = 0; i < values.size(); ++i)
        values[i] = (*spec.expert_map)[static_cast<std::size_t>(i)];
      map.emplace(device(), DType::kI32, values);
      options.expert_map = map->read_only();
    }
    Call call(device(), plan_workspace_bytes(num_tokens, top_k, e, device()), num_threads);
    call.context().policy = policy;
    plan(id_tensor.read_only(), {offsets, scales, row_token, slot_row, row_route, sizes1, sizes2}, options,
         call);

    const oracle::PlanResult expected = oracle::plan(ids, spec);
    EXPECT_TRUE(equal(offsets.get(), expected.expert_offsets)) << "expert_offsets";
    EXPECT_TRUE(equal(scales.get(), expected.scale_offsets)) << "scale_offsets";
    EXPECT_TRUE(equal(row_token.get(), expected.row_token)) << "row_token";
    EXPECT_TRUE(equal(slot_row.get(), expected.slot_row)) << "slot_row";
    EXPECT_TRUE(equal(row_route.get(), expected.row_route)) << "row_route";
    EXPECT_TRUE(equal(sizes1.get(), expected.problem_sizes1)) << "problem_sizes1";
    EXPECT_TRUE(equal(sizes2.get(), expected.problem_sizes2)) << "problem_sizes2";
    for (const Tensor* t : {&offsets, &scales, &row_token, &slot_row, &row_route, &sizes1, &sizes2})
      EXPECT_TRUE(t->surroundings_intact());
    EXPECT_TRUE(call.workspace_intact());
    return {offsets.get(),   scales.get(), row_token.get(), slot_row.get(),
            row_route.get(), sizes1.get(), sizes2.get()};
  }
};

TEST_P(PlanOp, MatchesTheOracle) {
  for (const RoutingCase& c : routing_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    expect_plan(c.ids(), {.num_experts = c.num_experts, .hidden = 7, .inter = 5});
  }
}

TEST_P(PlanOp, AlignsScaleOffsets) {
  for (const RoutingCase& c : short_routing_cases())
    for (std::int64_t alignment : {1, 16, 100, 1024}) {
      SCOPED_TRACE(::testing::Message() << c << " alignment " << alignment);
      expect_plan(c.ids(), {.num_experts = c.num_experts, .scale_alignment = alignment});
    }
}

TEST_P(PlanOp, HoldsItsInvariants) {
  for (const RoutingCase& c : routing_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const Array ids = c.ids(9);
    const oracle::PlanResult p = expect_plan(ids, {.num_experts = c.num_experts});
    std::int64_t valid = 0;
    for (std::int64_t r = 0; r < ids.size(); ++r) {
      const bool live = ids[r] >= 0 && ids[r] < static_cast<double>(c.num_experts);
      valid += live;
      ASSERT_EQ(p.slot_row[r] >= 0, live) << "route " << r;
      if (!live) continue;
      const auto row = static_cast<std::int64_t>(p.slot_row[r]);
      const auto e = static_cast<std::int64_t>(ids[r]);
      // A bijection between live routes and rows, each inside its expert's segment.
      ASSERT_EQ(p.row_route[row], static_cast<double>(r));
      ASSERT_EQ(p.row_token[row], static_cast<double>(r / c.top_k));
      ASSERT_LE(p.expert_offsets[e], static_cast<double>(row));
      ASSERT_GT(p.expert_offsets[e + 1], static_cast<double>(row));
    }
    EXPECT_EQ(p.expert_offsets[c.num_experts], static_cast<double>(valid));
    for (std::int64_t e = 0; e < c.num_experts; ++e) {
      ASSERT_LE(p.scale_offsets[e], p.scale_offsets[e + 1]);
      ASSERT_EQ(static_cast<std::int64_t>(p.scale_offsets[e + 1]) % 128, 0);
      for (auto row = static_cast<std::int64_t>(p.expert_offsets[e]) + 1;
           row < static_cast<std::int64_t>(p.expert_offsets[e + 1]); ++row)
        ASSERT_LT(p.row_route[row - 1], p.row_route[row]) << "not stable by route";
    }
  }
}

TEST_P(PlanOp, TakesI64AndStridedIds) {
  for (const RoutingCase& c : short_routing_cases())
    for (DType id_type : {DType::kI32, DType::kI64})
      for (const Place& place : places(id_type)) {
        SCOPED_TRACE(::testing::Message() << c << " " << name(id_type) << " " << place.name);
        expect_plan(c.ids(), {.num_experts = c.num_experts}, id_type, place);
      }
  // i64 ids whose low 32 bits would be valid experts are not.
  expect_plan(Array({2, 2}, {4294967296.0, 1, -4294967295.0, 0}), {.num_experts = 4}, DType::kI64);
}

TEST_P(PlanOp, KeepsLocalExpertsOnly) {
  const RoutingCase c{200, 4, 64};
  for (std::int64_t first : {0, 16, 48, 60, 64, 1000})
    expect_plan(c.ids(), {.num_experts = 16, .first_expert = first});
  // Ids below zero stay invalid with an offset.
  expect_plan(Array({1, 4}, {-1, 15, 16, 17}), {.num_experts = 16, .first_expert = 16});
}

TEST_P(PlanOp, FollowsAnExpertMap) {
  const RoutingCase c{100, 4, 12, Routing::kInvalid};
  // Scattered, reversed, with entries beyond the local range, shorter than the ids reach, empty.
  expect_plan(c.ids(), {.num_experts = 3, .expert_map = {{-1, 2, -1, 0, -1, -1, 1, -1, -1, -1, -1, -1}}});
  expect_plan(c.ids(), {.num_experts = 12, .expert_map = {{11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}}});
  expect_plan(c.ids(), {.num_experts = 4, .expert_map = {{0, 1, 2, 3, 4, 5, -9, 1000000, 0, 1, 2, 3}}});
  expect_plan(c.ids(), {.num_experts = 5, .expert_map = {{4, 3, 2}}});
  expect_plan(c.ids(), {.num_experts = 5, .expert_map = std::vector<std::int32_t>{}});
}

TEST_P(PlanOp, WritesProblemSizes) {
  const Array ids = RoutingCase{50, 2, 8}.ids();
  for (bool gated : {true, false})
    for (bool swap_ab : {true, false})
      expect_plan(ids, {.num_experts = 8, .hidden = 2880, .inter = 360, .gated = gated, .swap_ab = swap_ab});
}

TEST_P(PlanOp, OptionalOutputsAreOptional) {
  const RoutingCase c{60, 3, 7};
  const oracle::PlanResult expected = oracle::plan(c.ids(), {.num_experts = 7});
  const Tensor ids(device(), DType::kI32, c.ids());
  Tensor offsets(device(), DType::kI32, {8}), scales(device(), DType::kI32, {8}),
      row_token(device(), DType::kI32, {180}), slot_row(device(), DType::kI32, {60, 3});
  plan(ids.read_only(), {offsets, scales, row_token, slot_row}, {.num_experts = 7},
       Call(device(), plan_workspace_bytes(60, 3, 7, device())));
  EXPECT_TRUE(equal(offsets.get(), expected.expert_offsets));
  EXPECT_TRUE(equal(scales.get(), expected.scale_offsets));
  EXPECT_TRUE(equal(row_token.get(), expected.row_token));
  EXPECT_TRUE(equal(slot_row.get(), expected.slot_row));
}

TEST_P(PlanOp, ManyRoutesAnyThreads) {
  const RoutingCase c{50000, 8, 384};
  for (int threads : {1, 2, 5}) {
    SCOPED_TRACE(threads);
    expect_plan(c.ids(), {.num_experts = c.num_experts}, DType::kI32, {}, threads);
  }
}

// Every launch gives the same plan; those that cannot hold the routes are refused.
TEST_P(PlanOp, EveryFormGivesTheSame) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "forms are the CUDA engine's";
  for (const RoutingCase& c : {RoutingCase{64, 8, 128},
                               {256, 8, 128},
                               {1024, 8, 256},
                               {1000, 8, 40},
                               {1024, 8, 8},
                               {700, 4, 1100},
                               {4096, 8, 100}}) {
    int forms_run = 0;
    for (const char* policy :
         {"", "order=0", "order=1", "blocks=1 threads=1024 rounds=8",
          "blocks=1 threads=1024 rounds=8 order=1", "blocks=8 threads=512 rounds=2 order=0",
          "blocks=8 threads=512 rounds=2 order=1", "blocks=4 threads=512 rounds=4 order=0",
          "blocks=16 threads=512 rounds=4 order=0", "blocks=16 threads=512 rounds=4 order=1",
          "blocks=8 threads=512 rounds=8 order=1"}) {
      SCOPED_TRACE(::testing::Message() << c << " " << policy);
      try {
        expect_plan(c.ids(5), {.num_experts = c.num_experts, .hidden = 7, .inter = 5}, DType::kI32, {}, 0,
                    policy);
        ++forms_run;
      } catch (const InvalidArgument&) {  // as clusters are before Hopper, or too few blocks for the routes
      }
    }
    EXPECT_GE(forms_run, c.num_tokens * c.top_k > 8192 ? 3 : 5);
  }
}

INSTANTIATE_TEST_SUITE_P(, PlanOp, ::testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace moecore::test
