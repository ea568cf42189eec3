// The activations on f32 buffers. Shared by activate and by the epilogue of grouped_gemm.

template <ActivationKind kind>
MOECORE_INLINE Vec activation_function(Vec x, Vec alpha) {
  using enum ActivationKind;
  if constexpr (kind == kSilu) return silu(x);
  if constexpr (kind == kGelu) return gelu(x);
  if constexpr (kind == kGeluTanh) return gelu_tanh(x);
  if constexpr (kind == kQuickGelu) return swish(x, set(1.702f));
  if constexpr (kind == kSwigluOai) return swish(x, alpha);
  const Vec positive = max(set(0.0f), x);  // NaN passes
  return kind == kRelu ? positive : positive * positive;
}

template <ActivationKind kind, bool gated>
void activate_buffer(const Activation& a, const float* gate, const float* up, float* out, std::int64_t n) {
  // Adding -0 changes nothing, adding +0 the sign of a zero; engines may leave out what changes nothing.
  const Vec alpha = set(a.alpha), beta = set(a.beta == 0.0f ? -0.0f : a.beta);
  const Vec limit = set(a.limit), minus_limit = set(-a.limit);
  for (std::int64_t i = 0; i < n; i += W) {
    Vec y = activation_function<kind>(min(limit, load(gate + i)), alpha);
    if constexpr (gated) y = y * (min(limit, max(minus_limit, load(up + i))) + beta);
    store(out + i, y);
  }
}

/// out[i] = f(gate[i]) * (up[i] + beta) for i < n, or f(gate[i]) without `up`, clamped as the activation
/// says. All three buffers reach up to the next multiple of W, and `out` may be either of the others.
inline void activate_floats(const Activation& a, const float* gate, const float* up, float* out,
                            std::int64_t n) {
  auto run = [&]<ActivationKind kind>() {
    up ? activate_buffer<kind, true>(a, gate, up, out, n) : activate_buffer<kind, false>(a, gate, up, out, n);
  };
  using enum ActivationKind;
  switch (a.kind) {
    case kSilu:
      return run.template operator()<kSilu>();
    case kGelu:
      return run.template operator()<kGelu>();
    case kGeluTanh:
      return run.template operator()<kGeluTanh>();
    case kQuickGelu:
      return run.template operator()<kQuickGelu>();
    case kRelu:
      return run.template operator()<kRelu>();
    case kRelu2:
      return run.template operator()<kRelu2>();
    case kSwigluOai:
      return run.template operator()<kSwigluOai>();
  }
}
