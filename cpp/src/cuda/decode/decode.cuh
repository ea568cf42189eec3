#pragma once
// The expert layer as one persistent kernel, for a handful of tokens: routing, both products, the weighted
// sum.
//
// At these sizes the layer is a read of the touched experts' weights, so everything serves one stream that
// never stops. A block per SM, 19 warps:
//   0-3     copy weight rows into a ring of stages, whose depth covers the time that anything else takes;
//   4-5     copy into the same stages the token rows that the weights are multiplied with;
//   6-9     epilogues, a tile each in turn: sum of the partial products, bias, activation;
//   10      tells the other blocks which intermediate columns are there;
//   11-18   mma.sync on the stages: 16 weight rows x 8 tokens, every warp its share of a step's depth.
//
// Work. The routes are sorted by expert into passes of at most `rows` rows of one expert. Block b owns of
// every pass's intermediate columns the range [(F(b) + pass) / passes, (F(b + 1) + pass) / passes), where
// F(b) is its share of all columns of all passes: neighbours differ by at most one column in all, and every
// block reads of every expert. Then it owns columns [H b / B, H (b + 1) / B) of out, for all passes, so that
// out's weighted sum needs no other block. F is shifted so that blocks with fewer columns of out have more of
// the others.
//   up:    for each pass, for each tile of up to 8 gate and 8 up rows (16 without a gate), for each step of k
//   down:  for each tile of up to 16 columns of out, for each pass, for each step of k
// All warps walk this list for themselves.
//
// Between the products stands no barrier: a block adds the columns it has stored to a counter of the pass,
// and warps 4-5 wait until a pass is whole, in the order in which blocks make them. Weights of the second
// product are on their way meanwhile.
//
// Rounding: products in f32 (a warp's chunks in ascending k, then the warps in order), rounded once to T
// after bias and activation, and once after the second bias; the sum over a token's slots is an f32 fma chain
// in slot order. Nothing depends on which block does what, so the bits are the same on every run; they may
// differ from those of the composition in the order of the sums along k.

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/decode/args.h"
#include "cuda/decode/formats.cuh"
#include "cuda/decode/ptx.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/epilogue.cuh"

