// The CUDA launch policies are plain host code: whatever the problem and the device, what they choose must be
// within the limits of every GPU and cover the problem.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/finalize_policy.h"
#include "cuda/permute_policy.h"
#include "cuda/plan_policy.h"
#include "cuda/policy_override.h"
#include "cuda/route_plan_policy.h"
#include "cuda/route_policy.h"
#include "support/launch_limits.h"

namespace moecore::test {
namespace {

TEST(PolicyPermute, StaysWithinTheHardwareAndCoversTheRow) {
  for (int sms : kSmCounts)
    for (std::int64_t rows : kCounts)
      for (std::int64_t row_bytes : kWidths)
        for (std::uintptr_t alignment : {16, 8, 4, 2, 1})
          for (bool by_token : {false, true}) {
            SCOPED_TRACE(::testing::Message() << sms << " SMs, " << rows << " rows of " << row_bytes
                                              << " bytes at " << alignment << " by token " << by_token);
            const std::int32_t slot = 0;
            PermuteProblem p;
            p.x = p.out = static_cast<std::byte*>(address(alignment));
            p.x_rows = p.out_rows = rows;
            p.x_pitch = p.out_pitch = p.row_bytes = row_bytes;
            p.slot_row = by_token ? &slot : nullptr;
            const cuda::PermutePolicy policy = cuda::select_permute_policy(p, sms, 50 << 20);
            ASSERT_GE(policy.threads, 32);
            ASSERT_LE(policy.threads, kMaxThreads);
            ASSERT_EQ(policy.threads % 32, 0);
            ASSERT_TRUE(policy.unroll == 1 || policy.unroll == 2 || policy.unroll == 4);
            // No vector access at an address that is not a multiple of it.
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(p.x) % policy.vector_bytes, 0u);
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(p.out) % policy.vector_bytes, 0u);
            if (rows > 1) {
              ASSERT_EQ(row_bytes % policy.vector_bytes, 0);
            }
            const int slices = cuda::permute_slices(policy, row_bytes);
            ASSERT_GE(slices, 1);
            ASSERT_LE(slices, kMaxGridY);
          }
}

TEST(PolicyPermute, ByTokenWhereRowsAreManyBytes) {
  auto policy = [](std::int64_t num_tokens, std::int64_t top_k, std::int64_t row_bytes) {
    const std::int32_t slot = 0;
    PermuteProblem p;
    p.x = p.out = static_cast<std::byte*>(address(16));
    p.x_rows = num_tokens;
    p.out_rows = num_tokens * top_k;
    p.x_pitch = p.out_pitch = p.row_bytes = row_bytes;
    p.slot_row = &slot;
    return cuda::select_permute_policy(p, 132, 50 << 20);
  };
  EXPECT_FALSE(policy(64, 8, 4096).by_token);
  EXPECT_TRUE(policy(64, 8, 8192).by_token);
  EXPECT_EQ(policy(64, 8, 8192).threads, 256) << "a block has the whole row";
  EXPECT_EQ(policy(1, 8, 8192).threads, 64) << "so few rows are cut over half the SMs";
  EXPECT_FALSE(policy(256, 8, 8192).streaming) << "rows that fit L2 are wanted there";
  EXPECT_TRUE(policy(1024, 8, 8192).streaming);
  EXPECT_EQ(policy(1024, 8, 8192).threads, 32) << "a warp with four vectors a thread";
}

TEST(PolicyPermute, VectorWidthIsTheCommonAlignment) {
  EXPECT_EQ(cuda::common_alignment(0), 16);
  EXPECT_EQ(cuda::common_alignment(64), 16);
  EXPECT_EQ(cuda::common_alignment(16 | 8), 8);
  EXPECT_EQ(cuda::common_alignment(16 | 4), 4);
  EXPECT_EQ(cuda::common_alignment(6), 2);
  EXPECT_EQ(cuda::common_alignment(16 | 1), 1);
}

