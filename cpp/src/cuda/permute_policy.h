#pragma once
// How permute and shuffle_rows are launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/permute.h"

namespace moecore::cuda {

enum class PermuteForm {
  kByRow,    // a block reads the source of one output row and writes it
  kByToken,  // a block reads one token and writes all its copies: no address waits for a loaded one
};

struct PermutePolicy {
  PermuteForm form = PermuteForm::kByRow;
  int vector_bytes = 16;  // 16, 8, 4, 2 or 1: what every row start is aligned to
  int unroll = 1;         // vectors a thread holds: 1, 2 or 4
  int threads = 32;       // of a block
  int streaming = 0;      // 1: written rows are evicted first
};

/// The widest vector that divides every bit pattern in `bits` (addresses and pitches or'ed together).
constexpr int common_alignment(std::uint64_t bits) {
  for (int bytes = 16; bytes > 1; bytes /= 2)
    if (bits % bytes == 0) return bytes;
  return 1;
}

inline PermutePolicy select_permute_policy(const PermuteProblem& p, int num_sms, std::size_t l2_bytes) {
  constexpr int kMaxThreads = 256, kMaxUnroll = 4;
  // Blocks an SM should get before a thread takes more than one vector, and before a row is one block.
  constexpr std::int64_t kBlocksPerSm = 4;

  PermutePolicy policy;
  policy.form = p.slot_row ? PermuteForm::kByToken : PermuteForm::kByRow;
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(p.x) | reinterpret_cast<std::uintptr_t>(p.out);
  if (p.x_rows > 1) bits |= static_cast<std::uint64_t>(p.x_pitch);
  if (p.out_rows > 1) bits |= static_cast<std::uint64_t>(p.out_pitch);
  policy.vector_bytes = common_alignment(bits);

  const std::int64_t rows = policy.form == PermuteForm::kByToken ? p.x_rows : p.out_rows;
  const std::int64_t vectors = std::max<std::int64_t>(1, p.row_bytes / policy.vector_bytes);
  auto blocks_at = [&](std::int64_t per_block) { return rows * ((vectors + per_block - 1) / per_block); };

  // The widest thread that still fills the device.
  policy.unroll = kMaxUnroll;
  while (policy.unroll > 1 &&
         blocks_at(static_cast<std::int64_t>(policy.unroll) * 64) < kBlocksPerSm * num_sms)
    policy.unroll /= 2;
  // The fewest slices of at most kMaxThreads threads, more when there are too few rows.
  const std::int64_t warps_of_row = (vectors + 32 * policy.unroll - 1) / (32 * policy.unroll);
  const std::int64_t least = (warps_of_row * 32 + kMaxThreads - 1) / kMaxThreads;
  const std::int64_t wanted = rows > 0 ? (kBlocksPerSm * num_sms + rows - 1) / rows : 1;
  const std::int64_t slices = std::clamp<std::int64_t>(wanted, least, std::max(least, warps_of_row));
  policy.threads = static_cast<int>(32 * ((warps_of_row + slices - 1) / slices));
  policy.streaming =
      static_cast<std::uint64_t>(p.out_rows) * static_cast<std::uint64_t>(p.row_bytes) > l2_bytes / 2;
  return policy;
}

/// Blocks that share one row.
inline int permute_slices(const PermutePolicy& policy, std::int64_t row_bytes) {
  const std::int64_t slice = static_cast<std::int64_t>(policy.vector_bytes) * policy.unroll * policy.threads;
  return static_cast<int>(std::clamp<std::int64_t>((row_bytes + slice - 1) / slice, 1, 65535));
}

}  // namespace moecore::cuda