namespace moecore::cuda::decode {

inline constexpr int kBarrierEpilogues = 1;  // named barrier 0 is __syncthreads

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

__device__ inline int local_expert(const DecodeArgs& args, int route) {
  const int t = static_cast<int>(args.by_top_k.divide(route));
  const std::int64_t i = t * args.ids_stride + (route - t * args.top_k);
  std::int64_t id = args.ids_are_i64 ? static_cast<const std::int64_t*>(args.ids)[i]
                                     : static_cast<const std::int32_t*>(args.ids)[i];
  if (args.expert_map)
    id = id >= 0 && id < args.num_global ? args.expert_map[id] : -1;
  else
    id -= args.first_expert;
  return id >= 0 && id < args.num_experts ? static_cast<int>(id) : -1;
}

__device__ inline float router_weight(const DecodeArgs& args, int route) {
  const int t = static_cast<int>(args.by_top_k.divide(route));
  const std::int64_t i = t * args.router_weights_stride + (route - t * args.top_k);
  switch (args.router_weight_dtype) {
    case DType::kF16:
      return dev::to_f32(static_cast<const __half*>(args.router_weights)[i]);
    case DType::kBF16:
      return dev::to_f32(static_cast<const __nv_bfloat16*>(args.router_weights)[i]);
    default:
      return static_cast<const float*>(args.router_weights)[i];
  }
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
  const int expert = thread < n ? local_expert(args, thread) : -1;
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

/// The same value, known to the compiler to be that of all lanes.
__device__ __forceinline__ int uniform(int value) {
  return __shfl_sync(~0u, value, 0);
}

/// The weight warps: the first lane of warp w copies rows w * kRows to (w + 1) * kRows - 1 of a tile and,
/// where scales travel along, the windows around theirs.
template <class Format>
__device__ void copy_weights(const DecodeArgs& args, Smem& smem, std::byte* ring, Walk walk) {
  constexpr int kRows = kTileRows / kWeightWarps;
  constexpr bool kScales = Format::kBlock > 0;
  const int first = uniform(threadIdx.x / 32 * kRows);
  const bool leads = threadIdx.x % 32 == 0;
  const std::uint64_t policy = policy_evict_first();
  const std::uint32_t ring_at = smem_address(ring);
  Cursor stage(args.stages), landing(args.stages);
  int in_flight = 0;
  for (Tile tile; walk.next(tile);) {
    if (tile.rows == 0) continue;
    tile.begin = uniform(tile.begin);
    tile.end = uniform(tile.end);
    tile.expert = uniform(tile.expert);
    const Product& product = uniform(tile.down) ? args.down : args.up;
    const Steps& steps = product.steps;
    const std::byte* from[kRows];
    const std::byte* scales[kRows] = {};
    bool there[kRows];
    int rows = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = weight_row(product, tile, first + r);
      there[r] = row >= 0;
      rows += there[r];
      from[r] = product.weights + tile.expert * product.expert_pitch + row * product.row_pitch;
      if constexpr (kScales) scales[r] = scales_of(product, tile, first + r);
    }
    for (int k = 0; k < product.k; k += steps.depth) {
      const int depth = min(steps.depth, product.k - k), bytes = depth * Format::kBits / 8;
      barrier_wait(&smem.empty[stage.slot], stage.parity ^ 1);
      if (in_flight == args.flight) {
        barrier_wait(&smem.weights[landing.slot], landing.parity);
        landing.advance();
      } else {
        ++in_flight;
      }
      __syncwarp();  // a lane that still waits must not miss the phase that the copies end
      if (leads) {
        const std::uint32_t barrier = smem_address(&smem.weights[stage.slot]);
        const std::uint32_t to = ring_at + stage.slot * args.stage_bytes;
        int all = rows * bytes;
        if constexpr (kScales) {
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (there[r]) all += scale_window<Format>(scales[r], k, depth).bytes;
        }
        barrier_arrive_expect(barrier, all);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (!there[r]) continue;
          copy_row(to + (first + r) * steps.weight_pitch, from[r], bytes, barrier, policy);
          if constexpr (kScales) {
            const Window window = scale_window<Format>(scales[r], k, depth);
            copy_row(to + kTileRows * steps.weight_pitch + (first + r) * steps.scale_pitch, window.begin,
                     window.bytes, barrier, policy);
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kRows; ++r) from[r] += bytes;
      stage.advance();
    }
  }
}

/// The token warps: lane l of warp w copies row l * kTokenWarps + w of a pass.
__device__ inline void copy_tokens(const DecodeArgs& args, Smem& smem, std::byte* ring, const Routes& routes,
                                   int passes, Walk walk) {
  const int lane = threadIdx.x % 32, i = lane * kTokenWarps + threadIdx.x / 32 - kWeightWarps;
  Progress& progress = *args.progress;
  int ready = -1;  // passes whose intermediate rows are known to be whole; -1: no counter was looked at yet
  // A lane looks at a pass, so that one trip to the L2 cache tells of 32.
  auto await_pass = [&](int pass) {
    if (pass < ready) return;
    if (ready < 0) {
      while (load_acquire(&progress.open) != Progress::kOpen) {
      }
      ready = 0;
    }
    while (ready <= pass) {
      const int mine = ready + lane;
      const bool whole =
          mine < passes && load_relaxed(&progress.ready[mine]) == static_cast<unsigned>(args.inter);
      const unsigned missing = ~__ballot_sync(~0u, whole);
      ready += missing ? __ffs(missing) - 1 : 32;
    }
    fence_gpu();
    __syncwarp();
    fence_proxy();
  };

  Cursor stage(args.stages);
  bool looks = true;  // at the counters
  auto leave = [&] {
    looks = false;
    await_pass(passes - 1);
    __syncwarp();
    if (lane == 0 && atomicAdd(&progress.left, 1) == gridDim.x * kTokenWarps - 1) progress.open = 0;
  };
  for (Tile tile; walk.next(tile);) {
    const Product& product = tile.down ? args.down : args.up;
    const Steps& steps = product.steps;
    const std::byte* from;
    if (tile.rows == 0) continue;
    if (tile.down) {
      await_pass(tile.pass);
      from = args.inter_rows + (tile.row + i) * args.inter_pitch;
    } else {
      from = args.x + routes.row_token[tile.row + min(i, tile.rows - 1)] * args.x_pitch;
    }
    const int rows = __popc(__ballot_sync(~0u, i < tile.rows));
    std::byte* to = ring + kTileRows * (steps.weight_pitch + steps.scale_pitch) + i * steps.x_pitch;
    for (int k = 0; k < product.k; k += steps.depth) {
      const int bytes = min(steps.depth, product.k - k) * 2;
      barrier_wait(&smem.empty[stage.slot], stage.parity ^ 1);
      __syncwarp();
      const std::uint32_t barrier = smem_address(&smem.tokens[stage.slot]);
      if (lane == 0) barrier_arrive_expect(barrier, rows * bytes);
      __syncwarp();
      if (i < tile.rows)
        copy_row(smem_address(to) + stage.slot * args.stage_bytes, from + std::int64_t{k} * 2, bytes,
                 barrier);
      stage.advance();
    }
    if (looks && walk.is_last_pass(tile)) leave();
  }
  if (looks) leave();
}

/// What a lane reads of a step: of weight rows g and g + 8 and of token row g the eight elements from 8q of a
/// chunk on.
struct LaneView {
  const std::byte *low, *high, *token;  // of chunk 0
  const std::byte *low_scales, *high_scales;
};

/// c += weights . tokens over kCount chunks of a step: first, first + stride, ... kTail: only the first
/// `depth` of the chunk are there. The loads of all chunks stand before the first product.
template <class T, class Format, int kCount, bool kTail>
__device__ __forceinline__ void multiply_chunks(const LaneView& view, int first, int stride, int depth,
                                                float (&c)[4][4]) {
  using Codes = typename Format::Codes;
  constexpr int kChunkBytes = kChunk * Format::kBits / 8;
  const int q = threadIdx.x % 4;
  Codes low[kCount] = {}, high[kCount] = {};
  uint4 x[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chunk = first + i * stride;
    if (kTail && q * 8 >= depth) continue;
    low[i] = *reinterpret_cast<const Codes*>(view.low + chunk * kChunkBytes);
    high[i] = *reinterpret_cast<const Codes*>(view.high + chunk * kChunkBytes);
    x[i] = *reinterpret_cast<const uint4*>(view.token + chunk * kChunk * 2);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    constexpr bool kScaledParts = Format::kBlock == kChunk, kScaledCodes = Format::kBlock == kChunk / 2;
    const int chunk = first + i * stride;
    uint4 a, b;
    if constexpr (kScaledCodes) {
      a = Format::decode_scaled(low[i], view.low_scales + chunk * 2 + q / 2);
      b = Format::decode_scaled(high[i], view.high_scales + chunk * 2 + q / 2);
    } else {
      a = Format::decode(low[i]);
      b = Format::decode(high[i]);
    }
    const unsigned first_half[4] = {a.x, b.x, a.y, b.y}, second_half[4] = {a.z, b.z, a.w, b.w};
    if constexpr (kScaledParts) {
      float part[4] = {};
      mma(part, first_half, x[i].x, x[i].y, T{});
      mma(part, second_half, x[i].z, x[i].w, T{});
      const float low_scale = Format::scale(view.low_scales + chunk * Format::kScaleBytes),
                  high_scale = Format::scale(view.high_scales + chunk * Format::kScaleBytes);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        c[i % 4][n] = __fmaf_rn(part[n], n < 2 ? low_scale : high_scale, c[i % 4][n]);
    } else {
      mma(c[2 * i % 4], first_half, x[i].x, x[i].y, T{});
      mma(c[(2 * i + 1) % 4], second_half, x[i].z, x[i].w, T{});
    }
  }
}

/// Chunks first, first + stride, ... up to `chunks`, then, if it falls to this warp, the rest of `depth`.
template <class T, class Format>
__device__ __forceinline__ void multiply_strided(const LaneView& view, int first, int stride, int chunks,
                                                 int rest, float (&c)[4][4]) {
  int chunk = first;
  for (; chunk + 3 * stride < chunks; chunk += 4 * stride)
    multiply_chunks<T, Format, 4, false>(view, chunk, stride, kChunk, c);
  if (chunk + stride < chunks) {
    multiply_chunks<T, Format, 2, false>(view, chunk, stride, kChunk, c);
    chunk += 2 * stride;
  }
  if (chunk < chunks) {
    multiply_chunks<T, Format, 1, false>(view, chunk, stride, kChunk, c);
    chunk += stride;
  }
  if (chunk == chunks && rest > 0) multiply_chunks<T, Format, 1, true>(view, chunk, stride, rest, c);
}

/// The MMA warps: sums[row][token] = weights[row] . x[token], over this warp's share of every step. A lane
/// without a token reads the last one again: its columns are nobody's.
template <class T, class Format>
__device__ void multiply(const DecodeArgs& args, Smem& smem, std::byte* ring, Walk walk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kFirstMmaWarp;
  const int g = lane / 4, q = lane % 4;
  Cursor stage(args.stages), tiles(kEpilogueWarps);
  for (Tile tile; walk.next(tile);) {
    if (tile.rows == 0) continue;
    const Product& product = tile.down ? args.down : args.up;
    const Steps& steps = product.steps;
    // Where in its window a row's first scale stands: the windows begin at multiples of 16 bytes.
    unsigned shifts[2] = {};
    if constexpr (Format::kBlock > 0)
      for (int half = 0; half < 2; ++half)
        shifts[half] =
            static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(scales_of(product, tile, g + half * 8)));
    float c[4][4] = {};
    for (int k = 0; k < product.k; k += steps.depth) {
      const int depth = min(steps.depth, product.k - k);
      const std::byte* weights = ring + stage.slot * args.stage_bytes;
      const std::byte* scales = weights + kTileRows * steps.weight_pitch;
      LaneView view;
      view.low = weights + g * steps.weight_pitch + q * static_cast<int>(sizeof(typename Format::Codes));
      view.high = view.low + 8 * steps.weight_pitch;
      view.token = scales + kTileRows * steps.scale_pitch + min(g, tile.rows - 1) * steps.x_pitch + q * 16;
      if constexpr (Format::kBlock > 0) {
        const auto at = static_cast<unsigned>(k / Format::kBlock * Format::kScaleBytes);
        view.low_scales = scales + g * steps.scale_pitch + (shifts[0] + at) % 16;
        view.high_scales = scales + (g + 8) * steps.scale_pitch + (shifts[1] + at) % 16;
      }
      barrier_wait(&smem.weights[stage.slot], stage.parity);
      barrier_wait(&smem.tokens[stage.slot], stage.parity);
      if constexpr (Format::kBlock > kChunk) {
        constexpr int kSpan = Format::kBlock / kChunk;
        for (int span = warp; span * Format::kBlock < depth; span += kMmaWarps) {
          float part[4][4] = {};
          const int left = depth - span * Format::kBlock;
          multiply_strided<T, Format>(view, span * kSpan, 1, span * kSpan + min(kSpan, left / kChunk),
                                      left < Format::kBlock ? left % kChunk : 0, part);
          const float scale[2] = {Format::scale(view.low_scales + span * Format::kScaleBytes),
                                  Format::scale(view.high_scales + span * Format::kScaleBytes)};
#pragma unroll
          for (int n = 0; n < 4; ++n)
            c[0][n] = __fmaf_rn((part[0][n] + part[1][n]) + (part[2][n] + part[3][n]), scale[n / 2], c[0][n]);
        }
      } else {
        multiply_strided<T, Format>(view, warp, kMmaWarps, depth / kChunk, depth % kChunk, c);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&smem.empty[stage.slot]);
      stage.advance();
    }
    auto sum = [&](int n) { return (c[0][n] + c[1][n]) + (c[2][n] + c[3][n]); };
    barrier_wait(&smem.taken[tiles.slot], tiles.parity ^ 1);
    auto& sums = smem.partials[tiles.slot].sums[warp];
    *reinterpret_cast<float2*>(&sums[g][2 * q]) = {sum(0), sum(1)};
    *reinterpret_cast<float2*>(&sums[g + 8][2 * q]) = {sum(2), sum(3)};
    __syncwarp();
    if (lane == 0) barrier_arrive(&smem.summed[tiles.slot]);
    tiles.advance();
  }
}

/// Not inlined: the kinds' code once.
__device__ __noinline__ inline float apply_activation(const EpilogueArgs& e, float gate, float up) {
  const ActivationParams params{e.alpha, e.beta, e.limit};
  float y = 0.0f;
  auto apply = [&]<ActivationKind kKind>() {
    y = e.gated ? activate_gated<kKind>(gate, up, params) : activate_plain<kKind>(gate, params);
  };
  using enum ActivationKind;
  switch (e.kind) {
    case kSilu:
      apply.template operator()<kSilu>();
      break;
    case kGelu:
      apply.template operator()<kGelu>();
      break;
    case kGeluTanh:
      apply.template operator()<kGeluTanh>();
      break;
    case kQuickGelu:
      apply.template operator()<kQuickGelu>();
      break;
    case kRelu:
      apply.template operator()<kRelu>();
      break;
    case kRelu2:
      apply.template operator()<kRelu2>();
      break;
    case kSwigluOai:
      apply.template operator()<kSwigluOai>();
      break;
  }
  return y;
}

/// The product of weight row `row`, row `i` of the tile, with one token.
template <class Format>
__device__ __forceinline__ float sum_partials(const Product& product, const Partials& partials, int expert,
                                              int row, int i, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kMmaWarps; ++w) sum += partials.sums[w][i][token];
  if constexpr (Format::kRowScales)
    sum *= *reinterpret_cast<const float*>(product.row_scales + expert * product.row_scale_expert_pitch +
                                           row * product.row_scale_pitch);
  if constexpr (Format::kGlobalScales)
    if (product.global_scales)
      sum *= __frcp_rn(product.global_scales[product.global_scale_per_expert ? expert : 0]);
  return sum;
}

