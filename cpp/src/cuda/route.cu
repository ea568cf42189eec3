// route: logits -> the k largest experts of every token and their weights. Forms for the usual sizes are in
// route_thread.cuh, route_block.cuh and route_packed.cuh; the general form, for any E and K, is here: a warp
// routes one token.
//
// Lane l holds experts l, l + 32, l + 64, ... in registers. Selection works on keys mapped to unsigned
// integers of the same order, 0 for what cannot be selected: the largest of the warp and then the lowest
// expert that has it are two redux instructions. Scores of the chosen experts are computed again from their
// logits, a slot a lane, so no score array is kept. Sums run in the order of the CPU engine (16 interleaved
// partial sums, then halves), which makes the weights equal bit for bit.

#include <string>

#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/policy_override.h"
#include "cuda/route.cuh"
#include "cuda/route_block.cuh"
#include "cuda/route_packed.cuh"
#include "cuda/route_policy.h"
#include "cuda/route_thread.cuh"
#include "cuda/runtime.h"

namespace moecore::cuda {
namespace {

// A lane's keys as a queue: the largest first, of equal ones the lowest place first. Key i of the lane has
// the index i * 32 + lane in the warp. Few keys are sorted once, so that taking one is a shift of registers.
template <int kPerLane>
class Queue {
 public:
  __device__ __forceinline__ void fill(const unsigned (&keys)[kPerLane]) {
    unsigned place[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys_[i] = keys[i], place[i] = i;
    // Odd-even transposition: only neighbours change places, so equal keys keep their order.
#pragma unroll
    for (int round = 0; round < kPerLane; ++round) {
#pragma unroll
      for (int i = round % 2; i + 1 < kPerLane; i += 2) {
        const bool swap = keys_[i] < keys_[i + 1];
        const unsigned larger = max(keys_[i], keys_[i + 1]), smaller = min(keys_[i], keys_[i + 1]);
        const unsigned first = swap ? place[i + 1] : place[i], second = swap ? place[i] : place[i + 1];
        keys_[i] = larger, keys_[i + 1] = smaller, place[i] = first, place[i + 1] = second;
      }
    }
    places_ = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) places_ |= place[i] << 4 * i;
  }
  __device__ __forceinline__ unsigned head() const { return keys_[0]; }
  __device__ __forceinline__ unsigned index() const { return places_ % 16 * 32 + threadIdx.x % 32; }
  __device__ __forceinline__ void pop_if(bool mine) {
#pragma unroll
    for (int i = 0; i + 1 < kPerLane; ++i) keys_[i] = mine ? keys_[i + 1] : keys_[i];
    if (mine) keys_[kPerLane - 1] = kNone;
    if (mine) places_ >>= 4;
  }

 private:
  unsigned keys_[kPerLane];
  unsigned places_;  // of keys_[i] in the i-th four bits
};

// Many keys stay where they are and are searched again.
template <int kPerLane>
  requires(kPerLane > 8)
class Queue<kPerLane> {
 public:
  __device__ __forceinline__ void fill(const unsigned (&keys)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys_[i] = keys[i];
    find_head();
  }
  __device__ __forceinline__ unsigned head() const { return head_; }
  __device__ __forceinline__ unsigned index() const { return place_ * 32 + threadIdx.x % 32; }
  __device__ __forceinline__ void pop_if(bool mine) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys_[i] = mine && i == place_ ? kNone : keys_[i];
    find_head();
  }

 private:
  __device__ __forceinline__ void find_head() {
    head_ = keys_[0];
    place_ = 0;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      place_ = keys_[i] > head_ ? i : place_;
      head_ = max(head_, keys_[i]);
    }
  }

  unsigned keys_[kPerLane];
  unsigned head_;
  int place_;
};

// Finds the warp's largest key, at the lowest index that has it, and takes it out. True in the lane that had
// it; `largest` is kNone when none is left.
template <int kPerLane>
__device__ __forceinline__ bool take_largest(Queue<kPerLane>& queue, unsigned& largest, unsigned& index) {
  largest = __reduce_max_sync(dev::kWholeWarp, queue.head());
  bool mine = queue.head() == largest;
  const unsigned holders = __ballot_sync(dev::kWholeWarp, mine);
  index = queue.index();
  if (holders & (holders - 1)) mine = mine && index == __reduce_min_sync(holders, index);
  queue.pop_if(mine);
  return mine;
}

