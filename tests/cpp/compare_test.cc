// The comparators and the oracle's conversions, before anything relies on them.

#include "support/compare.h"

#include <bit>
#include <cmath>
#include <limits>

#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Array one(double v) {
  return Array({1}, std::vector<double>{v});
}
Bounded near(double v, double bound) {
  return {one(v), one(bound)};
}

TEST(CompareEqual, AcceptsTheSameBits) {
  EXPECT_TRUE(equal(one(1.5), one(1.5)));
  EXPECT_TRUE(equal(one(kNaN), one(-kNaN)));
  EXPECT_TRUE(equal(one(-kInf), one(-kInf)));
  EXPECT_TRUE(equal(Array({0, 3}), Array({0, 3})));
}

TEST(CompareEqual, FlagsEveryDifference) {
  EXPECT_FALSE(equal(one(1.0), one(std::nextafter(1.0, 2.0))));
  EXPECT_FALSE(equal(one(kNaN), one(1.0)));
  EXPECT_FALSE(equal(one(1.0), one(kNaN)));
  EXPECT_FALSE(equal(one(kInf), one(-kInf)));
  EXPECT_FALSE(equal(one(0.0), one(-0.0)));
  EXPECT_FALSE(equal(one(-1.0), one(-2.0)));
  EXPECT_FALSE(equal(one(-1.0), one(1.0)));
}

TEST(CompareEqual, FlagsShapes) {
  EXPECT_FALSE(equal(Array({2, 3}), Array({3, 2})));
  EXPECT_FALSE(equal(Array({6}), Array({2, 3})));
  EXPECT_FALSE(equal(Array({0}), Array({1})));
  EXPECT_FALSE(equal(Array({0, 3}), Array({0, 4})));
}

TEST(CompareEqual, FindsOneBadElementAmongMany) {
  Array a({100, 7}, 1.0), b = a;
  b.at(99, 6) = 2.0;
  const auto result = equal(b, a);
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("[99,6]"), std::string::npos) << result.message();
}

TEST(CompareWithin, AcceptsTheRoundedIntervalOnly) {
  // bf16 has 8 significant bits: its neighbours of 1 are 1 - 2^-8 and 1 + 2^-7.
  EXPECT_TRUE(within(one(1.0), near(1.0 + 0x1p-9, 0), DType::kBF16));
  EXPECT_FALSE(within(one(1.0 + 0x1p-7), near(1.0 + 0x1p-9, 0), DType::kBF16));
  EXPECT_TRUE(within(one(1.0 + 0x1p-7), near(1.0 + 0x1p-9, 0x1p-8), DType::kBF16));
  EXPECT_FALSE(within(one(1.0), near(1.1, 0.01), DType::kF32));
  EXPECT_FALSE(within(one(-1.0), near(-2.0, 0.5), DType::kF32));
  EXPECT_FALSE(within(one(-2.0), near(-1.0, 0.5), DType::kF32));
  EXPECT_FALSE(within(one(1.0), near(-1.0, 0.5), DType::kF32));
}

TEST(CompareWithin, HoldsNaNAndInfinity) {
  EXPECT_TRUE(within(one(kNaN), near(kNaN, 0), DType::kF32));
  EXPECT_FALSE(within(one(kNaN), near(1, 1e30), DType::kF32));
  EXPECT_FALSE(within(one(1), near(kNaN, 1e30), DType::kF32));
  EXPECT_FALSE(within(one(1), near(1, kNaN), DType::kF32));
  EXPECT_TRUE(within(one(kInf), near(kInf, 0), DType::kF32));
  EXPECT_FALSE(within(one(-kInf), near(kInf, 1), DType::kF32));
  EXPECT_FALSE(within(one(3e38), near(kInf, 1), DType::kF32));
  EXPECT_FALSE(within(one(kInf), near(1e30, 1e29), DType::kF32));
  // 65520 rounds to infinity in f16; 65500 does not.
  EXPECT_TRUE(within(one(kInf), near(65519, 2), DType::kF16));
  EXPECT_FALSE(within(one(kInf), near(65500, 2), DType::kF16));
}

TEST(CompareWithin, FlagsShapes) {
  EXPECT_FALSE(within(Array({2}), Bounded{Array({1}), Array({1})}, DType::kF32));
  EXPECT_FALSE(within(Array({1}), Bounded{Array({1}), Array({2})}, DType::kF32));
}

