#pragma once
// Strides as problems hand them to the engines.

#include <cstdint>

#include "moecore/tensor.h"

namespace moecore {

/// The stride of a dimension that is not the last. With one index, or none, nothing steps along it: whatever
/// the view says, it is what it would be in a dense one, so that no engine's rule about strides refuses it.
inline std::int64_t stride(const TensorView& t, std::size_t dim) {
  return t.shape[dim] > 1 ? t.strides[dim] : t.shape[dim + 1] * t.strides[dim + 1];
}

}  // namespace moecore
