// Decoding for any CPU: one code after the other, in memory order.

inline constexpr int kDecodeStep = 16;

struct ScaleLanes {
  int block;
  explicit ScaleLanes(int block) : block(block) {}
  /// Of the step that begins at column k: no block ends inside of one.
  float at(const float* scale, std::int64_t k) const { return block ? scale[k / block] : 1.0f; }
};

template <bool e2m1>
void decode_step(const std::uint8_t* codes, float scale, float* out) {
  kernels().dequantize_decode(DType::kF32, e2m1, codes, kDecodeStep, kDecodeStep, &scale, out);
}

template <bool e2m1>
void arrange(const float* in, float* out) {
  std::memcpy(out, in, kDecodeStep * sizeof(float));
}
