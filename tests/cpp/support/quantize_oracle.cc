#include "support/quantize_oracle.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace moecore::oracle {
namespace {

/// Values of a minifloat, ascending, up to `largest`.
std::vector<double> minifloat(int mantissa_bits, int bias, double largest) {
  std::vector<double> values;
  for (int code = 0;; ++code) {
    const int exponent = code >> mantissa_bits, mantissa = code % (1 << mantissa_bits);
    const double fraction = std::ldexp(mantissa, -mantissa_bits);
    const double value =
        exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
    if (value > largest) return values;
    values.push_back(value);
  }
}

float f32(double x) {
  return static_cast<float>(x);
}

}  // namespace

const SmallFloat& SmallFloat::e4m3() {
  static const SmallFloat format{minifloat(3, 7, 448), 0x80, 0x7F};
  return format;
}
const SmallFloat& SmallFloat::e5m2() {
  static const SmallFloat format{minifloat(2, 15, 57344), 0x80, 0x7F};
  return format;
}
const SmallFloat& SmallFloat::e2m1() {
  static const SmallFloat format{minifloat(1, 1, 6), 0x8, 0x7};
  return format;
}

std::uint8_t SmallFloat::encode(double x) const {
  if (std::isnan(x)) return nan;
  const double a = std::fabs(x);
  const auto above =
      static_cast<std::size_t>(std::lower_bound(values.begin(), values.end(), a) - values.begin());
  std::size_t code = std::min(above, values.size() - 1);
  if (code > 0 && above < values.size()) {
    const double up = values[code] - a, down = a - values[code - 1];
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(x) ? sign : 0));
}

double SmallFloat::decode(std::uint8_t code) const {
  const std::size_t magnitude = code & (sign - 1);
  if (magnitude >= values.size()) return std::numeric_limits<double>::quiet_NaN();
  return code & sign ? -values[magnitude] : values[magnitude];
}

double e8m0_value(std::uint8_t code) {
  return code == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, code - 127);
}

std::uint8_t e8m0_up(double x) {
  if (std::isnan(x)) return 255;
  int code = 0;
  while (code < 254 && e8m0_value(static_cast<std::uint8_t>(code)) < std::fabs(x)) ++code;
  return static_cast<std::uint8_t>(code);
}

std::uint8_t e8m0_nearest(double x) {
  if (std::isnan(x)) return 255;
  int code = 0;
  while (code < 254 && 1.5 * e8m0_value(static_cast<std::uint8_t>(code)) <= std::fabs(x)) ++code;
  return static_cast<std::uint8_t>(code);
}

