// The launch policies of activate, of quantize and its fused forms, and of plan beside quantize, as
// policy_test.cc has those of the other ops.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "cuda/activate_policy.h"
#include "cuda/plan_quantize_policy.h"
#include "cuda/quantize_policy.h"
#include "support/launch_limits.h"

namespace moecore::test {
namespace {

TEST(PolicyActivate, StaysWithinTheHardware) {
  for (int sms : kSmCounts)
    for (std::int64_t rows : kCounts)
      for (std::int64_t inter : kWidths)
        for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16})
          for (std::uintptr_t alignment : {16, 4})
            for (int max_threads_per_sm : {1024, 1536, 2048}) {
              SCOPED_TRACE(::testing::Message() << sms << " SMs R=" << rows << " I=" << inter << " "
                                                << name(dtype) << " at " << alignment);
              ActivateProblem p;
              p.x = p.out = address(alignment);
              p.x_stride = 2 * inter;
              p.out_stride = p.inter = inter;
              p.rows = rows;
              p.dtype = dtype;
              const cuda::ActivatePolicy policy = cuda::select_activate_policy(p, sms, max_threads_per_sm);
              ASSERT_GE(policy.threads, 32);
              ASSERT_LE(policy.threads, kMaxThreads);
              ASSERT_EQ(policy.threads % 32, 0);
              ASSERT_TRUE(policy.rows == 1 || (policy.rows == 2 && policy.vectors));
              if (policy.vectors) {
                ASSERT_EQ(alignment % 16, 0u);
                ASSERT_EQ(inter * bit_width(dtype) / 8 % 16, 0) << "a tail that vectors do not reach";
              }
            }
}

// The kernel that reads element by element takes one row at a time, and the policy says so.
TEST(PolicyActivate, OneRowAtATimeWithoutVectors) {
  ActivateProblem p;
  p.x = p.out = address(16);
  p.inter = p.out_stride = 4096;
  p.x_stride = 2 * p.inter;
  p.rows = 65536;
  p.dtype = DType::kBF16;
  auto choose = [&](std::string_view text) { return cuda::choose_activate_policy(p, 132, 2048, text); };
  EXPECT_EQ(choose("").rows, 2);
  EXPECT_EQ(choose("rows=1").rows, 1);
  EXPECT_EQ(choose("vectors=0").rows, 1);
  EXPECT_EQ(choose("vectors=0 rows=1").rows, 1);
  EXPECT_THROW(choose("vectors=0 rows=2"), InvalidArgument);
  p.x = address(4);
  EXPECT_EQ(choose("").rows, 1);
  EXPECT_THROW(choose("rows=2"), InvalidArgument);
  EXPECT_EQ(choose("threads=96").threads, 96);
}

TEST(PolicyQuantize, BlocksCoverEveryRowAndItsScales) {
  const QuantFormat formats[] = {QuantFormat::fp8_tensor_static(),
                                 QuantFormat::fp8_token(),
                                 QuantFormat::fp8_block128(),
                                 QuantFormat::nvfp4(),
                                 QuantFormat::mxfp8(),
                                 QuantFormat::mxfp4()};
  for (int sms : kSmCounts)
    for (std::int64_t rows : kCounts)
      for (std::int64_t cols : kWidths)
        for (const QuantFormat& format : formats)
          for (std::uintptr_t alignment : {16, 2})
            for (bool activated : {false, true}) {
              SCOPED_TRACE(::testing::Message()
                           << sms << " SMs R=" << rows << " H=" << cols << " at " << alignment << " format "
                           << static_cast<int>(format.kind) << " activated " << activated);
              QuantizeProblem p;
              p.format = format;
              p.dtype = DType::kBF16;
              p.x = address(alignment);
              p.data = static_cast<std::uint8_t*>(address(alignment));
              p.x_stride = 2 * cols;
              p.rows = p.out_rows = rows;
              p.cols = p.data_pitch = cols;
              p.padded_cols = (cols + 1) / 2 * 2;
              if (activated) p.activation = Activation{};
              p.scales.layout = format.layout;
              p.scales.bytes = format.scale_dtype() == DType::kF32 ? 4 : 1;
              if (format.block() > 0) p.scales.cols = (p.padded_cols + format.block() - 1) / format.block();
              const cuda::QuantizePolicy policy = cuda::select_quantize_policy(p, sms);
              ASSERT_GE(policy.threads, 32);
              ASSERT_EQ(policy.threads % 32, 0);
              ASSERT_TRUE(policy.tasks == 1 || policy.tasks == 2 || policy.tasks == 4);
              const std::int64_t units = (p.padded_cols + cuda::kUnit - 1) / cuda::kUnit;
              if (cuda::whole_rows(format)) {
                ASSERT_LE(policy.threads, cuda::kRowThreads);
                if (policy.unroll > 0) {
                  ASSERT_LE(policy.unroll, cuda::kMaxRowUnits);
                  ASSERT_GE(static_cast<std::int64_t>(policy.threads) * policy.unroll, units);
                }
                continue;
              }
              ASSERT_LE(policy.threads, cuda::kMaxTileThreads);
              ASSERT_TRUE(policy.unroll == 1 || policy.unroll == 2);
              if (policy.unroll == 2) {
                ASSERT_TRUE(cuda::whole_units(p)) << "two units a thread have no way for tails";
              }
              const std::int64_t width =
                  static_cast<std::int64_t>(policy.threads) * policy.unroll * cuda::kUnit;
              const std::int64_t parts = cuda::row_parts(policy, cuda::columns_of_row(p));
              ASSERT_LE(parts, kMaxGridY);
              ASSERT_GE(parts * width, p.padded_cols);
              ASSERT_GE(parts * width, cuda::stored_blocks(p.scales) * format.block());
              ASSERT_LT((parts - 1) * width, std::max<std::int64_t>(1, cuda::columns_of_row(p)));
            }
}

