#pragma once
// The kernels of quantize; quantize.cuh has the words.
//
// quantize_tiles_kernel   formats whose scales cover at most 128 columns, and a known scale: block (b, c)
//                         does part c of some tasks, one after the other, a thread kUnroll units of it, the
//                         512 columns of a warp apart. The 1, 2 or 8 lanes whose units share a scale find its
//                         magnitude by shuffles.
// quantize_rows_kernel    one scale a row: a block does one task, and holds the row in registers (kUnits
//                         units a thread) from the search for its magnitude to its codes; kUnits = 0 reads it
//                         again
// amax_kernel             the largest magnitude of everything, or of every expert; a warp does 512 columns at
//                         a time
//
// A task is a row of the output, or a token whose codes go to all its rows.

#include "core/table.h"
#include "cuda/device/ptx.cuh"
#include "cuda/quantize.cuh"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

constexpr unsigned kWarp = 0xFFFFFFFF;
constexpr int kAmaxThreads = 256;

/// Zeroes rows [begin, end) of words [word, word + kPaddingWords) of one swizzled block of scales.
__device__ inline void zero_scale_rows(const ScaleRef& scales, std::int64_t base, int begin, int end,
                                       int word) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int words = min(kPaddingWords, static_cast<int>(scales.words()) - word);
  if (scales.layout == ScaleLayout::kSwizzled128x4) {
    // A lane's 16 bytes are the words of rows lane, lane + 32, lane + 64 and lane + 96 of a tile.
    for (int row = begin / 128 * 128 + lane; row < end; row += 128) {
      std::byte* to = scales.data + scale_byte(scales, base, row, word * kScaleWord);
      const bool all =
          row >= begin && row + 96 < end && reinterpret_cast<std::uintptr_t>(to) % sizeof(uint4) == 0;
      for (int w = 0; w < words; ++w, to += 512) {
        if (all) {
          *reinterpret_cast<uint4*>(to) = uint4{};
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (row + 32 * i >= begin && row + 32 * i < end) reinterpret_cast<std::uint32_t*>(to)[i] = 0;
        }
      }
    }
  } else {
    for (int row = begin + lane; row < end; row += 32) {
      std::byte* to = scales.data + scale_byte(scales, base, row, word * kScaleWord);
      for (int w = 0; w < words; ++w, to += 32) *reinterpret_cast<std::uint32_t*>(to) = 0;
    }
  }
}

/// The share of warp `warp` of the scales that belong to no row.
__device__ inline void zero_padding(const QuantizeArgs& args, unsigned warp) {
  const ScaleRef& scales = args.scales;
  const ExpertRowsRef& experts = args.experts;
  if (scales.layout == ScaleLayout::kColumnMajor) {
    const std::int64_t column = std::int64_t{warp} * 32 + threadIdx.x % 32;
    if (column >= (scales.bytes == 4 ? scales.cols : scales.words())) return;
    auto* word = reinterpret_cast<std::uint32_t*>(scales.data + column * scales.pitch);
    for (std::int64_t row = args.rows; row < scales.rows; ++row) word[row] = 0;
    return;
  }
  const auto groups = static_cast<unsigned>((scales.words() + kPaddingWords - 1) / kPaddingWords);
  const unsigned e = warp / groups;
  const auto word = static_cast<int>(warp % groups) * kPaddingWords;
  if (e >= max(experts.num_experts, std::int64_t{1})) return;
  std::int64_t base = 0;  // of the block of scales, whose rows from `begin` to `end` belong to none
  int begin, end;
  if (experts.row_counts) {
    end = static_cast<int>(group_scale_rows(experts, scales.layout));
    begin = min(static_cast<int>(experts.group_rows), max(0, experts.row_counts[e]));
    base = std::int64_t{e} * end;
  } else if (experts.scale_offsets) {
    begin = experts.expert_offsets[e + 1] - experts.expert_offsets[e];
    const int first = args.map.inside(experts.scale_offsets[e], begin);
    end = min(experts.scale_offsets[e + 1] - first, args.map.whole_tiles(args.map.room - first));
    base = first;
  } else {
    const auto multiple = static_cast<int>(scale_row_multiple(scales.layout));
    begin = static_cast<int>(args.rows);
    end = (begin + multiple - 1) / multiple * multiple;
  }
  zero_scale_rows(scales, base, begin, end, word);
}

