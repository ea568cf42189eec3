// quantize and its fused forms, bit for bit: data, scales and their padding, on every format, layout and
// shape, with special values strewn in. Outputs start poisoned, so a byte that should be written and is not
// shows as well as one that should not be.

#include "moecore/quantize.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "moecore/activate.h"
#include "moecore/error.h"
#include "moecore/permute.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantize_oracle.h"

namespace moecore::test {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::byte kPoison{0xA5};  // of u8 tensors

std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b * b;
}

struct NamedFormat {
  const char* name;
  QuantFormat format;
};

const std::vector<NamedFormat>& formats() {
  static const std::vector<NamedFormat> list = [] {
    using enum ScaleLayout;
    using enum Mxfp4Rounding;
    QuantFormat pow2 = QuantFormat::fp8_block128(), capped = QuantFormat::fp8_token();
    pow2.power_of_two = true;
    capped.amax_cap = 1.5f;
    return std::vector<NamedFormat>{
        {"fp8 tensor", QuantFormat::fp8_tensor()},
        {"fp8 tensor static", QuantFormat::fp8_tensor_static()},
        {"fp8 token", QuantFormat::fp8_token()},
        {"fp8 token capped", capped},
        {"fp8 block128", QuantFormat::fp8_block128()},
        {"fp8 block128 power of two", pow2},
        {"fp8 block128 column major", QuantFormat::fp8_block128(kColumnMajor)},
        {"fp8 block128 e8m0", QuantFormat::fp8_block128_e8m0()},
        {"fp8 block128 e8m0 column major", QuantFormat::fp8_block128_e8m0(kColumnMajor)},
        {"nvfp4 128x4", QuantFormat::nvfp4()},
        {"nvfp4 8x4", QuantFormat::nvfp4(kSwizzled8x4)},
        {"nvfp4 linear", QuantFormat::nvfp4(kLinear)},
        {"mxfp8 128x4", QuantFormat::mxfp8()},
        {"mxfp8 8x4", QuantFormat::mxfp8(kSwizzled8x4)},
        {"mxfp8 linear", QuantFormat::mxfp8(kLinear)},
        {"mxfp4 nearest", QuantFormat::mxfp4()},
        {"mxfp4 up", QuantFormat::mxfp4(kSwizzled128x4, kUp)},
        {"mxfp4 floor linear", QuantFormat::mxfp4(kLinear, kFloor)},
    };
  }();
  return list;
}

bool is_fp4(const QuantFormat& f) {
  return f.data_dtype() == DType::kE2M1;
}
bool is_swizzled(const QuantFormat& f) {
  return f.layout == ScaleLayout::kSwizzled128x4 || f.layout == ScaleLayout::kSwizzled8x4;
}
bool is_tensor(const QuantFormat& f) {
  return f.kind == QuantKind::kFp8 && f.granularity == Granularity::kTensor;
}
std::int64_t tile_rows(const QuantFormat& f) {
  return f.layout == ScaleLayout::kSwizzled128x4 ? 128 : 8;
}

/// Values in memory, with their f32 meaning.
struct Values {
  Bytes bytes;
  std::vector<float> floats;
};

Values encoded(DType dtype, const std::vector<double>& values) {
  Values v;
  const auto size = static_cast<std::size_t>(bit_width(dtype)) / 8;
  for (double x : values) {
    const std::uint64_t bits = oracle::encode(dtype, x);
    v.bytes.resize(v.bytes.size() + size);
    std::memcpy(v.bytes.data() + v.bytes.size() - size, &bits, size);
    v.floats.push_back(static_cast<float>(oracle::decode(dtype, bits)));
  }
  return v;
}

