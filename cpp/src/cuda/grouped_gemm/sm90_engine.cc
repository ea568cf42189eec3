// The host side of the Hopper engine: what it can take, the tensor map of the weights, the launch.

#include <algorithm>
#include <cstdio>

#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/policy.h"
#include "cuda/grouped_gemm/prepare_x.h"
#include "cuda/grouped_gemm/sm90_maps.h"
#include "cuda/has_sm90.h"
#include "cuda/policy_override.h"
#include "ops/permute.h"

namespace moecore::cuda {
namespace {

bool gated(const GroupedGemmProblem& p) {
  return p.activation && p.activation->gated();
}

FormPair forms_of(const GroupedGemmProblem& p) {
  return {p.x_scales.form, p.weight_scales.form};
}

/// What the families ask of the operands beyond the rules for all.
std::string family_refusal(const GroupedGemmProblem& p, sm90::Family family) {
  switch (family) {
    case sm90::Family::kFloat:
      if (p.dtype == DType::kF32) return "it takes bf16, f16, codes";
      break;
    case sm90::Family::kFp8:
      if (p.x_scales.form == OperandForm::kFloat) return "floats x fp8 are the portable engine's";
      if (p.dtype != DType::kBF16) return "fp8 x fp8 becomes bf16";
      if (p.x_scales.form == OperandForm::kFp8Block128 && gated(p) && (p.n / 2) % 64 != 0)
        return "gate and up of 64 columns do not start in blocks of their own";
      break;
    case sm90::Family::kDecoded: {
      const OperandScalesRef& scales = p.weight_scales;
      auto even = [](std::int64_t bytes) { return bytes % 2 == 0; };
      if (p.dtype != DType::kBF16) return "fp4 weights become bf16";
      if (scales.col_pitch != 1) return "the scales of a row of weights are not dense";
      if (scales.row_pitch < 0 || scales.row_pitch * p.n > 0x7FFFFFFF)
        return "the scales of an expert span more than 2 GiB";
      if (scales.form == OperandForm::kNvfp4 && !(even(reinterpret_cast<std::intptr_t>(scales.data)) &&
                                                  even(scales.row_pitch) && even(scales.expert_pitch)))
        return "the scales of weight rows are not 2-byte aligned";
      if (p.x_rows > p.num_rows) return "x has more rows than out";
      break;
    }
  }
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
    sm90::Policy chosen =
        sm90::select_policy(forms_of(p), p.num_rows, p.num_experts, p.n, p.k, device.num_sms);
    override_policy(
        "grouped_gemm", text,
        {{"portable", &chosen.portable, {0, 1}},
         {"prefill", &chosen.prefill, {0, 1}},
         {"max_tokens", &chosen.max_tokens, {8, 16, 24, 32, 64, 96, 120, 128, 144, 160, 176, 192}},
         {"stream_k", &chosen.stream_k, {0, 1}},
         {"dynamic", &chosen.dynamic, {0, 1}},
         {"quantize_out", &chosen.quantize_out, {0, 1}},
         {"pairs", &chosen.pairs, {0, 1}},
         {"evict_weights", &chosen.evict_weights, {0, 1}},
         {"promotion", &chosen.promotion, {128, 256}}});
    return chosen;
  });
  auto workspace_suffices = [&] {
    return ctx.workspace.size() >= sm90::workspace_bytes(policy, p.num_rows, p.k);
  };
  // Rows or scales that cannot be put in order, and rows that are no box, are gathered.
  const bool prepares = p.row_token || sm90::needs_prepared_scales(p);
  if (policy.tiles().tokens_are_rows() &&
      ((prepares && !workspace_suffices()) || (!p.row_token && p.x_stride < p.k)))
    policy.prefill = 0;
  const sm90::TileConfig config = policy.tiles();
  policy.max_tokens =
      config.tokens_are_rows() ? config.max_tokens : std::min(policy.max_tokens, config.max_tokens);
  policy.pairs = policy.pairs && config.pairs && device.num_sms % 2 == 0;
  policy.evict_weights = policy.evict_weights && !config.tokens_are_rows();
  const bool shares = config.shares && device.num_sms <= sm90::Sharing::kMaxBlocks && workspace_suffices();
  policy.stream_k = policy.stream_k && shares;
  policy.dynamic = policy.dynamic && shares && !policy.stream_k;
  return policy;
}

/// Tiles whose tokens must stand in order, and rows of x that do not.
bool copies_rows(const GroupedGemmProblem& p, const sm90::Policy& policy) {
  return p.row_token && policy.tiles().tokens_are_rows();
}
/// Likewise of the scales of blocks.
bool prepares_scales(const GroupedGemmProblem& p, const sm90::Policy& policy) {
  return policy.tiles().tokens_are_rows() && sm90::needs_prepared_scales(p);
}

