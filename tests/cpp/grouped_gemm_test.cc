// grouped_gemm: exact on small integers (so an index error cannot hide in a tolerance), within the derived
// bound on random values, with every fused option.

#include "moecore/grouped_gemm.h"

#include "support/cases.h"
#include "support/compare.h"
#include "support/gemm_test.h"

namespace moecore::test {
namespace {

class GroupedGemm : public GemmTest {
 protected:
  void expect_gemm(const GemmCase& c, Values kind) { GemmTest::expect_gemm({"floats", {}, {}}, c, kind); }

  std::string no_tilings() const {
    if (dtype() == DType::kF32) return "f32 has no tilings: the bf16 and f16 instances run this";
    return GemmTest::no_tilings();
  }
};

TEST_P(GroupedGemm, ExactOnIntegersForAnyShape) {
  for (std::int64_t n : {1, 2, 7, 16, 33, 64, 130})
    for (std::int64_t k : {1, 2, 5, 16, 31, 64, 100, 257})
      expect_gemm({.counts = {3, 0, 1, 17, 5}, .n = n, .k = k}, Values::kIntegers);
}

TEST_P(GroupedGemm, ExactOnIntegersForAnyRowCount) {
  for (std::int64_t rows = 0; rows <= 40; ++rows)
    expect_gemm({.counts = {rows, 1, 0, rows}, .n = 48, .k = 40, .spare_rows = rows % 3}, Values::kIntegers);
  expect_gemm({.counts = {300}, .n = 96, .k = 72}, Values::kIntegers);
  expect_gemm({.counts = {0, 0, 0}, .n = 16, .k = 16}, Values::kIntegers);
  expect_gemm({.counts = {0, 0, 0}, .n = 16, .k = 16, .spare_rows = 4}, Values::kIntegers);
  expect_gemm({.counts = std::vector<std::int64_t>(257, 1), .n = 8, .k = 24}, Values::kIntegers);
  std::vector<std::int64_t> hot(64, 0);
  hot[63] = 200;
  expect_gemm({.counts = hot, .n = 40, .k = 56}, Values::kIntegers);
}

TEST_P(GroupedGemm, ExactOnIntegersForAnyLayout) {
  for (const Place& place : places(dtype()))
    for (bool gather : {false, true})
      for (std::int64_t k : {1, 9, 64, 96})
        expect_gemm(
            {.counts = {2, 9, 0, 33}, .n = 37, .k = k, .spare_rows = 3, .gather = gather, .place = place},
            Values::kIntegers);
}

TEST_P(GroupedGemm, RandomWithinTheBound) {
  for (auto [n, k] :
       {std::pair<std::int64_t, std::int64_t>{64, 64}, {96, 256}, {130, 1000}, {256, 2048}, {33, 4100}})
    expect_gemm({.counts = {1, 0, 4, 40}, .n = n, .k = k}, Values::kRandom);
  expect_gemm({.counts = {1}, .n = 300, .k = 512}, Values::kRandom);
  expect_gemm({.counts = {64, 64}, .n = 192, .k = 320}, Values::kRandom);
}

TEST_P(GroupedGemm, NoDepthGivesTheBias) {
  for (std::int64_t n : {1, 8, 33}) {
    expect_gemm({.counts = {2, 0, 5}, .n = n, .k = 0}, Values::kIntegers);
    expect_gemm({.counts = {2, 0, 5}, .n = n, .k = 0, .bias = DType::kF32}, Values::kIntegers);
  }
  expect_gemm({.counts = {2, 3}, .n = 0, .k = 16}, Values::kIntegers);
}

TEST_P(GroupedGemm, BiasAndRowWeights) {
  for (std::optional<DType> bias :
       {std::optional<DType>{}, std::optional{DType::kF32}, std::optional{dtype()}})
    for (std::optional<DType> row_weights :
         {std::optional<DType>{}, std::optional{DType::kF32}, std::optional{dtype()}})
      for (bool gather : {false, true})
        for (const Place& place : places(dtype())) {
          GemmCase c{.counts = {1, 6, 0, 21}, .n = 50, .k = 36, .spare_rows = 2, .gather = gather};
          c.bias = bias;
          c.row_weights = row_weights;
          c.place = place;
          if (bias && place.byte_offset) c.place.byte_offset = 4;  // of f32 and 16-bit types alike
          expect_gemm(c, Values::kIntegers);
          expect_gemm(c, Values::kRandom);
        }
}

TEST_P(GroupedGemm, FusedActivation) {
  constexpr ActivationKind kKinds[] = {
      ActivationKind::kSilu, ActivationKind::kGelu,  ActivationKind::kGeluTanh, ActivationKind::kQuickGelu,
      ActivationKind::kRelu, ActivationKind::kRelu2, ActivationKind::kSwigluOai};
  for (ActivationKind kind : kKinds)
    for (GateOrder order :
         {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain})
      for (std::int64_t n : {2, 34, 96}) {
        Activation a{.kind = kind, .order = order};
        if (kind == ActivationKind::kSwigluOai) a = Activation::gpt_oss(order);
        GemmCase c{
            .counts = {1, 5, 0, 18}, .n = n, .k = 40, .spare_rows = 3, .gather = true, .bias = DType::kF32};
        c.activation = a;
        expect_gemm(c, Values::kRandom);
        c.counts = {0, 1, 0, 1};
        c.row_weights = DType::kF32;
        expect_gemm(c, Values::kRandom);
      }
}

TEST_P(GroupedGemm, FusedReluIsExactOnIntegers) {
  // relu(gate) * up of integers is an integer: catches gate and up changing places without a tolerance.
  for (GateOrder order : {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved})
    for (std::int64_t n : {2, 6, 30, 64, 100})
      for (const Place& place : places(dtype())) {
        GemmCase c{.counts = {7, 1, 0, 12}, .n = n, .k = 12, .gather = true};
        c.activation = Activation{.kind = ActivationKind::kRelu, .order = order};
        c.place = place;
        expect_gemm(c, Values::kIntegers);
      }
}

TEST_P(GroupedGemm, EveryTiling) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (const char* policy :
       {"prefill=0 stream_k=0", "prefill=0 stream_k=1", "prefill=1 pairs=0", "prefill=1 pairs=1"})
    for (bool gather : {false, true}) {
      GemmCase c{.counts = {190, 0, 1, 95, 7}, .n = 576, .k = 328, .spare_rows = 3, .gather = gather};
      c.policy = policy;
      expect_gemm(c, Values::kIntegers);
      for (GateOrder order : {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved}) {
        c.activation = Activation{.order = order};
        expect_gemm(c, Values::kRandom);
      }
    }
}

// More tiles than SMs and an odd number of them, experts of one and of two token tiles: the two blocks of a
// pair meet the same weights, others, and the end at different times.
TEST_P(GroupedGemm, PairsOfBlocks) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (bool gather : {false, true}) {
    GemmCase c{.counts = {177, 0, 1, 178}, .n = 6912, .k = 200, .gather = gather};
    c.policy = "prefill=1 pairs=1";
    expect_gemm(c, Values::kIntegers);
    c.activation = Activation{};
    expect_gemm(c, Values::kRandom);
  }
}