/// Values of many magnitudes, with runs of zeros, denormals, infinities, NaNs and overflowing ones.
Values random_values(std::uint64_t seed, DType dtype, std::int64_t rows, std::int64_t cols) {
  Random random(seed);
  constexpr double kInf = std::numeric_limits<double>::infinity(),
                   kNan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> values;
  for (std::int64_t r = 0; r < rows; ++r) {
    double scale = 1;
    std::int64_t kind = 0, left = 0;
    for (std::int64_t c = 0; c < cols; ++c) {
      if (left-- == 0) {  // a new run of one kind
        left = 8 + random.below(120);
        kind = random.below(12);
        scale = std::ldexp(1.0, static_cast<int>(random.below(24)) - 12);
        if (dtype != DType::kF16 && random.below(4) == 0)
          scale = std::ldexp(1.0, static_cast<int>(random.below(250)) - 125);
      }
      double x = random.uniform(-1, 1) * scale;
      switch (kind) {
        case 0:
          x = random.below(2) ? 0.0 : -0.0;
          break;
        case 1:
          x = std::ldexp(x / scale, dtype == DType::kF16 ? -16 : -127);
          break;
        case 2:
          x = kNan;
          break;
        case 3:
          if (random.below(8) == 0) x = random.below(2) ? kInf : -kInf;
          break;
        case 4:
          if (random.below(8) == 0) x = random.below(2) ? kNan : 0.0;
          break;
        case 5:
          x = std::copysign(oracle::SmallFloat::e2m1().values[static_cast<std::size_t>(random.below(8))], x);
          break;
        default:
          break;
      }
      values.push_back(x);
    }
  }
  return encoded(dtype, values);
}

/// Which rows are quantised, and where their scales stand.
struct RowMap {
  std::vector<bool> live;
  std::vector<std::int64_t> base, local, expert;
  std::vector<std::pair<std::int64_t, std::int64_t>> scale_blocks;  // swizzled rows that are defined
  std::int64_t scale_rows = 0;                                      // of the tensor, swizzled

  static RowMap dense(const QuantFormat& f, std::int64_t rows) {
    RowMap m;
    for (std::int64_t r = 0; r < rows; ++r) m.add(true, 0, r, 0);
    m.scale_rows = round_up(rows, tile_rows(f));
    m.scale_blocks = {{0, m.scale_rows}};
    return m;
  }
  static RowMap experts(const std::vector<std::int64_t>& offsets,
                        const std::vector<std::int64_t>& scale_offsets, std::int64_t rows) {
    RowMap m;
    const auto num_experts = static_cast<std::int64_t>(offsets.size()) - 1;
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
      for (std::int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
        m.add(true, scale_offsets[e], r - offsets[e], static_cast<std::int64_t>(e));
      m.scale_blocks.push_back({scale_offsets[e], scale_offsets[e + 1]});
    }
    for (std::int64_t r = offsets.back(); r < rows; ++r) m.add(false, 0, 0, 0);
    m.scale_rows = expert_scale_rows(rows, num_experts);
    return m;
  }
  static RowMap groups(const QuantFormat& f, const std::vector<std::int64_t>& counts,
                       std::int64_t group_rows) {
    RowMap m;
    const std::int64_t padded = round_up(group_rows, tile_rows(f));
    for (std::size_t e = 0; e < counts.size(); ++e) {
      const auto base = static_cast<std::int64_t>(e) * padded;
      for (std::int64_t i = 0; i < group_rows; ++i)
        m.add(i < counts[e], base, i, static_cast<std::int64_t>(e));
      m.scale_blocks.push_back({base, base + padded});
    }
    m.scale_rows = static_cast<std::int64_t>(counts.size()) * padded;
    return m;
  }

 private:
  void add(bool is_live, std::int64_t b, std::int64_t l, std::int64_t e) {
    live.push_back(is_live);
    base.push_back(b);
    local.push_back(l);
    expert.push_back(e);
  }
};

/// The two outputs of a call.
struct Outputs {
  Tensor data, scales;