/// The epilogue warps.
template <class T, class Format>
__device__ void finish(const DecodeArgs& args, Smem& smem, const Routes& routes, T* products, Walk walk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kFirstEpilogueWarp;
  const Partials& partials = smem.partials[warp];
  std::uint32_t parity = 0;
  int tile_number = 0;

  auto finish_tile = [&](const Tile& tile) {
    const Product& product = tile.down ? args.down : args.up;
    const EpilogueArgs& e = product.epilogue;
    const int log2_width = e.gated ? 3 : 4;
#pragma unroll 1
    for (int i = lane; i < tile.rows << log2_width; i += 32) {
      const int at = i & ((1 << log2_width) - 1), token = i >> log2_width, column = tile.begin + at;
      if (column >= tile.end) continue;
      const int row = tile.row + token, route = routes.row_route[row];
      const float weight = args.weight_on_input && !tile.down ? routes.weight[route] : 1.0f;
      // Of the gate, then of the up part.
      float value[2] = {};
#pragma unroll 1
      for (int half = 0; half < (e.gated ? 2 : 1); ++half) {
        const int matrix_row = !e.gated ? column : (half ? e.up_first : e.gate_first) + column * e.row_step;
        const float sum = sum_partials<Format>(product, partials, tile.expert, matrix_row,
                                               at + half * (kTileRows / 2), token);
        const float y = __fmaf_rn(sum, weight, bias_of<T>(e, tile.expert, matrix_row));
        half ? value[1] = y : value[0] = y;
      }
      if (tile.down) {
        products[route * kTileRows + at] = dev::from_f32<T>(value[0]);
        continue;
      }
      const float y = args.sigmoid_gate ? SigmoidGate::apply(e, value[0], value[1])
                                        : apply_activation(e, value[0], value[1]);
      reinterpret_cast<T*>(args.inter_rows + row * args.inter_pitch)[column] = dev::from_f32<T>(y);
    }
  };
  // out[begin .. end) of all tokens, from the products of all passes.
  auto combine = [&](int begin, int end) {
    named_barrier(kBarrierEpilogues, kEpilogueWarps * 32);
#pragma unroll 1
    for (int i = warp * 32 + lane; i < args.num_tokens * kTileRows; i += kEpilogueWarps * 32) {
      const int t = i / kTileRows, at = i % kTileRows, column = begin + at;
      if (column >= end) continue;
      float sum = 0.0f;
#pragma unroll 2
      for (int j = 0; j < args.top_k; ++j) {
        const int route = t * args.top_k + j;
        const float weight = args.weight_on_input ? 1.0f : routes.weight[route];
        const float next = __fmaf_rn(weight, dev::to_f32(products[route * kTileRows + at]), sum);
        sum = routes.expert[route] >= 0 ? next : sum;
      }
      if (args.residual)
        sum = __fadd_rn(sum,
                        dev::to_f32(static_cast<const T*>(args.residual)[t * args.residual_stride + column]));
      static_cast<T*>(args.out)[t * args.out_stride + column] = dev::from_f32<T>(sum);
    }
    named_barrier(kBarrierEpilogues, kEpilogueWarps * 32);
  };

  for (Tile tile; walk.next(tile);) {
    if (tile.rows > 0 && tile_number++ % kEpilogueWarps == warp) {
      barrier_wait(&smem.summed[warp], parity);
      parity ^= 1;
      finish_tile(tile);
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(&smem.taken[warp]);
        if (!tile.down) store_release_block(&smem.stored[warp], (tile_number - 1) / kEpilogueWarps + 1);
      }
    }
    if (walk.is_last_pass(tile)) combine(tile.begin, tile.end);
  }
}

