// transpose_experts: exact.

#include <cstring>
#include <utility>

#include "moecore/fused_experts.h"
#include "support/cases.h"
#include "support/fixture.h"

namespace moecore::test {
namespace {

std::vector<DType> transposable_types() {
  std::vector<DType> types;
  for (int i = 0; i < kNumDTypes; ++i)
    if (const auto d = static_cast<DType>(i); bit_width(d) >= 8 && bit_width(d) <= 64) types.push_back(d);
  return types;
}

class TransposeExperts : public OnDeviceDType {};

TEST_P(TransposeExperts, MovesEveryElement) {
  const auto size = static_cast<std::size_t>(bit_width(dtype())) / 8;
  for (std::int64_t e : {0, 1, 3})
    for (auto [rows, cols] :
         {std::pair<std::int64_t, std::int64_t>{1, 1}, {5, 3}, {16, 64}, {33, 129}, {0, 7}, {7, 0}})
      for (const Place& place : places(dtype())) {
        SCOPED_TRACE(::testing::Message() << e << "x" << rows << "x" << cols << " " << place.name);
        Tensor src(device(), dtype(), {e, rows, cols}, place), dst(device(), dtype(), {e, cols, rows}, place);
        const auto bytes = Random(1).bytes(static_cast<std::size_t>(e * rows * cols) * size);
        src.set_bytes(bytes);
        transpose_experts(src.read_only(), dst, Call(device()));
        auto expected = bytes;
        for (std::int64_t x = 0; x < e; ++x)
          for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t c = 0; c < cols; ++c)
              std::memcpy(expected.data() + static_cast<std::size_t>((x * cols + c) * rows + r) * size,
                          bytes.data() + static_cast<std::size_t>((x * rows + r) * cols + c) * size, size);
        EXPECT_EQ(dst.get_bytes(), expected);
        EXPECT_TRUE(dst.surroundings_intact());
      }
}

INSTANTIATE_TEST_SUITE_P(, TransposeExperts, ::testing::ValuesIn(devices_times(transposable_types())),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