  Outputs(Device device, const QuantFormat& f, std::int64_t rows, std::int64_t padded, const RowMap& map,
          const Place& place = {})
      : data(device, DType::kU8, {rows, is_fp4(f) ? padded / 2 : padded}, place),
        scales(device, f.scale_dtype() == DType::kF32 ? DType::kF32 : DType::kU8, shape(f, rows, padded, map),
               f.layout == ScaleLayout::kLinear ? scale_place(f, place) : Place{}) {}

  /// The same, with the elements of f32 scales where elements of their size may stand.
  static Place scale_place(const QuantFormat& f, Place place) {
    if (f.scale_dtype() == DType::kF32) place.byte_offset = place.byte_offset / 4 * 4;
    return place;
  }

  static std::vector<std::int64_t> shape(const QuantFormat& f, std::int64_t rows, std::int64_t padded,
                                         const RowMap& map) {
    const auto s = scale_shape(f, rows, padded);
    return {is_swizzled(f) ? map.scale_rows : s[0], s[1]};
  }
};

Bytes expected_data(const oracle::Quantized& q, const QuantFormat& f, const RowMap& map) {
  Bytes bytes;
  const auto cols = static_cast<std::size_t>(q.padded_cols);
  for (std::size_t r = 0; r < map.live.size(); ++r)
    for (std::size_t c = 0; c < cols; c += is_fp4(f) ? 2 : 1) {
      const std::uint8_t* code = q.codes.data() + r * cols + c;
      bytes.push_back(!map.live[r] ? kPoison
                                   : static_cast<std::byte>(is_fp4(f) ? code[0] | code[1] << 4 : code[0]));
    }
  return bytes;
}

Bytes expected_scales(const oracle::Quantized& q, const QuantFormat& f, const RowMap& map) {
  const bool f32 = f.scale_dtype() == DType::kF32;
  const std::int64_t size = f32 ? 4 : 1, rows = static_cast<std::int64_t>(map.live.size());
  auto put = [&](Bytes& bytes, std::int64_t at, std::uint32_t value) {
    std::memcpy(bytes.data() + at * size, &value, static_cast<std::size_t>(size));
  };
  auto scale = [&](std::int64_t r, std::int64_t b) {
    return q.scales[static_cast<std::size_t>(r * q.blocks + b)];
  };
  if (is_tensor(f)) {
    Bytes bytes(4);
    put(bytes, 0, q.scales[0]);
    return bytes;
  }
  const std::byte poison = f32 ? std::byte{0xFF} : kPoison;
  Bytes bytes;
  if (f.layout == ScaleLayout::kLinear) {
    bytes.assign(static_cast<std::size_t>(rows * q.blocks * size), poison);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t b = 0; b < q.blocks && map.live[static_cast<std::size_t>(r)]; ++b)
        put(bytes, r * q.blocks + b, scale(r, b));
  } else if (f.layout == ScaleLayout::kColumnMajor) {
    const std::int64_t pitch = round_up(rows, 4), columns = f32 ? q.blocks : round_up(q.blocks, 4);
    bytes.assign(static_cast<std::size_t>(columns * pitch * size), std::byte{0});
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t b = 0; b < columns; ++b) {
        const std::int64_t at = f32 ? b * pitch + r : oracle::scale_position(f.layout, r, b, pitch, columns);
        if (!map.live[static_cast<std::size_t>(r)])
          std::memset(bytes.data() + at * size, static_cast<int>(poison), static_cast<std::size_t>(size));
        else if (b < q.blocks)
          put(bytes, at, scale(r, b));
      }
  } else {
    const std::int64_t width = round_up(q.blocks, 4);
    bytes.assign(static_cast<std::size_t>(map.scale_rows * width), poison);
    for (auto [begin, end] : map.scale_blocks)
      std::fill(bytes.begin() + begin * width, bytes.begin() + end * width, std::byte{0});
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto i = static_cast<std::size_t>(r);
      for (std::int64_t b = 0; b < q.blocks && map.live[i]; ++b)
        put(bytes, map.base[i] * width + oracle::scale_position(f.layout, map.local[i], b, 0, q.blocks),
            scale(r, b));
    }
  }
  return bytes;
}

