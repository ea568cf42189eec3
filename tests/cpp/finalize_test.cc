// finalize: the bits of an f32 fma chain in slot order, whatever the shape, pitch and weight type.

#include "moecore/finalize.h"

#include <cmath>

#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

struct FinalizeCase {
  std::int64_t num_tokens = 5, top_k = 4, num_rows = 20, hidden = 64, rows_width = 64;
  std::optional<DType> weight_type = DType::kF32;
  bool cast_weights = false;
  bool residual = false;
  DType slot_type = DType::kI32;
  Place place{};
  int num_threads = 0;

  friend std::ostream& operator<<(std::ostream& out, const FinalizeCase& c) {
    return out << "T=" << c.num_tokens << " K=" << c.top_k << " R=" << c.num_rows << " H=" << c.hidden
               << " Hp=" << c.rows_width << " weights " << (c.weight_type ? name(*c.weight_type) : "none")
               << (c.cast_weights ? " cast" : "") << (c.residual ? " residual " : " ") << c.place.name;
  }
};

class Finalize : public OnDeviceDType {
 protected:
  void expect_finalize(const FinalizeCase& c, double low = -2, double high = 2) {
    SCOPED_TRACE(::testing::Message() << c);
    Random random(static_cast<std::uint64_t>(c.num_tokens * 31 + c.top_k * 7 + c.hidden));
    const Array rows = random.floats({c.num_rows, c.rows_width}, dtype(), low, high);
    // -1, the row count and beyond are dropped slots; a row may serve several slots.
    const Array slots = random.integers({c.num_tokens, c.top_k}, -1, c.num_rows + 1);
    std::optional<Array> weights, residual;
    if (c.weight_type) weights = random.floats({c.num_tokens, c.top_k}, *c.weight_type, -1, 1);
    if (c.residual) residual = random.floats({c.num_tokens, c.hidden}, dtype(), low, high);
    expect_bits(c, rows, slots, weights, residual);
  }

  void expect_bits(const FinalizeCase& c, const Array& rows, const Array& slots,
                   const std::optional<Array>& weights, const std::optional<Array>& residual) {
    const Tensor rows_tensor(device(), dtype(), rows, c.place),
        slot_tensor(device(), c.slot_type, slots, c.place);
    std::optional<Tensor> weight_tensor, residual_tensor;
    FinalizeOptions options{.cast_weights = c.cast_weights};
    if (weights) {
      weight_tensor.emplace(device(), *c.weight_type, *weights, c.place);
      options.weights = weight_tensor->read_only();
    }
    if (residual) {
      residual_tensor.emplace(device(), dtype(), *residual, c.place);
      options.residual = residual_tensor->read_only();
    }
    Tensor out(device(), dtype(), {c.num_tokens, c.hidden}, c.place);
    finalize(rows_tensor.read_only(), slot_tensor.read_only(), out, options,
             Call(device(), 0, c.num_threads));
    EXPECT_TRUE(equal(out.get(),
                      oracle::finalize(rows, slots, c.hidden, dtype(), weights, c.cast_weights, residual)));
    EXPECT_TRUE(out.surroundings_intact());
  }
};

TEST_P(Finalize, AnyWidth) {
  for (std::int64_t hidden : widths())
    for (const Place& place : places(dtype()))
      expect_finalize({.hidden = hidden, .rows_width = hidden, .place = place});
}

TEST_P(Finalize, AnyTopKAndTokenCount) {
  for (std::int64_t top_k : {0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 17, 64, 65, 129})
    for (std::int64_t num_tokens : {0, 1, 7, 33})
      expect_finalize(
          {.num_tokens = num_tokens, .top_k = top_k, .num_rows = 50, .hidden = 40, .rows_width = 40});
  expect_finalize({.num_tokens = 1000, .top_k = 8, .num_rows = 8000, .hidden = 72, .rows_width = 72});
}

TEST_P(Finalize, PaddedRowsToUnpaddedOutput) {
  for (auto [hidden, width] :
       {std::pair<std::int64_t, std::int64_t>{2880, 3072}, {1, 64}, {63, 64}, {0, 8}, {360, 384}})
    for (const Place& place : places(dtype()))
      expect_finalize({.hidden = hidden, .rows_width = width, .place = place});
}

TEST_P(Finalize, EveryWeightTypeAndCast) {
  for (std::optional<DType> weight_type : {std::optional<DType>{}, std::optional{DType::kF32},
                                           std::optional{DType::kF16}, std::optional{DType::kBF16}})
    for (bool cast : {false, true})
      for (std::int64_t top_k : {1, 2, 7, 8})
        for (const Place& place : places(dtype()))
          expect_finalize({.top_k = top_k,
                           .hidden = 71,
                           .rows_width = 71,
                           .weight_type = weight_type,
                           .cast_weights = cast,
                           .place = place});
}

TEST_P(Finalize, AddsTheResidualLast) {
  for (std::int64_t top_k : {0, 1, 8})
    for (std::int64_t hidden : {1, 64, 129})
      for (const Place& place : places(dtype()))
        expect_finalize(
            {.top_k = top_k, .hidden = hidden, .rows_width = hidden + 3, .residual = true, .place = place});
}

