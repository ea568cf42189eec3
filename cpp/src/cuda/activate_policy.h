#pragma once
// How activate is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/policy_override.h"
#include "moecore/dtype.h"
#include "moecore/error.h"
#include "ops/activate.h"

namespace moecore::cuda {

struct ActivatePolicy {
  int vectors = 1;    // 1: 16-byte accesses, 0: element by element
  int threads = 256;  // of a block
  int rows = 1;       // that a thread reads before it computes: 1 or 2; element by element 1
};

inline ActivatePolicy select_activate_policy(const ActivateProblem& p, int num_sms, int max_threads_per_sm) {
  constexpr int kVectorBytes = 16;
  const std::int64_t element = bit_width(p.dtype) / 8;
  auto aligned = [&](const void* data, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0 &&
           (p.rows <= 1 || stride * element % kVectorBytes == 0);
  };
  ActivatePolicy policy;
  policy.vectors =
      aligned(p.x, p.x_stride) && aligned(p.out, p.out_stride) && p.inter * element % kVectorBytes == 0;
  const std::int64_t columns =
      std::max<std::int64_t>(1, policy.vectors ? p.inter * element / kVectorBytes : p.inter);
  auto idle = [&](int threads) { return (columns + threads - 1) / threads * threads - columns; };
  // Two rows a thread once that leaves a round of resident threads, in the narrowest blocks that waste few.
  const std::int64_t resident = static_cast<std::int64_t>(max_threads_per_sm) * num_sms;
  if (policy.vectors && p.rows * columns >= 2 * resident) {
    policy.rows = 2;
    policy.threads = 64;
    for (int threads : {96, 128})
      if (idle(threads) < idle(policy.threads)) policy.threads = threads;
    return policy;
  }
  // Few columns: narrow blocks on many SMs. Of the sizes around it, the one that wastes fewest lanes.
  auto slices = [&] { return (columns + policy.threads - 1) / policy.threads; };
  while (policy.threads > 64 && p.rows * slices() < 2 * num_sms) policy.threads /= 2;
  policy.threads = static_cast<int>(((columns + slices() - 1) / slices() + 31) / 32 * 32);
  return policy;
}

/// The selected policy with the caller's changes.
inline ActivatePolicy choose_activate_policy(const ActivateProblem& p, int num_sms, int max_threads_per_sm,
                                             std::string_view text) {
  ActivatePolicy policy = select_activate_policy(p, num_sms, max_threads_per_sm);
  int rows = 0;
  override_policy("activate", text,
                  {{"vectors", &policy.vectors, {0, policy.vectors}},
                   {"threads", &policy.threads, {32, 64, 96, 128, 160, 192, 224, 256}},
                   {"rows", &rows, {1, 2}}});
  if (rows > 0) policy.rows = rows;
  if (policy.vectors) return policy;
  if (rows > 1)
    throw InvalidArgument("activate: policy is \"" + std::string(text) +
                          "\", expected rows=1 for columns that are not read in vectors");
  policy.rows = 1;
  return policy;
}

}  // namespace moecore::cuda
