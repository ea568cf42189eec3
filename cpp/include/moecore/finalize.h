#pragma once
// finalize: the weighted sum of a token's expert outputs, back in token order.

#include <optional>

#include "moecore/context.h"

namespace [[gnu::visibility("default")]] moecore {

struct FinalizeOptions {
  /// f32|f16|bf16 [T,K]; without it every weight is 1.
  std::optional<TensorView> weights{};
  /// Round each weight to the dtype of `out` before use (SGLang's and vLLM's `topk_weights.to(out_dtype)`).
  bool cast_weights = false;
  /// [T,H] of out's dtype, added in f32 after the weighted sum: a residual or a shared expert's output.
  std::optional<TensorView> residual{};
};

/// out[t,h] = RN( sum_{j=0..K-1} w[t,j] * rows[slot_row[t,j], h] (+ residual[t,h]) ).
/// rows [R,Hp], slot_row i32|i64 [T,K], out [T,H], H <= Hp; rows and out f32|f16|bf16 of one dtype.
/// An f32 fma chain from +0 in slot order, so the bits depend on nothing but the inputs. A slot is skipped
/// when its row is < 0 or >= R. A token without a live slot gets 0 (or its residual). Any K, H, row strides.
/// Source: TRT-LLM finalize, SGLang apply_shuffle_mul_sum / shuffle_weighted_sum, vLLM moe_unpermute.
void finalize(const TensorView& rows, const TensorView& slot_row, const TensorView& out,
              const FinalizeOptions& options = {}, const ExecContext& ctx = {});

}  // namespace moecore
