#pragma once
// The scales of fp8 rows in columns, as the copy engine brings them in boxes.

#include <array>
#include <cstddef>
#include <cstdint>

#include "moecore/context.h"
#include "moecore/quantize.h"
#include "ops/grouped_gemm.h"

namespace moecore::cuda {
struct DeviceInfo;
struct ScaleArgs;
}  // namespace moecore::cuda

namespace moecore::cuda::sm90 {

/// A box of scales starts at a multiple of 16 bytes, and so does every column.
inline constexpr int kScalesAhead = 16 / sizeof(float);

/// Columns, and the places of one.
inline std::array<std::int64_t, 2> prepared_scale_shape(std::int64_t rows, std::int64_t k) {
  return scale_shape(QuantFormat::fp8_block128(ScaleLayout::kColumnMajor), rows, k);
}
inline std::size_t prepared_scale_bytes(std::int64_t rows, std::int64_t k) {
  const auto [columns, pitch] = prepared_scale_shape(rows, k);
  return static_cast<std::size_t>(columns * pitch) * sizeof(float);
}

/// Whether the scales of x are no such columns in the order of out's rows.
inline bool needs_prepared_scales(const GroupedGemmProblem& p) {
  const OperandScalesRef& s = p.x_scales;
  const bool boxes = !p.row_token && s.row_pitch == sizeof(float) && s.col_pitch > 0 &&
                     s.col_pitch % 16 == 0 && reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0;
  return s.form == OperandForm::kFp8Block128 && !boxes;
}

/// out, of prepared_scale_shape(R, K), = the f32 scales of x [.., K/128], of the rows that out's are made
/// from. Returns how they stand there.
ScaleArgs prepare_scales(const GroupedGemmProblem& p, void* out, const DeviceInfo& device,
                         const ExecContext& ctx);

}  // namespace moecore::cuda::sm90
