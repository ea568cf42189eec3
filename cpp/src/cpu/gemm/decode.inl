// Rows of codes as rows of f32: what a tile of quantised weights, or a row of quantised x, is before it meets
// the arithmetic of dot.inl. A tile's piece of the weights stays in L1 for as long as it is used.
//
// Codes are decoded kDecodeStep at a time, and come out in whatever order costs least; arrange() brings the
// elements of x into the same order when they are packed. A decode_<how>.inl, included before, brings
//   kDecodeStep                          elements of a step
//   decode_step<e2m1>(codes, from, out)  one step, times what ScaleLanes gives of its scales
//   arrange<e2m1>(in, out)               one step of f32
//   ScaleLanes                           the scales of a step, from f32 for each block

inline constexpr std::int64_t kDecodedDepth = 512;  // columns decoded at a time, a multiple of every block
inline constexpr std::int64_t kDecodedScales = kDecodedDepth / 16 + 16;  // with room for a vector behind
static_assert(kDecodedDepth % kDecodeStep == 0);

constexpr std::int64_t whole_steps(std::int64_t depth) {
  return (depth + kDecodeStep - 1) / kDecodeStep * kDecodeStep;
}

/// Scales of `n` blocks from block `first` on, as f32.
inline void read_scales(const Codes& codes, const std::byte* scales, std::int64_t first, std::int64_t n,
                        float* out) {
  const std::byte* at = scales + first * codes.col_pitch;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(at);
  if (codes.scale_dtype == DType::kE4M3 && codes.col_pitch == 1) {
    const float one = 1;
    return kernels().dequantize_decode(DType::kF32, false, bytes, n, n, &one, out);
  }
  std::int64_t b = 0;
  if (codes.scale_dtype == DType::kE8M0 && codes.col_pitch == 1) {
    for (; b + W <= n; b += W) {
      const Ints code = load_bytes(bytes + b);
      const Vec number = as_floats(code | set_int(0x4B000000)) - set(8388608.0f);
      Vec s = as_floats(shift_left<23>(code));
      s = select(number < set(1.0f), as_floats(set_int(0x00400000)), s);
      store(out + b, select(number > set(254.0f), as_floats(set_int(0x7FC00000)), s));
    }
  }
  for (at += b * codes.col_pitch; b < n; ++b, at += codes.col_pitch) {
    if (codes.scale_dtype == DType::kF32)
      std::memcpy(out + b, at, sizeof(float));
    else if (codes.scale_dtype == DType::kE8M0)
      out[b] = numeric::e8m0_to_f32(static_cast<std::uint8_t>(*at));
    else
      out[b] = numeric::e4m3_to_f32(static_cast<std::uint8_t>(*at));
  }
}

template <bool e2m1>
void decode_steps(const std::uint8_t* codes, const float* scale, int block, std::int64_t depth, float* out) {
  const ScaleLanes lanes(block);
  std::int64_t k = 0;
  for (; k + kDecodeStep <= depth; k += kDecodeStep)
    decode_step<e2m1>(codes + (e2m1 ? k / 2 : k), lanes.at(scale, k), out + k);
  if (k < depth) {  // zeros behind the last element
    std::uint8_t padded[kDecodeStep] = {};
    std::memcpy(padded, codes + (e2m1 ? k / 2 : k),
                static_cast<std::size_t>(e2m1 ? (depth - k) / 2 : depth - k));
    decode_step<e2m1>(padded, lanes.at(scale, k), out + k);
  }
}

/// code * scale of `depth` <= kDecodedDepth columns from `first` (a multiple of 128) on, in the order of
/// decode_step; zeros up to a whole step.
inline void decode_row(const Codes& codes, const std::byte* row, const std::byte* scales, std::int64_t first,
                       std::int64_t depth, float* out) {
  alignas(64) float scale[kDecodedScales];
  const std::int64_t blocks = codes.block ? (depth + codes.block - 1) / codes.block : 0;
  if (codes.block) read_scales(codes, scales, first / codes.block, blocks, scale);
  std::fill(scale + blocks, scale + kDecodedScales, 1.0f);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(row);
  if (codes.e2m1)
    decode_steps<true>(bytes + first / 2, scale, codes.block, depth, out);
  else
    decode_steps<false>(bytes + first, scale, codes.block, depth, out);
}

/// The same in memory order and without zeros: for x.
inline void decode_in_order(const Codes& codes, const std::byte* row, const std::byte* scales,
                            std::int64_t first, std::int64_t depth, float* out) {
  float scale[kDecodedScales];
  const std::int64_t block = codes.block ? codes.block : kDecodedDepth;
  if (codes.block)
    read_scales(codes, scales, first / block, (depth + block - 1) / block, scale);
  else
    scale[0] = 1;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(row) + (codes.e2m1 ? first / 2 : first);
  kernels().dequantize_decode(DType::kF32, codes.e2m1, bytes, depth, block, scale, out);
}
