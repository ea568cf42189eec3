#pragma once
// The validated form of transpose_experts.

#include <cstddef>
#include <cstdint>

#include "ops/backend.h"

namespace moecore {

struct TransposeProblem {
  const std::byte* src = nullptr;  // [E, rows, cols], strides in elements
  std::int64_t src_expert_stride = 0;
  std::int64_t src_row_stride = 0;
  std::byte* dst = nullptr;  // [E, cols, rows]
  std::int64_t dst_expert_stride = 0;
  std::int64_t dst_row_stride = 0;
  std::int64_t num_experts = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  int element_bytes = 0;  // 1, 2, 4 or 8
};

namespace cpu {
BackendFn<TransposeProblem> transpose_experts;
}
namespace cuda {
BackendFn<TransposeProblem> transpose_experts;
}

}  // namespace moecore
