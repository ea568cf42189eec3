// activate: every kind and order, within the bound of an f32 evaluation rounded once.

#include "moecore/activate.h"

#include <cmath>

#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

constexpr ActivationKind kKinds[] = {
    ActivationKind::kSilu, ActivationKind::kGelu,  ActivationKind::kGeluTanh, ActivationKind::kQuickGelu,
    ActivationKind::kRelu, ActivationKind::kRelu2, ActivationKind::kSwigluOai};
constexpr GateOrder kOrders[] = {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved,
                                 GateOrder::kPlain};

class Activate : public OnDeviceDType {
 protected:
  void expect_activate(const Array& x, const Activation& a, const Place& place = {},
                       std::optional<std::int64_t> num_rows = {}, int num_threads = 0) {
    SCOPED_TRACE(::testing::Message()
                 << "kind " << static_cast<int>(a.kind) << " order " << static_cast<int>(a.order) << " limit "
                 << a.limit << " x [" << x.shape[0] << "," << x.shape[1] << "] " << place.name);
    const std::int64_t rows = x.shape[0], inter = a.gated() ? x.shape[1] / 2 : x.shape[1];
    const Tensor x_tensor(device(), dtype(), x, place);
    Tensor out(device(), dtype(), {rows, inter}, place);
    std::optional<Tensor> offsets;
    if (num_rows) {
      const auto n = static_cast<double>(*num_rows);
      offsets.emplace(device(), DType::kI32, Array({4}, {0, std::floor(n / 2), std::floor(n / 2), n}));
    }
    activate(x_tensor.read_only(), out, a, offsets ? std::optional(offsets->read_only()) : std::nullopt,
             Call(device(), 0, num_threads));
    EXPECT_TRUE(within(out.get(), oracle::activate(x, a, num_rows.value_or(rows)), dtype()));
    EXPECT_TRUE(out.surroundings_intact());
  }

  double largest() const { return dtype() == DType::kF16 ? 65504 : 1e30; }
};

TEST_P(Activate, EveryKindOrderAndWidth) {
  Random random(1);
  for (ActivationKind kind : kKinds)
    for (GateOrder order : kOrders)
      for (std::int64_t inter : {0, 1, 3, 8, 17, 64, 129, 360}) {
        const std::int64_t width = order == GateOrder::kPlain ? inter : 2 * inter;
        Activation a{.kind = kind, .order = order};
        if (kind == ActivationKind::kSwigluOai) a = Activation::gpt_oss(order);
        for (const Place& place : places(dtype()))
          expect_activate(random.floats({5, width}, dtype(), -9, 9), a, place);
      }
}

TEST_P(Activate, AlphaBetaAndLimit) {
  Random random(2);
  for (ActivationKind kind : kKinds)
    for (GateOrder order : kOrders)
      for (float limit : {0.5f, 7.0f, INFINITY})
        for (float beta : {0.0f, 1.0f, -0.75f})
          expect_activate(random.floats({3, 66}, dtype(), -12, 12),
                          {.kind = kind, .order = order, .alpha = 1.25f, .beta = beta, .limit = limit});
}

TEST_P(Activate, WideAndNarrowInputs) {
  // From the smallest magnitudes to the largest, where exp overflows and underflows.
  std::vector<double> magnitudes = {0.0, 0x1p-24, 0x1p-14, 1e-3, 0.5, 1,   5,    10,   20,
                                    60,  87,      88,      89,   100, 104, 1000, 60000};
  if (dtype() != DType::kF16) magnitudes.insert(magnitudes.end(), {1e-30, 1e-38, 1e10, 1e18});
  std::vector<double> row;
  for (double m : magnitudes)
    for (double sign : {1.0, -1.0})
      for (double up : {1.0, -0.5}) {
        row.push_back(oracle::round_to(dtype(), sign * m));
        row.push_back(up);
      }
  const Array x({1, static_cast<std::int64_t>(row.size())}, row);
  for (ActivationKind kind : kKinds)
    for (float beta : {0.0f, 1.0f})
      expect_activate(x, {.kind = kind, .order = GateOrder::kInterleaved, .alpha = 1.702f, .beta = beta});
}

