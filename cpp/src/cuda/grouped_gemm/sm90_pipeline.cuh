#pragma once
// What all grouped GEMM kernels on Hopper share: how a persistent block gets its work, and how what it
// multiplies gets into shared memory.
//
//   out[r, f] = epilogue(sum_k weights[e(r), f, k] * x[row(r), k]), f32 accumulation
//
// The block has 2, 3 or 4 warpgroups that compute, and one that brings what they read. Of this one
//   warp 0  finds work, says to those that compute or gather what a step belongs to (s.work), and copies
//           weights with the copy engine;
//   warp 1  copies token rows with it, where a tile's stand one behind the other in x (`boxes`), and where
//           tokens are the operand of rows their scales, a column of them a step. Otherwise warps 1 to 3
//           gather rows by number, with cp.async, in the 128-byte swizzle of the copy engine. Beside busy
//           tensor cores cp.async brings some 15 bytes a clock: it feeds bf16 but not fp8;
//   warp 2  brings what else a step needs, where no warp gathers.
// Warps 1 and 2 of such tiles find their work themselves, in turn, as warp 0 does.
// The others multiply over a ring of steps of K, then run the epilogue.
// full[s]: all that copy and gather have arrived, and the bytes. empty[s]: all consumer warps are done.
// given[s]: warp 0 has found stage and work of a step, which those that gather wait for.
//
// The weight rows of a step stand as [block][warpgroup][64]. When gated, every block is a box of its own that
// alternates eight gate and eight up rows; of two blocks the first has columns 0-7 of every 16 and the second
// 8-15.
//
// Two blocks of a cluster can work as a pair (`pairs`): on neighbouring tiles, which mostly are token tiles
// that meet the same weight rows. Each then brings half of these rows for both, which takes 30 % off what
// comes out of the L2 cache. A stage may be refilled when the consumers of both blocks are done with it; so
// they step together, and where one has a tile more than the other, that one goes along without a tile.
//
// Work is dealt out by whole tiles or, stream-K, by equal runs of steps, when whole tiles would leave blocks
// idle. Whole tiles are taken in turn or, dynamic, as blocks are done: SMs do not get equal shares of the
// memory's bandwidth, and in turn some were done after three fourths of the time of others.
//
// An engine computes: SwapAb (sm90_swap_ab.cuh), weights as the tensor cores' operand of rows, and Fp8Prefill
// (sm90_fp8_prefill.cuh), tokens. It derives from Pipeline and adds compute(). How a step looks says a loop:
//   static constexpr Family kFamily
//   Element, Out             what tokens are copied as, and what is stored
//   kStepK                   depth of a step
//   kWeightLineBytes         of a step, of one weight row
//   kTokenLines              lines of 128 bytes in a step of one token
//   kExtras, Extra           whether a stage of the ring holds more than weights and tokens, and what; where
//                            tokens are the operand of rows its `tokens` are their scales
//   Gather                   a thread's part of that: Gather(engine, work, thread).copy(stage, k)
//   prefetch                 asks for the first of what does not come through the ring:
//                            prefetch(engine, work, thread, threads)
//   kSharedSources           whether the places of a wide tile's rows stand in shared memory (fp4 is faster,
//                            bf16 5 to 9 % slower)
//   kQuantizesOut            whether gated tiles that hold whole blocks of scales can leave their rows as
//                            codes (sm90_quantized_store.cuh)

#include "cuda/device/grid_counter.cuh"
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

/// Rows of a tile that is none: its block steps along with the other of its pair, and computes nothing.
inline constexpr int kGoesAlong = -1;

/// Steps before the end of a tile at which its block asks for the next: the answer takes about a step.
inline constexpr int kAsksAhead = 3;

/// A tile, or the steps [begin, end) of it.
struct alignas(16) Work {
  Tile tile;
  int number;  // of the tile
  int begin, end;
};

/// Of loops whose stages hold weights and tokens alone.
struct NoExtra {};
struct NoGather {
  template <class Engine>
  __device__ NoGather(const Engine&, const Work&, int) {}
  __device__ void copy(int, int) {}
};
/// Of loops that read everything from the ring.
struct NoPrefetch {
  template <class Engine>
  static __device__ void prefetch(const Engine&, const Work&, int, int) {}
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
  std::uint64_t full[kConfig.stages], empty[kConfig.stages], given[kConfig.stages];
  int group_tiles[kMaxExpertGroups];
};

