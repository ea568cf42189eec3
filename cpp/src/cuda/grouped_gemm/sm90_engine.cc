// The host side of the Hopper engine: what it can take, the tensor map of the weights, the launch.

#include <cuda.h>

#include <algorithm>
#include <cstdio>

#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/policy.h"
#include "cuda/has_sm90.h"
#include "cuda/policy_override.h"

namespace moecore::cuda {
namespace {

bool gated(const GroupedGemmProblem& p) {
  return p.activation && p.activation->gated();
}

/// The rules of the copy engine and of 16-byte accesses, for elements of two bytes.
std::string refusal(const GroupedGemmProblem& p, const DeviceInfo& device) {
  auto aligned = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
  const std::int64_t columns = gated(p) ? p.n / 2 : p.n;
  if (p.weight_scales.form != OperandForm::kFloat) return "it takes bf16 and f16";
  if (!MOECORE_HAS_SM90) return "this build has no code for sm_90a";
  if (device.compute_capability != 90) return "it needs compute capability 9.0";
  if (p.dtype == DType::kF32) return "it takes bf16 and f16";
  if (p.activation && !(gated(p) && is_sigmoid_family(*p.activation)))
    return "its activations are silu, quick_gelu, gelu_tanh and swiglu_oai, gated";
  if (p.num_experts > kMaxExperts) return "more than 2048 experts";
  if (p.k == 0 || p.k % 8 != 0) return "K is not a positive multiple of 8";
  if (columns % (gated(p) ? 16 : 8) != 0) return "the output's width is not a multiple of 8, gated 16";
  if (!aligned(p.x) || !aligned(p.weights) || !aligned(p.out))
    return "x, weights or out is not 16-byte aligned";
  if (p.x_stride % 8 != 0 || p.out_stride % 8 != 0) return "rows of x or out are not 16-byte aligned";
  if (p.weight_row_stride % 8 != 0 || p.weight_expert_stride % 8 != 0 || p.weight_row_stride < p.k ||
      (p.num_experts > 1 && p.weight_expert_stride <= 0))
    return "the strides of weights do not suit the copy engine";
  if (p.x_rows * (p.x_stride / 8) > 0xFFFF0000ll) return "x is larger than 64 GiB";
  return "";
}

sm90::Policy policy_for(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const TuningSizes sizes{.rows = p.num_rows,
                          .width = p.n,
                          .depth = p.k,
                          .experts = p.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  sm90::Policy policy = tuned("grouped_gemm", sizes, ctx, [&](std::string_view text) {
    sm90::Policy chosen = sm90::select_policy(p.num_rows, p.num_experts, p.n, p.k, device.num_sms);
    override_policy("grouped_gemm", text,
                    {{"prefill", &chosen.prefill, {0, 1}},
                     {"max_tokens", &chosen.max_tokens, {8, 16, 24, 32, 64, 96, 128, 144, 160, 176}},
                     {"stream_k", &chosen.stream_k, {0, 1}},
                     {"evict_weights", &chosen.evict_weights, {0, 1}}});
    return chosen;
  });
  const sm90::TileConfig config = policy.tiles();
  policy.max_tokens = std::min(policy.max_tokens, config.max_tokens);
  policy.stream_k = policy.stream_k && config.stream_k && device.num_sms <= sm90::StreamK::kMaxBlocks &&
                    ctx.workspace.size() >= sm90::StreamK::kBytes;
  return policy;
}

std::string describe(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const sm90::Policy policy = policy_for(p, device, ctx);
  const sm90::TileConfig config = policy.tiles();
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "wgmma, %s: %d weight rows x up to %d tokens, ring of %d, %s (about %.1f rows for each of %.0f "
      "experts)",
      config.name, sm90::kTileRows, policy.max_tokens, config.stages,
      policy.stream_k ? "stream-K" : "whole tiles", policy.rows_per_expert, policy.experts);
  return text;
}

#if MOECORE_HAS_SM90

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's encoder, found at run time: the library does not link the driver.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &found),
          "grouped_gemm", "looking up cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

void encode(const GroupedGemmProblem& p, CUtensorMap* map, const void* data, int rank, const cuuint64_t* dims,
            const cuuint64_t* strides, const cuuint32_t* box) {
  constexpr cuuint32_t kDense[5] = {1, 1, 1, 1, 1};
  const CUresult status = encoder()(
      map, p.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(data), dims, strides, box, kDense, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, "grouped_gemm",
        "encoding a tensor map");
}

/// The weight rows of a tile for one step of K.
///   plain: dimensions (K, N, 1, 1, E), one box (64, 256, 1, 1, 1).
///   gated: dimensions (K, 16, 2, I/16, E), two boxes (64, 8, 2, 8, 1): eight gate rows, eight up rows, and
///   so
///          on, whether the checkpoint holds them as two blocks or row by row.
CUtensorMap weight_map(const GroupedGemmProblem& p) {
  const cuuint64_t pitch = p.weight_row_stride * 2, inter = p.n / 2;
  const cuuint64_t expert = p.num_experts > 1 ? p.weight_expert_stride * 2 : p.n * pitch;
  const cuuint64_t k = p.k, n = p.n, e = p.num_experts;
  cuuint64_t dims[5] = {k, n, 1, 1, e}, strides[4] = {pitch, pitch, pitch, expert};
  cuuint32_t box[5] = {sm90::kStepK, sm90::kTileRows, 1, 1, 1};
  if (gated(p)) {
    const bool interleaved = p.activation->order == GateOrder::kInterleaved;
    const cuuint64_t row = interleaved ? 2 * pitch : pitch;
    const cuuint64_t gated_dims[5] = {k, 16, 2, inter / 16, e};
    const cuuint64_t gated_strides[4] = {row, interleaved ? pitch : inter * pitch, 16 * row, expert};
    const cuuint32_t gated_box[5] = {sm90::kStepK, 8, 2, sm90::kTileRows / 32, 1};
    std::copy_n(gated_dims, 5, dims);
    std::copy_n(gated_strides, 4, strides);
    std::copy_n(gated_box, 5, box);
  }
  CUtensorMap map;
  encode(p, &map, p.weights, 5, dims, strides, box);
  return map;
}

template <DType kType>
sm90::Kernel kernel_for(const sm90::Policy& policy, bool is_gated) {
  using sm90::Tiling;
  if (policy.prefill)
    return is_gated ? sm90::kernel<kType, Tiling::kPrefill, true>()
                    : sm90::kernel<kType, Tiling::kPrefill, false>();
  return is_gated ? sm90::kernel<kType, Tiling::kDecode, true>()
                  : sm90::kernel<kType, Tiling::kDecode, false>();
}

void run(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const sm90::Policy policy = policy_for(p, device, ctx);
  const sm90::Kernel kernel = p.dtype == DType::kF16 ? kernel_for<DType::kF16>(policy, gated(p))
                                                     : kernel_for<DType::kBF16>(policy, gated(p));
  CUtensorMap weights = weight_map(p);
  GroupedGemmArgs args = device_args(p);
  args.tiles = {.max_tokens = policy.max_tokens,
                .weight_tiles = static_cast<int>((p.n + sm90::kTileRows - 1) / sm90::kTileRows)};
  args.epilogue.swapped = gated(p) && p.activation->order == GateOrder::kUpGate;
  sm90::StreamK stream_k;
  if (policy.stream_k) {
    stream_k.enabled = true;
    stream_k.flags = reinterpret_cast<unsigned long long*>(ctx.workspace.data());
    stream_k.sums = reinterpret_cast<float*>(stream_k.flags + 2 * sm90::StreamK::kMaxBlocks);
  }
  bool evict_weights = policy.evict_weights;

  const LaunchConfig launch_config{.grid = device.num_sms,
                                   .block = sm90::kThreads,
                                   .smem_bytes = kernel.smem_bytes,
                                   .stream = stream(ctx),
                                   .dependent = true};
  void* pointers[] = {&weights, &args, &stream_k, &evict_weights};
  launch_kernel("grouped_gemm", device, launch_config, kernel.function, pointers);
}

#else

void run(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&) {}

#endif

}  // namespace

const GroupedGemmEngine kSm90Engine{"the Hopper engine", refusal, describe, run};

}  // namespace moecore::cuda
