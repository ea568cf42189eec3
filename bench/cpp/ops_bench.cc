// The data path on the CPU through the public headers, op by op, in the shapes of an expert layer:
// Qwen3-30B-A3B with an eighth of its experts, so that weights take 150 MB. Arguments are T; rates count what
// an op must read and write once. `moecore bench` is the broader tool, with CUDA, peers and checks; this one
// shows what a call costs an engine.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "moecore/moecore.h"

namespace moecore::bench {
namespace {

constexpr std::int64_t kExperts = 16, kTopK = 8, kHidden = 2048, kInter = 768;

/// Aligned memory under a TensorView.
class Tensor {
 public:
  Tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
    view_ = TensorView::dense(static_cast<void*>(nullptr), dtype, shape);
    bytes_ = static_cast<std::size_t>(view_.numel()) * bit_width(dtype) / 8;
    memory_.reset(static_cast<std::byte*>(::operator new(bytes_, std::align_val_t{kWorkspaceAlignment})));
    view_.data = memory_.get();
    std::memset(memory_.get(), 0, bytes_);
  }

  const TensorView& view() const { return view_; }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() {
    return static_cast<T*>(view_.data);
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kWorkspaceAlignment}); }
  };
  TensorView view_;
  std::size_t bytes_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
};

std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

/// bf16 numbers of about `2^exponent`, either sign.
Tensor random_bf16(std::initializer_list<std::int64_t> shape, int exponent = 0) {
  Tensor t(DType::kBF16, shape);
  for (std::int64_t i = 0; i < t.view().numel(); ++i)
    t.as<std::uint16_t>()[i] =
        static_cast<std::uint16_t>((generator()() & 0x807Fu) | static_cast<unsigned>(127 + exponent) << 7);
  return t;
}

Tensor random_f32(std::initializer_list<std::int64_t> shape) {
  Tensor t(DType::kF32, shape);
  std::normal_distribution<float> normal(0.0f, 1.5f);
  for (std::int64_t i = 0; i < t.view().numel(); ++i) t.as<float>()[i] = normal(generator());
  return t;
}

/// Workspace, and the context that lends it.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(DType::kU8, {static_cast<std::int64_t>(bytes) + 1}) {}

  ExecContext context() {
    ExecContext ctx;
    ctx.workspace = {memory_.as<std::byte>(), memory_.bytes()};
    return ctx;
  }

 private:
  Tensor memory_;
};

/// T tokens routed by random logits, and their plan.
struct Routed {
  explicit Routed(std::int64_t t)
      : tokens(t),
        logits(random_f32({t, kExperts})),
        weights(DType::kF32, {t, kTopK}),
        ids(DType::kI32, {t, kTopK}),
        expert_offsets(DType::kI32, {kExperts + 1}),
        scale_offsets(DType::kI32, {kExperts + 1}),
        row_token(DType::kI32, {t * kTopK}),
        slot_row(DType::kI32, {t, kTopK}),
        scratch(plan_workspace_bytes(t, kTopK, kExperts, Device{})) {
    route_once();
    plan_once();
  }

  void route_once() { route(logits.view(), weights.view(), ids.view(), {.renormalize = true}); }
  void plan_once() { moecore::plan(ids.view(), plan(), {.num_experts = kExperts}, scratch.context()); }
  Plan plan() const {
    return {.expert_offsets = expert_offsets.view(),
            .scale_offsets = scale_offsets.view(),
            .row_token = row_token.view(),
            .slot_row = slot_row.view()};
  }

  /// Bytes of the weights of experts that have rows.
  std::size_t touched(const Tensor& w) const {
    const auto* offsets = static_cast<const std::int32_t*>(expert_offsets.view().data);
    std::size_t experts = 0;
    for (std::int64_t e = 0; e < kExperts; ++e) experts += offsets[e + 1] > offsets[e];
    return w.bytes() / kExperts * experts;
  }

  std::int64_t tokens;
  Tensor logits, weights, ids, expert_offsets, scale_offsets, row_token, slot_row;
  Scratch scratch;
};