/// A position in the ring, and the phase of its barriers.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void advance(int steps) {
    stage += steps;
    phase ^= stage / kStages & 1;
    stage %= kStages;
  }
};

template <class Loop_, class Form_, Tiling kTiling_>
struct Pipeline {
  using Loop = Loop_;
  using Form = Form_;
  using T = typename Loop::Out;
  static constexpr Tiling kTiling = kTiling_;
  using Shared = Smem<Loop, kTiling>;
  static constexpr TileConfig kConfig = Shared::kConfig;
  using Ring = RingPosition<kConfig.stages>;
  static constexpr int kMaxTokens = kConfig.max_tokens;
  static constexpr int kBoxTokens = kConfig.box_tokens;
  static constexpr bool kTokensAreRows = kConfig.tokens_are_rows(), kPairs = kConfig.pairs;
  static constexpr bool kBringsScales = kTokensAreRows && Loop::kExtras;  // of tokens, by the copy engine
  static constexpr int kWarpgroups = kConfig.warpgroups, kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kBlocks = kConfig.blocks;  // of 64 weight rows in each warpgroup
  static constexpr int kTileRows = kConfig.rows(), kBlockRows = kTileRows / kBlocks;  // of weights
  static constexpr int kTileColumns = Form::kGated ? kTileRows / 2 : kTileRows;       // of out

