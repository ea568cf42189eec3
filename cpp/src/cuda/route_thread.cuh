#pragma once
// route for up to 16 experts and 8 slots: a thread routes a token. Nothing waits for another lane, which is
// what the time of the other forms goes into when the experts are few.

#include "cuda/device/reduce.cuh"
#include "cuda/route.cuh"

namespace moecore::cuda {

template <int kExperts, class Element>
__device__ __forceinline__ void load_logits(const RouteArgs& args, std::int64_t t, float (&x)[kExperts]) {
  const Element* from = static_cast<const Element*>(args.logits) + t * args.logits_stride;
  Element raw[kExperts];
#pragma unroll
  for (int e = 0; e < kExperts; ++e) raw[e] = e < args.num_experts ? from[e] : Element{};
#pragma unroll
  for (int e = 0; e < kExperts; ++e)
    x[e] = e < args.num_experts ? widen(raw[e], args.dtype) : minus_infinity();
}

template <int kExperts, bool kSoftmax, bool kScoreKeys>
__device__ __forceinline__ void route_in_thread(const RouteArgs& args, std::int64_t t, bool exists) {
  float key[kExperts], value[kExperts];  // value: what a weight is made of
  if (args.dtype == DType::kF32)
    load_logits<kExperts, unsigned>(args, t, key);
  else
    load_logits<kExperts, unsigned short>(args, t, key);
#pragma unroll
  for (int e = 0; e < kExperts; ++e) key[e] = is_finite(key[e]) ? key[e] : minus_infinity();
  float sum = 1.0f;
  if constexpr (kSoftmax) {
    float top = key[0];
#pragma unroll
    for (int e = 1; e < kExperts; ++e) top = fmaxf(top, key[e]);
    if (!(top > minus_infinity())) top = 0.0f;
    exponentials(key, top, value);
    // By expert modulo 16, then by halves: the order of the other forms and of the CPU engine.
    float part[kExperts];
#pragma unroll
    for (int e = 0; e < kExperts; ++e) part[e] = value[e];
#pragma unroll
    for (int half = kExperts / 2; half > 0; half /= 2)
#pragma unroll
      for (int e = 0; e < half; ++e) part[e] += part[e + half];
    sum = part[0] > 0.0f ? part[0] : 1.0f;
  } else {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      value[e] = args.scoring == Scoring::kSigmoid ? dev::sigmoid(key[e]) : key[e];
      if constexpr (kScoreKeys) {
        const float bias = e < args.num_experts ? __ldg(args.bias + e) : 0.0f;
        key[e] = key[e] > minus_infinity() && is_finite(bias) ? value[e] + bias : minus_infinity();
      }
    }
  }

  float score[kMaxThreadSlots], divisor = 0.0f;
  int id[kMaxThreadSlots];
#pragma unroll
  for (int slot = 0; slot < kMaxThreadSlots; ++slot) {
    if (slot == args.top_k) break;
    float best = minus_infinity();
    id[slot] = -1, score[slot] = 0.0f;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const bool better = key[e] > best;
      best = better ? key[e] : best;
      id[slot] = better ? e : id[slot];
      score[slot] = better ? value[e] : score[slot];
    }
#pragma unroll
    for (int e = 0; e < kExperts; ++e) key[e] = id[slot] == e ? minus_infinity() : key[e];
    if constexpr (kSoftmax) score[slot] = score[slot] / sum;
    divisor += score[slot];
  }
  if (!exists) return;
  const bool padding = args.is_padding && args.is_padding[t];
  float* weights = args.weights + t * args.weights_stride;
  std::int32_t* ids = args.ids + t * args.ids_stride;
#pragma unroll
  for (int slot = 0; slot < kMaxThreadSlots; ++slot) {
    if (slot == args.top_k) break;
    if (args.renormalize) score[slot] = score[slot] / (divisor + 1e-20f);
    const bool live = id[slot] >= 0 && !padding;
    ids[slot] = live ? id[slot] : -1;
    weights[slot] = live ? score[slot] * args.scale : 0.0f;
  }
}

}  // namespace moecore::cuda
