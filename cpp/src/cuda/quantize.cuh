#pragma once
// What the quantize kernels share: arguments, rows and where their scales stand, loads and stores of a unit
// of 16 columns. quantize_block.cuh has what becomes of a unit.
//
// A thread owns a *unit*: 16 columns of one row, 32 bytes of a 16-bit type, which become 16 bytes of e4m3 or
// 8 of e2m1. A block works on one row, so that everything about the row (its expert, its copies, where its
// scales stand) is uniform and costs its threads nothing.

#include <bit>
#include <cstdint>
#include <limits>

#include "cuda/activation.cuh"
#include "cuda/device/convert.cuh"
#include "cuda/device/division.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/quantize_block.cuh"
#include "cuda/quantize_policy.h"
#include "cuda/runtime.h"
#include "ops/quantize.h"

namespace moecore::cuda {

/// scale_byte() as shifts, masks and strides, without its branches: scales of a row lie in words of four,
/// rows in tiles of 2^tile_shift, and a tile's rows in groups of 32 or all, whose words are 4 bytes apart.
struct ScaleMap {
  std::int64_t four, one;  // from four scales of a row to the next four, and from one to the next
  std::int64_t tile;       // from one tile of rows to the next
  std::int64_t base;       // for each row that a block of scales starts at
  unsigned tile_shift;
  int room;                       // rows of scales that there are, in whole tiles
  unsigned row_bits, group_bits;  // of a row's number: which of its group's, and which group of its tile
  unsigned row;                   // from one row of a group to the next

  explicit ScaleMap(const ScaleRef& s)
      : four(scale_byte(s, 0, 0, kScaleWord)),
        one(scale_byte(s, 0, 0, 1)),
        tile(scale_byte(s, 0, scale_row_multiple(s.layout), 0)),
        base(is_swizzled(s.layout) ? s.words() * kScaleWord : 0),
        tile_shift(std::countr_zero(static_cast<unsigned>(scale_row_multiple(s.layout)))),
        room(whole_tiles(static_cast<int>(s.rows))),
        row_bits(s.layout == ScaleLayout::kSwizzled128x4 ? 31u : (1u << tile_shift) - 1),
        group_bits(s.layout == ScaleLayout::kSwizzled128x4 ? 96u : 0u),
        row(is_swizzled(s.layout) ? static_cast<unsigned>(scale_byte(s, 0, 1, 0)) : 0u) {}

