#pragma once
// The kernels of quantize; quantize.cuh has the words.
//
// quantize_tiles_kernel   formats whose scales cover at most 128 columns, and a known scale: a warp does
//                         kUnroll tiles of one task, a block's blocks (of 1, 2 or 8 lanes) share their
//                         magnitude by shuffles
// quantize_rows_kernel    one scale a row: a block does one task, and holds the row in registers (kUnits
// units
//                         a thread) from the search for its magnitude to its codes; kUnits = 0 reads it again
// amax_kernel             the largest magnitude of everything, or of every expert
//
// A task is a row of the output, or a token whose codes go to all its rows.

#include "core/table.h"
#include "cuda/device/ptx.cuh"
#include "cuda/quantize.cuh"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

constexpr unsigned kWarp = 0xFFFFFFFF;
constexpr int kMaxTileThreads = 256;

/// Blocks of kMaxTileThreads that registers must leave room for: the loads of many warps hide what a unit
/// waits for.
template <class T>
constexpr int tile_blocks_per_sm(bool activated, int unroll) {
  return sizeof(T) == 4 || activated ? 3 : unroll == 2 ? 4 : 6;
}

/// Zeroes rows [begin, end) of words [word, word + kPaddingWords) of one swizzled block of scales.
__device__ inline void zero_scale_rows(const ScaleRef& scales, std::int64_t base, std::int64_t begin,
                                       std::int64_t end, std::int64_t word) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t last = min(word + kPaddingWords, scales.words());
  for (; word < last; ++word) {
    if (scales.layout == ScaleLayout::kSwizzled128x4) {
      // A lane's 16 bytes are the words of rows lane, lane + 32, lane + 64 and lane + 96.
      for (std::int64_t row = begin / 128 * 128 + lane; row < end; row += 128) {
        auto* four =
            reinterpret_cast<std::uint32_t*>(scales.data + scale_byte(scales, base, row, word * kScaleWord));
        if (row >= begin && row + 96 < end && reinterpret_cast<std::uintptr_t>(four) % 16 == 0) {
          *reinterpret_cast<uint4*>(four) = uint4{};
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (row + 32 * i >= begin && row + 32 * i < end) four[i] = 0;
        }
      }
    } else {
      for (std::int64_t row = begin + lane; row < end; row += 32)
        *reinterpret_cast<std::uint32_t*>(scales.data + scale_byte(scales, base, row, word * kScaleWord)) = 0;
    }
  }
}

/// The share of warp `warp` of the scales that belong to no row.
__device__ inline void zero_padding(const ScaleRef& scales, const ExpertRowsRef& experts, std::int64_t rows,
                                    std::int64_t warp) {
  if (scales.layout == ScaleLayout::kColumnMajor) {
    const std::int64_t column = warp * 32 + threadIdx.x % 32;
    if (column >= (scales.bytes == 4 ? scales.cols : scales.words())) return;
    auto* word = reinterpret_cast<std::uint32_t*>(scales.data + column * scales.pitch);
    for (std::int64_t row = rows; row < scales.rows; ++row) word[row] = 0;
    return;
  }
  const std::int64_t groups = (scales.words() + kPaddingWords - 1) / kPaddingWords;
  const std::int64_t e = warp / groups, word = warp % groups * kPaddingWords;
  if (experts.row_counts) {
    if (e >= experts.num_experts) return;
    const std::int64_t padded = group_scale_rows(experts, scales.layout);
    const std::int64_t count =
        min(experts.group_rows, static_cast<std::int64_t>(max(0, experts.row_counts[e])));
    zero_scale_rows(scales, e * padded, count, padded, word);
  } else if (experts.scale_offsets) {
    if (e >= experts.num_experts) return;
    const std::int64_t base = experts.scale_offsets[e];
    zero_scale_rows(scales, base, experts.expert_offsets[e + 1] - experts.expert_offsets[e],
                    experts.scale_offsets[e + 1] - base, word);
  } else if (e == 0) {
    const std::int64_t multiple = scale_row_multiple(scales.layout);
    zero_scale_rows(scales, 0, rows, (rows + multiple - 1) / multiple * multiple, word);
  }
}

