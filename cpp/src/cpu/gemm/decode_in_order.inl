// Decoding for any CPU: one code after the other, in memory order.

inline constexpr int kDecodeStep = 16, kDecodeParts = 1;

using Scales = float;
struct ScaleLanes {
  int block;
  explicit ScaleLanes(int columns) : block(columns) {}
  /// Of the step that begins at column k: no block ends inside of one.
  template <Scaling>
  Scales at(const float* scale, const std::uint8_t*, std::int64_t k) const {
    return block ? scale[k / block] : 1.0f;
  }
};
inline constexpr bool kHasTables = false;

template <bool e2m1, Scaling, int, class Sink>
void decode_part(const std::uint8_t* codes, Scales scale, Sink sink) {
  float decoded[kDecodeStep];
  kernels().dequantize_decode(DType::kF32, e2m1, codes, kDecodeStep, kDecodeStep, &scale, decoded);
  for (int v = 0; v * W < kDecodeStep; ++v) sink(v, load(decoded + v * W));
}

template <bool e2m1>
void arrange(const float* in, float* out) {
  std::memcpy(out, in, kDecodeStep * sizeof(float));
}