/// What a thread has made of its units of a task.
template <int kUnroll>
struct Units {
  Codes codes[kUnroll];
  std::uint32_t scale[kUnroll];
};

/// Where a thread's units stand in every row: kTile columns apart, as a warp's tiles follow each other.
template <Encoding kEncoding, int kUnroll>
struct Columns {
  static constexpr int kBlocksPerTile = kTile / kUnit / units_of_block(kEncoding);
  int first;
  int stored;          // blocks from the first unit's on that have scales; 0: they are another lane's
  std::int64_t scale;  // bytes from where a row's scales begin to the first unit's

  __device__ __forceinline__ explicit Columns(const QuantizeArgs& args) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) - lane;
    first = (warp * kUnroll + lane) * kUnit;
    const int block = first / kUnit / units_of_block(kEncoding);
    const bool mine = kEncoding != Encoding::kTensor && lane % units_of_block(kEncoding) == 0;
    stored = mine ? args.stored_blocks - block : 0;
    scale = args.map.of_block(block);
  }
  __device__ __forceinline__ int of(int u) const { return first + u * kTile; }
  __device__ __forceinline__ bool has_scale(int u) const { return stored > u * kBlocksPerTile; }
};

/// Clears the codes behind the last column, and the scales that have no column before it.
template <Encoding kEncoding, bool kWhole, int kUnroll>
__device__ __forceinline__ void clear_behind(const QuantizeArgs& args,
                                             const Columns<kEncoding, kUnroll>& columns,
                                             Units<kUnroll>& units) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int n = args.cols - columns.of(u);
    if (n < kUnit) clear_behind<is_fp4(kEncoding)>(kWhole ? 0 : n, units.codes[u]);
    if (n <= 0) units.scale[u] = 0;
  }
}

template <Encoding kEncoding, bool kWhole, int kUnroll>
__device__ __forceinline__ void store_units(const QuantizeArgs& args, const Units<kUnroll>& units,
                                            const Columns<kEncoding, kUnroll>& columns, int row,
                                            std::byte* scales) {
  constexpr bool kFp4 = is_fp4(kEncoding);
  const bool words = kEncoding == Encoding::kBlock128 && args.scales.bytes == 4;
  std::uint8_t* to =
      args.data + static_cast<unsigned>(row) * args.data_pitch + columns.first / (kFp4 ? 2 : 1);
  scales += columns.scale;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    store_unit<kFp4, kWhole>(args, to + u * kTile / (kFp4 ? 2 : 1), args.padded_cols - columns.of(u),
                             units.codes[u]);
    if (columns.has_scale(u))
      store_scale(scales + u * (columns.kBlocksPerTile / kScaleWord) * args.map.four, words, units.scale[u]);
  }
}

/// nvfp4's factor of a tensor or expert.
struct Global {
  float value = 1.0f, reciprocal = 1.0f;

  __device__ __forceinline__ void load(const float* from) {
    value = *from;
    reciprocal = __frcp_rn(value);
  }
};

