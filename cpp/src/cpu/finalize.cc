// finalize on the CPU: kernels/finalize.inl over tokens, and over column blocks when there are few tokens.

#include "ops/finalize.h"

#include <algorithm>

#include "cpu/explain.h"
#include "cpu/kernels/kernels.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {

void finalize(const FinalizeProblem& p, const ExecContext& ctx) {
  if (p.num_tokens == 0 || p.hidden == 0) {
    if (explain(ctx, "finalize", "nothing to do", 1)) return;
    for (std::int64_t block = 0; block * kFinalizeScaleBlock < p.hidden; ++block)
      for (std::int64_t row = 0; row < p.padded_scale_rows; ++row)
        p.out_scales.data[block * p.out_scales.block_stride + row * p.out_scales.row_stride] = 0.0f;
    return;
  }
  // A task reads about 32 Ki elements: whole tokens, or a part of one token's columns.
  constexpr std::int64_t kTaskElements = 32768;
  const std::int64_t slots = std::max<std::int64_t>(1, p.top_k);
  const std::int64_t wanted = std::max<std::int64_t>(1, kTaskElements / slots);
  constexpr std::int64_t kBlock = kFinalizeScaleBlock;  // is not divided between tasks
  const std::int64_t columns = std::min(p.hidden, (wanted + kBlock - 1) / kBlock * kBlock);
  const std::int64_t blocks = (p.hidden + columns - 1) / columns;
  const std::int64_t tokens = std::max<std::int64_t>(1, wanted / p.hidden);
  const std::int64_t token_tasks = (p.num_tokens + tokens - 1) / tokens;
  if (explain(ctx, "finalize", "columns in registers, one fma chain over the slots",
              threads_for(ctx, token_tasks * blocks)))
    return;
  parallel_for(ctx, token_tasks * blocks, [&](std::int64_t task, int) {
    const std::int64_t t = task / blocks * tokens, h = task % blocks * columns;
    kernels().finalize(p, t, std::min(t + tokens, p.num_tokens), h, std::min(h + columns, p.hidden));
  });
}

}  // namespace moecore::cpu
