// quantize against bytes written down by hand, every value of the small types, and convert_scales.

#include "moecore/quantize.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "support/cases.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantize_case.h"

namespace moecore::test {
namespace {

class QuantizeGolden : public OnDevice {
 protected:
  /// data and scale bytes of bf16 rows with linear scales.
  std::pair<Bytes, Bytes> run(const std::vector<double>& values, const QuantFormat& f, double global = 1,
                              DType dtype = DType::kBF16) {
    const auto cols = static_cast<std::int64_t>(values.size());
    Tensor x(device(), dtype, {1, cols});
    x.set_bytes(encoded(dtype, values).bytes);
    const Tensor g(device(), DType::kF32, Array({1}, global));
    QuantizeOptions options;
    if (f.kind == QuantKind::kNvfp4 && global != 1) options.global_scale = g.read_only();
    Outputs out(device(), f, 1, cols, RowMap::dense(f, 1));
    quantize(x.read_only(), out.data, out.scales, f, options, Call(device()));
    return {out.data.get_bytes(), out.scales.get_bytes()};
  }
  void expect(const std::vector<double>& values, const QuantFormat& f, std::vector<int> scale,
              std::vector<int> data, double global = 1) {
    const auto [d, s] = run(values, f, global);
    auto bytes = [](const std::vector<int>& v) {
      Bytes b;
      for (int i : v) b.push_back(static_cast<std::byte>(i));
      return b;
    };
    EXPECT_TRUE(same_bytes(d, bytes(data)));
    EXPECT_TRUE(same_bytes(s, bytes(scale)));
  }
  static std::vector<double> generate(int n, const std::function<double(int)>& f) {
    std::vector<double> v;
    for (int i = 0; i < n; ++i) v.push_back(f(i));
    return v;
  }
};

constexpr double kInf = std::numeric_limits<double>::infinity(),
                 kNan = std::numeric_limits<double>::quiet_NaN();

TEST_P(QuantizeGolden, Nvfp4) {
  const QuantFormat f = QuantFormat::nvfp4(ScaleLayout::kLinear);
  expect(generate(16, [](int i) { return i - 7.5; }), f, {0x3A},
         {0xff, 0xee, 0xcd, 0x9a, 0x21, 0x54, 0x66, 0x77});
  expect(generate(16, [](int) { return 0.0; }), f, {0}, std::vector<int>(8, 0), 2688);
  expect(generate(16, [](int i) { return oracle::round_to(DType::kBF16, 0.1 * (i + 1) * (i % 2 ? -1 : 1)); }),
         f, {0x7E}, {0xa1, 0xb2, 0xc4, 0xd5, 0xe5, 0xe6, 0xf6, 0xf7}, 1680);
  expect(generate(16, [](int i) { return i ? 0.0 : oracle::round_to(DType::kBF16, -1e-4); }), f, {0},
         {8, 0, 0, 0, 0, 0, 0, 0});
  std::vector<double> e{3, -1.5, .75, 6, -6, .25, .26, 5, -5, 2.5, 3.5, 1.75, 1.25, .75, -0.0, 1e-9};
  for (double& x : e) x = oracle::round_to(DType::kBF16, x);
  expect(e, f, {0x38}, {0xb5, 0x72, 0x0f, 0x61, 0x4e, 0x46, 0x22, 0x08});
  expect(generate(16, [](int i) { return i == 0   ? kInf
                                         : i == 1 ? 1.0
                                         : i == 2 ? -1.0
                                                  : 2.0; }), f, {0x7E},
         {0x07, 0x08, 0, 0, 0, 0, 0, 0});
  expect(generate(16, [](int) { return kNan; }), f, {0x7F}, std::vector<int>(8, 0x77));
  expect(generate(16, [](int i) { return i == 1 ? kNan : 6.0; }), f, {0x38}, std::vector<int>(8, 0x77));
}

TEST_P(QuantizeGolden, Mxfp8) {
  const QuantFormat f = QuantFormat::mxfp8(ScaleLayout::kLinear);
  expect(generate(32, [](int i) { return i - 15.5; }), f, {123},
         {0xf8, 0xf6, 0xf6, 0xf4, 0xf4, 0xf2, 0xf2, 0xf0, 0xef, 0xed, 0xeb, 0xe9, 0xe6, 0xe2, 0xdc, 0xd0,
          0x50, 0x5c, 0x62, 0x66, 0x69, 0x6b, 0x6d, 0x6f, 0x70, 0x72, 0x72, 0x74, 0x74, 0x76, 0x76, 0x78});
  for (auto [value, scale] :
       {std::pair<double, int>{448, 127}, {450, 128}, {1, 119}, {1.75, 119}, {1.7578125, 120}})
    EXPECT_EQ(int(run(std::vector<double>(32, value), f).second[0]), scale) << value;
  // Infinity keeps its sign, and NaN stays NaN.
  const auto [data, scale] =
      run(generate(32, [](int i) { return i == 0   ? kInf
                                          : i == 1 ? -kInf
                                                   : kNan; }), f);
  EXPECT_EQ(int(scale[0]), 0xFE);
  EXPECT_EQ(int(data[0]), 0x7E);
  EXPECT_EQ(int(data[1]), 0xFE);
  EXPECT_EQ(int(data[2]), 0x7F);
  // The quotient of the contract is exact also where f32(amax * f32(1 / 448)) is not.
  EXPECT_EQ(int(run(std::vector<double>(32, std::nextafter(448.0f, 1e9f)), f, 1, DType::kF32).second[0]),
            128);
}

TEST_P(QuantizeGolden, Mxfp4) {
  using enum Mxfp4Rounding;
  auto scale = [&](double value, Mxfp4Rounding rounding) {
    return int(run(std::vector<double>(32, oracle::round_to(DType::kBF16, value)),
                   QuantFormat::mxfp4(ScaleLayout::kLinear, rounding))
                   .second[0]);
  };
  struct Row {
    double value;
    int nearest, up;
  };
  for (const Row& r : {Row{1, 125, 125},
                       {1.5, 125, 125},
                       {1.742, 125, 126},
                       {1.75, 126, 126},
                       {3, 126, 126},
                       {3.5, 127, 127},
                       {6, 127, 127},
                       {448, 134, 134}}) {
    EXPECT_EQ(scale(r.value, kNearest175), r.nearest) << r.value;
    EXPECT_EQ(scale(r.value, kUp), r.up) << r.value;
  }
  EXPECT_EQ(scale(7.9, kFloor), 127);
  EXPECT_EQ(scale(8, kFloor), 128);
}

TEST_P(QuantizeGolden, Fp8) {
  auto scale_bits = [&](const std::vector<double>& values, const QuantFormat& f) {
    std::uint32_t bits;
    const auto [data, scale] = run(values, f);
    std::memcpy(&bits, scale.data(), 4);
    for (std::byte b : data) EXPECT_EQ(int(b), 0);
    return bits;
  };
  const std::vector<double> zeros(128, 0.0);
  EXPECT_EQ(scale_bits(zeros, QuantFormat::fp8_token()), 0x36924925u);
  EXPECT_EQ(std::bit_cast<float>(scale_bits(zeros, QuantFormat::fp8_block128())), 1e-10f / 448);
  QuantFormat pow2 = QuantFormat::fp8_block128();
  pow2.power_of_two = true;
  EXPECT_EQ(std::bit_cast<float>(scale_bits(zeros, pow2)), 0x1p-33f);
}

// All of bf16 and f16, and f32 around every tie, through the conversion that the device uses: a static scale
// of 1 for e4m3, a block pinned to the scale 1 by a 6 for e2m1.
TEST_P(QuantizeGolden, EveryValue) {
  for (DType dtype : float_types()) {
    std::vector<double> values;
    if (dtype == DType::kF32) {
      Random random(1);
      for (const oracle::SmallFloat* table : {&oracle::SmallFloat::e4m3(), &oracle::SmallFloat::e2m1()})
        for (std::size_t i = 0; i < table->values.size(); ++i) {
          const double v = table->values[i],
                       next = i + 1 < table->values.size() ? table->values[i + 1] : v * 1.25;
          for (float p : {static_cast<float>(v), static_cast<float>((v + next) / 2)})
            for (float q : {p, std::nextafter(p, 0.0f), std::nextafter(p, 1e30f)}) {
              values.push_back(q);
              values.push_back(-q);
            }
        }
      for (int i = 0; i < 1 << 18; ++i)
        values.push_back(
            static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()))));
    } else {
      for (std::uint64_t h = 0; h < 65536; ++h) values.push_back(oracle::decode(dtype, h));
    }
    const auto n = static_cast<std::int64_t>(values.size());
    Tensor x(device(), dtype, {1, n});
    x.set_bytes(encoded(dtype, values).bytes);
    Tensor data(device(), DType::kU8, {1, n});
    const Tensor one(device(), DType::kF32, Array({1, 1}, 1.0));
    quantize(x.read_only(), data, one.read_only(), QuantFormat::fp8_tensor_static(), {}, Call(device()));
    const Bytes codes = data.get_bytes();
    int wrong = 0;
    for (std::size_t i = 0; i < values.size() && wrong < 5; ++i)
      if (int(codes[i]) != oracle::SmallFloat::e4m3().encode(values[i])) {
        ++wrong;
        ADD_FAILURE() << name(dtype) << " " << values[i] << " -> " << int(codes[i]);
      }

