#pragma once
// activate: the element-wise function between the two grouped GEMMs.

#include <cstdint>
#include <limits>
#include <optional>

#include "moecore/context.h"

namespace [[gnu::visibility("default")]] moecore {

enum class ActivationKind : std::uint8_t { kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kSwigluOai };

/// Where gate and up stand in a row of 2*I columns. kPlain: a row of I columns without an up part.
enum class GateOrder : std::uint8_t { kGateUp, kUpGate, kInterleaved, kPlain };

/// f(gate) * (up + beta), with gate clamped from above to `limit` and up to [-limit, limit].
/// silu: x*sigmoid(x); quick_gelu: x*sigmoid(1.702*x); swiglu_oai: x*sigmoid(alpha*x); gelu: with erf;
/// gelu_tanh: with tanh; relu2: max(x,0)^2. alpha is read by swiglu_oai alone. kPlain: f(x), no beta.
struct Activation {
  ActivationKind kind = ActivationKind::kSilu;
  GateOrder order = GateOrder::kGateUp;
  float alpha = 1.0f;
  float beta = 0.0f;
  float limit = std::numeric_limits<float>::infinity();

  bool gated() const { return order != GateOrder::kPlain; }

  /// gpt-oss: swiglu_oai with alpha 1.702, beta 1, limit 7.
  static Activation gpt_oss(GateOrder order = GateOrder::kInterleaved) {
    return {ActivationKind::kSwigluOai, order, 1.702f, 1.0f, 7.0f};
  }
};

/// x [R,2I] (kPlain: [R,I]) f32|f16|bf16 -> out [R,I] of the same dtype. f32 inside, to a few
/// units in the last place and 0 where a sigmoid is below 2^-126, rounded once; the same bits on every
/// engine. NaN propagates, also through the clamps. With `expert_offsets` (i32 [E+1]) only rows below
/// expert_offsets[E] are computed and the others are left untouched. Rows may be strided.
void activate(const TensorView& x, const TensorView& out, const Activation& activation,
              const std::optional<TensorView>& expert_offsets = {}, const ExecContext& ctx = {});

}  // namespace moecore
