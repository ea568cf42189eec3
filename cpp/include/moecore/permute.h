#pragma once
// permute, shuffle_rows: gather rows. Pure data movement of any element type, width and alignment.

#include "moecore/plan.h"

namespace [[gnu::visibility("default")]] moecore {

/// out[d,:] = x[map[d],:] if 0 <= map[d] < S, else zeros. x [S,C], map i32|i64 [D], out [D,C] of x's dtype
/// (any, e2m1 with even C); rows of both may be strided, columns are dense, and out shares no memory with x.
/// D = 0, S = 0 and C = 0 work.
/// Source: vLLM / SGLang shuffle_rows, without their alignment and bounds restrictions.
void shuffle_rows(const TensorView& x, const TensorView& map, const TensorView& out,
                  const ExecContext& ctx = {});

/// The same, and in the same pass out_scales[d,:] = scales[map[d],:]: the scales of the rows, of any dtype,
/// linear, so that each row's are a row of their own. scales [S,B], out_scales [D,B].
/// Source: SGLang shuffle_rows_with_scales.
void shuffle_rows(const TensorView& x, const TensorView& scales, const TensorView& map, const TensorView& out,
                  const TensorView& out_scales, const ExecContext& ctx = {});

/// rows[r,:] = x[row_token[r],:], zeros for rows that no route owns. x [T,H], rows [R,H].
/// A plan's slot_row lets an engine read each token once and write its K copies.
void permute(const TensorView& x, const Plan& plan, const TensorView& rows, const ExecContext& ctx = {});

/// The same, and in the same pass row_scales[r,:] = scales[row_token[r],:]. scales [T,B] linear (one for each
/// token, or for each block of its columns), row_scales [R,B]. Swizzled scales of experts are not a
/// permutation of those of tokens: permute_quantize writes them.
/// Source: vLLM moe_permute with a1q_scale.
void permute(const TensorView& x, const TensorView& scales, const Plan& plan, const TensorView& rows,
             const TensorView& row_scales, const ExecContext& ctx = {});

}  // namespace moecore
