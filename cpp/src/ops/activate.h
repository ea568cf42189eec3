#pragma once
// The validated form of activate.

#include <cstdint>

#include "core/table.h"
#include "moecore/activate.h"
#include "ops/backend.h"

namespace moecore {

using ActivateTypes = FloatTypes;

struct ActivateProblem {
  const void* x = nullptr;  // [R, 2I] or [R, I]
  std::int64_t x_stride = 0;
  void* out = nullptr;  // [R, I]
  std::int64_t out_stride = 0;
  DType dtype = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t inter = 0;
  Activation activation{};
  const std::int32_t* num_rows = nullptr;  // only rows below *num_rows are computed, or none: all
};

/// Throws for parameters that no activation has. `op` names the caller in the message.
void check_activation(const class Check& check, const Activation& activation);

namespace cpu {
BackendFn<ActivateProblem> activate;
}
namespace cuda {
BackendFn<ActivateProblem> activate;
}

}  // namespace moecore