XLayout preferred_x_layout(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const sm90::Policy policy = policy_for(p, device, ctx);
  return {
      .rows_in_order = copies_rows(p, policy),
      .scales_in_columns = policy.tiles().tokens_are_rows() && p.x_scales.form == OperandForm::kFp8Block128};
}

/// The rules of the copy engine and of 16-byte accesses.
std::string refusal(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  auto aligned = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
  const std::int64_t columns = gated(p) ? p.n / 2 : p.n;
  if (!MOECORE_HAS_SM90) return "this build has no code for sm_90a";
  if (device.compute_capability != 90) return "it needs compute capability 9.0";
  const std::string refused = family_refusal(p, sm90::family_of(forms_of(p)));
  if (!refused.empty()) return refused;
  const sm90::Policy policy = policy_for(p, device, ctx);
  if (policy.portable) return "the policy says portable=1";
  if (p.activation && !(gated(p) && is_sigmoid_family(*p.activation)))
    return "its activations are silu, quick_gelu, gelu_tanh and swiglu_oai, gated";
  if (p.num_experts > kMaxExperts) return "more than 2048 experts";
  // Elements in 16 bytes.
  const bool decoded = sm90::family_of(forms_of(p)) == sm90::Family::kDecoded;  // x is copied first
  const std::int64_t x_piece = decoded ? 1 : 128 / element_bits(p.x_scales.form, p.dtype),
                     weight_piece = 128 / element_bits(p.weight_scales.form, p.dtype);
  if (p.k == 0 || p.k % x_piece != 0 || p.k % weight_piece != 0)
    return "rows of K are not a positive multiple of 16 bytes";
  if (columns % (gated(p) ? 16 : 8) != 0) return "the output's width is not a multiple of 8, gated 16";
  if (!(decoded || aligned(p.x)) || !aligned(p.weights) || !aligned(p.out))
    return "x, weights or out is not 16-byte aligned";
  if (p.x_stride % x_piece != 0 || p.out_stride % 8 != 0) return "rows of x or out are not 16-byte aligned";
  if (p.weight_row_stride % weight_piece != 0 || p.weight_expert_stride % weight_piece != 0 ||
      p.weight_row_stride < p.k || (p.num_experts > 1 && p.weight_expert_stride <= 0))
    return "the strides of weights do not suit the copy engine";
  // Rows are gathered by 32-bit numbers of 16 bytes.
  const std::int64_t row_pieces = decoded ? sm90::prepared_k(p.k) / 8 : p.x_stride / x_piece;
  if (row_pieces < 0) return "rows of x stand in descending order";
  if (p.x_rows * row_pieces > 0xFFFF0000ll) return "x is larger than 64 GiB";
  if (p.quantized_out) {
    if (!aligned(p.quantized_out->codes) || p.quantized_out->pitch % 16 != 0)
      return "the codes of out are not 16-byte aligned";
    return std::string(
        sm90::quantized_out_refusal(policy, forms_of(p), gated(p), columns, p.quantized_out->format));
  }
  return "";
}

std::string describe(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const sm90::Policy policy = policy_for(p, device, ctx);
  const sm90::TileConfig config = policy.tiles();
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "%s, %s: %d weight rows x up to %d tokens, ring of %d, %s%s%s%s (about %.1f rows for each of %.0f "
      "experts)",
      config.instruction, config.name, config.rows(), policy.max_tokens, config.stages,
      policy.stream_k  ? "stream-K"
      : policy.dynamic ? "whole tiles, dynamic"
                       : "whole tiles",
      policy.pairs ? ", pairs of blocks share weights" : "",
      copies_rows(p, policy)       ? ", rows of x put in order first"
      : prepares_scales(p, policy) ? ", scales of x put in columns first"
                                   : "",
      p.quantized_out ? ", rows left as codes" : "", policy.rows_per_expert, policy.experts);
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

template <int kDims>
CUtensorMap encode_map(CUtensorMapDataType type, const void* data, const cuuint64_t (&dims)[kDims],
                       const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims],
                       CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  cuuint32_t dense[kDims];
  std::fill_n(dense, kDims, 1);
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, type, kDims, const_cast<void*>(data), dims, strides, box, dense,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, "grouped_gemm",
        "encoding a tensor map");
  return map;
}

