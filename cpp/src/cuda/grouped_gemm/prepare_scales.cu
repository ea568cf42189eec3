// Scales of fp8 rows, from rows to columns: by way of shared memory in squares of 32 rows by 32 columns, so
// that both sides are whole lines. A block has one square; a warp reads a row of it and writes a column.

#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/prepare_scales.h"
#include "cuda/types.cuh"

namespace moecore::cuda::sm90 {
namespace {

constexpr int kSquare = 32, kWarps = 8;

struct ScaleColumnsArgs {
  ScaleArgs scales;
  const std::int32_t* row_token;  // [R] or none
  std::int64_t rows, column;      // of a column: scales there are, and their places
  int columns;
  float* out;
};

__global__ void __launch_bounds__(kSquare* kWarps)
    scale_columns_kernel(const __grid_constant__ ScaleColumnsArgs args) {
  __shared__ float square[kSquare][kSquare + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kSquare;
  const int first_column = blockIdx.y * kSquare;
  dev::wait_for_predecessor();
  dev::release_successor();  // whoever follows sees everything that preceded this kernel
  for (int i = warp; i < kSquare; i += kWarps) {
    const std::int64_t row = first_row + i;
    if (row >= args.rows || first_column + lane >= args.columns) continue;
    const std::int64_t from = args.row_token ? args.row_token[row] : row;
    square[i][lane] = *reinterpret_cast<const float*>(args.scales.data + from * args.scales.row_pitch +
                                                      (first_column + lane) * args.scales.col_pitch);
  }
  __syncthreads();
  for (int i = warp; i < kSquare; i += kWarps)
    if (first_column + i < args.columns && first_row + lane < args.rows)
      args.out[(first_column + i) * args.column + first_row + lane] = square[lane][i];
}

}  // namespace

ScaleArgs prepare_scales(const GroupedGemmProblem& p, void* out, const DeviceInfo& device,
                         const ExecContext& ctx) {
  ScaleArgs scales = device_args(p).x_scales;
  const ScaleColumnsArgs args{.scales = scales,
                              .row_token = p.row_token,
                              .rows = p.num_rows,
                              .column = scale_column(p.num_rows),
                              .columns = static_cast<int>((p.k + 127) / 128),
                              .out = static_cast<float*>(out)};
  auto squares = [](std::int64_t n) { return static_cast<unsigned>((n + kSquare - 1) / kSquare); };
  launch("grouped_gemm", device,
         {.grid = dim3(squares(args.rows), squares(args.columns)),
          .block = dim3(kSquare * kWarps),
          .stream = stream(ctx),
          .dependent = true},
         scale_columns_kernel, args);
  scales.data = static_cast<const std::byte*>(out);
  scales.row_pitch = sizeof(float);
  scales.col_pitch = args.column * static_cast<std::int64_t>(sizeof(float));
  return scales;
}

}  // namespace moecore::cuda::sm90
