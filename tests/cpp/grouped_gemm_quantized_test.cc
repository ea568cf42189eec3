// grouped_gemm on quantised operands: every pair of formats against a product in double of what the codes
// stand for. Exact where codes are small integers and scales powers of two (so that a scale of the wrong
// block cannot hide in a tolerance), within the derived bound on random codes and scales.

#include <algorithm>
#include <cmath>

#include "moecore/grouped_gemm.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/gemm_test.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

class GroupedGemmQuantized : public GemmTest {
 protected:
  std::string no_tilings() const {
    if (dtype() != DType::kBF16) return "tilings are those of bf16 results, which the bf16 instance has";
    return GemmTest::no_tilings();
  }

  /// Float x meets fp8 weights in the portable kernels alone.
  static bool has_tilings(const FormatPair& p) { return p.x || is_fp4(p.weights); }

  void for_all_pairs(const GemmCase& c, Values kind) {
    for (const FormatPair& p : format_pairs()) expect_gemm(p, c, kind);
  }
};

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyShape) {
  for (std::int64_t n : {1, 7, 32, 130})
    for (std::int64_t k : {1, 2, 16, 31, 34, 64, 100, 128, 130, 257, 384})
      for_all_pairs({.counts = {3, 0, 1, 17, 5}, .n = n, .k = k}, Values::kIntegers);
  for_all_pairs({.counts = {2, 0, 3}, .n = 300, .k = 300}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyRowCount) {
  for (std::int64_t rows : {0, 1, 2, 4, 7, 8, 9, 16, 31, 33, 40})
    for_all_pairs({.counts = {rows, 1, 0, rows}, .n = 48, .k = 160, .spare_rows = rows % 3},
                  Values::kIntegers);
  for_all_pairs({.counts = {200}, .n = 96, .k = 72}, Values::kIntegers);
  for_all_pairs({.counts = {0, 0, 0}, .n = 16, .k = 16, .spare_rows = 4}, Values::kIntegers);
  for_all_pairs({.counts = std::vector<std::int64_t>(129, 1), .n = 8, .k = 24}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyLayout) {
  for (const Place& place : places(DType::kU8))
    for (bool gather : {false, true})
      for (std::int64_t k : {2, 64, 200})
        for_all_pairs({.counts = {2, 9, 0, 33},
                       .n = 37,
                       .k = k,
                       .spare_rows = 3,
                       .gather = gather,
                       .as_bytes = place.byte_offset == 0,
                       .place = place},
                      Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, GlobalScaleForNoneOneOrEachExpert) {
  for (Global global : {Global::kNone, Global::kOne, Global::kPerExpert})
    for (const FormatPair& p : format_pairs()) {
      const GemmCase c{.counts = {5, 0, 2, 1}, .n = 40, .k = 96, .gather = true, .global = global};
      expect_gemm(p, c, Values::kIntegers);
      expect_gemm(p, c, Values::kRandom);
    }
}

TEST_P(GroupedGemmQuantized, RandomWithinTheBound) {
  for (auto [n, k] : {std::pair<std::int64_t, std::int64_t>{64, 64}, {130, 1000}, {256, 2048}, {33, 4100}})
    for_all_pairs({.counts = {1, 0, 4, 20}, .n = n, .k = k}, Values::kRandom);
  for_all_pairs({.counts = {1}, .n = 300, .k = 512}, Values::kRandom);
  for_all_pairs({.counts = {64, 64}, .n = 96, .k = 320, .gather = true}, Values::kRandom);
}

// The kernels of all GPUs, on those that have their own as well.
TEST_P(GroupedGemmQuantized, PortableKernels) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "a CUDA policy";
  for (std::int64_t k : {16, 130, 384}) {
    GemmCase c{.counts = {2, 9, 0, 33, 64}, .n = 144, .k = k, .spare_rows = 3, .gather = true};
    c.policy = "portable=1";
    for_all_pairs(c, Values::kIntegers);
    for_all_pairs(c, Values::kRandom);
    c.activation = Activation{};
    for_all_pairs(c, Values::kRandom);
  }
}

// Tiles of every width, cut along K or not, that the widest experts and the fewest rows lead to.
TEST_P(GroupedGemmQuantized, EveryTiling) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (std::int64_t tallest : {13, 90, 140})
    for (const char* policy : {"prefill=0", "prefill=1", "prefill=0 stream_k=1", "prefill=0 max_tokens=8"})
      for (bool gather : {false, true}) {
        GemmCase c{.counts = {tallest, 0, 1, tallest / 2, 7}, .n = 448, .k = 384, .gather = gather};
        c.policy = policy;
        for (const FormatPair& p : format_pairs())
          if (has_tilings(p)) expect_gemm(p, c, Values::kIntegers);
      }
}

// More tiles than SMs and an odd number of them, experts of one and of two token tiles: the two blocks of a
// pair meet the same weights, others, and the end at different times.
TEST_P(GroupedGemmQuantized, PairsOfBlocks) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (const FormatPair& p : format_pairs()) {
    if (!p.x || is_fp4(p.x) || is_fp4(p.weights)) continue;
    GemmCase c{.counts = {129, 0, 1, 130}, .n = 5120, .k = 272};
    for (const char* policy : {"prefill=1 pairs=0", "prefill=1 pairs=1"}) {
      c.policy = policy;
      expect_gemm(p, c, Values::kIntegers);
    }
    c.activation = Activation{};
    expect_gemm(p, c, Values::kRandom);
  }
}

