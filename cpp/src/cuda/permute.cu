// permute, shuffle_rows: rows are moved as vectors of up to 16 bytes.
//
// Grid (slices, rows): a block owns a slice of threads * unroll vectors of one row, thread t its vectors
// t, t + threads, ... of the slice, so that a warp touches 512 contiguous bytes. The first slice also
// moves the bytes behind the last whole vector.
//   by row:   row d of the output; load map[d], then x, then store.
//   by token: row t of x; x and slot_row[t, :] are loaded together, then every copy is stored. Rows that no
//             route owns stand at the end of the output; the blocks zero them in turn.
//
// The scales of a row go with its last slice, the shortest, in units of their own.

#include <string>

#include "cuda/device/ptx.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/permute_policy.h"
#include "cuda/policy_override.h"
#include "cuda/runtime.h"

namespace moecore::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSlotsAtOnce = 8;

struct PermuteArgs {
  const std::byte* x;
  std::byte* out;
  std::int64_t x_rows, x_pitch, out_rows, out_pitch;
  RowMove scales;
  int scale_unit;        // bytes in which scales are moved: 4 or 1
  std::int64_t vectors;  // whole vectors of a row
  int tail_bytes;        // behind them
  bool streaming;
  const void* map;
  bool map_is_i64;
  const std::int32_t* slot_row;
  int top_k;
  const std::int32_t* num_rows;
};

// What one thread holds of a row: vectors first, first + threads, ... and at most one tail byte.
template <int kVectorBytes, int kUnroll>
struct Piece {
  using Vector = dev::bytes_t<kVectorBytes>;

  Vector data[kUnroll] = {};
  unsigned char tail = 0;

  static __device__ bool owns_tail(const PermuteArgs& args, std::int64_t first) {
    return first - threadIdx.x == 0 && static_cast<int>(threadIdx.x) < args.tail_bytes;
  }

  __device__ void load(const PermuteArgs& args, const std::byte* row, std::int64_t first) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = first + u * blockDim.x;
      if (v < args.vectors) data[u] = dev::load_readonly(reinterpret_cast<const Vector*>(row) + v);
    }
    if (owns_tail(args, first))
      tail = static_cast<unsigned char>(row[args.vectors * kVectorBytes + threadIdx.x]);
  }

  __device__ void store(const PermuteArgs& args, std::byte* row, std::int64_t first) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = first + u * blockDim.x;
      Vector* to = reinterpret_cast<Vector*>(row) + v;
      if (v < args.vectors) {
        if (args.streaming)
          dev::store_streaming(to, data[u]);
        else
          *to = data[u];
      }
    }
    if (owns_tail(args, first)) row[args.vectors * kVectorBytes + threadIdx.x] = std::byte{tail};
  }
};

// Source row s's scales (zeros for s < 0) to the rows that `for_each_row` calls its argument with.
template <class ForEachRow>
__device__ __forceinline__ void move_scales(const PermuteArgs& args, std::int64_t s,
                                            ForEachRow&& for_each_row) {
  if (blockIdx.x != gridDim.x - 1) return;
  const RowMove& m = args.scales;
  for (std::int64_t i = static_cast<std::int64_t>(threadIdx.x) * args.scale_unit; i < m.row_bytes;
       i += static_cast<std::int64_t>(blockDim.x) * args.scale_unit) {
    const std::byte* from = m.x + s * m.x_pitch + i;
    if (args.scale_unit == 4) {
      const unsigned value = s < 0 ? 0u : __ldg(reinterpret_cast<const unsigned*>(from));
      for_each_row(
          [&](std::int64_t d) { *reinterpret_cast<unsigned*>(m.out + d * m.out_pitch + i) = value; });
    } else {
      const std::byte value = s < 0 ? std::byte{} : *from;
      for_each_row([&](std::int64_t d) { m.out[d * m.out_pitch + i] = value; });
    }
  }
}

template <int kVectorBytes, int kUnroll>
__global__ void __launch_bounds__(kMaxThreads) permute_by_row_kernel(const PermuteArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t slice = static_cast<std::int64_t>(blockDim.x) * kUnroll;
  for (std::int64_t d = blockIdx.y; d < args.out_rows; d += gridDim.y) {
    const std::int64_t s = args.map_is_i64 ? static_cast<const std::int64_t*>(args.map)[d]
                                           : static_cast<const std::int32_t*>(args.map)[d];
    for (std::int64_t begin = blockIdx.x * slice; begin < args.vectors || begin == 0;
         begin += gridDim.x * slice) {
      Piece<kVectorBytes, kUnroll> piece;
      if (s >= 0 && s < args.x_rows) piece.load(args, args.x + s * args.x_pitch, begin + threadIdx.x);
      piece.store(args, args.out + d * args.out_pitch, begin + threadIdx.x);
    }
    move_scales(args, s >= 0 && s < args.x_rows ? s : -1, [&](auto&& store) { store(d); });
  }
}