Quantized quantize(const std::vector<float>& x, std::int64_t cols, std::int64_t padded_cols,
                   const QuantFormat& f, const std::vector<float>& global, float static_scale,
                   const std::vector<bool>& live) {
  const auto rows = static_cast<std::int64_t>(global.size());
  const bool fp8 = f.kind == QuantKind::kFp8, tensor = fp8 && f.granularity == Granularity::kTensor;
  const std::int64_t block = f.kind == QuantKind::kNvfp4                                  ? 16
                             : f.kind == QuantKind::kMxfp8 || f.kind == QuantKind::kMxfp4 ? 32
                             : f.granularity == Granularity::kBlock128
                                 ? 128
                                 : std::max<std::int64_t>(1, padded_cols);
  const bool fp4 = f.kind == QuantKind::kNvfp4 || f.kind == QuantKind::kMxfp4;
  const SmallFloat& element = fp4 ? SmallFloat::e2m1() : SmallFloat::e4m3();
  Quantized q;
  q.padded_cols = padded_cols;
  q.blocks = tensor || (fp8 && f.granularity == Granularity::kToken) ? 1 : (padded_cols + block - 1) / block;
  q.codes.assign(static_cast<std::size_t>(rows * padded_cols), 0);
  q.scales.assign(static_cast<std::size_t>(tensor ? 1 : rows * q.blocks), 0);

  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  auto is_live = [&](std::int64_t r) { return live.empty() || live[static_cast<std::size_t>(r)]; };
  auto amax_of = [&](std::int64_t r, std::int64_t begin, std::int64_t end) {
    double most = kNan;
    for (std::int64_t c = begin; c < std::min(end, cols); ++c)
      most = std::fmax(most, std::fabs(static_cast<double>(x[static_cast<std::size_t>(r * cols + c)])));
    return most;
  };
  auto fp8_scale = [&](double amax) {
    return f32(std::fmin(std::fmax(amax, f.amax_floor), f.amax_cap) / 448.0);
  };
  auto rcp = [](float s) { return s == 0 ? 0.0f : f32(1.0 / s); };

  float tensor_factor = 0;
  if (tensor) {
    double most = kNan;
    for (std::int64_t r = 0; r < rows; ++r)
      if (is_live(r)) most = std::fmax(most, amax_of(r, 0, cols));
    const float scale = f.static_scale ? static_scale : fp8_scale(most);
    q.scales[0] = std::bit_cast<std::uint32_t>(scale);
    tensor_factor = rcp(scale);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    if (!is_live(r)) continue;
    for (std::int64_t b = 0; b < q.blocks; ++b) {
      const std::int64_t begin = b * block, end = std::min(cols, begin + block);
      if (begin >= cols && q.blocks > 1) break;
      const double amax = amax_of(r, begin, end);
      float factor;
      std::uint32_t scale = 0;
      if (tensor) {
        factor = tensor_factor;
      } else if (fp8 && !f.power_of_two) {
        const float s = fp8_scale(amax);
        scale = std::bit_cast<std::uint32_t>(s);
        factor = rcp(s);
      } else if (f.kind == QuantKind::kNvfp4) {
        const float g = global[static_cast<std::size_t>(r)];
        const float wanted = f32(double(g) * f32(amax * double(1.0f / 6)));
        scale = SmallFloat::e4m3().encode(wanted);
        const double s = SmallFloat::e4m3().decode(static_cast<std::uint8_t>(scale));
        factor = s == 0 ? 0.0f : f32(1.0 / f32(s * f32(1.0 / g)));
      } else {
        // The smallest power of two that brings amax down to the largest code, or the rule's multiple of it.
        double e;
        if (fp8) {
          const float s = std::max(fp8_scale(amax), 1e-10f);
          e = e8m0_up(s);
        } else if (f.kind == QuantKind::kMxfp8) {
          e = e8m0_up(amax / 448);
        } else if (f.mxfp4_rounding == Mxfp4Rounding::kUp) {
          e = e8m0_up(amax / 6);
        } else {
          const double limit = f.mxfp4_rounding == Mxfp4Rounding::kFloor ? 8 : 7;
          e = 0;
          while (e < 254 && amax >= limit * e8m0_value(static_cast<std::uint8_t>(e))) ++e;
          if (std::isnan(amax)) e = 255;
        }
        scale = static_cast<std::uint32_t>(e);
        factor = e == 0 ? 0.0f : f32(1.0 / e8m0_value(static_cast<std::uint8_t>(scale)));
        if (fp8 && !f.e8m0_scales)
          scale = std::bit_cast<std::uint32_t>(f32(e8m0_value(static_cast<std::uint8_t>(scale))));
      }
      if (!tensor) q.scales[static_cast<std::size_t>(r * q.blocks + b)] = scale;
      for (std::int64_t c = begin; c < end; ++c)
        q.codes[static_cast<std::size_t>(r * padded_cols + c)] =
            element.encode(f32(double(x[static_cast<std::size_t>(r * cols + c)]) * double(factor)));
    }
  }
  return q;
}

std::int64_t scale_position(ScaleLayout layout, std::int64_t row, std::int64_t col, std::int64_t rows,
                            std::int64_t cols) {
  const std::int64_t words = (cols + 3) / 4;
  // Row-major index into dimensions given slowest first.
  auto index = [](std::initializer_list<std::pair<std::int64_t, std::int64_t>> dims) {
    std::int64_t at = 0;
    for (auto [i, extent] : dims) at = at * extent + i;
    return at;
  };
  switch (layout) {
    case ScaleLayout::kLinear:
      return index({{row, rows}, {col, cols}});
    case ScaleLayout::kSwizzled128x4:
      return index({{row / 128, 0}, {col / 4, words}, {row % 32, 32}, {row / 32 % 4, 4}, {col % 4, 4}});
    case ScaleLayout::kSwizzled8x4:
      return index({{row / 8, 0}, {col / 4, words}, {row % 8, 8}, {col % 4, 4}});
    case ScaleLayout::kColumnMajor:
      return index({{col / 4, words}, {row, rows}, {col % 4, 4}});
  }
  return -1;
}

}  // namespace moecore::oracle
