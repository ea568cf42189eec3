#pragma once
// Grouped GEMM on Hopper: out[r, f] = epilogue(sum_k weights[e(r), f, k] * x[row(r), k]), f32 accumulation.
//
// "Swap-AB": the weights are the tensor cores' A (M) operand and the tokens their B (N) operand, so a tile
// computes its weight rows for any multiple of 8 tokens, and the width is chosen tile by tile inside the
// kernel.
//
// A persistent block of 2, 3 or 4 warpgroups that compute, and one that brings what they read:
//   its first warp  copies weights with the copy engine and says what a step belongs to; of wide tiles also
//                   the token rows, where a tile's stand one behind the other in x (`boxes`);
//   the other three gather token rows by number, with cp.async, in the 128-byte swizzle of the copy engine,
//                   and what else a step needs. Beside busy tensor cores cp.async brings some 15 bytes a
//                   clock, which feeds bf16 but not fp8: there the boxes are 1.4 times as fast;
//   those before    multiply over a ring of steps of K, then run the epilogue, from registers through
//                   transposing buffers of 16 tokens x 64 columns or 32 x 32, so that whole lines of out, or
//                   halves, are written.
// full[s]: the weights' bytes and 96 gathering threads have arrived. empty[s]: all consumer warps are done.
//
// The weight rows of a step stand as [block][warpgroup][64]. When gated, every block is a box of its own that
// alternates eight gate and eight up rows; of two blocks the first has columns 0-7 of every 16 and the second
// 8-15. So the two values of a column meet in one thread, and a warpgroup's blocks make 32 or 64 adjacent
// columns of out.
//
// Work is dealt out by whole tiles or, stream-K, by equal runs of steps, when whole tiles would leave blocks
// idle. A run starts inside a tile: that part's f32 sums go to the block's slot of the workspace. The block
// that has the tile's first step adds the slots of the blocks behind it in their order: no atomics, the same
// bits on every run. A block waits only for sums that others leave before they wait themselves.
//
// How a step becomes sums is a main loop (sm90_float.cuh, sm90_fp8.cuh, sm90_decoded.cuh):
//   static constexpr Family kFamily
//   Element, Out             what tokens are copied as, and what is stored
//   kStepK                   depth of a step
//   kWeightLineBytes         of a step, of one weight row
//   kTokenLines              lines of 128 bytes in a step of one token
//   Widths<tiling>           of token tiles that are compiled
//   Extra                    what else a stage of the ring holds
//   kSharedSources           whether the places of a wide tile's rows stand in shared memory (fp4 is
//                            faster for it, bf16 5 to 9 % slower)
//   kQuantizesOut            whether gated tiles that hold whole blocks of scales can leave their rows as
//                            codes (sm90_quantized_store.cuh)
//   Gather                   the gathering threads' part of it: Gather(engine, work, thread).copy(stage, k)
//   multiply<N>(...)         the ring's steps of one work item, into d
//   compute(...)             instead, with its own epilogue, where a tile's tokens are the operand of rows
//                            (sm90_fp8_prefill.cuh)
//
// Sums run in ascending k. With whole tiles the bits of a row depend on x, the weights and K alone; with
// stream-K they also depend on where the tile is cut, that is on the counts of all experts.

#include <utility>

#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/epilogue.cuh"
#include "cuda/grouped_gemm/sm90.h"
#include "cuda/grouped_gemm/sm90_maps.h"
#include "cuda/grouped_gemm/sm90_ptx.cuh"
#include "cuda/grouped_gemm/sm90_quantized_store.cuh"
#include "cuda/grouped_gemm/tiles.cuh"
#include "cuda/types.cuh"

namespace moecore::cuda::sm90 {

inline constexpr int kGatherThreads = 96;
inline constexpr int kGatherRows = kGatherThreads / 8;  // eight 16-byte pieces make a row of a step

/// A tile, or the steps [begin, end) of it.
struct Work {
  Tile tile;
  int number;  // of the tile
  int begin, end;
};

template <class Loop, Tiling kTiling>
struct Smem {
  static constexpr TileConfig kConfig = tile_config(Loop::kFamily, kTiling);
  static constexpr int kWeightBytes = kConfig.rows() * Loop::kWeightLineBytes;
  static constexpr int kTokenLineBytes = kConfig.max_tokens * kLineBytes;  // one line of every token

