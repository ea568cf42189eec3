#pragma once
// The validated form of finalize.

#include <cstdint>

#include "core/index.h"
#include "core/table.h"
#include "ops/backend.h"

namespace moecore {

/// Element types of rows and out.
struct FinalizeTypes {
  DType rows, out;

  friend constexpr bool operator==(FinalizeTypes, FinalizeTypes) = default;
};
using FinalizeInstances =
    Table<FinalizeTypes{DType::kF32, DType::kF32}, FinalizeTypes{DType::kF16, DType::kF16},
          FinalizeTypes{DType::kBF16, DType::kBF16}, FinalizeTypes{DType::kE4M3, DType::kF32},
          FinalizeTypes{DType::kE4M3, DType::kF16}, FinalizeTypes{DType::kE4M3, DType::kBF16},
          FinalizeTypes{DType::kE4M3, DType::kE4M3}>;
using FinalizeRowTypes = Table<DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3>;
using WeightTypes = FloatTypes;

/// Columns that share a scale.
inline constexpr std::int64_t kFinalizeScaleBlock = 128;

/// Element type of the residual.
constexpr DType residual_dtype(DType out) {
  return out == DType::kE4M3 ? DType::kBF16 : out;
}

/// f32 scales of blocks of columns of rows: scale (row, block) is data[row * row_stride + block *
/// block_stride].
template <class T>
struct BlockScales {
  T* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t block_stride = 0;
};

struct FinalizeProblem {
  const void* rows = nullptr;  // [num_rows, >= hidden]
  DType dtype = DType::kF32;   // of rows
  std::int64_t num_rows = 0;
  std::int64_t rows_stride = 0;
  BlockScales<const float> row_scales{};  // or none: e4m3 rows only
  IndexRef slot_row;                      // [T,K], rows slot_stride apart
  std::int64_t slot_stride = 0;
  const void* weights = nullptr;  // [T,K] or none: 1
  DType weight_dtype = DType::kF32;
  std::int64_t weights_stride = 0;
  bool cast_weights = false;
  const void* residual = nullptr;  // [T,H] of residual_dtype(out_dtype) or none
  std::int64_t residual_stride = 0;
  void* out = nullptr;  // [T,H]
  DType out_dtype = DType::kF32;
  std::int64_t out_stride = 0;
  BlockScales<float> out_scales{};     // or none: e4m3 out only
  std::int64_t padded_scale_rows = 0;  // out_scales from row num_tokens up to here are zeroed
  std::int64_t num_tokens = 0;
  std::int64_t top_k = 0;
  std::int64_t hidden = 0;
};

namespace cpu {
BackendFn<FinalizeProblem> finalize;
}
namespace cuda {
BackendFn<FinalizeProblem> finalize;
}

}  // namespace moecore