/// The codes and the scale of a unit, `n` of whose columns exist; the lanes of a block hold it together.
template <Encoding kEncoding, bool kWhole, class T>
__device__ __forceinline__ void quantize_unit(const QuantizeArgs& args, const Unit<T>& v, int n,
                                              const Global& global, Codes& codes, std::uint32_t& bits) {
  constexpr int kLanes = units_of_block(kEncoding);
  auto over_block = [](float amax, unsigned lanes, auto&& larger) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2)
      amax = larger(amax, __shfl_xor_sync(lanes, amax, distance));
    return amax;
  };
  float amax = amax_or_nan(v);
  if (kWhole && kLanes > 1 && n <= 0) amax = 0.0f;  // whole units that do not exist hold others of the row
  amax = over_block(amax, kWarp, [](float a, float b) { return dev::max_or_nan(a, b); });
  BlockScale scale;
  const bool f32_scales = kEncoding == Encoding::kBlock128 && args.scales.bytes == 4;
  const bool tame =
      tame_scale<kEncoding>(args.rule, amax, global.value, global.reciprocal, f32_scales, scale);
  const unsigned others = kLanes > 1 ? __ballot_sync(kWarp, !tame) : 0u;  // blocks go one way as a whole
  codes = Codes{};
  if (tame) {
    if constexpr (has_tame_codes<kEncoding, T>()) encode_tame<kEncoding>(v, scale.factor, codes);
  } else {
    amax = n > 0 ? amax_beside_nan(v) : __uint_as_float(0x7FC00000u);
    amax = over_block(amax, others, [](float a, float b) { return fmaxf(a, b); });
    scale = block_scale<kEncoding>(args.rule, amax, global.value, global.reciprocal, f32_scales);
    if constexpr (has_tame_codes<kEncoding, T>()) encode_any<kEncoding>(v, scale.factor, codes);
  }
  if constexpr (!has_tame_codes<kEncoding, T>()) encode_any<kEncoding>(v, scale.factor, codes);
  bits = scale.bits;
}

/// The expert of a block's row and what all its rows share. Rows of experts come in order, so that it is
/// looked up for the first row of a block and where an expert ends.
struct Owner {
  int first = 0;                               // its first row, where its scales begin with it
  int end = std::numeric_limits<int>::max();   // the row that needs the next look-up
  int live = std::numeric_limits<int>::max();  // the row behind the last that exists
  int scale_row = 0;                           // where its scales begin
  std::byte* scales;
  Global global;

  __device__ __forceinline__ explicit Owner(const QuantizeArgs& args) : scales(args.scales.data) {}

  /// Asks for what tells about the expert of `row`. Only who reads it waits for it.
  __device__ __forceinline__ void find(const QuantizeArgs& args, int row) {
    const ExpertRowsRef& experts = args.experts;
    int expert;
    if (args.tasks == Tasks::kExpertGroups) {
      const auto group_rows = static_cast<int>(experts.group_rows);
      expert = static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(group_rows));
      end = (expert + 1) * group_rows;
      live = min(end, expert * group_rows + experts.row_counts[expert]);
      if (is_swizzled(args.scales.layout)) {
        first = expert * group_rows;
        scale_row = expert * static_cast<int>(group_scale_rows(experts, args.scales.layout));
      }
    } else {
      expert = args.lookup == static_cast<int>(ExpertLookup::kCount) ? count_experts(experts, row)
                                                                     : search_expert(experts, row);
      if (expert >= static_cast<int>(experts.num_experts)) {  // behind the last expert, as all that follow
        live = 0, end = std::numeric_limits<int>::max();
        return;
      }
      end = __ldg(experts.expert_offsets + 1 + expert);
      if (experts.scale_offsets) {
        first = __ldg(experts.expert_offsets + expert);
        scale_row = __ldg(experts.scale_offsets + expert);
      }
    }
    if (args.global_scale_per_expert) global.value = __ldg(args.global_scale + expert);
  }

  /// Works out what find() has asked for.
  __device__ __forceinline__ void settle(const QuantizeArgs& args) {
    scales = args.scales.data + args.map.inside(scale_row, end - first) * args.map.base;
    if (args.global_scale_per_expert) global.reciprocal = __frcp_rn(global.value);
  }
};

