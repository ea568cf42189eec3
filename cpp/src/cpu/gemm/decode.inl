// Rows of codes as rows of f32: what a tile of quantised weights, or a row of quantised x, is before it meets
// the arithmetic of dot.inl. A tile's piece of the weights stays in L1 for as long as it is used.

inline constexpr std::int64_t kDecodedDepth = 512;  // columns decoded at a time, a multiple of every block

/// Scales of `n` blocks from block `first` on, as f32.
inline void read_scales(const Codes& codes, const std::byte* scales, std::int64_t first, std::int64_t n,
                        float* out) {
  const std::byte* at = scales + first * codes.col_pitch;
  for (std::int64_t b = 0; b < n; ++b, at += codes.col_pitch) {
    if (codes.scale_dtype == DType::kF32)
      std::memcpy(out + b, at, sizeof(float));
    else if (codes.scale_dtype == DType::kE8M0)
      out[b] = numeric::e8m0_to_f32(static_cast<std::uint8_t>(*at));
    else
      out[b] = numeric::e4m3_to_f32(static_cast<std::uint8_t>(*at));
  }
}

/// out[k] = code * scale of columns first + k, k < depth <= kDecodedDepth; first is a multiple of 128.
inline void decode_row(const Codes& codes, const std::byte* row, const std::byte* scales, std::int64_t first,
                       std::int64_t depth, float* out) {
  float scale[kDecodedDepth / 16];
  const std::int64_t block = codes.block ? codes.block : kDecodedDepth;
  if (codes.block)
    read_scales(codes, scales, first / block, (depth + block - 1) / block, scale);
  else
    scale[0] = 1;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(row) + (codes.e2m1 ? first / 2 : first);
  kernels().dequantize_decode(DType::kF32, codes.e2m1, bytes, depth, block, scale, out);
}
