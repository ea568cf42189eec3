#pragma once
// The grouped GEMM's kernels: one table per instruction set, each in a file of that name. grouped_gemm.cc
// holds the schedule and picks a table; the kernels work on one block that fits a core's caches.

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/numeric.h"
#include "ops/grouped_gemm.h"

namespace moecore::cpu::gemm {

/// Rows of x that a block multiplies at once.
inline constexpr int kBlockRows = 32;
inline constexpr int kMaxBlockRows = 64;
/// Weight rows of a block: 96 rows of 1024 bf16 are 192 KiB. A multiple of every kernel's tile width, also
/// when it is halved between gate and up. A kernel may take up to kMaxBlockCols when there is enough work.
inline constexpr int kBlockCols = 96;
inline constexpr int kMaxBlockCols = 4 * kBlockCols;
/// Depth after which the lanes of an accumulator are added up. Part of what fixes the bits of a result.
inline constexpr std::int64_t kSumDepth = 1024;

struct WeightRows {
  const std::byte* data = nullptr;
  int rows = 0;
  std::int64_t first = 0;  // number of the first one among the expert's
};

/// How a step of codes gets its scales.
enum class Scaling {
  kNone,
  kProduct,  // multiplied by them
  kTable32,  // looked up in a table that contains them, one for each scale byte; blocks of 32 columns
  kTable16,
};

/// How the codes of an operand become f32. Scales that a whole row shares are left to Finish.
struct Codes {
  bool e2m1 = false;                  // else e4m3
  int block = 0;                      // columns that share a scale; 0: see above
  DType scale_dtype{};                // f32, e8m0, e4m3
  const std::byte* scales = nullptr;  // of the expert
  std::int64_t row_pitch = 0, col_pitch = 0;
  int block_rows = 1;

  const std::byte* scales_of(std::int64_t row) const { return scales + row / block_rows * row_pitch; }
};

/// c[m,n] = sum_k x[m,k] * w[n,k] for one block, where the weight rows n are those of w[0], then of w[1].
struct Product {
  const std::byte* const* x = nullptr;  // pointers to rows of `depth` elements
  int rows = 0;                         // 1 .. the kernel's max_rows
  std::array<WeightRows, 2> w{};        // at most kMaxBlockCols rows
  std::int64_t w_pitch = 0;             // bytes from one weight row to the next
  std::int64_t depth = 0;
  float* c = nullptr;
  int c_pitch = 0;
  const Codes* w_codes = nullptr;              // weights are codes
  const Codes* x_codes = nullptr;              // x too
  const std::byte* const* x_scales = nullptr;  // of each row, when x_codes have a block
};

/// out[m,:] = RN( activation( c[m,:] * col_scales * row_weights[m] + bias ) ). Overwrites c.
struct Finish {
  float* c = nullptr;  // [rows, width]; gated: gate columns then up columns (either order), or interleaved
  int rows = 0;
  int width = 0;
  int c_pitch = 0;                         // a multiple of 16 with 16 floats to spare
  const float* col_scales = nullptr;       // [width] or none
  const float* row_weights = nullptr;      // [rows] or none
  const float* bias = nullptr;             // [width] or none
  const Activation* activation = nullptr;  // or none
  std::byte* out = nullptr;                // [rows, width] or [rows, width/2]
  std::int64_t out_pitch = 0;              // bytes
};

/// A product of operands that are codes.
struct DecodedProduct {
  const char* name = nullptr;
  void (*product)(const Product&) = nullptr;
};

/// One element type on one instruction set.
struct Kernel {
  const char* name = nullptr;
  void (*product)(const Product&) = nullptr;
  /// The same for weights that are codes.
  DecodedProduct decoded{};
  void (*finish)(const Finish&) = nullptr;
  /// dst[i] = src[i] in f32.
  void (*widen)(const std::byte* src, float* dst, std::int64_t n) = nullptr;
  int max_rows = kBlockRows;  // of a block, up to kMaxBlockRows
  int max_cols = kBlockCols;  // of a block, up to kMaxBlockCols
};

struct KernelTable {
  Kernel f32, f16, bf16;
  DecodedProduct coded_x{};  // x and weights are codes
};

const KernelTable& baseline_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
const KernelTable& amx_kernels();

}  // namespace moecore::cpu::gemm