CUtensorMapDataType element_type(DType dtype) {
  return dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

/// The rows of x as the kernel reads them: dimensions (K, rows), a box the 128 bytes of config.box_tokens
/// rows.
CUtensorMap x_map(const GroupedGemmArgs& args, std::int64_t rows, DType dtype, sm90::Family family,
                  const sm90::TileConfig& config) {
  const bool codes = family == sm90::Family::kFp8;
  const cuuint64_t bytes = codes ? 1 : 2;
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(args.k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(args.x_stride) * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(sm90::kLineBytes / bytes),
                            static_cast<cuuint32_t>(config.box_tokens)};
  return encode_map(codes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : element_type(dtype), args.x, dims, strides, box,
                    CU_TENSOR_MAP_SWIZZLE_128B);
}

/// The scales of x as the kernel reads them: dimensions (rows, K / 128), a box those of a tile's rows for a
/// step.
CUtensorMap x_scales_map(const ScaleArgs& scales, std::int64_t rows, std::int64_t k,
                         const sm90::TileConfig& config) {
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>((k + 127) / 128)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(scales.col_pitch)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(config.scale_box()), 1};
  return encode_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, scales.data, dims, strides, box,
                    CU_TENSOR_MAP_SWIZZLE_NONE);
}

/// Out as a warp of such tiles stores it: dimensions (columns, rows), a box 32 columns of 16 rows, 64 where a
/// tile's weight rows are columns of out one by one.
CUtensorMap out_map(const GroupedGemmProblem& p) {
  const cuuint64_t columns = gated(p) ? p.n / 2 : p.n;
  const cuuint64_t dims[] = {columns, static_cast<cuuint64_t>(p.num_rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(p.out_stride) * 2};
  const cuuint32_t box[] = {gated(p) ? 32u : 64u, 16};
  return encode_map(element_type(p.dtype), p.out, dims, strides, box,
                    gated(p) ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

/// The weight rows of a tile for one step of K, in units of `elements` codes (fp4 counts bytes).
///   plain: dimensions (K, N, 1, 1, E), boxes (step, rows, 1, 1, 1).
///   gated: dimensions (K, 8b, 2, I/8b, E) for b blocks, boxes (step, 8, 2, rows/16, 1): eight gate
///          rows, eight up rows, and so on, whether the checkpoint holds them as two halves or row by row.
/// `rows` are what one of a step's boxes brings.
CUtensorMap weight_map(const GroupedGemmProblem& p, const sm90::Policy& policy) {
  const sm90::Family family = policy.family;
  const sm90::TileConfig config = policy.tiles();
  const bool is_float = family == sm90::Family::kFloat;
  const cuuint64_t bits = element_bits(p.weight_scales.form, p.dtype);
  const cuuint64_t pitch = p.weight_row_stride * bits / 8, inter = p.n / 2;
  const cuuint64_t expert = p.num_experts > 1 ? p.weight_expert_stride * bits / 8 : p.n * pitch;
  const cuuint64_t k = is_float ? p.k : p.k * bits / 8, n = p.n, e = p.num_experts;
  const cuuint32_t step = is_float ? 64 : family == sm90::Family::kFp8 ? 128 : 64;
  cuuint64_t dims[5] = {k, n, 1, 1, e}, strides[4] = {pitch, pitch, pitch, expert};
  const cuuint32_t rows = config.rows() / config.weight_boxes(gated(p));
  cuuint32_t box[5] = {step, rows, 1, 1, 1};
  if (gated(p)) {
    const bool interleaved = p.activation->order == GateOrder::kInterleaved;
    const cuuint64_t row = interleaved ? 2 * pitch : pitch;
    const cuuint32_t unit = 8 * config.blocks;  // columns of out that the blocks share
    const cuuint64_t gated_dims[5] = {k, unit, 2, inter / unit, e};
    const cuuint64_t gated_strides[4] = {row, interleaved ? pitch : inter * pitch, unit * row, expert};
    const cuuint32_t gated_box[5] = {step, 8, 2, rows / 16, 1};
    std::copy_n(gated_dims, 5, dims);
    std::copy_n(gated_strides, 4, strides);
    std::copy_n(gated_box, 5, box);
  }
  // Codes that become bf16 are read by threads, 64 bytes of a row after the other.
  return encode_map(
      is_float ? element_type(p.dtype) : CU_TENSOR_MAP_DATA_TYPE_UINT8, p.weights, dims, strides, box,
      family == sm90::Family::kDecoded ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
      policy.promotion == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

/// The instance of `choose` for the policy's tiling and a gated epilogue or not.
template <class Choose>
sm90::Kernel choose_kernel(const sm90::Policy& policy, bool is_gated, const Choose& choose) {
  using sm90::Tiling;
  if (policy.prefill)
    return is_gated ? choose.template operator()<Tiling::kPrefill, true>()
                    : choose.template operator()<Tiling::kPrefill, false>();
  return is_gated ? choose.template operator()<Tiling::kDecode, true>()
                  : choose.template operator()<Tiling::kDecode, false>();
}

sm90::Kernel kernel_for(const GroupedGemmProblem& p, const sm90::Policy& policy) {
  using sm90::Tiling;
  auto choose = [&]<Tiling kTiling, bool kGated>() {
    if (policy.family == sm90::Family::kDecoded)
      return p.weight_scales.form == OperandForm::kMxfp4
                 ? sm90::decoded_kernel<OperandForm::kMxfp4, kTiling, kGated>()
                 : sm90::decoded_kernel<OperandForm::kNvfp4, kTiling, kGated>();
    if (policy.family == sm90::Family::kFp8)
      return p.x_scales.form == OperandForm::kFp8Block128 ? sm90::fp8_kernel<true, kTiling, kGated>()
                                                          : sm90::fp8_kernel<false, kTiling, kGated>();
    return p.dtype == DType::kF16 ? sm90::float_kernel<DType::kF16, kTiling, kGated>()
                                  : sm90::float_kernel<DType::kBF16, kTiling, kGated>();
  };
  return choose_kernel(policy, gated(p), choose);
}

void run(const GroupedGemmProblem& p, const DeviceInfo& device, const ExecContext& ctx) {
  const sm90::Policy policy = policy_for(p, device, ctx);
  const sm90::Kernel kernel = kernel_for(p, policy);
  const sm90::TileConfig config = policy.tiles();
  sm90::Maps maps{.weights = weight_map(p, policy)};
  GroupedGemmArgs args = device_args(p);
  args.tiles = {.max_tokens = policy.max_tokens,
                .token_step = config.token_step(),
                .weight_tiles = static_cast<int>((p.n + config.rows() - 1) / config.rows())};
  std::byte* workspace = ctx.workspace.data();
  if (policy.family == sm90::Family::kDecoded) {
    sm90::prepare_x(p, workspace, device, ctx);
    args.x = workspace;
    args.x_stride = args.k = static_cast<int>(sm90::prepared_k(p.k));
    // Offsets and weights were complete before prepare_x began, for it waited for what preceded it.
    args.offsets_settled = true;
    workspace += sm90::prepared_bytes(p.num_rows, p.k);
  }
  bool ordered = !p.row_token;  // row r of out is made from row r of x
  std::int64_t x_rows = p.x_rows;
  if (copies_rows(p, policy)) {
    PermuteProblem copy;
    copy.x = static_cast<const std::byte*>(p.x);
    copy.x_pitch = p.x_stride;
    copy.x_rows = p.x_rows;
    copy.out = workspace;
    copy.out_pitch = copy.row_bytes = p.k;
    copy.out_rows = x_rows = p.num_rows;
    copy.map.data = p.row_token;
    ExecContext plain = ctx;
    plain.policy = {};  // is about the product
    permute(copy, plain);
    args.x = workspace;
    args.x_stride = p.k;
    args.offsets_settled = ordered = true;  // as above; row_token goes on to say where scales of rows stand
    workspace += copy.out_rows * p.k;
  }
  if (prepares_scales(p, policy)) {
    args.x_scales = sm90::prepare_scales(p, workspace, device, ctx);
    args.offsets_settled = true;
    workspace += sm90::prepared_scale_bytes(p.num_rows, p.k);
  }
  bool boxes = ordered && config.box_tokens > 0 && args.x_stride >= args.k;
  if (boxes) maps.x = x_map(args, x_rows, p.dtype, policy.family, config);
  if (config.tokens_are_rows() && p.x_scales.form == OperandForm::kFp8Block128)
    maps.x_scales = x_scales_map(args.x_scales, p.num_rows, p.k, config);
  if (config.tokens_are_rows()) maps.out = out_map(p);
  args.epilogue.swapped = gated(p) && p.activation->order == GateOrder::kUpGate;
  sm90::Sharing sharing;
  if (policy.stream_k || policy.dynamic) {
    sharing.by = policy.stream_k ? sm90::Sharing::kSteps : sm90::Sharing::kTiles;
    sharing.next_tile = reinterpret_cast<dev::GridCounter*>(workspace);
    sharing.flags = reinterpret_cast<unsigned long long*>(workspace);
    sharing.sums =
        reinterpret_cast<float*>(sharing.flags + sm90::Sharing::kMaxBlocks * sm90::Sharing::kMaxWarpgroups);
  }
  bool evict_weights = policy.evict_weights;

  const LaunchConfig launch_config{.grid = device.num_sms,
                                   .block = config.threads(),
                                   .smem_bytes = kernel.smem_bytes,
                                   .stream = stream(ctx),
                                   .dependent = true,
                                   .cluster = dim3(policy.pairs ? 2 : 1)};
  void* pointers[] = {&maps, &args, &sharing, &boxes, &evict_weights};
  launch_kernel("grouped_gemm", device, launch_config, kernel.function, pointers);
}

#else

void run(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&) {}

#endif

}  // namespace

const GroupedGemmEngine kSm90Engine{"the Hopper engine", refusal, describe, run, preferred_x_layout};

}  // namespace moecore::cuda