    std::vector<double> small;
    for (double v : values) {
      if (small.size() % 32 == 0) small.push_back(6);
      if (std::fabs(v) <= 6 || std::isnan(v)) small.push_back(v);
    }
    while (small.size() % 32) small.push_back(0);
    const auto m = static_cast<std::int64_t>(small.size());
    Tensor y(device(), dtype, {1, m});
    y.set_bytes(encoded(dtype, small).bytes);
    Tensor nibbles(device(), DType::kU8, {1, m / 2}), scales(device(), DType::kU8, {1, m / 32});
    quantize(y.read_only(), nibbles, scales, QuantFormat::mxfp4(ScaleLayout::kLinear), {}, Call(device()));
    EXPECT_TRUE(same_bytes(scales.get_bytes(), Bytes(static_cast<std::size_t>(m / 32), std::byte{127})));
    const Bytes packed = nibbles.get_bytes();
    wrong = 0;
    for (std::size_t i = 0; i < small.size() && wrong < 5; ++i)
      if ((int(packed[i / 2]) >> (i % 2 * 4) & 15) != oracle::SmallFloat::e2m1().encode(small[i])) {
        ++wrong;
        ADD_FAILURE() << name(dtype) << " " << small[i] << " -> " << int(packed[i / 2]);
      }
  }
}