TEST(PolicyFinalize, StaysWithinTheHardware) {
  for (int sms : kSmCounts)
    for (std::int64_t num_tokens : kCounts)
      for (std::int64_t hidden : kWidths)
        for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16})
          for (std::int64_t top_k : {0, 1, 2, 3, 4, 8, 64, 1000})
            for (std::uintptr_t alignment : {16, 4}) {
              SCOPED_TRACE(::testing::Message() << sms << " SMs T=" << num_tokens << " H=" << hidden << " K="
                                                << top_k << " " << name(dtype) << " at " << alignment);
              FinalizeProblem p;
              p.rows = p.out = address(alignment);
              p.num_rows = p.num_tokens = num_tokens;
              p.rows_stride = p.out_stride = p.hidden = hidden;
              p.dtype = dtype;
              p.top_k = top_k;
              const cuda::FinalizePolicy policy = cuda::select_finalize_policy(p, sms);
              ASSERT_GE(policy.threads, 32);
              ASSERT_LE(policy.threads, kMaxThreads);
              ASSERT_EQ(policy.threads % 32, 0);
              ASSERT_TRUE(policy.slots == 1 || policy.slots == 2 || policy.slots == 4 || policy.slots == 8);
              const std::int64_t row_bytes = hidden * bit_width(dtype) / 8;
              if (policy.vectors) {
                ASSERT_EQ(alignment % 16, 0u);
                ASSERT_EQ(row_bytes % 16, 0) << "a tail that vectors do not reach";
              }
              if (policy.direct) {
                ASSERT_TRUE(policy.vectors && (top_k == 2 || top_k == 4 || top_k == 8));
                ASSERT_TRUE(policy.direct == 1 || policy.direct == cuda::finalize_most_direct_tokens(top_k));
              }
            }
}

TEST(PolicyFinalize, DirectNeedsWholeVectorsOfSlotsAndWeights) {
  const auto chosen = [](auto&& change) {
    FinalizeProblem p;
    p.out = address(16);
    p.rows = p.weights = p.slot_row.data = address(16);
    p.num_rows = 800, p.num_tokens = 100, p.top_k = p.slot_stride = p.weights_stride = 8;
    p.rows_stride = p.out_stride = p.hidden = 512;
    p.dtype = p.out_dtype = DType::kBF16;
    change(p);
    return cuda::select_finalize_policy(p, 132).direct > 0;
  };
  EXPECT_TRUE(chosen([](FinalizeProblem&) {}));
  EXPECT_TRUE(chosen([](FinalizeProblem& p) { p.weights = nullptr; }));
  EXPECT_TRUE(chosen([](FinalizeProblem& p) { p.weight_dtype = DType::kBF16, p.cast_weights = true; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.cast_weights = true; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.weight_dtype = DType::kF16; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.slot_row.is_i64 = true; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.slot_row.data = address(4); }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.weights = address(8); }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.slot_stride = 9; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.weights_stride = 10; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.top_k = 6; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.rows = address(8); }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.num_rows = std::int64_t{1} << 31; }));
  EXPECT_FALSE(chosen([](FinalizeProblem& p) { p.out_dtype = DType::kE4M3; }));
}

TEST(PolicyFinalize, DirectBlocksAreWideWhereAnSmHasOne) {
  auto policy = [](std::int64_t num_tokens, std::int64_t top_k, std::int64_t hidden) {
    FinalizeProblem p;
    p.rows = p.out = address(16);
    p.slot_row.data = address(16);
    p.num_tokens = num_tokens;
    p.num_rows = num_tokens * top_k;
    p.slot_stride = p.top_k = top_k;
    p.rows_stride = p.out_stride = p.hidden = hidden;
    p.dtype = p.out_dtype = DType::kBF16;
    return cuda::select_finalize_policy(p, 132);
  };
  EXPECT_EQ(policy(1, 8, 4096).threads, 64);
  EXPECT_EQ(policy(128, 8, 4096).threads, 128);
  EXPECT_EQ(policy(256, 8, 4096).threads, 96);
  EXPECT_EQ(policy(4096, 8, 4096).threads, 128);
  EXPECT_EQ(policy(4096, 8, 4096).direct, 1);
  EXPECT_EQ(policy(4096, 4, 4096).direct, 2);
  EXPECT_EQ(policy(64, 4, 4096).direct, 1);
  EXPECT_EQ(policy(4096, 2, 4096).direct, 1);
}