  /// From the start of a block of scales to where those of its row `r` begin.
  __device__ __forceinline__ std::int64_t of_row(int r) const {
    const auto number = static_cast<unsigned>(r);
    const unsigned within = (number & row_bits) * row + (number & group_bits) / 32 * 4;
    return static_cast<std::int64_t>((number >> tile_shift) * static_cast<std::uint64_t>(tile) + within);
  }
  __device__ __forceinline__ std::int64_t of_block(int block) const {
    return block / 4 * four + block % 4 * one;
  }
  constexpr int whole_tiles(int rows) const { return rows >> tile_shift << tile_shift; }
  /// Where the scales of `rows` rows begin that should begin at `first`. The host cannot look at offsets on
  /// the device; those of a plan with another alignment lead to another expert's scales, never out of memory.
  __device__ __forceinline__ int inside(int first, int rows) const {
    return max(0, min(first, room - whole_tiles(rows + (1 << tile_shift) - 1)));
  }
};

/// What a task is, and what tells where its scales go.
enum class Tasks : int {
  kRows,          // rows whose place is their number
  kExpertRows,    // rows of experts that follow each other (expert_offsets)
  kExpertGroups,  // rows of experts with as much room each (row_counts)
  kTokens,        // tokens, whose codes go to all their rows
};

struct QuantizeArgs {
  const void* x;
  std::int64_t x_stride;
  int cols;
  std::uint8_t* data;
  std::int64_t data_pitch;
  int padded_cols;
  bool x_aligned, data_aligned;  // every unit starts where its vectors may
  ScaleRef scales;
  int stored_blocks;  // of a row: with scales in words, up to the end of the last word
  ScaleMap map;
  ScaleRule rule;
  const float* global_scale;
  bool global_scale_per_expert;
  ExpertRowsRef experts;
  std::int64_t rows;  // of the output
  Tasks tasks;
  int num_tasks;
  const std::int32_t* row_token;
  const std::int32_t* slot_row;  // of tokens
  int top_k;
  int lookup{};
  unsigned padding_blocks{};  // the first ones of the grid, which zero the padding of the scales
  int tasks_of_block{};
  int tiles{};  // amax: of a row
  dev::Divisor by_tiles{};
  GateOrder order{};
  ActivationKind kind{};
  ActivationParams activation{};
};

/// The arguments but for what depends on the policy.
QuantizeArgs make_quantize_args(const QuantizeProblem& p);

/// Words of a row of scales that one warp of the padding blocks zeroes.
inline constexpr int kPaddingWords = 8;

/// Warps that zeroing the padding of the scales takes.
inline std::int64_t padding_warps(const ScaleRef& scales, const ExpertRowsRef& experts, std::int64_t rows) {
  if (scales.layout == ScaleLayout::kColumnMajor)
    return rows < scales.rows ? ((scales.bytes == 4 ? scales.cols : scales.words()) + 31) / 32 : 0;
  if (!is_swizzled(scales.layout)) return 0;
  if (experts.num_experts == 0 && rows % scale_row_multiple(scales.layout) == 0) return 0;
  return std::max<std::int64_t>(1, experts.num_experts) *
         ((scales.words() + kPaddingWords - 1) / kPaddingWords);
}

/// Rows that exist: all, or those below the end of the last expert.
__device__ __forceinline__ std::int64_t live_rows(const ExpertRowsRef& experts, std::int64_t rows) {
  if (!experts.expert_offsets) return rows;
  return min(rows, static_cast<std::int64_t>(max(0, experts.expert_offsets[experts.num_experts])));
}
__device__ __forceinline__ bool row_is_live(const ExpertRowsRef& experts, std::int64_t row) {
  return !experts.row_counts || row % experts.group_rows < experts.row_counts[row / experts.group_rows];
}

__device__ __forceinline__ int search_expert(const ExpertRowsRef& experts, std::int64_t row) {
  int low = 0, high = static_cast<int>(experts.num_experts);  // the first expert that ends behind the row
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(experts.expert_offsets + 1 + middle) <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/// The same by all lanes of the warp, for one row.
__device__ __forceinline__ int count_experts(const ExpertRowsRef& experts, int row) {
  constexpr int kAtOnce = 8;
  const int num_experts = static_cast<int>(experts.num_experts), lane = static_cast<int>(threadIdx.x) % 32;
  int before = 0;
  for (int first = lane; first - lane < num_experts; first += 32 * kAtOnce) {
    int end[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int e = first + 32 * i;
      end[i] = e < num_experts ? __ldg(experts.expert_offsets + 1 + e) : std::numeric_limits<int>::max();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) before += __popc(__ballot_sync(0xFFFFFFFF, end[i] <= row));
  }
  return before;
}

/// A row's expert, and the byte where its scales begin.
struct Place {
  int expert = 0;
  std::int64_t scales = 0;
};

__device__ __forceinline__ std::int64_t group_scale_rows(const ExpertRowsRef& experts, ScaleLayout layout) {
  const std::int64_t multiple = scale_row_multiple(layout);
  return (experts.group_rows + multiple - 1) / multiple * multiple;
}

__device__ __forceinline__ Place place_of(const ExpertRowsRef& experts, const ScaleMap& map,
                                          ScaleLayout layout, bool expert_needed, std::int64_t row) {
  Place place;
  int base = 0, scale_row = static_cast<int>(row);
  if (experts.row_counts) {
    place.expert = static_cast<int>(row / experts.group_rows);
    if (is_swizzled(layout)) {
      base = static_cast<int>(place.expert * group_scale_rows(experts, layout));
      scale_row = static_cast<int>(row - place.expert * experts.group_rows);
    }
  } else if (experts.expert_offsets && (experts.scale_offsets || expert_needed)) {
    place.expert = search_expert(experts, row);
    if (experts.scale_offsets) {
      scale_row -= __ldg(experts.expert_offsets + place.expert);
      base = map.inside(__ldg(experts.scale_offsets + place.expert), scale_row + 1);
    }
  }
  place.scales = base * map.base + map.of_row(scale_row);
  return place;
}

/// 16 elements from `p`, of which the first `n` exist; the others are NaN, which no magnitude sees. kWhole:
/// all do.
template <bool kWhole, class T>
__device__ __forceinline__ void load_unit(const T* p, int n, bool aligned, Unit<T>& unit) {
  if (kWhole || (aligned && n >= kUnit)) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof unit) / 16; ++i)
      reinterpret_cast<uint4*>(unit.values)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      unit.values[e] = e < n ? p[e] : dev::from_f32<T>(__uint_as_float(0x7FC00000u));
  }
}

