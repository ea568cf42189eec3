// quantize, dequantize, global_scale, convert_scales: problems to arguments and launches, and the small
// kernels.

#include <algorithm>
#include <limits>
#include <string>

#include "cuda/device/ptx.cuh"
#include "cuda/policy_override.h"
#include "cuda/quantize.cuh"
#include "cuda/runtime.h"
#include "cuda/types.cuh"
#include "moecore/error.h"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 256;

Encoding encoding_of(const QuantFormat& f) {
  switch (f.kind) {
    case QuantKind::kFp8:
      return f.granularity == Granularity::kTensor  ? Encoding::kTensor
             : f.granularity == Granularity::kToken ? Encoding::kToken
                                                    : Encoding::kBlock128;
    case QuantKind::kNvfp4:
      return Encoding::kNvfp4;
    case QuantKind::kMxfp8:
      return Encoding::kMxfp8;
    default:
      return Encoding::kMxfp4;
  }
}

/// Rows follow each other by expert, and their scales or factors are their expert's.
bool expert_of_row_matters(const QuantizeProblem& p) {
  return p.experts.expert_offsets && (p.experts.scale_offsets || p.global_scale_per_expert);
}

/// Tiles of kTile columns of every row.
void set_tiles(QuantizeArgs& args, std::int64_t columns) {
  const std::int64_t tiles = std::max<std::int64_t>(1, (columns + kTile - 1) / kTile);
  if (std::int64_t{args.num_tasks} * tiles > std::numeric_limits<std::int32_t>::max() / 2)
    throw Unsupported("quantize: the CUDA engine takes at most 2^30 tiles of 512 columns");
  args.tiles = static_cast<int>(tiles);
  args.by_tiles = dev::Divisor(static_cast<unsigned>(tiles));
}

std::string describe(const QuantizePolicy& policy, const QuantizeProblem& p) {
  std::string text = "cuda, ";
  text += quantizes_tokens(p) ? "blocks for each token" : "blocks for each row";
  text += ", threads=" + std::to_string(policy.threads) + " unroll=" + std::to_string(policy.unroll);
  if (!whole_rows(p.format))
    text += " tasks=" + std::to_string(policy.tasks) + " lookup=" + std::to_string(policy.lookup);
  return text;
}

/// Turns the bits of largest magnitudes into scales: fp8's, or nvfp4's global ones.
__global__ void finish_scales_kernel(float* scales, std::int64_t n, bool global, float floor, float cap) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float amax = scales[i], clamped = fminf(amax > floor ? amax : floor, cap);
  if (global)
    scales[i] = amax > 0.0f ? fminf(__fdiv_rn(2688.0f, fminf(amax, cap)), cap) : 1.0f;
  else
    scales[i] = __fdiv_rn(clamped, 448.0f);
}

void finish_scales(const char* op, const DeviceInfo& device, cudaStream_t s, float* scales, std::int64_t n,
                   bool global, float floor, float cap) {
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>((n + 31) / 32)), .block = dim3(32), .stream = s, .dependent = true};
  launch(op, device, config, finish_scales_kernel, scales, n, global, floor, cap);
}

struct DequantizeArgs {
  const std::uint8_t* data;
  std::int64_t data_pitch;
  ScaleRef scales;
  const float* global_scale;
  bool global_scale_per_expert;
  bool one_scale;  // for the tensor
  int block;       // columns, 0 for a whole row
  ScaleMap map;
  ExpertRowsRef experts;
  void* out;
  std::int64_t out_stride;
  std::int64_t rows;
  int cols;
  bool data_aligned, out_aligned;
  int tiles;
  dev::Divisor by_tiles;
  Encoding encoding;
};

