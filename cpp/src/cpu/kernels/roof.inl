// Loops that do nothing but load, and nothing but multiply and add: the ceilings that measure_roof reports.

inline float read_all(const float* data, std::size_t bytes) {
  constexpr int kVecs = 8;
  Vec sum[kVecs];
  for (Vec& s : sum) s = set(0.0f);
  for (std::size_t i = 0; i < bytes / sizeof(float); i += kVecs * W)
    for (int j = 0; j < kVecs; ++j) sum[j] = sum[j] + load(data + i + j * W);
  for (int j = 1; j < kVecs; ++j) sum[0] = sum[0] + sum[j];
  float lanes[W];
  store(lanes, sum[0]);
  return lanes[0];
}

inline double fma_flops(std::int64_t rounds, float* sink) {
  constexpr int kChains = 10;  // two fma units with a latency of four or five cycles
  Vec chain[kChains];
  for (int j = 0; j < kChains; ++j) chain[j] = set(static_cast<float>(j));
  const Vec half = set(0.5f), one = set(1.0f);  // a fixed point at 2: no value grows or becomes denormal
  for (std::int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) chain[j] = fma(chain[j], half, one);
  for (int j = 1; j < kChains; ++j) chain[0] = chain[0] + chain[j];
  float lanes[W];
  store(lanes, chain[0]);
  *sink = lanes[0];
  return 2.0 * W * kChains * static_cast<double>(rounds);
}
