#pragma once
// route for up to 512 experts and 16 slots: kLanes lanes hold a token, so that a warp routes 32 / kLanes
// tokens.
//
// Selection without a round per slot, as on the CPU. The k-th largest of 16 column maxima bounds the k-th
// largest key from below; the few keys that reach it (about 11 of 256 for k = 8) are listed in shared memory
// and placed by counting how many are larger. A token with more than kMaxCandidates of them, by many equal
// keys, is routed slot by slot.
//
// Experts of lane l are l, l + kLanes, ..., or with groups a run of one group, so that a lane ranks its part
// of the group by itself. Sums run in the order of the CPU engine: 16 partial sums by expert modulo 16, then
// halves.

#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/route.cuh"

namespace moecore::cuda {

inline constexpr int kMaxCandidates = 64;
inline constexpr int kFewCandidates = 16;                             // as most tokens have
inline constexpr int kNowhere = kMaxCandidates + kFewCandidates - 1;  // a place that nobody reads

/// A token's shared memory. Candidates are read by fours, with -infinity behind the last.
struct RouteScratch {
  union {
    alignas(16) float columns[16];
    alignas(16) float keys[kNowhere + 1];
  };
  alignas(16) int ids[kNowhere + 1];
  float values[kNowhere + 1];  // scores of the candidates, but with kLogit, where keys are all there is
  alignas(16) float chosen_value[kMaxPackedSlots];
  int chosen_id[kMaxPackedSlots];
};

// A key and its expert as one number: larger is better, equal keys rank the lower expert first.
__device__ __forceinline__ std::uint64_t packed_key(float key, int e) {
  return static_cast<std::uint64_t>(ordered(key)) << 32 | (0xFFFFFFFFu - static_cast<unsigned>(e));
}
__device__ __forceinline__ int packed_expert(std::uint64_t packed) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<unsigned>(packed));
}

// Reductions over the kLanes lanes of a token.
template <int kLanes>
__device__ __forceinline__ float max_over_lanes(float x) {
  if constexpr (kLanes == 32) {
    return from_ordered(__reduce_max_sync(dev::kWholeWarp, ordered(x)));
  } else {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(dev::kWholeWarp, x, step));
    return x;
  }
}

template <int kLanes, int kPerLane, bool kSoftmax, RouteKeys kKeys>
struct PackedRouter {
  const RouteArgs& args;
  RouteScratch& scratch;  // of the lane's token
  std::int64_t t;
  int sub;  // lane within the token

  float key[kPerLane];  // -infinity for what cannot be selected
  float score[kKeys == RouteKeys::kLogit ? 1 : kPerLane];
  float top = 0.0f, sum = 1.0f;
  float largest;     // with groups: of the lane's keys
  bool kept = true;  // with groups: the lane's is one of the best

  // key[i] is of expert first_expert() + i * kStep, if that exists.
  static constexpr int kStep = kKeys == RouteKeys::kGrouped ? 1 : kLanes;
  __device__ __forceinline__ int first_expert() const {
    return kKeys == RouteKeys::kGrouped ? sub * args.experts_per_lane : sub;
  }
  __device__ __forceinline__ bool exists(int i) const {
    return kKeys == RouteKeys::kGrouped ? i < args.experts_per_lane : i * kLanes + sub < args.num_experts;
  }

  __device__ __forceinline__ bool every_expert_exists() const {
    return kKeys == RouteKeys::kGrouped ? args.experts_per_lane == kPerLane
                                        : args.num_experts == kLanes * kPerLane;
  }

