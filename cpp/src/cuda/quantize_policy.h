#pragma once
// How quantize is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/activation_params.h"
#include "ops/quantize.h"

namespace moecore::cuda {

/// Columns of a thread's unit, and of a warp's tile: 32 units of one row.
inline constexpr int kUnit = 16;
inline constexpr int kTile = 32 * kUnit;

/// Threads of a block that quantises part of a row, at most.
inline constexpr int kMaxTileThreads = 256;

/// Longest row that a block keeps in registers while it looks for the largest magnitude.
inline constexpr int kRowThreads = 512;
inline constexpr int kMaxRowUnits = 4;

/// How a warp finds the expert of its row.
enum class ExpertLookup : int {
  kCount,   // its lanes count the experts that end before the row: up to 256 of them by loads all at once
  kSearch,  // binary search: fewer loads, one after the other
};

struct QuantizePolicy {
  int threads = 128;  // of a block
  int unroll = 1;     // units of a thread; whole rows: 0 = read again
  int tasks = 1;      // of a block, one after the other
  int lookup = 0;     // ExpertLookup
};

inline bool whole_rows(const QuantFormat& f) {
  return f.kind == QuantKind::kFp8 && f.granularity == Granularity::kToken;
}

/// Blocks of a row whose scales are stored: with scales in words, up to the end of the last word.
inline std::int64_t stored_blocks(const ScaleRef& s) {
  const bool words = s.bytes == 1 && s.layout != ScaleLayout::kLinear;
  return words ? s.words() * kScaleWord : s.cols;
}

/// Columns that the threads of a row cover: its data, and its scales up to the last that is stored.
inline std::int64_t columns_of_row(const QuantizeProblem& p) {
  return std::max(p.padded_cols, stored_blocks(p.scales) * p.format.block());
}

/// Blocks for one row.
inline std::int64_t row_parts(const QuantizePolicy& policy, std::int64_t columns) {
  const std::int64_t width = static_cast<std::int64_t>(policy.threads) * policy.unroll * kUnit;
  return std::max<std::int64_t>(1, (columns + width - 1) / width);
}

/// A task is a token, whose codes go to all its rows.
inline bool quantizes_tokens(const QuantizeProblem& p) {
  return p.slot_row && !p.global_scale_per_expert;
}

inline bool aligned(const void* data, std::int64_t pitch_bytes, std::int64_t rows, int bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<unsigned>(bytes) == 0 &&
         (rows <= 1 || pitch_bytes % bytes == 0);
}

/// Every unit starts where 16 bytes may be read, in both halves of a row with gates and ups.
inline bool source_is_aligned(const QuantizeProblem& p) {
  const std::int64_t element = bit_width(p.dtype) / 8;
  const bool halves = p.activation && p.activation->order != GateOrder::kPlain &&
                      p.activation->order != GateOrder::kInterleaved;
  return aligned(p.x, p.x_stride * element, p.rows, 16) && (!halves || p.cols * element % 16 == 0);
}

/// ... and where 16 codes may be written at once.
inline bool data_is_aligned(const QuantizeProblem& p) {
  return aligned(p.data, p.data_pitch, p.out_rows, p.format.data_dtype() == DType::kE2M1 ? 8 : 16);
}

/// Nothing but aligned units of 16 columns, for which there are kernels without tails.
inline bool whole_units(const QuantizeProblem& p) {
  return p.cols > 0 && p.cols % kUnit == 0 && p.padded_cols % kUnit == 0 && source_is_aligned(p) &&
         data_is_aligned(p);
}

/// The one activation that has kernels of its own.
inline bool is_silu_and_mul(const Activation& a) {
  return a.kind == ActivationKind::kSilu && changes_nothing(activation_params(a)) &&
         (a.order == GateOrder::kGateUp || a.order == GateOrder::kUpGate);
}

/// An activation reads twice the bytes, so that one unit a thread suffices.
inline bool may_unroll(const QuantizeProblem& p) {
  return whole_units(p) && !p.activation;
}

/// Rows that a block may take one after the other. Four pay where a row takes many instructions; rows read
/// and written as they are in e4m3 wait for memory alone, which blocks that end soon hide better. One, two
/// and four rows, us for 8192 of them on an H200: nvfp4, 4096 columns, 27.3, 25.0, 24.4; fp8_block128, 4096
/// columns (128 threads), 26.0, 26.2, 26.8; 7168 columns (224 threads) 46.9, 44.4, 44.6.
inline std::int64_t most_tasks(const QuantizeProblem& p, int threads) {
  if (p.format.data_dtype() == DType::kE2M1 || p.activation || p.slot_row) return 4;
  return threads > 128 ? 2 : 1;
}

inline QuantizePolicy select_quantize_policy(const QuantizeProblem& p, int num_sms) {
  QuantizePolicy policy;
  auto warps = [](std::int64_t units) { return std::max<std::int64_t>(1, (units + 31) / 32) * 32; };
  if (whole_rows(p.format)) {
    const std::int64_t units = std::max<std::int64_t>(1, (p.padded_cols + kUnit - 1) / kUnit);
    // Two units a thread once rows alone fill the SMs: half the threads to synchronise, the same bytes in
    // flight.
    policy.unroll = units > 64 && p.out_rows >= 2 * num_sms ? 2 : 1;
    while (policy.unroll <= kMaxRowUnits && units > static_cast<std::int64_t>(kRowThreads) * policy.unroll)
      policy.unroll *= 2;
    if (policy.unroll > kMaxRowUnits) policy.unroll = 0;
    const std::int64_t per_thread = std::max(1, policy.unroll);
    policy.threads =
        static_cast<int>(std::min<std::int64_t>(warps((units + per_thread - 1) / per_thread), kRowThreads));
    return policy;
  }
  const std::int64_t rows = quantizes_tokens(p) ? p.rows : p.out_rows;
  const std::int64_t units = (columns_of_row(p) + kUnit - 1) / kUnit;
  // Two units a thread once every SM has enough of them. Of the widths of a block the first that leaves the
  // fewest threads without work; narrow blocks where they are few.
  const bool many = rows * units >= static_cast<std::int64_t>(num_sms) * 32 * 32;
  policy.unroll = may_unroll(p) && many ? 2 : 1;
  const std::int64_t per_row = (units + policy.unroll - 1) / policy.unroll;
  auto idle = [&](int threads) { return (per_row + threads - 1) / threads * threads - per_row; };
  // Fewer rows: one block has the whole row, but where there are not even enough for a fourth of the SMs; of
  // experts there too, as each block looks its expert up (512 rows of 2048 nvfp4 columns over 256
  // experts: 3.9 us, 4.7 in blocks of 64). Without, 256 rows of 4096 mxfp8 columns 2.2 and 2.5, with silu 4.0
  // and 4.7.
  const bool few = rows * 4 < num_sms && p.experts.num_experts == 0;
  policy.threads = many  ? 128
                   : few ? 64
                         : static_cast<int>(std::min<std::int64_t>(warps(units), kMaxTileThreads));
  if (many)
    for (int threads : {64, 96, 160, 192, 224, 256})
      if (idle(threads) < idle(policy.threads)) policy.threads = threads;
  // Several rows a block once that leaves a round of blocks: what is the same for all rows is worked out
  // once, and a row of x is loaded while the one before is worked on, but not of silu(gate) * up, which wants
  // two rounds. us on an H200 with one row and with two: nvfp4, 1024 rows of 7168, 7.6 and 7.0; silu and
  // fp8_block128, 1024 rows of 4096, 8.5 and 9.6; with two and with four, 4096 rows of 2048, 13.8 and 16.2.
  int warps_of_sm = 30;
  if (!p.activation && !p.slot_row) warps_of_sm = 24;
  if (p.activation && is_silu_and_mul(*p.activation) && whole_units(p)) warps_of_sm = 60;
  const std::int64_t round = static_cast<std::int64_t>(num_sms) * warps_of_sm;
  const std::int64_t resident = rows * warps(per_row) / 32 / round;
  policy.tasks = static_cast<int>(std::bit_floor(
      static_cast<std::uint64_t>(std::clamp<std::int64_t>(resident, 1, most_tasks(p, policy.threads)))));
  policy.lookup =
      static_cast<int>(p.experts.num_experts <= 512 ? ExpertLookup::kCount : ExpertLookup::kSearch);
  return policy;
}

}  // namespace moecore::cuda