// The sum of e^(x - top) over experts e, by residue of e modulo 16 in ascending order, then by halves. Terms
// replace x.
template <int kPerLane>
__device__ __forceinline__ float sum_of_exponentials(float (&x)[kPerLane], float top) {
  const bool upper = threadIdx.x & 16;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float term = dev::exp(x[i] - top);
    const float other = __shfl_xor_sync(dev::kWholeWarp, term, 16);
    sum += upper ? other : term;
    sum += upper ? term : other;
    x[i] = term;
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(dev::kWholeWarp, sum, step);
  return sum;
}

// The rank of a group from each lane's two largest keys of it, as an ordered key.
__device__ __forceinline__ unsigned rank_of_group(unsigned first, unsigned second, bool sum_of_two) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned best = __reduce_max_sync(dev::kWholeWarp, first);
  float rank = best == kNone ? minus_infinity() : from_ordered(best);
  if (sum_of_two) {
    // One lane that has the largest gives it up.
    const unsigned owners = __ballot_sync(dev::kWholeWarp, first == best);
    const unsigned left = lane == __ffs(static_cast<int>(owners)) - 1 ? second : first;
    const unsigned next = __reduce_max_sync(dev::kWholeWarp, left);
    rank += next == kNone ? minus_infinity() : from_ordered(next);
  }
  return ordered(rank);
}

// Makes the keys outside the best groups kNone. Groups of whole registers (a multiple of 32 experts), at most
// 32: a group's rank lives in the lane of its number.
template <int kPerLane>
__device__ __forceinline__ void keep_best_register_groups(const RouteArgs& args, unsigned (&keys)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int registers = args.group_size / 32;
  const bool sum_of_two = args.group_score == GroupScore::kTop2Sum;
  unsigned rank[1] = {kNone};
  unsigned first = kNone, second = kNone;
  int group = 0, in_group = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
    if (++in_group < registers) continue;
    const unsigned r = rank_of_group(first, second, sum_of_two);
    if (lane == group && group < args.num_groups) rank[0] = r;
    first = second = kNone;
    in_group = 0;
    ++group;
  }
  Queue<1> ranks;
  ranks.fill(rank);
  bool mine = false;
  for (int n = 0; n < args.topk_groups; ++n) {
    unsigned largest, index;
    if (take_largest(ranks, largest, index)) mine = true;
  }
  const unsigned kept = __ballot_sync(dev::kWholeWarp, mine);
  group = in_group = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!(kept >> group & 1)) keys[i] = kNone;
    if (++in_group == registers) in_group = 0, ++group;
  }
}

// The same for groups of any size and number: the rank of group i * 32 + lane is in rank[i].
template <int kPerLane>
__device__ __forceinline__ void keep_best_groups(const RouteArgs& args, unsigned (&keys)[kPerLane]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool sum_of_two = args.group_score == GroupScore::kTop2Sum && args.group_size > 1;
  unsigned rank[kPerLane] = {};
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
    const unsigned r = rank_of_group(first, second, sum_of_two);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (g == i * 32 + lane) rank[i] = r;
  }
  Queue<kPerLane> ranks;
  ranks.fill(rank);
  bool kept[kPerLane] = {};
  for (int n = 0; n < args.topk_groups; ++n) {
    unsigned largest, index;
    const unsigned owner = __ballot_sync(dev::kWholeWarp, take_largest(ranks, largest, index));
    const int group =
        static_cast<int>(__shfl_sync(dev::kWholeWarp, index, __ffs(static_cast<int>(owner)) - 1));
    const int begin = group * args.group_size;
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

// Logits as they lie in memory, so that a load can be on its way while another token is routed.
template <int kPerLane>
struct Logits {
  unsigned raw[kPerLane];

  __device__ __forceinline__ void load(const RouteArgs& args, std::int64_t t) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (args.dtype == DType::kF32) {
      const unsigned* own = static_cast<const unsigned*>(args.logits) + t * args.logits_stride + lane;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (i * 32 + lane < args.num_experts) raw[i] = own[i * 32];
    } else {
      const unsigned short* own =
          static_cast<const unsigned short*>(args.logits) + t * args.logits_stride + lane;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (i * 32 + lane < args.num_experts) raw[i] = own[i * 32];
    }
  }
};