template <int kVectorBytes, int kUnroll>
__global__ void __launch_bounds__(kMaxThreads) permute_by_token_kernel(const PermuteArgs args) {
  dev::wait_for_predecessor();
  dev::release_successor();
  const std::int64_t slice = static_cast<std::int64_t>(blockDim.x) * kUnroll;
  const std::int64_t num_rows = *args.num_rows;
  for (std::int64_t begin = blockIdx.x * slice; begin < args.vectors || begin == 0;
       begin += gridDim.x * slice) {
    const std::int64_t first = begin + threadIdx.x;
    for (std::int64_t t = blockIdx.y; t < args.x_rows; t += gridDim.y) {
      Piece<kVectorBytes, kUnroll> piece;
      piece.load(args, args.x + t * args.x_pitch, first);
      const std::int32_t* slots = args.slot_row + t * args.top_k;
      for (int k = 0; k < args.top_k; k += kSlotsAtOnce) {
        std::int32_t row[kSlotsAtOnce];
#pragma unroll
        for (int j = 0; j < kSlotsAtOnce; ++j) row[j] = k + j < args.top_k ? slots[k + j] : -1;
#pragma unroll
        for (int j = 0; j < kSlotsAtOnce; ++j)
          if (row[j] >= 0 && row[j] < args.out_rows)
            piece.store(args, args.out + row[j] * args.out_pitch, first);
      }
    }
    for (std::int64_t d = num_rows + blockIdx.y; d < args.out_rows; d += gridDim.y)
      Piece<kVectorBytes, kUnroll>{}.store(args, args.out + d * args.out_pitch, first);
  }
  if (args.scales.row_bytes == 0) return;
  for (std::int64_t t = blockIdx.y; t < args.x_rows; t += gridDim.y)
    move_scales(args, t, [&](auto&& store) {
      for (int k = 0; k < args.top_k; ++k) {
        const std::int64_t d = args.slot_row[t * args.top_k + k];
        if (d >= 0 && d < args.out_rows) store(d);
      }
    });
  for (std::int64_t d = num_rows + blockIdx.y; d < args.out_rows; d += gridDim.y)
    move_scales(args, -1, [&](auto&& store) { store(d); });
}

template <int kVectorBytes, int kUnroll>
void launch_permute(const PermutePolicy& policy, const PermuteArgs& args, std::int64_t row_bytes,
                    const DeviceInfo& device, cudaStream_t stream) {
  const std::int64_t rows = policy.by_token ? args.x_rows : args.out_rows;
  const LaunchConfig config{
      .grid = dim3(permute_slices(policy, row_bytes), static_cast<unsigned>(std::min(rows, kMaxGridY))),
      .block = dim3(policy.threads),
      .stream = stream,
      .dependent = true};
  launch("permute", device, config,
         policy.by_token ? permute_by_token_kernel<kVectorBytes, kUnroll>
                         : permute_by_row_kernel<kVectorBytes, kUnroll>,
         args);
}

template <int kVectorBytes>
void launch_permute(const PermutePolicy& policy, const PermuteArgs& args, std::int64_t row_bytes,
                    const DeviceInfo& device, cudaStream_t stream) {
  switch (policy.unroll) {
    case 1:
      return launch_permute<kVectorBytes, 1>(policy, args, row_bytes, device, stream);
    case 2:
      return launch_permute<kVectorBytes, 2>(policy, args, row_bytes, device, stream);
    default:
      return launch_permute<kVectorBytes, 4>(policy, args, row_bytes, device, stream);
  }
}

std::string describe(const PermutePolicy& policy) {
  return "cuda, by_token=" + std::to_string(policy.by_token) + " unroll=" + std::to_string(policy.unroll) +
         " threads=" + std::to_string(policy.threads) + " streaming=" + std::to_string(policy.streaming) +
         ", " + std::to_string(policy.vector_bytes) + "-byte vectors";
}

}  // namespace

void permute(const PermuteProblem& p, const ExecContext& ctx) {
  const DeviceInfo& device = open_device("permute", ctx);
  const TuningSizes sizes{.rows = p.out_rows,
                          .width = p.row_bytes,
                          .sms = device.num_sms,
                          .capability = device.compute_capability};
  const PermutePolicy policy = tuned("permute", sizes, ctx, [&](std::string_view text) {
    PermutePolicy chosen = select_permute_policy(p, device.num_sms, device.l2_bytes);
    override_policy("permute", text,
                    {{"by_token", &chosen.by_token, {0, p.slot_row != nullptr}},
                     {"unroll", &chosen.unroll, {1, 2, 4}},
                     {"threads", &chosen.threads, {32, 64, 96, 128, 160, 192, 224, 256}},
                     {"streaming", &chosen.streaming, {0, 1}}});
    return chosen;
  });
  if (explained(ctx, "permute", [&] { return describe(policy); })) return;
  if (p.out_rows == 0 || p.row_bytes + p.scales.row_bytes == 0) return;

  const PermuteArgs args{
      .x = p.x,
      .out = p.out,
      .x_rows = p.x_rows,
      .x_pitch = p.x_pitch,
      .out_rows = p.out_rows,
      .out_pitch = p.out_pitch,
      .scales = p.scales,
      .scale_unit = common_alignment(permute_bits(p.scales) | p.scales.row_bytes) >= 4 ? 4 : 1,
      .vectors = p.row_bytes / policy.vector_bytes,
      .tail_bytes = static_cast<int>(p.row_bytes % policy.vector_bytes),
      .streaming = policy.streaming != 0,
      .map = p.map.data,
      .map_is_i64 = p.map.is_i64,
      .slot_row = p.slot_row,
      .top_k = static_cast<int>(p.top_k),
      .num_rows = p.num_rows};
  const DeviceGuard guard(device);
  switch (policy.vector_bytes) {
    case 16:
      return launch_permute<16>(policy, args, p.row_bytes, device, stream(ctx));
    case 8:
      return launch_permute<8>(policy, args, p.row_bytes, device, stream(ctx));
    case 4:
      return launch_permute<4>(policy, args, p.row_bytes, device, stream(ctx));
    case 2:
      return launch_permute<2>(policy, args, p.row_bytes, device, stream(ctx));
    default:
      return launch_permute<1>(policy, args, p.row_bytes, device, stream(ctx));
  }
}

}  // namespace moecore::cuda
