#pragma once
// Which tiles the Hopper engine takes, from sizes alone: the host knows R and E, not how the routes fell, so
// rows per expert are what uniform routing would give.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "cuda/grouped_gemm/prepare_x.h"
#include "cuda/grouped_gemm/sm90.h"

namespace moecore::cuda::sm90 {

struct Policy {
  Family family = Family::kFloat;
  int portable = 0;       // 1: leaves the call to the portable engine
  int prefill = 0;        // 1: wide tiles, 0: narrow ones over a deep ring
  int max_tokens = 0;     // widest tile taken, at most the configuration's
  int stream_k = 0;       // 1: equal runs of steps for every block instead of whole tiles
  int dynamic = 0;        // 1: blocks take the next whole tile when they are done, 0: all in turn
  int promotion = 256;    // bytes of a row of weights that come into L2 with the first of them: 128 or 256
  int evict_weights = 0;  // 1: hardly an expert has two token tiles, so its weights need not stay in L2
  int pairs = 0;          // 1: two blocks share the weights of neighbouring token tiles
  int quantize_out = 1;   // 1: tiles that can leave their rows as codes do, 0: none does
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

/// Uniform routing to so many on average rarely gives an expert more than the 32 of a narrow tile.
inline constexpr double kOneTileRows = 20;

/// What decides between tilings, measured on an H200.
struct Limits {
  double decode_rows;   // up to so many an expert narrow tiles win
  double stream_waves;  // below so many stream-K wins ...
  double stream_rows;   // ... and up to so many rows an expert whatever the waves ...
  double stream_bytes;  // ... if there are more weights to read: the parts' exchange takes 2 to 3 us
};
constexpr Limits limits(Family family) {
  // fp4, gpt-oss. Narrow tiles read an expert's weights again for every 32 tokens. Estimated to cost as much
  // as wide ones at 34 rows: measured are 487 us at 16 rows and the wide tiles' 844 at 32. Tiles are short,
  // so with more tokens the parts' exchange costs more than a last wave's idle blocks: of stream-K, 2 rows
  // gain 3 to 7 %, 8 rows lose 2, 16 rows lose 15.
  if (family == Family::kDecoded)
    return {.decode_rows = 34, .stream_waves = 1, .stream_rows = 4, .stream_bytes = 15e6};
  // Below five waves the last one would leave up to half the chip idle.
  return {.decode_rows = kOneTileRows, .stream_waves = 5, .stream_rows = 0, .stream_bytes = 60e6};
}

inline Policy select_policy(FormPair forms, std::int64_t rows, std::int64_t num_experts,
                            std::int64_t weight_rows, std::int64_t k, int num_sms) {
  Policy policy;
  policy.family = family_of(forms);
  const double e = static_cast<double>(num_experts);
  policy.experts = e * (1 - std::pow(1 - 1 / e, static_cast<double>(rows)));
  policy.rows_per_expert = static_cast<double>(rows) / std::max(1.0, policy.experts);
  const Limits limit = limits(policy.family);
  policy.prefill = policy.rows_per_expert > limit.decode_rows;
  const TileConfig config = policy.tiles();
  policy.max_tokens = config.max_tokens;
  // From two token tiles an expert on: fp8 2 to 25 % faster, bf16 2 to 20 %. With one it costs nothing where
  // the copy engine brings the tokens too.
  policy.pairs = config.pairs && (config.tokens_are_rows() || policy.rows_per_expert > config.max_tokens);
  const double waves = policy.experts * std::ceil(static_cast<double>(weight_rows) / config.rows()) / num_sms;
  const double bytes = policy.experts * weight_bytes(forms) * static_cast<double>(weight_rows * k);
  // Steps of fp4 are 64 bytes of a row, a fourth of what comes into L2 for the first of them: evicted first,
  // some come twice. gpt-oss, T = 64, on an H200: 1.34 GB instead of 1.15 read, 6 % slower. Layers of fewer
  // weights lose 4 to 6 % where these are not evicted first, and with them what passes from kernel to kernel:
  // all that were measured with up to 201 MB, none from 236 MB on.
  constexpr double kLeavesRoom = 225e6;
  policy.evict_weights =
      policy.rows_per_expert <= kOneTileRows && (policy.family != Family::kDecoded || bytes <= kLeavesRoom);
  // A step of floats and fp8 is 128 bytes of a row. Where weights are read once, lines ahead of their step
  // cost 1 to 5 % of the time, up to 64 rows an expert; with several token tiles they save 1. Of fp4 two
  // steps more would wait in L2, where what is evicted first does not: 1 to 4 %; else fewer trips to memory
  // save 1.
  policy.promotion = (policy.family == Family::kDecoded ? policy.evict_weights != 0
                                                        : policy.rows_per_expert < config.max_tokens)
                         ? 128
                         : 256;
  policy.stream_k = config.shares && bytes > limit.stream_bytes &&
                    (waves < limit.stream_waves || policy.rows_per_expert <= limit.stream_rows);
  // From many waves on SMs with more of the memory's bandwidth take more tiles: 1 to 3 % off bf16 and fp8
  // layers of 8 to 256 tokens, up to 10 % off mxfp4 with 256.
  policy.dynamic = config.shares && !policy.stream_k;
  return policy;
}

/// Why tiles do not leave the `columns` columns of out as codes of `format`; empty where they do.
inline std::string_view quantized_out_refusal(const Policy& policy, FormPair forms, bool gated,
                                              std::int64_t columns, const QuantFormat& format) {
  if (operand_form(format) != OperandForm::kFp8Block128 || forms.x != OperandForm::kFp8Block128 ||
      format.layout != ScaleLayout::kLinear || format.e8m0_scales)
    return "it quantises products of fp8_block128 to fp8_block128 with f32 scales in rows";
  if (!policy.quantize_out) return "the policy says quantize_out=0";
  if (!gated) return "only gated activations end in codes";
  if (columns % 128 != 0) return "the output's width is not a multiple of 128";
  if (!holds_scale_blocks(policy.family, policy.tiles()))
    return "its tiles do not hold the 128 columns of a scale";
  return "";
}

/// Of a policy: prepared x, or the copies of its rows and their scales, then the parts of stream-K.
inline std::size_t workspace_bytes(const Policy& policy, std::int64_t rows, std::int64_t k) {
  return (policy.family == Family::kDecoded ? prepared_bytes(rows, k) : 0) +
         (policy.tiles().tokens_are_rows()
              ? static_cast<std::size_t>(rows * k) + prepared_scale_bytes(rows, k)
              : 0) +
         (policy.tiles().shares ? Sharing::kBytes : 0);
}
inline std::size_t workspace_bytes(FormPair forms, std::int64_t rows, std::int64_t num_experts,
                                   std::int64_t weight_rows, std::int64_t k) {
  // Whether the tiles can be cut along K does not depend on the number of SMs.
  return workspace_bytes(select_policy(forms, rows, num_experts, weight_rows, k, 1), rows, k);
}

}  // namespace moecore::cuda::sm90