TEST(PolicyPlan, StaysWithinTheHardwareAndHoldsEveryRoute) {
  std::vector<std::int64_t> routes = kCounts;
  for (std::int64_t r : {511, 512, 513, 1023, 1024, 4096, 8191, 8192, 8193, 32767, 32768, 32769, 2147483647})
    routes.push_back(r);
  for (int max_cluster : {1, 2, 8, 16})
    for (std::int64_t num_routes : routes)
      for (std::int64_t num_experts : {1, 2, 31, 32, 33, 64, 128, 256, 257, 512, 1024, 2047, 2048}) {
        SCOPED_TRACE(::testing::Message() << "clusters of " << max_cluster << ", " << num_routes
                                          << " routes, " << num_experts << " experts");
        const cuda::PlanPolicy policy = cuda::select_plan_policy(num_routes, num_experts, max_cluster);
        ASSERT_TRUE(policy.launches == 1 || policy.launches == 2);
        ASSERT_GE(policy.threads, 32);
        ASSERT_LE(policy.threads, kMaxThreads);
        ASSERT_EQ(policy.threads % 32, 0);
        ASSERT_GE(policy.blocks, 1);
        // 99 KiB is what a block may have on the smallest supported architectures (sm_86, sm_89, sm_120).
        ASSERT_LE(cuda::plan_smem_bytes(policy, num_routes, num_experts), std::size_t{99} * 1024);
        if (policy.launches == 1) {
          ASSERT_LE(policy.blocks, max_cluster);
          ASSERT_LE(cuda::plan_experts_per_thread(policy, num_experts), cuda::kPlanMaxExpertsPerThread);
          ASSERT_GE(static_cast<std::int64_t>(policy.blocks) * policy.threads * policy.rounds, num_routes);
        } else {
          ASSERT_LE(policy.blocks, cuda::kPlanMaxBlocks);
        }
      }
}

TEST(PolicyPlan, ClustersGrowWithTheRoutesAndShrinkWithTheDevice) {
  auto blocks = [](std::int64_t num_routes, std::int64_t num_experts, int max_cluster) {
    const cuda::PlanPolicy policy = cuda::select_plan_policy(num_routes, num_experts, max_cluster);
    return policy.launches == 1 ? policy.blocks : 0;
  };
  EXPECT_EQ(blocks(256, 128, 16), 1);
  EXPECT_EQ(blocks(512, 128, 16), 4);
  EXPECT_EQ(blocks(1024, 128, 16), 8);
  EXPECT_EQ(blocks(4096, 128, 16), 16);
  EXPECT_EQ(blocks(4096, 256, 16), 8) << "16 times 256 counts to send and add up";
  EXPECT_EQ(blocks(8192, 128, 8), 8) << "a device without room for 16";
  EXPECT_EQ(blocks(8192, 128, 1), 1) << "no clusters";
  EXPECT_EQ(blocks(16384, 128, 8), 8);
  EXPECT_EQ(blocks(32768, 128, 16), 16);
  EXPECT_EQ(blocks(32768, 128, 8), 0) << "two launches";
  EXPECT_EQ(blocks(65536, 128, 16), 0) << "two launches";
}

TEST(PolicyPlan, BlocksOrderTheirRoutesWhereWordsWouldScatter) {
  auto order = [](std::int64_t num_routes, std::int64_t num_experts, int max_cluster) {
    return cuda::select_plan_policy(num_routes, num_experts, max_cluster).order;
  };
  EXPECT_EQ(order(256, 128, 16), 0) << "few, in one block";
  EXPECT_EQ(order(8192, 128, 1), 1) << "a single block";
  EXPECT_EQ(order(8192, 128, 8), 1);
  EXPECT_EQ(order(8192, 256, 16), 1);
  EXPECT_EQ(order(1024, 128, 16), 0) << "128 routes in each block";
  EXPECT_EQ(order(8192, 8, 16), 0) << "a warp's routes share few experts";
  EXPECT_EQ(order(32768, 8, 16), 1);
}

