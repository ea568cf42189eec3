#pragma once
// How finalize is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "moecore/dtype.h"
#include "ops/finalize.h"

namespace moecore::cuda {

inline constexpr int kFinalizeMaxThreads = 256;

/// Tokens that a thread of the direct form has in flight at most. Two of four rows read 0.5 to 0.7 % faster
/// than one where tokens are many; four of two rows 1 to 11 % slower (H200, 1024 to 8192 tokens of 4096
/// columns).
constexpr int finalize_most_direct_tokens(std::int64_t top_k) {
  return top_k == 4 ? 2 : 1;
}

struct FinalizePolicy {
  int direct = 0;    // the direct form with this many tokens a thread: 1 or 2. 0: the general form
  int vectors = 1;   // 1: 16-byte accesses, 0: element by element
  int slots = 4;     // general form: rows in flight per thread: 1, 2, 4 or 8
  int threads = 64;  // of a block
};

/// Neighbouring columns that a thread owns.
inline std::int64_t finalize_columns_per_thread(const FinalizePolicy& policy, DType rows) {
  if (policy.vectors) return 16 * 8 / bit_width(rows);
  return rows == DType::kE4M3 ? 4 : 1;
}

/// Whether the direct form can take the problem.
inline bool finalize_can_be_direct(const FinalizePolicy& policy, const FinalizeProblem& p) {
  if (!policy.vectors) return false;
  if (p.dtype == DType::kE4M3 || p.out_dtype != p.dtype || p.slot_row.is_i64) return false;
  if (p.top_k != 2 && p.top_k != 4 && p.top_k != 8) return false;
  if (p.num_rows > 0x7FFFFFFF || p.rows_stride < 0 || p.rows_stride * bit_width(p.dtype) / 8 > 0x7FFFFFFF)
    return false;
  auto vectors = [&](const void* data, std::int64_t stride, std::int64_t bytes) {
    const std::int64_t vector = std::min<std::int64_t>(16, p.top_k * bytes);
    return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(vector) == 0 &&
           (p.num_tokens <= 1 || stride * bytes % vector == 0);
  };
  if (!vectors(p.slot_row.data, p.slot_stride, 4)) return false;
  if (!p.weights) return true;
  if (p.weight_dtype != p.dtype && (p.weight_dtype != DType::kF32 || p.cast_weights)) return false;
  return vectors(p.weights, p.weights_stride, bit_width(p.weight_dtype) / 8);
}

inline FinalizePolicy select_finalize_policy(const FinalizeProblem& p, int num_sms) {
  constexpr int kVectorBytes = 16;
  auto aligned = [&](const void* data, std::int64_t rows, std::int64_t stride, DType dtype) {
    return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0 &&
           (rows <= 1 || stride * bit_width(dtype) / 8 % kVectorBytes == 0);
  };
  FinalizePolicy policy;
  policy.vectors = aligned(p.rows, p.num_rows, p.rows_stride, p.dtype) &&
                   aligned(p.out, p.num_tokens, p.out_stride, p.out_dtype) &&
                   aligned(p.residual, p.num_tokens, p.residual_stride, residual_dtype(p.out_dtype)) &&
                   p.hidden * bit_width(p.dtype) / 8 % kVectorBytes == 0;
  const std::int64_t per_thread = finalize_columns_per_thread(policy, p.dtype);
  const std::int64_t columns = std::max<std::int64_t>(1, (p.hidden + per_thread - 1) / per_thread);

  // With all threads resident at once, more rows in flight shorten the one pass there is; beyond that they
  // cost more resident threads than they gain.
  constexpr std::int64_t kResidentThreads = 256;  // of an SM
  const bool all_resident = p.num_tokens * columns <= kResidentThreads * num_sms;
  policy.slots = p.dtype == DType::kE4M3         ? 4
                 : p.top_k <= 1                  ? 1
                 : p.top_k <= 2                  ? 2
                 : p.top_k <= 4 || !all_resident ? 4
                                                 : 8;
  // Narrow blocks spread few tokens over many SMs. Wider ones pay in the direct form once an SM has a block:
  // 128 tokens of 4096 columns, K 8, take 4.1 us on an H200 in blocks of 128 and 4.8 in blocks of 64. With
  // about a thousand threads an SM blocks of 96 even out the end: 256 such tokens 6.4 and 6.6 us.
  policy.threads = 64;
  if (finalize_can_be_direct(policy, p)) {
    const std::int64_t per_sm = p.num_tokens * columns / num_sms;
    policy.direct = per_sm >= 2048 ? finalize_most_direct_tokens(p.top_k) : 1;
    policy.threads = per_sm < 64 ? 64 : per_sm >= 750 && per_sm < 1500 ? 96 : 128;
  }
  // Of the sizes around it, the one that wastes fewest lanes of the last block.
  const std::int64_t blocks = (columns + policy.threads - 1) / policy.threads;
  policy.threads = static_cast<int>(((columns + blocks - 1) / blocks + 31) / 32 * 32);
  return policy;
}

}  // namespace moecore::cuda