template <int kPerLane, bool kSoftmax, bool kScoreKeys>
__device__ __forceinline__ void route_token(const RouteArgs& args, std::int64_t t,
                                            const Logits<kPerLane>& logits, uint2* chosen) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* weights = args.weights + t * args.weights_stride;
  std::int32_t* ids = args.ids + t * args.ids_stride;

  // Phase 1: keys by logit.
  float x[kPerLane];
  unsigned keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = i * 32 + lane < args.num_experts ? widen(logits.raw[i], args.dtype) : minus_infinity();
    const bool finite = is_finite(x[i]);
    keys[i] = finite ? ordered(x[i]) : kNone;
    if (!finite) x[i] = minus_infinity();
  }

  // Phase 2: softmax's numbers; keys by score where that is another order.
  float top = 0.0f, sum = 1.0f;
  if constexpr (kSoftmax) {
    unsigned largest = keys[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) largest = max(largest, keys[i]);
    largest = __reduce_max_sync(dev::kWholeWarp, largest);
    if (largest != kNone) {
      top = from_ordered(largest);
      sum = sum_of_exponentials(x, top);
    }
  }
  if constexpr (kScoreKeys) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * 32 + lane;
      const float score = kSoftmax                            ? x[i] / sum
                          : args.scoring == Scoring::kSigmoid ? dev::sigmoid(x[i])
                                                              : x[i];
      const float bias = args.bias && e < args.num_experts ? (args.bias + lane)[i * 32] : 0.0f;
      if (keys[i] != kNone) keys[i] = is_finite(bias) ? ordered(score + bias) : kNone;
    }
    if (args.num_groups > 1 && args.group_size % 32 == 0 && args.num_groups <= 32)
      keep_best_register_groups(args, keys);
    else if (args.num_groups > 1)
      keep_best_groups(args, keys);
  }

  // Phase 3: the k largest, 32 slots at a time: their owners leave them in shared memory, a slot a lane picks
  // them up.
  Queue<kPerLane> queue;
  queue.fill(keys);
  float divisor = 0.0f;
  for (int first = 0; first < args.top_k; first += 32) {
    const int slots = min(32, args.top_k - first);
    for (int j = 0; j < slots; ++j) {
      unsigned largest, index;
      if (take_largest(queue, largest, index)) chosen[j] = {largest, index};
    }
    __syncwarp();
    const uint2 mine = chosen[lane];
    __syncwarp();
    const bool live = lane < slots && mine.x != kNone;
    float score = 0.0f;
    if (live) {
      // An ordered logit gives the logit back, but for the sign of a zero.
      const bool reload = kScoreKeys || args.scoring == Scoring::kIdentity;
      score = score_of<kSoftmax>(
          args, reload ? load_logit(args, t, static_cast<int>(mine.y)) : from_ordered(mine.x), top, sum);
    }
    if (args.renormalize) {
      for (int j = 0; j < slots; j += 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) divisor += __shfl_sync(dev::kWholeWarp, score, (j + i) % 32);
      }
      if (args.top_k <= 32) score = score / (divisor + 1e-20f);
    }
    if (lane < slots) {
      ids[first + lane] = live ? static_cast<std::int32_t>(mine.y) : -1;
      weights[first + lane] = live ? score * args.scale : 0.0f;
    }
  }
  // More than 32 slots: the sum is known only now. A lane goes over the weights that it wrote itself.
  if (args.renormalize && args.top_k > 32)
#pragma unroll 1
    for (int j = lane; j < args.top_k; j += 32)
      if (ids[j] >= 0)
        weights[j] =
            score_of<kSoftmax>(args, load_logit(args, t, ids[j]), top, sum) / (divisor + 1e-20f) * args.scale;
}

template <int kPerLane, bool kSoftmax, bool kScoreKeys>
__global__ void __launch_bounds__(kRouteMaxThreads) route_kernel(const RouteArgs args) {
  __shared__ uint2 chosen[kRouteMaxThreads];
  dev::wait_for_predecessor();
  dev::release_successor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = blockDim.x / 32, step = gridDim.x * warps;
  std::int64_t t = blockIdx.x * warps + threadIdx.x / 32;
  Logits<kPerLane> next;
  if (t < args.num_tokens) next.load(args, t);
  for (; t < args.num_tokens; t += step) {
    const Logits<kPerLane> current = next;
    if (t + step < args.num_tokens) next.load(args, t + step);  // on its way while this token is routed
    if (args.is_padding && args.is_padding[t]) {
#pragma unroll 1
      for (int j = lane; j < args.top_k; j += 32) {
        args.ids[t * args.ids_stride + j] = -1;
        args.weights[t * args.weights_stride + j] = 0.0f;
      }
      continue;
    }
    route_token<kPerLane, kSoftmax, kScoreKeys>(args, t, current, chosen + threadIdx.x / 32 * 32);
  }
}

