// The expert layer as one kernel: which layers it takes, how its shared memory is cut, the launch.

#include <algorithm>
#include <cstdio>

#include "cuda/decode/decode.cuh"
#include "cuda/grouped_gemm/engines.h"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"
#include "ops/fused_experts.h"

namespace moecore::cuda {
namespace decode {
namespace {

std::size_t progress_bytes() {
  return (sizeof(Progress) + 255) / 256 * 256;
}
std::int64_t inter_pitch(std::int64_t inter) {
  return (inter * 2 + 15) / 16 * 16;
}

bool whole_16_bytes(const void* data, std::initializer_list<std::int64_t> sizes) {
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(data);
  for (std::int64_t size : sizes) bits |= static_cast<std::uintptr_t>(size);
  return bits % 16 == 0;
}

/// Why the kernel cannot take the problem; empty when it can.
std::string refusal(const FusedExpertsProblem& p, const DeviceInfo& device, const Policy& policy) {
  if (p.num_tokens * p.top_k > kMaxRoutes)
    return std::to_string(p.num_tokens * p.top_k) + " routes are more than it sorts";
  if (!policy.fused) return "the policy fused=1 would ask for it";
  if (device.compute_capability < 90) return "compute capability 9.0 or newer is needed";
  if (p.up.dtype == DType::kF32) return "it multiplies f16 and bf16";
  if (p.up.x_scales.form != OperandForm::kFloat) return "x is quantised";
  if (p.num_tokens * p.top_k == 0 || p.num_experts == 0 || p.hidden == 0 || p.inter == 0)
    return "there is nothing to multiply";
  if (p.inter % 8 || !whole_16_bytes(p.up.x, {p.hidden * 2, p.up.x_stride * 2}))
    return "rows of x and of the intermediate must be whole 16 bytes at multiples of 16";
  for (const GroupedGemmProblem* g : {&p.up, &p.down}) {
    const std::int64_t bits = element_bits(g->weight_scales.form, g->dtype);
    if (g->k * bits % 128 ||
        !whole_16_bytes(g->weights, {g->weight_expert_stride * bits / 8, g->weight_row_stride * bits / 8}))
      return "rows of w13 and w2 must be whole 16 bytes at multiples of 16";
    // Windows of whole 16 bytes around a row's scales must lie inside the tensor.
    const OperandScalesRef& s = g->weight_scales;
    const int block = block_cols(s.form);
    if (block == 0) continue;
    const std::int64_t rows = (g->n + s.block_rows - 1) / s.block_rows, cols = (g->k + block - 1) / block;
    const std::int64_t row_bytes = cols * bit_width(s.dtype) / 8;
    if (s.col_pitch != bit_width(s.dtype) / 8 || s.row_pitch != row_bytes ||
        s.expert_pitch != rows * row_bytes || !whole_16_bytes(s.data, {s.expert_pitch * g->num_experts}))
      return "scales of w13 and w2 must be dense and whole 16 bytes at a multiple of 16";
  }
  return "";
}

template <class Format>
Product product(const GroupedGemmProblem& p, const Policy& policy) {
  Product r;
  r.weights = static_cast<const std::byte*>(p.weights);
  r.expert_pitch = p.weight_expert_stride * Format::kBits / 8;
  r.row_pitch = p.weight_row_stride * Format::kBits / 8;
  r.k = static_cast<int>(p.k);
  r.steps = cut_depth(r.k, Format::kBits, Format::kBlock, Format::kScaleBytes, policy.row_bytes);
  r.epilogue = device_args(p).epilogue;
  const OperandScalesRef& s = p.weight_scales;
  if (Format::kBlock > 0) {
    r.scales = s.data;
    r.scale_expert_pitch = s.expert_pitch;
    r.scale_row_pitch = s.row_pitch;
    r.scale_row_shift = s.block_rows == 128 ? 7 : 0;
  } else if (s.form != OperandForm::kFloat) {
    r.row_scales = s.data;
    r.row_scale_expert_pitch = s.expert_pitch;
    r.row_scale_pitch = s.row_pitch;
  }
  r.global_scales = s.global_scale;
  r.global_scale_per_expert = s.global_scale_per_expert;
  return r;
}

DecodeArgs device_args(const FusedExpertsProblem& p, const Policy& policy, const ExecContext& ctx) {
  DecodeArgs args;
  args.ids = p.ids.data;
  args.ids_are_i64 = p.ids.is_i64;
  args.ids_stride = p.ids_stride;
  args.expert_map = p.expert_map;
  args.num_global = p.num_global;
  args.first_expert = p.first_expert;
  args.router_weights = p.weights;
  args.router_weight_dtype = p.weight_dtype;
  args.router_weights_stride = p.weights_stride;
  args.weight_on_input = p.weight_on_input;
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.top_k = static_cast<int>(p.top_k);
  args.num_experts = static_cast<int>(p.num_experts);
  args.hidden = static_cast<int>(p.hidden);
  args.inter = static_cast<int>(p.inter);
  args.x = static_cast<const std::byte*>(p.up.x);
  args.x_pitch = p.up.x_stride * 2;
  args.progress = reinterpret_cast<Progress*>(ctx.workspace.data());
  args.inter_rows = ctx.workspace.data() + progress_bytes();
  args.inter_pitch = inter_pitch(p.inter);
  args.residual = p.residual;
  args.residual_stride = p.residual_stride;
  args.out = p.out;
  args.out_stride = p.out_stride;
  args.rows = policy.rows;
  args.by_top_k = dev::Divisor(static_cast<unsigned>(p.top_k));
  return args;
}

template <class T, class Format>
void run_format(const FusedExpertsProblem& p, Policy policy, const DeviceInfo& device,
                const ExecContext& ctx) {
  DecodeArgs args = device_args(p, policy, ctx);
  args.by_blocks = dev::Divisor(static_cast<unsigned>(device.num_sms));
  args.sigmoid_gate = p.up.activation->gated() && is_sigmoid_family(*p.up.activation);
  // A column of out costs `inter` weights of every pass, one of the intermediate `hidden`, with a gate twice.
  const std::int64_t per_column = p.hidden * (p.up.activation->gated() ? 2 : 1);
  args.per_block = 1.0f / static_cast<float>(device.num_sms);
  args.per_column = per_column < device.num_sms ? 0.0f : 1.0f / static_cast<float>(per_column);

  // Token rows are wider than weight rows of few bits: a ring needs two stages at least.
  const int before = ring_offset(args.num_tokens * args.top_k);
  for (args.stages = 0; args.stages < 2; policy.row_bytes /= 2) {
    args.up = product<Format>(p.up, policy);
    args.down = product<Format>(p.down, policy);
    args.stage_bytes = align_128(std::max(args.up.steps.bytes(args.rows), args.down.steps.bytes(args.rows)));
    args.stages =
        std::min(policy.stages, (static_cast<int>(device.smem_per_block) - before) / args.stage_bytes);
  }
  args.flight = std::min(policy.flight, args.stages);
  launch("fused_experts", device,
         {.grid = dim3(device.num_sms),
          .block = dim3(kThreads),
          .smem_bytes = static_cast<std::size_t>(before + args.stages * args.stage_bytes),
          .stream = stream(ctx),
          .dependent = true,
          .cooperative = true},
         decode_kernel<T, Format>, args);
}

template <class T>
void run(const FusedExpertsProblem& p, const Policy& policy, const DeviceInfo& device,
         const ExecContext& ctx) {
  switch (p.up.weight_scales.form) {
    case OperandForm::kFp8Tensor:
    case OperandForm::kFp8Token:
      return run_format<T, Fp8Weights<T, 0>>(p, policy, device, ctx);
    case OperandForm::kFp8Block128:
      return run_format<T, Fp8Weights<T, 128>>(p, policy, device, ctx);
    case OperandForm::kMxfp4:
      return run_format<T, Mxfp4Weights<T>>(p, policy, device, ctx);
    case OperandForm::kNvfp4:
      return run_format<T, Nvfp4Weights<T>>(p, policy, device, ctx);
    default:
      return run_format<T, FloatWeights<T>>(p, policy, device, ctx);
  }
}

}  // namespace
}  // namespace decode

std::string run_decode(const FusedExpertsProblem& p, const ExecContext& ctx) {
  using namespace decode;
  const DeviceInfo& device = open_device("fused_experts", ctx);
  const int bits = element_bits(p.up.weight_scales.form, p.up.dtype);
  const std::int64_t weight_bytes =
      p.num_tokens * p.top_k * (p.up.n * p.up.k + p.down.n * p.down.k) * bits / 8;
  auto choose = [&](std::string_view text) {
    Policy policy = select_policy(p.num_tokens, weight_bytes, p.up.weight_scales.form != OperandForm::kFloat);
    override_policy("fused_experts", text,
                    {{"fused", &policy.fused, {0, 1}},
                     {"row_bytes", &policy.row_bytes, {512, 1024, 2048, 4096}},
                     {"rows", &policy.rows, {1, 2, 4, 8}},
                     {"stages", &policy.stages, {2, 3, 4, 6, 8, 16, 32}},
                     {"flight", &policy.flight, {1, 2, 3, 4, 6, 8, 32}}});
    return policy;
  };
  const Policy policy = tuned("fused_experts",
                              {.rows = p.num_tokens,
                               .width = p.hidden,
                               .depth = p.inter,
                               .experts = p.num_experts,
                               .sms = device.num_sms,
                               .capability = device.compute_capability},
                              ctx, choose);
  std::string why = refusal(p, device, policy);
  if (!why.empty()) return why;
  auto describe = [&] {
    char text[160];
    std::snprintf(
        text, sizeof(text),
        "cuda, one kernel: mma.sync over a stream of %d-bit weights, steps of up to %d bytes of a row, "
        "up to %d rows of an expert at a time",
        bits, policy.row_bytes, policy.rows);
    return std::string(text);
  };
  if (explained(ctx, "fused_experts", describe)) return "";
  const DeviceGuard guard(device);
  if (p.up.dtype == DType::kF16)
    run<__half>(p, policy, device, ctx);
  else
    run<__nv_bfloat16>(p, policy, device, ctx);
  return "";
}

std::size_t decode_workspace_bytes(std::int64_t num_tokens, std::int64_t top_k, std::int64_t inter) {
  if (num_tokens * top_k > decode::kMaxRoutes) return 0;
  return decode::progress_bytes() + static_cast<std::size_t>(num_tokens * top_k * decode::inter_pitch(inter));
}

}  // namespace moecore::cuda