::testing::AssertionResult same_bytes(const Bytes& actual, const Bytes& expected) {
  if (actual.size() != expected.size())
    return ::testing::AssertionFailure() << actual.size() << " bytes, expected " << expected.size();
  for (std::size_t i = 0; i < actual.size(); ++i)
    if (actual[i] != expected[i])
      return ::testing::AssertionFailure() << "byte " << i << " of " << actual.size() << " is "
                                           << int(actual[i]) << ", expected " << int(expected[i]);
  return ::testing::AssertionSuccess();
}

Array integers(const std::vector<std::int64_t>& values) {
  Array a({static_cast<std::int64_t>(values.size())});
  for (std::size_t i = 0; i < values.size(); ++i) a.values[i] = static_cast<double>(values[i]);
  return a;
}

class Quantize : public OnDeviceDType {
 protected:
  Tensor tensor(const Values& v, std::int64_t rows, std::int64_t cols, const Place& place = {}) {
    Tensor t(device(), dtype(), {rows, cols}, place);
    t.set_bytes(v.bytes);
    return t;
  }

  /// quantize() of random rows against the oracle.
  void expect_quantize(const NamedFormat& n, std::int64_t rows, std::int64_t cols, std::int64_t padded,
                       const Place& place, const RowMap& map, const ExpertRows& experts = {},
                       std::int64_t num_experts = 1, int num_threads = 0) {
    SCOPED_TRACE(::testing::Message()
                 << n.name << " " << rows << " x " << cols << " -> " << padded << " " << place.name);
    const QuantFormat& f = n.format;
    Random random(static_cast<std::uint64_t>(rows * 131 + cols));
    const Values x = random_values(random.bits(), dtype(), rows, cols);
    const Tensor input = tensor(x, rows, cols, place);
    QuantizeOptions options{.rows = experts};
    std::vector<float> global(static_cast<std::size_t>(rows), 1.0f);
    std::optional<Tensor> global_tensor;
    if (f.kind == QuantKind::kNvfp4 && cols % 3 != 0) {  // else: none given
      Array g = random.floats({num_experts}, DType::kF32, 0.01, 50);
      global_tensor.emplace(device(), DType::kF32, g);
      options.global_scale = global_tensor->read_only();
      for (std::size_t r = 0; r < global.size(); ++r) global[r] = static_cast<float>(g[map.expert[r]]);
    }
    Outputs out(device(), f, rows, padded, map, place);
    constexpr float kStatic = 0.0371f;
    if (f.static_scale) out.scales.set(Array({1, 1}, kStatic));
    quantize(input.read_only(), out.data, out.scales, f, options, Call(device(), 0, num_threads));
    const oracle::Quantized q = oracle::quantize(x.floats, cols, padded, f, global, kStatic, map.live);
    EXPECT_TRUE(same_bytes(out.data.get_bytes(), expected_data(q, f, map)));
    EXPECT_TRUE(same_bytes(out.scales.get_bytes(), expected_scales(q, f, map)));
    EXPECT_TRUE(out.data.surroundings_intact());
    EXPECT_TRUE(out.scales.surroundings_intact());
  }
};

TEST_P(Quantize, AnyWidth) {
  for (const NamedFormat& n : formats())
    for (std::int64_t cols : {0,  1,   2,   15,  16,  17,  31,  32,   33,   48,   64,   80,
                              96, 127, 128, 130, 255, 257, 360, 1000, 2880, 4096, 4100, 7168})
      for (const Place& place : places(dtype()))
        if (cols < 1000 || place.name == "dense")
          expect_quantize(n, 3, cols, is_fp4(n.format) ? round_up(cols, 2) : cols, place,
                          RowMap::dense(n.format, 3));
}

