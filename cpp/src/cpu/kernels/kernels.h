#pragma once
// The vectorised kernels of one instruction set. targets/<isa>.cc define one table each.

#include <cstddef>
#include <cstdint>

#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/quantize.h"
#include "ops/route.h"

namespace moecore::cpu {

/// Columns of a row that activate handles at a time.
inline constexpr std::int64_t kActivatePiece = 512;

/// Lanes of partial sums, maxima and buffers' padding that route keeps on every level.
inline constexpr std::int64_t kRouteLanes = 16;

/// Most blocks of a row that the steps of quantize handle at a time.
inline constexpr std::int64_t kQuantizeBlocks = 256;

/// Every function works on a part of a problem, so that the caller splits it over threads.
struct Kernels {
  void (*route)(const RouteProblem&, std::int64_t token_begin, std::int64_t token_end);
  void (*activate)(const ActivateProblem&, std::int64_t piece_begin, std::int64_t piece_end);
  void (*finalize)(const FinalizeProblem&, std::int64_t token_begin, std::int64_t token_end,
                   std::int64_t column_begin, std::int64_t column_end);
  /// out[i] = f(gate[i]) * (up[i] + beta), for grouped_gemm's epilogue: see kernels/activation.inl.
  void (*activate_floats)(const Activation&, const float* gate, const float* up, float* out, std::int64_t n);
  // The steps of quantize and dequantize on n columns in blocks of `block`: see kernels/quantize.inl.
  bool (*quantize_amax)(DType, const void* x, std::int64_t n, std::int64_t block, float* amax);
  void (*quantize_encode)(DType, bool e2m1, bool bounded, const void* x, std::int64_t n, std::int64_t block,
                          const float* factor, const void* next, std::uint8_t* out);
  bool (*nvfp4_scales)(const float* amax, std::int64_t n, float global, std::uint8_t* scale, float* factor);
  void (*power_of_two_scales)(const float* amax, std::int64_t n, numeric::PowerOfTwoRule rule,
                              std::uint8_t* scale, float* factor);
  void (*dequantize_decode)(DType, bool e2m1, const std::uint8_t* codes, std::int64_t n, std::int64_t block,
                            const float* scale, void* out);
  /// Reads `bytes` (a multiple of 1024) and returns a number that depends on all of them.
  float (*read_all)(const float* data, std::size_t bytes);
  /// Runs `rounds` rounds of independent f32 fma chains on registers; returns the flops done.
  double (*fma_flops)(std::int64_t rounds, float* sink);
};

/// The table for active_isa().
const Kernels& kernels();

/// Moves the k largest of n packed keys to the front, in descending order. For inputs that the vectorised
/// selection of route does not narrow down: many equal keys, large k.
void sort_largest(std::int64_t* packed, std::int64_t n, std::int64_t k);

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace moecore::cpu
