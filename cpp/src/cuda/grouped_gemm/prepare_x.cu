// x for the Hopper engine's decoded weights: codes times their scales as bf16, which holds them exactly but
// at the ends of e8m0's range, and every 128 columns in the order of sm90_decoded.cuh. A thread writes 16
// bytes: the columns that the four threads of a quad multiply as one half of one k16 step.

#include "cuda/device/ptx.cuh"
#include "cuda/grouped_gemm/engines.h"
#include "cuda/grouped_gemm/operands.cuh"
#include "cuda/grouped_gemm/prepare_x.h"

namespace moecore::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kChunks = kDecodedStepK / 8;  // of 16 bytes in a step

struct PrepareArgs {
  const void* x;
  std::int64_t x_stride;
  std::int64_t rows;
  int k, steps;
  ScaleArgs scales;
  __nv_bfloat16* out;
};

/// Column of a step that stands at element 2q + b of chunk c: half c % 2 of k16 step c / 2.
__device__ __forceinline__ int column_of(int c, int q, int b) {
  return q * 32 + c / 4 * 8 + c / 2 % 2 * 2 + c % 2 + b * 4;
}

template <class Stored>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();  // whoever follows sees everything that preceded this kernel
  const std::int64_t total = args.rows * args.steps * kChunks;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const int c = static_cast<int>(i % kChunks);
    const std::int64_t row_step = i / kChunks, row = row_step / args.steps;
    const int first = static_cast<int>(row_step - row * args.steps) * kDecodedStepK;
    __nv_bfloat16 values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = first + column_of(c, j / 2, j % 2);
      values[j] = __nv_bfloat16(0.0f);
      if (column >= args.k) continue;
      if constexpr (std::is_same_v<Stored, __nv_bfloat16>) {
        values[j] = static_cast<const __nv_bfloat16*>(args.x)[row * args.x_stride + column];
      } else {
        const std::byte* codes =
            static_cast<const std::byte*>(args.x) + row * args.x_stride * kBits<Stored> / 8;
        const std::byte* scale = args.scales.data + row * args.scales.row_pitch +
                                 column / args.scales.block_cols * args.scales.col_pitch;
        values[j] =
            __float2bfloat16_rn(element<Stored>(codes, column) *
                                scale_to_f32(read_scale(scale, args.scales.dtype), args.scales.dtype));
      }
    }
    *reinterpret_cast<uint4*>(args.out + i * 8) = *reinterpret_cast<const uint4*>(values);
  }
}

}  // namespace

void prepare_x(const GroupedGemmProblem& p, void* out, const DeviceInfo& device, const ExecContext& ctx) {
  const PrepareArgs args{.x = p.x,
                         .x_stride = p.x_stride,
                         .rows = p.x_rows,
                         .k = static_cast<int>(p.k),
                         .steps = static_cast<int>(prepared_k(p.k) / kDecodedStepK),
                         .scales = device_args(p).x_scales,
                         .out = static_cast<__nv_bfloat16*>(out)};
  const auto kernel = p.x_scales.form == OperandForm::kFloat   ? prepare_kernel<__nv_bfloat16>
                      : p.x_scales.form == OperandForm::kMxfp8 ? prepare_kernel<E4m3Codes>
                                                               : prepare_kernel<E2m1Codes>;
  const std::int64_t blocks = (args.rows * args.steps * kChunks + kThreads - 1) / kThreads;
  const std::int64_t resident = std::int64_t{device.num_sms} * (device.max_threads_per_sm / kThreads);
  launch("grouped_gemm", device,
         {.grid = dim3(static_cast<unsigned>(std::max<std::int64_t>(1, std::min(blocks, resident)))),
          .block = dim3(kThreads),
          .stream = stream(ctx),
          .dependent = true},
         kernel, args);
}

}  // namespace moecore::cuda::sm90
