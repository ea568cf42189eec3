#pragma once
// 16-bit floating point elements in memory, and the element type of each float DType.

#include <cstdint>

#include "moecore/dtype.h"

namespace moecore::cpu {

struct F16 {
  std::uint16_t bits;
};
struct BF16 {
  std::uint16_t bits;
};

namespace detail {
template <DType>
struct ElementOf;
template <>
struct ElementOf<DType::kF32> {
  using Type = float;
};
template <>
struct ElementOf<DType::kF16> {
  using Type = F16;
};
template <>
struct ElementOf<DType::kBF16> {
  using Type = BF16;
};
}  // namespace detail

/// float, F16 or BF16.
template <DType dtype>
using Element = typename detail::ElementOf<dtype>::Type;

}  // namespace moecore::cpu
