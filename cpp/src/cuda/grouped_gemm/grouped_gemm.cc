// grouped_gemm on CUDA: the engines in order of preference, and the one that takes the problem.

#include "ops/grouped_gemm.h"

#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/policy.h"
#include "moecore/error.h"

namespace moecore::cuda {
namespace {

constexpr const GroupedGemmEngine* kEngines[] = {&kSm90Engine, &kPortableEngine};

/// The engine that takes a problem, or none, and why those before it do not: "<name>: <why>" of each.
struct Choice {
  const GroupedGemmEngine* engine = nullptr;
  std::vector<std::string> passed_over;

  /// `before` each, and `between` them.
  std::string text(std::string_view before, std::string_view between = "") const {
    std::string all;
    for (const std::string& one : passed_over)
      all.append(all.empty() ? "" : between).append(before).append(one);
    return all;
  }
};
Choice choose_engine(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  Choice choice;
  for (const GroupedGemmEngine* engine : kEngines) {
    const std::string refusal = engine->refusal(p, device, ctx);
    if (refusal.empty()) {
      choice.engine = engine;
      break;
    }
    choice.passed_over.push_back(engine->name + (": " + refusal));
  }
  return choice;
}

ScaleArgs scale_args(const OperandScalesRef& s) {
  return {.data = s.data,
          .dtype = s.dtype,
          .expert_pitch = s.expert_pitch,
          .row_pitch = s.row_pitch,
          .col_pitch = s.col_pitch,
          .block_rows = s.block_rows,
          .block_cols = block_cols(s.form),
          .global_scale = s.global_scale,
          .global_scale_per_expert = s.global_scale_per_expert};
}

}  // namespace

bool is_sigmoid_family(const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kSilu:
    case ActivationKind::kQuickGelu:
    case ActivationKind::kGeluTanh:
    case ActivationKind::kSwigluOai:
      return true;
    default:
      return false;
  }
}

GroupedGemmArgs device_args(const GroupedGemmProblem& p) {
  GroupedGemmArgs args;
  args.x = p.x;
  args.x_stride = p.x_stride;
  args.weights = p.weights;
  args.weight_expert_stride = p.weight_expert_stride;
  args.weight_row_stride = p.weight_row_stride;
  args.row_token = p.row_token;
  args.expert_offsets = p.expert_offsets;
  args.offsets_settled = p.offsets_settled;
  args.num_experts = static_cast<int>(p.num_experts);
  args.k = static_cast<int>(p.k);
  args.weight_k = args.k;
  args.x_scales = scale_args(p.x_scales);
  args.weight_scales = scale_args(p.weight_scales);
  EpilogueArgs& e = args.epilogue;
  e.out = p.out;
  e.out_stride = p.out_stride;
  e.columns = static_cast<int>(p.n);
  e.bias = p.bias;
  e.bias_is_f32 = p.bias_dtype == DType::kF32;
  e.bias_stride = p.bias_stride;
  e.row_weights = p.row_weights;
  e.row_weight_dtype = p.row_weight_dtype;
  if (p.quantized_out)
    args.quantized_out = {.codes = p.quantized_out->codes,
                          .pitch = p.quantized_out->pitch,
                          .scales = p.quantized_out->scales,
                          .scale_pitch = p.quantized_out->scale_pitch,
                          .rule = scale_rule(p.quantized_out->format)};
  if (!p.activation) return args;

  const Activation& activation = *p.activation;
  e.activated = true;
  e.gated = activation.gated();
  e.kind = activation.kind;
  e.alpha = activation.alpha;
  e.beta = activation.beta;
  e.limit = activation.limit;
  double linear = 1, cubic = 0;
  if (activation.kind == ActivationKind::kQuickGelu) linear = 1.702;
  if (activation.kind == ActivationKind::kSwigluOai) linear = activation.alpha;
  if (activation.kind == ActivationKind::kGeluTanh) {
    linear = 2 * std::sqrt(2 / M_PI);  // (1 + tanh(y)) / 2 = sigmoid(2y), y = sqrt(2/pi) * (g + 0.044715 g^3)
    cubic = linear * 0.044715;
  }
  e.linear_log2e = static_cast<float>(-linear * M_LOG2E);
  e.cubic_log2e = static_cast<float>(-cubic * M_LOG2E);
  if (activation.gated()) {
    e.columns = static_cast<int>(p.n / 2);
    e.row_step = activation.order == GateOrder::kInterleaved ? 2 : 1;
    const int second = activation.order == GateOrder::kInterleaved ? 1 : e.columns;
    e.gate_first = activation.order == GateOrder::kUpGate ? second : 0;
    e.up_first = activation.order == GateOrder::kUpGate ? 0 : second;
  }
  return args;
}

void grouped_gemm(const GroupedGemmProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("grouped_gemm", ctx);
  const Choice choice = choose_engine(p, device, ctx);
  if (!choice.engine)
    throw Unsupported("grouped_gemm: no CUDA engine takes this problem" + choice.text("; not "));
  auto describe = [&] { return "cuda, " + choice.engine->describe(p, device, ctx) + choice.text("; not "); };
  if (explained(ctx, "grouped_gemm", describe)) return;
  if (p.num_rows == 0 || p.num_experts == 0 || p.n == 0) return;
  const DeviceGuard guard(device);
  choice.engine->run(p, device, ctx);
}

std::string quantized_out_refusal(const GroupedGemmProblem& p, const ExecContext& ctx) {
  const Choice choice = choose_engine(p, open_device("grouped_gemm", ctx), ctx);
  return choice.engine ? "" : choice.text("", "; ");
}

XLayout preferred_x_layout(const GroupedGemmProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("grouped_gemm", ctx);
  const GroupedGemmEngine* engine = choose_engine(p, device, ctx).engine;
  return engine && engine->preferred_x_layout ? engine->preferred_x_layout(p, device, ctx) : XLayout{};
}

std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, FormPair forms) {
  if (dtype == DType::kF32 || rows == 0 || num_experts == 0) return 0;
  return sm90::workspace_bytes(forms, rows, num_experts, n, k);
}

}  // namespace moecore::cuda