TEST_P(Activate, NaNPropagatesThroughEverything) {
  const double nan = std::nan("");
  for (ActivationKind kind : kKinds)
    for (float limit : {7.0f, INFINITY}) {
      const Activation gated{.kind = kind, .order = GateOrder::kGateUp, .beta = 1, .limit = limit};
      // Gate NaN, up NaN, both, neither; wide enough for vectors and tails.
      Array x({4, 2 * 37}, 0.5);
      for (std::int64_t c = 0; c < 37; ++c) {
        x.at(0, c) = nan;
        x.at(1, 37 + c) = nan;
        x.at(2, c) = x.at(2, 37 + c) = nan;
      }
      expect_activate(x, gated);
      Array plain({2, 37}, -0.5);
      for (std::int64_t c = 0; c < 37; c += 2) plain.at(1, c) = nan;
      expect_activate(plain, {.kind = kind, .order = GateOrder::kPlain, .limit = limit});
    }
}

TEST_P(Activate, InfinityIsClampedOrKept) {
  const double inf = INFINITY;
  const Array x({1, 12}, {inf, 1, inf, -1, 1, inf, 1, -inf, inf, inf, 2, -inf});
  for (ActivationKind kind : kKinds)
    for (float limit : {7.0f, INFINITY})
      expect_activate(x, {.kind = kind, .order = GateOrder::kInterleaved, .alpha = 1.702f, .limit = limit});
}

TEST_P(Activate, OverflowRoundsToInfinity) {
  const double big = oracle::round_to(dtype(), largest());
  expect_activate(Array({1, 4}, {big, big, big, -big}),
                  {.kind = ActivationKind::kSilu, .order = GateOrder::kInterleaved});
}

TEST_P(Activate, RowsBehindTheOffsetsAreUntouched) {
  Random random(3);
  for (std::int64_t num_rows : {0, 1, 19, 40})
    for (GateOrder order : kOrders)
      for (const Place& place : places(dtype())) {
        // Rows that must not be read are NaN, and stay out of the result.
        Array x = random.floats({40, 50}, dtype());
        for (std::int64_t r = num_rows; r < 40; ++r)
          for (std::int64_t c = 0; c < 50; ++c) x.at(r, c) = std::nan("");
        expect_activate(x, {.kind = ActivationKind::kSilu, .order = order}, place, num_rows);
      }
}

TEST_P(Activate, EmptyIsFine) {
  for (GateOrder order : kOrders) {
    expect_activate(Array({0, 64}), {.kind = ActivationKind::kSilu, .order = order});
    expect_activate(Array({3, 0}), {.kind = ActivationKind::kSilu, .order = order});
  }
}

TEST_P(Activate, BitsDoNotDependOnThreadsOrPosition) {
  Random random(4);
  const Array x = random.floats({300, 258}, dtype(), -8, 8);
  const Tensor x_tensor(device(), dtype(), x);
  for (ActivationKind kind : kKinds) {
    const Activation a{.kind = kind, .order = GateOrder::kGateUp, .alpha = 1.702f, .beta = 1};
    std::optional<Array> first;
    for (int threads : {1, 2, 5, 1}) {
      Tensor out(device(), dtype(), {300, 129});
      activate(x_tensor.read_only(), out, a, {}, Call(device(), 0, threads));
      if (!first)
        first = out.get();
      else
        EXPECT_TRUE(equal(out.get(), *first)) << threads << " threads";
    }
  }
  // One value everywhere gives one result everywhere: vector body and tail agree.
  for (ActivationKind kind : kKinds)
    for (double v : {-3.0, 0.375, 2.5}) {
      const Tensor same(device(), dtype(), Array({3, 2 * 67}, v));
      Tensor out(device(), dtype(), {3, 67});
      activate(same.read_only(), out, {.kind = kind}, {}, Call(device()));
      const Array result = out.get();
      EXPECT_TRUE(equal(result, Array({3, 67}, result[0]))) << "kind " << static_cast<int>(kind);
    }
}

INSTANTIATE_TEST_SUITE_P(, Activate, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
