#pragma once
// Which tiles the Hopper engine takes, from sizes alone: the host knows R and E, not how the routes fell, so
// rows per expert are what uniform routing would give.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/grouped_gemm/prepare_x.h"
#include "cuda/grouped_gemm/sm90.h"

namespace moecore::cuda::sm90 {

struct Policy {
  Family family = Family::kFloat;
  int portable = 0;       // 1: leaves the call to the portable engine
  int prefill = 0;        // 1: wide tiles, 0: narrow ones over a deep ring
  int max_tokens = 0;     // widest tile taken, at most the configuration's
  int stream_k = 0;       // 1: equal runs of steps for every block instead of whole tiles
  int evict_weights = 0;  // 1: hardly an expert has two token tiles, so its weights need not stay in L2
  double experts = 0;     // expected to have rows
  double rows_per_expert = 0;

  const TileConfig& tiles() const { return kTileConfigs[static_cast<int>(family)][prefill]; }
};

constexpr Family family_of(FormPair forms) {
  if (forms == FormPair{}) return Family::kFloat;
  return forms.weights == OperandForm::kMxfp4 || forms.weights == OperandForm::kNvfp4 ? Family::kDecoded
                                                                                      : Family::kFp8;
}

/// Bytes of a weight.
constexpr double weight_bytes(FormPair forms) {
  switch (forms.weights) {
    case OperandForm::kFloat:
      return 2;
    case OperandForm::kMxfp4:
    case OperandForm::kNvfp4:
      return 0.5;
    default:
      return 1;
  }
}

inline Policy select_policy(FormPair forms, std::int64_t rows, std::int64_t num_experts,
                            std::int64_t weight_rows, std::int64_t k, int num_sms) {
  // Below five waves the last one would leave up to half the chip idle.
  constexpr double kStreamBelowWaves = 5;
  // The parts' exchange takes 2 to 3 us, which shorter streams do not win back.
  constexpr double kStreamBytes = 60e6;
  // Uniform routing to 20 rows on average rarely gives an expert more than the 32 of a decode tile.
  constexpr double kDecodeRows = 20;

  Policy policy;
  policy.family = family_of(forms);
  const double e = static_cast<double>(num_experts);
  policy.experts = e * (1 - std::pow(1 - 1 / e, static_cast<double>(rows)));
  policy.rows_per_expert = static_cast<double>(rows) / std::max(1.0, policy.experts);
  policy.prefill = policy.rows_per_expert > kDecodeRows;
  const TileConfig config = policy.tiles();
  policy.max_tokens = config.max_tokens;
  policy.evict_weights = !policy.prefill;
  const double waves = policy.experts * std::ceil(static_cast<double>(weight_rows) / kTileRows) / num_sms;
  const double bytes = policy.experts * weight_bytes(forms) * static_cast<double>(weight_rows * k);
  policy.stream_k = config.stream_k && waves < kStreamBelowWaves && bytes > kStreamBytes;
  return policy;
}

/// Of a policy: prepared x, then the parts of stream-K.
inline std::size_t workspace_bytes(const Policy& policy, std::int64_t rows, std::int64_t k) {
  return (policy.family == Family::kDecoded ? prepared_bytes(rows, k) : 0) +
         (policy.tiles().stream_k ? StreamK::kBytes : 0);
}
inline std::size_t workspace_bytes(FormPair forms, std::int64_t rows, std::int64_t num_experts,
                                   std::int64_t weight_rows, std::int64_t k) {
  // Whether the tiles can be cut along K does not depend on the number of SMs.
  return workspace_bytes(select_policy(forms, rows, num_experts, weight_rows, k, 1), rows, k);
}

}  // namespace moecore::cuda::sm90
