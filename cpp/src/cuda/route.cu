// route: logits -> the k largest experts of every token and their weights. A warp routes one token.
//
// Lane l holds experts l, l + 32, l + 64, ... in registers. Selection works on keys mapped to unsigned
// integers of the same order, 0 for what cannot be selected: the largest of the warp and then the lowest
// expert that has it are two redux instructions. Scores of the chosen experts are computed again from their
// logits, a slot a lane, so no score array is kept. Sums run in the order of the CPU engine (16 interleaved
// partial sums, then halves), which makes the weights equal bit for bit.

#include <string>

#include "core/table.h"
#include "cuda/device/convert.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/policy_override.h"
#include "cuda/route_policy.h"
#include "cuda/runtime.h"
#include "cuda/types.cuh"

namespace moecore::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr unsigned kNone = 0;  // the ordered key of what cannot be selected
constexpr int kNoExpert = 0x7FFFFFFF;

struct RouteArgs {
  const void* logits;
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

// The lowest index i * 32 + lane with the largest key of the warp, whose key becomes kNone; kNoExpert when
// none is left. The same value in all lanes.
template <int kPerLane>
__device__ __forceinline__ int take_largest(unsigned (&keys)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned best = keys[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) best = max(best, keys[i]);
  best = __reduce_max_sync(dev::kWholeWarp, best);
  if (best == kNone) return kNoExpert;
  unsigned index = kNoExpert;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i)
    if (keys[i] == best) index = i * 32 + lane;
  index = __reduce_min_sync(dev::kWholeWarp, index);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (index == static_cast<unsigned>(i * 32 + lane)) keys[i] = kNone;
  return static_cast<int>(index);
}

// The sum of e^(x - top) over experts e, by residue of e modulo 16 in ascending order, then by halves. Terms
// replace x when `keep`.
template <int kPerLane>
__device__ __forceinline__ float sum_of_exponentials(float (&x)[kPerLane], float top, bool keep) {
  const bool upper = threadIdx.x & 16;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float term = dev::exp(x[i] - top);
    const float other = __shfl_xor_sync(dev::kWholeWarp, term, 16);
    sum += upper ? other : term;
    sum += upper ? term : other;
    if (keep) x[i] = term;
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(dev::kWholeWarp, sum, step);
  return sum;
}

// The ranks of all groups, group i * 32 + lane in ranks[i] as ordered keys; kNone beyond the last group.
template <int kPerLane>
__device__ __forceinline__ void rank_groups(const RouteArgs& args, const unsigned (&keys)[kPerLane],
                                            unsigned (&ranks)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) ranks[i] = kNone;
  const bool sum_of_two = args.group_score == GroupScore::kTop2Sum && args.group_size > 1;
  for (int g = 0; g < args.num_groups; ++g) {
    const int begin = g * args.group_size, end = begin + args.group_size;
    unsigned first = kNone, second = kNone;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * 32 + lane;
      const unsigned key = e >= begin && e < end ? keys[i] : kNone;
      second = max(second, min(first, key));
      first = max(first, key);
    }
    const unsigned best = __reduce_max_sync(dev::kWholeWarp, first);
    float rank = best == kNone ? minus_infinity() : from_ordered(best);
    if (sum_of_two) {
      // One lane that has the largest gives it up.
      const unsigned owners = __ballot_sync(dev::kWholeWarp, first == best);
      const unsigned left = lane == __ffs(static_cast<int>(owners)) - 1 ? second : first;
      const unsigned next = __reduce_max_sync(dev::kWholeWarp, left);
      rank += next == kNone ? minus_infinity() : from_ordered(next);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (g == i * 32 + lane) ranks[i] = ordered(rank);
  }
}

