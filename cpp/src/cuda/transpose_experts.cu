// transpose_experts: dst[e,c,r] = src[e,r,c] in tiles of 32 x 32 elements through shared memory, so that
// reads and writes are both contiguous. Grid (tiles of a matrix, experts), 32 x 8 threads, each moving 4
// elements.

#include <string>

#include "cuda/device/ptx.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/runtime.h"
#include "ops/transpose_experts.h"

namespace moecore::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kRows = 8;  // of threads

struct TransposeArgs {
  const std::byte* src;
  std::byte* dst;
  std::int64_t src_expert_stride, src_row_stride, dst_expert_stride, dst_row_stride;
  std::int64_t num_experts, rows, cols, tile_cols, tiles;
};

template <class T>
__global__ void __launch_bounds__(kTile* kRows) transpose_experts_kernel(const TransposeArgs args) {
  __shared__ T tile[kTile][kTile + 1];  // one column more, so that a column is spread over the banks
  dev::wait_for_predecessor();
  dev::release_successor();
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  for (std::int64_t e = blockIdx.y; e < args.num_experts; e += gridDim.y) {
    const T* src = reinterpret_cast<const T*>(args.src) + e * args.src_expert_stride;
    T* dst = reinterpret_cast<T*>(args.dst) + e * args.dst_expert_stride;
    for (std::int64_t t = blockIdx.x; t < args.tiles; t += gridDim.x) {
      const std::int64_t row = t / args.tile_cols * kTile, col = t % args.tile_cols * kTile;
      __syncthreads();  // the tile before was read
#pragma unroll
      for (int i = y; i < kTile; i += kRows)
        if (row + i < args.rows && col + x < args.cols)
          tile[i][x] = src[(row + i) * args.src_row_stride + col + x];
      __syncthreads();
#pragma unroll
      for (int i = y; i < kTile; i += kRows)
        if (col + i < args.cols && row + x < args.rows)
          dst[(col + i) * args.dst_row_stride + row + x] = tile[x][i];
    }
  }
}

auto select_kernel(int element_bytes) {
  switch (element_bytes) {
    case 1:
      return transpose_experts_kernel<dev::bytes_t<1>>;
    case 2:
      return transpose_experts_kernel<dev::bytes_t<2>>;
    case 4:
      return transpose_experts_kernel<dev::bytes_t<4>>;
    default:
      return transpose_experts_kernel<dev::bytes_t<8>>;
  }
}

}  // namespace

void transpose_experts(const TransposeProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("transpose_experts", ctx);
  if (explained(ctx, "transpose_experts", [] { return std::string("cuda, 32 x 32 tiles"); })) return;
  if (p.num_experts == 0 || p.rows == 0 || p.cols == 0) return;

  const std::int64_t tile_cols = (p.cols + kTile - 1) / kTile;
  const TransposeArgs args{.src = p.src,
                           .dst = p.dst,
                           .src_expert_stride = p.src_expert_stride,
                           .src_row_stride = p.src_row_stride,
                           .dst_expert_stride = p.dst_expert_stride,
                           .dst_row_stride = p.dst_row_stride,
                           .num_experts = p.num_experts,
                           .rows = p.rows,
                           .cols = p.cols,
                           .tile_cols = tile_cols,
                           .tiles = tile_cols * ((p.rows + kTile - 1) / kTile)};
  constexpr std::int64_t kMaxGridX = 0x7FFFFFFF;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(std::min(args.tiles, kMaxGridX)),
                                         static_cast<unsigned>(std::min(p.num_experts, kMaxGridY))),
                            .block = dim3(kTile, kRows),
                            .stream = stream(ctx),
                            .dependent = true};
  const DeviceGuard guard(device);
  launch("transpose_experts", device, config, select_kernel(p.element_bytes), args);
}

}  // namespace moecore::cuda
