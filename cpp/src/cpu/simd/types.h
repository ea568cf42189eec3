#pragma once
// Floating point elements of 16 and 8 bits in memory, and the element type of each float DType.

#include <cstdint>

#include "moecore/dtype.h"

namespace moecore::cpu {

struct F16 {
  std::uint16_t bits;
};
struct BF16 {
  std::uint16_t bits;
};
/// Vectors of these are loaded and stored as bytes: see kernels/quantize.inl.
struct E4M3 {
  std::uint8_t bits;
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
template <>
struct ElementOf<DType::kE4M3> {
  using Type = E4M3;
};
}  // namespace detail

/// float, F16, BF16 or E4M3.
template <DType dtype>
using Element = typename detail::ElementOf<dtype>::Type;

}  // namespace moecore::cpu