  alignas(1024) std::byte weights[kConfig.stages][kWeightBytes];
  alignas(1024) std::byte tokens[kConfig.stages][Loop::kTokenLines][kTokenLineBytes];
  // 16 tokens x 64 columns or 32 x 32; where tokens are the operand of rows, half of a warpgroup's part.
  static constexpr int kBufferBytes =
      kConfig.tokens_are_rows() ? 32 * kConfig.rows() * static_cast<int>(sizeof(typename Loop::Out)) : 2048;
  alignas(1024) std::byte buffer[kConfig.warpgroups][2][kBufferBytes];
  [[no_unique_address]] typename Loop::template Extra<kConfig.max_tokens> extra[kConfig.stages];
  // Where the rows of a tile stand in x: here for wide tiles, so that a thread of few registers copies four
  // of them at a time, else with the threads that copy them.
  static constexpr bool kSharedSources = Loop::kSharedSources && kConfig.max_tokens > 32;
  alignas(16) std::uint32_t sources[kGatherRows][kSharedSources ? (kConfig.max_tokens + 47) / 48 * 4 : 4];
  static constexpr bool kQuantizesOut = Loop::kQuantizesOut && holds_scale_blocks(Loop::kFamily, kConfig);
  alignas(16) typename Loop::Out maxima[kQuantizesOut ? kQuantizedTokens : 0][kQuantizingWarps];
  Work work[kConfig.stages];  // that the step in the stage belongs to
  std::uint64_t full[kConfig.stages], empty[kConfig.stages];
  int group_tiles[kMaxExpertGroups];
};

/// 8, 16, ... up to the widest token tile.
template <class Eighths>
struct EveryWidth;
template <int... kEighths>
struct EveryWidth<std::integer_sequence<int, kEighths...>> {
  using type = std::integer_sequence<int, 8 * (kEighths + 1)...>;
};
template <Family kFamily, Tiling kTiling>
using every_width = typename EveryWidth<std::make_integer_sequence<
    int, kTileConfigs[static_cast<int>(kFamily)][static_cast<int>(kTiling)].max_tokens / 8>>::type;

/// A position in the ring, and the phase of its barriers.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

template <class Loop_, class Form_, Tiling kTiling_>
struct SwapAb {
  using Loop = Loop_;
  using Form = Form_;
  using T = typename Loop::Out;
  static constexpr Tiling kTiling = kTiling_;
  using Shared = Smem<Loop, kTiling>;
  static constexpr TileConfig kConfig = Shared::kConfig;
  using Ring = RingPosition<kConfig.stages>;
  static constexpr int kMaxTokens = kConfig.max_tokens;
  static constexpr int kBoxTokens = kConfig.box_tokens;
  static constexpr bool kTokensAreRows = kConfig.tokens_are_rows();
  static constexpr bool kEveryWidth = typename Loop::template Widths<kTiling>{}.size() == kMaxTokens / 8;
  static constexpr int kWarpgroups = kConfig.warpgroups, kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kBlocks = kConfig.blocks;  // of 64 weight rows in each warpgroup
  static constexpr int kBlockRows = 64 * kWarpgroups, kTileRows = kConfig.rows();  // of weights
  static constexpr int kTileColumns = Form::kGated ? kTileRows / 2 : kTileRows;    // of out
  static constexpr int kStoredColumns = Form::kGated ? 32 * kBlocks : 64;          // by a warpgroup at a time

  // What a thread gets at launch; the producers leave a part of it to the consumers. Whoever asks for more
  // than there is waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kConfig.threads() / 8 * 8, kProducerRegisters = 56;
  static constexpr int kConsumerRegisters =
      ((kWarpgroups + 1) * kLaunchRegisters - kProducerRegisters) / kWarpgroups / 8 * 8;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                (kWarpgroups + 1) * kLaunchRegisters);
  static_assert(kConfig.whole_boxes());
  static_assert(!kConfig.stream_k ||
                (kWarpgroups <= StreamK::kMaxWarpgroups && kTileRows * kMaxTokens <= StreamK::kSlotFloats));

  Shared& s;
  const Maps& maps;
  const GroupedGemmArgs& args;
  const StreamK& stream_k;
  const bool boxes;             // token rows come by the copy engine
  const int steps;              // of K
  const int tiles = 0;          // all of them; known with stream-K only
  const bool by_steps = false;  // deal out steps

