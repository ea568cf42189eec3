// The conversions between f32 and the small formats against tables made from the formats' definitions: every
// bf16 and f16 value, every tie with its neighbours, and a dense sample of f32. Includes src/core/numeric.h,
// the one internal header that tests read: its rules are what every engine's own conversions must equal.

#include "core/numeric.h"

#include <bit>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "support/oracle.h"
#include "support/quantize_oracle.h"

namespace moecore::test {
namespace {

using oracle::SmallFloat;

struct Format {
  const char* name;
  const SmallFloat& table;
  std::uint8_t (*encode)(float);
  float (*decode)(std::uint8_t);
};
const Format kFormats[] = {
    {"e4m3", SmallFloat::e4m3(), numeric::f32_to_e4m3, numeric::e4m3_to_f32},
    {"e5m2", SmallFloat::e5m2(), numeric::f32_to_e5m2, numeric::e5m2_to_f32},
    {"e2m1", SmallFloat::e2m1(), numeric::f32_to_e2m1, numeric::e2m1_to_f32},
};

/// Every tie and every value of the format, the floats next to them, and multiples of them up to overflow.
std::vector<float> landmarks(const SmallFloat& table) {
  std::vector<float> points{0.0f,
                            std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::denorm_min(),
                            std::numeric_limits<float>::max(),
                            std::numeric_limits<float>::quiet_NaN(),
                            0x1p-126f};
  for (std::size_t code = 0; code < table.values.size(); ++code) {
    points.push_back(static_cast<float>(table.values[code]));
    const double next = code + 1 < table.values.size() ? table.values[code + 1] : table.values[code] * 1.25;
    points.push_back(static_cast<float>((table.values[code] + next) / 2));
  }
  std::vector<float> all;
  for (float p : points)
    for (float q : {p, std::nextafter(p, 0.0f), std::nextafter(p, std::numeric_limits<float>::infinity())})
      for (float r : {q, -q}) all.push_back(r);
  return all;
}

/// Calls check(x) for all bf16 and f16 values and 2^22 evenly spread f32 bit patterns.
template <class Check>
void for_many_floats(Check&& check) {
  for (std::uint32_t h = 0; h < 65536; ++h) {
    check(std::bit_cast<float>(h << 16));
    check(static_cast<float>(oracle::decode(DType::kF16, h)));
  }
  for (std::uint32_t i = 0; i < 1u << 22; ++i) check(std::bit_cast<float>(i * 1024u + i % 1021u));
}

TEST(Numeric, MinifloatsRoundToNearestEven) {
  for (const Format& f : kFormats) {
    SCOPED_TRACE(f.name);
    std::int64_t wrong = 0;
    auto check = [&](float x) {
      if (f.encode(x) == f.table.encode(x)) return;
      if (++wrong <= 10)
        ADD_FAILURE() << x << ": " << int(f.encode(x)) << ", expected " << int(f.table.encode(x));
    };
    for (float x : landmarks(f.table)) check(x);
    for_many_floats(check);
    EXPECT_EQ(wrong, 0);
  }
}

TEST(Numeric, MinifloatsDecode) {
  for (const Format& f : kFormats) {
    SCOPED_TRACE(f.name);
    const bool e5m2 = f.decode == numeric::e5m2_to_f32;
    for (int code = 0; code < (f.table.sign == 8 ? 16 : 256); ++code) {
      const double expected = f.table.decode(static_cast<std::uint8_t>(code));
      const float actual = f.decode(static_cast<std::uint8_t>(code));
      if (e5m2 && (code & 0x7F) == 0x7C) {
        EXPECT_TRUE(std::isinf(actual));
      } else if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(actual)) << code;
      } else {
        EXPECT_EQ(std::bit_cast<std::uint32_t>(actual),
                  std::bit_cast<std::uint32_t>(static_cast<float>(expected)))
            << code;
        EXPECT_EQ(f.encode(actual), code);
      }
    }
  }
}

