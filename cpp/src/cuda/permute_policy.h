#pragma once
// How permute and shuffle_rows are launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/permute.h"

namespace moecore::cuda {

struct PermutePolicy {
  /// 1: a block reads one token and writes all its copies, which reads the least and lets no address wait for
  /// a loaded one. 0: a block reads the source of one output row and writes it, the most parallel.
  int by_token = 0;
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

/// The addresses and pitches of a move, or'ed together.
inline std::uint64_t permute_bits(const RowMove& m) {
  return reinterpret_cast<std::uintptr_t>(m.x) | reinterpret_cast<std::uintptr_t>(m.out) |
         static_cast<std::uint64_t>(m.x_pitch) | static_cast<std::uint64_t>(m.out_pitch);
}

inline PermutePolicy select_permute_policy(const PermuteProblem& p, int num_sms, std::size_t l2_bytes) {
  constexpr std::int64_t kMaxThreads = 256;
  constexpr std::int64_t kManyBlocksPerSm = 4;  // from here on a thread takes several vectors
  PermutePolicy policy;
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(p.x) | reinterpret_cast<std::uintptr_t>(p.out);
  if (p.x_rows > 1) bits |= static_cast<std::uint64_t>(p.x_pitch);
  if (p.out_rows > 1) bits |= static_cast<std::uint64_t>(p.out_pitch);
  policy.vector_bytes = common_alignment(bits);

  // By token a block writes top_k rows, one after the other: it pays from about 24 KB an SM on. 64 tokens, K
  // 8, on an H200, us by row and by token: rows of 4 KB 2.1 and 2.4, of 8 KB 2.9 and 2.7, of 14 KB 4.3
  // and 3.5.
  constexpr std::uint64_t kBytesPerSm = 24 * 1024;
  const std::uint64_t written =
      static_cast<std::uint64_t>(p.out_rows) * static_cast<std::uint64_t>(p.row_bytes);
  policy.by_token = p.slot_row && written >= kBytesPerSm * static_cast<std::uint64_t>(num_sms);
  // Rows that fit L2 are wanted there: evicted first, 64 tokens of 8 KB are written in 2.3 us instead of 2.8,
  // but with the finalize that reads them take 5.6 instead of 4.6.
  policy.streaming = written > l2_bytes / 2;
  const std::int64_t rows = policy.by_token ? p.x_rows : p.out_rows;
  const std::int64_t vectors = std::max<std::int64_t>(1, p.row_bytes / policy.vector_bytes);
  const bool many = rows >= kManyBlocksPerSm * num_sms;
  // An H200, T = 1024: with 33 MB to write four vectors are 8 % faster than two by token, with 24 MB 15 %
  // slower.
  const std::uint64_t much = policy.by_token ? l2_bytes / 2 : 2 * l2_bytes;
  policy.unroll = !many ? 1 : written > much ? 4 : 2;
  // A block has an even part of a row: all of it, but where rows are few and half the SMs would have none,
  // and where threads take four vectors, one warp's part: 1024 tokens of 8 KB, K 8, 20.1 us, 22.9 in blocks
  // of 128.
  const std::int64_t warps_of_row = (vectors + 32 * policy.unroll - 1) / (32 * policy.unroll);
  const std::int64_t least = (warps_of_row * 32 + kMaxThreads - 1) / kMaxThreads;
  const std::int64_t wanted = num_sms / 2 / std::max<std::int64_t>(1, rows);
  const std::int64_t slices = policy.unroll == 4 && policy.by_token
                                  ? warps_of_row
                                  : std::clamp<std::int64_t>(wanted, least, std::max(least, warps_of_row));
  policy.threads = static_cast<int>(32 * ((warps_of_row + slices - 1) / slices));
  return policy;
}

/// Blocks that share one row.
inline int permute_slices(const PermutePolicy& policy, std::int64_t row_bytes) {
  const std::int64_t slice = static_cast<std::int64_t>(policy.vector_bytes) * policy.unroll * policy.threads;
  return static_cast<int>(std::clamp<std::int64_t>((row_bytes + slice - 1) / slice, 1, 65535));
}

}  // namespace moecore::cuda