  template <class Element>
  __device__ __forceinline__ void load(float (&x)[kPerLane]) const {
    const Element* own = static_cast<const Element*>(args.logits) + t * args.logits_stride + first_expert();
    if constexpr (kKeys == RouteKeys::kGrouped && sizeof(Element) == 4) {
      if (args.vector_loads) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += 4) {
          const uint4 four = exists(i) ? __ldg(reinterpret_cast<const uint4*>(own + i)) : uint4{};
          x[i] = __uint_as_float(four.x), x[i + 1] = __uint_as_float(four.y);
          x[i + 2] = __uint_as_float(four.z), x[i + 3] = __uint_as_float(four.w);
        }
        return;
      }
    }
    if (every_expert_exists()) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = widen(own[i * kStep], args.dtype);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = exists(i) ? widen(own[i * kStep], args.dtype) : 0.0f;
  }

  // Phase 1: keys.
  __device__ __forceinline__ void make_keys() {
    float x[kPerLane];
    if (args.dtype == DType::kF32)
      load<unsigned>(x);
    else
      load<unsigned short>(x);
    if constexpr (kKeys == RouteKeys::kLogit) {
      bool live = every_expert_exists();
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        key[i] = x[i];
        live = live & is_finite(x[i]);
      }
      if (live) return;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) key[i] = is_finite(x[i]) & exists(i) ? x[i] : minus_infinity();
    } else {
      make_scores(x);
    }
  }
  __device__ __forceinline__ void make_scores(const float (&x)[kPerLane]) {
    float bias[kPerLane];  // asked for before the logits are there
    if (kKeys == RouteKeys::kGrouped && args.vector_bias) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        const float4 four =
            exists(i) ? __ldg(reinterpret_cast<const float4*>(args.bias + first_expert() + i)) : float4{};
        bias[i] = four.x, bias[i + 1] = four.y, bias[i + 2] = four.z, bias[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        bias[i] = args.bias && exists(i) ? __ldg(args.bias + first_expert() + i * kStep) : 0.0f;
    }
    // Most tokens have finite logits near 0, where nothing has to be looked at expert by expert.
    bool near = true;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) near = near & (fabsf(x[i]) <= -kNearest);
    if (__all_sync(dev::kWholeWarp, near)) {
      bool live = every_expert_exists();
      if (args.scoring == Scoring::kSigmoid) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) score[i] = sigmoid_near(x[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) score[i] = x[i];
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        key[i] = score[i] + bias[i];
        live = live & is_finite(key[i]);  // as the bias is
      }
      if (live) return;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) key[i] = is_finite(key[i]) & exists(i) ? key[i] : minus_infinity();
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const bool live = is_finite(x[i]) & is_finite(bias[i]) & exists(i);
        score[i] = args.scoring == Scoring::kSigmoid ? dev::sigmoid(x[i]) : x[i];
        key[i] = live ? score[i] + bias[i] : minus_infinity();
      }
    }
  }

  // Phase 2: softmax's numbers.
  __device__ __forceinline__ void sum_exponentials() {
    float largest = key[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, key[i]);
    largest = max_over_lanes<kLanes>(largest);
    const bool any = largest > minus_infinity();
    top = any ? largest : 0.0f;

    float term[kPerLane];
    exponentials(key, top, term);
    float total;
    if constexpr (kLanes == 8) {
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; i += 2) even += term[i], odd += term[i + 1];
      total = even + odd;
    } else {
      total = 0.0f;
      const bool upper = sub & 16;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if constexpr (kLanes == 32) {
          const float other = __shfl_xor_sync(dev::kWholeWarp, term[i], 16);
          total += upper ? other : term[i];
          total += upper ? term[i] : other;
        } else {
          total += term[i];
        }
      }
    }
#pragma unroll
    for (int step = kLanes == 8 ? 4 : 8; step > 0; step /= 2)
      total += __shfl_xor_sync(dev::kWholeWarp, total, step);
    sum = any ? total : 1.0f;
  }

  // Phase 3: keys outside the best groups leave the race.
  __device__ __forceinline__ void keep_best_groups() {
    const int lanes = 1 << args.log2_group_lanes, group = sub >> args.log2_group_lanes;
    float first = key[0], second = minus_infinity();
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      second = fmaxf(second, fminf(first, key[i]));
      first = fmaxf(first, key[i]);
    }
    largest = first;
    for (int step = 1; step < lanes; step *= 2) {
      const float other_first = __shfl_xor_sync(dev::kWholeWarp, first, step);
      const float other_second = __shfl_xor_sync(dev::kWholeWarp, second, step);
      second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
      first = fmaxf(first, other_first);
    }
    const bool sum_of_two = args.group_score == GroupScore::kTop2Sum && args.group_size > 1;
    const float rank = sum_of_two ? first + second : first;
    // Each of the group's lanes counts among its share of the groups.
    int better = 0;
