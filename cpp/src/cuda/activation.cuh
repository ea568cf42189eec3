#pragma once
// The activations on single f32 values, for every kernel that has one.

#include "cuda/activation_params.h"
#include "cuda/device/math.cuh"
#include "moecore/activate.h"

namespace moecore::cuda {

template <ActivationKind kKind>
__device__ __forceinline__ float activation_function(float x, float alpha) {
  using enum ActivationKind;
  if constexpr (kKind == kSilu) return dev::silu(x);
  if constexpr (kKind == kGelu) return dev::gelu(x);
  if constexpr (kKind == kGeluTanh) return dev::gelu_tanh(x);
  if constexpr (kKind == kQuickGelu) return dev::swish(x, 1.702f);
  if constexpr (kKind == kSwigluOai) return dev::swish(x, alpha);
  const float positive = dev::max_or_second(0.0f, x);
  return kKind == kRelu ? positive : positive * positive;
}

/// f(gate) * (up + beta), clamped as the activation says.
template <ActivationKind kKind>
__device__ __forceinline__ float activate_gated(float gate, float up, const ActivationParams& a) {
  const float y = activation_function<kKind>(dev::min_or_nan(a.limit, gate), a.alpha);
  return y * (dev::min_or_nan(a.limit, dev::max_or_nan(-a.limit, up)) + a.beta);
}

/// The same where limit and beta change nothing.
template <ActivationKind kKind>
__device__ __forceinline__ float activate_and_mul(float gate, float up, float alpha) {
  return activation_function<kKind>(gate, alpha) * up;
}

/// f(x) for a row without an up part.
template <ActivationKind kKind>
__device__ __forceinline__ float activate_plain(float x, const ActivationParams& a) {
  return activation_function<kKind>(dev::min_or_nan(a.limit, x), a.alpha);
}

/// Calls f.template operator()<kKind>() for a kind known at run time.
template <class F>
void visit_activation(ActivationKind kind, F&& f) {
  using enum ActivationKind;
  switch (kind) {
    case kSilu:
      return f.template operator()<kSilu>();
    case kGelu:
      return f.template operator()<kGelu>();
    case kGeluTanh:
      return f.template operator()<kGeluTanh>();
    case kQuickGelu:
      return f.template operator()<kQuickGelu>();
    case kRelu:
      return f.template operator()<kRelu>();
    case kRelu2:
      return f.template operator()<kRelu2>();
    case kSwigluOai:
      return f.template operator()<kSwigluOai>();
  }
}

}  // namespace moecore::cuda
