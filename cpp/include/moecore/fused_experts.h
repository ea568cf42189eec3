#pragma once
// fused_experts: the whole expert layer, plan -> GEMM1 + activation -> GEMM2 -> finalize.

#include <cstddef>
#include <cstdint>
#include <optional>

#include "moecore/activate.h"
#include "moecore/context.h"
#include "moecore/grouped_gemm.h"
#include "moecore/quantize.h"

namespace [[gnu::visibility("default")]] moecore {

/// The weights of one layer's experts, and how to read them. Non-owning.
struct Experts {
  TensorView w13;                        // [E, 2I, H] (activation.order kPlain: [E, I, H]), dense along H
  TensorView w2;                         // [E, H, I], dense along I
  std::optional<TensorView> w13_bias{};  // [E, 2I] f32 or the weights' dtype
  std::optional<TensorView> w2_bias{};   // [E, H]
  Activation activation{};               // its order says how gate and up rows stand in w13
  /// Quantised weights: w13 and w2 are codes of one format. See OperandScales.
  std::optional<OperandScales> w13_scales{};
  std::optional<OperandScales> w2_scales{};

  std::int64_t num_experts() const { return w13.shape[0]; }
  std::int64_t hidden() const { return elements(w13, w13_scales); }
  std::int64_t inter() const { return elements(w2, w2_scales); }

 private:
  static std::int64_t elements(const TensorView& w, const std::optional<OperandScales>& s) {
    return s && w.dtype == DType::kU8 ? w.shape[2] * 8 / bit_width(s->format.data_dtype()) : w.shape[2];
  }
};

struct FusedExpertsOptions {
  /// i32 [G]: global id -> local expert or -1; without it global id g is local expert g - first_expert.
  std::optional<TensorView> expert_map{};
  std::int64_t first_expert = 0;
  /// Multiply the first product by the router weight instead of weighting the sum.
  bool apply_router_weight_on_input = false;
  /// [T,H] of out's dtype, added in f32 by finalize: a residual or a shared expert's output.
  std::optional<TensorView> residual{};
  /// What x, and the activated rows between the products, are quantised to: a pair with the weights' format
  /// as grouped_gemm() takes it. The layout is the layer's own affair.
  std::optional<QuantFormat> x_format{};
  /// Of x and of the rows between the products: fp8_tensor_static's scale f32 [1,1], nvfp4's g f32 [1].
  std::optional<TensorView> x_scale{};
  std::optional<TensorView> inter_scale{};
};

/// x [T,H], weights f32|f16|bf16 [T,K], ids i32|i64 [T,K] -> out [T,H]. x and out share one dtype of
/// f32|bf16|f16, and w13 and w2 too unless they are quantised. Bit for bit the composition plan, [quantize,]
/// grouped_gemm (gather and activation fused), [quantize,] grouped_gemm, finalize; the rows between the
/// products have x's dtype before they are quantised. A dynamic scale of fp8 tensor covers all tokens, then
/// all rows. Routes whose id is not local are dropped. Needs fused_experts_workspace_bytes of workspace.
///
/// CUDA: one token of a small layer in f16 or bf16 runs as one kernel; the policy "fused_experts.fused=1"
/// asks for it, for up to 512 routes and weights of any format, and "fused_experts.fused=0" for the
/// composition. The kernel has the composition's rounding points but another order of the sums along k: the
/// same bits on every run, the composition's within the bound of an f32 sum. `explain` says what runs.
void fused_experts(const TensorView& x, const TensorView& weights, const TensorView& ids,
                   const Experts& experts, const TensorView& out, const FusedExpertsOptions& options = {},
                   const ExecContext& ctx = {});

/// A pure function of the shapes: enough for every routing of T tokens to K experts each.
std::size_t fused_experts_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k,
                                          std::int64_t num_experts, std::int64_t hidden, std::int64_t inter,
                                          DType dtype, Device device,
                                          const std::optional<QuantFormat>& x_format = {},
                                          const std::optional<QuantFormat>& weight_format = {});

/// dst[e,n,k] = src[e,k,n]: brings transposed checkpoints ([E,H,2I], [E,I,H]) to the layout of `Experts`.
/// Works on any slice of experts, so a caller can convert one expert at a time into its own buffer.
void transpose_experts(const TensorView& src, const TensorView& dst, const ExecContext& ctx = {});

}  // namespace moecore
