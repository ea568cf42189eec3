// route on the CPU: kernels/route.inl over tokens.

#include "ops/route.h"

#include <algorithm>

#include "cpu/explain.h"
#include "cpu/kernels/kernels.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {

void route(const RouteProblem& p, const ExecContext& ctx) {
  // About 4096 logits a chunk, a few microseconds.
  const std::int64_t grain = std::max<std::int64_t>(1, 4096 / p.num_experts);
  if (explain(ctx, "route", "a token at a time", threads_for(ctx, p.num_tokens / grain))) return;
  parallel_chunks(ctx, p.num_tokens, grain,
                  [&](std::int64_t begin, std::int64_t end) { kernels().route(p, begin, end); });
}

}  // namespace moecore::cpu