// Tiles of whole rounds of the ring, of less and of more: later ones start at any of its stages.
TEST_P(GroupedGemmQuantized, RoundsOfTheRing) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (const FormatPair& p : format_pairs()) {
    if (!p.x || is_fp4(p.x) || is_fp4(p.weights)) continue;
    for (std::int64_t k : {640, 880}) {
      GemmCase c{.counts = {66, 2, 1, 3}, .n = 6400, .k = k, .gather = k == 640};
      c.policy = "prefill=1";
      expect_gemm(p, c, Values::kIntegers);
    }
  }
}

// More tiles than SMs, of fewer steps than the ring has stages: blocks ask for them in an order of their own.
TEST_P(GroupedGemmQuantized, TilesOnDemand) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (const FormatPair& p : format_pairs()) {
    if (!has_tilings(p)) continue;
    for (std::int64_t k : {96, 288}) {
      GemmCase c{.counts = {3, 1, 0, 33}, .n = 10240, .k = k, .gather = true};
      c.policy = "prefill=0 stream_k=0 dynamic=1";
      expect_gemm(p, c, Values::kIntegers);
    }
  }
}

// The epilogues of tiles that end inside the last rows of weights, and of tokens.
TEST_P(GroupedGemmQuantized, EveryTilingsEpilogue) {
  if (const std::string why = no_tilings(); !why.empty()) GTEST_SKIP() << why;
  for (const char* policy : {"prefill=0", "prefill=1"})
    for (const FormatPair& p : format_pairs()) {
      if (!has_tilings(p)) continue;
      GemmCase c{.counts = {70, 0, 1, 139, 64}, .n = 448, .k = 256, .spare_rows = 3, .bias = DType::kF32};
      c.policy = policy;
      c.row_weights = DType::kF32;
      expect_gemm(p, c, Values::kIntegers);
      for (GateOrder order : {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved}) {
        c.activation = Activation{.order = order};
        c.n = 640;
        expect_gemm(p, c, Values::kRandom);
      }
    }
}

TEST_P(GroupedGemmQuantized, ExtremeScales) {
  for (const FormatPair& p : format_pairs())
    if (has_e8m0(p.x) || has_e8m0(p.weights))
      expect_gemm(p, {.counts = {1, 0, 9}, .n = 37, .k = 130}, Values::kExtreme);
}

TEST_P(GroupedGemmQuantized, NoDepthGivesTheBias) {
  for (std::optional<DType> bias : {std::optional<DType>{}, std::optional{DType::kF32}})
    for_all_pairs({.counts = {2, 0, 5}, .n = 9, .k = 0, .bias = bias}, Values::kIntegers);
  for_all_pairs({.counts = {2, 3}, .n = 0, .k = 16}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, BiasRowWeightsAndActivation) {
  for (const FormatPair& p : format_pairs()) {
    for (DType bias : {DType::kF32, dtype()}) {
      GemmCase c{.counts = {1, 6, 0, 21}, .n = 50, .k = 136, .spare_rows = 2, .gather = true, .bias = bias};
      c.row_weights = DType::kF32;
      expect_gemm(p, c, Values::kIntegers);
      expect_gemm(p, c, Values::kRandom);
    }
    for (GateOrder order :
         {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain})
      for (std::int64_t n : {2, 34, 260}) {
        GemmCase c{.counts = {1, 5, 0, 18}, .n = n, .k = 64, .gather = true, .bias = DType::kF32};
        c.activation = Activation{.order = order};
        expect_gemm(p, c, Values::kRandom);
        c.activation = Activation{.kind = ActivationKind::kRelu, .order = order};
        expect_gemm(p, c, Values::kIntegers);
      }
    GemmCase c{.counts = {1, 0, 18}, .n = 60, .k = 96, .gather = true, .bias = dtype()};
    c.activation = Activation::gpt_oss();
    expect_gemm(p, c, Values::kRandom);
  }
}

// A code or a scale that is NaN is one, and stays where it belongs.
TEST_P(GroupedGemmQuantized, NanStaysInItsRowAndColumn) {
  const std::int64_t num_experts = 2, n = 140, k = 256, num_rows = 5, bad_row = 3, bad_col = 129;
  const Array offsets({num_experts + 1}, {0, 2, 5});
  for (const FormatPair& p : format_pairs())
    for (bool in_scales : {false, true}) {
      SCOPED_TRACE(::testing::Message() << p.name << (in_scales ? " scales" : " codes"));
      Random random(3);
      Operand x({.format = p.x, .float_type = dtype(), .shape = {num_rows, k}}, random),
          weights({.format = p.weights, .float_type = dtype(), .shape = {num_experts, n, k}}, random);
      auto spoil = [&](Operand& o, const Format& f, std::int64_t e, std::int64_t row) {
        if (!f) {
          o.values[row * k + 5] = std::nan("");
        } else if (in_scales) {
          const bool tensor = o.scales.shape[1] == 1;
          o.scales.at(e, tensor ? 0 : row / o.block_rows, 0) = std::nan("");
          o.decode();
        } else if (!is_fp4(f)) {
          const std::int64_t rows = o.values.size() / k / o.scales.shape[0];
          o.codes[static_cast<std::size_t>((e * rows + row) * k + 5)] = 0xFF;
          o.decode();
        }
      };
      spoil(x, p.x, 0, bad_row);
      spoil(weights, p.weights, 1, bad_col);
      x.upload(device());
      weights.upload(device());
      const Tensor offset_tensor(device(), DType::kI32, offsets);
      Tensor out(device(), dtype(), {num_rows, n});
      grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out,
                   {.x_scales = x.scale_view(), .weight_scales = weights.scale_view()},
                   Call(device(), workspace(p, num_rows, n, k, num_experts)));
      const Bounded expected = oracle::grouped_gemm(x.values, weights.values, offsets, num_rows, {});
      EXPECT_TRUE(equal(out.get(), oracle::round_to(dtype(), expected.value)));
    }
}

