// activate on the CPU: kernels/activate.inl over pieces of rows.

#include "ops/activate.h"

#include <algorithm>

#include "cpu/explain.h"
#include "cpu/kernels/kernels.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {

void activate(const ActivateProblem& p, const ExecContext& ctx) {
  constexpr std::int64_t kGrain = 16;  // 8192 elements, about 2 us: worth waking a thread for
  const std::int64_t pieces_per_row = (p.inter + kActivatePiece - 1) / kActivatePiece;
  const int threads = threads_for(ctx, p.rows * pieces_per_row / kGrain);
  if (explain(ctx, "activate", "f32 in pieces of 512 columns", threads)) return;
  const std::int64_t rows = p.num_rows ? std::clamp<std::int64_t>(*p.num_rows, 0, p.rows) : p.rows;
  parallel_chunks(ctx, rows * pieces_per_row, kGrain,
                  [&](std::int64_t begin, std::int64_t end) { kernels().activate(p, begin, end); });
}

}  // namespace moecore::cpu