/// The activated columns, rounded where the unfused pair stores them.
template <class T, ActivationKind kKind>
__device__ __forceinline__ void activate_unit(const QuantizeArgs& args, const T* x, int column, int n,
                                              Unit<T>& unit) {
  const float absent = __uint_as_float(0x7FC00000u);
  if (args.order == GateOrder::kPlain) {
    load_unit<false>(x + column, n, args.x_aligned, unit);
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      unit.values[e] = dev::from_f32<T>(e < n ? activate_plain<kKind>(unit[e], args.activation) : absent);
    return;
  }
  Unit<T> gate, up;
  if (args.order == GateOrder::kInterleaved) {
    Unit<T> pairs[2];
    load_unit<false>(x + 2 * column, 2 * n, args.x_aligned, pairs[0]);
    load_unit<false>(x + 2 * column + kUnit, 2 * n - kUnit, args.x_aligned, pairs[1]);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      gate.values[e] = pairs[2 * e / kUnit].values[2 * e % kUnit];
      up.values[e] = pairs[2 * e / kUnit].values[2 * e % kUnit + 1];
    }
  } else {
    const bool gate_first = args.order == GateOrder::kGateUp;
    load_unit<false>(x + column + (gate_first ? 0 : args.cols), n, args.x_aligned, gate);
    load_unit<false>(x + column + (gate_first ? args.cols : 0), n, args.x_aligned, up);
  }
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
    const float value = activate_gated<kKind>(gate[e], up[e], args.activation);
    unit.values[e] = dev::from_f32<T>(e < n ? value : absent);
  }
}

/// The activations that no current model has in its experts: out of line, so that every kernel is not five
/// activations longer.
template <class T>
__device__ __noinline__ void activate_unit_rarely(const QuantizeArgs& args, const T* x, int column, int n,
                                                  Unit<T>& v) {
  using enum ActivationKind;
  switch (args.kind) {
    case kGelu:
      return activate_unit<T, kGelu>(args, x, column, n, v);
    case kGeluTanh:
      return activate_unit<T, kGeluTanh>(args, x, column, n, v);
    case kQuickGelu:
      return activate_unit<T, kQuickGelu>(args, x, column, n, v);
    case kRelu:
      return activate_unit<T, kRelu>(args, x, column, n, v);
    default:
      return activate_unit<T, kRelu2>(args, x, column, n, v);
  }
}

/// silu(gate) * up, which nothing clamps. The way for tails is there for whole units too: beside it their
/// loads stand in a branch, from where the assembler cannot put some off behind the wait for the others.
template <class T>
__device__ __forceinline__ void silu_and_mul_unit(const QuantizeArgs& args, const T* x, int column, int n,
                                                  Unit<T>& unit) {
  const bool gate_first = args.order == GateOrder::kGateUp;
  Unit<T> gate, up;
  load_unit<false>(x + column + (gate_first ? 0 : args.cols), n, args.x_aligned, gate);
  load_unit<false>(x + column + (gate_first ? args.cols : 0), n, args.x_aligned, up);
#pragma unroll
  for (int e = 0; e < kUnit; e += 2)
    unit.set_two(e, dev::silu(gate[e]) * up[e], dev::silu(gate[e + 1]) * up[e + 1]);
}

