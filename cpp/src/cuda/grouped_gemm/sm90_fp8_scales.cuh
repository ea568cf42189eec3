#pragma once
// Where the scales of an fp8 tile stand, for both kernels of e4m3 x e4m3.

#include "cuda/grouped_gemm/sm90_pipeline.cuh"

namespace moecore::cuda::sm90 {

/// With blocks: the scale of the work's first step for the i-th of a tile's runs of columns, of which it has
/// kRuns; when gated run i / 2, gate and up in the order of the checkpoint.
template <int kRuns, class Engine>
__device__ __forceinline__ const std::byte* weight_block_scale(const Engine& engine, const Work& work,
                                                               int i) {
  constexpr bool kGated = Engine::Form::kGated;
  const ScaleArgs& w = engine.args.weight_scales;
  const EpilogueArgs& e = engine.args.epilogue;
  const int run = kGated ? i / 2 : i;
  const int column =
      min(e.columns - 1, work.tile.weight_tile * Engine::kTileColumns + run * (Engine::kTileColumns / kRuns));
  const int first = (i % 2 == 0) != e.swapped ? e.gate_first : e.up_first;
  const int row = kGated ? first + column * e.row_step : column;
  return w.data + work.tile.expert * w.expert_pitch + row / 128 * w.row_pitch + work.begin * w.col_pitch;
}

/// Without: the scale of a row.
__device__ __forceinline__ float row_scale(const ScaleArgs& s, std::int64_t row, int expert) {
  return __ldg(reinterpret_cast<const float*>(s.data + expert * s.expert_pitch + row * s.row_pitch));
}

}  // namespace moecore::cuda::sm90