/// Asks for the units of a row that load_source() will load.
template <class T, Source kSource, Encoding kEncoding, int kUnroll>
__device__ __forceinline__ void prefetch_source(const QuantizeArgs& args, std::int64_t row,
                                                const Columns<kEncoding, kUnroll>& columns) {
  const bool interleaved = kSource == Source::kActivation && args.order == GateOrder::kInterleaved;
  const bool halves = kSource == Source::kSiluAndMul ||
                      (kSource == Source::kActivation && !interleaved && args.order != GateOrder::kPlain);
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int column = columns.of(u);
    if (column >= args.cols) break;
    dev::prefetch(x + (interleaved ? 2 * column : column));
    if (halves) dev::prefetch(x + args.cols + column);
  }
}

/// Of a token, the row that slot `first` + lane owns; -1 for none.
__device__ __forceinline__ int row_of_slot(const QuantizeArgs& args, int token, int first) {
  const int slot = first + static_cast<int>(threadIdx.x) % 32;
  return slot < args.top_k ? args.slot_row[std::int64_t{token} * args.top_k + slot] : -1;
}

/// One task: a row, whose scales begin at `scales`, or a token and all its rows, of which the caller has read
/// the first 32: row_of_slot(args, task, 0). kPermuted: it may be a token. Calls spent(u) once it needs v[u]
/// no more.
template <class T, Encoding kEncoding, Source kSource, bool kWhole, bool kPermuted, int kUnroll, class Spent>
__device__ __forceinline__ void quantize_task(const QuantizeArgs& args,
                                              const Columns<kEncoding, kUnroll>& columns,
                                              const Unit<T> (&v)[kUnroll], const Global& global, int task,
                                              std::byte* scales, int row, std::int64_t num_rows,
                                              Spent&& spent) {
  Units<kUnroll> units;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int n = args.cols - columns.of(u);
    if constexpr (kEncoding == Encoding::kTensor)
      encode_any<kEncoding>(v[u], global.reciprocal, units.codes[u]);
    else
      quantize_unit<kEncoding, kWhole>(args, v[u], n, global, units.codes[u], units.scale[u]);
    spent(u);
  }
  if (args.cols - columns.of(kUnroll - 1) < kUnit) [[unlikely]]
    clear_behind<kEncoding, kWhole>(args, columns, units);

  if constexpr (kPermuted) {
    if (args.tasks == Tasks::kTokens) {
      // Every lane finds the place of one of the token's rows; then all lanes write to each.
      for (int j = 0; j < args.top_k; j += 32) {
        if (j > 0) row = row_of_slot(args, task, j);
        const bool live = row >= 0 && row < num_rows;
        Place place;
        if (live) place = place_of(args.experts, args.map, args.scales.layout, false, row);
        for (unsigned left = __ballot_sync(kWarp, live); left != 0; left &= left - 1) {
          const int slot = __ffs(static_cast<int>(left)) - 1;
          store_units<kEncoding, kWhole>(args, units, columns, __shfl_sync(kWarp, row, slot),
                                         args.scales.data + __shfl_sync(kWarp, place.scales, slot));
        }
      }
      return;
    }
  }
  store_units<kEncoding, kWhole>(args, units, columns, task, scales);
}

/// Blocks of kMaxTileThreads that registers leave room for.
template <class T>
constexpr int tile_blocks_per_sm(bool whole, int unroll) {
  return !whole || sizeof(T) == 4 ? 1 : unroll == 1 ? 5 : 4;
}

