#pragma once
// How quantize is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "ops/quantize.h"

namespace moecore::cuda {

/// Columns of a thread's unit, and of a warp's tile: 32 units of one row.
inline constexpr int kUnit = 16;
inline constexpr int kTile = 32 * kUnit;

/// Longest row that a block keeps in registers while it looks for the largest magnitude.
inline constexpr int kRowThreads = 512;
inline constexpr int kMaxRowUnits = 4;

/// How a warp finds the expert of its row.
enum class ExpertLookup : int {
  kCount,   // every lane counts the experts that end before the row: all loads at once
  kSearch,  // binary search: fewer loads, one after the other
};

struct QuantizePolicy {
  int threads = 128;  // of a block: warps that work on tiles of their own; whole rows: of the row's block
  int unroll =
      1;  // tiles of a warp, one behind the other in the row; whole rows: units of a thread, 0 = reread
  int lookup = 0;  // ExpertLookup
};

inline bool whole_rows(const QuantFormat& f) {
  return f.kind == QuantKind::kFp8 && f.granularity == Granularity::kToken;
}

inline QuantizePolicy select_quantize_policy(const QuantizeProblem& p, int num_sms) {
  QuantizePolicy policy;
  if (whole_rows(p.format)) {
    const std::int64_t units = std::max<std::int64_t>(1, (p.padded_cols + kUnit - 1) / kUnit);
    // Two units a thread once rows alone fill the SMs: half the threads to synchronise, the same bytes in
    // flight.
    policy.unroll = units > 64 && p.out_rows >= 2 * num_sms ? 2 : 1;
    while (policy.unroll <= kMaxRowUnits && units > static_cast<std::int64_t>(kRowThreads) * policy.unroll)
      policy.unroll *= 2;
    if (policy.unroll > kMaxRowUnits) policy.unroll = 0;
    const std::int64_t per_thread = std::max(1, policy.unroll);
    policy.threads = static_cast<int>(
        std::clamp<std::int64_t>(((units + per_thread - 1) / per_thread + 31) / 32 * 32, 32, kRowThreads));
    return policy;
  }
  const std::int64_t rows = p.slot_row && !p.global_scale_per_expert ? p.rows : p.out_rows;
  const std::int64_t tiles = rows * ((p.padded_cols + kTile - 1) / kTile);
  // Two tiles a warp once every SM has enough of them (0.88 of the time at 8192 x 7168, 1.15 at 16 rows);
  // with an activation, which reads twice the bytes, one. Narrow blocks where they are few.
  const bool many = tiles >= static_cast<std::int64_t>(num_sms) * 32;
  policy.unroll = !p.activation && many ? 2 : 1;
  policy.threads = many ? 128 : 64;
  policy.lookup =
      static_cast<int>(p.experts.num_experts <= 512 ? ExpertLookup::kCount : ExpertLookup::kSearch);
  return policy;
}

}  // namespace moecore::cuda
