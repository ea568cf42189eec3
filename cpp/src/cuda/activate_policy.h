#pragma once
// How activate is launched, as a function of the problem's sizes and the device's.

#include <algorithm>
#include <cstdint>

#include "moecore/dtype.h"
#include "ops/activate.h"

namespace moecore::cuda {

struct ActivatePolicy {
  int vectors = 1;    // 1: 16-byte accesses, 0: element by element
  int threads = 256;  // of a block
  std::int64_t blocks = 1;
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
  const std::int64_t units = p.rows * (policy.vectors ? p.inter * element / kVectorBytes : p.inter);
  // Few units: narrow blocks on many SMs. Many: as many blocks as stay resident, each walking the problem.
  while (policy.threads > 64 && units < static_cast<std::int64_t>(policy.threads) * num_sms)
    policy.threads /= 2;
  const std::int64_t resident = static_cast<std::int64_t>(max_threads_per_sm / policy.threads) * num_sms;
  policy.blocks = std::clamp<std::int64_t>((units + policy.threads - 1) / policy.threads, 1, 4 * resident);
  return policy;
}

}  // namespace moecore::cuda
