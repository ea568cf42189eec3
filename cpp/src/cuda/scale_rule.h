#pragma once
// How a block's largest magnitude becomes its scale, as kernels take it.

#include "core/numeric.h"
#include "ops/quantize.h"

namespace moecore::cuda {

struct ScaleRule {
  float amax_floor = 0.0f, amax_cap = 0.0f;
  bool power_of_two = false;
  numeric::PowerOfTwoRule exponent{};
};

inline ScaleRule scale_rule(const QuantFormat& f) {
  return {.amax_floor = f.amax_floor,
          .amax_cap = f.amax_cap,
          .power_of_two = f.kind != QuantKind::kFp8 || f.power_of_two,
          .exponent = power_of_two_rule(f)};
}

}  // namespace moecore::cuda