template <bool kSoftmax, bool kScoreKeys>
auto select_kernel(int per_lane) {
  switch (per_lane) {
    case 1:
      return route_kernel<1, kSoftmax, kScoreKeys>;
    case 2:
      return route_kernel<2, kSoftmax, kScoreKeys>;
    case 4:
      return route_kernel<4, kSoftmax, kScoreKeys>;
    case 8:
      return route_kernel<8, kSoftmax, kScoreKeys>;
    case 16:
      return route_kernel<16, kSoftmax, kScoreKeys>;
    case 32:
      return route_kernel<32, kSoftmax, kScoreKeys>;
    default:
      return route_kernel<64, kSoftmax, kScoreKeys>;
  }
}

auto select_kernel(const RouteArgs& args, int per_lane) {
  const bool softmax = args.scoring == Scoring::kSoftmax, score_keys = args.bias || args.num_groups > 1;
  if (softmax) return score_keys ? select_kernel<true, true>(per_lane) : select_kernel<true, false>(per_lane);
  return score_keys ? select_kernel<false, true>(per_lane) : select_kernel<false, false>(per_lane);
}

/// Blocks of an SM that registers leave room for.
constexpr int packed_blocks_per_sm(int per_lane) {
  return per_lane == 4 ? 12 : per_lane == 8 ? 10 : 6;
}

template <int kLanes, int kPerLane, bool kSoftmax, RouteKeys kKeys>
__global__ void __launch_bounds__(kRouteMaxThreads, packed_blocks_per_sm(kPerLane))
    route_packed_kernel(const RouteArgs args) {
  constexpr int kTokens = 32 / kLanes;
  __shared__ RouteScratch scratch[kRouteMaxThreads / 32 * kTokens];
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (std::int64_t first = (blockIdx.x * warps + warp) * kTokens; first < args.num_tokens;
       first += gridDim.x * warps * kTokens)
    route_packed<kLanes, kPerLane, kSoftmax, kKeys>(args, first, args.num_tokens, scratch + warp * kTokens);
}

template <bool kSoftmax, RouteKeys kKeys>
auto select_packed_kernel(const RoutePolicy& policy) {
  switch (policy.lanes * 64 + policy.per_lane) {
    case 8 * 64 + 4:
      return route_packed_kernel<8, 4, kSoftmax, kKeys>;
    case 16 * 64 + 8:
      return route_packed_kernel<16, 8, kSoftmax, kKeys>;
    case 16 * 64 + 16:
      return route_packed_kernel<16, 16, kSoftmax, kKeys>;
    case 32 * 64 + 4:
      return route_packed_kernel<32, 4, kSoftmax, kKeys>;
    case 32 * 64 + 8:
      return route_packed_kernel<32, 8, kSoftmax, kKeys>;
    default:
      return route_packed_kernel<32, 16, kSoftmax, kKeys>;
  }
}

auto select_packed_kernel(const RouteArgs& args, const RoutePolicy& policy) {
  if (args.scoring == Scoring::kSoftmax) return select_packed_kernel<true, RouteKeys::kLogit>(policy);
  if (args.num_groups > 1) return select_packed_kernel<false, RouteKeys::kGrouped>(policy);
  return args.bias ? select_packed_kernel<false, RouteKeys::kScore>(policy)
                   : select_packed_kernel<false, RouteKeys::kLogit>(policy);
}

template <int kExperts, bool kSoftmax, bool kScoreKeys>
__global__ void __launch_bounds__(kRouteMaxThreads) route_thread_kernel(const RouteArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * blockDim.x; begin < args.num_tokens;
       begin += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t t = begin + threadIdx.x;
    route_in_thread<kExperts, kSoftmax, kScoreKeys>(args, min(t, args.num_tokens - 1), t < args.num_tokens);
  }
}