TEST(PolicyRoute, LanesHoldEveryExpert) {
  for (int sms : kSmCounts)
    for (std::int64_t num_tokens : kCounts)
      for (std::int64_t num_experts = 1; num_experts <= kMaxExperts; ++num_experts)
        for (std::int64_t num_groups : {1, 2, 3, 8, 32, 64})
          for (Scoring scoring : {Scoring::kSoftmax, Scoring::kSigmoid}) {
            if (num_experts % num_groups != 0) continue;
            RouteProblem p;
            p.num_tokens = num_tokens;
            p.num_experts = num_experts;
            p.num_groups = num_groups;
            p.top_k = std::min<std::int64_t>(num_experts, 8);
            p.scoring = scoring;
            const cuda::RoutePolicy policy = cuda::select_route_policy(p, sms);
            ASSERT_GE(policy.per_lane * policy.lanes, num_experts);
            ASSERT_LE(policy.per_lane, 64);
            ASSERT_GE(policy.threads, 32);
            ASSERT_LE(policy.threads, policy.form == cuda::RouteForm::kBlock ? 32 * cuda::kMaxBlockWarps
                                                                             : cuda::kRouteMaxThreads);
            ASSERT_EQ(policy.threads % 32, 0);
            if (policy.form == cuda::RouteForm::kBlock) {
              ASSERT_EQ(policy.threads, policy.lanes);
              ASSERT_GE(policy.blocks, num_tokens);
            }
            ASSERT_GE(policy.blocks, 1);
          }
}

TEST(PolicyRoute, FewerLanesATokenTheMoreTokensAnSmHas) {
  using cuda::RouteForm;
  auto form = [](std::int64_t num_tokens, std::int64_t num_experts, std::int64_t top_k,
                 bool grouped = false) {
    RouteProblem p;
    p.num_tokens = num_tokens;
    p.num_experts = num_experts;
    p.top_k = top_k;
    if (grouped) p.scoring = Scoring::kSigmoid, p.num_groups = 8, p.topk_groups = 4;
    const cuda::RoutePolicy policy = cuda::select_route_policy(p, 132);
    return std::pair(policy.form, policy.lanes);
  };
  EXPECT_EQ(form(16384, 8, 2), std::pair(RouteForm::kThread, 1));
  EXPECT_EQ(form(3 * 132, 128, 8), std::pair(RouteForm::kBlock, 128));
  EXPECT_EQ(form(3 * 132 + 1, 128, 8), std::pair(RouteForm::kPacked, 32));
  EXPECT_EQ(form(16 * 132 + 1, 128, 8), std::pair(RouteForm::kPacked, 16));
  EXPECT_EQ(form(1, 256, 8, true), std::pair(RouteForm::kBlock, 256));
  EXPECT_EQ(form(16384, 256, 8, true), std::pair(RouteForm::kPacked, 32));
  EXPECT_EQ(form(1, 128, 16), std::pair(RouteForm::kPacked, 32)) << "more than 32 candidates";
  EXPECT_EQ(form(1, 1024, 8), std::pair(RouteForm::kGeneral, 32));
}

