// More than 2^31 elements: rows and experts further apart than 32-bit arithmetic reaches, in sparse memory.

#include "moecore/moecore.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/sparse.h"

namespace moecore::test {
namespace {

constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 64;

class Large : public OnDevice {
 protected:
  static constexpr DType kType = DType::kBF16;
  Tensor i32(const Array& values) { return Tensor(device(), DType::kI32, values); }
  std::vector<double> random_row(std::int64_t n) { return random_.floats({n}, kType).values; }
  Random random_{99};
};

TEST_P(Large, ShuffleRowsReadsAndWritesFarRows) {
  // x: many dense rows, of which the last are read. out: few rows, far apart.
  const std::int64_t width = 2048, rows = kFar / width + 3;
  SparseTensor x(device(), kType, {rows, width}), out(device(), kType, {3, width}, {kFar, 1});
  const std::vector<double> first = random_row(width), last = random_row(width);
  x.set(0, first);
  x.set((rows - 1) * width, last);
  shuffle_rows(x, i32(Array({3}, {static_cast<double>(rows - 1), static_cast<double>(rows), 0})), out,
               Call(device()));
  EXPECT_EQ(out.get(0, width), last);
  EXPECT_EQ(out.get(kFar, width), std::vector<double>(static_cast<std::size_t>(width), 0.0));
  EXPECT_EQ(out.get(2 * kFar, width), first);
}

TEST_P(Large, PermuteReadsAndWritesFarRows) {
  SparseTensor x(device(), kType, {2, 256}, {kFar, 1}), rows(device(), kType, {4, 256}, {kFar, 1});
  const std::vector<double> first = random_row(256), second = random_row(256);
  x.set(0, first);
  x.set(kFar, second);
  const oracle::PlanResult p = oracle::plan(Array({2, 2}, {1, 0, 0, 1}), {.num_experts = 2});
  const Tensor offsets = i32(p.expert_offsets), scales = i32(p.scale_offsets), row_token = i32(p.row_token),
               slot_row = i32(p.slot_row);
  permute(x, {offsets, scales, row_token, slot_row}, rows, Call(device()));
  for (std::int64_t r = 0; r < 4; ++r)
    EXPECT_EQ(rows.get(r * kFar, 256), p.row_token[r] == 0 ? first : second) << r;
}

TEST_P(Large, FinalizeReadsAndWritesFarRows) {
  const std::int64_t width = 2048, num_rows = kFar / width + 2;
  SparseTensor rows(device(), kType, {num_rows, width}), out(device(), kType, {2, width}, {kFar, 1});
  const Array values({2, width}, [&] {
    std::vector<double> v = random_row(width), w = random_row(width);
    v.insert(v.end(), w.begin(), w.end());
    return v;
  }());
  rows.set(0, {values.values.begin(), values.values.begin() + width});
  rows.set((num_rows - 1) * width, {values.values.begin() + width, values.values.end()});
  const Array weights = random_.floats({2, 2}, DType::kF32);
  const auto last = static_cast<double>(num_rows - 1);
  const Tensor slots = i32(Array({2, 2}, {last, 0, 0, last})), weight_tensor(device(), DType::kF32, weights);
  finalize(rows, slots, out, {.weights = weight_tensor}, Call(device()));
  const Array expected =
      oracle::finalize(values, Array({2, 2}, {1, 0, 0, 1}), width, kType, weights, false, {});
  for (std::int64_t t = 0; t < 2; ++t)
    EXPECT_TRUE(equal(
        Array({width}, out.get(t * kFar, width)),
        Array({width}, {expected.values.begin() + t * width, expected.values.begin() + (t + 1) * width})));
}

TEST_P(Large, ActivateReadsAndWritesFarRows) {
  SparseTensor x(device(), kType, {3, 128}, {kFar, 1}), out(device(), kType, {3, 64}, {kFar, 1});
  for (std::int64_t r = 0; r < 3; ++r) x.set(r * kFar, random_row(128));
  const Activation a{.kind = ActivationKind::kSilu, .order = GateOrder::kInterleaved};
  activate(x, out, a, {}, Call(device()));
  for (std::int64_t r = 0; r < 3; ++r)
    EXPECT_TRUE(within(Array({1, 64}, out.get(r * kFar, 64)),
                       oracle::activate(Array({1, 128}, x.get(r * kFar, 128)), a, 1), kType));
}

TEST_P(Large, GroupedGemmReadsAndWritesFar) {
  // Tokens, weight matrices and output rows all lie beyond 2^31 elements.
  const std::int64_t n = 40, k = 128, tokens = kFar / k + 2;
  SparseTensor x(device(), kType, {tokens, k}), weights(device(), kType, {2, n, k}, {kFar, k, 1}),
      out(device(), kType, {3, n}, {kFar, 1});
  const Array near_values = random_.integers({3, k}, -3, 3),
              weight_values = random_.integers({2, n, k}, -3, 3);
  const std::int64_t token_of_row[3] = {tokens - 1, 0, tokens - 2};
  Array row_token({3});
  for (std::int64_t r = 0; r < 3; ++r) {
    row_token[r] = static_cast<double>(token_of_row[r]);
    x.set(token_of_row[r] * k,
          {near_values.values.begin() + r * k, near_values.values.begin() + (r + 1) * k});
  }
  for (std::int64_t e = 0; e < 2; ++e)
    weights.set(e * kFar,
                {weight_values.values.begin() + e * n * k, weight_values.values.begin() + (e + 1) * n * k});
  const Array offsets({3}, {0, 1, 3});
  const Tensor row_tokens = i32(row_token), offset_tensor = i32(offsets);
  grouped_gemm(x, weights, offset_tensor, out, {.row_token = row_tokens},
               Call(device(), grouped_gemm_workspace_bytes(3, n, k, 2, kType, device())));
  Bounded expected = oracle::grouped_gemm(near_values, weight_values, offsets, 3, {});
  for (std::int64_t r = 0; r < 3; ++r) {
    const Bounded row{
        Array({n}, {expected.value.values.begin() + r * n, expected.value.values.begin() + (r + 1) * n}),
        Array({n})};
    EXPECT_TRUE(within(Array({n}, out.get(r * kFar, n)), row, kType)) << r;
  }
}

TEST_P(Large, RouteReadsFarRows) {
  SparseTensor logits(device(), DType::kF32, {2, 64}, {kFar, 1});
  const Array values = random_.floats({2, 64}, DType::kF32);
  logits.set(0, {values.values.begin(), values.values.begin() + 64});
  logits.set(kFar, {values.values.begin() + 64, values.values.end()});
  Tensor weights(device(), DType::kF32, {2, 4}), ids(device(), DType::kI32, {2, 4});
  route(logits, weights, ids, {}, Call(device()));
  EXPECT_TRUE(equal(ids.get(), oracle::route(values, {.top_k = 4}).ids));
}

INSTANTIATE_TEST_SUITE_P(, Large, ::testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace moecore::test