/// What a lane has made of its units of a task.
template <int kUnroll>
struct Units {
  Codes codes[kUnroll];
  std::uint32_t scale[kUnroll];
};

template <Encoding kEncoding, int kUnroll>
__device__ __forceinline__ void store_units(const QuantizeArgs& args, const Units<kUnroll>& units, int first,
                                            std::int64_t row, std::int64_t scales) {
  constexpr int kLanes = units_of_block(kEncoding);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int column = first + u * kTile, block = column / (kUnit * kLanes);
    store_unit<is_fp4(kEncoding)>(args, row, column, units.codes[u]);
    if (kEncoding != Encoding::kTensor && threadIdx.x % kLanes == 0 && block < args.stored_blocks)
      store_scale(args, scales, block, column < args.cols ? units.scale[u] : 0u);
  }
}

template <class T, Encoding kEncoding, bool kActivated, int kUnroll>
__global__ void __launch_bounds__(kMaxTileThreads)
    quantize_tiles_kernel(const __grid_constant__ QuantizeArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned warps = blockDim.x / 32, warp_of_block = threadIdx.x / 32;
  if (blockIdx.x >= args.tile_blocks) {
    zero_padding(args.scales, args.experts, args.rows,
                 static_cast<std::int64_t>(blockIdx.x - args.tile_blocks) * warps + warp_of_block);
    return;
  }
  const unsigned warp = blockIdx.x * warps + warp_of_block;
  const unsigned task = args.by_tiles.divide(warp);
  const int first = static_cast<int>(warp - task * args.tiles) * kTile * kUnroll + lane * kUnit;
  const bool by_token = args.slot_row != nullptr;
  if (task >= args.num_tasks) return;
  const std::int64_t num_rows = live_rows(args.experts, args.rows);
  if (!by_token && (task >= num_rows || !row_is_live(args.experts, task))) return;

  Unit<T> v[kUnroll];
  const std::int64_t source = args.row_token ? args.row_token[task] : task;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) load_source<T, kActivated>(args, source, first + u * kTile, v[u]);

  Place place;
  float global = 1.0f, factor = 0.0f;
  if (!by_token) place = place_of_warp_row(args, task);
  if (kEncoding == Encoding::kNvfp4 && args.global_scale)
    global = args.global_scale[args.global_scale_per_expert ? place.expert : 0];
  const float rcp_global = kEncoding == Encoding::kNvfp4 ? __frcp_rn(global) : 1.0f;
  if (kEncoding == Encoding::kTensor) factor = reciprocal(*reinterpret_cast<const float*>(args.scales.data));

  Units<kUnroll> units;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    bool has_nan = true;
    if constexpr (kEncoding != Encoding::kTensor) {
      float amax = unit_amax(v[u], has_nan);
#pragma unroll
      for (int distance = 1; distance < units_of_block(kEncoding); distance *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(kWarp, amax, distance));
      const BlockScale scale =
          block_scale<kEncoding>(args.rule, amax, global, rcp_global, args.scales.bytes == 4);
      units.scale[u] = scale.bits;
      factor = scale.factor;
    }
    units.codes[u] = encode_unit<is_fp4(kEncoding)>(v[u], factor, args.cols - (first + u * kTile),
                                                    !has_nan && factor <= std::numeric_limits<float>::max());
  }

  if (!by_token) return store_units<kEncoding>(args, units, first, task, place.scales);
  // Every lane finds the place of one of the token's rows; then all lanes write to each.
  for (int j = 0; j < args.top_k; j += 32) {
    std::int64_t row =
        j + lane < args.top_k ? args.slot_row[static_cast<std::int64_t>(task) * args.top_k + j + lane] : -1;
    const bool live = row >= 0 && row < num_rows;
    if (live) place = place_of(args.experts, args.scales, false, row, search_expert);
    for (unsigned left = __ballot_sync(kWarp, live); left != 0; left &= left - 1) {
      const int slot = __ffs(static_cast<int>(left)) - 1;
      store_units<kEncoding>(args, units, first, __shfl_sync(kWarp, row, slot),
                             __shfl_sync(kWarp, place.scales, slot));
    }
  }
}