TEST(PolicyRoutePlan, OneLaunchHoldsEveryTokenAndExpert) {
  for (std::int64_t num_tokens : {0, 1, 4, 5, 8, 9, 16, 17, 5000})
    for (std::int64_t num_experts : {1, 31, 64, 128, 256, 257, 2048})
      for (std::int64_t top_k : {1, 2, 8, 16}) {
        if (top_k > num_experts) continue;
        SCOPED_TRACE(::testing::Message() << "T=" << num_tokens << " E=" << num_experts << " K=" << top_k);
        RoutePlanProblem p;
        p.route.num_tokens = p.plan.num_tokens = num_tokens;
        p.route.num_experts = p.plan.num_experts = num_experts;
        p.route.top_k = p.plan.top_k = top_k;
        for (const cuda::RoutePlanPolicy& policy :
             {cuda::select_route_plan_policy(p), cuda::fused_route_plan_policy(p)}) {
          if (!policy.fused) continue;
          ASSERT_EQ(policy.plan.blocks, 1);
          ASSERT_LE(policy.plan.threads, cuda::kRoutePlanMaxThreads);
          ASSERT_EQ(policy.plan.threads % 32, 0);
          ASSERT_GE(policy.plan.threads, 32 * num_tokens) << "a warp for every token";
          ASSERT_GE(policy.plan.threads * policy.plan.rounds, num_tokens * top_k)
              << "a thread for every route";
          ASSERT_TRUE(policy.plan.tiny || policy.plan.threads >= num_experts);
          ASSERT_TRUE(!policy.plan.tiny || num_tokens * top_k <= cuda::kPlanTinyMaxRoutes);
          // Beside route's static shared memory.
          ASSERT_LE(cuda::plan_smem_bytes(policy.plan, num_tokens * top_k, num_experts),
                    std::size_t{16} * 1024);
        }
      }
}

// An expert_map can name more experts than there are logits; the launch has one of them for a thread.
TEST(PolicyRoutePlan, MoreLocalExpertsThanThreadsAreTwoLaunches) {
  RoutePlanProblem p;
  p.route.num_tokens = p.plan.num_tokens = p.route.top_k = p.plan.top_k = 8;
  p.route.num_experts = 128;
  auto fused = [&](std::int64_t num_local) {
    p.plan.num_experts = num_local;
    return cuda::fused_route_plan_policy(p).fused;
  };
  EXPECT_TRUE(fused(128));
  EXPECT_TRUE(fused(512));
  EXPECT_FALSE(fused(513));
  EXPECT_FALSE(fused(2048));
  p.route.top_k = p.plan.top_k = 4;  // routes of whom every thread knows all
  EXPECT_TRUE(fused(2048));
}

TEST(PolicyOverride, ReplacesNamedFieldsAndRefusesOthers) {
  int threads = 256, unroll = 4;
  const auto apply = [&](std::string_view text) {
    cuda::override_policy("op", text,
                          {{"threads", &threads, {64, 128, 256}}, {"unroll", &unroll, {1, 2, 4}}});
  };
  apply("");
  EXPECT_EQ(threads, 256);
  apply("threads=128 unroll=1");
  EXPECT_EQ(threads, 128);
  EXPECT_EQ(unroll, 1);
  for (const char* wrong :
       {"threads=100", "thread=128", "threads", "threads=", "threads=128x", "unroll=-1"}) {
    try {
      apply(wrong);
      ADD_FAILURE() << wrong << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("threads=64|128|256"), std::string::npos) << e.what();
    }
  }
  EXPECT_EQ(threads, 128);
}

TEST(PolicyOverride, TakesEntriesOfItsOwnOpAndLeavesOthersAlone) {
  int threads = 256;
  const auto apply = [&](std::string_view text) {
    cuda::override_policy("op", text, {{"threads", &threads, {64, 128, 256}}});
  };
  apply("other.threads=64 other.depth=9 op.threads=128");
  EXPECT_EQ(threads, 128);
  EXPECT_THROW(apply("op.depth=9"), InvalidArgument);
}

TEST(PolicyTuning, ALineHoldsWhereEveryConditionDoes) {
  using Relation = TuningRule::Relation;
  const TuningRule rule{.op = "op",
                        .conditions = {{&TuningSizes::rows, Relation::kAtLeast, 8},
                                       {&TuningSizes::rows, Relation::kAtMost, 64},
                                       {&TuningSizes::sms, Relation::kEqual, 132}},
                        .policy = "threads=128"};
  for (std::int64_t rows : {0, 7, 8, 64, 65})
    for (std::int64_t sms : {131, 132, 133})
      EXPECT_EQ(rule.matches({.rows = rows, .sms = sms}), rows >= 8 && rows <= 64 && sms == 132)
          << rows << " rows, " << sms << " SMs";
  EXPECT_TRUE(TuningRule{}.matches({}));
}

}  // namespace
}  // namespace moecore::test