TEST(PolicyQuantize, ManyRowsOfE4m3AloneTakeFewRowsABlock) {
  auto tasks = [](const QuantFormat& format, std::int64_t rows, std::int64_t cols, bool activated) {
    QuantizeProblem p;
    p.format = format;
    p.dtype = DType::kBF16;
    p.x = address(16);
    p.data = static_cast<std::uint8_t*>(address(16));
    p.x_stride = p.cols = p.padded_cols = p.data_pitch = cols;
    p.rows = p.out_rows = rows;
    if (activated) p.activation = Activation{};
    return cuda::select_quantize_policy(p, 132).tasks;
  };
  for (const QuantFormat& format :
       {QuantFormat::fp8_block128(), QuantFormat::fp8_tensor_static(), QuantFormat::mxfp8()}) {
    EXPECT_EQ(tasks(format, 8192, 4096, false), 1);
    EXPECT_EQ(tasks(format, 8192, 7168, false), 2);
    EXPECT_EQ(tasks(format, 8192, 4096, true), 4);
  }
  for (const QuantFormat& format : {QuantFormat::nvfp4(), QuantFormat::mxfp4()}) {
    EXPECT_EQ(tasks(format, 8192, 4096, false), 4);
    EXPECT_EQ(tasks(format, 16, 4096, false), 1);
  }
}

TEST(PolicyQuantize, ActivatedRowsTakeABlockEachUntilThereAreTwoRounds) {
  auto policy = [](std::int64_t rows, std::int64_t cols, ActivationKind kind) {
    QuantizeProblem p;
    p.format = QuantFormat::fp8_block128();
    p.dtype = DType::kBF16;
    p.x = address(16);
    p.data = static_cast<std::uint8_t*>(address(16));
    p.x_stride = 2 * cols;
    p.cols = p.padded_cols = p.data_pitch = cols;
    p.rows = p.out_rows = rows;
    p.activation = Activation{.kind = kind};
    return cuda::select_quantize_policy(p, 132);
  };
  EXPECT_EQ(policy(1024, 4096, ActivationKind::kSilu).tasks, 1);
  EXPECT_EQ(policy(4096, 2048, ActivationKind::kSilu).tasks, 2);
  EXPECT_EQ(policy(4096, 2048, ActivationKind::kSwigluOai).tasks, 4) << "another kernel, with tails";
  EXPECT_EQ(policy(8, 4096, ActivationKind::kSilu).threads, 64) << "so few rows are cut over the SMs";
  EXPECT_EQ(policy(64, 4096, ActivationKind::kSilu).threads, 256);
  EXPECT_EQ(policy(64, 2048, ActivationKind::kSilu).threads, 128);
}

TEST(PolicyQuantize, FewRowsOfExpertsTakeABlockEach) {
  for (std::int64_t cols : {512, 2048, 2880, 4096}) {
    QuantizeProblem p;
    p.format = QuantFormat::nvfp4();
    p.dtype = DType::kBF16;
    p.x = address(16);
    p.data = static_cast<std::uint8_t*>(address(16));
    p.x_stride = p.cols = p.padded_cols = p.data_pitch = cols;
    p.rows = p.out_rows = 32;
    p.experts.num_experts = 128;
    EXPECT_EQ(cuda::row_parts(cuda::select_quantize_policy(p, 132), cols), 1) << cols;
  }
}

TEST(PolicyQuantize, WholeUnitsNeedAlignmentAndNoTail) {
  QuantizeProblem p;
  p.format = QuantFormat::fp8_block128();
  p.dtype = DType::kBF16;
  p.x = address(16);
  p.data = static_cast<std::uint8_t*>(address(16));
  p.rows = p.out_rows = 2;
  p.cols = p.padded_cols = p.data_pitch = 48;
  p.x_stride = 48;
  EXPECT_TRUE(cuda::whole_units(p));
  QuantizeProblem q = p;
  q.x = address(2);
  EXPECT_FALSE(cuda::whole_units(q));
  q = p;
  q.data_pitch = 56;
  EXPECT_FALSE(cuda::whole_units(q));
  q = p;
  q.cols = 47;
  EXPECT_FALSE(cuda::whole_units(q));
  q = p;
  q.padded_cols = 50;
  EXPECT_FALSE(cuda::whole_units(q));
  q = p;
  q.x_stride = 52;
  EXPECT_FALSE(cuda::whole_units(q));
  q = p;
  q.cols = q.padded_cols = 0;
  EXPECT_FALSE(cuda::whole_units(q));
  // f16 halves that begin 8 bytes behind a vector's start.
  q = p;
  q.activation = Activation{};
  q.cols = 44;
  EXPECT_FALSE(cuda::source_is_aligned(q));
}

