#pragma once
// route for few tokens: a block routes a token, a warp 32 experts of it or one group, a lane one expert. A
// third of the dependent instructions of the packed form, and more instructions in all.
//
// A lane finds the rank of its key by counting the keys of its warp that come before it; the first top_k of
// every warp (of every kept group) are candidates, at most 32, and the first warp ranks those in the same
// way.

#include "cuda/device/reduce.cuh"
#include "cuda/route.cuh"

namespace moecore::cuda {

/// 32 keys, twice: the second time one larger. The keys that come before key i of 32, larger or equal with a
/// lower index, are then the words i + 1, ..., i + 31 that are larger than it. Equal keys found by a match of
/// the warp and words read by fours take a quarter of the loads and 0.3 us more.
struct RankedKeys {
  unsigned words[64];

  __device__ __forceinline__ void set(int i, unsigned key) {
    words[i] = key;
    words[32 + i] = key + 1;
  }
  __device__ __forceinline__ int rank(int i, unsigned key) const {
    // Two sums of borrows: an instruction to compare and one to count, in two chains.
    int odd = 0, even = 0;
#pragma unroll
    for (int d = 1; d < 32; d += 2) {
      count_if_larger(odd, words[i + d], key);
      if (d + 1 < 32) count_if_larger(even, words[i + d + 1], key);
    }
    return -(odd + even);
  }

 private:
  static __device__ __forceinline__ void count_if_larger(int& minus_count, unsigned word, unsigned key) {
    asm("{ .reg .u32 difference; sub.cc.u32 difference, %1, %2; subc.u32 %0, %0, 0; }"
        : "+r"(minus_count)
        : "r"(key), "r"(word));
  }
};

struct RouteBlockScratch {
  RankedKeys of_warp[kMaxBlockWarps];
  RankedKeys candidates;
  int candidate_id[32];
  float candidate_value[32];
  unsigned largest[kMaxBlockWarps];                     // softmax: of a warp
  float first[kMaxBlockWarps], second[kMaxBlockWarps];  // grouped: the best two keys of a warp
  float terms[32 * kMaxBlockWarps];
  alignas(16) float chosen_value[kMaxPackedSlots];
  int chosen_id[kMaxPackedSlots];
};

template <bool kSoftmax, RouteKeys kKeys>
__device__ __forceinline__ void route_in_block(const RouteArgs& args, std::int64_t t,
                                               RouteBlockScratch& scratch) {
  const int e = static_cast<int>(threadIdx.x), lane = e % 32, warp = e / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const bool exists = e < args.num_experts;
  const float x = exists ? load_logit(args, t, e) : minus_infinity();
  bool live = is_finite(x);
  float key = x, value = x;
  if constexpr (kKeys != RouteKeys::kLogit) {
    const float bias = args.bias && exists ? __ldg(args.bias + e) : 0.0f;
    if (args.scoring == Scoring::kSigmoid) value = dev::sigmoid(x);
    key = value + bias;
    live = live && is_finite(bias);
  }
  const unsigned own = live ? ordered(key) : kNone;
  RankedKeys& keys = scratch.of_warp[warp];
  keys.set(lane, own);
  if (warp == 0) {
    const int candidates = (kKeys == RouteKeys::kGrouped ? args.topk_groups : warps) * args.top_k;
    if (lane >= candidates) scratch.candidates.words[lane] = scratch.candidates.words[32 + lane] = kNone;
    if (lane < kMaxPackedSlots) scratch.chosen_value[lane] = 0.0f, scratch.chosen_id[lane] = -1;
  }

  float top = 0.0f;
  if constexpr (kSoftmax) {
    const unsigned largest = __reduce_max_sync(dev::kWholeWarp, own);
    if (lane == 0) scratch.largest[warp] = largest;
    __syncthreads();
    unsigned most = kNone;
#pragma unroll
    for (int w = 0; w < kMaxBlockWarps; ++w)
      if (w < warps) most = max(most, scratch.largest[w]);
    if (most != kNone) top = from_ordered(most);
    scratch.terms[e] = live ? dev::exp(x - top) : 0.0f;
  } else {
    __syncwarp();
  }

  const int rank = keys.rank(lane, own);
  int list = warp;  // of the candidates
  bool kept = true;
  if constexpr (kKeys == RouteKeys::kGrouped) {
    const float by = own == kNone ? minus_infinity() : key;
    if (rank == 0) scratch.first[warp] = by;
    if (rank == 1) scratch.second[warp] = by;
    __syncthreads();
    float of_group = minus_infinity();
    if (lane < args.num_groups)
      of_group =
          scratch.first[lane] + (args.group_score == GroupScore::kTop2Sum ? scratch.second[lane] : 0.0f);
    int better = 0;
#pragma unroll
    for (int g = 0; g < kMaxBlockWarps; ++g) {
      const float other = __shfl_sync(dev::kWholeWarp, of_group, g);
      better += (g < args.num_groups) & ((other > of_group) | ((other == of_group) & (g < lane)));
    }
    const unsigned all_kept =
        __ballot_sync(dev::kWholeWarp, lane < args.num_groups && better < args.topk_groups);
    kept = all_kept >> warp & 1;
    list = __popc(all_kept & ((1u << warp) - 1));
  }
  if (kept && rank < args.top_k) {
    const int at = list * args.top_k + rank;
    scratch.candidates.set(at, own);
    scratch.candidate_id[at] = e;
    scratch.candidate_value[at] = value;
  }
  __syncthreads();
  if (warp > 0) return;

  float sum = 1.0f;
  if constexpr (kSoftmax) {
    // By expert modulo 16, then by halves: the order of the other forms and of the CPU engine.
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kMaxBlockWarps; ++i)
      total += i < 2 * warps ? scratch.terms[i * 16 + lane % 16] : 0.0f;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) total += __shfl_xor_sync(dev::kWholeWarp, total, step);
    if (total > 0.0f) sum = total;
  }
  const unsigned candidate = scratch.candidates.words[lane];
  const int place = scratch.candidates.rank(lane, candidate);
  if (candidate != kNone && place < args.top_k) {
    float score = scratch.candidate_value[lane];
    if constexpr (kKeys == RouteKeys::kLogit) score = score_of<kSoftmax>(args, score, top, sum);
    scratch.chosen_value[place] = score;
    scratch.chosen_id[place] = scratch.candidate_id[lane];
  }
  __syncwarp();
  if (lane >= args.top_k) return;
  const bool padding = args.is_padding && args.is_padding[t];
  const int id = padding ? -1 : scratch.chosen_id[lane];
  float weight = scratch.chosen_value[lane];
  if (args.renormalize) {
    float divisor = 0.0f;
#pragma unroll
    for (int slot = 0; slot < kMaxPackedSlots; slot += 4) {
      if (slot >= args.top_k) break;
      const float4 four = *reinterpret_cast<const float4*>(scratch.chosen_value + slot);
      divisor = divisor + four.x + four.y + four.z + four.w;
    }
    weight = weight / (divisor + 1e-20f);
  }
  args.ids[t * args.ids_stride + lane] = id;
  args.weights[t * args.weights_stride + lane] = id < 0 ? 0.0f : weight * args.scale;
}

}  // namespace moecore::cuda
