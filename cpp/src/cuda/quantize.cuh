#pragma once
// What the quantize kernels share: arguments, rows and scales, a unit of 16 columns.
//
// A thread owns a *unit*: 16 columns of one row, 32 bytes of a 16-bit type, which become 16 bytes of e4m3 or
// 8 of e2m1. A warp owns a *tile*: 32 units, 512 columns of one row, so that everything about the row (its
// expert, its copies, where its scales stand) is the same for all its lanes.

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/numeric.h"
#include "cuda/activation.cuh"
#include "cuda/device/convert.cuh"
#include "cuda/device/division.cuh"
#include "cuda/device/fp8_fp4.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/quantize_policy.h"
#include "cuda/runtime.h"
#include "ops/quantize.h"

namespace moecore::cuda {

enum class Encoding { kTensor, kToken, kBlock128, kNvfp4, kMxfp8, kMxfp4 };

constexpr bool is_fp4(Encoding e) {
  return e == Encoding::kNvfp4 || e == Encoding::kMxfp4;
}
/// Units of a block.
constexpr int units_of_block(Encoding e) {
  return e == Encoding::kBlock128 ? 8 : e == Encoding::kMxfp8 || e == Encoding::kMxfp4 ? 2 : 1;
}

struct ScaleRule {
  float amax_floor, amax_cap;
  bool power_of_two;
  numeric::PowerOfTwoRule exponent;
};

/// Bytes between the scales of a row.
struct ScaleSteps {
  std::int64_t four = 0, one = 0;  // from four scales to the next four, and from one to the next

  explicit ScaleSteps(const ScaleRef& s)
      : four(scale_byte(s, 0, 0, kScaleWord)), one(scale_byte(s, 0, 0, 1)) {}
  __device__ __forceinline__ std::int64_t to(int block) const { return block / 4 * four + block % 4 * one; }
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
  ScaleSteps steps;
  ScaleRule rule;
  const float* global_scale;
  bool global_scale_per_expert;
  ExpertRowsRef experts;
  std::int64_t rows;       // of the output
  std::int64_t num_tasks;  // rows, or tokens when slot_row is set
  const std::int32_t* row_token;
  const std::int32_t* slot_row;
  int top_k;
  int lookup{};
  int tiles{};  // of a task
  dev::Divisor by_tiles{};
  unsigned tile_blocks{};  // blocks that work on tiles; those behind them zero the padding of the scales
  GateOrder order{};
  ActivationKind kind{};
  ActivationParams activation{};
};

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

__device__ __forceinline__ std::int64_t search_expert(const ExpertRowsRef& experts, std::int64_t row) {
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

/// The same by the whole warp, for one row.
__device__ __forceinline__ std::int64_t count_experts(const ExpertRowsRef& experts, std::int64_t row) {
  unsigned ended = 0;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < experts.num_experts; e += 32)
    ended += __ldg(experts.expert_offsets + 1 + e) <= row;
  return __reduce_add_sync(0xFFFFFFFF, ended);
}

/// A row's expert, and the byte where its scales begin.
struct Place {
  std::int64_t expert = 0, scales = 0;
};

__device__ __forceinline__ std::int64_t group_scale_rows(const ExpertRowsRef& experts, ScaleLayout layout) {
  const std::int64_t multiple = scale_row_multiple(layout);
  return (experts.group_rows + multiple - 1) / multiple * multiple;
}

/// `find` is called when the expert is needed and only a search tells.
template <class Find>
__device__ __forceinline__ Place place_of(const ExpertRowsRef& experts, const ScaleRef& scales,
                                          bool expert_needed, std::int64_t row, Find&& find) {
  Place place;
  std::int64_t base = 0, scale_row = row;
  if (experts.row_counts) {
    place.expert = row / experts.group_rows;
    if (is_swizzled(scales.layout)) {
      base = place.expert * group_scale_rows(experts, scales.layout);
      scale_row = row - place.expert * experts.group_rows;
    }
  } else if (experts.expert_offsets && (experts.scale_offsets || expert_needed)) {
    place.expert = find(experts, row);
    if (experts.scale_offsets) {
      base = __ldg(experts.scale_offsets + place.expert);
      scale_row = row - __ldg(experts.expert_offsets + place.expert);
    }
  }
  place.scales = scale_byte(scales, base, scale_row, 0);
  return place;
}

__device__ __forceinline__ Place place_of_warp_row(const QuantizeArgs& args, std::int64_t row) {
  return place_of(args.experts, args.scales, args.global_scale_per_expert, row,
                  [&](const ExpertRowsRef& experts, std::int64_t r) {
                    return args.lookup == static_cast<int>(ExpertLookup::kCount) ? count_experts(experts, r)
                                                                                 : search_expert(experts, r);
                  });
}

/// 16 elements as they are in memory: half the registers that floats would take for 16-bit types.
template <class T>
struct alignas(16) Unit {
  T values[kUnit];