TEST(Numeric, E8m0) {
  auto check = [](float x) {
    ASSERT_EQ(numeric::f32_to_e8m0_up(x), oracle::e8m0_up(x)) << x;
    ASSERT_EQ(numeric::f32_to_e8m0_nearest(x), oracle::e8m0_nearest(x)) << x;
  };
  for (std::uint32_t exponent = 0; exponent < 256; ++exponent)
    for (std::uint32_t mantissa :
         {0u, 1u, 0x3FFFFFu, 0x400000u, 0x400001u, 0x5FFFFFu, 0x600000u, 0x600001u, 0x7FFFFFu})
      for (std::uint32_t sign : {0u, 1u}) check(std::bit_cast<float>(sign << 31 | exponent << 23 | mantissa));
  for (std::uint32_t h = 0; h < 65536; h += 7) check(std::bit_cast<float>(h << 16));
  for (int code = 0; code < 256; ++code) {
    const float value = numeric::e8m0_to_f32(static_cast<std::uint8_t>(code));
    if (code == 255)
      EXPECT_TRUE(std::isnan(value));
    else
      EXPECT_EQ(value, std::ldexp(1.0f, code - 127));
  }
}

// The integer rule for amax / 448 is the rounding up of the exact quotient, for every bf16 and f16 magnitude
// and on both sides of where it turns.
TEST(Numeric, PowerOfTwoScales) {
  auto check = [](float amax) {
    ASSERT_EQ(numeric::power_of_two_scale(amax, numeric::kScaleBy448), oracle::e8m0_up(double(amax) / 448))
        << amax;
    ASSERT_EQ(numeric::power_of_two_scale(amax, numeric::kScaleBy6Up), oracle::e8m0_up(double(amax) / 6))
        << amax;
  };
  for (std::uint32_t h = 0; h < 0x8000; ++h) {
    check(std::bit_cast<float>(h << 16));
    check(static_cast<float>(oracle::decode(DType::kF16, h)));
  }
  for (std::uint32_t exponent = 0; exponent < 255; ++exponent)
    for (std::uint32_t mantissa : {0u, 1u, 0x400000u, 0x400001u, 0x5FFFFFu, 0x600000u, 0x600001u, 0x7FFFFFu})
      check(std::bit_cast<float>(exponent << 23 | mantissa));
  for (int e = 1; e < 255; ++e)
    EXPECT_EQ(
        double(numeric::power_of_two_reciprocal(static_cast<std::uint8_t>(e))) * std::ldexp(1.0, e - 127), 1);
}

TEST(Numeric, SixteenBitFloats) {
  for (std::uint32_t h = 0; h < 65536; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    const double f16 = oracle::decode(DType::kF16, h), bf16 = oracle::decode(DType::kBF16, h);
    if (std::isnan(f16)) {
      EXPECT_TRUE(std::isnan(numeric::f16_to_f32(half)));
      EXPECT_GT(numeric::f32_to_f16(numeric::f16_to_f32(half)) & 0x7FFF, 0x7C00);
    } else {
      ASSERT_EQ(double(numeric::f16_to_f32(half)), f16);
      ASSERT_EQ(numeric::f32_to_f16(numeric::f16_to_f32(half)), half);
    }
    if (std::isnan(bf16))
      EXPECT_GT(numeric::f32_to_bf16(numeric::bf16_to_f32(half)) & 0x7FFF, 0x7F80);
    else
      ASSERT_EQ(double(numeric::bf16_to_f32(half)), bf16);
  }
  for (std::uint32_t i = 0; i < 1u << 20; ++i) {
    const float x = std::bit_cast<float>(i * 4096u + i % 4093u);
    if (std::isnan(x)) continue;
    ASSERT_EQ(numeric::f32_to_f16(x), oracle::encode(DType::kF16, x)) << x;
    ASSERT_EQ(numeric::f32_to_bf16(x), oracle::encode(DType::kBF16, x)) << x;
  }
}

}  // namespace
}  // namespace moecore::test
