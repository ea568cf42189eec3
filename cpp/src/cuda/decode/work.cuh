#pragma once
// What every warp of the decode kernel knows: shared memory, the sorted routes, and the list of tiles.

#include <cstddef>
#include <cstdint>

#include "cuda/decode/args.h"
#include "cuda/decode/ptx.cuh"
#include "cuda/device/local_expert.cuh"
#include "cuda/types.cuh"

namespace moecore::cuda::decode {

/// Partial sums of a tile: [warp][weight row][token].
struct Partials {
  float sums[kMmaWarps][kTileRows][kMaxRows];
};

struct Smem {
  std::uint64_t weights[kMaxStages], tokens[kMaxStages], empty[kMaxStages];  // of the ring
  std::uint64_t summed[kEpilogueWarps], taken[kEpilogueWarps];
  Partials partials[kEpilogueWarps];
  unsigned opens[kMaxRoutes / 32];  // bit p: row p is the first of a pass
  int num_rows;
  int column_begin, column_end, column_width;  // of this block's columns of out, and of their tiles
  int stored[kEpilogueWarps];  // tiles of the first product whose columns an epilogue warp has stored
  // Behind it: Routes, the products of the down tile, the ring.
};

/// The sorted routes, in shared memory.
struct Routes {
  int* expert;       // [routes] local expert of a route, or -1
  float* weight;     // [routes] of the router
  int* row_route;    // [rows]
  int* row_token;    // [rows]
  int* pass_begin;   // [passes] this block's columns of the first product
  int* pass_end;     // [passes]
  int* pass_width;   // [passes] of their tiles
  int* pass_expert;  // [passes]
  int* pass_row;     // [passes + 1] first row

  static constexpr int kBytesPerRoute = 9 * 4;

  __device__ Routes(std::byte* p, int routes)
      : expert(reinterpret_cast<int*>(p)),
        weight(reinterpret_cast<float*>(expert + routes)),
        row_route(reinterpret_cast<int*>(weight + routes)),
        row_token(row_route + routes),
        pass_begin(row_token + routes),
        pass_end(pass_begin + routes),
        pass_width(pass_end + routes),
        pass_expert(pass_width + routes),
        pass_row(pass_expert + routes) {}
};

__host__ __device__ constexpr int align_128(int bytes) {
  return (bytes + 127) / 128 * 128;
}
/// Offsets of what lies behind Smem.
__host__ __device__ constexpr int routes_offset() {
  return align_128(sizeof(Smem));
}
__host__ __device__ constexpr int products_offset(int routes) {
  return routes_offset() + align_128((routes + 1) * Routes::kBytesPerRoute);
}
__host__ __device__ constexpr int ring_offset(int routes) {
  return products_offset(routes) + align_128(routes * kTileRows * 2);
}

// The local expert of a route, or -1.
__device__ inline int expert_of(const DecodeArgs& args, int route) {
  const int t = static_cast<int>(args.by_top_k.divide(route));
  const std::int64_t i = t * args.ids_stride + (route - t * args.top_k);
  return dev::local_expert(args, i);
}

__device__ inline float router_weight(const DecodeArgs& args, int route) {
  const int t = static_cast<int>(args.by_top_k.divide(route));
  const std::int64_t i = t * args.router_weights_stride + (route - t * args.top_k);
  return load_f32(args.router_weights, args.router_weight_dtype, i);
}

/// Columns of out that belong to the blocks before `block`.
__device__ __forceinline__ unsigned columns_before(const DecodeArgs& args, unsigned block) {
  return args.by_blocks.divide(args.hidden * block);
}

/// Intermediate columns of all passes that belong to the blocks before `block`: its share of them, and as
/// many more as make up for the columns of out that those blocks have less than their share. In floats, which
/// are quick: blocks need equal results for equal arguments, not exact ones.
__device__ __forceinline__ unsigned share_before(const DecodeArgs& args, int passes, unsigned block) {
  const auto columns = static_cast<unsigned>(passes * args.inter);
  if (block == gridDim.x) return columns;
  const unsigned less = args.hidden * block - columns_before(args, block) * gridDim.x;
  const float fraction =
      (static_cast<float>(block) + static_cast<float>(less) * args.per_column) * args.per_block;
  return min(columns, static_cast<unsigned>(static_cast<float>(columns) * fraction));
}

/// Width of equal tiles of at most 2^log2_width that cut n columns.
__device__ __forceinline__ int tile_width(unsigned n, int log2_width) {
  const unsigned tiles = (n + (1u << log2_width) - 1) >> log2_width;
  return static_cast<int>(tiles > 1 ? (n + tiles - 1) / tiles : n);
}

/// All threads: sorts the routes by expert, stably, cuts each expert's rows into passes and finds this
/// block's share of them. Returns the number of passes; without any there is one of no rows and no columns,
/// so that out is written. Every instruction here is fetched once, so the code is short rather than unrolled.
__device__ inline int sort_routes(const DecodeArgs& args, Smem& smem, const Routes& routes) {
  static_assert(kThreads >= kMaxRoutes);
  const int n = args.num_tokens * args.top_k, thread = threadIdx.x;
  const int expert = thread < n ? expert_of(args, thread) : -1;
  if (thread < n) {
    routes.expert[thread] = expert;
    routes.weight[thread] = router_weight(args, thread);
  }
  if (thread < kMaxRoutes / 32) smem.opens[thread] = 0;
  if (thread == 0) smem.num_rows = 0;
  if (thread < kEpilogueWarps) smem.stored[thread] = 0;
  __syncthreads();
  if (expert >= 0) {
    int lower = 0, rank = 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) {
      const int other = routes.expert[j];
      lower += other >= 0 && other < expert;
      rank += other == expert && j < thread;
    }
    const int row = lower + rank;
    routes.row_route[row] = thread;
    routes.row_token[row] = static_cast<int>(args.by_top_k.divide(thread));
    if (rank % args.rows == 0) atomicOr(&smem.opens[row / 32], 1u << row % 32);
    atomicMax(&smem.num_rows, row + 1);
  }
  __syncthreads();
  int passes = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const unsigned word = smem.opens[first / 32];
    const int bit = thread - first;
    if (bit >= 0 && bit < 32 && (word >> bit & 1)) {
      const int pass = passes + __popc(word & ((1u << bit) - 1));
      routes.pass_row[pass] = thread;
      routes.pass_expert[pass] = routes.expert[routes.row_route[thread]];
    }
    passes += __popc(word);
  }
  if (thread < max(passes, 1)) {
    const auto count = static_cast<unsigned>(max(passes, 1));
    const unsigned begin = (share_before(args, passes, blockIdx.x) + thread) / count;
    const unsigned end = (share_before(args, passes, blockIdx.x + 1) + thread) / count;
    routes.pass_begin[thread] = static_cast<int>(begin);
    routes.pass_end[thread] = static_cast<int>(end);
    routes.pass_width[thread] = tile_width(end - begin, args.up.epilogue.gated ? 3 : 4);
  }
  if (thread == 0) {
    routes.pass_row[passes] = smem.num_rows;
    if (passes == 0) routes.pass_row[1] = routes.pass_expert[0] = 0;
    smem.column_begin = static_cast<int>(columns_before(args, blockIdx.x));
    smem.column_end = static_cast<int>(columns_before(args, blockIdx.x + 1));
    smem.column_width = tile_width(smem.column_end - smem.column_begin, 4);
  }
  __syncthreads();
  return passes;
}