// Some layer's beginning: T tokens of H bf16 columns to fp8_block128.
PlanQuantizeProblem plan_quantize_problem(std::int64_t num_tokens, std::int64_t top_k,
                                          std::int64_t num_experts, std::int64_t hidden) {
  PlanQuantizeProblem p;
  p.plan.num_tokens = num_tokens;
  p.plan.top_k = top_k;
  p.plan.num_experts = num_experts;
  p.tokens.format = QuantFormat::fp8_block128();
  p.tokens.dtype = DType::kBF16;
  p.tokens.x = address(16);
  p.tokens.data = static_cast<std::uint8_t*>(address(16));
  p.tokens.rows = p.tokens.out_rows = num_tokens;
  p.tokens.x_stride = p.tokens.cols = p.tokens.padded_cols = p.tokens.data_pitch = hidden;
  p.tokens.scales = {.bytes = 4, .cols = (hidden + 127) / 128};
  return p;
}

TEST(PolicyPlanQuantize, OneLaunchHoldsEveryRouteAndColumn) {
  int launches = 0;
  for (std::int64_t num_tokens : {0, 1, 4, 5, 16, 64, 65, 512, 5000})
    for (std::int64_t num_experts : {1, 31, 128, 256, 1024, 2048})
      for (std::int64_t top_k : {1, 8, 16})
        for (std::int64_t hidden : kWidths) {
          SCOPED_TRACE(::testing::Message()
                       << "T=" << num_tokens << " E=" << num_experts << " K=" << top_k << " H=" << hidden);
          const PlanQuantizeProblem p = plan_quantize_problem(num_tokens, top_k, num_experts, hidden);
          const cuda::PlanQuantizePolicy policy = cuda::select_plan_quantize_policy(p);
          if (!cuda::plan_quantize_refusal(policy, p).empty()) continue;
          ++launches;
          ASSERT_EQ(policy.plan.launches, 1);
          ASSERT_EQ(policy.plan.blocks, 1);
          ASSERT_LE(policy.plan.threads, kMaxThreads);
          ASSERT_EQ(policy.plan.threads % 32, 0);
          ASSERT_TRUE(policy.plan.tiny || policy.plan.threads >= num_tokens * top_k);
          ASSERT_LE(cuda::plan_smem_bytes(policy.plan, num_tokens * top_k, num_experts),
                    std::size_t{99} * 1024);
          ASSERT_LE(1 + num_tokens, kMaxGridY);
          const std::int64_t parts = cuda::token_parts(policy, p);
          ASSERT_LE(parts, kMaxGridY);
          ASSERT_GE(parts * policy.plan.threads * cuda::kUnit, (hidden + 127) / 128 * 128);
        }
  EXPECT_GT(launches, 0);
}

TEST(PolicyPlanQuantize, TakesFewTokensInWholeUnits) {
  auto taken = [](auto&& change, std::int64_t num_tokens = 1) {
    PlanQuantizeProblem p = plan_quantize_problem(num_tokens, 8, 128, 2048);
    change(p);
    return cuda::plan_quantize_refusal(cuda::select_plan_quantize_policy(p), p).empty();
  };
  auto as_it_is = [](PlanQuantizeProblem&) {};
  EXPECT_TRUE(taken(as_it_is));
  EXPECT_TRUE(taken(as_it_is, 64));
  EXPECT_FALSE(taken(as_it_is, 65));
  EXPECT_FALSE(taken(as_it_is, 0));
  EXPECT_FALSE(taken([](PlanQuantizeProblem& q) { q.plan.top_k = 0; }, 1 << 20)) << "no routes, many tokens";
  EXPECT_FALSE(taken([](PlanQuantizeProblem& p) { p.tokens.x = address(2); }));
  EXPECT_FALSE(taken([](PlanQuantizeProblem& p) { p.tokens.dtype = DType::kF16; }));
  EXPECT_FALSE(taken([](PlanQuantizeProblem& p) { p.tokens.format = QuantFormat::fp8_token(); }));
  EXPECT_FALSE(taken([](PlanQuantizeProblem& p) { p.tokens.cols = p.tokens.padded_cols = 2044; }));
  const PlanQuantizeProblem p = plan_quantize_problem(1, 8, 128, 2048);
  cuda::PlanQuantizePolicy apart = cuda::select_plan_quantize_policy(p);
  apart.fused = 0;
  EXPECT_FALSE(cuda::plan_quantize_refusal(apart, p).empty());
}

}  // namespace
}  // namespace moecore::test
