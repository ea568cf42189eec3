#pragma once
// The Hopper engine's kernels, as the selector sees them.

#include <cstddef>

#include "moecore/dtype.h"

namespace moecore::cuda::sm90 {

inline constexpr int kThreads = 384;
inline constexpr int kStepK = 64;              // depth of one step of the ring
inline constexpr int kStepBytes = kStepK * 2;  // of one row
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

inline constexpr int kTileRows = 256;  // weight rows of a tile

/// One compiled tile configuration.
struct TileConfig {
  const char* name;
  int max_tokens;  // widest token tile
  int stages;      // of the ring
  bool stream_k;   // can cut tiles along K
};

enum class Tiling { kDecode, kPrefill };

inline constexpr TileConfig kTileConfigs[] = {
    {.name = "decode", .max_tokens = 32, .stages = 6, .stream_k = true},
    {.name = "prefill", .max_tokens = 176, .stages = 4, .stream_k = false},
};

/// Partial sums of tiles that blocks share. Whatever the workspace held before, a slot is full when its flag
/// holds kRaised; readers lower the flags.
struct StreamK {
  static constexpr unsigned long long kRaised = 0x6D6F65636F726521ull;
  static constexpr int kMaxBlocks = 256;
  /// f32 sums of one block's tile.
  static constexpr std::size_t kSlotFloats = kTileRows * kTileConfigs[0].max_tokens;
  static constexpr std::size_t kBytes =
      kMaxBlocks * (2 * sizeof(unsigned long long) + kSlotFloats * sizeof(float));

  bool enabled = false;
  unsigned long long* flags = nullptr;  // [blocks, 2]
  float* sums = nullptr;                // [blocks, kSlotFloats]
};

/// What a kernel is launched with: (tensor map of weights, args, stream_k, evict_weights).
struct Kernel {
  const void* function;
  std::size_t smem_bytes;
};

/// The kernel of a configuration for bf16 or f16. `Gated`: the sigmoid family of gated activations, else the
/// product.
template <DType kType, Tiling kTiling, bool kGated>
Kernel kernel();

}  // namespace moecore::cuda::sm90
