#pragma once
// The validated form of permute and shuffle_rows.

#include <cstddef>
#include <cstdint>

#include "core/index.h"
#include "ops/backend.h"

namespace moecore {

/// Where rows of bytes come from and go to: rows of `x` and of `out` are the pitches apart.
struct RowMove {
  const std::byte* x = nullptr;
  std::int64_t x_pitch = 0;
  std::byte* out = nullptr;
  std::int64_t out_pitch = 0;
  std::int64_t row_bytes = 0;
};

struct PermuteProblem : RowMove {
  RowMove scales{};  // moved beside the rows; row_bytes is 0 without them
  std::int64_t x_rows = 0;
  std::int64_t out_rows = 0;
  IndexRef map{};  // [out_rows]: source row, outside [0, x_rows) = zeros
  // permute only: the same mapping seen from the source, [x_rows, top_k] with -1 for no copy. Rows from
  // *num_rows on are owned by no source row.
  const std::int32_t* slot_row = nullptr;
  std::int64_t top_k = 0;
  const std::int32_t* num_rows = nullptr;
};

namespace cpu {
BackendFn<PermuteProblem> permute;
}
namespace cuda {
BackendFn<PermuteProblem> permute;
}

}  // namespace moecore
