#pragma once
// finalize: the weighted sum of a token's expert outputs, back in token order.

#include <optional>

#include "moecore/context.h"
#include "moecore/quantize.h"

namespace [[gnu::visibility("default")]] moecore {

struct FinalizeOptions {
  /// f32|f16|bf16 [T,K]; without it every weight is 1.
  std::optional<TensorView> weights{};
  /// Round each weight to the dtype of `out` before use (SGLang's and vLLM's `topk_weights.to(out_dtype)`).
  /// Not for an e4m3 `out`.
  bool cast_weights = false;
  /// [T,H] of out's dtype (bf16 for an e4m3 `out`), added in f32 after the weighted sum: a residual or a
  /// shared expert's output.
  std::optional<TensorView> residual{};
  /// e4m3 rows: f32, the scale of every 128 columns of a row.
  std::optional<TensorView> row_scales{};
  /// e4m3 out: f32, written: `out` gets the codes and this the scales of fp8 block128.
  std::optional<TensorView> out_scales{};
  /// Of both: kLinear [rows, C] or kColumnMajor [C, P] with P >= rows, C = ceil(columns / 128).
  ScaleLayout scale_layout = ScaleLayout::kLinear;
};

/// out[t,h] = RN( sum_{j=0..K-1} w[t,j] * rows[slot_row[t,j], h] (+ residual[t,h]) ).
/// rows [R,Hp], slot_row i32|i64 [T,K], out [T,H], H <= Hp; rows and out f32|f16|bf16 of one dtype, or rows
/// e4m3 and out f32|f16|bf16|e4m3.
/// An f32 fma chain from +0 in slot order, so the bits depend on nothing but the inputs. A slot is skipped
/// when its row is < 0 or >= R. A token without a live slot gets 0 (or its residual). Any K, H, row strides;
/// out shares no memory with rows, and may be residual.
///
/// With row_scales s the factor of an element is w[t,j] * s[row, h / 128], rounded to f32. RN to e4m3 is that
/// of docs/formats.md: it saturates and keeps NaN. With out_scales the f32 sums are quantised as
/// quantize(..., QuantFormat::fp8_block128(scale_layout)) does, with the same bits: a block of zeros has the
/// scale 1e-10 / 448 and zero codes. Rows of a column-major out_scales from T on are zeroed.
/// Source: TRT-LLM finalize (with the DeepSeek form), SGLang apply_shuffle_mul_sum / shuffle_weighted_sum,
/// vLLM moe_unpermute.
void finalize(const TensorView& rows, const TensorView& slot_row, const TensorView& out,
              const FinalizeOptions& options = {}, const ExecContext& ctx = {});

}  // namespace moecore
