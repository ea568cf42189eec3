// transpose_experts on the CPU: tiles of whole cache lines, so that every line of src and dst is touched
// once.

#include "ops/transpose_experts.h"

#include <algorithm>
#include <cstring>

#include "cpu/explain.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

template <class T>
void transpose_tile(const TransposeProblem& p, std::int64_t e, std::int64_t r0, std::int64_t r1,
                    std::int64_t c0, std::int64_t c1) {
  const std::byte* src = p.src + e * p.src_expert_stride * static_cast<std::int64_t>(sizeof(T));
  std::byte* dst = p.dst + e * p.dst_expert_stride * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t c = c0; c < c1; ++c)
    for (std::int64_t r = r0; r < r1; ++r)
      std::memcpy(dst + (c * p.dst_row_stride + r) * static_cast<std::int64_t>(sizeof(T)),
                  src + (r * p.src_row_stride + c) * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
}

}  // namespace

void transpose_experts(const TransposeProblem& p, const ExecContext& ctx) {
  constexpr std::int64_t kTile = 64;
  const std::int64_t tiles_r = (p.rows + kTile - 1) / kTile, tiles_c = (p.cols + kTile - 1) / kTile;
  const std::int64_t tiles = p.num_experts * tiles_r * tiles_c;
  constexpr std::int64_t kGrain = 16;
  if (explain(ctx, "transpose_experts", "64 x 64 tiles", threads_for(ctx, tiles / kGrain))) return;
  parallel_chunks(ctx, tiles, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t e = tile / (tiles_r * tiles_c);
      const std::int64_t r = tile / tiles_c % tiles_r * kTile, c = tile % tiles_c * kTile;
      const std::int64_t r1 = std::min(r + kTile, p.rows), c1 = std::min(c + kTile, p.cols);
      switch (p.element_bytes) {
        case 1:
          transpose_tile<std::uint8_t>(p, e, r, r1, c, c1);
          break;
        case 2:
          transpose_tile<std::uint16_t>(p, e, r, r1, c, c1);
          break;
        case 4:
          transpose_tile<std::uint32_t>(p, e, r, r1, c, c1);
          break;
        case 8:
          transpose_tile<std::uint64_t>(p, e, r, r1, c, c1);
          break;
      }
    }
  });
}

}  // namespace moecore::cpu
