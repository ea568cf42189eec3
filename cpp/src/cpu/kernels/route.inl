// route, a token at a time: keys of all experts into the L1 cache, the k largest of them, their weights.
//
// Selection without a scan per slot. Experts are dealt to columns; the k-th largest column maximum bounds the
// k-th largest key from below, so the few keys that reach it hold the answer (about 11 of 256 for k = 8).
// They are packed with their ids into integers that order as (key descending, id ascending) and placed by
// counting how many are larger: no branch depends on the data.

inline constexpr float kMinusInf = -__builtin_inff();

// A key and its expert as one integer; larger is better. Equal keys rank the lower id first, -0 equals +0.
MOECORE_INLINE std::int64_t pack_key(float key, std::int64_t id) {
  const std::int32_t bits = __builtin_bit_cast(std::int32_t, key + 0.0f);
  const std::int64_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return ordered << 32 | (0xffffffff - id);
}
MOECORE_INLINE std::int32_t packed_id(std::int64_t packed) {
  return static_cast<std::int32_t>(0xffffffff - (packed & 0xffffffff));
}

// A number that at least k of the n keys reach: the k-th largest maximum of kColumns interleaved columns.
template <int kColumns>
MOECORE_INLINE float lower_bound_of_kth(const float* key, std::int64_t n, std::int64_t k) {
  constexpr int kVecs = kColumns / W;
  Vec top[kVecs], greater[kVecs];
  for (int i = 0; i < kVecs; ++i) top[i] = set(kMinusInf), greater[i] = set(0.0f);
  std::int64_t e = 0;
  for (; e + kColumns <= n; e += kColumns)
    for (int i = 0; i < kVecs; ++i) top[i] = max(top[i], load(key + e + i * W));
  for (int i = 0; e < n; e += W, ++i) top[i] = max(top[i], load(key + e));

  alignas(64) float tops[kColumns];
  for (int i = 0; i < kVecs; ++i) store(tops + i * W, top[i]);
  for (int j = 0; j < kColumns; ++j)
    for (int i = 0; i < kVecs; ++i)
      greater[i] = greater[i] + select(set(tops[j]) > top[i], set(1.0f), set(0.0f));
  Vec bound = set(kMinusInf);  // negated, to find the smallest with max_lanes
  for (int i = 0; i < kVecs; ++i)
    bound = max(bound, select(greater[i] < set(static_cast<float>(k)), set(-0.0f) - top[i], set(kMinusInf)));
  store(tops, max_lanes(bound));
  return -tops[0];
}

// Puts the `count` packed keys (room for a multiple of 16) in descending order, for count <= 64.
MOECORE_INLINE void rank_packed(std::int64_t* packed, std::int64_t count) {
  constexpr std::int64_t kLowest = -0x7fffffffffffffff - 1;
  std::int64_t from[64], rank[64];
  const std::int64_t padded = (count + 15) / 16 * 16;
  for (std::int64_t i = 0; i < padded; ++i) from[i] = i < count ? packed[i] : kLowest, rank[i] = 0;
  for (std::int64_t block = 0; block < padded; block += 16)
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t i = block; i < block + 16; ++i) rank[i] += from[j] > from[i];
  for (std::int64_t i = 0; i < count; ++i) packed[rank[i]] = from[i];
}

// The k largest of n keys (n a multiple of 16, -inf for none), packed, in descending order. Returns how many
// there are. `packed` has room for n.
inline std::int64_t select_largest(const float* key, std::int64_t n, std::int64_t k, std::int64_t* packed) {
  float bound = kMinusInf;
  if (n > 32 && k <= 12)
    bound = lower_bound_of_kth<16>(key, n, k);
  else if (n > 128 && k <= 48)
    bound = lower_bound_of_kth<64>(key, n, k);

  std::int64_t count = 0;
  for (std::int64_t e = 0; e < n; e += 64) {
    const std::int64_t end = e + 64 < n ? e + 64 : n;
    std::uint64_t reached = 0;
    for (std::int64_t i = e; i < end; i += W) {
      const Vec v = load(key + i);
      reached |= std::uint64_t{bits_of((v >= set(bound)) & (v > set(kMinusInf)))} << (i - e);
    }
    for (; reached; reached &= reached - 1) {
      const std::int64_t id = e + __builtin_ctzll(reached);
      packed[count++] = pack_key(key[id], id);
    }
  }
  if (count <= 64)
    rank_packed(packed, count);
  else
    sort_largest(packed, count, k);
  return count < k ? count : k;
}

