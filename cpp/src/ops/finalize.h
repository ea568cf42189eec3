#pragma once
// The validated form of finalize.

#include <cstdint>

#include "core/index.h"
#include "core/table.h"
#include "ops/backend.h"

namespace moecore {

using FinalizeTypes = FloatTypes;  // of rows, residual and out
using WeightTypes = FloatTypes;

struct FinalizeProblem {
  const void* rows = nullptr;  // [num_rows, >= hidden]
  std::int64_t num_rows = 0;
  std::int64_t rows_stride = 0;
  IndexRef slot_row;  // [T,K], rows slot_stride apart
  std::int64_t slot_stride = 0;
  const void* weights = nullptr;  // [T,K] or none: 1
  DType weight_dtype = DType::kF32;
  std::int64_t weights_stride = 0;
  bool cast_weights = false;
  const void* residual = nullptr;  // [T,H] or none
  std::int64_t residual_stride = 0;
  void* out = nullptr;  // [T,H]
  std::int64_t out_stride = 0;
  DType dtype = DType::kF32;
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
