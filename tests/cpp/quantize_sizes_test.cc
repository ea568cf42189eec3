// Shapes, offsets and bounds of scales, and what quantize refuses.

#include "moecore/quantize.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "moecore/error.h"
#include "support/oracle.h"
#include "support/quantize_case.h"

namespace moecore::test {
namespace {

TEST(QuantizeSizes, GoldenOffsets) {
  using enum ScaleLayout;
  struct Row {
    std::int64_t m, k, swizzled_128x4, swizzled_8x4, linear;
  };
  for (const Row& r : {Row{0, 1, 1, 1, 1},
                       {1, 0, 16, 4, 12},
                       {31, 3, 499, 319, 375},
                       {32, 0, 4, 384, 384},
                       {33, 5, 533, 421, 401},
                       {127, 7, 1023, 1503, 1531},
                       {128, 0, 1536, 1536, 1536},
                       {129, 9, 2577, 1605, 1557},
                       {200, 11, 2699, 2467, 2411}}) {
    EXPECT_EQ(scale_offset(kSwizzled128x4, r.m, r.k, 256, 12), r.swizzled_128x4);
    EXPECT_EQ(scale_offset(kSwizzled8x4, r.m, r.k, 256, 12), r.swizzled_8x4);
    EXPECT_EQ(scale_offset(kLinear, r.m, r.k, 256, 12), r.linear);
    EXPECT_EQ(scale_offset(kColumnMajor, r.m, r.k, 256, 12),
              oracle::scale_position(kColumnMajor, r.m, r.k, 256, 12));
  }
}

TEST(QuantizeSizes, ShapesAndBounds) {
  using Shape = std::array<std::int64_t, 2>;
  EXPECT_EQ(scale_shape(QuantFormat::nvfp4(), 130, 80), (Shape{256, 8}));
  EXPECT_EQ(scale_shape(QuantFormat::mxfp8(ScaleLayout::kSwizzled8x4), 130, 2880), (Shape{136, 92}));
  EXPECT_EQ(scale_shape(QuantFormat::fp8_block128(), 5, 2880), (Shape{5, 23}));
  EXPECT_EQ(scale_shape(QuantFormat::fp8_block128(ScaleLayout::kColumnMajor), 5, 2880), (Shape{23, 8}));
  EXPECT_EQ(scale_shape(QuantFormat::fp8_block128_e8m0(ScaleLayout::kColumnMajor), 5, 2880), (Shape{6, 32}));
  EXPECT_EQ(scale_shape(QuantFormat::fp8_token(), 5, 2880), (Shape{5, 1}));
  EXPECT_EQ(scale_shape(QuantFormat::fp8_tensor(), 5, 2880), (Shape{1, 1}));
  // The bound holds for the worst split: one row for all experts but the last.
  for (std::int64_t experts : {1, 2, 7, 64, 256})
    for (std::int64_t rows : {0, 1, 5, 64, 127, 128, 129, 1000, 40000}) {
      const std::int64_t filled = std::min(rows, experts);
      std::int64_t worst = 0;
      if (filled > 0) worst = (filled - 1) * 128 + round_up(rows - (filled - 1), 128);
      EXPECT_GE(expert_scale_rows(rows, experts), worst);
      EXPECT_LE(expert_scale_rows(rows, experts), rows + 127 * filled);
      EXPECT_EQ(expert_scale_rows(rows, experts) % 128, 0);
    }
}

TEST(QuantizeSizes, Refuses) {
  const Device cpu{};
  const Tensor x(cpu, DType::kBF16, {4, 64});
  Tensor data(cpu, DType::kE4M3, {4, 64}), scales(cpu, DType::kE8M0, {4, 2}),
      small(cpu, DType::kU8, {128, 4});
  const Tensor offsets(cpu, DType::kI32, integers({0, 2, 4})),
      i64_offsets(cpu, DType::kI64, integers({0, 2, 4}));
  const QuantFormat linear = QuantFormat::mxfp8(ScaleLayout::kLinear);
  EXPECT_NO_THROW(quantize(x, data, scales, linear));
  EXPECT_THROW(quantize(data, data, scales, linear), InvalidType);
  EXPECT_THROW(quantize(x, x, scales, linear), InvalidType);
  EXPECT_THROW(quantize(x, data, data, linear), InvalidType);
  EXPECT_THROW(quantize(x, data, scales, QuantFormat::mxfp8()), InvalidArgument);
  EXPECT_THROW(quantize(x, data.read_only(), scales, linear), InvalidArgument);
  QuantFormat odd = QuantFormat::fp8_token();
  odd.power_of_two = true;
  EXPECT_THROW(quantize(x, data, scales, odd), InvalidArgument);
  odd = linear;
  odd.layout = ScaleLayout::kColumnMajor;
  EXPECT_THROW(quantize(x, data, scales, odd), InvalidArgument);
  // Scales that could not hold every split are refused before anything runs.
  QuantizeOptions experts{.rows = {.expert_offsets = offsets, .scale_offsets = offsets}};
  EXPECT_THROW(quantize(x, data, small, QuantFormat::mxfp8(), experts), InvalidArgument);
  experts.rows.expert_offsets = i64_offsets;
  EXPECT_THROW(quantize(x, data, small, QuantFormat::mxfp8(), experts), InvalidType);
  experts.rows = {.expert_offsets = offsets};
  EXPECT_THROW(quantize(x, data, small, QuantFormat::mxfp8(), experts), InvalidArgument);
}

// Offsets that lead out of the scales, into those of another expert, or between tiles: the plan's, had it
// been made with another alignment.
TEST(QuantizeSizes, RefusesOffsetsOfScalesThatDoNotFit) {
  const Device cpu{};
  const Tensor x(cpu, DType::kBF16, {4, 64}), offsets(cpu, DType::kI32, integers({0, 1, 4}));
  const Tensor data(cpu, DType::kE4M3, {4, 64}), scales(cpu, DType::kE8M0, {256, 4});
  auto quantize_with = [&](std::vector<std::int64_t> scale_offsets) {
    const Tensor there(cpu, DType::kI32, integers(scale_offsets));
    quantize(x, data, scales, QuantFormat::mxfp8(),
             {.rows = {.expert_offsets = offsets, .scale_offsets = there}});
  };
  EXPECT_NO_THROW(quantize_with({0, 128, 256}));
  for (const std::vector<std::int64_t>& wrong : std::vector<std::vector<std::int64_t>>{
           {0, 256, 512}, {0, 1, 4}, {0, 64, 128}, {-128, 0, 128}, {0, 0, 128}, {128, 0, 256}, {0, 128, 128}})
    EXPECT_THROW(quantize_with(wrong), InvalidArgument) << wrong[0] << " " << wrong[1] << " " << wrong[2];
}

}  // namespace
}  // namespace moecore::test
