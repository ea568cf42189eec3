// finalize: a token's weighted sum over its slots, for tokens [t0, t1) and columns [h0, h1). The sum of a
// block of columns stays in registers while the slots' rows stream by. Each column is one fma chain in slot
// order, so neither the block width nor the split over threads shows in the bits.

inline constexpr int kSlotBatch = 64;

// The live slots among some of a token's, with their weights.
template <class T>
struct LiveSlots {
  const T* row[kSlotBatch];
  float weight[kSlotBatch];
  int count = 0;

  // Slots [first, first + kSlotBatch) of token t.
  void gather(const FinalizeProblem& p, std::int64_t t, std::int64_t first) {
    const std::int64_t n = p.top_k - first < kSlotBatch ? p.top_k - first : kSlotBatch;
    alignas(64) float weights[kSlotBatch];
    load_weights(p, p.weights_stride * t + first, n, weights);
    count = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t r = p.slot_row[p.slot_stride * t + first + j];
      if (r < 0 || r >= p.num_rows) continue;
      row[count] = static_cast<const T*>(p.rows) + r * p.rows_stride;
      weight[count++] = weights[j];
    }
  }

 private:
  static void load_weights(const FinalizeProblem& p, std::int64_t at, std::int64_t n, float* weights) {
    if (!p.weights) {
      for (std::int64_t j = 0; j < n; ++j) weights[j] = 1.0f;
      return;
    }
    visit_instance(WeightTypes{}, p.weight_dtype, [&]<DType dtype>() {
      widen(static_cast<const Element<dtype>*>(p.weights) + at, weights, n);
    });
    if (p.cast_weights) {
      T rounded[kSlotBatch];
      narrow(weights, rounded, n);
      widen(rounded, weights, n);
    }
  }
};

// Columns [h, h + columns) of token t, columns <= N * W; N vectors of accumulators.
template <class T, int N>
MOECORE_INLINE void finalize_block(const FinalizeProblem& p, LiveSlots<T>& slots, std::int64_t t,
                                   std::int64_t h, std::int64_t columns) {
  Vec sum[N];
  for (int i = 0; i < N; ++i) sum[i] = set(0.0f);
  for (std::int64_t first = 0; first < p.top_k; first += kSlotBatch) {
    if (p.top_k > kSlotBatch) slots.gather(p, t, first);
    for (int j = 0; j < slots.count; ++j) {
      const Vec weight = set(slots.weight[j]);
      const T* row = slots.row[j] + h;
      for (int i = 0; i < N; ++i)
        sum[i] = fma(weight, N == 1 ? load_n(row, columns) : load(row + i * W), sum[i]);
    }
  }
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + t * p.residual_stride + h;
    for (int i = 0; i < N; ++i)
      sum[i] = sum[i] + (N == 1 ? load_n(residual, columns) : load(residual + i * W));
  }
  T* out = static_cast<T*>(p.out) + t * p.out_stride + h;
  for (int i = 0; i < N; ++i) N == 1 ? store_n(out, sum[i], columns) : store(out + i * W, sum[i]);
}

template <class T>
void finalize_tokens(const FinalizeProblem& p, std::int64_t t0, std::int64_t t1, std::int64_t h0,
                     std::int64_t h1) {
  constexpr int kVecs = 8;
  LiveSlots<T> slots;
  for (std::int64_t t = t0; t < t1; ++t) {
    if (p.top_k <= kSlotBatch) slots.gather(p, t, 0);
    std::int64_t h = h0;
    for (; h + kVecs * W <= h1; h += kVecs * W) finalize_block<T, kVecs>(p, slots, t, h, kVecs * W);
    for (; h < h1; h += W) finalize_block<T, 1>(p, slots, t, h, h1 - h < W ? h1 - h : W);
  }
}

inline void finalize(const FinalizeProblem& p, std::int64_t t0, std::int64_t t1, std::int64_t h0,
                     std::int64_t h1) {
  visit_instance(FinalizeTypes{}, p.dtype,
                 [&]<DType dtype>() { finalize_tokens<Element<dtype>>(p, t0, t1, h0, h1); });
}