/// The largest of one value of every thread of the block, none negative, as bits.
__device__ inline std::uint32_t block_max(std::uint32_t value) {
  __shared__ std::uint32_t of_warp[kRowThreads / 32];
  value = __reduce_max_sync(kWarp, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  return __reduce_max_sync(kWarp, lane < blockDim.x / 32 ? of_warp[lane] : 0u);
}

/// The bits of a magnitude, 0 for NaN: ordered like the magnitudes.
__device__ __forceinline__ std::uint32_t magnitude_bits(float amax) {
  return amax >= 0.0f ? __float_as_uint(amax) : 0u;
}

template <class T, bool kActivated, int kUnits>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t task = blockIdx.x;
  const bool by_token = args.slot_row != nullptr;
  const std::int64_t num_rows = live_rows(args.experts, args.rows);
  if (!by_token && (task >= num_rows || !row_is_live(args.experts, task))) return;
  const std::int64_t source = args.row_token ? args.row_token[task] : task;
  const int step = static_cast<int>(blockDim.x) * kUnit, first = static_cast<int>(threadIdx.x) * kUnit;

  constexpr int kHeld = kUnits > 0 ? kUnits : 1;
  Unit<T> v[kHeld];
  float amax = 0.0f;
  bool has_nan;  // not of interest: e4m3 has a code for it
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) load_source<T, kActivated>(args, source, first + u * step, v[u]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) amax = fmaxf(amax, unit_amax(v[u], has_nan));
  } else {
    for (int column = first; column < args.cols; column += step) {
      load_source<T, kActivated>(args, source, column, v[0]);
      amax = fmaxf(amax, unit_amax(v[0], has_nan));
    }
  }
  const BlockScale scale = block_scale<Encoding::kToken>(
      args.rule, __uint_as_float(block_max(magnitude_bits(amax))), 1.0f, 1.0f, true);

  // Calls write(row) for every row of the task.
  auto for_rows = [&](auto&& write) {
    if (!by_token) return write(task);
    for (int j = 0; j < args.top_k; ++j)
      if (const std::int64_t row = __ldg(args.slot_row + task * args.top_k + j); row >= 0 && row < num_rows)
        write(row);
  };
  auto encode = [&](const Unit<T>& values, int column) {
    const Codes codes = encode_unit<false>(values, scale.factor, args.cols - column, false);
    for_rows([&](std::int64_t row) { store_unit<false>(args, row, column, codes); });
  };
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) encode(v[u], first + u * step);
  } else {
    for (int column = first; column < args.padded_cols; column += step) {
      load_source<T, kActivated>(args, source, column, v[0]);
      encode(v[0], column);
    }
  }
  if (threadIdx.x == 0)
    for_rows([&](std::int64_t row) { store_scale(args, row * args.scales.pitch, 0, scale.bits); });
}