TEST_P(Quantize, PaddedColumns) {
  for (const NamedFormat& n : formats())
    for (auto [cols, padded] : {std::pair<std::int64_t, std::int64_t>{2880, 3072},
                                {0, 256},
                                {1, 2},
                                {63, 256},
                                {360, 512},
                                {128, 130},
                                {4000, 4608},
                                {30, 34}})
      expect_quantize(n, 5, cols, padded, {}, RowMap::dense(n.format, 5));
}

TEST_P(Quantize, AnyRowCount) {
  for (const NamedFormat& n : formats())
    for (std::int64_t rows : {0, 1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 300})
      expect_quantize(n, rows, 96, 96, {}, RowMap::dense(n.format, rows));
}

TEST_P(Quantize, ThreadsDoNotMatter) {
  for (const NamedFormat& n : formats())
    for (int threads : {1, 2, 5})
      expect_quantize(n, 200, 400, 400, {}, RowMap::dense(n.format, 200), {}, 1, threads);
}

// Every expert count and split, rows behind the last expert, empty experts.
TEST_P(Quantize, PerExpert) {
  for (const NamedFormat& n : formats())
    for (std::int64_t num_experts : {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 256, 257})
      for (std::int64_t rows : {0, 1, 40, 331}) {
        if (num_experts > 20 && rows > 40 && num_experts % 2 == 0) continue;
        Random random(static_cast<std::uint64_t>(num_experts * 1000 + rows));
        std::vector<std::int64_t> offsets{0}, scale_offsets{0};
        for (std::int64_t e = 0; e < num_experts; ++e) {
          const std::int64_t left = rows - rows / 10 - offsets.back();
          const std::int64_t count =
              random.below(3) ? std::min(left, random.below(2 * rows / num_experts + 3)) : 0;
          offsets.push_back(offsets.back() + count);
          scale_offsets.push_back(scale_offsets.back() + round_up(count, 128));
        }
        const Tensor offsets_tensor(device(), DType::kI32, integers(offsets));
        const Tensor scale_offsets_tensor(device(), DType::kI32, integers(scale_offsets));
        const RowMap map = RowMap::experts(offsets, scale_offsets, rows);
        const ExpertRows experts{.expert_offsets = offsets_tensor.read_only(),
                                 .scale_offsets = scale_offsets_tensor.read_only()};
        expect_quantize(n, rows, 80, 96, {}, map, experts, num_experts);
      }
}

TEST_P(Quantize, Groups) {
  for (const NamedFormat& n : formats())
    for (std::int64_t group_rows : {1, 7, 128, 130}) {
      const std::vector<std::int64_t> counts{0, group_rows, 1, group_rows / 2};
      const Tensor counts_tensor(device(), DType::kI32, integers(counts));
      expect_quantize(n, group_rows * 4, 112, 112, {}, RowMap::groups(n.format, counts, group_rows),
                      {.row_counts = counts_tensor.read_only()}, 4);
    }
}

// Per expert, row by row, is what the dense form makes of the same rows; and rows do not see each other.
TEST_P(Quantize, BatchSplit) {
  for (const NamedFormat& n : formats()) {
    SCOPED_TRACE(n.name);
    if (is_tensor(n.format) || n.format.layout != ScaleLayout::kLinear) continue;
    const std::int64_t rows = 37, cols = 300;
    const Values x = random_values(9, dtype(), rows, cols);
    const Tensor input = tensor(x, rows, cols);
    Outputs whole(device(), n.format, rows, cols, RowMap::dense(n.format, rows));
    Outputs parts(device(), n.format, rows, cols, RowMap::dense(n.format, rows));
    quantize(input.read_only(), whole.data, whole.scales, n.format, {}, Call(device()));
    auto slice = [](TensorView v, std::int64_t begin, std::int64_t count) {
      v.data = static_cast<std::byte*>(v.data) + begin * v.strides[0] * bit_width(v.dtype) / 8;
      v.shape[0] = count;
      return v;
    };
    for (std::int64_t begin = 0; begin < rows; begin += 5) {
      const std::int64_t count = std::min<std::int64_t>(5, rows - begin);
      quantize(slice(input.read_only(), begin, count), slice(parts.data, begin, count),
               slice(parts.scales, begin, count), n.format, {}, Call(device()));
    }
    EXPECT_TRUE(same_bytes(parts.data.get_bytes(), whole.data.get_bytes()));
    EXPECT_TRUE(same_bytes(parts.scales.get_bytes(), whole.scales.get_bytes()));
  }
}