#pragma unroll 2
    for (int begin = 0; begin < args.num_groups; begin += lanes) {
      const int g = begin + (sub & (lanes - 1));
      const float other = __shfl_sync(dev::kWholeWarp, rank, g << args.log2_group_lanes, kLanes);
      better += (g < args.num_groups) & ((other > rank) | ((other == rank) & (g < group)));
    }
    for (int step = 1; step < lanes; step *= 2) better += __shfl_xor_sync(dev::kWholeWarp, better, step);
    kept = better < args.topk_groups;
  }

  // A number that at least k keys of the token reach, or the least finite one.
  __device__ __forceinline__ float bound() {
    constexpr int kOwn = kLanes == 8 ? 2 : 1, kColumns = 16;
    float column[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if constexpr (kKeys == RouteKeys::kGrouped && kOwn == 1) {
        column[c] = largest;
      } else {
        column[c] = key[c];
#pragma unroll
        for (int i = c + kOwn; i < kPerLane; i += kOwn) column[c] = fmaxf(column[c], key[i]);
      }
      if (!kept) column[c] = minus_infinity();
    }
    if constexpr (kLanes == 32) column[0] = fmaxf(column[0], __shfl_xor_sync(dev::kWholeWarp, column[0], 16));
    if (sub < 16) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) scratch.columns[c * kLanes + sub] = column[c];
    }
    __syncwarp();
    // Counted in floats, where a comparison gives what is added. Two of 32 lanes have the same column: each
    // compares it with half of them.
    constexpr int kShare = kLanes == 32 ? kColumns / 2 : kColumns;
    const float* others = scratch.columns + (kLanes == 32 ? sub / 16 * kShare : 0);
    float reached_by[kOwn] = {};
#pragma unroll
    for (int j = 0; j < kShare; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(others + j);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        reached_by[c] += four.x >= column[c] ? 1.0f : 0.0f;
        reached_by[c] += four.y >= column[c] ? 1.0f : 0.0f;
        reached_by[c] += four.z >= column[c] ? 1.0f : 0.0f;
        reached_by[c] += four.w >= column[c] ? 1.0f : 0.0f;
      }
    }
    if constexpr (kLanes == 32) reached_by[0] += __shfl_xor_sync(dev::kWholeWarp, reached_by[0], 16);
    float best = -3.402823466e38f;
