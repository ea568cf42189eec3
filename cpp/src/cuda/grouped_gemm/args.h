#pragma once
// What both engines' kernels read: the problem, flattened for the device.

#include <cstddef>
#include <cstdint>

#include "cuda/scale_rule.h"
#include "moecore/activate.h"
#include "moecore/dtype.h"

namespace moecore::cuda {

/// Largest E of the engines: experts are searched in groups of 32, and the groups' sums are kept on chip.
inline constexpr int kExpertGroup = 32;
inline constexpr int kMaxExpertGroups = 64;
inline constexpr int kMaxExperts = kExpertGroup * kMaxExpertGroups;

/// How the rows of all experts are cut into tiles. Tile order: expert, then weight tile, then token tile, so
/// that neighbours share weights.
struct TileShape {
  int max_tokens = 0;    // widest token tile, a multiple of 8
  int token_step = 8;    // what the width of a tile is rounded up to, a power of two
  int weight_tiles = 0;  // tiles along the weight rows of one expert
};

/// What happens to an f32 product before it is stored. Column f of out comes from weight row f, or, when
/// gated, from the rows gate_first + f * row_step and up_first + f * row_step.
struct EpilogueArgs {
  void* out = nullptr;
  std::int64_t out_stride = 0;
  int columns = 0;  // of out
  int row_step = 1;
  int gate_first = 0;
  int up_first = 0;
  bool swapped = false;        // the tile's pairs are (up, gate) rather than (gate, up)
  const void* bias = nullptr;  // [E,N] or none
  bool bias_is_f32 = false;
  std::int64_t bias_stride = 0;
  const void* row_weights = nullptr;  // [R] or none
  DType row_weight_dtype = DType::kF32;
  bool activated = false;
  bool gated = false;
  ActivationKind kind = ActivationKind::kSilu;
  float alpha = 1.0f;
  float beta = 0.0f;
  float limit = 0.0f;
  // silu, quick_gelu, swiglu_oai and gelu_tanh as g * sigmoid(linear * g + cubic * g^3); both times -log2(e).
  float linear_log2e = 0.0f;
  float cubic_log2e = 0.0f;
};

/// Where the scales of an operand stand; OperandScalesRef says how to read the pitches.
struct ScaleArgs {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t expert_pitch = 0, row_pitch = 0, col_pitch = 0;
  int block_rows = 1;
  int block_cols = 0;  // 0: all
  const float* global_scale = nullptr;
  bool global_scale_per_expert = false;
};

/// QuantizedOutRef on the device; no codes: out is stored.
struct QuantizedOutArgs {
  std::uint8_t* codes = nullptr;
  std::int64_t pitch = 0;
  float* scales = nullptr;
  std::int64_t scale_pitch = 0;
  ScaleRule rule{};
};

struct GroupedGemmArgs {
  const void* x = nullptr;  // [rows of x, K]
  std::int64_t x_stride = 0;
  const void* weights = nullptr;  // [E,N,K]
  std::int64_t weight_expert_stride = 0;
  std::int64_t weight_row_stride = 0;
  const std::int32_t* row_token = nullptr;       // [R] or none
  const std::int32_t* expert_offsets = nullptr;  // [E+1]
  bool offsets_settled = false;                  // before the kernel that precedes this one began
  int num_experts = 0;
  int k = 0;         // columns of x
  int weight_k = 0;  // columns of weights, fewer where x was padded
  ScaleArgs x_scales, weight_scales;
  TileShape tiles;
  EpilogueArgs epilogue;
  QuantizedOutArgs quantized_out;
};

}  // namespace moecore::cuda