// More tiles than SMs, of one step to fewer than the ring has stages, again and again: blocks ask for them in
// an order of their own, and the counter opens and closes in a workspace full of poison.
TEST_P(GroupedGemm, TilesOnDemand) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (std::int64_t k : {56, 104, 136, 200})
    for (const char* policy : {"prefill=0 stream_k=0 dynamic=0", "prefill=0 stream_k=0 dynamic=1"})
      for (int repeat = 0; repeat < 3; ++repeat) {
        GemmCase c{.counts = {40, 1, 0, 33}, .n = 6912, .k = k, .gather = true};
        c.policy = policy;
        expect_gemm(c, Values::kIntegers);
      }
}

TEST_P(GroupedGemm, RowsInDescendingOrder) {
  for (std::int64_t k : {40, 43}) {
    constexpr std::int64_t kRows = 9, kExperts = 2, kColumns = 48;
    Random random(5);
    const Tensor x(device(), dtype(), random.integers({kRows, k}, -3, 3)),
        weights(device(), dtype(), random.integers({kExperts, kColumns, k}, -3, 3)),
        offsets(device(), DType::kI32, Array({3}, {0, 4, 9})),
        mirrored(device(), DType::kI32, Array({kRows}, {8, 7, 6, 5, 4, 3, 2, 1, 0}));
    Tensor out(device(), dtype(), {kRows, kColumns}), expected(device(), dtype(), {kRows, kColumns});
    const std::size_t bytes = grouped_gemm_workspace_bytes(kRows, kColumns, k, kExperts, dtype(), device());
    grouped_gemm(x.descending(), weights, offsets, out, {}, Call(device(), bytes));
    GroupedGemmOptions gather;
    gather.row_token = mirrored.read_only();
    grouped_gemm(x, weights, offsets, expected, gather, Call(device(), bytes));
    EXPECT_TRUE(equal(out.get(), expected.get())) << k;
  }
}

TEST_P(GroupedGemm, BitsDoNotDependOnThreadsOrRepeats) {
  Random random(8);
  const std::int64_t num_experts = 6, n = 200, k = 333, num_rows = 90;
  const Array offsets({num_experts + 1}, {0, 1, 1, 20, 25, 80, 88});
  const Tensor x(device(), dtype(), random.floats({num_rows, k}, dtype())),
      weights(device(), dtype(), random.floats({num_experts, n, k}, dtype())),
      offset_tensor(device(), DType::kI32, offsets);
  std::optional<Array> first;
  for (int threads : {1, 2, 5, 1, 3}) {
    Tensor out(device(), dtype(), {num_rows, n});
    grouped_gemm(x, weights, offset_tensor, out, {},
                 Call(device(), grouped_gemm_workspace_bytes(num_rows, n, k, num_experts, dtype(), device()),
                      threads));
    if (!first)
      first = out.get();
    else
      EXPECT_TRUE(equal(out.get(), *first)) << threads << " threads";
  }
}

INSTANTIATE_TEST_SUITE_P(, GroupedGemm, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
