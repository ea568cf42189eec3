// The peak rate of AMX on bf16.

#if defined(__x86_64__)

#include "cpu/kernels/roof.h"
#include "cpu/simd/target.h"

#include <immintrin.h>

namespace moecore::cpu {
namespace {

// What ldtilecfg reads: all eight tiles 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

MOECORE_TARGET_BEGIN("amx-tile,amx-bf16")

// A block of 2 x 2 tiles of C, as a matrix product has it: four independent accumulators.
double amx_flops(std::int64_t rounds, float* sink) {
  const TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float tile[16 * 16];
  _tile_stored(0, tile, 64);
  _tile_release();
  *sink = tile[0];
  // 16 x 16 results, each 32 products and sums.
  return 4.0 * 16 * 16 * 32 * 2 * static_cast<double>(rounds);
}

MOECORE_TARGET_END
}  // namespace moecore::cpu

#endif
