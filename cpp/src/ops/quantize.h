#pragma once
// The validated forms of quantize, dequantize, global_scale and convert_scales.

#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/numeric.h"
#include "core/table.h"
#include "moecore/quantize.h"
#include "ops/backend.h"

namespace moecore {

class Check;

/// Fields that belong together.
void check_format(const Check& check, const QuantFormat& format);

using QuantizeTypes = FloatTypes;  // of x, and of dequantize's out

/// Columns that share one 4-byte word of a swizzled or packed layout.
inline constexpr std::int64_t kScaleWord = 4;

/// Rows of a tile of a layout: what the rows of a block of scales are padded to.
constexpr std::int64_t scale_row_multiple(ScaleLayout layout) {
  return layout == ScaleLayout::kSwizzled128x4 ? 128 : layout == ScaleLayout::kSwizzled8x4 ? 8 : 1;
}
constexpr bool is_swizzled(ScaleLayout layout) {
  return scale_row_multiple(layout) > 1;
}

/// `t` read as elements of `dtype` when it came as bytes.
inline TensorView as_codes(TensorView t, DType dtype) {
  if (t.dtype != DType::kU8) return t;
  t.dtype = dtype;
  if (dtype == DType::kE2M1 && t.ndim > 0) {
    t.shape[t.ndim - 1] *= 2;
    for (int i = 0; i + 1 < t.ndim; ++i) t.strides[i] *= 2;
  }
  return t;
}

/// The scale is known once all rows have been read.
inline bool has_dynamic_tensor_scale(const QuantFormat& f) {
  return f.kind == QuantKind::kFp8 && f.granularity == Granularity::kTensor && !f.static_scale;
}

/// How a format with power-of-two scales rounds a block's amax to one.
inline numeric::PowerOfTwoRule power_of_two_rule(const QuantFormat& f) {
  if (f.kind == QuantKind::kMxfp4) {
    switch (f.mxfp4_rounding) {
      case Mxfp4Rounding::kUp:
        return numeric::kScaleBy6Up;
      case Mxfp4Rounding::kNearest175:
        return numeric::kScaleBy6Nearest;
      case Mxfp4Rounding::kFloor:
        return numeric::kScaleBy6Floor;
    }
  }
  numeric::PowerOfTwoRule rule = numeric::kScaleBy448;
  if (f.kind == QuantKind::kFp8) rule.lowest = 127 - 33;
  return rule;
}

/// The scales of one call.
struct ScaleRef {
  std::byte* data = nullptr;
  ScaleLayout layout = ScaleLayout::kLinear;
  int bytes = 1;          // of one scale
  std::int64_t cols = 0;  // C, blocks of a padded row
  std::int64_t pitch =
      0;                  // bytes between rows (linear) or between columns or words of columns (column-major)
  std::int64_t rows = 0;  // rows there is room for (column-major: P)

  constexpr std::int64_t words() const { return (cols + kScaleWord - 1) / kScaleWord; }
};

/// Byte of scale (row, col) when its block of scales starts at scale row `base` (swizzled only; else row
/// counts from the start).
constexpr std::int64_t scale_byte(const ScaleRef& s, std::int64_t base, std::int64_t row, std::int64_t col) {
  const std::int64_t words = (s.cols + kScaleWord - 1) / kScaleWord;
  switch (s.layout) {
    case ScaleLayout::kLinear:
      return row * s.pitch + col * s.bytes;
    case ScaleLayout::kColumnMajor:
      return s.bytes == 4 ? col * s.pitch + row * 4 : col / 4 * s.pitch + row * 4 + col % 4;
    case ScaleLayout::kSwizzled8x4:
      return base * words * 4 + (row / 8 * words + col / 4) * 32 + row % 8 * 4 + col % 4;
    case ScaleLayout::kSwizzled128x4:
      break;
  }
  return base * words * 4 + (row / 128 * words + col / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 +
         col % 4;
}

/// Which rows belong to which expert; all pointers null: one dense block of rows.
struct ExpertRowsRef {
  const std::int32_t* expert_offsets = nullptr;  // [E+1]
  const std::int32_t* scale_offsets = nullptr;   // [E+1], swizzled layouts only
  const std::int32_t* row_counts = nullptr;      // [E]
  std::int64_t num_experts = 0;
  std::int64_t group_rows = 0;  // with row_counts: R / E
};

struct QuantizeProblem {
  QuantFormat format{};
  const void* x = nullptr;  // [rows, cols], or what the activation reads
  DType dtype = DType::kF32;
  std::int64_t x_stride = 0;
  std::int64_t rows = 0;  // of x
  std::int64_t cols = 0;  // H: columns to quantise
  std::optional<Activation> activation{};
  std::uint8_t* data = nullptr;  // [out_rows, padded_cols]
  std::int64_t data_pitch = 0;   // bytes
  std::int64_t out_rows = 0;
  std::int64_t padded_cols = 0;
  ScaleRef scales{};
  const float* global_scale = nullptr;  // [1] or [E]
  bool global_scale_per_expert = false;
  ExpertRowsRef experts{};
  // permute_quantize only: row r holds x[row_token[r]], and slot_row is the same seen from the token.
  const std::int32_t* row_token = nullptr;  // [out_rows]
  const std::int32_t* slot_row = nullptr;   // [rows, top_k]
  std::int64_t top_k = 0;
};

struct DequantizeProblem {
  QuantFormat format{};
  const std::uint8_t* data = nullptr;
  std::int64_t data_pitch = 0;
  ScaleRef scales{};
  const float* global_scale = nullptr;
  bool global_scale_per_expert = false;
  ExpertRowsRef experts{};
  void* out = nullptr;  // [rows, cols]
  DType dtype = DType::kF32;
  std::int64_t out_stride = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

struct GlobalScaleProblem {
  const void* x = nullptr;
  DType dtype = DType::kF32;
  std::int64_t x_stride = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  ExpertRowsRef experts{};
  float* out = nullptr;  // [1] or [E]
  bool per_expert = false;
};

struct ConvertScalesProblem {
  ScaleRef src{};
  ScaleRef dst{};
  std::int64_t rows = 0;
};

class Check;

/// Checks the arguments of quantize.
QuantizeProblem make_quantize_problem(const Check& check, const TensorView& x, const TensorView& data,
                                      const TensorView& scales, const QuantFormat& format,
                                      const QuantizeOptions& options);

namespace cpu {
BackendFn<QuantizeProblem> quantize;
BackendFn<DequantizeProblem> dequantize;
BackendFn<GlobalScaleProblem> global_scale;
BackendFn<ConvertScalesProblem> convert_scales;
}  // namespace cpu
namespace cuda {
BackendFn<QuantizeProblem> quantize;
BackendFn<DequantizeProblem> dequantize;
BackendFn<GlobalScaleProblem> global_scale;
BackendFn<ConvertScalesProblem> convert_scales;
}  // namespace cuda

}  // namespace moecore
