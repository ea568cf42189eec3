#pragma once
// route: router logits -> the top-k experts of each token and their weights.

#include <cstdint>
#include <optional>

#include "moecore/context.h"

namespace [[gnu::visibility("default")]] moecore {

/// kIdentity: the logits are scores already.
enum class Scoring : std::uint8_t { kSoftmax, kSigmoid, kIdentity };

/// How a group of experts is ranked against the other groups.
enum class GroupScore : std::uint8_t { kTop2Sum, kMax };

struct RouteOptions {
  Scoring scoring = Scoring::kSoftmax;
  /// f32 [E], added to the score for selection only (DeepSeek's e_score_correction_bias).
  std::optional<TensorView> bias{};
  /// Experts form `num_groups` equal groups; only those of the best `topk_groups` groups compete.
  std::int64_t num_groups = 1;
  std::int64_t topk_groups = 1;
  GroupScore group_score = GroupScore::kTop2Sum;
  /// Divide a token's weights by their sum (plus 1e-20).
  bool renormalize = false;
  /// Factor on every weight, applied after renormalisation.
  float scale = 1.0f;
  /// bool or u8 [T]: a non-zero entry marks a padding token, whose ids are all -1 and weights 0.
  std::optional<TensorView> is_padding{};
};

/// logits [T,E] f32|f16|bf16 -> weights f32 [T,K], ids i32 [T,K]; 1 <= K <= E <= 2048, rows may be strided.
///
/// All arithmetic is f32. score_e = softmax(logits)_e, 1 / (1 + exp(-logit_e)) or logit_e. The selection key
/// is score_e + bias_e with a bias and the logit itself without one (every scoring is monotone, so ids do not
/// depend on how exp rounds). The K largest keys win, ties go to the lower expert id, slots are in descending
/// key order. An expert whose logit or bias is not finite is never selected. A slot for which no expert is
/// left has id -1 and weight 0. weight_j = score_j, with `renormalize` score_j / (sum_j score_j + 1e-20) (sum
/// in slot order), times `scale`. Softmax runs over the finite logits. Groups: with kTop2Sum a group's rank
/// is the sum of its two largest keys (its only key when it has one expert), with kMax its largest key; ties
/// go to the lower group. Keys in grouped selection are score + bias (bias 0 without one); in a rank, an
/// expert that is never selected counts as -infinity.
///
/// Semantics follow vLLM topk_softmax / grouped_topk ("f32 everywhere" variants) and DeepSeek-V3's noaux_tc.
void route(const TensorView& logits, const TensorView& weights, const TensorView& ids,
           const RouteOptions& options = {}, const ExecContext& ctx = {});

}  // namespace moecore
