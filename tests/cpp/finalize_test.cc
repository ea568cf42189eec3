// finalize: the bits of an f32 fma chain in slot order, whatever the shape, pitch and weight type.

#include "moecore/finalize.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantize_oracle.h"

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
      for (std::int64_t top_k : {1, 2, 4, 7, 8})
        for (std::int64_t hidden : {71, 72})
          for (const Place& place : places(dtype()))
            expect_finalize({.top_k = top_k,
                             .hidden = hidden,
                             .rows_width = hidden,
                             .weight_type = weight_type,
                             .cast_weights = cast,
                             .place = place});
}

TEST_P(Finalize, RowsInDescendingOrder) {
  for (std::int64_t top_k : {2, 3, 8})
    for (std::int64_t hidden : {64, 71}) {
      constexpr std::int64_t kRows = 9, kTokens = 5;
      Random random(4);
      const Array slots = random.integers({kTokens, top_k}, -1, kRows - 1);
      Array mirrored = slots;
      for (double& slot : mirrored.values) slot = slot < 0 ? slot : kRows - 1 - slot;
      const Tensor rows(device(), dtype(), random.floats({kRows, hidden}, dtype()));
      const Tensor there(device(), DType::kI32, slots), back(device(), DType::kI32, mirrored);
      Tensor out(device(), dtype(), {kTokens, hidden}), expected(device(), dtype(), {kTokens, hidden});
      finalize(rows.descending(), there.read_only(), out, {}, Call(device()));
      finalize(rows.read_only(), back.read_only(), expected, {}, Call(device()));
      EXPECT_TRUE(equal(out.get(), expected.get())) << top_k << " " << hidden;
    }
}

TEST_P(Finalize, AddsTheResidualLast) {
  for (std::int64_t top_k : {0, 1, 4, 8})
    for (std::int64_t hidden : {1, 64, 129})
      for (std::int64_t padding : {3, 8})
        for (const Place& place : places(dtype()))
          expect_finalize({.top_k = top_k,
                           .hidden = hidden,
                           .rows_width = hidden + padding,
                           .residual = true,
                           .place = place});
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

TEST_P(Finalize, TheDirectFormGivesTheSameBits) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "one form";
  for (std::int64_t top_k : {2, 4, 8})
    for (bool dead : {false, true})
      for (bool with_residual : {false, true}) {
        SCOPED_TRACE(::testing::Message() << "K=" << top_k << " dead slots " << dead);
        Random random(17);
        const std::int64_t num_tokens = 301, num_rows = 900, hidden = 520;
        const Array rows = random.floats({num_rows, hidden}, dtype());
        const Array slots = random.integers({num_tokens, top_k}, dead ? -1 : 0, num_rows - !dead);
        const Array weights = random.floats({num_tokens, top_k}, DType::kF32, -1, 1);
        std::optional<Array> residual;
        if (with_residual) residual = random.floats({num_tokens, hidden}, dtype());
        const Tensor rows_tensor(device(), dtype(), rows), slot_tensor(device(), DType::kI32, slots),
            weight_tensor(device(), DType::kF32, weights);
        std::optional<Tensor> residual_tensor;
        FinalizeOptions options{.weights = weight_tensor};
        if (residual) options.residual = residual_tensor.emplace(device(), dtype(), *residual);
        const Array expected = oracle::finalize(rows, slots, hidden, dtype(), weights, false, residual);
        const std::string many = top_k == 4 ? "direct=2" : "direct=1 threads=96";
        for (const std::string& policy :
             {std::string("direct=0"), std::string("direct=1"), std::string("direct=1 threads=256"), many}) {
          Tensor out(device(), dtype(), {num_tokens, hidden});
          Call call(device());
          call.context().policy = policy;
          finalize(rows_tensor.read_only(), slot_tensor.read_only(), out, options, call);
          EXPECT_TRUE(equal(out.get(), expected)) << policy;
          EXPECT_TRUE(out.surroundings_intact());
        }
      }
}

