#pragma once
// The Hopper engine's kernels, as the selector sees them.

#include <cstddef>

#include "cuda/grouped_gemm/prepare_scales.h"
#include "moecore/dtype.h"
#include "ops/grouped_gemm.h"

namespace moecore::cuda::dev {
struct GridCounter;
}

namespace moecore::cuda::sm90 {

inline constexpr int kLineBytes = 128;  // of K, of one row: what the swizzle and the gather work with

/// What the kernels multiply, and how.
enum class Family {
  kFloat,    // bf16 x bf16, f16 x f16
  kFp8,      // e4m3 x e4m3, partial sums of 128 columns
  kDecoded,  // bf16 x codes that become bf16 in registers
};

/// One compiled tile configuration.
struct TileConfig {
  const char* name;
  int max_tokens;      // widest token tile
  int stages;          // of the ring
  bool shares;         // tiles can be cut along K, or taken as blocks are done
  int box_tokens = 0;  // token rows that the copy engine brings at once; 0: they are always gathered
  /// 0: weights are the operand of rows, 64 in each block. Else so many weights are that of columns, and
  /// tokens that of rows, 64 in each warpgroup: they must stand in order.
  int weight_columns = 0;
  int warpgroups = 2;  // that compute
  int blocks = 2;      // of 64 weight rows in each of them
  bool pairs = false;  // blocks can work in pairs, which share weights
  const char* instruction = "wgmma";

  /// Columns of out that a gated tile has.
  constexpr int gated_columns() const { return rows() / 2; }
  constexpr int threads() const { return 128 * (warpgroups + 1); }
  constexpr bool whole_boxes() const {  // of eight rows, the swizzle's period
    return box_tokens == 0 || (box_tokens % 8 == 0 && max_tokens % box_tokens == 0);
  }
  constexpr bool tokens_are_rows() const { return weight_columns > 0; }
  constexpr int rows() const {  // of weights in a tile
    return tokens_are_rows() ? weight_columns : 64 * warpgroups * blocks;
  }
  /// Boxes that bring the weight rows of a step.
  constexpr int weight_boxes(bool gated) const { return pairs ? 2 : gated ? blocks : 1; }
  /// What the tokens of a tile are rounded up to.
  constexpr int token_step() const { return tokens_are_rows() ? max_tokens : 8; }
  /// Scales of x in a box of a tile, which begins up to kScalesAhead - 1 rows ahead of it.
  constexpr int scale_box() const { return max_tokens + kScalesAhead; }
};

enum class Tiling { kDecode, kPrefill };

inline constexpr TileConfig kTileConfigs[][2] = {
    {{.name = "decode", .max_tokens = 32, .stages = 6, .shares = true},
     {.name = "prefill", .max_tokens = 176, .stages = 4, .shares = false, .box_tokens = 16, .pairs = true}},
    {{.name = "decode", .max_tokens = 32, .stages = 6, .shares = true},
     {.name = "prefill",
      .max_tokens = 128,
      .stages = 4,
      .shares = false,
      .box_tokens = 64,
      .weight_columns = 192,
      .blocks = 1,
      .pairs = true}},
    {{.name = "decode",
      .max_tokens = 32,
      .stages = 8,
      .shares = true,
      .warpgroups = 4,
      .blocks = 1,
      .instruction = "mma.sync"},
     {.name = "prefill",
      .max_tokens = 192,
      .stages = 3,
      .shares = false,
      .box_tokens = 32,
      .warpgroups = 3,
      .blocks = 1}},
};
constexpr const TileConfig& tile_config(Family family, Tiling tiling) {
  return kTileConfigs[static_cast<int>(family)][static_cast<int>(tiling)];
}

/// Whether the gated tiles of a configuration can leave codes of fp8_block128 instead of floats: a tile has
/// all the columns that share a scale, and its eight computing warps meet over them.
constexpr bool holds_scale_blocks(Family family, const TileConfig& config) {
  return family == Family::kFp8 && config.gated_columns() == 128 && config.warpgroups == 2;
}

/// What blocks share by way of the workspace: partial sums of tiles, or the number of the next tile. Whatever
/// the workspace held before, a slot of sums is full where its flag holds kRaised; who takes the sums lowers
/// it.
struct Sharing {
  static constexpr unsigned long long kRaised = 0x6D6F65636F72653Full;
  static constexpr int kMaxBlocks = 256, kMaxWarpgroups = 4;
  /// f32 sums of one block's tile: 256 weight rows of 32 tokens.
  static constexpr std::size_t kSlotFloats = 256 * 32;
  static constexpr std::size_t kBytes =
      kMaxBlocks * (kMaxWarpgroups * sizeof(unsigned long long) + kSlotFloats * sizeof(float));

  enum By { kNothing, kTiles, kSteps } by = kNothing;
  dev::GridCounter* next_tile = nullptr;  // by tiles
  unsigned long long* flags = nullptr;    // by steps, [blocks, warpgroups]
  float* sums = nullptr;                  // by steps, [blocks, kSlotFloats]
};

/// What a kernel is launched with: (Maps, args, sharing, boxes, evict_weights). `boxes`: the rows of x are
/// those of out, and come by the map of x.
struct Kernel {
  const void* function;
  std::size_t smem_bytes;
};

/// The kernels of a configuration. `Gated`: the sigmoid family of gated activations, else the product.
/// bf16 x bf16 or f16 x f16.
template <DType kType, Tiling kTiling, bool kGated>
Kernel float_kernel();
/// e4m3 x e4m3, out bf16. `Blocks`: a scale for every 128 columns, else for rows.
template <bool kBlocks, Tiling kTiling, bool kGated>
Kernel fp8_kernel();
/// bf16, in the order of prepare_x(), x mxfp4 or nvfp4.
template <OperandForm kWeights, Tiling kTiling, bool kGated>
Kernel decoded_kernel();

}  // namespace moecore::cuda::sm90
