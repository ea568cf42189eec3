// finalize: a token's weighted sum over its slots, for tokens [t0, t1) and columns [h0, h1). The sum of a
// block of columns stays in registers while the slots' rows stream by. Each column is one fma chain in slot
// order, so neither the block width nor the split over threads shows in the bits.
//
// Rows of e4m3 go in blocks of the 128 columns that may share a scale, through a buffer of f32 sums.

inline constexpr int kSlotBatch = 64;

// The live slots among some of a token's, with their weights. Row and Out are the elements of rows and out.
template <class Row, class Out>
struct LiveSlots {
  const Row* row[kSlotBatch];
  const float* scale[kSlotBatch];  // of the row's first block, where there are scales
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
      row[count] = static_cast<const Row*>(p.rows) + r * p.rows_stride;
      if (p.row_scales.data) scale[count] = p.row_scales.data + r * p.row_scales.row_stride;
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
    if constexpr (!std::is_same_v<Out, E4M3>) {
      if (!p.cast_weights) return;
      Out rounded[kSlotBatch];
      narrow(weights, rounded, n);
      widen(rounded, weights, n);
    }
  }
};

// Columns [h, h + columns) of token t, columns <= N * W; N vectors of accumulators.
template <class T, int N>
MOECORE_INLINE void finalize_block(const FinalizeProblem& p, LiveSlots<T, T>& slots, std::int64_t t,
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
  LiveSlots<T, T> slots;
  for (std::int64_t t = t0; t < t1; ++t) {
    if (p.top_k <= kSlotBatch) slots.gather(p, t, 0);
    std::int64_t h = h0;
    for (; h + kVecs * W <= h1; h += kVecs * W) finalize_block<T, kVecs>(p, slots, t, h, kVecs * W);
    for (; h < h1; h += W) finalize_block<T, 1>(p, slots, t, h, h1 - h < W ? h1 - h : W);
  }
}

// W codes from memory, of which the first n are there.
MOECORE_INLINE Vec load_codes(const E4M3* p, std::int64_t n) {
  std::uint8_t padded[W] = {};
  const bool whole = n >= W;
  if (!whole) std::memcpy(padded, p, static_cast<std::size_t>(n));
  return decode_e4m3(load_bytes(whole ? &p->bits : padded));
}

// sum[0, n) of columns [h, h + n) of token t, which lie in one block of columns. `sum` is written up to the
// next multiple of W.
template <class Out>
void sum_codes(const FinalizeProblem& p, LiveSlots<E4M3, Out>& slots, std::int64_t t, std::int64_t h,
               std::int64_t n, float* sum) {
  constexpr int kVecs = 4;
  const std::int64_t scale_at = h / kFinalizeScaleBlock * p.row_scales.block_stride;
  for (std::int64_t i = 0; i < n; i += kVecs * W) {
    Vec acc[kVecs];
    for (Vec& a : acc) a = set(0.0f);
    for (std::int64_t first = 0; first < p.top_k; first += kSlotBatch) {
      if (p.top_k > kSlotBatch) slots.gather(p, t, first);
      for (int j = 0; j < slots.count; ++j) {
        const Vec factor =
            set(p.row_scales.data ? slots.weight[j] * slots.scale[j][scale_at] : slots.weight[j]);
        for (int v = 0; v < kVecs && i + v * W < n; ++v)
          acc[v] = fma(factor, load_codes(slots.row[j] + h + i + v * W, n - i - v * W), acc[v]);
      }
    }
    for (int v = 0; v < kVecs && i + v * W < n; ++v) store(sum + i + v * W, acc[v]);
  }
}

// Codes of sum[0, n), columns [h, h + n) of token t, with the scale of their block if `out` has scales.
inline void store_codes_of(const FinalizeProblem& p, std::int64_t t, std::int64_t h, std::int64_t n,
                           const float* sum) {
  auto* out = static_cast<std::uint8_t*>(p.out) + t * p.out_stride + h;
  float factor = 1.0f;
  if (p.out_scales.data) {
    constexpr QuantFormat kFormat{.granularity = Granularity::kBlock128};
    float amax[1 + W];
    amax_by_floats(sum, n, kFinalizeScaleBlock, amax);
    const float floored = amax[0] > kFormat.amax_floor ? amax[0] : kFormat.amax_floor;
    const float scale = (floored < kFormat.amax_cap ? floored : kFormat.amax_cap) / 448.0f;
    factor = 1.0f / scale;
    float* scales = p.out_scales.data + h / kFinalizeScaleBlock * p.out_scales.block_stride;
    scales[t * p.out_scales.row_stride] = scale;
    if (t == p.num_tokens - 1)
      for (std::int64_t pad = p.num_tokens; pad < p.padded_scale_rows; ++pad)
        scales[pad * p.out_scales.row_stride] = 0.0f;
  }
  quantize_encode(DType::kF32, false, false, sum, n, kFinalizeScaleBlock, &factor, sum, out);
}

template <class Out>
void finalize_codes(const FinalizeProblem& p, std::int64_t t0, std::int64_t t1, std::int64_t h0,
                    std::int64_t h1) {
  using Residual = std::conditional_t<std::is_same_v<Out, E4M3>, BF16, Out>;
  alignas(64) float sum[kFinalizeScaleBlock], residual[kFinalizeScaleBlock];
  LiveSlots<E4M3, Out> slots;
  for (std::int64_t t = t0; t < t1; ++t) {
    if (p.top_k <= kSlotBatch) slots.gather(p, t, 0);
    for (std::int64_t h = h0, n; h < h1; h += n) {
      n = h1 - h < kFinalizeScaleBlock ? h1 - h : kFinalizeScaleBlock;
      sum_codes(p, slots, t, h, n, sum);
      if (p.residual) {
        widen(static_cast<const Residual*>(p.residual) + t * p.residual_stride + h, residual, n);
        for (std::int64_t i = 0; i < n; i += W) store(sum + i, load(sum + i) + load(residual + i));
      }
      if constexpr (std::is_same_v<Out, E4M3>)
        store_codes_of(p, t, h, n, sum);
      else
        narrow(sum, static_cast<Out*>(p.out) + t * p.out_stride + h, n);
    }
  }
}

inline void finalize(const FinalizeProblem& p, std::int64_t t0, std::int64_t t1, std::int64_t h0,
                     std::int64_t h1) {
  visit_instance(FinalizeInstances{}, FinalizeTypes{p.dtype, p.out_dtype}, [&]<FinalizeTypes types>() {
    if constexpr (types.rows == DType::kE4M3)
      finalize_codes<Element<types.out>>(p, t0, t1, h0, h1);
    else
      finalize_tokens<Element<types.rows>>(p, t0, t1, h0, h1);
  });
}
