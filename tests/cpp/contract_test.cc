// What every op refuses on a GPU, or without one.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "moecore/moecore.h"
#include "support/refusals.h"

namespace moecore::test {
namespace {

// A GPU would fault on it, and every later call of the process with it.
TEST(Contract, MisalignedElementsAreRefusedOnCuda) {
  const Device gpu{DeviceType::kCUDA, 0};
  alignas(16) std::byte memory[64] = {};
  const TensorView rows = TensorView::dense(static_cast<void*>(memory), DType::kF16, {2, 2}, gpu);
  const TensorView slots = TensorView::dense(static_cast<void*>(memory + 16), DType::kI32, {1, 2}, gpu);
  const TensorView out = TensorView::dense(static_cast<void*>(memory + 32), DType::kF16, {1, 2}, gpu);
  const TensorView weights = TensorView::dense(static_cast<void*>(memory + 50), DType::kF32, {1, 2}, gpu);
  try {
    finalize(rows, slots, out, {.weights = weights}, {.device = gpu});
    FAIL() << "took f32 weights at an odd multiple of two bytes";
  } catch (const InvalidArgument& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("finalize: weights is f32[1,2] cuda:0 at a misaligned address"), std::string::npos)
        << text;
    EXPECT_NE(text.find("a multiple of 4"), std::string::npos) << text;
  }
}

// A build or machine without a GPU says so, and what was compiled in.
TEST(Contract, MissingGpuIsABackendError) {
  if (cuda_device_count() > 0) GTEST_SKIP() << "this machine has a GPU";
  const Device gpu{DeviceType::kCUDA, 0};
  float memory[8] = {};
  std::int32_t map[2] = {};
  try {
    shuffle_rows(TensorView::dense(static_cast<void*>(memory), DType::kF32, {2, 2}, gpu),
                 TensorView::dense(static_cast<void*>(map), DType::kI32, {2}, gpu),
                 TensorView::dense(static_cast<void*>(memory + 4), DType::kF32, {2, 2}, gpu),
                 {.device = gpu});
    FAIL() << "ran on a GPU that is not there";
  } catch (const BackendError& e) {
    EXPECT_NE(std::string(e.what()).find("permute: "), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace moecore::test