template <int kExperts>
auto select_thread_kernel(const RouteArgs& args) {
  if (args.scoring == Scoring::kSoftmax) return route_thread_kernel<kExperts, true, false>;
  return args.bias ? route_thread_kernel<kExperts, false, true> : route_thread_kernel<kExperts, false, false>;
}

template <bool kSoftmax, RouteKeys kKeys>
__global__ void __launch_bounds__(32 * kMaxBlockWarps) route_block_kernel(const RouteArgs args) {
  __shared__ RouteBlockScratch scratch;
  dev::wait_for_predecessor();
  dev::release_successor();
  route_in_block<kSoftmax, kKeys>(args, blockIdx.x, scratch);
}

auto select_block_kernel(const RouteArgs& args) {
  if (args.scoring == Scoring::kSoftmax) return route_block_kernel<true, RouteKeys::kLogit>;
  if (args.num_groups > 1) return route_block_kernel<false, RouteKeys::kGrouped>;
  return args.bias ? route_block_kernel<false, RouteKeys::kScore>
                   : route_block_kernel<false, RouteKeys::kLogit>;
}

auto select_kernel(const RouteArgs& args, const RoutePolicy& policy) {
  switch (policy.form) {
    case RouteForm::kThread:
      return policy.per_lane == 8 ? select_thread_kernel<8>(args) : select_thread_kernel<16>(args);
    case RouteForm::kBlock:
      return select_block_kernel(args);
    case RouteForm::kPacked:
      return select_packed_kernel(args, policy);
    default:
      return select_kernel(args, policy.per_lane);
  }
}

std::string describe(const RoutePolicy& policy) {
  constexpr const char* kForms[] = {"general", "packed", "a thread a token", "a block a token"};
  return std::string("cuda, ") + kForms[static_cast<int>(policy.form)] +
         ", lanes=" + std::to_string(policy.lanes) + " a token, " + std::to_string(policy.per_lane) +
         " experts a lane, threads=" + std::to_string(policy.threads) +
         " blocks=" + std::to_string(policy.blocks);
}

// The form that the knob `lanes` names: 0 general, 1 thread, 8 to 32 packed, 64 block.
RoutePolicy policy_with_lanes(const RouteProblem& p, int lanes, int num_sms) {
  if (lanes == 0) return general_route_policy(p, num_sms);
  if (lanes == 1) return thread_route_policy(p, num_sms);
  return lanes <= 32 ? packed_route_policy(p, lanes, num_sms) : block_route_policy(p, num_sms);
}

// The selected policy with the caller's changes.
RoutePolicy choose_policy(const RouteProblem& p, int num_sms, std::string_view text) {
  RoutePolicy policy = select_route_policy(p, num_sms);
  if (text.empty()) return policy;
  int lanes = -1, threads = 0, blocks = 0;
  override_policy("route", text,
                  {{"lanes", &lanes, {0, 1, 8, 16, 32, 64}},
                   {"threads", &threads, {32, 64, 128}},
                   {"blocks", &blocks, {num_sms, 2 * num_sms, 4 * num_sms, 8 * num_sms, 16 * num_sms}}});
  if (lanes >= 0) {
    policy = policy_with_lanes(p, lanes, num_sms);
    if (lanes > 0 && policy.form == RouteForm::kGeneral)
      throw InvalidArgument("route: policy is \"" + std::string(text) +
                            "\", expected lanes that can hold the experts and groups");
  }
  if (policy.form == RouteForm::kBlock) return policy;  // its experts say how many threads, its tokens blocks
  if (threads > 0) policy.threads = threads;
  if (blocks > 0) policy.blocks = blocks;
  return policy;
}

}  // namespace

void route(const RouteProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("route", ctx);
  const TuningSizes sizes{.rows = p.num_tokens,
                          .experts = p.num_experts,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const RoutePolicy policy = tuned(
      "route", sizes, ctx, [&](std::string_view text) { return choose_policy(p, device.num_sms, text); });
  if (explained(ctx, "route", [&] { return describe(policy); })) return;
  if (p.num_tokens == 0) return;

  const RouteArgs args = make_route_args(p, policy.form == RouteForm::kPacked ? policy.lanes : 0);
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(policy.blocks)),
                            .block = dim3(policy.threads),
                            .stream = stream(ctx),
                            .dependent = true};
  const DeviceGuard guard(device);
  launch("route", device, config, select_kernel(args, policy), args);
}

}  // namespace moecore::cuda
