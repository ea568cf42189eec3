// Scales of fp8 rows, from rows to columns, in squares of 32 rows by 32 columns: a block has one, a warp
// reads a row of it and writes a column.

#include "cuda/device/ptx.cuh"
#include "cuda/device/transpose.cuh"
#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/prepare_scales.h"
#include "cuda/types.cuh"

namespace moecore::cuda::sm90 {
namespace {

using dev::kSquare, dev::kSquareThreads;

struct ScaleColumnsArgs {
  ScaleArgs scales;
  const std::int32_t* row_token;  // [R] or none
  std::int64_t rows, columns;     // scales of a column, and columns
  std::int64_t pitch;             // of out, in scales
  float* out;
};

__global__ void __launch_bounds__(kSquare* kSquareThreads)
    scale_columns_kernel(const __grid_constant__ ScaleColumnsArgs args) {
  __shared__ dev::Square<float> square;
  const std::int64_t row = std::int64_t{blockIdx.x} * kSquare, column = std::int64_t{blockIdx.y} * kSquare;
  dev::wait_for_predecessor();
  dev::release_successor();  // whoever follows sees everything that preceded this kernel
  dev::transpose_square<float>(
      square, args.rows - row, args.columns - column,
      [&](int r, int c) {
        const std::int64_t from = args.row_token ? args.row_token[row + r] : row + r;
        return *reinterpret_cast<const float*>(args.scales.data + from * args.scales.row_pitch +
                                               (column + c) * args.scales.col_pitch);
      },
      [&](int c, int r, float scale) { args.out[(column + c) * args.pitch + row + r] = scale; });
}

}  // namespace

ScaleArgs prepare_scales(const GroupedGemmProblem& p, void* out, const DeviceInfo& device,
                         const ExecContext& ctx) {
  ScaleArgs scales = device_args(p).x_scales;
  const auto [columns, pitch] = prepared_scale_shape(p.num_rows, p.k);
  const ScaleColumnsArgs args{.scales = scales,
                              .row_token = p.row_token,
                              .rows = p.num_rows,
                              .columns = columns,
                              .pitch = pitch,
                              .out = static_cast<float*>(out)};
  auto squares = [](std::int64_t n) { return static_cast<unsigned>((n + kSquare - 1) / kSquare); };
  launch("grouped_gemm", device,
         {.grid = dim3(squares(args.rows), squares(args.columns)),
          .block = dim3(kSquare, kSquareThreads),
          .stream = stream(ctx),
          .dependent = true},
         scale_columns_kernel, args);
  scales.data = static_cast<const std::byte*>(out);
  scales.row_pitch = sizeof(float);
  scales.col_pitch = args.pitch * static_cast<std::int64_t>(sizeof(float));
  return scales;
}

}  // namespace moecore::cuda::sm90