/// kWhole: rows of whole units, all of them aligned. kPermuted: there may be args.row_token or slot_row;
/// without, a task is the row of x and of the output with its number.
template <class T, Encoding kEncoding, Source kSource, bool kWhole, int kUnroll, bool kPermuted>
__global__ void __launch_bounds__(kMaxTileThreads, tile_blocks_per_sm<T>(kWhole, kUnroll))
    quantize_tiles_kernel(const __grid_constant__ QuantizeArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  if (blockIdx.x < args.padding_blocks)
    return zero_padding(args, (blockIdx.x * gridDim.y + blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32);
  const Columns<kEncoding, kUnroll> columns(args);
  const auto begin = static_cast<std::int64_t>(blockIdx.x - args.padding_blocks) * args.tasks_of_block;
  auto end = static_cast<int>(min(begin + args.tasks_of_block, std::int64_t{args.num_tasks}));
  std::int64_t num_rows = 0;
  Owner owner(args);
  if (kPermuted && args.tasks == Tasks::kTokens)
    num_rows = live_rows(args.experts, args.rows);
  else if (args.tasks == Tasks::kRows)
    end = static_cast<int>(min(std::int64_t{end}, live_rows(args.experts, args.rows)));
  else
    owner.end = static_cast<int>(begin);
  if (kEncoding == Encoding::kNvfp4 && args.global_scale && !args.global_scale_per_expert)
    owner.global.load(args.global_scale);
  if (kEncoding == Encoding::kTensor)
    owner.global.reciprocal = reciprocal(*reinterpret_cast<const float*>(args.scales.data));
  // Beside the look-up of its expert: 512 nvfp4 rows of 128 experts 5.3 -> 4.7 us on an H200. To prefetch the
  // next row as well makes long calls up to 10 % slower.
  if (owner.end <= begin && begin < end && !(kPermuted && args.row_token))
    prefetch_source<T, kSource>(args, begin, columns);
  constexpr bool kAhead = kUnroll > 1 && !kPermuted;
  Unit<T> v[kUnroll];
  bool another;
  int stop = end;  // where the rows of one expert end that follow each other
  auto load = [&](int task) {
    const int source = kPermuted && args.row_token ? args.row_token[task] : task;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load_source<T, kSource, kWhole>(args, source, columns.of(u), v[u]);
    if (!another) return;
    owner.settle(args);  // with the row on its way
    stop = min(end, min(owner.end, owner.live));
    another = false;
  };
#pragma unroll 1
  for (int task = static_cast<int>(begin); task < end;) {
    another = task >= owner.end;
    if (another) owner.find(args, task);
    if (task >= owner.live) {
      task = owner.end;
      continue;
    }
    if (kAhead) load(task);
    const T* x = static_cast<const T*>(args.x) + static_cast<unsigned>(task) * args.x_stride + columns.first;
    bool more;
#pragma unroll 1
    do {
      const int row = kPermuted && args.tasks == Tasks::kTokens ? row_of_slot(args, task, 0) : 0;
      if (!kAhead) load(task);
      more = task + 1 < stop;
      x += args.x_stride;
      // A unit's registers take the next row's as soon as this row needs them no more, so that it is on its
      // way while the other units are worked on.
      quantize_task<T, kEncoding, kSource, kWhole, kPermuted>(
          args, columns, v, owner.global, task, owner.scales + args.map.of_row(task - owner.first), row,
          num_rows, [&](int u) {
            if (kAhead && more && columns.of(u) < args.cols)
              load_unit<true>(x + u * kTile, kUnit, true, v[u]);
          });
      ++task;
    } while (more);
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

template <class T, Source kSource, int kUnits>
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
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) load_source<T, kSource>(args, source, first + u * step, v[u]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) amax = fmaxf(amax, unit_amax(v[u]));
  } else {
    for (int column = first; column < args.cols; column += step) {
      load_source<T, kSource>(args, source, column, v[0]);
      amax = fmaxf(amax, unit_amax(v[0]));
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
    const int n = args.padded_cols - column;
    if (n <= 0) return;
    Codes codes;
    encode_any<Encoding::kToken>(values, scale.factor, codes);
    if (column + kUnit > args.cols) clear_behind<false>(args.cols - column, codes);
    for_rows([&](std::int64_t row) {
      store_unit<false>(args, args.data + row * args.data_pitch + column, n, codes);
    });
  };
  if constexpr (kUnits > 0) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) encode(v[u], first + u * step);
  } else {
    for (int column = first; column < args.padded_cols; column += step) {
      load_source<T, kSource>(args, source, column, v[0]);
      encode(v[0], column);
    }
  }
  if (threadIdx.x == 0)
    for_rows(
        [&](std::int64_t row) { store_scale(args.scales.data + row * args.scales.pitch, true, scale.bits); });
}

