#pragma once
// When a layer runs as one kernel, and how its shared memory is cut, from sizes alone.

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace moecore::cuda::decode {

inline constexpr int kMaxRoutes = 512;    // T * K that the kernel sorts
inline constexpr int kMaxRows = 8;        // of one expert in one pass over its weights: the MMA's columns
inline constexpr int kTileRows = 16;      // weight rows of a tile: the MMA's rows
inline constexpr int kChunk = 32;         // k of the two MMAs that a lane's 16 bytes of x feed
inline constexpr int kMmaWarps = 8;       // share the depth of a step
inline constexpr int kEpilogueWarps = 4;  // take the tiles in turn
inline constexpr int kWeightWarps = 4;    // copy weight rows: a copy takes its warp some 50 ns
inline constexpr int kTokenWarps = 2;     // copy token rows
inline constexpr int kFirstEpilogueWarp = kWeightWarps + kTokenWarps;
inline constexpr int kPublisherWarp = kFirstEpilogueWarp + kEpilogueWarps;
inline constexpr int kFirstMmaWarp = kPublisherWarp + 1;
inline constexpr int kThreads = (kFirstMmaWarp + kMmaWarps) * 32;
inline constexpr int kMaxStages = 32;

/// Bytes of a step's row in shared memory: eight rows of a chunk fall into different banks.
constexpr int padded_row(int bytes, int chunk_bytes) {
  return (bytes - chunk_bytes + 127) / 128 * 128 + chunk_bytes;
}

/// One product as the ring sees it.
struct Steps {
  int depth = 0;         // k of a step
  int count = 0;         // steps of a tile
  int weight_pitch = 0;  // bytes of a weight row in a stage
  int scale_pitch = 0;   // and of its scales
  int x_pitch = 0;       // and of a token row

  int bytes(int rows) const { return kTileRows * (weight_pitch + scale_pitch) + rows * x_pitch; }
};

/// `bits` of a weight, `block` of the weights along k that share a scale (0: none in the ring) of
/// `scale_bytes`.
constexpr Steps cut_depth(int k, int bits, int block, int scale_bytes, int max_row_bytes) {
  const int grain = std::max(block, kChunk);
  const int most = max_row_bytes * 8 / bits / grain * grain;
  Steps s;
  s.count = std::max(1, (k + most - 1) / most);
  s.depth = ((k + s.count - 1) / s.count + grain - 1) / grain * grain;
  s.count = std::max(1, (k + s.depth - 1) / s.depth);
  s.weight_pitch = padded_row(s.depth * bits / 8, kChunk * bits / 8);
  s.x_pitch = padded_row(s.depth * 2, kChunk * 2);
  // A window of whole 16 bytes around the scales; an odd number of them spreads eight rows over the banks.
  if (block) s.scale_pitch = ((s.depth / block * scale_bytes + 30) / 16 | 1) * 16;
  return s;
}

struct Policy {
  int fused = 0;      // 1: one kernel, 0: the composition of plan, two products and finalize
  int row_bytes = 0;  // of a weight row in one step, at most
  int rows = 0;       // of one expert in one pass
  int stages = 0;     // of the ring, at most
  int flight = 0;     // stages on their way at a time: what is queued delays every other access of the SM
};

/// One kernel for one token whose experts' floats, `weight_bytes` in all, are read so fast that the launches
/// of the composition count. `quantized`: weights are codes.
///
/// On an H200 one token of Qwen3-30B (75 MB of bf16) takes 27 us as one kernel and 35 us as the composition.
/// But the kernel streams more slowly than the tiles of bf16 layers: one token of gpt-oss (199 MB) takes 64
/// us, its two products 59, and layers of 300 MB or more take no longer than theirs. Of codes it decodes
/// about as fast as the products' kernels, whose bits are then better kept.
inline Policy select_policy(std::int64_t num_tokens, std::int64_t weight_bytes, bool quantized) {
  constexpr std::int64_t kOneKernelBytes = 100'000'000;
  Policy policy;
  policy.fused = num_tokens == 1 && !quantized && weight_bytes <= kOneKernelBytes;
  policy.row_bytes = 2048;
  policy.rows = static_cast<int>(std::clamp<std::int64_t>(num_tokens, 1, kMaxRows));
  policy.stages = kMaxStages;
  policy.flight = 4;
  return policy;
}

}  // namespace moecore::cuda::decode