/// The publisher: adds to the passes' counters the columns that the epilogue warps have stored. A fence takes
/// a microsecond or more under load, so one covers all tiles that are there.
__device__ inline void publish(const DecodeArgs& args, Smem& smem, Walk walk) {
  if (threadIdx.x % 32 != 0) return;
  Progress& progress = *args.progress;
  int tile_number = 0, pass = 0, columns = 0;
  auto is_stored = [&] {
    return load_acquire_block(&smem.stored[tile_number % kEpilogueWarps]) > tile_number / kEpilogueWarps;
  };
  auto flush = [&] {
    if (columns > 0) add_relaxed(&progress.ready[pass], static_cast<unsigned>(columns));
    columns = 0;
  };
  int fenced = 0;  // tiles that a fence covers
  for (Tile tile; walk.next(tile) && !tile.down;) {
    // Not earlier: only a block with columns to tell of can be sure that the others wait for it.
    if (tile_number == 0)
      while (load_acquire(&progress.open) != Progress::kOpen) {
      }
    if (tile_number == fenced) {
      flush();
      while (!is_stored()) __nanosleep(20);
      const int first = tile_number;
      while (++tile_number - first < kEpilogueWarps && is_stored()) {
      }
      fenced = tile_number;
      tile_number = first;
      fence_gpu();
    }
    if (tile.pass != pass) flush();
    pass = tile.pass;
    columns += tile.end - tile.begin;
    ++tile_number;
  }
  flush();
}