/// Warp w takes the tiles from w * share on, and hands in its maximum where the expert changes and at the
/// end.
template <class T, Source kSource>
__global__ void __launch_bounds__(kAmaxThreads)
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
    load_source<T, kSource>(
        args, row, static_cast<int>(tile - std::int64_t{row} * args.tiles) * kTile + lane * kUnit, v);
    most = fmaxf(most, unit_amax(v));
  }
  hand_in();
}

template <class T, Source kSource>
void launch_rows(const QuantizeLaunch& l, LaunchConfig config) {
  config.grid = dim3(static_cast<unsigned>(l.args.num_tasks));
  switch (l.policy.unroll) {
    case 1:
      return launch("quantize", l.device, config, quantize_rows_kernel<T, kSource, 1>, l.args);
    case 2:
      return launch("quantize", l.device, config, quantize_rows_kernel<T, kSource, 2>, l.args);
    case 4:
      return launch("quantize", l.device, config, quantize_rows_kernel<T, kSource, 4>, l.args);
    default:
      return launch("quantize", l.device, config, quantize_rows_kernel<T, kSource, 0>, l.args);
  }
}

template <class T, Source kSource>
void launch_quantize(const QuantizeLaunch& l) {
  LaunchConfig config{.block = dim3(l.policy.threads), .stream = l.stream, .dependent = true};
  if (l.encoding == Encoding::kToken) return launch_rows<T, kSource>(l, config);
  config.grid = dim3(l.blocks, l.row_parts);
  // Rows that an activation computes are never permuted.
  constexpr bool kPermuted = kSource == Source::kRows;
  auto run = [&]<Encoding kEncoding>() {
    if constexpr (kSource == Source::kRows)
      if (l.policy.unroll == 2)
        return launch("quantize", l.device, config,
                      l.args.row_token || l.args.slot_row
                          ? quantize_tiles_kernel<T, kEncoding, kSource, true, 2, true>
                          : quantize_tiles_kernel<T, kEncoding, kSource, true, 2, false>,
                      l.args);
    if constexpr (kSource != Source::kActivation)
      if (l.whole_units)
        return launch("quantize", l.device, config,
                      quantize_tiles_kernel<T, kEncoding, kSource, true, 1, kPermuted>, l.args);
    launch("quantize", l.device, config, quantize_tiles_kernel<T, kEncoding, kSource, false, 1, kPermuted>,
           l.args);
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

template <Source kSource>
void launch_quantize(const QuantizeLaunch& l) {
  visit_instance(QuantizeTypes{}, l.dtype, [&]<DType D>() { launch_quantize<cuda_t<D>, kSource>(l); });
}

template <Source kSource>
void launch_amax(const AmaxLaunch& l) {
  const std::int64_t tiles = l.args.rows * l.args.tiles;
  if (tiles == 0) return;
  constexpr int kWarpsPerBlock = kAmaxThreads / 32, kBlocksPerSm = 6;
  const std::int64_t warps = static_cast<std::int64_t>(l.device.num_sms) * kBlocksPerSm * kWarpsPerBlock;
  const std::int64_t share = (tiles + warps - 1) / warps, used = (tiles + share - 1) / share;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>((used + kWarpsPerBlock - 1) / kWarpsPerBlock)),
                            .block = dim3(kAmaxThreads),
                            .stream = l.stream,
                            .dependent = true};
  visit_instance(QuantizeTypes{}, l.dtype, [&]<DType D>() {
    launch("quantize", l.device, config, amax_kernel<cuda_t<D>, kSource>, l.args, l.amax, l.per_expert,
           static_cast<unsigned>(share));
  });
}

}  // namespace
}  // namespace moecore::cuda