  /// First of this block's steps, counted over all tiles.
  __device__ __forceinline__ int first_step(int block) const {
    return static_cast<int>(static_cast<std::int64_t>(tiles) * steps * block / gridDim.x);
  }

  /// This block's work in turn; every method is called by a whole warp.
  class Queue {
   public:
    __device__ explicit Queue(const SwapAb& engine)
        : engine_(engine),
          cursor_(engine.args, engine.s.group_tiles),
          next_(engine.by_steps ? engine.first_step(blockIdx.x) : blockIdx.x),
          end_(engine.by_steps ? engine.first_step(blockIdx.x + 1) : 0) {}

    /// tile.rows is 0 when there is no more.
    __device__ Work pop() {
      Work work{{0, 0, 0, 0}, next_, 0, engine_.steps};
      if (engine_.by_steps) {
        if (next_ >= end_) return work;
        work.number = next_ / engine_.steps;
        work.begin = next_ - work.number * engine_.steps;
        work.end = min(engine_.steps, work.begin + end_ - next_);
        next_ += work.end - work.begin;
      } else {
        next_ += gridDim.x;
      }
      work.tile = cursor_.find(work.number);
      return work;
    }

   private:
    const SwapAb& engine_;
    TileCursor cursor_;
    int next_, end_;
  };

