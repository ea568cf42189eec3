// The launch policies of grouped_gemm and of layers in one kernel, plain host code.

#include <gtest/gtest.h>

#include <cstdint>

#include "cuda/decode/policy.h"
#include "cuda/grouped_gemm/policy.h"

namespace moecore::test {
namespace {

constexpr int kMaxThreads = 1024;

TEST(PolicyGroupedGemm, TilesFitTheCopyEngineAndTheWorkspace) {
  for (const auto& tilings : cuda::sm90::kTileConfigs)
    for (const cuda::sm90::TileConfig& config : tilings) {
      SCOPED_TRACE(config.name);
      EXPECT_LE(config.threads(), kMaxThreads);
      EXPECT_LE(config.rows(), 256);  // of a box of the copy engine
      EXPECT_EQ(config.max_tokens % 8, 0);
      if (config.shares) {
        EXPECT_LE(config.warpgroups, cuda::sm90::Sharing::kMaxWarpgroups);
        EXPECT_LE(static_cast<std::size_t>(config.rows() * config.max_tokens),
                  cuda::sm90::Sharing::kSlotFloats);
      }
    }
}

TEST(PolicyGroupedGemm, TilesWithWholeBlocksOfScalesLeaveCodes) {
  constexpr FormPair kBlocks{OperandForm::kFp8Block128, OperandForm::kFp8Block128};
  auto refusal = [](const cuda::sm90::Policy& policy, FormPair forms, bool gated, std::int64_t columns,
                    const QuantFormat& format) {
    return cuda::sm90::quantized_out_refusal(policy, forms, gated, columns, format);
  };
  // A tile must have all the columns of a scale: 128 of out, from 256 gated weight rows.
  for (int prefill : {0, 1}) {
    cuda::sm90::Policy policy{.family = cuda::sm90::Family::kFp8, .prefill = prefill};
    const bool whole = policy.tiles().rows() == 256;
    for (std::int64_t columns : {128, 768, 1536, 2048})
      EXPECT_EQ(refusal(policy, kBlocks, true, columns, QuantFormat::fp8_block128()).empty(), whole)
          << columns;
    for (std::int64_t columns : {64, 192, 1408 + 16})
      EXPECT_FALSE(refusal(policy, kBlocks, true, columns, QuantFormat::fp8_block128()).empty()) << columns;
    EXPECT_FALSE(refusal(policy, kBlocks, false, 768, QuantFormat::fp8_block128()).empty());
    policy.quantize_out = 0;
    EXPECT_FALSE(refusal(policy, kBlocks, true, 768, QuantFormat::fp8_block128()).empty());
  }
  const cuda::sm90::Policy narrow{.family = cuda::sm90::Family::kFp8};
  EXPECT_TRUE(refusal(narrow, kBlocks, true, 768, QuantFormat::fp8_block128()).empty());
  for (const QuantFormat& format :
       {QuantFormat::fp8_token(), QuantFormat::mxfp8(), QuantFormat::nvfp4(),
        QuantFormat::fp8_block128_e8m0(), QuantFormat::fp8_block128(ScaleLayout::kColumnMajor)})
    EXPECT_FALSE(refusal(narrow, kBlocks, true, 768, format).empty());
  const FormPair tokens{OperandForm::kFp8Token, OperandForm::kFp8Token};
  EXPECT_FALSE(refusal(narrow, tokens, true, 768, QuantFormat::fp8_token()).empty());
  EXPECT_FALSE(refusal(narrow, tokens, true, 768, QuantFormat::fp8_block128()).empty());
  for (cuda::sm90::Family family : {cuda::sm90::Family::kFloat, cuda::sm90::Family::kDecoded})
    for (const cuda::sm90::TileConfig& config : cuda::sm90::kTileConfigs[static_cast<int>(family)])
      EXPECT_FALSE(cuda::sm90::holds_scale_blocks(family, config)) << config.name;
}

TEST(PolicyGroupedGemm, ManyRowsOfFp8HaveRoomToStandInOrder) {
  constexpr FormPair kBlocks{OperandForm::kFp8Block128, OperandForm::kFp8Block128};
  constexpr std::int64_t kExperts = 128, kDepth = 2048;
  auto choose = [](std::int64_t rows) {
    return cuda::sm90::select_policy(kBlocks, rows, kExperts, 1536, kDepth, 132);
  };
  const cuda::sm90::Policy few = choose(16 * kExperts), many = choose(64 * kExperts);
  EXPECT_FALSE(few.tiles().tokens_are_rows());
  EXPECT_EQ(few.pairs, 0);
  EXPECT_EQ(many.pairs, 1);
  EXPECT_EQ(few.dynamic, 1);
  EXPECT_EQ(many.dynamic, 0);
  EXPECT_EQ(few.tiles().token_step(), 8);
  EXPECT_EQ(cuda::sm90::workspace_bytes(few, 16 * kExperts, kDepth), cuda::sm90::Sharing::kBytes);
  EXPECT_TRUE(many.tiles().tokens_are_rows());
  EXPECT_EQ(many.tiles().token_step(), many.tiles().max_tokens);
  // Codes, and a scale of four bytes for 128 of them.
  EXPECT_EQ(cuda::sm90::workspace_bytes(many, 64 * kExperts, kDepth),
            64u * kExperts * (kDepth + kDepth / 32));
  for (const auto& tilings : cuda::sm90::kTileConfigs)
    for (const cuda::sm90::TileConfig& config : tilings) {
      EXPECT_TRUE(config.whole_boxes()) << config.name;
      // Widths are rounded by a mask.
      EXPECT_EQ(config.token_step() & (config.token_step() - 1), 0) << config.name;
      EXPECT_TRUE(!config.tokens_are_rows() || config.box_tokens > 0) << config.name;
    }
}

// Columns that start at multiples of 16 bytes, of rows in order, come as they are.
TEST(PolicyGroupedGemm, ScalesThatAreNoColumnsArePrepared) {
  alignas(16) const std::byte scales[16]{};
  const std::int32_t row_token = 0;
  GroupedGemmProblem p;
  p.x_scales = {.form = OperandForm::kFp8Block128, .data = scales, .row_pitch = 4, .col_pitch = 32};
  EXPECT_FALSE(cuda::sm90::needs_prepared_scales(p));
  auto prepared = [&](auto change) {
    GroupedGemmProblem changed = p;
    change(changed);
    return cuda::sm90::needs_prepared_scales(changed);
  };
  EXPECT_TRUE(prepared([&](GroupedGemmProblem& c) { c.row_token = &row_token; }));
  EXPECT_TRUE(prepared([](GroupedGemmProblem& c) { c.x_scales.data += 4; }));
  EXPECT_TRUE(prepared([](GroupedGemmProblem& c) { c.x_scales.col_pitch = 36; }));
  EXPECT_TRUE(prepared([](GroupedGemmProblem& c) { c.x_scales.col_pitch = -32; }));
  EXPECT_TRUE(prepared([](GroupedGemmProblem& c) { std::swap(c.x_scales.row_pitch, c.x_scales.col_pitch); }));
  EXPECT_FALSE(prepared([](GroupedGemmProblem& c) { c.x_scales = {.form = OperandForm::kFp8Token}; }));
  EXPECT_EQ(cuda::sm90::prepared_scale_bytes(5, 257), 3u * 8 * 4);
}

// From two token tiles an expert on, and where pairing costs nothing.
TEST(PolicyGroupedGemm, BlocksPairWhereTheyMeetTheSameWeights) {
  auto pairs = [](FormPair forms, std::int64_t rows_per_expert) {
    constexpr std::int64_t kExperts = 128;
    return cuda::sm90::select_policy(forms, rows_per_expert * kExperts, kExperts, 1536, 2048, 132).pairs;
  };
  for (OperandForm form : {OperandForm::kFp8Block128, OperandForm::kFp8Token, OperandForm::kFp8Tensor}) {
    EXPECT_EQ(pairs({form, form}, 16), 0);
    EXPECT_EQ(pairs({form, form}, 64), 1);
    EXPECT_EQ(pairs({form, form}, 256), 1);
  }
  EXPECT_EQ(pairs({}, 16), 0);
  EXPECT_EQ(pairs({}, 128), 0);
  EXPECT_EQ(pairs({}, 256), 1);
  EXPECT_EQ(pairs({OperandForm::kFloat, OperandForm::kMxfp4}, 256), 0);
}

TEST(PolicyGroupedGemm, LinesComeAheadOfTheirStepWhereTilesShareThem) {
  auto promotion = [](FormPair forms, std::int64_t rows_per_expert, std::int64_t weight_rows) {
    constexpr std::int64_t kExperts = 128;
    return cuda::sm90::select_policy(forms, rows_per_expert * kExperts, kExperts, weight_rows, 2048, 132)
        .promotion;
  };
  for (FormPair forms : {FormPair{}, FormPair{OperandForm::kFp8Block128, OperandForm::kFp8Block128}}) {
    EXPECT_EQ(promotion(forms, 1, 1536), 128);
    EXPECT_EQ(promotion(forms, 64, 1536), 128);
    EXPECT_EQ(promotion(forms, 256, 1536), 256);
  }
  // fp4: with what is evicted first, as long as it is no more than leaves L2 room.
  const FormPair fp4{OperandForm::kFloat, OperandForm::kMxfp4};
  EXPECT_EQ(promotion(fp4, 1, 1536), 128);
  EXPECT_EQ(promotion(fp4, 1, 6144), 256);
  EXPECT_EQ(promotion(fp4, 64, 1536), 256);
}

// gpt-oss-120b, routed evenly: the winners of bench/results/h200-gemm-fp4-2026-11-24.jsonl.
TEST(PolicyGroupedGemm, TilesOfFp4WeightsFollowTheRowsOfAnExpert) {
  struct Choice {
    std::int64_t tokens;
    int prefill, stream_k;
  };
  for (OperandForm weights : {OperandForm::kMxfp4, OperandForm::kNvfp4})
    for (std::int64_t weight_rows : {5760, 2880})
      for (const Choice& best :
           {Choice{1, 0, 1}, Choice{8, 0, 1}, Choice{64, 0, 1}, Choice{256, 0, 0}, Choice{512, 0, 0},
            Choice{1024, 0, 0}, Choice{4096, 1, 0}, Choice{16384, 1, 0}}) {
        SCOPED_TRACE(::testing::Message() << best.tokens << " tokens, " << weight_rows << " weight rows");
        const cuda::sm90::Policy policy = cuda::sm90::select_policy(
            {OperandForm::kFloat, weights}, 4 * best.tokens, 128, weight_rows, 2880, 132);
        EXPECT_EQ(policy.prefill, best.prefill);
        EXPECT_EQ(policy.stream_k, best.stream_k);
        EXPECT_EQ(policy.max_tokens, best.prefill ? 192 : 32);
        EXPECT_EQ(policy.evict_weights, best.tokens == 1 || (best.tokens == 8 && weight_rows == 2880));
        EXPECT_EQ(policy.pairs, 0);
      }
}

TEST(PolicyDecode, StepsCoverTheDepthAndStagesFit) {
  constexpr int kSmemOfAnSm90 = 227 * 1024, kSmallestRing = kSmemOfAnSm90 - 64 * 1024;
  struct Form {
    int bits, block, scale_bytes;
  };
  for (const Form& f : {Form{16, 0, 0}, Form{8, 0, 4}, Form{8, 128, 4}, Form{4, 32, 1}, Form{4, 16, 1}})
    for (int k : {32, 64, 96, 768, 2048, 2880, 7168, 14336, 16384})
      for (int row_bytes : {512, 1024, 2048, 4096}) {
        SCOPED_TRACE(::testing::Message() << f.bits << " bits, blocks of " << f.block << ", k " << k
                                          << " in steps of " << row_bytes << " bytes");
        const cuda::decode::Steps s = cuda::decode::cut_depth(k, f.bits, f.block, f.scale_bytes, row_bytes);
        EXPECT_GE(s.count * s.depth, k);
        EXPECT_LT((s.count - 1) * s.depth, k);
        EXPECT_EQ(s.depth % cuda::decode::kChunk, 0);
        if (f.block) {
          EXPECT_EQ(s.depth % f.block, 0);
          EXPECT_GE(s.scale_pitch, s.depth / f.block * f.scale_bytes + 15);
        }
        EXPECT_GE(s.weight_pitch, s.depth * f.bits / 8);
        EXPECT_GE(s.x_pitch, s.depth * 2);
        for (int pitch : {s.weight_pitch, s.scale_pitch, s.x_pitch}) EXPECT_EQ(pitch % 16, 0);
        if (row_bytes == 512) {
          EXPECT_LE(2 * s.bytes(cuda::decode::kMaxRows), kSmallestRing);
        }
      }
}

TEST(PolicyDecode, TakesOneTokenOfSmallLayersWithinItsLimits) {
  constexpr std::int64_t kQwen3 = 8 * 3 * 768 * 2048 * 2, kMixtral = 2 * 3 * 14336ll * 4096 * 2;
  EXPECT_EQ(cuda::decode::select_policy(1, kQwen3, false).fused, 1);
  EXPECT_EQ(cuda::decode::select_policy(1, kMixtral, false).fused, 0);
  EXPECT_EQ(cuda::decode::select_policy(1, kQwen3 / 2, true).fused, 0);
  for (std::int64_t tokens : {0, 1, 2, 8, 64, 512}) {
    const cuda::decode::Policy policy = cuda::decode::select_policy(tokens, tokens * kQwen3, false);
    EXPECT_EQ(policy.fused, tokens == 1);
    EXPECT_GE(policy.rows, 1);
    EXPECT_LE(policy.rows, cuda::decode::kMaxRows);
    EXPECT_LE(policy.stages, cuda::decode::kMaxStages);
  }
  EXPECT_LE(cuda::decode::kThreads, kMaxThreads);
}

}  // namespace
}  // namespace moecore::test
