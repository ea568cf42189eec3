#pragma once
// The numbers of an activation as kernels take them, for policies too.

#include <limits>

#include "moecore/activate.h"

namespace moecore::cuda {

/// The numbers of an Activation, for kernels whose kind is a template argument.
struct ActivationParams {
  float alpha, beta, limit;
};

/// A beta of 0 becomes -0, whose addition changes nothing. See changes_nothing().
inline ActivationParams activation_params(const Activation& a) {
  return {a.alpha, a.beta == 0.0f ? -0.0f : a.beta, a.limit};
}

/// Whether limit and beta leave every number as it is, so that a kernel may leave them out.
inline bool changes_nothing(const ActivationParams& a) {
  return a.beta == 0.0f && a.limit == std::numeric_limits<float>::infinity();
}

}  // namespace moecore::cuda