  // ---- the warp that copies
  __device__ __forceinline__ void copy_boxes(bool evict_weights) {
    const bool leader = threadIdx.x % 32 == 0;
    Queue queue(*this);
    Ring at;
    for (;;) {
      const Work work = queue.pop();
      const Tile& tile = work.tile;
      if (tile.rows == 0) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        if (leader) {
          s.work[at.stage] = work;
          barrier_arrive(&s.full[at.stage]);
        }
        return;
      }
      const int token_boxes = token_boxes_of(tile);
      for (int k = work.begin; k < work.end; ++k) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        if (leader) {
          std::uint64_t* full = &s.full[at.stage];
          if (k == work.begin) s.work[at.stage] = work;
          barrier_arrive_expect(
              full, Shared::kWeightBytes + token_boxes * (Loop::kTokenLines * kBoxTokens * kLineBytes));
          copy_weight_rows(maps.weights, tile, k, s.weights[at.stage], full, evict_weights);
          if (token_boxes > 0) copy_token_rows(maps.x, tile, k, token_boxes, s.tokens[at.stage], full);
        }
        __syncwarp();
        at.advance();
      }
    }
  }

  /// One box of all rows; when gated, one for each block.
  static __device__ __forceinline__ void copy_weight_rows(const CUtensorMap& map, const Tile& tile, int step,
                                                          std::byte* to, std::uint64_t* full, bool evict) {
    constexpr int kBoxes = Form::kGated ? kBlocks : 1;
    const int k = step * Loop::kStepElements;
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      const int row = Form::kGated ? 8 * b : tile.weight_tile * kTileRows;
      const int units = Form::kGated ? tile.weight_tile * (kTileColumns / (8 * kBlocks)) : 0;
      std::byte* box = to + b * (kTileRows / kBoxes) * Loop::kWeightLineBytes;
      if (evict)
        copy_box(box, &map, full, k, row, 0, units, tile.expert, policy_evict_first());
      else
        copy_box(box, &map, full, k, row, 0, units, tile.expert);
    }
  }

  /// Boxes that bring a tile's token rows; what they bring of the rows behind is computed and not stored.
  __device__ __forceinline__ int token_boxes_of(const Tile& tile) const {
    if constexpr (kBoxTokens == 0)
      return 0;
    else
      return boxes ? (tile.rows + kBoxTokens - 1) / kBoxTokens : 0;
  }

  static __device__ __forceinline__ void copy_token_rows(const CUtensorMap& map, const Tile& tile, int step,
                                                         int boxes, std::byte (*to)[Shared::kTokenLineBytes],
                                                         std::uint64_t* full) {
    constexpr int kLineElements = kLineBytes / static_cast<int>(sizeof(typename Loop::Element));
    for (int line = 0; line < Loop::kTokenLines; ++line)
      for (int b = 0; b < boxes; ++b)
        copy_box(to[line] + b * (kBoxTokens * kLineBytes), &map, full,
                 (step * Loop::kTokenLines + line) * kLineElements, tile.row + b * kBoxTokens);
  }

  // ---- the warp that brings what a step needs beside its boxes
  __device__ __forceinline__ void copy_extras() {
    Queue queue(*this);
    Ring at;
    for (;;) {
      const Work work = queue.pop();
      const bool last = work.tile.rows == 0;
      typename Loop::template Gather<SwapAb> extra(*this, work, threadIdx.x % 32);
      for (int k = work.begin; k < (last ? work.begin + 1 : work.end); ++k) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        if (!last) extra.copy(at.stage, k);
        barrier_arrive_after_copies(&s.full[at.stage]);
        at.advance();
      }
      if (last) return;
    }
  }

  // ---- the gathering warps: thread t brings piece t % 8 of every line of rows t / 8, t / 8 + 12, ... of
  // every step. The columns that pad a tile to a multiple of 8 repeat its first row: they are computed and
  // not stored.
  __device__ __forceinline__ void gather_tokens() {
    // By fours, for few instructions: what is too much lands in rows that no tile has.
    constexpr int kRowsAtOnce = Shared::kSharedSources ? 4 : 1;
    constexpr int kRows =
        (kMaxTokens + kGatherRows * kRowsAtOnce - 1) / (kGatherRows * kRowsAtOnce) * kRowsAtOnce;
    constexpr int kPieceElements = 16 / sizeof(typename Loop::Element);
    const int thread = threadIdx.x - (kConsumerWarps + 1) * 32;
    const int piece = thread % 8, row = thread / 8;
    const std::uint32_t pitch = static_cast<std::uint32_t>(args.x_stride / kPieceElements);
    // 12 rows further a row's place in its group of eight changes by four: only bit 2 of the swizzle does.
    const std::uint32_t even = row * kLineBytes + (piece ^ (row & 7)) * 16;
    const std::uint32_t odd = row * kLineBytes + (piece ^ (row & 7) ^ 4) * 16;
    [[maybe_unused]] std::uint32_t own[Shared::kSharedSources ? 1 : kRows];  // where the rows stand in x
    [[maybe_unused]] std::uint32_t* sources = s.sources[row];

    Queue queue(*this);
    Ring at;
    for (;;) {
      const Work work = queue.pop();
      const Tile& tile = work.tile;
      if (tile.rows == 0) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        barrier_arrive(&s.full[at.stage]);
        return;
      }
      const int rows = ((tile.rows + 7) / 8 * 8 - row + kGatherRows - 1) / kGatherRows;  // of this thread
      auto source_of = [&](int i) {
        return static_cast<std::uint32_t>(x_row(tile, row + i * kGatherRows)) * pitch;
      };
      if (!boxes) {
        if constexpr (Shared::kSharedSources) {  // the eight threads of a row share the work
          __syncwarp();
          for (int i = piece; i < kRows; i += 8) sources[i] = source_of(i);
          __syncwarp();
        } else {
#pragma unroll
          for (int i = 0; i < kRows; ++i) own[i] = source_of(i);
        }
      }
      typename Loop::template Gather<SwapAb> extra(*this, work, thread);
      for (int k = work.begin; k < work.end; ++k) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#pragma unroll
        for (int line = 0; line < (boxes ? 0 : Loop::kTokenLines); ++line) {
          const std::uint32_t tokens = smem_address(s.tokens[at.stage][line]);
          const std::uint32_t to[2] = {tokens + even, tokens + odd};
          const int column = (k * Loop::kTokenLines + line) * 8 + piece;  // of 16 bytes; beyond K it is zero
          const int bytes = column * kPieceElements < args.k ? 16 : 0;
          const uint4* from = static_cast<const uint4*>(args.x) + (bytes ? column : 0);
          asm volatile("" : "+l"(from));  // one sum: else the compiler makes it anew for every row
#pragma unroll
          for (int i = 0; i < kRows; i += kRowsAtOnce) {
            auto copy = [&](int j, std::uint32_t source) {
              copy_16(to[j % 2] + j * kGatherRows * kLineBytes, from + source, bytes);
            };
            if constexpr (Shared::kSharedSources) {
              if (i >= rows) break;
              const uint4 four = *reinterpret_cast<const uint4*>(sources + i);
              const std::uint32_t source[kRowsAtOnce] = {four.x, four.y, four.z, four.w};
#pragma unroll
              for (int j = i; j < i + kRowsAtOnce; ++j)
                if ((j + 1) * kGatherRows <= kMaxTokens || j < rows) copy(j, source[j - i]);
            } else {
              if (i < rows) copy(i, own[i]);
            }
          }
        }
        extra.copy(at.stage, k);
        barrier_arrive_after_copies(&s.full[at.stage]);
        at.advance();
      }
    }
  }

  /// Row of x of a tile's row; those behind its end repeat the first.
  __device__ __forceinline__ int x_row(const Tile& tile, int row) const {
    const int from = tile.row + (row < tile.rows ? row : 0);
    return args.row_token ? args.row_token[from] : from;
  }

  /// Weight row that row `row` of the tile in shared memory stands for; the last one beyond them.
  __device__ __forceinline__ std::int64_t tile_row(const Tile& tile, int row) const {
    const EpilogueArgs& e = args.epilogue;
    if constexpr (Form::kGated) {
      const int column =
          min(e.columns - 1, tile.weight_tile * kTileColumns + row % kBlockRows / 16 * (8 * kBlocks) +
                                 row / kBlockRows * 8 + row % 8);
      return ((row % 16 < 8) != e.swapped ? e.gate_first : e.up_first) + std::int64_t{column} * e.row_step;
    } else {
      return min(e.columns - 1, tile.weight_tile * kTileRows + row);
    }
  }

  /// Weight row of a block that this consumer thread holds as `half` 0 or, eight rows down, 1.
  __device__ __forceinline__ std::int64_t weight_row(const Tile& tile, int block, int half) const {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
    return tile_row(tile, block * kBlockRows + warpgroup * 64 + warp * 16 + threadIdx.x % 32 / 4 + half * 8);
  }

  // ---- the computing warpgroups
  __device__ __forceinline__ void compute() {
    Ring at;
    for (;;) {
      barrier_wait(&s.full[at.stage], at.phase);
      const Work work = s.work[at.stage];
      if (work.tile.rows == 0) break;
      if constexpr (kTokensAreRows)
        Loop::compute(*this, work, at);
      else
        compute_of_width(work, (work.tile.rows + 7) / 8, at, typename Loop::template Widths<kTiling>{});
    }
    if constexpr (kTokensAreRows) Loop::settle();
  }

  /// The narrowest of the widths that holds the tile.
  template <int... kWidths>
  __device__ __forceinline__ void compute_of_width(const Work& work, int eighths, Ring& at,
                                                   std::integer_sequence<int, kWidths...>) {
    if constexpr (kEveryWidth)
      ((eighths == kWidths / 8 ? (compute<kWidths>(work, at), true) : false) || ...);
    else
      ((eighths <= kWidths / 8 ? (compute<kWidths>(work, at), true) : false) || ...);
  }

  template <int kTokens>
  __device__ __forceinline__ void compute(const Work& work, Ring& at) {
    float d[kBlocks][kTokens / 2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) d[m][i] = 0.0f;

    Loop::template multiply<kTokens>(*this, work, at, d);

    // Phase 2: parts of a tile meet, then the epilogue.
    if constexpr (kConfig.stream_k)
      if (!add_parts<kTokens>(work, d)) return;
    if (args.epilogue.row_weights) scale_rows<kTokens>(work.tile, d);
    store_products<kTokens>(work.tile, d);
  }

  /// Router weights on the products. Apart from the epilogue, whose loop must not branch on every value.
  template <int kTokens>
  __device__ __forceinline__ void scale_rows(const Tile& tile, float (&d)[kBlocks][kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      const int token = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const float w = token < tile.rows ? row_weight(args.epilogue, tile.row + token) : 0.0f;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        d[m][i / 2 * 4 + i % 2] *= w;
        d[m][i / 2 * 4 + i % 2 + 2] *= w;
      }
    }
  }

  /// The first part of a tile gets the sums of the others and returns true; the others leave theirs.
  template <int kTokens>
  __device__ __forceinline__ bool add_parts(const Work& work, float (&d)[kBlocks][kTokens / 2]) {
    constexpr int kFloats = kBlocks * kTokens / 2;
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    float* sums = stream_k.sums + warpgroup * (StreamK::kSlotFloats / kWarpgroups) + thread;
    if (work.begin > 0) {
      float* mine = sums + blockIdx.x * StreamK::kSlotFloats;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) __stcg(mine + i * 128, d[i / (kTokens / 2)][i % (kTokens / 2)]);
      __threadfence();
      warpgroup_sync(warpgroup);
      if (thread == 0) store_release(&stream_k.flags[kWarpgroups * blockIdx.x + warpgroup], StreamK::kRaised);
      return false;
    }
    const int tile_end = (work.number + 1) * steps;
    int reached = work.number * steps + work.end;
    for (int block = blockIdx.x + 1; reached < tile_end; ++block) {
      const int block_end = min(tile_end, first_step(block + 1));
      if (block_end == reached) continue;  // it has no steps at all
      reached = block_end;
      unsigned long long* flag = &stream_k.flags[kWarpgroups * block + warpgroup];
      while (load_acquire(flag) != StreamK::kRaised) {
      }
      const float* theirs = sums + block * StreamK::kSlotFloats;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) d[i / (kTokens / 2)][i % (kTokens / 2)] += __ldcg(theirs + i * 128);
      warpgroup_sync(warpgroup);
      if (thread == 0) *flag = 0;
    }
    return true;
  }

  /// Of a block, thread (warp w, lane l) holds rows 16w + l/4 (and + 8) of tokens 8g + 2(l%4) (and + 1):
  /// d[m][4g], d[m][4g + 1] and, eight rows down, d[m][4g + 2], d[m][4g + 3].
  template <int kTokens>
  __device__ __forceinline__ void store_products(const Tile& tile, const float (&d)[kBlocks][kTokens / 2]) {
    const EpilogueArgs& e = args.epilogue;
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if constexpr (Form::kGated) {
      const int column = tile.weight_tile * kTileColumns + warpgroup * kStoredColumns;
      BiasPair bias[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        bias[m] = bias_pair<T, Form>(e, tile.expert, column + warp * (8 * kBlocks) + m * 8 + lane / 4);
      auto pack = [&](int g, int m) {
        const float a0 = d[m][g * 4] + bias[m].first, a1 = d[m][g * 4 + 1] + bias[m].first;
        const float b0 = d[m][g * 4 + 2] + bias[m].second, b1 = d[m][g * 4 + 3] + bias[m].second;
        return pack_pair<T>(Form::apply(e, e.swapped ? b0 : a0, e.swapped ? a0 : b0),
                            Form::apply(e, e.swapped ? b1 : a1, e.swapped ? a1 : b1));
      };
      if constexpr (Shared::kQuantizesOut)
        if (args.quantized_out.codes) return store_quantized<kTokens>(*this, tile, pack);
      warpgroup_sync(warpgroup);  // the buffers of the tile before have been read
      store_columns<kTokens, 0>(tile, column, pack);
    } else {
      warpgroup_sync(warpgroup);
      auto store_block = [&]<int kBlock>() {
        const int column = tile.weight_tile * kTileRows + kBlock * kBlockRows + warpgroup * 64;
        const BiasPair bias = bias_pair<T, Form>(e, tile.expert, column + warp * 16 + lane / 4);
        store_columns<kTokens, kBlock>(tile, column, [&](int g, int half) {
          const float b = half ? bias.second : bias.first;
          const float* p = d[kBlock] + g * 4 + 2 * half;
          return pack_pair<T>(Form::apply(e, p[0] + b), Form::apply(e, p[1] + b));
        });
      };
      store_block.template operator()<0>();
      if constexpr (kBlocks == 2) store_block.template operator()<1>();
    }
  }

  /// A warpgroup's columns of all tokens, the kBlock-th of a tile. pack(g, half): this lane's two tokens of
  /// group g in its column of the left or right eight of the warp's columns.
  template <int kTokens, int kBlock, class Pack>
  __device__ __forceinline__ void store_columns(const Tile& tile, int first_column, const Pack& pack) {
    // A matrix holds eight tokens of eight columns; a warp stores four at once.
    constexpr int kHalves = kStoredColumns / 32, kGroupsAtOnce = 4 / kHalves;
    constexpr int kGroups = kTokens / 8, kChunks = (kGroups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    constexpr int kPieces = kStoredColumns / 8;  // of 16 bytes in a row
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32,
              lane = thread % 32;
    // A row's pieces are swizzled so that eight rows of a matrix fall into different banks.
    auto offset = [](int row, int piece) {
      return row * (16 * kPieces) + (piece ^ (row / (8 / kPieces) & (kPieces - 1))) * 16;
    };
    const int to = offset(lane % (8 * kGroupsAtOnce), warp * kHalves + lane / (8 * kGroupsAtOnce));
    const int row = thread / kPieces, column = first_column + thread % kPieces * 8;
    T* out = static_cast<T*>(args.epilogue.out) + tile.row * args.epilogue.out_stride + column;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int token = c * 8 * kGroupsAtOnce;
      if constexpr (!kEveryWidth)
        if (token >= tile.rows) break;
      // Two buffers take turns, also from block to block: who writes one has passed the barrier behind its
      // reads.
      std::byte* buffer = s.buffer[warpgroup][(kBlock * kChunks + c) % 2];
      std::uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int g = c * kGroupsAtOnce + i % kGroupsAtOnce;
        v[i] = g < kGroups ? pack(g, i / kGroupsAtOnce) : 0;
      }
      store_matrices<true>(smem_address(buffer) + to, v);
      warpgroup_sync(warpgroup);
      if (token + row < tile.rows && column < args.epilogue.columns)
        *reinterpret_cast<uint4*>(out + (token + row) * args.epilogue.out_stride) =
            *reinterpret_cast<const uint4*>(buffer + offset(row, thread % kPieces));
    }
  }
};

