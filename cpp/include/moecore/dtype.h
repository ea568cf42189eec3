#pragma once
// Element types of moecore tensors: one list, one spelling, used in C++, Python, tests and error messages.

#include <cstdint>
#include <optional>
#include <string_view>

namespace [[gnu::visibility("default")]] moecore {

enum class DType : std::uint8_t {
  // Types that ops compute with.
  kF32,
  kF16,
  kBF16,
  kE4M3,  // OCP fp8 e4m3fn: no infinity, NaN = 0x7F / 0xFF, largest 448
  kE5M2,  // OCP fp8 e5m2
  kE2M1,  // OCP fp4, two elements a byte, the even element in the low nibble; shapes and strides count
          // elements
  kE8M0,  // power-of-two scale, value 2^(byte - 127), 0xFF = NaN
  kI32,
  kI64,
  kU8,
  // Types that are only moved (permute, shuffle_rows), never computed with.
  kI8,
  kI16,
  kU16,
  kU32,
  kU64,
  kF64,
  kC64,
  kC128,
  kBool,
};

inline constexpr int kNumDTypes = static_cast<int>(DType::kBool) + 1;

/// Bits of one element: 4 for e2m1, else a multiple of 8 up to 128.
int bit_width(DType dtype);

/// The spelling used everywhere: "f32", "bf16", "e4m3", ...
std::string_view name(DType dtype);

/// The inverse of name(); empty for an unknown spelling.
std::optional<DType> parse_dtype(std::string_view spelling);

}  // namespace moecore