void count_bytes(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

void Route(benchmark::State& state) {
  Routed r(state.range(0));
  for (auto _ : state) r.route_once();
  count_bytes(state, r.logits.bytes() + r.weights.bytes() + r.ids.bytes());
}

void PlanRows(benchmark::State& state) {
  Routed r(state.range(0));
  for (auto _ : state) r.plan_once();
  count_bytes(state, r.ids.bytes() + r.row_token.bytes() + r.slot_row.bytes());
}

void Permute(benchmark::State& state) {
  const Routed r(state.range(0));
  const Tensor x = random_bf16({r.tokens, kHidden}), rows = random_bf16({r.tokens * kTopK, kHidden});
  for (auto _ : state) permute(x.view(), r.plan(), rows.view());
  count_bytes(state, x.bytes() + rows.bytes());
}

void Activate(benchmark::State& state) {
  const std::int64_t rows = state.range(0) * kTopK;
  const Tensor x = random_bf16({rows, 2 * kInter}), out(DType::kBF16, {rows, kInter});
  for (auto _ : state) activate(x.view(), out.view(), {});
  count_bytes(state, x.bytes() + out.bytes());
}

void QuantizeBlock128(benchmark::State& state) {
  const Tensor x = random_bf16({state.range(0), kHidden}), data(DType::kE4M3, {state.range(0), kHidden}),
               scales(DType::kF32, {state.range(0), kHidden / 128});
  for (auto _ : state) quantize(x.view(), data.view(), scales.view(), QuantFormat::fp8_block128());
  count_bytes(state, x.bytes() + data.bytes() + scales.bytes());
}

void Finalize(benchmark::State& state) {
  const Routed r(state.range(0));
  const Tensor rows = random_bf16({r.tokens * kTopK, kHidden}), out(DType::kBF16, {r.tokens, kHidden});
  for (auto _ : state) finalize(rows.view(), r.slot_row.view(), out.view(), {.weights = r.weights.view()});
  count_bytes(state, rows.bytes() + out.bytes());
}

/// Weights of the layer, made once.
const std::pair<Tensor, Tensor>& layer_weights() {
  static const std::pair<Tensor, Tensor> weights(random_bf16({kExperts, 2 * kInter, kHidden}, -6),
                                                 random_bf16({kExperts, kHidden, kInter}, -5));
  return weights;
}

void GroupedGemm(benchmark::State& state) {
  const Routed r(state.range(0));
  const Tensor& w13 = layer_weights().first;
  const Tensor x = random_bf16({r.tokens, kHidden}), out(DType::kBF16, {r.tokens * kTopK, kInter});
  Scratch scratch(
      grouped_gemm_workspace_bytes(r.tokens * kTopK, 2 * kInter, kHidden, kExperts, DType::kBF16, Device{}));
  for (auto _ : state)
    grouped_gemm(x.view(), w13.view(), r.expert_offsets.view(), out.view(),
                 {.row_token = r.row_token.view(), .activation = Activation{}}, scratch.context());
  count_bytes(state, r.touched(w13) + x.bytes() + out.bytes());
}

void FusedExperts(benchmark::State& state) {
  const Routed r(state.range(0));
  const auto& [w13, w2] = layer_weights();
  const Tensor x = random_bf16({r.tokens, kHidden}), out(DType::kBF16, {r.tokens, kHidden});
  Scratch scratch(
      fused_experts_workspace_bytes(r.tokens, kTopK, kExperts, kHidden, kInter, DType::kBF16, Device{}));
  const Experts experts{.w13 = w13.view(), .w2 = w2.view()};
  for (auto _ : state)
    fused_experts(x.view(), r.weights.view(), r.ids.view(), experts, out.view(), {}, scratch.context());
  count_bytes(state, r.touched(w13) + r.touched(w2) + x.bytes() + out.bytes());
}

BENCHMARK(Route)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(PlanRows)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(Permute)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(Activate)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(QuantizeBlock128)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(Finalize)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();
BENCHMARK(GroupedGemm)->Arg(1)->Arg(64)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(FusedExperts)->Arg(1)->Arg(64)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace moecore::bench
