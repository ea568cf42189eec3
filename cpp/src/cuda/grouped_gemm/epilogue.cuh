#pragma once
// From f32 products to elements of out: router weight, bias, activation, one rounding.
//
// Both engines hold products as tensor-core accumulators: of every 16 weight rows a thread owns rows r and r
// + 8. When gated, the engines load gate rows into the first eight and up rows into the second, so the two
// values of one column of out meet in one thread.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/activation.cuh"
#include "cuda/device/convert.cuh"
#include "cuda/device/math.cuh"
#include "cuda/grouped_gemm/args.h"
#include "cuda/types.cuh"

namespace moecore::cuda {

/// The product itself.
struct Linear {
  static constexpr bool kGated = false;
  static __device__ __forceinline__ float apply(const EpilogueArgs&, float x) { return x; }
};

/// 2^x and 1/x, two units in the last place, subnormal results flushed.
__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

/// g * sigmoid(linear * g + cubic * g^3) * (u + beta), with the clamps of Activation;
/// sigmoid(y) = 1 / (1 + 2^(-y log2 e)).
struct SigmoidGate {
  static constexpr bool kGated = true;
  static __device__ __forceinline__ float apply(const EpilogueArgs& args, float gate, float up) {
    constexpr float kLargestSquare = 1e30f;  // keeps 0 * infinity out of the kinds without a cubic part
    gate = dev::min_or_nan(gate, args.limit);
    up = dev::max_or_nan(dev::min_or_nan(up, args.limit), -args.limit) + args.beta;
    const float slope = __fmaf_rn(args.cubic_log2e, fminf(gate * gate, kLargestSquare), args.linear_log2e);
    return gate * reciprocal_approx(1.0f + exp2_approx(gate * slope)) * up;
  }
};

/// The activation by the number of its kind. Not inlined: the kinds' code once, not for every accumulator.
__device__ __noinline__ inline float apply_activation(const EpilogueArgs& e, float gate, float up) {
  const ActivationParams params{e.alpha, e.beta, e.limit};
  auto apply = [&]<ActivationKind kKind>() {
    return e.gated ? activate_gated<kKind>(gate, up, params) : activate_plain<kKind>(gate, params);
  };
  using enum ActivationKind;
  switch (e.kind) {
    case kSilu:
      return apply.template operator()<kSilu>();
    case kGelu:
      return apply.template operator()<kGelu>();
    case kGeluTanh:
      return apply.template operator()<kGeluTanh>();
    case kQuickGelu:
      return apply.template operator()<kQuickGelu>();
    case kRelu:
      return apply.template operator()<kRelu>();
    case kRelu2:
      return apply.template operator()<kRelu2>();
    default:
      return apply.template operator()<kSwigluOai>();
  }
}

/// The activation of a column's values from the first and the second eight of 16 weight rows.
template <class Form>
__device__ __forceinline__ float activate_eights(const EpilogueArgs& args, float first, float second) {
  return Form::apply(args, args.swapped ? second : first, args.swapped ? first : second);
}

/// Two adjacent elements of T in one register.
template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high);
template <>
__device__ __forceinline__ unsigned pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}
template <>
__device__ __forceinline__ unsigned pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

/// Router weight of a row of out, 1 without one.
__device__ __forceinline__ float row_weight(const EpilogueArgs& args, int row) {
  if (!args.row_weights) return 1.0f;
  return load_f32(args.row_weights, args.row_weight_dtype, row);
}

/// Bias of one weight row of an expert, 0 without one.
template <class T>
__device__ __forceinline__ float bias_of(const EpilogueArgs& args, int expert, int weight_row) {
  if (!args.bias) return 0.0f;
  const std::int64_t i = expert * args.bias_stride + weight_row;
  return args.bias_is_f32 ? static_cast<const float*>(args.bias)[i]
                          : dev::to_f32(static_cast<const T*>(args.bias)[i]);
}

/// The biases of a thread's two accumulator rows, in their order in the tile. When gated both belong to
/// column `column`, else to `column` and column + 8.
struct BiasPair {
  float first = 0.0f, second = 0.0f;
};
template <class T, class Form>
__device__ __forceinline__ BiasPair bias_pair(const EpilogueArgs& args, int expert, int column) {
  BiasPair bias;
  if (!args.bias) return bias;
  if constexpr (Form::kGated) {
    if (column >= args.columns) return bias;
    const int gate = args.gate_first + column * args.row_step, up = args.up_first + column * args.row_step;
    bias.first = bias_of<T>(args, expert, args.swapped ? up : gate);
    bias.second = bias_of<T>(args, expert, args.swapped ? gate : up);
  } else {
    if (column < args.columns) bias.first = bias_of<T>(args, expert, column);
    if (column + 8 < args.columns) bias.second = bias_of<T>(args, expert, column + 8);
  }
  return bias;
}

}  // namespace moecore::cuda