/// What a kernel reads.
enum class Source {
  kRows,        // rows as they are
  kSiluAndMul,  // silu of one half of a row times the other
  kActivation,  // whatever args.kind, order and the numbers say
};

/// Columns [column, column + 16) of a source row, NaN from args.cols on (kWhole: some others of the row).
template <class T, Source kSource, bool kWhole = false>
__device__ __forceinline__ void load_source(const QuantizeArgs& args, std::int64_t row, int column,
                                            Unit<T>& unit) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const int n = args.cols - column;
  if constexpr (kSource == Source::kRows) {
    if (kWhole && n <= 0) column = 0;
    load_unit<kWhole>(x + column, n, args.x_aligned, unit);
  } else if constexpr (kSource == Source::kSiluAndMul) {
    silu_and_mul_unit(args, x, column, n, unit);
  } else if (args.kind == ActivationKind::kSilu) {
    activate_unit<T, ActivationKind::kSilu>(args, x, column, n, unit);
  } else if (args.kind == ActivationKind::kSwigluOai) {
    activate_unit<T, ActivationKind::kSwigluOai>(args, x, column, n, unit);
  } else {
    Unit<T> away;  // a copy, so that `unit` itself stays in registers
    activate_unit_rarely<T>(args, x, column, n, away);
    unit = away;
  }
}

/// Clears the codes behind column n.
template <bool kFp4>
__device__ __forceinline__ void clear_behind(int n, Codes& codes) {
  constexpr int kPerWord = kFp4 ? 8 : 4;
#pragma unroll
  for (int i = 0; i < kUnit / kPerWord; ++i) {
    const int left = n - i * kPerWord;
    if (left < kPerWord) codes.words[i] &= left <= 0 ? 0u : (1u << left * (32 / kPerWord)) - 1;
  }
}

/// Stores a unit to `to`, of which there are `n` columns up to args.padded_cols. kWhole: at least 16 or none.
template <bool kFp4, bool kWhole = false>
__device__ __forceinline__ void store_unit(const QuantizeArgs& args, std::uint8_t* to, int n,
                                           const Codes& codes) {
  if (n <= 0) return;
  if (kWhole || (args.data_aligned && n >= kUnit)) {
    if constexpr (kFp4)
      *reinterpret_cast<uint2*>(to) = make_uint2(codes.words[0], codes.words[1]);
    else
      *reinterpret_cast<uint4*>(to) =
          make_uint4(codes.words[0], codes.words[1], codes.words[2], codes.words[3]);
    return;
  }
  const int bytes = kFp4 ? n / 2 : n;
#pragma unroll
  for (int i = 0; i < (kFp4 ? 8 : 16); ++i)
    if (i < bytes) to[i] = static_cast<std::uint8_t>(codes.words[i / 4] >> i % 4 * 8);
}

__device__ __forceinline__ void store_scale(std::byte* to, bool word, std::uint32_t bits) {
  if (word)
    *reinterpret_cast<std::uint32_t*>(to) = bits;
  else
    *to = static_cast<std::byte>(bits);
}

/// Launches the kernels on complete arguments. The instances are split over three sources, which compile side
/// by side.
struct QuantizeLaunch {
  Encoding encoding;
  DType dtype;
  QuantizePolicy policy;
  const DeviceInfo& device;
  cudaStream_t stream;
  QuantizeArgs args;
  bool whole_units = false;
  unsigned blocks = 0, row_parts = 1;
};
void launch_plain(const QuantizeLaunch& l);
void launch_silu_and_mul(const QuantizeLaunch& l);
void launch_activated(const QuantizeLaunch& l);

/// Largest magnitude of a task's units, as the bits of an f32, into *amax or amax[expert], which hold zeros
/// before.
struct AmaxLaunch {
  DType dtype;
  const DeviceInfo& device;
  cudaStream_t stream;
  QuantizeArgs args;
  std::uint32_t* amax;
  bool per_expert;
};
void launch_amax_plain(const AmaxLaunch& l);
void launch_amax_activated(const AmaxLaunch& l);

}  // namespace moecore::cuda