INSTANTIATE_TEST_SUITE_P(, Finalize, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

struct CodesCase {
  std::int64_t num_tokens = 5, top_k = 4, num_rows = 20, hidden = 256, rows_width = 256;
  bool row_scales = true;
  bool out_scales = true;  // of an e4m3 out
  ScaleLayout layout = ScaleLayout::kLinear;
  std::optional<DType> weight_type = DType::kF32;
  bool residual = false;
  Place place{};
  int num_threads = 0;

  friend std::ostream& operator<<(std::ostream& out, const CodesCase& c) {
    return out << "T=" << c.num_tokens << " K=" << c.top_k << " R=" << c.num_rows << " H=" << c.hidden
               << " Hp=" << c.rows_width << (c.row_scales ? " row scales" : "")
               << (c.out_scales ? " out scales" : "")
               << (c.layout == ScaleLayout::kLinear ? " linear" : " column major") << " weights "
               << (c.weight_type ? name(*c.weight_type) : "none") << (c.residual ? " residual " : " ")
               << c.place.name;
  }
};

using Codes = std::vector<std::uint8_t>;

// Rows of e4m3; the parameter is the element of out.
class FinalizeE4m3 : public OnDeviceDType {
 protected:
  // Every code, NaN rarely, and some runs of zeros.
  static Codes random_codes(std::uint64_t seed, std::int64_t count) {
    Random random(seed);
    Codes codes(static_cast<std::size_t>(count));
    std::int64_t zeros = 0;
    for (std::uint8_t& code : codes) {
      code = static_cast<std::uint8_t>(random.bits() >> 56);
      if ((code & 0x7F) == 0x7F && random.below(16) != 0) code = 0x7E;
      if (zeros == 0 && random.below(500) == 0) zeros = 300;
      if (zeros > 0) code = 0, --zeros;
    }
    return codes;
  }

  void expect_finalize(const CodesCase& c) {
    Random random(static_cast<std::uint64_t>(c.num_tokens * 31 + c.top_k * 7 + c.hidden));
    const Array slots = random.integers({c.num_tokens, c.top_k}, -1, c.num_rows + 1);
    const Array scales =
        random.floats({c.num_rows, (c.rows_width + 127) / 128}, DType::kF32, 0x1p-12, 0x1p-6);
    std::optional<Array> weights;
    if (c.weight_type) weights = random.floats({c.num_tokens, c.top_k}, *c.weight_type, -1, 1);
    expect_bits(c, random_codes(random.bits(), c.num_rows * c.rows_width), slots, scales, weights);
  }

  void expect_bits(const CodesCase& c, const Codes& codes, const Array& slots, const Array& scales,
                   const std::optional<Array>& weights) {
    SCOPED_TRACE(::testing::Message() << c);
    const bool quantised = dtype() == DType::kE4M3, column_major = c.layout == ScaleLayout::kColumnMajor;
    const DType sum_type = quantised ? DType::kF32 : dtype();
    Array rows({c.num_rows, c.rows_width});
    std::vector<std::byte> bytes;
    for (std::size_t i = 0; i < codes.size(); ++i) {
      rows.values[i] = oracle::SmallFloat::e4m3().decode(codes[i]);
      bytes.push_back(std::byte{codes[i]});
    }
    Tensor rows_tensor(device(), DType::kE4M3, {c.num_rows, c.rows_width}, c.place);
    rows_tensor.set_bytes(bytes);
    const Tensor slot_tensor(device(), DType::kI32, slots);
    FinalizeOptions options{.scale_layout = c.layout};
    std::optional<Tensor> scale_tensor, weight_tensor, residual_tensor, out_scales;
    if (c.row_scales) {
      scale_tensor.emplace(device(), DType::kF32, column_major ? transposed(scales, 3) : scales, c.place);
      options.row_scales = scale_tensor->read_only();
    }
    if (weights) {
      weight_tensor.emplace(device(), *c.weight_type, *weights);
      options.weights = weight_tensor->read_only();
    }
    std::optional<Array> residual;
    if (c.residual) {
      const DType type = quantised ? DType::kBF16 : dtype();
      residual = Random(9).floats({c.num_tokens, c.hidden}, type);
      residual_tensor.emplace(device(), type, *residual, c.place);
      options.residual = residual_tensor->read_only();
    }
    const std::int64_t blocks = (c.hidden + 127) / 128, padded_tokens = c.num_tokens + 2;
    if (quantised && c.out_scales) {
      out_scales.emplace(
          device(), DType::kF32,
          column_major ? std::vector{blocks, padded_tokens} : std::vector{c.num_tokens, blocks}, c.place);
      options.out_scales = *out_scales;
    }
    Tensor out(device(), dtype(), {c.num_tokens, c.hidden}, c.place);
    finalize(rows_tensor.read_only(), slot_tensor.read_only(), out, options,
             Call(device(), 0, c.num_threads));

    const Array sums = oracle::finalize(rows, slots, c.hidden, sum_type, weights, false, residual,
                                        c.row_scales ? std::optional(scales) : std::nullopt);
    EXPECT_TRUE(out.surroundings_intact());
    if (!quantised) {
      EXPECT_TRUE(equal(out.get(), sums));
      return;
    }
    std::vector<float> values(sums.values.begin(), sums.values.end());
    Codes expected;
    if (c.out_scales) {
      const oracle::Quantized q =
          oracle::quantize(values, c.hidden, c.hidden, QuantFormat::fp8_block128(),
                           std::vector<float>(static_cast<std::size_t>(c.num_tokens), 1.0f));
      expected = q.codes;
      Array expected_scales({c.num_tokens, blocks});
      for (std::size_t i = 0; i < q.scales.size(); ++i)
        expected_scales.values[i] = static_cast<double>(std::bit_cast<float>(q.scales[i]));
      if (c.num_tokens > 0) {
        EXPECT_TRUE(
            equal(out_scales->get(), column_major ? transposed(expected_scales, 2) : expected_scales));
      }
      EXPECT_TRUE(out_scales->surroundings_intact());
    } else {
      for (float v : values) expected.push_back(oracle::SmallFloat::e4m3().encode(static_cast<double>(v)));
    }
    const std::vector<std::byte> actual = out.get_bytes();
    ASSERT_EQ(actual.size(), expected.size());
    EXPECT_TRUE(expected.empty() || std::memcmp(actual.data(), expected.data(), expected.size()) == 0);
  }

 private:
  // [rows, C] -> [C, rows + padding], padded with zeros.
  static Array transposed(const Array& a, std::int64_t padding) {
    Array t({a.shape[1], a.shape[0] + padding});
    for (std::int64_t r = 0; r < a.shape[0]; ++r)
      for (std::int64_t c = 0; c < a.shape[1]; ++c) t.at(c, r) = a.at(r, c);
    return t;
  }
};

TEST_P(FinalizeE4m3, AnyWidth) {
  for (std::int64_t hidden : widths())
    for (const Place& place : places(DType::kE4M3))
      expect_finalize({.hidden = hidden, .rows_width = hidden, .place = place});
}

TEST_P(FinalizeE4m3, AnyTopKAndTokenCount) {
  for (std::int64_t top_k : {0, 1, 2, 3, 5, 8, 10, 33, 65, 129})
    for (std::int64_t num_tokens : {0, 1, 7, 33})
      expect_finalize(
          {.num_tokens = num_tokens, .top_k = top_k, .num_rows = 50, .hidden = 160, .rows_width = 160});
}

TEST_P(FinalizeE4m3, WithAndWithoutScales) {
  for (ScaleLayout layout : {ScaleLayout::kLinear, ScaleLayout::kColumnMajor})
    for (bool row_scales : {false, true})
      for (bool out_scales : {false, true})
        for (bool residual : {false, true})
          for (std::optional<DType> weight_type : {std::optional<DType>{}, std::optional{DType::kBF16}})
            for (std::int64_t hidden : {384, 130, 1})
              expect_finalize({.hidden = hidden,
                               .rows_width = hidden + 128,
                               .row_scales = row_scales,
                               .out_scales = out_scales,
                               .layout = layout,
                               .weight_type = weight_type,
                               .residual = residual});
}

TEST_P(FinalizeE4m3, ABlockOfZerosHasAScale) {
  // Zero codes, dead tokens, no rows: the sums are zero and their scale is not.
  const Array scales({4, 2}, 0.25);
  const CodesCase c{.num_tokens = 3, .top_k = 2, .num_rows = 4, .hidden = 200, .rows_width = 200};
  expect_bits(c, Codes(800, 0x00), Array({3, 2}, {0, 1, -1, -1, 3, 9}), scales, Array({3, 2}, 1.0));
  CodesCase none = c;
  none.num_rows = 0;
  expect_bits(none, {}, Array({3, 2}, 0.0), Array({0, 2}), Array({3, 2}, 1.0));
}

TEST_P(FinalizeE4m3, NoTokensLeaveNoScaleUnwritten) {
  if (dtype() != DType::kE4M3) GTEST_SKIP() << "only e4m3 rows leave with scales";
  for (std::int64_t hidden : {1, 200, 256}) {
    const Tensor rows(device(), DType::kE4M3, {4, hidden}), slots(device(), DType::kI32, {0, 2});
    Tensor out(device(), DType::kE4M3, {0, hidden}), scales(device(), DType::kF32, {(hidden + 127) / 128, 3});
    FinalizeOptions options{.scale_layout = ScaleLayout::kColumnMajor};
    options.out_scales = scales;
    finalize(rows.read_only(), slots.read_only(), out, options, Call(device()));
    EXPECT_TRUE(equal(scales.get(), Array({(hidden + 127) / 128, 3}, 0.0)));
    EXPECT_TRUE(scales.surroundings_intact());
  }
}

TEST_P(FinalizeE4m3, CarriesNaNInfinityAndOverflow) {
  // Codes of NaN beside numbers, blocks of nothing but NaN, and sums beyond the largest code and f32.
  Codes codes(2 * 256, 0x7E);
  for (std::size_t i = 0; i < 128; ++i) codes[i] = 0x7F;
  codes[256 + 5] = 0xFF;
  const CodesCase c{.num_tokens = 4, .top_k = 2, .num_rows = 2, .hidden = 256, .rows_width = 256};
  const Array slots({4, 2}, {0, 1, 0, 0, 1, 1, 1, -1});
  for (double weight : {1.0, 1024.0, 0x1p120, -0x1p120})
    for (double scale : {1.0, 0x1p-20, 0x1p7})
      expect_bits(c, codes, slots, Array({2, 2}, scale), Array({4, 2}, weight));
}

TEST_P(FinalizeE4m3, BitsDoNotDependOnBatchOrThreads) {
  for (int threads : {1, 2, 5})
    for (std::int64_t num_tokens : {1, 3, 300})
      expect_finalize({.num_tokens = num_tokens,
                       .top_k = 8,
                       .num_rows = 2400,
                       .hidden = 640,
                       .rows_width = 640,
                       .num_threads = threads});
}

INSTANTIATE_TEST_SUITE_P(, FinalizeE4m3,
                         ::testing::ValuesIn(devices_times({DType::kF32, DType::kF16, DType::kBF16,
                                                            DType::kE4M3})),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