TEST(OracleFormats, KnownBitPatterns) {
  EXPECT_EQ(oracle::encode(DType::kBF16, 1.0), 0x3F80u);
  EXPECT_EQ(oracle::encode(DType::kBF16, 1.0 + 0x1p-8), 0x3F80u);        // tie to even
  EXPECT_EQ(oracle::encode(DType::kBF16, 1.0 + 3 * 0x1p-8), 0x3F82u);    // tie to even, upwards
  EXPECT_EQ(oracle::encode(DType::kBF16, 1.0 + 0x1.00001p-8), 0x3F81u);  // just above the tie
  EXPECT_EQ(oracle::encode(DType::kBF16, 3.4e38), 0x7F80u);
  EXPECT_EQ(oracle::encode(DType::kBF16, 0x1p-133), 0x0001u);  // smallest subnormal
  EXPECT_EQ(oracle::encode(DType::kBF16, 0x1p-134), 0x0000u);
  EXPECT_EQ(oracle::encode(DType::kBF16, -0.0), 0x8000u);
  EXPECT_EQ(oracle::encode(DType::kF16, 65504), 0x7BFFu);
  EXPECT_EQ(oracle::encode(DType::kF16, 65519.99), 0x7BFFu);
  EXPECT_EQ(oracle::encode(DType::kF16, 65520), 0x7C00u);
  EXPECT_EQ(oracle::encode(DType::kF16, 0x1p-24), 0x0001u);
  EXPECT_EQ(oracle::encode(DType::kF16, 0x1p-25), 0x0000u);
  EXPECT_EQ(oracle::encode(DType::kF16, 0x1.8p-25), 0x0001u);
  EXPECT_EQ(oracle::encode(DType::kF16, -kInf), 0xFC00u);
  EXPECT_EQ(oracle::encode(DType::kI32, -1), 0xFFFFFFFFu);
}

TEST(OracleFormats, EveryHalfSurvivesARoundTrip) {
  for (DType dtype : {DType::kF16, DType::kBF16})
    for (std::uint64_t bits = 0; bits < 65536; ++bits) {
      const double v = oracle::decode(dtype, bits);
      if (std::isnan(v))
        EXPECT_TRUE(std::isnan(oracle::round_to(dtype, v)));
      else
        ASSERT_EQ(oracle::encode(dtype, v), bits) << name(dtype);
    }
}

TEST(OracleFormats, F32IsTheMachinesOwn) {
  Random random(7);
  for (int i = 0; i < 200000; ++i) {
    const double v = std::ldexp(random.uniform(-1, 1), static_cast<int>(random.below(290)) - 155);
    ASSERT_EQ(oracle::encode(DType::kF32, v), std::bit_cast<std::uint32_t>(static_cast<float>(v))) << v;
  }
}

TEST(TensorSupport, NoticesWritesOutside) {
  const Device cpu{};
  Tensor t(cpu, DType::kF32, {3, 5}, {"strided", 2, 4});
  EXPECT_TRUE(t.surroundings_intact());
  EXPECT_TRUE(t.untouched());
  auto* data = static_cast<float*>(t.view().data);
  data[0] = 1;
  data[2 * 7 + 4] = 2;
  EXPECT_TRUE(t.surroundings_intact());
  EXPECT_FALSE(t.untouched());
  data[5] = 3;  // padding behind the first row
  EXPECT_FALSE(t.surroundings_intact());
#if !defined(__SANITIZE_ADDRESS__)
  Tensor behind(cpu, DType::kF32, {3, 5}), before(cpu, DType::kF32, {3, 5});
  static_cast<float*>(behind.view().data)[15] = 1;
  EXPECT_FALSE(behind.surroundings_intact());
  static_cast<float*>(before.view().data)[-1] = 1;
  EXPECT_FALSE(before.surroundings_intact());
#endif
}

TEST(TensorSupport, PoisonIsNaNOrOutOfRange) {
  const Device cpu{};
  for (DType dtype : float_types()) EXPECT_TRUE(std::isnan(Tensor(cpu, dtype, {1}).get()[0])) << name(dtype);
  EXPECT_LT(Tensor(cpu, DType::kI32, {1}).get()[0], -1);
  EXPECT_LT(Tensor(cpu, DType::kI64, {1}).get()[0], -1);
}

}  // namespace
}  // namespace moecore::test