  // What a thread gets at launch; the producers leave a part of it to the consumers. Whoever asks for more
  // than there is waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kConfig.threads() / 8 * 8, kProducerRegisters = 56;
  static constexpr int kConsumerRegisters =
      ((kWarpgroups + 1) * kLaunchRegisters - kProducerRegisters) / kWarpgroups / 8 * 8;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                (kWarpgroups + 1) * kLaunchRegisters);
  static_assert(kConfig.whole_boxes());
  static_assert(kTokensAreRows || kBoxTokens == 0 || !Loop::kExtras);  // no warp would bring them
  static_assert(kBoxTokens == 0 || !kConfig.shares);  // copying warps find work for themselves, in turn
  static_assert(!kConfig.shares ||
                (kWarpgroups <= Sharing::kMaxWarpgroups && kTileRows * kMaxTokens <= Sharing::kSlotFloats));

  Shared& s;
  const Maps& maps;
  const GroupedGemmArgs& args;
  const Sharing& sharing;
  const bool boxes;             // token rows come by the copy engine
  const int steps;              // of K
  const int tiles = 0;          // all of them; known where blocks share something only
  const bool by_steps = false;  // deal out steps
  const bool dynamic = false;   // blocks take the next tile when they are done
  const bool pairs = false;     // blocks work in pairs

  /// First of this block's steps, counted over all tiles.
  __device__ __forceinline__ int first_step(int block) const {
    return static_cast<int>(static_cast<std::int64_t>(tiles) * steps * block / gridDim.x);
  }

  /// This block's work, one item after the other; every method is called by a whole warp.
  class Queue {
   public:
    __device__ explicit Queue(const Pipeline& engine)
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
      if (kPairs && engine_.pairs && work.number >= engine_.tiles) {
        if (work.number == engine_.tiles && work.number % 2 != 0) work.tile.rows = kGoesAlong;
        return work;
      }
      work.tile = cursor_.find(work.number);
      return work;
    }

    /// Goes on with this tile instead of the one whose turn it is.
    __device__ void go_on_with(int number) { next_ = number; }

   private:
    const Pipeline& engine_;
    TileCursor cursor_;
    int next_, end_;
  };

  // ---- dynamic: a counter of tiles in the workspace, for one thread of a block
  /// Block 0, before any block asks: each has its first tile by its own number.
  __device__ __forceinline__ void open_counter() const { sharing.next_tile->open(gridDim.x); }

  /// Once only, for fp4's scales are in the L1 cache that this empties.
  __device__ __forceinline__ void await_counter() const {
    dev::wait_for_predecessor();  // which may use the same workspace
    sharing.next_tile->await_open();
  }

  /// The number of a tile that no other block has, or one behind the last: such a one ends a block's asking.
  __device__ __forceinline__ int take_tile() const {
    return static_cast<int>(sharing.next_tile->take(tiles + gridDim.x - 1));
  }

  /// A consumer warp is done with a stage, which both blocks of a pair refill.
  __device__ __forceinline__ void release(int stage) const {
    const std::uint32_t lane = threadIdx.x % 32;
    if constexpr (kPairs) {  // a lane for each block: no branch
      if (lane < (pairs ? 2 : 1))
        barrier_arrive_in_cluster(address_in_block(smem_address(&s.empty[stage]), lane));
    } else if (lane == 0) {
      barrier_arrive(&s.empty[stage]);
    }
  }

  /// A consumer warp's steps of work in which it has no part.
  __device__ __forceinline__ void pass_over(const Work& work, Ring& at) const {
    for (int k = work.begin; k < work.end; ++k) {
      barrier_wait(&s.full[at.stage], at.phase);
      release(at.stage);
      at.advance();
    }
  }

  // ---- the warps that copy
  /// A whole warp: steps_of(work, at) for each work item and, with no rows, for the word that there is no
  /// more.
  template <class StepsOf>
  __device__ __forceinline__ void for_each_work(Queue& queue, const StepsOf& steps_of) const {
    for (Ring at;;) {
      const Work work = queue.pop();
      steps_of(work, at);
      if (work.tile.rows == 0) return;
      at.advance(work.end - work.begin);
    }
  }

  /// One thread: arrives at every step of the work item, with `bytes` that copy(k, stage) brings. The word
  /// that there is no more is a step.
  template <class Copy>
  __device__ __forceinline__ void produce(const Work& work, Ring at, int bytes, const Copy& copy) const {
    const int end = work.tile.rows == 0 ? work.begin + 1 : work.end;
    for (int k = work.begin; k < end; ++k) {
      barrier_wait(&s.empty[at.stage], at.phase ^ 1);
      barrier_arrive_expect(&s.full[at.stage], bytes);
      copy(k, at.stage);
      at.advance();
    }
  }

  __device__ __forceinline__ void copy_weights(bool evict) const {
    Queue queue(*this);
    bool open = false;
    for_each_work(queue, [&](const Work& work, Ring at) {
      // Late, so that no block keeps a tile waiting, and early enough for the answer to be there. Never
      // behind the last tile: the counter's last number is that of as many questions as there are tiles.
      const bool asks = kConfig.shares && dynamic && work.tile.rows > 0;
      const int ask_at = asks ? max(work.begin, work.end - kAsksAhead) : -1;
      int next = 0;
      if (elect_one()) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        s.work[at.stage] = work;
        const bool multiplies = work.tile.rows > 0;
        produce(work, at, multiplies ? Shared::kWeightBytes : 0, [&](int k, int stage) {
          barrier_arrive(&s.given[stage]);
          if (multiplies) copy_weight_rows(work.tile, k, stage, evict);
          if (k == ask_at) {
            if (!open) await_counter();
            next = take_tile();
          }
        });
      }
      __syncwarp();
      if (asks) queue.go_on_with(__reduce_max_sync(~0u, next)), open = true;
    });
  }

  __device__ __forceinline__ void copy_tokens() const {
    Queue queue(*this);
    for_each_work(queue, [&](const Work& work, Ring at) {
      if (work.tile.rows > 0) Loop::prefetch(*this, work, threadIdx.x % 32, 32);
      if (elect_one()) {
        const int token_boxes = token_boxes_of(work.tile);
        constexpr int kScaleBytes = kBringsScales ? kConfig.scale_box() * sizeof(float) : 0;
        const int bytes =
            token_boxes * (Loop::kTokenLines * kBoxTokens * kLineBytes) + (token_boxes > 0 ? kScaleBytes : 0);
        produce(work, at, bytes, [&](int k, int stage) {
          copy_token_rows(work.tile, k, token_boxes, stage);
          if constexpr (kBringsScales)
            if (token_boxes > 0)
              copy_box(s.extra[stage].tokens, &maps.x_scales, &s.full[stage],
                       work.tile.row / kScalesAhead * kScalesAhead, k);
        });
      }
      __syncwarp();
    });
  }

  /// A whole warp: the work item that starts in a stage, one of whose threads may give the stage back.
  __device__ __forceinline__ Work work_in(int stage) const {
    const Work work = s.work[stage];
    __syncwarp();
    return work;
  }

  /// One box of all rows; when gated, one for each block. Where blocks can work in pairs two boxes, of which
  /// each block of a pair brings one for both.
  __device__ __forceinline__ void copy_weight_rows(const Tile& tile, int step, int stage, bool evict) const {
    constexpr int kBoxes = kConfig.weight_boxes(Form::kGated), kBoxRows = kTileRows / kBoxes;
    constexpr int kUnit = 8 * kBlocks;  // columns of out that gated blocks share
    static_assert(kBoxRows % 16 == 0);  // eights of gate and up rows by turns
    const int k = step * Loop::kStepElements;
    std::uint64_t* full = &s.full[stage];
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      int row = 0, units = 0;
      if constexpr (!Form::kGated)
        row = tile.weight_tile * kTileRows + b * kBoxRows;
      else if constexpr (kBlocks > 1)
        row = 8 * b, units = tile.weight_tile * (kTileColumns / kUnit);
      else
        units = (tile.weight_tile * kBoxes + b) * (kTileColumns / (kUnit * kBoxes));
      std::byte* box = s.weights[stage] + b * kBoxRows * Loop::kWeightLineBytes;
      if (kPairs && pairs && tile.paired) {
        if (b == static_cast<int>(blockIdx.x % 2))
          copy_box_to_pair(box, &maps.weights, full, k, row, 0, units, tile.expert);
      } else if (evict) {
        copy_box(box, &maps.weights, full, k, row, 0, units, tile.expert, policy_evict_first());
      } else {
        copy_box(box, &maps.weights, full, k, row, 0, units, tile.expert);
      }
    }
  }

  /// Boxes that bring a tile's token rows; what they bring of the rows behind is computed and not stored.
  __device__ __forceinline__ int token_boxes_of(const Tile& tile) const {
    return tile.rows > 0 ? (tile.rows + kBoxTokens - 1) / kBoxTokens : 0;
  }

  __device__ __forceinline__ void copy_token_rows(const Tile& tile, int step, int boxes, int stage) const {
    constexpr int kLineElements = kLineBytes / static_cast<int>(sizeof(typename Loop::Element));
    for (int b = 0; b < boxes; ++b)
#pragma unroll
      for (int line = 0; line < Loop::kTokenLines; ++line)
        copy_box(s.tokens[stage][line] + b * (kBoxTokens * kLineBytes), &maps.x, &s.full[stage],
                 (step * Loop::kTokenLines + line) * kLineElements, tile.row + b * kBoxTokens);
  }

  // ---- the warp that brings what else a step needs
  __device__ __forceinline__ void copy_extras() {
    Queue queue(*this);
    Ring at;
    for (;;) {
      const Work work = queue.pop();
      const bool last = work.tile.rows == 0;
      typename Loop::template Gather<Pipeline> extra(*this, work, threadIdx.x % 32);
      for (int k = work.begin; k < (last ? work.begin + 1 : work.end); ++k) {
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
        if (!last) extra.copy(at.stage, k);
        barrier_arrive_after_copies(&s.full[uniform(at.stage)]);
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

    for (Ring at;;) {
      barrier_wait(&s.given[at.stage], at.phase);
      const Work work = s.work[at.stage];
      const Tile& tile = work.tile;
      if (tile.rows == 0) {
        barrier_arrive(&s.full[at.stage]);
        return;
      }
      const int rows = ((tile.rows + 7) / 8 * 8 - row + kGatherRows - 1) / kGatherRows;  // of this thread
      auto source_of = [&](int i) {
        return static_cast<std::uint32_t>(x_row(tile, row + i * kGatherRows)) * pitch;
      };
      if constexpr (Shared::kSharedSources) {  // the eight threads of a row share the work
        __syncwarp();
        for (int i = piece; i < kRows; i += 8) sources[i] = source_of(i);
        __syncwarp();
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) own[i] = source_of(i);
      }
      if (tile.rows > 0) Loop::prefetch(*this, work, thread, kGatherThreads);
      typename Loop::template Gather<Pipeline> extra(*this, work, thread);
      for (int k = work.begin; k < work.end; ++k) {
        // Warp 0 has seen that the stage is empty. Waiting for that instead would let these warps come a
        // whole ring ahead of it, and take the given of one step for that of another.
        barrier_wait(&s.given[at.stage], at.phase);
#pragma unroll
        for (int line = 0; line < Loop::kTokenLines; ++line) {
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
        barrier_arrive_after_copies(&s.full[uniform(at.stage)]);
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
};

template <class Engine>
__global__ void __launch_bounds__(Engine::kConfig.threads(), 1)
    grouped_gemm_kernel(const __grid_constant__ Maps maps, const __grid_constant__ GroupedGemmArgs args,
                        const __grid_constant__ Sharing sharing, const bool boxes, const bool evict_weights) {
  constexpr TileConfig kConfig = Engine::kConfig;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& s = *reinterpret_cast<typename Engine::Shared*>(raw);
  const bool pairs = Engine::kPairs && cluster_blocks() > 1;
  const bool copies_tokens = Engine::kTokensAreRows || (Engine::kBoxTokens > 0 && boxes);
  if (threadIdx.x == 0) {
    const int arrivals = 1 + (!copies_tokens          ? kGatherThreads
                              : Engine::Loop::kExtras ? 1 + 32
                                                      : 1);  // at a full barrier
    prefetch_map(&maps.weights);
    if (copies_tokens) prefetch_map(&maps.x);
    if (Engine::kTokensAreRows) prefetch_map(&maps.out);
    for (int i = 0; i < kConfig.stages; ++i) {
      barrier_init(&s.given[i], 1);
      barrier_init(&s.full[i], arrivals);
      barrier_init(&s.empty[i], Engine::kConsumerWarps * (pairs ? 2 : 1));
    }
    barrier_init_fence();
  }
  // With settled offsets the weights stream in beside the end of the kernel before. x, out and the workspace
  // wait.
  if (!args.offsets_settled) dev::wait_for_predecessor();
  count_group_tiles(args, s.group_tiles);
  const bool by_steps = kConfig.shares && sharing.by == Sharing::kSteps;
  if (pairs) {  // the other block's barriers are there too
    __syncwarp();
    dev::cluster_arrive();
    dev::cluster_wait();
  }
  __syncthreads();

  const bool shares = kConfig.shares && sharing.by != Sharing::kNothing;
  const int tiles = shares || pairs ? count_tiles(args, s.group_tiles) : 0;
  const bool dynamic = shares && !by_steps && tiles > static_cast<int>(gridDim.x);
  Engine engine{{s, maps, args, sharing, copies_tokens,
                 (args.k + Engine::Loop::kStepK - 1) / Engine::Loop::kStepK, tiles, by_steps, dynamic,
                 pairs}};
  const int warp = uniform(threadIdx.x / 32) - Engine::kConsumerWarps;  // of those that bring
  if (warp >= 0) {
    give_registers<Engine::kProducerRegisters>();
    if (warp == 0) {
      engine.copy_weights(evict_weights);
    } else {
      dev::wait_for_predecessor();
      dev::release_successor();  // not before: whoever follows may rely on what preceded this kernel
      if constexpr (Engine::kBoxTokens > 0)
        if (copies_tokens && warp == 1) engine.copy_tokens();
      if constexpr (!Engine::kTokensAreRows) {
        if (!copies_tokens) engine.gather_tokens();
      } else if constexpr (Engine::Loop::kExtras) {
        if (warp == 2) engine.copy_extras();
      }
    }
  } else {
    take_registers<Engine::kConsumerRegisters>();
    dev::wait_for_predecessor();
    if (by_steps && threadIdx.x % 128 == 0)
      sharing.flags[Engine::kWarpgroups * blockIdx.x + threadIdx.x / 128] = 0;
    if (dynamic && blockIdx.x == 0 && threadIdx.x == 0) engine.open_counter();
    engine.compute();
  }
  if (pairs) {  // the other block still arrives at this one's barriers
    __syncwarp();
    dev::cluster_arrive();
    dev::cluster_wait();
  }
}

template <class Engine>
Kernel kernel_of() {
  using Shared = typename Engine::Shared;
  static_assert(sizeof(Shared) <= 227 * 1024);  // what a block may have on sm_90
  return {reinterpret_cast<const void*>(grouped_gemm_kernel<Engine>), sizeof(Shared)};
}

}  // namespace moecore::cuda::sm90
