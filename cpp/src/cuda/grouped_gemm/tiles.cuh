#pragma once
// From a tile's number to its expert, weight tile and token rows, on the device: the host never reads
// expert_offsets.
//
// An expert with r rows is cut into n = ceil(r / max_tokens) token tiles of one width, ceil(r / n) rounded up
// to the tiling's step: 8, so that padding stays below 8 rows a tile, or max_tokens. Two steps find a tile:
// the block keeps the token tiles of every group of 32 experts, and a warp scans the 32 experts of the group
// that holds the tile.

#include "cuda/grouped_gemm/args.h"

namespace moecore::cuda {

struct Tile {
  int expert;
  int weight_tile;
  int row;              // first row of out
  int rows;             // 1 .. max_tokens; 0: there is no such tile
  bool paired = false;  // with the tile whose number differs in its lowest bit: they share their weights
};

/// All threads of the block: group_tiles[g] = token tiles of experts 32g .. 32g+31. The caller synchronises.
__device__ inline void count_group_tiles(const GroupedGemmArgs& args, int* group_tiles) {
  const int lane = threadIdx.x % 32;
  const int groups = (args.num_experts + kExpertGroup - 1) / kExpertGroup;
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const int expert = group * kExpertGroup + lane;
    int tiles = 0;
    if (expert < args.num_experts) {
      const int rows = __ldcg(args.expert_offsets + expert + 1) - __ldcg(args.expert_offsets + expert);
      tiles = (rows + args.tiles.max_tokens - 1) / args.tiles.max_tokens;
    }
    tiles = __reduce_add_sync(~0u, tiles);
    if (lane == 0) group_tiles[group] = tiles;
  }
}

/// All tiles, from the finished group_tiles.
__device__ inline int count_tiles(const GroupedGemmArgs& args, const int* group_tiles) {
  int tiles = 0;
  for (int group = 0; group * kExpertGroup < args.num_experts; ++group) tiles += group_tiles[group];
  return tiles * args.tiles.weight_tiles;
}

/// Finds tiles of ascending number. Every method is called by a whole warp.
class TileCursor {
 public:
  __device__ TileCursor(const GroupedGemmArgs& args, const int* group_tiles)
      : args_(args), group_tiles_(group_tiles) {}

  __device__ Tile find(int number) {
    const int weight_tiles = args_.tiles.weight_tiles;
    const int groups = (args_.num_experts + kExpertGroup - 1) / kExpertGroup;
    const bool odd = number % 2 != 0;
    int group = group_;
    while (number >= (before_ + in_group_) * weight_tiles) {
      if (++group >= groups) return Tile{0, 0, 0, 0};
      before_ += in_group_;
      in_group_ = group_tiles_[group];
    }
    if (group != group_) load_group(group);
    group_ = group;

    number -= before_ * weight_tiles;
    const int owner = __ffs(__ballot_sync(~0u, number < tiles_through_ * weight_tiles)) - 1;
    const int begin = __shfl_sync(~0u, begin_, owner);
    const int rows = __shfl_sync(~0u, rows_, owner);
    const int tiles = (rows + args_.tiles.max_tokens - 1) / args_.tiles.max_tokens;
    number -= (__shfl_sync(~0u, tiles_through_, owner) - tiles) * weight_tiles;

    const int weight_tile = number / tiles;
    const int step = args_.tiles.token_step, width = ((rows + tiles - 1) / tiles + step - 1) & -step;
    const int token_tile = number - weight_tile * tiles, first = token_tile * width;
    return Tile{group_ * kExpertGroup + owner, weight_tile, begin + first, min(width, rows - first),
                odd ? token_tile > 0 : token_tile + 1 < tiles};
  }

 private:
  /// Lane l learns expert l of the group, and the token tiles of the group's experts 0 .. l.
  __device__ void load_group(int group) {
    const int lane = threadIdx.x % 32;
    const int expert = group * kExpertGroup + lane;
    const bool exists = expert < args_.num_experts;
    begin_ = exists ? __ldcg(args_.expert_offsets + expert) : 0;
    rows_ = exists ? __ldcg(args_.expert_offsets + expert + 1) - begin_ : 0;
    tiles_through_ = (rows_ + args_.tiles.max_tokens - 1) / args_.tiles.max_tokens;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, tiles_through_, step);
      if (lane >= step) tiles_through_ += left;
    }
  }

  const GroupedGemmArgs& args_;
  const int* group_tiles_;
  int group_ = -1;
  int before_ = 0;    // token tiles of the groups before group_
  int in_group_ = 0;  // and of group_
  int begin_ = 0, rows_ = 0, tiles_through_ = 0;
};

}  // namespace moecore::cuda