template <class Loop, class Form, Tiling kTiling>
__global__ void __launch_bounds__(tile_config(Loop::kFamily, kTiling).threads(), 1)
    swap_ab_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GroupedGemmArgs args,
                   const __grid_constant__ StreamK stream_k, const bool boxes, const bool evict_weights) {
  using Engine = SwapAb<Loop, Form, kTiling>;
  constexpr TileConfig kConfig = Engine::kConfig;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& s = *reinterpret_cast<Smem<Loop, kTiling>*>(raw);
  if (threadIdx.x == 0) {
    prefetch_map(&maps.weights);
    if (Engine::kBoxTokens > 0 && boxes) prefetch_map(&maps.x);
    if (Engine::kTokensAreRows) prefetch_map(&maps.out);
    for (int i = 0; i < kConfig.stages; ++i) {
      barrier_init(&s.full[i], 1 + (Engine::kTokensAreRows ? 32 : kGatherThreads));
      barrier_init(&s.empty[i], Engine::kConsumerWarps);
    }
    barrier_init_fence();
  }
  // With settled offsets the weights stream in beside the end of the kernel before. x, out and the workspace
  // wait.
  if (!args.offsets_settled) dev::wait_for_predecessor();
  count_group_tiles(args, s.group_tiles);
  const bool by_steps = kConfig.stream_k && stream_k.enabled;
  __syncthreads();

  Engine engine{s,
                maps,
                args,
                stream_k,
                Engine::kTokensAreRows || (Engine::kBoxTokens > 0 && boxes),
                (args.k + Loop::kStepK - 1) / Loop::kStepK,
                by_steps ? count_tiles(args, s.group_tiles) : 0,
                by_steps};
  if (threadIdx.x >= Engine::kConsumerWarps * 32) {
    give_registers<Engine::kProducerRegisters>();
    if (threadIdx.x < (Engine::kConsumerWarps + 1) * 32) {
      if (engine.boxes) dev::wait_for_predecessor();
      engine.copy_boxes(evict_weights);
    } else {
      dev::wait_for_predecessor();
      dev::release_successor();  // not before: whoever follows may rely on what preceded this kernel
      if constexpr (!Engine::kTokensAreRows)
        engine.gather_tokens();
      else if (threadIdx.x < (Engine::kConsumerWarps + 2) * 32)
        engine.copy_extras();
    }
  } else {
    take_registers<Engine::kConsumerRegisters>();
    dev::wait_for_predecessor();
    if (by_steps && threadIdx.x % 128 == 0)
      stream_k.flags[Engine::kWarpgroups * blockIdx.x + threadIdx.x / 128] = 0;
    engine.compute();
  }
}

template <class Loop, Tiling kTiling, bool kGated>
Kernel kernel() {
  static_assert(sizeof(Smem<Loop, kTiling>) <= 227 * 1024);  // what a block may have on sm_90
  using Form = std::conditional_t<kGated, SigmoidGate, Linear>;
  return {reinterpret_cast<const void*>(swap_ab_kernel<Loop, Form, kTiling>), sizeof(Smem<Loop, kTiling>)};
}

}  // namespace moecore::cuda::sm90
