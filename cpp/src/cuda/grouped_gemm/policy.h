#pragma once
// Which tiles the Hopper engine takes, from sizes alone: the host knows R and E, not how the routes fell, so
// rows per expert are what uniform routing would give.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/grouped_gemm/sm90.h"

namespace moecore::cuda::sm90 {

struct Policy {
  int prefill = 0;        // 1: wide tiles, 0: narrow ones over a deep ring
  int max_tokens = 0;     // widest tile taken, at most the configuration's
  int stream_k = 0;       // 1: equal runs of steps for every block instead of whole tiles
  int evict_weights = 0;  // 1: hardly an expert has two token tiles, so its weights need not stay in L2
  double experts = 0;     // expected to have rows
  double rows_per_expert = 0;

  const TileConfig& tiles() const { return kTileConfigs[prefill]; }
};

inline Policy select_policy(std::int64_t rows, std::int64_t num_experts, std::int64_t weight_rows,
                            std::int64_t k, int num_sms) {
  // Below five waves the last one would leave up to half the chip idle.
  constexpr double kStreamBelowWaves = 5;
  // The parts' exchange takes 2 to 3 us, which shorter streams do not win back.
  constexpr double kStreamBytes = 60e6;
  // Uniform routing to 20 rows on average rarely gives an expert more than the 32 of a decode tile.
  constexpr double kDecodeRows = 20;

  Policy policy;
  const double e = static_cast<double>(num_experts);
  policy.experts = e * (1 - std::pow(1 - 1 / e, static_cast<double>(rows)));
  policy.rows_per_expert = static_cast<double>(rows) / std::max(1.0, policy.experts);
  policy.prefill = policy.rows_per_expert > kDecodeRows;
  const TileConfig config = policy.tiles();
  policy.max_tokens = config.max_tokens;
  policy.evict_weights = !policy.prefill;
  const double waves = policy.experts * std::ceil(static_cast<double>(weight_rows) / kTileRows) / num_sms;
  const double bytes = policy.experts * 2.0 * static_cast<double>(weight_rows * k);
  policy.stream_k = config.stream_k && waves < kStreamBelowWaves && bytes > kStreamBytes;
  return policy;
}

}  // namespace moecore::cuda::sm90
