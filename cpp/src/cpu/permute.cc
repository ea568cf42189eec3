// permute, shuffle_rows on the CPU: rows are copied with memcpy, which is as wide as the machine.

#include "ops/permute.h"

#include <algorithm>
#include <cstring>

#include "cpu/thread_pool.h"

namespace moecore::cpu {

void permute(const PermuteProblem& p, const ExecContext& ctx) {
  if (ctx.explain) {
    ctx.explain->append("permute: cpu, one memcpy per row\n");
    return;
  }
  // Chunks of at least 64 KiB, so that a thread's share is worth its start.
  const std::int64_t grain = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, p.row_bytes));
  parallel_chunks(ctx, p.out_rows, grain, [&](std::int64_t begin, std::int64_t end) {
    const auto bytes = static_cast<std::size_t>(p.row_bytes);
    if (bytes == 0) return;
    for (std::int64_t d = begin; d < end; ++d) {
      const std::int64_t s = p.map[d];
      std::byte* to = p.out + d * p.out_pitch;
      if (s >= 0 && s < p.x_rows)
        std::memcpy(to, p.x + s * p.x_pitch, bytes);
      else
        std::memset(to, 0, bytes);
    }
  });
}

}  // namespace moecore::cpu