/// Columns [begin, end) of one product and one pass.
struct Tile {
  bool down;  // the second product
  int pass, expert, row, rows;
  int begin, end;
};

/// The block's tiles in the order that all its warps keep.
class Walk {
 public:
  __device__ Walk(const DecodeArgs& args, const Smem& smem, const Routes& routes, int passes)
      : args_(args), smem_(smem), routes_(routes), passes_(max(passes, 1)) {}

  /// The next tile; false when there is none. A tile without rows has nothing to copy and to multiply.
  __device__ __forceinline__ bool next(Tile& tile) {
    from_ += down_ && pass_ + 1 < passes_ ? 0 : width_;
    if (!down_) {
      while (from_ >= end_ && !down_) {
        down_ = ++pass_ == passes_;
        if (down_) {
          from_ = smem_.column_begin;
          end_ = smem_.column_end;
          width_ = smem_.column_width;
        } else {
          from_ = routes_.pass_begin[pass_];
          end_ = routes_.pass_end[pass_];
          width_ = routes_.pass_width[pass_];
        }
      }
    }
    if (down_) {
      if (++pass_ >= passes_) pass_ = 0;
      if (from_ >= end_) return false;
    }
    const int row = routes_.pass_row[pass_];
    tile = {down_,
            pass_,
            routes_.pass_expert[pass_],
            row,
            min(routes_.pass_row[pass_ + 1] - row, args_.rows),
            from_,
            min(end_, from_ + width_)};
    return true;
  }
  /// Whether the tile's columns of out are complete with it.
  __device__ bool is_last_pass(const Tile& tile) const { return tile.down && tile.pass == passes_ - 1; }

 private:
  const DecodeArgs& args_;
  const Smem& smem_;
  const Routes& routes_;
  int passes_;
  bool down_ = false;
  int pass_ = -1, from_ = 0, end_ = 0, width_ = 0;
};

/// A place in a ring of `size` slots.
struct Cursor {
  int size;
  int slot = 0;
  std::uint32_t parity = 0;

  __device__ explicit Cursor(int slots) : size(slots) {}
  __device__ __forceinline__ void advance() {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

/// Weight row `i` of a tile's 16, or -1.
__device__ __forceinline__ int weight_row(const Product& product, const Tile& tile, int i) {
  const EpilogueArgs& e = product.epilogue;
  const int column = tile.begin + (e.gated ? i % 8 : i);
  if (column >= tile.end) return -1;
  return !e.gated ? column : (i < 8 ? e.gate_first : e.up_first) + column * e.row_step;
}

/// Whole 16 bytes around the scales of a step.
struct Window {
  const std::byte* begin;
  int bytes;
};
template <class Format>
__device__ __forceinline__ Window scale_window(const std::byte* scales, int k, int depth) {
  const auto first = reinterpret_cast<std::uintptr_t>(scales + k / Format::kBlock * Format::kScaleBytes);
  const int length = (depth + Format::kBlock - 1) / Format::kBlock * Format::kScaleBytes;
  const std::uintptr_t begin = first & ~std::uintptr_t{15}, end = (first + length + 15) & ~std::uintptr_t{15};
  return {reinterpret_cast<const std::byte*>(begin), static_cast<int>(end - begin)};
}

/// Address in global memory of the scale of a tile's row `i` for k = 0.
__device__ __forceinline__ const std::byte* scales_of(const Product& product, const Tile& tile, int i) {
  return product.scales + tile.expert * product.scale_expert_pitch +
         (max(weight_row(product, tile, i), 0) >> product.scale_row_shift) * product.scale_row_pitch;
}

}  // namespace moecore::cuda::decode
