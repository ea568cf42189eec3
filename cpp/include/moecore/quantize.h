#pragma once
// quantize, dequantize: rows of f32|f16|bf16 to fp8, nvfp4, mxfp8 or mxfp4, and back.
//
// The same bits on every engine, for every batch split and in every fused form. docs/formats.md has the
// tables.
//
// A *block* is a run of columns of one row that shares a scale. amax is the largest |x| of the block that is
// not NaN (NaN if every element is). rcp(s) is the IEEE-rounded 1 / s; a * b is rounded to f32. Codes round
// to nearest even and saturate.
//
//   format          block        scale                                             code
//   fp8 tensor      the tensor   f32  s = clamp(amax, amax_floor, amax_cap) / 448  e4m3(x * rcp(s))
//   fp8 token       the row      same                                              same
//   fp8 block128    128 columns  same, or a power of two, see below                same
//   nvfp4           16 columns   e4m3 S = e4m3(g * (amax * f32(1/6)))              e2m1(x * rcp(S * rcp(g)))
//   mxfp8           32 columns   e8m0 S = smallest 2^n >= amax / 448               e4m3(x / S)
//   mxfp4           32 columns   e8m0 S by Mxfp4Rounding                           e2m1(x / S)
//
//   NaN element     e4m3 0x7F, e2m1 0x7 (+6); never part of amax
//   +-inf element   the largest code with its sign; e8m0 scale 0xFE, e4m3 scale 448, f32 scale amax_cap / 448
//   all-NaN block   e8m0 scale 0xFF, e4m3 scale 0x7F, f32 scale amax_floor / 448
//   scale code 0    (amax is zero or too small) codes are zeros with the sign of x
//   static scale 0  likewise
//
// Sources: vLLM, SGLang and FlashInfer as of 2026; where they disagree or leave a case open, the rule above.

#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include "moecore/activate.h"
#include "moecore/context.h"
#include "moecore/plan.h"

namespace [[gnu::visibility("default")]] moecore {

enum class QuantKind : std::uint8_t { kFp8, kNvfp4, kMxfp8, kMxfp4 };

/// fp8 only: what shares a scale.
enum class Granularity : std::uint8_t { kTensor, kToken, kBlock128 };

/// Where the scale of (row m, block k) stands; C = number of blocks of a row, T = ceil(C / 4).
enum class ScaleLayout : std::uint8_t {
  kLinear,         // [M, C], rows may be strided
  kSwizzled128x4,  // byte ((m/128)*T + k/4)*512 + (m%32)*16 + (m%128)/32*4 + k%4
  kSwizzled8x4,    // byte ((m/8)*T + k/4)*32 + (m%8)*4 + k%4
  kColumnMajor,    // fp8 block128: [C, P] f32, P >= M; e8m0: [T, 4P], byte (k/4)*4P + 4m + k%4
};

/// How mxfp4 picks the power of two: up = smallest with amax / S <= 6; nearest_1_75 = amax / S < 7 (values
/// above 6 are clipped); floor = amax / S < 8, as the OCP MX specification has it.
enum class Mxfp4Rounding : std::uint8_t { kUp, kNearest175, kFloor };

struct QuantFormat {
  QuantKind kind = QuantKind::kFp8;
  ScaleLayout layout = ScaleLayout::kLinear;
  Granularity granularity = Granularity::kToken;       // fp8
  bool static_scale = false;                           // fp8 tensor: `scales` is read, not written
  bool power_of_two = false;                           // fp8 block128: s rounded up to 2^n, at least 2^-33
  bool e8m0_scales = false;                            // fp8 block128: power_of_two, stored as e8m0
  float amax_floor = 1e-10f;                           // fp8
  float amax_cap = std::numeric_limits<float>::max();  // fp8
  Mxfp4Rounding mxfp4_rounding = Mxfp4Rounding::kNearest175;  // mxfp4

  static QuantFormat fp8_tensor() { return {.granularity = Granularity::kTensor}; }
  static QuantFormat fp8_tensor_static() {
    return {.granularity = Granularity::kTensor, .static_scale = true};
  }
  /// amax_floor 1 / 512: the least scale is 1 / (448 * 512).
  static QuantFormat fp8_token() { return {.granularity = Granularity::kToken, .amax_floor = 1.0f / 512}; }
  static QuantFormat fp8_block128(ScaleLayout layout = ScaleLayout::kLinear) {
    return {.layout = layout, .granularity = Granularity::kBlock128};
  }
  static QuantFormat fp8_block128_e8m0(ScaleLayout layout = ScaleLayout::kLinear) {
    return {
        .layout = layout, .granularity = Granularity::kBlock128, .power_of_two = true, .e8m0_scales = true};
  }
  static QuantFormat nvfp4(ScaleLayout layout = ScaleLayout::kSwizzled128x4) {
    return {.kind = QuantKind::kNvfp4, .layout = layout};
  }
  static QuantFormat mxfp8(ScaleLayout layout = ScaleLayout::kSwizzled128x4) {
    return {.kind = QuantKind::kMxfp8, .layout = layout};
  }
  static QuantFormat mxfp4(ScaleLayout layout = ScaleLayout::kSwizzled128x4,
                           Mxfp4Rounding rounding = Mxfp4Rounding::kNearest175) {
    return {.kind = QuantKind::kMxfp4, .layout = layout, .mxfp4_rounding = rounding};
  }