TEST_P(Quantize, ActivateFusedIsThePair) {
  const std::int64_t rows = 9;
  for (const NamedFormat& n : formats())
    for (std::int64_t inter : {1, 40, 360, 2880, 4400})
      for (ActivationKind kind :
           {ActivationKind::kSilu, ActivationKind::kSwigluOai, ActivationKind::kRelu2, ActivationKind::kGelu,
            ActivationKind::kGeluTanh, ActivationKind::kQuickGelu})
        for (GateOrder order :
             {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain}) {
          if (inter > 1000 && (kind != ActivationKind::kSilu || order == GateOrder::kUpGate)) continue;
          SCOPED_TRACE(::testing::Message()
                       << n.name << " I=" << inter << " kind " << int(kind) << " order " << int(order));
          const Activation a{.kind = kind, .order = order, .alpha = 1.702f, .beta = 1.0f, .limit = 7.0f};
          const std::int64_t padded = round_up(inter, 64);
          const std::int64_t width = order == GateOrder::kPlain ? inter : 2 * inter;
          const Values x = random_values(static_cast<std::uint64_t>(inter), dtype(), rows, width);
          const Tensor input = tensor(x, rows, width);
          const Tensor offsets(device(), DType::kI32, integers({0, 3, 3, 8})),
              scale_offsets(device(), DType::kI32, integers({0, 128, 128, 256}));
          const QuantizeOptions options{
              .rows = {.expert_offsets = offsets.read_only(), .scale_offsets = scale_offsets.read_only()}};
          const RowMap map = RowMap::experts({0, 3, 3, 8}, {0, 128, 128, 256}, rows);
          Outputs fused(device(), n.format, rows, padded, map), pair(device(), n.format, rows, padded, map);
          if (n.format.static_scale) {
            fused.scales.set(Array({1, 1}, 0.5));
            pair.scales.set(Array({1, 1}, 0.5));
          }
          Tensor activated(device(), dtype(), {rows, inter});
          activate(input.read_only(), activated, a, {}, Call(device()));
          quantize(activated.read_only(), pair.data, pair.scales, n.format, options, Call(device()));
          activate_quantize(input.read_only(), a, fused.data, fused.scales, n.format, options,
                            Call(device()));
          EXPECT_TRUE(same_bytes(fused.data.get_bytes(), pair.data.get_bytes()));
          EXPECT_TRUE(same_bytes(fused.scales.get_bytes(), pair.scales.get_bytes()));
        }
}

