#pragma once
// The validated form of route.

#include <cstdint>

#include "core/check.h"
#include "core/table.h"
#include "moecore/route.h"
#include "ops/backend.h"

namespace moecore {

using RouteTypes = FloatTypes;  // of the logits
inline constexpr std::int64_t kMaxExperts = 2048;

struct RouteProblem {
  const void* logits = nullptr;  // [T,E]
  DType dtype = DType::kF32;
  std::int64_t num_tokens = 0;
  std::int64_t num_experts = 0;
  std::int64_t logits_stride = 0;
  float* weights = nullptr;  // [T,K]
  std::int64_t weights_stride = 0;
  std::int32_t* ids = nullptr;  // [T,K]
  std::int64_t ids_stride = 0;
  std::int64_t top_k = 0;
  Scoring scoring = Scoring::kSoftmax;
  GroupScore group_score = GroupScore::kTop2Sum;
  const float* bias = nullptr;  // [E] or none
  std::int64_t num_groups = 1;
  std::int64_t topk_groups = 1;
  bool renormalize = false;
  float scale = 1.0f;
  const std::uint8_t* is_padding = nullptr;  // [T] or none
};

/// Checks the arguments of route.
RouteProblem make_route_problem(const Check& check, const TensorView& logits, const TensorView& weights,
                                const TensorView& ids, const RouteOptions& options);

namespace cpu {
BackendFn<RouteProblem> route;
}
namespace cuda {
BackendFn<RouteProblem> route;
}

}  // namespace moecore
