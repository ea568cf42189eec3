#pragma once
// What the kernels of route share: their arguments, ordered keys, scores.

#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "cuda/device/math.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/route_policy.h"
#include "ops/route.h"

namespace moecore::cuda {

inline constexpr unsigned kNone = 0;  // the ordered key of what cannot be selected

/// Slots of a token in the packed and the block form.
inline constexpr int kMaxPackedSlots = 16;

/// What orders the experts: the logit, or score + bias, of all experts or of those of the best groups.
enum class RouteKeys { kLogit, kScore, kGrouped };

struct RouteArgs {
  const void* logits;
  DType dtype;
  std::int64_t num_tokens, logits_stride;
  int num_experts, top_k;
  float* weights;
  std::int64_t weights_stride;
  std::int32_t* ids;
  std::int64_t ids_stride;
  Scoring scoring;
  GroupScore group_score;
  const float* bias;
  int num_groups, topk_groups, group_size;
  bool renormalize;
  float scale;
  const std::uint8_t* is_padding;
  // For the packed form with groups.
  int log2_group_lanes, experts_per_lane;
  bool vector_loads, vector_bias;  // f32 logits of a lane are aligned vectors, and so is its bias
};

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(0xFF800000);
}

__device__ __forceinline__ bool is_finite(float x) {
  return fabsf(x) < __int_as_float(0x7F800000);
}

// Orders as the float does, -0 equal to +0. Never kNone.
__device__ __forceinline__ unsigned ordered(float key) {
  const int bits = __float_as_int(key + 0.0f);
  return static_cast<unsigned>(bits ^ (bits >> 31 | static_cast<int>(0x80000000)));
}
__device__ __forceinline__ float from_ordered(unsigned u) {
  return __int_as_float(static_cast<int>(u & 0x80000000 ? u ^ 0x80000000 : ~u));
}

template <bool kSoftmax>
__device__ __forceinline__ float score_of(const RouteArgs& args, float logit, float top, float sum) {
  if constexpr (kSoftmax) return dev::exp(logit - top) / sum;
  return args.scoring == Scoring::kSigmoid ? dev::sigmoid(logit) : logit;
}

// dev::exp(x) for x in [kNearest, 0], where the result is a normal number: the power of two is an addition.
inline constexpr float kNearest = -86.0f;
__device__ __forceinline__ float exp_near(float x) {
  const auto [shifted, p] = dev::reduced_exp(x);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}
__device__ __forceinline__ float sigmoid_near(float x) {
  const float e = exp_near(-fabsf(x));
  return dev::divide_by_one_plus(x < 0.0f ? e : 1.0f, 1.0f + e);
}

// term[i] = e^(x[i] - top), for x[i] <= top. Every lane of the warp takes part.
template <int kCount>
__device__ __forceinline__ void exponentials(const float (&x)[kCount], float top, float (&term)[kCount]) {
  bool far = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    far = far || !(x[i] - top >= kNearest);
    term[i] = exp_near(x[i] - top);
  }
  if (__any_sync(dev::kWholeWarp, far)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) term[i] = dev::exp(x[i] - top);
  }
}

__device__ __forceinline__ float widen(unsigned raw, DType dtype) {
  if (dtype == DType::kF32) return __uint_as_float(raw);
  if (dtype == DType::kBF16) return __uint_as_float(raw << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
}

__device__ __forceinline__ float load_logit(const RouteArgs& args, std::int64_t t, int e) {
  const std::int64_t i = t * args.logits_stride + e;
  return widen(args.dtype == DType::kF32 ? static_cast<const unsigned*>(args.logits)[i]
                                         : static_cast<const unsigned short*>(args.logits)[i],
               args.dtype);
}

/// `lanes` of a token in the packed form, else 0.
inline RouteArgs make_route_args(const RouteProblem& p, int lanes) {
  RouteArgs args{.logits = p.logits,
                 .dtype = p.dtype,
                 .num_tokens = p.num_tokens,
                 .logits_stride = p.logits_stride,
                 .num_experts = static_cast<int>(p.num_experts),
                 .top_k = static_cast<int>(p.top_k),
                 .weights = p.weights,
                 .weights_stride = p.weights_stride,
                 .ids = p.ids,
                 .ids_stride = p.ids_stride,
                 .scoring = p.scoring,
                 .group_score = p.group_score,
                 .bias = p.bias,
                 .num_groups = static_cast<int>(p.num_groups),
                 .topk_groups = static_cast<int>(p.topk_groups),
                 .group_size = static_cast<int>(p.num_experts / p.num_groups),
                 .renormalize = p.renormalize,
                 .scale = p.scale,
                 .is_padding = p.is_padding,
                 .log2_group_lanes = 0,
                 .experts_per_lane = 0,
                 .vector_loads = false,
                 .vector_bias = false};
  if (lanes > 0 && p.num_groups > 1) {
    const auto aligned = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
    args.log2_group_lanes = std::countr_zero(static_cast<unsigned>(lanes / args.num_groups));
    args.experts_per_lane = args.group_size >> args.log2_group_lanes;
    args.vector_loads = p.dtype == DType::kF32 && aligned(p.logits) && p.logits_stride % 4 == 0 &&
                        args.experts_per_lane % 4 == 0;
    args.vector_bias = p.bias && aligned(p.bias) && args.experts_per_lane % 4 == 0;
  }
  return args;
}

}  // namespace moecore::cuda
