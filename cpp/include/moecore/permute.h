#pragma once
// permute, shuffle_rows: gather rows. Pure data movement of any element type, width and alignment.

#include "moecore/plan.h"

namespace [[gnu::visibility("default")]] moecore {

/// out[d,:] = x[map[d],:] if 0 <= map[d] < S, else zeros. x [S,C], map i32|i64 [D], out [D,C] of x's dtype
/// (any, e2m1 with even C); rows of both may be strided, columns are dense. D = 0, S = 0 and C = 0 work.
/// Source: vLLM / SGLang shuffle_rows, without their alignment and bounds restrictions.
void shuffle_rows(const TensorView& x, const TensorView& map, const TensorView& out,
                  const ExecContext& ctx = {});

/// rows[r,:] = x[row_token[r],:], zeros for rows that no route owns. x [T,H], rows [R,H].
/// A plan's slot_row lets an engine read each token once and write its K copies.
void permute(const TensorView& x, const Plan& plan, const TensorView& rows, const ExecContext& ctx = {});

}  // namespace moecore
