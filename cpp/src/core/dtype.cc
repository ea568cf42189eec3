#include "moecore/dtype.h"

#include <array>

namespace moecore {
namespace {

struct DTypeInfo {
  std::string_view name;
  int bits;
};

// One row per enumerator, in its order.
constexpr std::array<DTypeInfo, kNumDTypes> kInfo = {{
    {"f32", 32}, {"f16", 16}, {"bf16", 16}, {"e4m3", 8},   {"e5m2", 8}, {"e2m1", 4}, {"e8m0", 8},
    {"i32", 32}, {"i64", 64}, {"u8", 8},    {"i8", 8},     {"i16", 16}, {"u16", 16}, {"u32", 32},
    {"u64", 64}, {"f64", 64}, {"c64", 64},  {"c128", 128}, {"bool", 8},
}};

}  // namespace

int bit_width(DType dtype) {
  return kInfo[static_cast<int>(dtype)].bits;
}

std::string_view name(DType dtype) {
  return kInfo[static_cast<int>(dtype)].name;
}

std::optional<DType> parse_dtype(std::string_view spelling) {
  for (int i = 0; i < kNumDTypes; ++i)
    if (kInfo[i].name == spelling) return static_cast<DType>(i);
  return std::nullopt;
}

}  // namespace moecore
