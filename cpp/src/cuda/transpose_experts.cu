// transpose_experts: dst[e,c,r] = src[e,r,c] in tiles of 32 x 32 elements through shared memory, so that
// reads and writes are both contiguous. Grid (tiles of a matrix, experts), 32 x 8 threads, each moving 4
// elements.

#include <string>

#include "cuda/device/ptx.cuh"
#include "cuda/device/transpose.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/runtime.h"
#include "ops/transpose_experts.h"

namespace moecore::cuda {
namespace {

using dev::kSquare, dev::kSquareThreads;

struct TransposeArgs {
  const std::byte* src;
  std::byte* dst;
  std::int64_t src_expert_stride, src_row_stride, dst_expert_stride, dst_row_stride;
  std::int64_t num_experts, rows, cols, tile_cols, tiles;
};

template <class T>
__global__ void __launch_bounds__(kSquare* kSquareThreads)
    transpose_experts_kernel(const TransposeArgs args) {
  __shared__ dev::Square<T> square;
  dev::wait_for_predecessor();
  dev::release_successor();
  for (std::int64_t e = blockIdx.y; e < args.num_experts; e += gridDim.y) {
    const T* src = reinterpret_cast<const T*>(args.src) + e * args.src_expert_stride;
    T* dst = reinterpret_cast<T*>(args.dst) + e * args.dst_expert_stride;
    for (std::int64_t t = blockIdx.x; t < args.tiles; t += gridDim.x) {
      const std::int64_t row = t / args.tile_cols * kSquare, col = t % args.tile_cols * kSquare;
      __syncthreads();  // the tile before was read
      dev::transpose_square<T>(
          square, args.rows - row, args.cols - col,
          [&](int r, int c) { return src[(row + r) * args.src_row_stride + col + c]; },
          [&](int c, int r, T value) { dst[(col + c) * args.dst_row_stride + row + r] = value; });
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

  const std::int64_t tile_cols = (p.cols + kSquare - 1) / kSquare;
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
                           .tiles = tile_cols * ((p.rows + kSquare - 1) / kSquare)};
  constexpr std::int64_t kMaxGridX = 0x7FFFFFFF;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(std::min(args.tiles, kMaxGridX)),
                                         static_cast<unsigned>(std::min(p.num_experts, kMaxGridY))),
                            .block = dim3(kSquare, kSquareThreads),
                            .stream = stream(ctx),
                            .dependent = true};
  const DeviceGuard guard(device);
  launch("transpose_experts", device, config, select_kernel(p.element_bytes), args);
}

}  // namespace moecore::cuda