template <class T, class Format>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte memory[];
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  const int num_routes = args.num_tokens * args.top_k, warp = threadIdx.x / 32;
  const Routes routes(memory + routes_offset(), num_routes);
  T* products = reinterpret_cast<T*>(memory + products_offset(num_routes));
  std::byte* ring = memory + ring_offset(num_routes);

  if (threadIdx.x < kMaxStages) {
    barrier_init(&smem.weights[threadIdx.x], kWeightWarps);
    barrier_init(&smem.tokens[threadIdx.x], kTokenWarps);
    barrier_init(&smem.empty[threadIdx.x], kMmaWarps);
    if (threadIdx.x < kEpilogueWarps) {
      barrier_init(&smem.summed[threadIdx.x], kMmaWarps);
      barrier_init(&smem.taken[threadIdx.x], 1);
    }
    fence_proxy();
  }
  dev::wait_for_predecessor();
  dev::release_successor();
  const int passes = sort_routes(args, smem, routes);
  if (blockIdx.x == 0 && warp == kFirstEpilogueWarp) {
    Progress& progress = *args.progress;
    for (int i = threadIdx.x % 32; i < passes; i += 32) progress.ready[i] = 0;
    if (threadIdx.x % 32 == 0) progress.left = 0;
    __syncwarp();
    if (threadIdx.x % 32 == 0) store_release(&progress.open, Progress::kOpen);
  }
  const Walk walk(args, smem, routes, passes);
  if (warp < kWeightWarps)
    copy_weights<Format>(args, smem, ring, walk);
  else if (warp < kFirstEpilogueWarp)
    copy_tokens(args, smem, ring, routes, passes, walk);
  else if (warp < kPublisherWarp)
    finish<T, Format>(args, smem, routes, products, walk);
  else if (warp == kPublisherWarp)
    publish(args, smem, walk);
  else
    multiply<T, Format>(args, smem, ring, walk);
#endif
}

}  // namespace moecore::cuda::decode