/// A warp does one tile of a row, a thread 16 columns, which never straddle two blocks.
template <class T, bool kFp4>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ DequantizeArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const unsigned row = args.by_tiles.divide(warp);
  if (row >= live_rows(args.experts, args.rows) || !row_is_live(args.experts, row)) return;
  const int column =
      static_cast<int>(warp - row * args.tiles) * kTile + static_cast<int>(threadIdx.x % 32) * kUnit;
  const int n = args.cols - column;
  if (n <= 0) return;

  const Place place = place_of(args.experts, args.map, args.scales.layout, args.global_scale_per_expert, row);
  const int block = args.block > 0 ? column / args.block : 0;
  const std::byte* at = args.scales.data;
  if (!args.one_scale) at += place.scales + args.map.of_block(block);
  float scale;
  if (args.scales.bytes == 4) {
    scale = *reinterpret_cast<const float*>(at);
  } else if (args.encoding == Encoding::kNvfp4) {
    const float global =
        args.global_scale ? args.global_scale[args.global_scale_per_expert ? place.expert : 0] : 1.0f;
    scale = __fmul_rn(numeric::e4m3_to_f32(static_cast<std::uint8_t>(*at)), __frcp_rn(global));
  } else {
    scale = numeric::e8m0_to_f32(static_cast<std::uint8_t>(*at));
  }

  constexpr int kBytes = kFp4 ? kUnit / 2 : kUnit;
  const std::uint8_t* from = args.data + row * args.data_pitch + (kFp4 ? column / 2 : column);
  std::uint32_t words[kBytes / 4] = {};
  if (args.data_aligned && n >= kUnit) {
    using Vector = dev::bytes_t<kBytes>;
    *reinterpret_cast<Vector*>(words) = __ldg(reinterpret_cast<const Vector*>(from));
  } else {
    const int bytes = kFp4 ? (n + 1) / 2 : n;
#pragma unroll
    for (int i = 0; i < kBytes; ++i)
      if (i < bytes) words[i / 4] |= static_cast<std::uint32_t>(from[i]) << i % 4 * 8;
  }
  constexpr int kWidth = 16 / sizeof(T);
  dev::Pack<T, kWidth> values[kUnit / kWidth];
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
    const auto code =
        static_cast<std::uint8_t>(kFp4 ? words[e / 8] >> e % 8 * 4 & 15u : words[e / 4] >> e % 4 * 8);
    const float value = kFp4 ? numeric::e2m1_to_f32(code) : numeric::e4m3_to_f32(code);
    values[e / kWidth].values[e % kWidth] = dev::from_f32<T>(__fmul_rn(value, scale));
  }
  T* out = static_cast<T*>(args.out) + row * args.out_stride + column;
  if (args.out_aligned && n >= kUnit) {
#pragma unroll
    for (int i = 0; i < kUnit / kWidth; ++i) reinterpret_cast<dev::Pack<T, kWidth>*>(out)[i] = values[i];
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      if (e < n) out[e] = values[e / kWidth].values[e % kWidth];
  }
}

struct ConvertArgs {
  ScaleRef src, dst;
  std::int64_t rows, padded_rows, padded_cols;
};

__global__ void __launch_bounds__(kThreads) convert_scales_kernel(const __grid_constant__ ConvertArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < args.padded_rows * args.padded_cols; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / args.padded_cols, col = i % args.padded_cols;
    const bool real = row < args.rows && col < args.src.cols;
    args.dst.data[scale_byte(args.dst, 0, row, col)] =
        real ? args.src.data[scale_byte(args.src, 0, row, col)] : std::byte{0};
  }
}

}  // namespace

QuantizeArgs make_quantize_args(const QuantizeProblem& p) {
  constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;
  if (p.padded_cols > kMostColumns || p.cols > kMostColumns)
    throw Unsupported("quantize: the CUDA engine takes rows of at most 2^30 columns");
  const bool by_token = quantizes_tokens(p);
  const std::int64_t num_tasks = by_token ? p.rows : p.out_rows;
  constexpr std::int64_t kMostTasks = std::numeric_limits<std::int32_t>::max() - 127;  // padded to 128
  if (num_tasks > kMostTasks) throw Unsupported("quantize: the CUDA engine takes at most 2^31 - 128 rows");
  QuantizeArgs args{.x = p.x,
                    .x_stride = p.x_stride,
                    .cols = static_cast<int>(p.cols),
                    .data = p.data,
                    .data_pitch = p.data_pitch,
                    .padded_cols = static_cast<int>(p.padded_cols),
                    .x_aligned = source_is_aligned(p),
                    .data_aligned = data_is_aligned(p),
                    .scales = p.scales,
                    .stored_blocks = static_cast<int>(stored_blocks(p.scales)),
                    .map = ScaleMap(p.scales),
                    .rule = scale_rule(p.format),
                    .global_scale = p.global_scale,
                    .global_scale_per_expert = p.global_scale_per_expert,
                    .experts = p.experts,
                    .rows = p.out_rows,
                    .tasks = by_token                   ? Tasks::kTokens
                             : p.experts.row_counts     ? Tasks::kExpertGroups
                             : expert_of_row_matters(p) ? Tasks::kExpertRows
                                                        : Tasks::kRows,
                    .num_tasks = static_cast<int>(num_tasks),
                    .row_token = by_token ? nullptr : p.row_token,
                    .slot_row = by_token ? p.slot_row : nullptr,
                    .top_k = static_cast<int>(p.top_k)};
  if (p.activation) {
    args.order = p.activation->order;
    args.kind = p.activation->kind;
    args.activation = activation_params(*p.activation);
  }
  return args;
}

