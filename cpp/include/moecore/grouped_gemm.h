#pragma once
// grouped_gemm: every expert multiplies its own rows by its own weights.

#include <cstddef>
#include <optional>

#include "moecore/activate.h"
#include "moecore/context.h"

namespace [[gnu::visibility("default")]] moecore {

struct GroupedGemmOptions {
  /// f32 or x's dtype, [E,N].
  std::optional<TensorView> bias{};
  /// i32 [R]: row r reads x[row_token[r]]; without it x has R rows, already in expert order.
  std::optional<TensorView> row_token{};
  /// Fused on the f32 result (bias included): out has N/2 columns for a gated activation.
  std::optional<Activation> activation{};
  /// f32 [R]: factor on the row's product before the bias (router weight on the input).
  std::optional<TensorView> row_weights{};
  /// CUDA: expert_offsets and weights were complete before the kernel that precedes this call in the stream
  /// began, as between the two products of a layer. Weights are then fetched while that kernel still runs.
  bool offsets_settled = false;
};

/// out[r,n] = sum_k x[row,k] * weights[e,n,k] (* row_weights[r]) (+ bias[e,n]) for rows of expert e.
/// x [R,K] or, with row_token, [T,K]; weights [E,N,K]; expert_offsets i32 [E+1]; out [R,N] of x's dtype.
/// x, weights and out share one dtype of f32|bf16|f16. f32 accumulation, one rounding. Rows >=
/// expert_offsets[E] of out are left untouched. Any R, E, N, K (K = 0 gives the bias). Rows may be strided,
/// weights[e,n] must be dense along k.
void grouped_gemm(const TensorView& x, const TensorView& weights, const TensorView& expert_offsets,
                  const TensorView& out, const GroupedGemmOptions& options = {}, const ExecContext& ctx = {});

/// Bytes of workspace that grouped_gemm() needs: rows R, N = weight rows, K = depth.
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, Device device);

}  // namespace moecore
