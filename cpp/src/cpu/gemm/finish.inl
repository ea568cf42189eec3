// The epilogue: f32 results in L1 become rows of the output, rounded once.

template <class T>
void finish(const Finish& f) {
  const Activation* activation = f.activation;
  const int half = f.width / 2;
  for (int i = 0; i < f.rows; ++i) {
    float* c = f.c + i * f.c_pitch;
    if (f.col_scales)
      for (int n = 0; n < f.width; n += W) store(c + n, load(c + n) * load(f.col_scales + n));
    if (f.row_weights)
      for (int n = 0; n < f.width; n += W) store(c + n, load(c + n) * set(f.row_weights[i]));
    if (f.bias)
      for (int n = 0; n < f.width; n += W) store(c + n, load(c + n) + load(f.bias + n));
    T* out = reinterpret_cast<T*>(f.out + i * f.out_pitch);
    if (!activation) {
      narrow(c, out, f.width);
      continue;
    }
    const auto activate = kernels().activate_floats;
    alignas(64) float gate[kMaxBlockCols / 2 + W], up[kMaxBlockCols / 2 + W];
    switch (activation->order) {
      case GateOrder::kPlain:
        activate(*activation, c, nullptr, c, f.width);
        break;
      case GateOrder::kGateUp:
        activate(*activation, c, c + half, c, half);
        break;
      case GateOrder::kUpGate:
        activate(*activation, c + half, c, c, half);
        break;
      case GateOrder::kInterleaved:
        for (int n = 0; n < half; n += W) {
          Vec even, odd;
          deinterleave(load(c + 2 * n), load(c + 2 * n + W), even, odd);
          store(gate + n, even);
          store(up + n, odd);
        }
        activate(*activation, gate, up, c, half);
        break;
    }
    narrow(c, out, activation->gated() ? half : f.width);
  }
}

template <class T>
void widen_elements(const std::byte* src, float* dst, std::int64_t n) {
  widen(reinterpret_cast<const T*>(src), dst, n);
}
