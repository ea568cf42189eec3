#pragma once
// IndexRef: an i32 or i64 index tensor's data, as problems hand it to the engines.

#include <cstdint>

#include "moecore/tensor.h"

namespace moecore {

struct IndexRef {
  const void* data = nullptr;
  bool is_i64 = false;

  IndexRef() = default;
  explicit IndexRef(const TensorView& t) : data(t.data), is_i64(t.dtype == DType::kI64) {}

  /// Host reads only.
  std::int64_t operator[](std::int64_t i) const {
    return is_i64 ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  }
};

}  // namespace moecore
