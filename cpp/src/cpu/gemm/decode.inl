// Rows of codes as rows of f32: what a tile of quantised weights, or a row of quantised x, is before it meets
// the arithmetic of dot.inl. A tile's piece of the weights stays in L1 for as long as it is used.
//
// Codes are decoded kDecodeStep at a time, and come out in whatever order costs least; arrange() brings the
// elements of x into the same order when they are packed. A decode_<how>.inl, included before, brings
//   kDecodeStep, kDecodeParts    elements of a step, and parts that it is decoded in
//   decode_part<e2m1, scaling, i>(codes, scales, sink)
//                                part i of a step: sink(v, w) gets the step's vector v, times its scales
//   arrange<e2m1>(in, out)       one step of f32
//   ScaleLanes, Scales           the scales of a step, from an f32 or a byte for each block
//   kHasTables                   whether e2m1 is looked up in tables

inline constexpr std::int64_t kDecodedDepth = 512;  // columns decoded at a time, a multiple of every block
inline constexpr std::int64_t kDecodedScales = kDecodedDepth / 16 + 16;
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

/// A row's codes and scales from column `first` (a multiple of 128) on, for up to kDecodedDepth columns.
struct CodeRun {
  const std::uint8_t* codes;
  alignas(64) float scale[kDecodedScales];
  std::uint8_t scale_bytes[kDecodedScales];  // in place of f32, for tables

  template <Scaling scaling>
  void read(const Codes& c, const std::byte* row, const std::byte* scales, std::int64_t first,
            std::int64_t depth) {
    codes = reinterpret_cast<const std::uint8_t*>(row) + (c.e2m1 ? first / 2 : first);
    const std::int64_t blocks = c.block ? (depth + c.block - 1) / c.block : 0;
    // Behind them a finite scale for the blocks that a step has and the row has not.
    if constexpr (scaling == Scaling::kTable32 || scaling == Scaling::kTable16) {
      const std::byte* from = scales + first / c.block * c.col_pitch;
      if (c.col_pitch == 1)
        std::memcpy(scale_bytes, from, static_cast<std::size_t>(blocks));
      else
        for (std::int64_t b = 0; b < blocks; ++b)
          scale_bytes[b] = static_cast<std::uint8_t>(from[b * c.col_pitch]);
      std::memset(scale_bytes + blocks, 0x38, 16);
    } else {
      if (c.block) read_scales(c, scales, first / c.block, blocks, scale);
      std::fill_n(scale + blocks, 16, 1.0f);
    }
  }
};

/// body(part) for every part of a step, `part` a constant.
template <int i = 0, class Body>
MOECORE_INLINE void for_parts(Body body) {
  body(std::integral_constant<int, i>{});
  if constexpr (i + 1 < kDecodeParts) for_parts<i + 1>(body);
}

/// out = code * scale of a run, in the order of decode_part; zeros up to a whole step.
template <bool e2m1, Scaling scaling>
void decode_run(const CodeRun& run, const ScaleLanes& lanes, std::int64_t depth, float* out) {
  for (std::int64_t k = 0; k < depth; k += kDecodeStep, out += kDecodeStep) {
    const std::uint8_t* codes = run.codes + (e2m1 ? k / 2 : k);
    std::uint8_t padded[kDecodeStep] = {};
    if (const std::int64_t left = depth - k; left < kDecodeStep) {
      std::memcpy(padded, codes, static_cast<std::size_t>(e2m1 ? left / 2 : left));
      codes = padded;
    }
    const Scales scales = lanes.template at<scaling>(run.scale, run.scale_bytes, k);
    for_parts([&](auto part) MOECORE_INLINE_LAMBDA {
      decode_part<e2m1, scaling, part()>(codes, scales,
                                         [&](int v, Vec w) MOECORE_INLINE_LAMBDA { store(out + v * W, w); });
    });
  }
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