  __device__ __forceinline__ float operator[](int e) const { return dev::to_f32(values[e]); }
};

/// 16 elements from `p`, of which the first `n` exist; the others are NaN, which no magnitude sees.
template <class T>
__device__ __forceinline__ void load_unit(const T* p, int n, bool aligned, Unit<T>& unit) {
  if (aligned && n >= kUnit) {
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
    load_unit(x + column, n, args.x_aligned, unit);
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      unit.values[e] = dev::from_f32<T>(e < n ? activate_plain<kKind>(unit[e], args.activation) : absent);
    return;
  }
  Unit<T> gate, up;
  if (args.order == GateOrder::kInterleaved) {
    Unit<T> pairs[2];
    load_unit(x + 2 * column, 2 * n, args.x_aligned, pairs[0]);
    load_unit(x + 2 * column + kUnit, 2 * n - kUnit, args.x_aligned, pairs[1]);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      gate.values[e] = pairs[2 * e / kUnit].values[2 * e % kUnit];
      up.values[e] = pairs[2 * e / kUnit].values[2 * e % kUnit + 1];
    }
  } else {
    const bool gate_first = args.order == GateOrder::kGateUp;
    load_unit(x + column + (gate_first ? 0 : args.cols), n, args.x_aligned, gate);
    load_unit(x + column + (gate_first ? args.cols : 0), n, args.x_aligned, up);
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

/// Columns [column, column + 16) of a source row, NaN from args.cols on.
template <class T, bool kActivated>
__device__ __forceinline__ void load_source(const QuantizeArgs& args, std::int64_t row, int column,
                                            Unit<T>& unit) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const int n = args.cols - column;
  if constexpr (!kActivated) {
    load_unit(x + column, n, args.x_aligned, unit);
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

/// Largest magnitude of a unit that is not NaN, NaN if there is none. `has_nan`: whether there is some.
template <class T>
__device__ __forceinline__ float unit_amax(const Unit<T>& unit, bool& has_nan) {
  if constexpr (sizeof(T) == 2) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Two* pairs = reinterpret_cast<const Two*>(unit.values);
    Two amax = __habs2(pairs[0]);
#pragma unroll
    for (int i = 1; i < kUnit / 2; ++i) amax = __hmax2_nan(amax, __habs2(pairs[i]));
    const float a = dev::to_f32(amax.x), b = dev::to_f32(amax.y);
    has_nan = !(a <= b || b <= a);
    if (!has_nan) return fmaxf(a, b);
  }
  has_nan = true;  // or not looked for
  float amax = fabsf(unit[0]);
#pragma unroll
  for (int e = 1; e < kUnit; ++e) amax = fmaxf(amax, fabsf(unit[e]));
  return amax;
}

__device__ __forceinline__ float reciprocal(float scale) {
  return scale == 0.0f ? 0.0f : __frcp_rn(scale);
}

__device__ __forceinline__ float clamp_amax(const ScaleRule& rule, float amax) {
  return fminf(amax > rule.amax_floor ? amax : rule.amax_floor, rule.amax_cap);
}

/// A block's scale (a byte or the bits of an f32) and the factor that brings its elements to codes.
struct BlockScale {
  std::uint32_t bits;
  float factor;
};

template <Encoding kEncoding>
__device__ __forceinline__ BlockScale block_scale(const ScaleRule& rule, float amax, float global,
                                                  float rcp_global, bool f32_scales) {
  if constexpr (kEncoding == Encoding::kNvfp4) {
    const std::uint32_t byte = dev::e4m3x2(__fmul_rn(global, __fmul_rn(amax, 1.0f / 6)), 0.0f) & 0xFFu;
    const float s = numeric::e4m3_to_f32(static_cast<std::uint8_t>(byte));
    return {byte, s == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(s, rcp_global))};
  } else {
    constexpr bool kFp8 = kEncoding == Encoding::kBlock128 || kEncoding == Encoding::kToken;
    if (kFp8) amax = clamp_amax(rule, amax);
    if (kFp8 && !rule.power_of_two) {
      const float s = __fdiv_rn(amax, 448.0f);
      return {__float_as_uint(s), reciprocal(s)};
    }
    const std::uint8_t byte = numeric::power_of_two_scale(amax, rule.exponent);
    return {f32_scales ? __float_as_uint(numeric::e8m0_to_f32(byte)) : byte,
            numeric::power_of_two_reciprocal(byte)};
  }
}

/// The codes of a unit: 16 bytes of e4m3, or 8 of e2m1 in the first two words.
struct Codes {
  std::uint32_t words[4];
};

/// `regular`: no element is NaN, nor are they times `factor`, which is not negative.
template <bool kFp4, class T>
__device__ __forceinline__ Codes encode_unit(const Unit<T>& unit, float factor, int n, bool regular) {
  constexpr int kPerWord = kFp4 ? 8 : 4;
  constexpr bool kByMagnitude = kFp4 && sizeof(T) == 2 && !MOECORE_HAS_E2M1_INSTRUCTION;
  Codes codes{};
  if (kByMagnitude && regular) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(unit.values);
#pragma unroll
    for (int i = 0; i < kUnit / 8; ++i) {
      float a[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) a[e] = __fmul_rn(fabsf(unit[i * 8 + e]), factor);
      codes.words[i] = dev::e2m1_magnitudes(a) | dev::nibble_signs(words + i * 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit / kPerWord; ++i) {
      float y[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) y[e] = __fmul_rn(unit[i * kPerWord + e], factor);
      codes.words[i] = kFp4 ? dev::e2m1x8(y) : dev::e4m3x4(y);
    }
  }
  if (n < kUnit) {  // nothing behind column n
#pragma unroll
    for (int i = 0; i < kUnit / kPerWord; ++i) {
      const int left = n - i * kPerWord;
      if (left < kPerWord) codes.words[i] &= left <= 0 ? 0u : (1u << left * (32 / kPerWord)) - 1;
    }
  }
  return codes;
}

/// Stores a unit to a row of the output, up to args.padded_cols.
template <bool kFp4>
__device__ __forceinline__ void store_unit(const QuantizeArgs& args, std::int64_t row, int column,
                                           const Codes& codes) {
  std::uint8_t* to = args.data + row * args.data_pitch + (kFp4 ? column / 2 : column);
  const int n = args.padded_cols - column;
  if (args.data_aligned && n >= kUnit) {
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

/// `row` is where the row's scales begin.
__device__ __forceinline__ void store_scale(const QuantizeArgs& args, std::int64_t row, int block,
                                            std::uint32_t bits) {
  std::byte* to = args.scales.data + row + args.steps.to(block);
  if (args.scales.bytes == 4)
    *reinterpret_cast<std::uint32_t*>(to) = bits;
  else
    *to = static_cast<std::byte>(bits);
}

/// Launches the kernels on complete arguments. The instances are split over two sources, which compile side
/// by side.
struct QuantizeLaunch {
  Encoding encoding;
  DType dtype;
  QuantizePolicy policy;
  const DeviceInfo& device;
  cudaStream_t stream;
  QuantizeArgs args;
  unsigned padding_blocks;
};
void launch_plain(const QuantizeLaunch& l);
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
