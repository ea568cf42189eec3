// permute, shuffle_rows on the CPU: rows are copied whole, with memcpy or, for an output larger than the
// caches, with streaming stores.
//
// permute knows its mapping from both sides. With tokens to go round it goes token by token, so that a token
// is read once and its K copies are written from the L1 cache; going row by row would read it K times.

#include "ops/permute.h"

#include <algorithm>
#include <cstring>

#include "cpu/explain.h"
#include "cpu/stream.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

struct Copier {
  const PermuteProblem& p;
  bool streams;

  // Row d of the output is source row s, or zeros when there is no such row.
  void operator()(std::int64_t d, std::int64_t s) const {
    move(p, d, s, streams);
    if (p.scales.row_bytes > 0) move(p.scales, d, s, false);
  }

 private:
  void move(const RowMove& m, std::int64_t d, std::int64_t s, bool stream) const {
    std::byte* const to = m.out + d * m.out_pitch;
    const auto bytes = static_cast<std::size_t>(m.row_bytes);
    if (s < 0 || s >= p.x_rows)
      std::memset(to, 0, bytes);
    else if (stream)
      stream_copy(to, m.x + s * m.x_pitch, bytes);
    else
      std::memcpy(to, m.x + s * m.x_pitch, bytes);
  }
};

}  // namespace

void permute(const PermuteProblem& p, const ExecContext& ctx) {
  const Copier copy{p, outgrows_cache(p.out_rows * p.row_bytes)};
  const bool by_token = p.slot_row && p.x_rows >= 8 * threads_for(ctx, p.x_rows);
  // Chunks of at least 64 KiB of output, so that a thread's share is worth its start.
  const std::int64_t rows = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, p.row_bytes));
  const std::int64_t tokens = std::max<std::int64_t>(1, rows / std::max<std::int64_t>(1, p.top_k));
  const std::int64_t units = by_token ? p.x_rows : p.out_rows, grain = by_token ? tokens : rows;
  if (explain(ctx, "permute",
              by_token       ? "each token read once"
              : copy.streams ? "row by row, streaming"
                             : "row by row",
              threads_for(ctx, units / grain)))
    return;
  if (p.row_bytes + p.scales.row_bytes == 0) return;

  if (!by_token) {
    parallel_chunks(ctx, p.out_rows, rows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t d = begin; d < end; ++d) copy(d, p.map[d]);
      stream_fence();
    });
    return;
  }
  parallel_chunks(ctx, p.x_rows, tokens, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t j = 0; j < p.top_k; ++j) {
        const std::int64_t d = p.slot_row[t * p.top_k + j];
        if (d >= 0 && d < p.out_rows) copy(d, t);
      }
    stream_fence();
  });
  const std::int64_t owned = std::clamp<std::int64_t>(*p.num_rows, 0, p.out_rows);
  parallel_chunks(ctx, p.out_rows - owned, rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t d = begin; d < end; ++d) copy(owned + d, -1);
  });
}

}  // namespace moecore::cpu
