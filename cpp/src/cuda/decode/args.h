#pragma once
// What the decode kernel reads, flattened for the device.

#include <cstddef>
#include <cstdint>

#include "cuda/decode/policy.h"
#include "cuda/device/division.cuh"
#include "cuda/device/grid_counter.cuh"
#include "cuda/grouped_gemm/args.h"

namespace moecore::cuda::decode {

/// Progress of the grid, at the start of the workspace. `ready` is in use while `left` is open: block 0
/// clears it before.
struct Progress {
  dev::GridCounter left;       // token warps that look at `ready` no more
  unsigned ready[kMaxRoutes];  // columns of the intermediate rows of a pass that are there
};

struct Product {
  const std::byte* weights = nullptr;  // [E, N, k]
  std::int64_t expert_pitch = 0;       // bytes
  std::int64_t row_pitch = 0;
  const std::byte* scales = nullptr;  // of blocks along k, or none
  std::int64_t scale_expert_pitch = 0;
  std::int64_t scale_row_pitch = 0;
  int scale_row_shift = 0;  // log2 of the rows that share scales
  // What a whole row of an expert is multiplied with: *(row_scales + e * .. + row * ..), then the reciprocal
  // of the expert's nvfp4 factor. Either may be missing.
  const std::byte* row_scales = nullptr;
  std::int64_t row_scale_expert_pitch = 0;
  std::int64_t row_scale_pitch = 0;
  const float* global_scales = nullptr;
  bool global_scale_per_expert = false;
  int k = 0;
  Steps steps;
  EpilogueArgs epilogue;
};

struct DecodeArgs {
  const void* ids = nullptr;
  bool ids_are_i64 = false;
  std::int64_t ids_stride = 0;
  const std::int32_t* expert_map = nullptr;
  std::int64_t num_global = 0, first_expert = 0;
  const void* router_weights = nullptr;
  DType router_weight_dtype = DType::kF32;
  std::int64_t router_weights_stride = 0;
  bool weight_on_input = false;
  int num_tokens = 0, top_k = 0, num_experts = 0, hidden = 0, inter = 0;

  const std::byte* x = nullptr;
  std::int64_t x_pitch = 0;  // bytes
  std::byte* inter_rows = nullptr;
  std::int64_t inter_pitch = 0;
  Progress* progress = nullptr;
  const void* residual = nullptr;
  std::int64_t residual_stride = 0;
  void* out = nullptr;
  std::int64_t out_stride = 0;

  Product up, down;
  bool sigmoid_gate = false;  // the activation is SigmoidGate's
  dev::Divisor by_top_k, by_blocks;
  float per_block = 0;  // 1 / blocks
  float per_column =
      0;         // 1 / cost of an intermediate column in `inter`s, or 0: as if out's columns cost none
  int rows = 0;  // of one pass
  int stages = 0;
  int flight = 0;  // stages on their way at a time
  int stage_bytes = 0;
};

}  // namespace moecore::cuda::decode
