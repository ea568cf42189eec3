#pragma once
// What quantize must compute, written from moecore/quantize.h in plain loops. The small formats are tables
// made from their definitions and searched for the nearest value; the few f32 roundings of a scale are those
// of doubles, in which a product of two floats is exact and a quotient rounds innocuously.

#include <cstdint>
#include <optional>
#include <vector>

#include "moecore/quantize.h"

namespace moecore::oracle {

/// A format of at most 8 bits without infinity: magnitude codes 0, 1, ... stand for ascending values, a sign
/// bit is above them.
struct SmallFloat {
  std::vector<double> values;  // by magnitude code
  std::uint8_t sign;           // the sign bit
  std::uint8_t nan;            // what NaN becomes

  static const SmallFloat& e4m3();
  static const SmallFloat& e5m2();
  static const SmallFloat& e2m1();

  /// The nearest code, a tie to the even one, saturating.
  std::uint8_t encode(double x) const;
  double decode(std::uint8_t code) const;
};

std::uint8_t e8m0_up(double x);
std::uint8_t e8m0_nearest(double x);
double e8m0_value(std::uint8_t code);

/// Codes and scales of rows of `cols` columns, before packing and layout.
struct Quantized {
  std::int64_t padded_cols = 0, blocks = 0;
  std::vector<std::uint8_t> codes;    // [rows, padded_cols]
  std::vector<std::uint32_t> scales;  // [rows, blocks]: the byte, or the bits of the f32; one for fp8 tensor
};
/// x [rows, cols] as f32. `global` is one factor for each row (nvfp4); `static_scale` is fp8 tensor's. Rows
/// for which `live` is false take no part and keep zeros.
Quantized quantize(const std::vector<float>& x, std::int64_t cols, std::int64_t padded_cols,
                   const QuantFormat& format, const std::vector<float>& global, float static_scale = 1,
                   const std::vector<bool>& live = {});

/// Position of scale (row, col) in a block of scales of `cols` columns, by walking the layout's dimensions.
std::int64_t scale_position(ScaleLayout layout, std::int64_t row, std::int64_t col, std::int64_t rows,
                            std::int64_t cols);

}  // namespace moecore::oracle