/// Warp w takes the tiles from w * share on, and hands in its maximum where the expert changes and at the
/// end.
template <class T, bool kActivated>
__global__ void __launch_bounds__(kMaxTileThreads)
    amax_kernel(const __grid_constant__ QuantizeArgs args, std::uint32_t* amax, bool per_expert,
                unsigned share) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t num_rows = live_rows(args.experts, args.rows);
  const std::int64_t tiles = num_rows * args.tiles, end = min(tiles, (std::int64_t{warp} + 1) * share);
  float most = 0.0f;
  std::int64_t expert = 0;
  auto hand_in = [&] {
    const std::uint32_t bits = __reduce_max_sync(kWarp, magnitude_bits(most));
    if (lane == 0 && bits != 0) atomicMax(amax + expert, bits);
    most = 0.0f;
  };
  for (std::int64_t tile = std::int64_t{warp} * share; tile < end; ++tile) {
    const unsigned row = args.by_tiles.divide(static_cast<unsigned>(tile));
    if (!row_is_live(args.experts, row)) continue;
    if (per_expert) {
      const std::int64_t next =
          args.experts.row_counts ? row / args.experts.group_rows : search_expert(args.experts, row);
      if (next != expert) hand_in();
      expert = next;
    }
    Unit<T> v;
    bool has_nan;
    load_source<T, kActivated>(
        args, row, static_cast<int>(tile - std::int64_t{row} * args.tiles) * kTile + lane * kUnit, v);
    most = fmaxf(most, unit_amax(v, has_nan));
  }
  hand_in();
}

template <class T, bool kActivated>
void launch_quantize(const QuantizeLaunch& l) {
  LaunchConfig config{.block = dim3(l.policy.threads), .stream = l.stream, .dependent = true};
  if (l.encoding == Encoding::kToken) {
    config.grid = dim3(static_cast<unsigned>(l.args.num_tasks));
    switch (l.policy.unroll) {
      case 1:
        return launch("quantize", l.device, config, quantize_rows_kernel<T, kActivated, 1>, l.args);
      case 2:
        return launch("quantize", l.device, config, quantize_rows_kernel<T, kActivated, 2>, l.args);
      case 4:
        return launch("quantize", l.device, config, quantize_rows_kernel<T, kActivated, 4>, l.args);
      default:
        return launch("quantize", l.device, config, quantize_rows_kernel<T, kActivated, 0>, l.args);
    }
  }
  config.grid = dim3(l.args.tile_blocks + l.padding_blocks);
  auto run = [&]<Encoding kEncoding>() {
    if constexpr (!kActivated)
      if (l.policy.unroll == 2)
        return launch("quantize", l.device, config, quantize_tiles_kernel<T, kEncoding, false, 2>, l.args);
    launch("quantize", l.device, config, quantize_tiles_kernel<T, kEncoding, kActivated, 1>, l.args);
  };
  switch (l.encoding) {
    case Encoding::kTensor:
      return run.template operator()<Encoding::kTensor>();
    case Encoding::kBlock128:
      return run.template operator()<Encoding::kBlock128>();
    case Encoding::kNvfp4:
      return run.template operator()<Encoding::kNvfp4>();
    case Encoding::kMxfp8:
      return run.template operator()<Encoding::kMxfp8>();
    default:
      return run.template operator()<Encoding::kMxfp4>();
  }
}

template <bool kActivated>
void launch_quantize(const QuantizeLaunch& l) {
  visit_instance(QuantizeTypes{}, l.dtype, [&]<DType D>() { launch_quantize<cuda_t<D>, kActivated>(l); });
}

template <bool kActivated>
void launch_amax(const AmaxLaunch& l) {
  const std::int64_t tiles = l.args.rows * l.args.tiles;
  if (tiles == 0) return;
  constexpr int kThreads = 256, kWarpsPerBlock = kThreads / 32, kBlocksPerSm = 6;
  const std::int64_t warps = static_cast<std::int64_t>(l.device.num_sms) * kBlocksPerSm * kWarpsPerBlock;
  const std::int64_t share = (tiles + warps - 1) / warps, used = (tiles + share - 1) / share;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>((used + kWarpsPerBlock - 1) / kWarpsPerBlock)),
                            .block = dim3(kThreads),
                            .stream = l.stream,
                            .dependent = true};
  visit_instance(QuantizeTypes{}, l.dtype, [&]<DType D>() {
    launch("quantize", l.device, config, amax_kernel<cuda_t<D>, kActivated>, l.args, l.amax, l.per_expert,
           static_cast<unsigned>(share));
  });
}

}  // namespace
}  // namespace moecore::cuda