TEST_P(Quantize, PermuteFusedIsThePair) {
  for (const NamedFormat& n : formats()) {
    if (is_tensor(n.format) && !n.format.static_scale) continue;
    for (const RoutingCase& c : {RoutingCase{0, 2, 4},
                                 {1, 1, 1},
                                 {7, 2, 5, Routing::kInvalid},
                                 {40, 8, 64},
                                 {33, 3, 17, Routing::kGaps},
                                 {5, 2, 3, Routing::kAllDropped},
                                 {9, 20, 32}})
      for (bool per_expert_global : {false, true}) {
        if (per_expert_global && n.format.kind != QuantKind::kNvfp4) continue;
        SCOPED_TRACE(::testing::Message()
                     << n.name << " " << c << (per_expert_global ? " a global each" : ""));
        const std::int64_t cols = 144, padded = 160, rows = c.num_tokens * c.top_k;
        const oracle::PlanResult p = oracle::plan(c.ids(), {.num_experts = c.num_experts});
        const Tensor expert_offsets(device(), DType::kI32, p.expert_offsets),
            scale_offsets(device(), DType::kI32, p.scale_offsets),
            row_token(device(), DType::kI32, p.row_token), slot_row(device(), DType::kI32, p.slot_row);
        const Plan plan{.expert_offsets = expert_offsets,
                        .scale_offsets = scale_offsets,
                        .row_token = row_token,
                        .slot_row = slot_row};
        Random random(7);
        const Tensor global(device(), DType::kF32,
                            random.floats({per_expert_global ? c.num_experts : 1}, DType::kF32, 0.1, 9));
        QuantizeOptions options;
        if (n.format.kind == QuantKind::kNvfp4) options.global_scale = global.read_only();
        const Tensor input = tensor(random_values(3, dtype(), c.num_tokens, cols), c.num_tokens, cols);
        RowMap map;
        map.live.assign(static_cast<std::size_t>(rows), true);
        map.scale_rows = expert_scale_rows(rows, c.num_experts);
        Outputs fused(device(), n.format, rows, padded, map), pair(device(), n.format, rows, padded, map);
        if (n.format.static_scale) {
          fused.scales.set(Array({1, 1}, 0.5));
          pair.scales.set(Array({1, 1}, 0.5));
        }
        Tensor permuted(device(), dtype(), {rows, cols});
        permute(input.read_only(), plan, permuted, Call(device()));
        QuantizeOptions per_expert = options;
        per_expert.rows = {.expert_offsets = expert_offsets.read_only(),
                           .scale_offsets = scale_offsets.read_only()};
        quantize(permuted.read_only(), pair.data, pair.scales, n.format, per_expert, Call(device()));
        permute_quantize(input.read_only(), plan, fused.data, fused.scales, n.format, options,
                         Call(device()));
        EXPECT_TRUE(same_bytes(fused.data.get_bytes(), pair.data.get_bytes()));
        EXPECT_TRUE(same_bytes(fused.scales.get_bytes(), pair.scales.get_bytes()));
      }
  }
}