TEST_P(Finalize, TakesI64Slots) {
  expect_finalize({.slot_type = DType::kI64});
  // Slots whose low 32 bits would be valid rows.
  Array slots({1, 4}, {4294967296.0, 1, -4294967295.0, 0});
  const Array rows = Random(1).floats({4, 8}, dtype());
  expect_bits({.num_tokens = 1,
               .num_rows = 4,
               .hidden = 8,
               .rows_width = 8,
               .weight_type = {},
               .slot_type = DType::kI64},
              rows, slots, {}, {});
}

TEST_P(Finalize, DeadTokensGetZeroOrTheirResidual) {
  const Array rows = Random(2).floats({3, 70}, dtype()), residual = Random(3).floats({4, 70}, dtype());
  const Array weights({4, 2}, 1.0);
  for (double dead : {-1.0, 3.0, 2147483647.0, -2147483648.0}) {
    const Array slots({4, 2}, dead);
    FinalizeCase c{.num_tokens = 4, .top_k = 2, .num_rows = 3, .hidden = 70, .rows_width = 70};
    expect_bits(c, rows, slots, weights, {});
    expect_bits(c, rows, slots, weights, residual);
  }
  // No rows at all.
  expect_bits({.num_tokens = 4, .top_k = 2, .num_rows = 0, .hidden = 70, .rows_width = 70}, Array({0, 70}),
              Array({4, 2}, 0.0), weights, residual);
}

TEST_P(Finalize, DeadSlotsWeightsAreNotRead) {
  // NaN or Inf in the weight of a dropped slot must not reach the sum.
  const double nan = std::nan("");
  const Array rows = Random(4).floats({2, 33}, dtype());
  expect_bits({.num_tokens = 1, .top_k = 3, .num_rows = 2, .hidden = 33, .rows_width = 33}, rows,
              Array({1, 3}, {-1, 1, 9}), Array({1, 3}, {nan, 0.5, INFINITY}), {});
}

TEST_P(Finalize, CarriesNaNInfinityAndOverflow) {
  const double nan = std::nan(""), inf = INFINITY;
  const double big = dtype() == DType::kF16 ? 65504 : oracle::round_to(dtype(), 3e38);
  const Array rows({6, 2}, {nan, 1, inf, 2, -inf, 3, big, big, -0.0, -0.0, big, -big});
  for (std::vector<double> pair : {std::vector<double>{0, 1}, {1, 2}, {1, 1}, {3, 3}, {4, 4}, {3, 5}, {2, 3}})
    expect_bits({.num_tokens = 1, .top_k = 2, .num_rows = 6, .hidden = 2, .rows_width = 2}, rows,
                Array({1, 2}, pair), Array({1, 2}, {1.0, 1.0}), {});
}

TEST_P(Finalize, SumsInSlotOrder) {
  // (big + -big) + small and (big + small) + -big differ, so any other order or a tree shows.
  const Array rows({3, 8}, [] {
    std::vector<double> v;
    for (double x : {4096.0, -4096.0, 0x1p-12})
      for (int i = 0; i < 8; ++i) v.push_back(x);
    return v;
  }());
  const Array weights({1, 3}, {4096.0, 4096.0, 1.0});
  for (std::vector<double> order : {std::vector<double>{0, 1, 2}, {0, 2, 1}, {2, 0, 1}})
    expect_bits({.num_tokens = 1, .top_k = 3, .num_rows = 3, .hidden = 8, .rows_width = 8}, rows,
                Array({1, 3}, order), weights, {});
}

TEST_P(Finalize, BitsDoNotDependOnBatchOrThreads) {
  Random random(11);
  const std::int64_t num_tokens = 300, top_k = 8, hidden = 200;
  const Array rows = random.floats({num_tokens * top_k, hidden}, dtype());
  const Array slots = random.integers({num_tokens, top_k}, -1, num_tokens * top_k);
  const Array weights = random.floats({num_tokens, top_k}, DType::kF32, 0, 1);
  const Tensor rows_tensor(device(), dtype(), rows), slot_tensor(device(), DType::kI32, slots),
      weight_tensor(device(), DType::kF32, weights);
  const Array expected = oracle::finalize(rows, slots, hidden, dtype(), weights, false, {});
  for (int threads : {1, 2, 5}) {
    Tensor out(device(), dtype(), {num_tokens, hidden});
    for (int repeat = 0; repeat < 3; ++repeat) {
      out.poison();
      finalize(rows_tensor, slot_tensor, out, {.weights = weight_tensor}, Call(device(), 0, threads));
      EXPECT_TRUE(equal(out.get(), expected)) << threads << " threads, run " << repeat;
    }
  }
  // The same tokens one call at a time.
  Tensor out(device(), dtype(), {num_tokens, hidden});
  for (std::int64_t begin = 0, size = 1; begin < num_tokens; begin += size, size = size % 90 + 37) {
    const std::int64_t n = std::min(size, num_tokens - begin);
    auto part = [&](const Tensor& t) {
      TensorView v = t;
      v.data = static_cast<std::byte*>(v.data) + begin * v.strides[0] * bit_width(v.dtype) / 8;
      v.shape[0] = n;
      return v;
    };
    finalize(rows_tensor, part(slot_tensor), part(out), {.weights = part(weight_tensor)}, Call(device()));
  }
  EXPECT_TRUE(equal(out.get(), expected)) << "in parts";
}

INSTANTIATE_TEST_SUITE_P(, Finalize, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