  /// Columns of a block; 0 for the whole row or tensor.
  std::int64_t block() const;
  /// e4m3 or e2m1.
  DType data_dtype() const;
  /// f32, e4m3 or e8m0.
  DType scale_dtype() const;
};

/// Shape of a dense `scales` for `rows` rows of `cols` (padded) columns: fp8 tensor [1,1], token [rows,1],
/// linear [rows,C], swizzled [rows rounded up to 128 or 8, C rounded up to 4], column_major [C, rows rounded
/// up to 4] (e8m0: [C / 4 rounded up, 4 * rows rounded up to 4]: 16-byte columns, as a tensor map wants
/// them).
std::array<std::int64_t, 2> scale_shape(const QuantFormat& format, std::int64_t rows, std::int64_t cols);

/// Rows that suffice for the swizzled scales of every split of `rows` rows over `num_experts` experts: the
/// largest possible scale_offsets[E], a multiple of 128.
std::int64_t expert_scale_rows(std::int64_t rows, std::int64_t num_experts);

/// Position of one scale, in scales, inside a dense block of scales of `cols` columns (kColumnMajor: of
/// `rows` rows).
std::int64_t scale_offset(ScaleLayout layout, std::int64_t row, std::int64_t col, std::int64_t rows,
                          std::int64_t cols);

/// Rows that belong to experts. With none of these x is one block of rows.
struct ExpertRows {
  /// i32 [E+1]: rows below expert_offsets[E] belong to experts, the others are neither read nor written, nor
  /// are their scales.
  std::optional<TensorView> expert_offsets{};
  /// i32 [E+1], for swizzled layouts: expert e's scales are a swizzled block of their own from scale row
  /// scale_offsets[e] on; its padding up to scale_offsets[e+1] is zeroed. Multiples of 128 (8 suffices for
  /// 8x4) up to the rows of scales: those of a plan with scale_alignment 128. On the CPU others are refused;
  /// on CUDA, where nothing is read back, they lead to other scales of the tensor, never out of it.
  std::optional<TensorView> scale_offsets{};
  /// i32 [E], instead of offsets: x is E groups of R / E rows, of which the first row_counts[e] are valid.
  /// The scales of every group are a block of their own, R / E rows rounded up to the layout's multiple.
  std::optional<TensorView> row_counts{};
};

struct QuantizeOptions {
  ExpertRows rows{};
  /// nvfp4: f32 [1] or one for each expert [E]; without it 1. See global_scale().
  std::optional<TensorView> global_scale{};
};

/// x [R,H] f32|f16|bf16 -> data [R,Hp] (e4m3, or e2m1 with even Hp; u8 [R,Hp] or [R,Hp/2] will do), scales
/// (scale_dtype() or u8) as scale_shape() says. Hp >= H: columns from H on get code 0, and blocks that lie
/// wholly there scale 0. Padding of swizzled and column-major scales is zeroed. H and Hp need not be
/// multiples of the block. Any row stride, any alignment. fp8 tensor with a dynamic scale finds the scale
/// first, in one more pass.
void quantize(const TensorView& x, const TensorView& data, const TensorView& scales,
              const QuantFormat& format, const QuantizeOptions& options = {}, const ExecContext& ctx = {});

/// quantize(activate(x)), in one pass and with the same bits: x [R,2I] (kPlain: [R,I]), data [R,Ip].
void activate_quantize(const TensorView& x, const Activation& activation, const TensorView& data,
                       const TensorView& scales, const QuantFormat& format,
                       const QuantizeOptions& options = {}, const ExecContext& ctx = {});

/// quantize(permute(x, plan)) per expert, in one pass and with the same bits: x [T,H], data [R,Hp]. A token
/// is quantised once and written to each of its rows (a global scale per expert: once for each row). Rows
/// that no route owns are left untouched. options.rows is taken from the plan. Not for fp8 with a dynamic
/// tensor scale.
void permute_quantize(const TensorView& x, const Plan& plan, const TensorView& data, const TensorView& scales,
                      const QuantFormat& format, const QuantizeOptions& options = {},
                      const ExecContext& ctx = {});

/// out[r,h] = RN(code * scale) for h < H: out [R,H] f32|f16|bf16, H <= Hp. nvfp4: RN(code * (S * rcp(g))).
void dequantize(const TensorView& data, const TensorView& scales, const TensorView& out,
                const QuantFormat& format, const QuantizeOptions& options = {}, const ExecContext& ctx = {});

/// out[e] = min(2688 / amax of expert e's rows, largest f32), 1 where amax is 0: nvfp4's global scale, which
/// makes the largest block scale 448. x [R,H]; out f32 [1], or [E] with options.rows.
void global_scale(const TensorView& x, const TensorView& out, const ExpertRows& rows = {},
                  const ExecContext& ctx = {});

/// Moves the scales of `rows` x `cols` blocks between layouts, byte-sized scales only; padding of `dst` is
/// zeroed. Both are dense blocks as scale_shape() describes them; linear rows may be strided.
void convert_scales(const TensorView& src, ScaleLayout src_layout, const TensorView& dst,
                    ScaleLayout dst_layout, std::int64_t rows, std::int64_t cols,
                    const ExecContext& ctx = {});

}  // namespace moecore
