// Element types, views, and what the library tells about itself.

#include <gtest/gtest.h>

#include <algorithm>

#include "moecore/moecore.h"

namespace moecore::test {
namespace {

TEST(CoreDType, NamesRoundTrip) {
  for (int i = 0; i < kNumDTypes; ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(parse_dtype(name(dtype)), dtype);
    for (int j = 0; j < i; ++j) EXPECT_NE(name(dtype), name(static_cast<DType>(j)));
  }
  EXPECT_FALSE(parse_dtype("float32"));
  EXPECT_FALSE(parse_dtype(""));
}

TEST(CoreDType, Widths) {
  EXPECT_EQ(bit_width(DType::kE2M1), 4);
  for (DType d : {DType::kE4M3, DType::kE5M2, DType::kE8M0, DType::kU8, DType::kI8, DType::kBool})
    EXPECT_EQ(bit_width(d), 8) << name(d);
  for (DType d : {DType::kF16, DType::kBF16, DType::kI16, DType::kU16})
    EXPECT_EQ(bit_width(d), 16) << name(d);
  for (DType d : {DType::kF32, DType::kI32, DType::kU32}) EXPECT_EQ(bit_width(d), 32) << name(d);
  for (DType d : {DType::kI64, DType::kU64, DType::kF64, DType::kC64}) EXPECT_EQ(bit_width(d), 64) << name(d);
  EXPECT_EQ(bit_width(DType::kC128), 128);
}

TEST(CoreTensorView, DenseViewsAreRowMajor) {
  float data[24] = {};
  const TensorView v = TensorView::dense(data, DType::kF32, {2, 3, 4});
  EXPECT_EQ(v.numel(), 24);
  EXPECT_EQ(v.strides[0], 12);
  EXPECT_EQ(v.strides[1], 4);
  EXPECT_EQ(v.strides[2], 1);
  EXPECT_TRUE(v.is_dense());
  EXPECT_FALSE(v.read_only);
  EXPECT_TRUE(TensorView::dense(static_cast<const void*>(data), DType::kF32, {24}).read_only);
  EXPECT_EQ(TensorView::dense(data, DType::kF32, {}).numel(), 1);
  EXPECT_EQ(TensorView::dense(data, DType::kF32, {3, 0, 2}).numel(), 0);
  EXPECT_THROW(TensorView::dense(data, DType::kF32, {1, 1, 1, 1, 1}), InvalidArgument);
}

TEST(CoreTensorView, DenseIgnoresStridesOfSingleElements) {
  TensorView v = TensorView::dense(static_cast<void*>(nullptr), DType::kF32, {1, 5});
  v.strides[0] = 1000;
  EXPECT_TRUE(v.is_dense());
  v.shape[0] = 2;
  EXPECT_FALSE(v.is_dense());
  v.shape[1] = 0;
  EXPECT_TRUE(v.is_dense());
}

TEST(CoreTensorView, DescribesItself) {
  TensorView v =
      TensorView::dense(static_cast<void*>(nullptr), DType::kBF16, {16, 7168}, {DeviceType::kCUDA, 1});
  EXPECT_EQ(v.describe(), "bf16[16,7168] cuda:1");
  v.device = {};
  v.strides[0] = 8000;
  EXPECT_EQ(v.describe(), "bf16[16,7168] cpu strides [8000,1]");
}

TEST(CoreInfo, IsConsistent) {
  const std::string v = version();
  EXPECT_EQ(std::count(v.begin(), v.end(), '.'), 2) << v;
  const std::string active = cpu_isa();
  const std::vector<std::string> all = cpu_isas();
  ASSERT_FALSE(all.empty());
  EXPECT_EQ(all.front(), "baseline");
  EXPECT_NE(std::find(all.begin(), all.end(), active), all.end()) << active;
  EXPECT_GE(cpu_threads(), 1);
  std::string why;
  if (cuda_device_count(&why) == 0)
    EXPECT_FALSE(why.empty());
  else
    EXPECT_FALSE(cuda_architectures().empty());
}

TEST(CoreInfo, ListsWhatAnOpTakes) {
  using Names = std::vector<std::string>;
  for (const char* op : {"route", "route_plan", "activate", "grouped_gemm", "fused_experts"})
    EXPECT_EQ(supported(op), (Names{"f32", "f16", "bf16"})) << op;
  EXPECT_EQ(supported("finalize"), (Names{"f32", "f16", "bf16", "e4m3"}));
  EXPECT_EQ(supported("plan"), (Names{"i32", "i64"}));
  EXPECT_EQ(supported("shuffle_rows"), Names{"any"});
  EXPECT_THROW(supported("softmax"), InvalidArgument);
}

}  // namespace
}  // namespace moecore::test