TEST_P(GroupedGemmQuantized, BitsDoNotDependOnThreadsOrRepeats) {
  const std::int64_t num_experts = 6, n = 200, k = 334, num_rows = 90;
  const Array offsets({num_experts + 1}, {0, 1, 1, 20, 25, 80, 88});
  const Tensor offset_tensor(device(), DType::kI32, offsets);
  for (const FormatPair& p : format_pairs()) {
    SCOPED_TRACE(p.name);
    Random random(8);
    Operand x({.format = p.x, .float_type = dtype(), .shape = {num_rows, k}, .values = Values::kRandom},
              random),
        weights({.format = p.weights,
                 .float_type = dtype(),
                 .shape = {num_experts, n, k},
                 .values = Values::kRandom},
                random);
    x.upload(device());
    weights.upload(device());
    std::optional<Array> first;
    for (int threads : {1, 2, 5, 3}) {
      Tensor out(device(), dtype(), {num_rows, n});
      grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out,
                   {.x_scales = x.scale_view(), .weight_scales = weights.scale_view()},
                   Call(device(), workspace(p, num_rows, n, k, num_experts), threads));
      if (!first)
        first = out.get();
      else
        EXPECT_TRUE(equal(out.get(), *first)) << threads << " threads";
    }
  }
}

// On the CPU a row's result is the same among many rows and alone, whichever kernel takes it.
TEST_P(GroupedGemmQuantized, BitsDoNotDependOnTheOtherRows) {
  if (device().type == DeviceType::kCUDA) GTEST_SKIP() << "a promise of the CPU engine";
  const std::int64_t n = 70, k = 1154, num_rows = 21;
  for (const FormatPair& p : format_pairs()) {
    SCOPED_TRACE(p.name);
    Random random(9);
    Operand x({.format = p.x, .float_type = dtype(), .shape = {num_rows, k}, .values = Values::kRandom},
              random),
        weights({.format = p.weights, .float_type = dtype(), .shape = {1, n, k}, .values = Values::kRandom},
                random);
    x.upload(device());
    weights.upload(device());
    auto product = [&](const std::vector<double>& which) {
      const auto rows = static_cast<std::int64_t>(which.size());
      const Tensor offsets(device(), DType::kI32, Array({2}, {0, static_cast<double>(rows)})),
          row_token(device(), DType::kI32, Array({rows}, which));
      Tensor out(device(), dtype(), {rows, n});
      grouped_gemm(x.view(), weights.view(), offsets.read_only(), out,
                   {.row_token = row_token.read_only(),
                    .x_scales = x.scale_view(),
                    .weight_scales = weights.scale_view()},
                   Call(device(), workspace(p, rows, n, k, 1)));
      return out.get().values;
    };
    std::vector<double> all;
    for (std::int64_t r = 0; r < num_rows; ++r) all.push_back(static_cast<double>(r));
    const std::vector<double> together = product(all);
    for (std::int64_t rows : {1, 2, 3, 4, 6, 9}) {
      const std::vector<double> part = product({all.begin(), all.begin() + rows});
      EXPECT_TRUE(std::equal(part.begin(), part.end(), together.begin())) << rows << " rows";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, GroupedGemmQuantized, ::testing::ValuesIn(devices_times(float_types())),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
