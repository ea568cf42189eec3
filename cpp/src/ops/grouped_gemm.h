#pragma once
// The validated form of grouped_gemm.

#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/table.h"
#include "moecore/activate.h"
#include "ops/backend.h"

namespace moecore {

using GroupedGemmTypes = FloatTypes;  // of x, weights and out

struct GroupedGemmProblem {
  DType dtype = DType::kF32;
  const void* x = nullptr;  // [x_rows, K]
  std::int64_t x_rows = 0;
  std::int64_t x_stride = 0;
  const std::int32_t* row_token = nullptr;  // [R] or none: row r reads x[r]
  const void* weights = nullptr;            // [E,N,K], dense along K
  std::int64_t weight_expert_stride = 0;
  std::int64_t weight_row_stride = 0;
  const std::int32_t* expert_offsets = nullptr;  // [E+1]
  std::int64_t num_experts = 0;
  std::int64_t num_rows = 0;  // R, an upper bound of expert_offsets[E]
  std::int64_t n = 0;         // rows of one expert's weights
  std::int64_t k = 0;
  const void* bias = nullptr;  // [E,N] or none
  DType bias_dtype = DType::kF32;
  std::int64_t bias_stride = 0;
  const void* row_weights = nullptr;  // [R] or none
  DType row_weight_dtype = DType::kF32;
  std::optional<Activation> activation{};
  bool offsets_settled = false;
  void* out = nullptr;  // [R, n] or [R, n/2]
  std::int64_t out_stride = 0;
};

namespace cpu {
BackendFn<GroupedGemmProblem> grouped_gemm;
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype);
}  // namespace cpu
namespace cuda {
BackendFn<GroupedGemmProblem> grouped_gemm;
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype);
}  // namespace cuda

}  // namespace moecore
