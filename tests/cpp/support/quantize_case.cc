#include "support/quantize_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "support/cases.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

std::int64_t tile_rows(const QuantFormat& f) {
  return f.layout == ScaleLayout::kSwizzled128x4 ? 128 : 8;
}

/// The place, with the elements of f32 scales where elements of their size may stand.
Place scale_place(const QuantFormat& f, Place place) {
  if (f.scale_dtype() == DType::kF32) place.byte_offset = place.byte_offset / 4 * 4;
  return place;
}

std::vector<std::int64_t> scale_tensor_shape(const QuantFormat& f, std::int64_t rows, std::int64_t padded,
                                             const RowMap& map) {
  const auto s = scale_shape(f, rows, padded);
  return {is_swizzled(f) ? map.scale_rows : s[0], s[1]};
}

}  // namespace

std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b * b;
}

const std::vector<NamedFormat>& formats() {
  static const std::vector<NamedFormat> list = [] {
    using enum ScaleLayout;
    using enum Mxfp4Rounding;
    QuantFormat pow2 = QuantFormat::fp8_block128(), capped = QuantFormat::fp8_token();
    pow2.power_of_two = true;
    capped.amax_cap = 1.5f;
    QuantFormat capped_pow2 = pow2;
    capped_pow2.amax_cap = 1.5f;
    return std::vector<NamedFormat>{
        {"fp8 tensor", QuantFormat::fp8_tensor()},
        {"fp8 tensor static", QuantFormat::fp8_tensor_static()},
        {"fp8 token", QuantFormat::fp8_token()},
        {"fp8 token capped", capped},
        {"fp8 block128", QuantFormat::fp8_block128()},
        {"fp8 block128 power of two", pow2},
        {"fp8 block128 power of two capped", capped_pow2},
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

bool is_tensor(const QuantFormat& f) {
  return f.kind == QuantKind::kFp8 && f.granularity == Granularity::kTensor;
}

bool is_swizzled(const QuantFormat& f) {
  return f.layout == ScaleLayout::kSwizzled128x4 || f.layout == ScaleLayout::kSwizzled8x4;
}

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

RowMap RowMap::dense(const QuantFormat& f, std::int64_t rows) {
  RowMap m;
  for (std::int64_t r = 0; r < rows; ++r) m.add(true, 0, r, 0);
  m.scale_rows = round_up(rows, tile_rows(f));
  m.scale_blocks = {{0, m.scale_rows}};
  return m;
}

RowMap RowMap::experts(const std::vector<std::int64_t>& offsets,
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

RowMap RowMap::groups(const QuantFormat& f, const std::vector<std::int64_t>& counts,
                      std::int64_t group_rows) {
  RowMap m;
  const std::int64_t padded = round_up(group_rows, tile_rows(f));
  for (std::size_t e = 0; e < counts.size(); ++e) {
    const auto base = static_cast<std::int64_t>(e) * padded;
    for (std::int64_t i = 0; i < group_rows; ++i) m.add(i < counts[e], base, i, static_cast<std::int64_t>(e));
    m.scale_blocks.push_back({base, base + padded});
  }
  m.scale_rows = static_cast<std::int64_t>(counts.size()) * padded;
  return m;
}

void RowMap::add(bool is_live, std::int64_t b, std::int64_t l, std::int64_t e) {
  live.push_back(is_live);
  base.push_back(b);
  local.push_back(l);
  expert.push_back(e);
}

Outputs::Outputs(Device device, const QuantFormat& f, std::int64_t rows, std::int64_t padded,
                 const RowMap& map, const Place& place)
    : data(device, DType::kU8, {rows, is_fp4(f) ? padded / 2 : padded}, place),
      scales(device, f.scale_dtype() == DType::kF32 ? DType::kF32 : DType::kU8,
             scale_tensor_shape(f, rows, padded, map),
             f.layout == ScaleLayout::kLinear ? scale_place(f, place) : Place{}) {}

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

}  // namespace moecore::test