// One token's buffers, padded to kRouteLanes with experts that cannot be selected.
struct RouteBuffers {
  alignas(64) float key[kMaxExperts];
  alignas(64) float score[kMaxExperts];
  alignas(64) float chosen[kMaxExperts];  // scores in slot order
  alignas(64) std::int64_t packed[kMaxExperts];
};

// The sum over experts of e^(key - top) in 16 partial sums, whatever W is. Optionally keeps the terms.
MOECORE_INLINE float sum_of_exponentials(const float* key, std::int64_t n, float top, float* terms) {
  constexpr int kVecs = kRouteLanes / W;
  Vec sum[kVecs];
  for (Vec& s : sum) s = set(0.0f);
  for (std::int64_t e = 0; e < n; e += kRouteLanes)
    for (int i = 0; i < kVecs; ++i) {
      const Vec term = exp(load(key + e + i * W) - set(top));
      if (terms) store(terms + e + i * W, term);
      sum[i] = sum[i] + term;
    }
  alignas(64) float lanes[kRouteLanes];
  for (int i = 0; i < kVecs; ++i) store(lanes + i * W, sum[i]);
  for (int step = kRouteLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// The two largest keys of a group: largest first.
MOECORE_INLINE void top_two(const float* key, std::int64_t n, float& first, float& second) {
  alignas(64) float firsts[W], seconds[W];
  std::int64_t e = 0, lanes = 0;
  if (n >= W) {
    Vec a = load(key), b = set(kMinusInf);
    for (e = W; e + W <= n; e += W) {
      const Vec x = load(key + e);
      b = max(b, min(a, x));
      a = max(a, x);
    }
    store(firsts, a);
    store(seconds, b);
    lanes = W;
  }
  first = second = kMinusInf;
  auto add = [&](float x) {
    second = second > (first < x ? first : x) ? second : (first < x ? first : x);
    first = first > x ? first : x;
  };
  for (std::int64_t i = 0; i < lanes; ++i) add(firsts[i]), add(seconds[i]);
  for (; e < n; ++e) add(key[e]);
}

// Sets the keys of every group but the best topk_groups to -inf.
inline void keep_best_groups(const RouteProblem& p, RouteBuffers& b) {
  const std::int64_t size = p.num_experts / p.num_groups;
  const std::int64_t padded = (p.num_groups + kRouteLanes - 1) / kRouteLanes * kRouteLanes;
  alignas(64) float rank[kMaxExperts];
  bool kept[kMaxExperts] = {};
  for (std::int64_t g = 0; g < padded; ++g) {
    rank[g] = kMinusInf;
    if (g >= p.num_groups) continue;
    float first, second;
    top_two(b.key + g * size, size, first, second);
    rank[g] = p.group_score == GroupScore::kMax || size == 1 ? first : first + second;
  }
  std::int64_t left = p.topk_groups;
  const std::int64_t ranked = select_largest(rank, padded, left, b.packed);
  for (std::int64_t i = 0; i < ranked; ++i) kept[packed_id(b.packed[i])] = true;
  left -= ranked;
  for (std::int64_t g = 0; g < p.num_groups; ++g) {
    if (!kept[g] && left > 0) kept[g] = true, --left;  // the lowest of the groups that rank at -inf
    if (kept[g]) continue;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) b.key[e] = kMinusInf;
  }
}

template <class T>
void route_token(const RouteProblem& p, std::int64_t t, RouteBuffers& b) {
  float* const weights = p.weights + t * p.weights_stride;
  std::int32_t* const ids = p.ids + t * p.ids_stride;
  std::int64_t selected = 0;

  if (!(p.is_padding && p.is_padding[t])) {
    // Logits; -inf marks what cannot be selected.
    const std::int64_t n = (p.num_experts + kRouteLanes - 1) / kRouteLanes * kRouteLanes;
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    const Vec inf = set(-kMinusInf);
    Vec tops = set(kMinusInf);
    for (std::int64_t e = 0; e < n; e += W) {
      const std::int64_t left = p.num_experts - e;
      Vec x = left >= W ? load(logits + e) : left > 0 ? load_n(logits + e, left) : set(kMinusInf);
      x = select(abs(x) < inf, x, set(kMinusInf));
      store(b.key + e, x);
      tops = max(tops, x);
    }
    if (n > p.num_experts) {
      for (std::int64_t e = p.num_experts; e < n; ++e) b.key[e] = kMinusInf;
      tops = set(kMinusInf);
      for (std::int64_t e = 0; e < n; e += W) tops = max(tops, load(b.key + e));
    }
    alignas(64) float lanes[W];
    store(lanes, max_lanes(tops));
    const float top = lanes[0];

    const bool softmax = p.scoring == Scoring::kSoftmax, identity = p.scoring == Scoring::kIdentity;
    const bool keys_are_scores = p.bias || p.num_groups > 1 || identity;
    float sum = 1.0f;
    if (top > kMinusInf) {
      if (softmax) sum = sum_of_exponentials(b.key, n, top, keys_are_scores ? b.score : nullptr);
      if (keys_are_scores) {
        for (std::int64_t e = 0; e < n; e += W) {
          const Vec x = load(b.key + e);
          const Vec score = identity ? x : softmax ? load(b.score + e) / set(sum) : sigmoid(x);
          const Vec bias =
              p.bias ? load_n(p.bias + e, p.num_experts - e > 0 ? p.num_experts - e : 0) : set(0.0f);
          store(b.score + e, score);
          store(b.key + e, select((x > set(kMinusInf)) & (abs(bias) < inf), score + bias, set(kMinusInf)));
        }
        if (p.num_groups > 1) keep_best_groups(p, b);
      }
      selected = select_largest(b.key, n, p.top_k, b.packed);
    }

    // Scores in slot order, then weights.
    for (std::int64_t j = 0; j < selected; ++j) {
      ids[j] = packed_id(b.packed[j]);
      b.chosen[j] = (keys_are_scores ? b.score : b.key)[ids[j]];
    }
    if (!keys_are_scores) {
      for (std::int64_t j = selected; j % W; ++j) b.chosen[j] = 0.0f;
      for (std::int64_t j = 0; j < selected; j += W) {
        const Vec x = load(b.chosen + j);
        store(b.chosen + j, softmax ? exp(x - set(top)) / set(sum) : sigmoid(x));
      }
    }
    float divisor = 1.0f;
    if (p.renormalize) {
      divisor = 0.0f;
      for (std::int64_t j = 0; j < selected; ++j) divisor += b.chosen[j];
      divisor += 1e-20f;
    }
    for (std::int64_t j = 0; j < selected; ++j) weights[j] = b.chosen[j] / divisor * p.scale;
  }
  for (std::int64_t j = selected; j < p.top_k; ++j) ids[j] = -1, weights[j] = 0.0f;
}

inline void route(const RouteProblem& p, std::int64_t begin, std::int64_t end) {
  RouteBuffers buffers;
  visit_instance(RouteTypes{}, p.dtype, [&]<DType dtype>() {
    for (std::int64_t t = begin; t < end; ++t) route_token<Element<dtype>>(p, t, buffers);
  });
}