// A call whose rows no cache holds stores its codes in another way than one that does.
TEST_P(QuantizeGolden, MoreThanTheCacheHolds) {
  const std::int64_t few = 131, rows = 16384, cols = 2040, padded = 2048;
  const Bytes some = random_values(31, DType::kBF16, few, cols).bytes;
  Bytes all;
  while (std::ssize(all) < rows * cols * 2) all.insert(all.end(), some.begin(), some.end());
  all.resize(static_cast<std::size_t>(rows * cols * 2));
  const Place place{.name = "apart", .row_padding = 6, .byte_offset = 1};
  for (const QuantFormat& f : {QuantFormat::fp8_token(), QuantFormat::nvfp4(ScaleLayout::kLinear)}) {
    auto run = [&](const Bytes& x, std::int64_t n) {
      Tensor input(device(), DType::kBF16, {n, cols});
      input.set_bytes(x);
      Outputs out(device(), f, n, padded, RowMap::dense(f, n), place);
      quantize(input.read_only(), out.data, out.scales, f, {}, Call(device()));
      EXPECT_TRUE(out.data.surroundings_intact());
      return std::pair(out.data.get_bytes(), out.scales.get_bytes());
    };
    auto repeated = [&](const Bytes& part, std::size_t size) {
      Bytes bytes(size);
      for (std::size_t i = 0; i < size; ++i) bytes[i] = part[i % part.size()];
      return bytes;
    };
    const auto [data, scales] = run(all, rows);
    const auto [few_data, few_scales] = run(some, few);
    EXPECT_TRUE(same_bytes(data, repeated(few_data, data.size())));
    EXPECT_TRUE(same_bytes(scales, repeated(few_scales, scales.size())));
  }
}

TEST_P(QuantizeGolden, ConvertScales) {
  using enum ScaleLayout;
  constexpr ScaleLayout kLayouts[] = {kLinear, kSwizzled128x4, kSwizzled8x4, kColumnMajor};
  auto shape = [](ScaleLayout layout, std::int64_t rows, std::int64_t cols) -> std::vector<std::int64_t> {
    switch (layout) {
      case kLinear:
        return {rows, cols};
      case kColumnMajor:
        return {(cols + 3) / 4, round_up(rows, 4) * 4};
      default:
        return {round_up(rows, layout == kSwizzled128x4 ? 128 : 8), round_up(cols, 4)};
    }
  };
  for (auto [rows, cols] :
       {std::pair<std::int64_t, std::int64_t>{201, 12}, {1, 1}, {0, 5}, {33, 7}, {128, 4}}) {
    Random random(2);
    Tensor linear(device(), DType::kU8, {rows, cols});
    const Bytes bytes = random.bytes(static_cast<std::size_t>(rows * cols));
    linear.set_bytes(bytes);
    for (ScaleLayout from : kLayouts) {
      Tensor first(device(), DType::kU8, shape(from, rows, cols));
      convert_scales(linear.read_only(), kLinear, first, from, rows, cols, Call(device()));
      Bytes expected(first.get_bytes().size(), std::byte{0});
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < cols; ++c)
          expected[static_cast<std::size_t>(oracle::scale_position(from, r, c, round_up(rows, 4), cols))] =
              bytes[static_cast<std::size_t>(r * cols + c)];
      EXPECT_TRUE(same_bytes(first.get_bytes(), expected));
      for (ScaleLayout to : kLayouts) {
        Tensor second(device(), DType::kU8, shape(to, rows, cols)), back(device(), DType::kU8, {rows, cols});
        convert_scales(first.read_only(), from, second, to, rows, cols, Call(device()));
        convert_scales(second.read_only(), to, back, kLinear, rows, cols, Call(device()));
        EXPECT_TRUE(same_bytes(back.get_bytes(), bytes));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, QuantizeGolden, ::testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace moecore::test