void quantize(const QuantizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("quantize", ctx);
  const TuningSizes sizes{.rows = p.out_rows,
                          .width = p.padded_cols,
                          .experts = p.experts.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const QuantizePolicy policy = tuned("quantize", sizes, ctx, [&](std::string_view text) {
    QuantizePolicy chosen = select_quantize_policy(p, device.num_sms);
    if (!whole_rows(p.format))
      override_policy("quantize", text,
                      {{"threads", &chosen.threads, {32, 64, 96, 128, 160, 192, 224, 256}},
                       {"unroll", &chosen.unroll, {1, may_unroll(p) ? 2 : 1}},
                       {"tasks", &chosen.tasks, {1, 2, 4, 8}},
                       {"lookup", &chosen.lookup, {0, 1}}});
    return chosen;
  });
  if (explained(ctx, "quantize", [&] { return describe(policy, p); })) return;

  QuantizeLaunch l{.encoding = encoding_of(p.format),
                   .dtype = p.dtype,
                   .policy = policy,
                   .device = device,
                   .stream = stream(ctx),
                   .args = make_quantize_args(p),
                   .whole_units = whole_units(p)};
  const DeviceGuard guard(device);
  if (l.encoding == Encoding::kTensor && !p.format.static_scale) {
    auto* scale = reinterpret_cast<float*>(p.scales.data);
    check(cudaMemsetAsync(scale, 0, sizeof(float), l.stream), "quantize", "clear the scale");
    AmaxLaunch amax{.dtype = p.dtype,
                    .device = device,
                    .stream = l.stream,
                    .args = l.args,
                    .amax = reinterpret_cast<std::uint32_t*>(scale),
                    .per_expert = false};
    set_tiles(amax.args, p.cols);
    p.activation ? launch_amax_activated(amax) : launch_amax_plain(amax);
    finish_scales("quantize", device, l.stream, scale, 1, false, p.format.amax_floor, p.format.amax_cap);
  }
  if (l.encoding != Encoding::kToken) {
    l.args.lookup = policy.lookup;
    l.args.tasks_of_block = policy.tasks;
    const std::int64_t parts = row_parts(policy, columns_of_row(p)), warps = parts * policy.threads / 32;
    if (parts > kMaxGridY) throw Unsupported("quantize: the CUDA engine takes rows of at most 2^25 columns");
    l.row_parts = static_cast<unsigned>(parts);
    l.args.padding_blocks =
        static_cast<unsigned>((padding_warps(p.scales, p.experts, p.out_rows) + warps - 1) / warps);
  }
  const std::int64_t blocks =
      l.args.padding_blocks + (std::int64_t{l.args.num_tasks} + policy.tasks - 1) / policy.tasks;
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<std::int32_t>::max())
    throw Unsupported("quantize: the CUDA engine takes at most 2^31 - 1 rows");
  l.blocks = static_cast<unsigned>(blocks);
  if (!p.activation)
    launch_plain(l);
  else if (is_silu_and_mul(*p.activation))
    launch_silu_and_mul(l);
  else
    launch_activated(l);
}

