// Decoding for any CPU: one code after the other, in memory order.

inline constexpr int kDecodeStep = 16, kDecodeParts = 1;

using Scales = float;
struct ScaleLanes {
  int block;
  explicit ScaleLanes(int block) : block(block) {}
  /// Of the step that begins at column k: no block ends inside of one.
  Scales at(const float* scale, std::int64_t k) const { return block ? scale[k / block] : 1.0f; }
};

template <bool e2m1, bool, int, class Sink>
void decode_part(const std::uint8_t* codes, Scales scale, Sink sink) {
  float decoded[kDecodeStep];
  kernels().dequantize_decode(DType::kF32, e2m1, codes, kDecodeStep, kDecodeStep, &scale, decoded);
  for (int v = 0; v * W < kDecodeStep; ++v) sink(v, load(decoded + v * W));
}

template <bool e2m1>
void arrange(const float* in, float* out) {
  std::memcpy(out, in, kDecodeStep * sizeof(float));
}
