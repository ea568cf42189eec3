#pragma once
// x in the order of K in which the Hopper engine multiplies decoded weights, as bf16.

#include <cstddef>
#include <cstdint>

#include "moecore/context.h"
#include "ops/grouped_gemm.h"

namespace moecore::cuda {
struct DeviceInfo;
}

namespace moecore::cuda::sm90 {

inline constexpr int kDecodedStepK = 128;

/// Columns of a prepared row.
constexpr std::int64_t prepared_k(std::int64_t k) {
  return (k + kDecodedStepK - 1) / kDecodedStepK * kDecodedStepK;
}
constexpr std::size_t prepared_bytes(std::int64_t rows, std::int64_t k) {
  return static_cast<std::size_t>(rows * prepared_k(k)) * 2;
}

/// out [x_rows, prepared_k(K)] = bf16, mxfp8 or nvfp4 x with its block scales, zero beyond K. nvfp4's global
/// scale is left to the product.
void prepare_x(const GroupedGemmProblem& p, void* out, const DeviceInfo& device, const ExecContext& ctx);

}  // namespace moecore::cuda::sm90