void dequantize(const DequantizeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("dequantize", ctx);
  if (explained(ctx, "dequantize", [] { return std::string("cuda, a warp for each 512 columns of a row"); }))
    return;
  if (p.rows == 0 || p.cols == 0) return;
  const std::int64_t tiles = (p.cols + kTile - 1) / kTile;
  if (p.cols > std::numeric_limits<std::int32_t>::max() / 2 ||
      p.rows * tiles > std::numeric_limits<std::int32_t>::max() / 2)
    throw Unsupported("dequantize: the CUDA engine takes at most 2^30 tiles of 512 columns");
  const std::int64_t element = bit_width(p.dtype) / 8;
  const bool fp4 = p.format.data_dtype() == DType::kE2M1;
  const DequantizeArgs args{.data = p.data,
                            .data_pitch = p.data_pitch,
                            .scales = p.scales,
                            .global_scale = p.global_scale,
                            .global_scale_per_expert = p.global_scale_per_expert,
                            .one_scale = encoding_of(p.format) == Encoding::kTensor,
                            .block = static_cast<int>(p.format.block()),
                            .map = ScaleMap(p.scales),
                            .experts = p.experts,
                            .out = p.out,
                            .out_stride = p.out_stride,
                            .rows = p.rows,
                            .cols = static_cast<int>(p.cols),
                            .data_aligned = aligned(p.data, p.data_pitch, p.rows, fp4 ? 8 : 16),
                            .out_aligned = aligned(p.out, p.out_stride * element, p.rows, 16),
                            .tiles = static_cast<int>(tiles),
                            .by_tiles = dev::Divisor(static_cast<unsigned>(tiles)),
                            .encoding = encoding_of(p.format)};
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>((p.rows * tiles * 32 + kThreads - 1) / kThreads)),
      .block = dim3(kThreads),
      .stream = stream(ctx),
      .dependent = true};
  const DeviceGuard guard(device);
  visit_instance(QuantizeTypes{}, p.dtype, [&]<DType D>() {
    launch("dequantize", device, config,
           fp4 ? dequantize_kernel<cuda_t<D>, true> : dequantize_kernel<cuda_t<D>, false>, args);
  });
}

void global_scale(const GlobalScaleProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("global_scale", ctx);
  if (explained(ctx, "global_scale", [] { return std::string("cuda, one pass and a maximum by atomics"); }))
    return;
  const std::int64_t n = p.per_expert ? p.experts.num_experts : 1;
  const DeviceGuard guard(device);
  check(cudaMemsetAsync(p.out, 0, static_cast<std::size_t>(n) * sizeof(float), stream(ctx)), "global_scale",
        "clear the scales");
  AmaxLaunch l{.dtype = p.dtype,
               .device = device,
               .stream = stream(ctx),
               .args = make_quantize_args({.x = p.x,
                                           .dtype = p.dtype,
                                           .x_stride = p.x_stride,
                                           .rows = p.rows,
                                           .cols = p.cols,
                                           .out_rows = p.rows,
                                           .experts = p.experts}),
               .amax = reinterpret_cast<std::uint32_t*>(p.out),
               .per_expert = p.per_expert};
  set_tiles(l.args, p.cols);
  launch_amax_plain(l);
  finish_scales("global_scale", device, stream(ctx), p.out, n, true, 0.0f, std::numeric_limits<float>::max());
}

void convert_scales(const ConvertScalesProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("convert_scales", ctx);
  if (explained(ctx, "convert_scales", [] { return std::string("cuda, byte by byte"); })) return;
  const std::int64_t multiple = scale_row_multiple(p.dst.layout);
  const bool words = p.dst.layout != ScaleLayout::kLinear;
  const ConvertArgs args{.src = p.src,
                         .dst = p.dst,
                         .rows = p.rows,
                         .padded_rows = p.dst.layout == ScaleLayout::kColumnMajor
                                            ? p.dst.rows
                                            : (p.rows + multiple - 1) / multiple * multiple,
                         .padded_cols = words ? p.dst.words() * kScaleWord : p.dst.cols};
  const std::int64_t blocks = (args.padded_rows * args.padded_cols + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(
                                blocks, 32 * static_cast<std::int64_t>(device.num_sms)))),
                            .block = dim3(kThreads),
                            .stream = stream(ctx),
                            .dependent = true};
  launch("convert_scales", device, config, convert_scales_kernel, args);
}

}  // namespace moecore::cuda