// Makes the keys outside the best groups kNone.
template <int kPerLane>
__device__ __forceinline__ void keep_best_groups(const RouteArgs& args, unsigned (&keys)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned ranks[kPerLane];
  rank_groups(args, keys, ranks);
  bool kept[kPerLane] = {};
  for (int n = 0; n < args.topk_groups; ++n) {
    const int begin = take_largest(ranks) * args.group_size;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * 32 + lane;
      kept[i] = kept[i] || (e >= begin && e < begin + args.group_size);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (!kept[i]) keys[i] = kNone;
}

template <class T, int kPerLane>
__device__ __forceinline__ void route_token(const RouteArgs& args, std::int64_t t) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* logits = static_cast<const T*>(args.logits) + t * args.logits_stride;
  float* weights = args.weights + t * args.weights_stride;
  std::int32_t* ids = args.ids + t * args.ids_stride;
  if (args.is_padding && args.is_padding[t]) {
    for (int j = lane; j < args.top_k; j += 32) ids[j] = -1, weights[j] = 0.0f;
    return;
  }

  // Phase 1: logits, -inf for what cannot be selected.
  float x[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = i * 32 + lane;
    x[i] = e < args.num_experts ? dev::to_f32(logits[e]) : minus_infinity();
  }
  unsigned keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!is_finite(x[i])) x[i] = minus_infinity();
    keys[i] = x[i] > minus_infinity() ? ordered(x[i]) : kNone;
  }

  // Phase 2: scores, where the keys or the weights need them.
  const bool keys_are_scores = args.bias || args.num_groups > 1;
  float top = 0.0f, sum = 1.0f;
  if (args.scoring == Scoring::kSoftmax) {
    unsigned largest = keys[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) largest = max(largest, keys[i]);
    largest = __reduce_max_sync(dev::kWholeWarp, largest);
    if (largest != kNone) {
      top = from_ordered(largest);
      sum = sum_of_exponentials(x, top, keys_are_scores);
    }
  }
  if (keys_are_scores) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * 32 + lane;
      if (keys[i] == kNone) continue;
      const float score = args.scoring == Scoring::kSoftmax   ? x[i] / sum
                          : args.scoring == Scoring::kSigmoid ? dev::sigmoid(x[i])
                                                              : x[i];
      const float bias = args.bias ? args.bias[e] : 0.0f;
      keys[i] = is_finite(bias) ? ordered(score + bias) : kNone;
    }
    if (args.num_groups > 1) keep_best_groups(args, keys);
  }

  // Phase 3: the k largest, 32 slots at a time; then their scores, a slot a lane.
  float divisor = 0.0f;
  for (int first = 0; first < args.top_k; first += 32) {
    const int slots = min(32, args.top_k - first);
    int id = kNoExpert;
    for (int j = 0; j < slots; ++j) {
      const int taken = take_largest(keys);
      if (lane == j) id = taken;
    }
    float score = 0.0f;
    if (id != kNoExpert) {
      const float logit = dev::to_f32(logits[id]);
      score = args.scoring == Scoring::kSoftmax   ? dev::exp(logit - top) / sum
              : args.scoring == Scoring::kSigmoid ? dev::sigmoid(logit)
                                                  : logit;
    }
    if (args.renormalize)
      for (int j = 0; j < slots; ++j) divisor += __shfl_sync(dev::kWholeWarp, score, j);
    if (lane < slots) {
      ids[first + lane] = id == kNoExpert ? -1 : id;
      const bool done = !args.renormalize;
      weights[first + lane] = id == kNoExpert ? 0.0f : done ? score * args.scale : score;
    }
    // The sum is complete after the last 32 slots; a lane scales the weights that it wrote itself.
    if (args.renormalize && first + slots == args.top_k) {
      divisor += 1e-20f;
      for (int j = lane; j < args.top_k; j += 32)
        if (ids[j] >= 0) weights[j] = weights[j] / divisor * args.scale;
    }
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kMaxThreads) route_kernel(const RouteArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t warps = blockDim.x / 32;
  for (std::int64_t t = blockIdx.x * warps + threadIdx.x / 32; t < args.num_tokens; t += gridDim.x * warps)
    route_token<T, kPerLane>(args, t);
}

template <class T>
auto select_kernel(int per_lane) {
  switch (per_lane) {
    case 1:
      return route_kernel<T, 1>;
    case 2:
      return route_kernel<T, 2>;
    case 4:
      return route_kernel<T, 4>;
    case 8:
      return route_kernel<T, 8>;
    case 16:
      return route_kernel<T, 16>;
    case 32:
      return route_kernel<T, 32>;
    default:
      return route_kernel<T, 64>;
  }
}

std::string describe(const RoutePolicy& policy) {
  return "cuda, a warp a token, " + std::to_string(policy.per_lane) +
         " experts a lane, threads=" + std::to_string(policy.threads);
}

}  // namespace

void route(const RouteProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("route", ctx);
  RoutePolicy policy = select_route_policy(p.num_tokens, p.num_experts, device.num_sms);
  override_policy("route", ctx.policy, {{"threads", &policy.threads, {32, 64, 128, 256}}});
  if (explained(ctx, "route", [&] { return describe(policy); })) return;
  if (p.num_tokens == 0) return;

  const RouteArgs args{.logits = p.logits,
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
                       .is_padding = p.is_padding};
  const std::int64_t warps = policy.threads / 32;
  const std::int64_t blocks = std::min<std::int64_t>((p.num_tokens + warps - 1) / warps, 0x7FFFFFFF);
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(blocks)),
                            .block = dim3(policy.threads),
                            .stream = stream(ctx),
                            .dependent = true};
  const DeviceGuard guard(device);
  visit_instance(RouteTypes{}, p.dtype, [&]<DType D>() {
    launch("route", device, config, select_kernel<cuda_t<D>>(policy.per_lane), args);
  });
}

}  // namespace moecore::cuda