TEST_P(Quantize, Dequantize) {
  constexpr std::int64_t kRows = 6, kPadded = 288;
  for (const NamedFormat& n : formats())
    for (std::int64_t cols : {0, 1, 17, 250, 288}) {
      SCOPED_TRACE(::testing::Message() << n.name << " H=" << cols);
      const QuantFormat& f = n.format;
      // Every byte is a code, and every byte a scale.
      Random random(5);
      const RowMap map = RowMap::experts({0, 2, 2, 5}, {0, 128, 128, 256}, kRows);
      Outputs q(device(), f, kRows, kPadded, map);
      const Bytes data = random.bytes(q.data.get_bytes().size());
      q.data.set_bytes(data);
      Bytes scales;
      if (f.scale_dtype() == DType::kF32) {
        Array s = random.floats({q.scales.view().shape[0], q.scales.view().shape[1]}, DType::kF32, 1e-3, 10);
        q.scales.set(s);
      } else {
        q.scales.set_bytes(random.bytes(q.scales.get_bytes().size()));
      }
      scales = q.scales.get_bytes();
      const Array g = random.floats({3}, DType::kF32, 0.1, 10);
      const Tensor global(device(), DType::kF32, g), offsets(device(), DType::kI32, integers({0, 2, 2, 5})),
          scale_offsets(device(), DType::kI32, integers({0, 128, 128, 256}));
      QuantizeOptions options{
          .rows = {.expert_offsets = offsets.read_only(), .scale_offsets = scale_offsets.read_only()}};
      if (f.kind == QuantKind::kNvfp4) options.global_scale = global.read_only();
      Tensor out(device(), dtype(), {kRows, cols});
      dequantize(q.data.read_only(), q.scales.read_only(), out, f, options, Call(device()));

      const std::int64_t block = f.block() ? f.block() : kPadded, blocks = (kPadded + block - 1) / block;
      Array expected({kRows, cols}, std::numeric_limits<double>::quiet_NaN());
      for (std::int64_t r = 0; r < 5; ++r)
        for (std::int64_t c = 0; c < cols; ++c) {
          const auto i = static_cast<std::size_t>(r);
          std::int64_t at = 0;
          if (is_swizzled(f))
            at = map.base[i] * round_up(blocks, 4) +
                 oracle::scale_position(f.layout, map.local[i], c / block, 0, blocks);
          else if (f.layout == ScaleLayout::kColumnMajor)
            at =
                f.e8m0_scales ? oracle::scale_position(f.layout, r, c / block, 8, blocks) : c / block * 8 + r;
          else if (!is_tensor(f))
            at = r * blocks + c / block;
          float scale;
          if (f.scale_dtype() == DType::kF32) {
            std::memcpy(&scale, scales.data() + at * 4, 4);
          } else {
            const auto byte = static_cast<std::uint8_t>(scales[static_cast<std::size_t>(at)]);
            scale = f.kind == QuantKind::kNvfp4
                        ? static_cast<float>(oracle::SmallFloat::e4m3().decode(byte) *
                                             static_cast<float>(1.0 / static_cast<float>(g[map.expert[i]])))
                        : static_cast<float>(oracle::e8m0_value(byte));
          }
          const auto byte = static_cast<std::uint8_t>(
              data[static_cast<std::size_t>(is_fp4(f) ? (r * kPadded + c) / 2 : r * kPadded + c)]);
          const double code = is_fp4(f) ? oracle::SmallFloat::e2m1().decode(byte >> (c % 2 * 4) & 15)
                                        : oracle::SmallFloat::e4m3().decode(byte);
          expected.at(r, c) = oracle::round_to(dtype(), static_cast<float>(code * scale));
        }
      EXPECT_TRUE(equal(out.get(), expected));
      EXPECT_TRUE(out.surroundings_intact());
    }
}

TEST_P(Quantize, GlobalScale) {
  const std::int64_t rows = 12, cols = 70;
  Values x = random_values(21, dtype(), rows, cols);
  const Tensor input = tensor(x, rows, cols, {.name = "apart", .row_padding = 3, .byte_offset = 4});
  auto expected = [&](std::int64_t begin, std::int64_t end) {
    double amax = 0;
    for (std::int64_t i = begin * cols; i < end * cols; ++i)
      amax = std::fmax(amax, std::fabs(static_cast<double>(x.floats[static_cast<std::size_t>(i)])));
    constexpr double kLargest = std::numeric_limits<float>::max();
    return amax == 0 ? 1.0
                     : static_cast<double>(
                           static_cast<float>(std::fmin(2688.0 / std::fmin(amax, kLargest), kLargest)));
  };
  Tensor one(device(), DType::kF32, {1}), each(device(), DType::kF32, {4});
  global_scale(input.read_only(), one, {}, Call(device()));
  EXPECT_TRUE(equal(one.get(), Array({1}, {expected(0, rows)})));
  const Tensor offsets(device(), DType::kI32, integers({0, 3, 3, 4, 10}));
  const ExpertRows experts{.expert_offsets = offsets.read_only()};
  global_scale(input.read_only(), each, experts, Call(device()));
  EXPECT_TRUE(equal(each.get(), Array({4}, {expected(0, 3), 1, expected(3, 4), expected(4, 10)})));
  global_scale(input.read_only(), one, experts, Call(device()));
  EXPECT_TRUE(equal(one.get(), Array({1}, {expected(0, 10)})));
}

INSTANTIATE_TEST_SUITE_P(, Quantize, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

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

}  // namespace
}  // namespace moecore::test