#pragma unroll
    for (int c = 0; c < kOwn; ++c)
      if (reached_by[c] >= static_cast<float>(args.top_k)) best = fmaxf(best, column[c]);
    __syncwarp();  // columns may be overwritten
    return max_over_lanes<kLanes>(best);
  }

  // How many of candidates j, ..., j + 3 come before expert e with key `mine`.
  __device__ __forceinline__ int better_of_four(int j, float mine, int e) const {
    const float4 keys = *reinterpret_cast<const float4*>(scratch.keys + j);
    const int4 ids = *reinterpret_cast<const int4*>(scratch.ids + j);
    const auto better = [&](float key, int id) { return (key > mine) | ((key == mine) & (id < e)); };
    return better(keys.x, ids.x) + better(keys.y, ids.y) + better(keys.z, ids.z) + better(keys.w, ids.w);
  }

  // Candidate c gets the slot.
  __device__ __forceinline__ void choose(int slot, int c) {
    scratch.chosen_id[slot] = scratch.ids[c];
    scratch.chosen_value[slot] = kKeys == RouteKeys::kLogit ? scratch.keys[c] : scratch.values[c];
  }

  // Phase 4: the k largest into scratch.chosen_*; returns how many there are.
  __device__ __forceinline__ int select() {
    float least = bound();
    if (!kept) least = -minus_infinity();
    int own = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own += key[i] >= least;
    int end = own;  // of the lane's candidates in the list
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int below = __shfl_up_sync(dev::kWholeWarp, end, distance, kLanes);
      if (sub >= distance) end += below;
    }
    const int count = __shfl_sync(dev::kWholeWarp, end, kLanes - 1, kLanes);
    if (sub < kMaxPackedSlots) scratch.chosen_value[sub] = 0.0f;
    if (kLanes < kMaxPackedSlots) scratch.chosen_value[kLanes + sub] = 0.0f;
    if (__any_sync(dev::kWholeWarp, count > kMaxCandidates)) return select_by_slot();

    const int first = first_expert();
    int place = end - own;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool listed = key[i] >= least;
      const int at = listed ? place : kNowhere;  // stores without branches
      scratch.keys[at] = key[i];
      scratch.ids[at] = first + i * kStep;
      if constexpr (kKeys != RouteKeys::kLogit) scratch.values[at] = score[i];
      place += listed;
    }
    if (sub < kFewCandidates) scratch.keys[count + sub] = minus_infinity();
    if (kLanes < kFewCandidates) scratch.keys[count + kLanes + sub] = minus_infinity();
    __syncwarp();
    if (kLanes == 32 && count <= kFewCandidates) {  // two lanes for each of them
      const int c = sub % kFewCandidates, half = sub / kFewCandidates * (kFewCandidates / 2);
      const float mine = scratch.keys[c];
      const int e = scratch.ids[c];
      int better = better_of_four(half, mine, e) + better_of_four(half + 4, mine, e);
      better += __shfl_xor_sync(dev::kWholeWarp, better, kFewCandidates);
      if (sub < count && better < args.top_k) choose(better, c);
    } else {
      for (int c = sub; c < count; c += kLanes) {
        const float mine = scratch.keys[c];
        const int e = scratch.ids[c];
        int better = 0;
#pragma unroll 2
        for (int j = 0; j < count; j += 4) better += better_of_four(j, mine, e);
        if (better < args.top_k) choose(better, c);
      }
    }
    return min(count, args.top_k);
  }

  // The same, one slot after the other: each the best key behind the one before.
  __device__ __forceinline__ int select_by_slot() {
    std::uint64_t previous = ~std::uint64_t{0};
    int chosen = 0;
#pragma unroll 1
    for (int slot = 0; slot < args.top_k; ++slot) {
      std::uint64_t best = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const std::uint64_t packed = packed_key(key[i], first_expert() + i * kStep);
        if (kept && key[i] > minus_infinity() && packed < previous && packed > best) best = packed;
      }
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        const std::uint64_t other = __shfl_xor_sync(dev::kWholeWarp, best, step);
        best = other > best ? other : best;
      }
      if (best == 0) continue;
      const int e = packed_expert(best);
      const float x = load_logit(args, t, e);
      if (sub == 0) {
        scratch.chosen_id[slot] = e;
        scratch.chosen_value[slot] =
            kKeys != RouteKeys::kLogit && args.scoring == Scoring::kSigmoid ? dev::sigmoid(x) : x;
      }
      previous = best;
      ++chosen;
    }
    return chosen;
  }

  // Phase 5: weights.
  __device__ __forceinline__ void write(int chosen, bool store) {
    constexpr int kPasses = (kMaxPackedSlots + kLanes - 1) / kLanes;
    float score[kPasses];
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int slot = pass * kLanes + sub;
      score[pass] = 0.0f;
      if (slot < chosen) {
        score[pass] = scratch.chosen_value[slot];
        if constexpr (kKeys == RouteKeys::kLogit)
          score[pass] = score_of<kSoftmax>(args, score[pass], top, sum);
      }
    }
    if (args.renormalize) {
      if constexpr (kKeys == RouteKeys::kLogit) {
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
          if (pass * kLanes + sub < chosen) scratch.chosen_value[pass * kLanes + sub] = score[pass];
        __syncwarp();
      }
      float divisor = 0.0f;  // slots behind the chosen ones hold zeros
#pragma unroll
      for (int slot = 0; slot < kMaxPackedSlots; slot += 4) {
        if (slot >= args.top_k) break;
        const float4 four = *reinterpret_cast<const float4*>(scratch.chosen_value + slot);
        divisor = divisor + four.x + four.y + four.z + four.w;
      }
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) score[pass] = score[pass] / (divisor + 1e-20f);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int slot = pass * kLanes + sub;
      if (slot < args.top_k && store) {
        args.ids[t * args.ids_stride + slot] = slot < chosen ? scratch.chosen_id[slot] : -1;
        args.weights[t * args.weights_stride + slot] = slot < chosen ? score[pass] * args.scale : 0.0f;
      }
    }
    __syncwarp();  // the scratch may be used again
  }
};

/// Routes the 32 / kLanes tokens from `first` on, of which those below `end` exist, with the calling warp.
template <int kLanes, int kPerLane, bool kSoftmax, RouteKeys kKeys>
__device__ __forceinline__ void route_packed(const RouteArgs& args, std::int64_t first, std::int64_t end,
                                             RouteScratch* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t t = first + lane / kLanes;
  // Lanes without a token do the last one's work and store nothing.
  PackedRouter<kLanes, kPerLane, kSoftmax, kKeys> router{args, scratch[lane / kLanes], t < end ? t : end - 1,
                                                         lane % kLanes};
  router.make_keys();
  if constexpr (kSoftmax) router.sum_exponentials();
  if constexpr (kKeys == RouteKeys::kGrouped) router.keep_best_groups();
  int chosen = router.select();
  if (args.is_padding && args.is_padding[router.t]) chosen = 0;
  router.write(chosen, t < end);
}

}  // namespace moecore::cuda
