#pragma once
// The scales of fp8 rows in columns, as the copy engine brings them in boxes.

#include <cstddef>
#include <cstdint>

#include "moecore/context.h"
#include "ops/grouped_gemm.h"

namespace moecore::cuda {
struct DeviceInfo;
struct ScaleArgs;
}  // namespace moecore::cuda

namespace moecore::cuda::sm90 {

/// A box of scales starts at a multiple of 16 bytes, and so does every column.
inline constexpr int kScalesAhead = 16 / sizeof(float);

/// Scales of a column of `rows` rows.
constexpr std::int64_t scale_column(std::int64_t rows) {
  return (rows + kScalesAhead - 1) / kScalesAhead * kScalesAhead;
}
constexpr std::size_t prepared_scale_bytes(std::int64_t rows, std::int64_t k) {
  return static_cast<std::size_t>((k + 127) / 128 * scale_column(rows)) * sizeof(float);
}

/// Whether the scales of x are no such columns in the order of out's rows.
inline bool needs_prepared_scales(const GroupedGemmProblem& p) {
  const OperandScalesRef& s = p.x_scales;
  const bool boxes = !p.row_token && s.row_pitch == sizeof(float) && s.col_pitch > 0 &&
                     s.col_pitch % 16 == 0 && reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0;
  return s.form == OperandForm::kFp8Block128 && !boxes;
}

/// out [K/128, scale_column(R)] = the f32 scales of x [.., K/128], of the rows that out's are made from.
/// Returns how they stand there.
ScaleArgs prepare_scales(const GroupedGemmProblem& p, void* out, const DeviceInfo& device,
                         const ExecContext& ctx);

}  // namespace moecore::cuda::sm90
