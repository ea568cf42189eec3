#pragma once
// The validated form of fused_experts, as an engine that runs the layer in one piece takes it.

#include <cstdint>
#include <string>

#include "core/index.h"
#include "ops/grouped_gemm.h"

namespace moecore {

struct FusedExpertsProblem {
  IndexRef ids;  // [T,K], rows ids_stride apart
  std::int64_t ids_stride = 0;
  const std::int32_t* expert_map = nullptr;  // [num_global] or none
  std::int64_t num_global = 0;
  std::int64_t first_expert = 0;
  const void* weights = nullptr;  // [T,K], the router's
  DType weight_dtype = DType::kF32;
  std::int64_t weights_stride = 0;
  bool weight_on_input = false;
  /// The two products: operands, bias, activation. Rows, offsets and outputs are the engine's own.
  GroupedGemmProblem up{}, down{};
  const void* residual = nullptr;  // [T,H] or none
  std::int64_t residual_stride = 0;
  void* out = nullptr;  // [T,H]
  std::int64_t out_stride = 0;
  std::int64_t num_tokens = 0, top_k = 0, num_experts = 0, hidden = 0, inter = 0;
};

namespace cuda {
/// Runs the layer as one kernel (or explains it), or leaves everything untouched and says why not.
/// ctx.workspace holds decode_workspace_bytes.
std::string run_decode(const FusedExpertsProblem& problem, const ExecContext& ctx);
/// 0 where no layer of that many routes is ever run as one kernel.
std::size_t decode_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k, std::int64_t inter);
}  // namespace cuda

}  // namespace moecore
