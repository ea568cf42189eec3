// What the CUDA engine measures about a device, and the kernel that proves that it can run there.

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/device/vec.cuh"
#include "cuda/probe.h"
#include "cuda/runtime.h"
#include "ops/info.h"

namespace moecore::cuda {
namespace {

__global__ void image_probe_kernel() {}

constexpr int kReadThreads = 512;
constexpr int kReadUnroll = 8;

// Grid-stride reads of 16 bytes a thread, eight in flight. The sum is stored only where it can never be, so
// that the loads stay.
__global__ void __launch_bounds__(kReadThreads)
    read_kernel(const uint4* data, std::int64_t n, unsigned* sink) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kReadThreads;
  unsigned sum = 0;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kReadThreads + threadIdx.x; i < n;
       i += stride * kReadUnroll) {
    uint4 v[kReadUnroll] = {};
#pragma unroll
    for (int u = 0; u < kReadUnroll; ++u)
      if (i + u * stride < n) v[u] = dev::load_streaming(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < kReadUnroll; ++u) sum |= v[u].x | v[u].y | v[u].z | v[u].w;
  }
  if (sum == 0x9E3779B9u) *sink = sum;
}

constexpr int kFmaThreads = 256;
constexpr int kFmaChains = 16;
constexpr int kFmaSteps = 4096;

// Independent fma chains in registers.
__global__ void __launch_bounds__(kFmaThreads) fma_kernel(float a, float b, float* sink) {
  float c[kFmaChains];
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) c[i] = static_cast<float>(threadIdx.x + i);
#pragma unroll 8
  for (int step = 0; step < kFmaSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kFmaChains; ++i) c[i] = __fmaf_rn(c[i], a, b);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) sum += c[i];
  if (sum == 0.12345f) *sink = sum;
}

struct FreeDevice {
  void operator()(void* p) const { cudaFree(p); }
};
struct DestroyEvent {
  void operator()(cudaEvent_t e) const { cudaEventDestroy(e); }
};
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "measure_roof", "creating an event");
  return Event(event);
}

// Best time of several runs, in seconds: a roof is what the device can do, not what it does on average.
template <class Run>
double best_seconds(Run&& run) {
  const Event begin = make_event(), end = make_event();
  float best = 1e30f;
  for (int i = 0; i < 8; ++i) {
    check(cudaEventRecord(begin.get(), nullptr), "measure_roof", "timing");
    run();
    check(cudaEventRecord(end.get(), nullptr), "measure_roof", "timing");
    check(cudaEventSynchronize(end.get()), "measure_roof", "timing");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.get(), end.get()), "measure_roof", "timing");
    if (i > 0) best = std::min(best, ms);
  }
  return best * 1e-3;
}

}  // namespace

const void* probe_kernel() {
  return reinterpret_cast<const void*>(image_probe_kernel);
}

// bf16_flop_per_s stays 0: the matrix rate is measured by the grouped GEMM that reaches it.
Roof measure_roof(int index) {
  constexpr const char* kOp = "measure_roof";
  ExecContext ctx;
  ctx.device = {DeviceType::kCUDA, index};
  const DeviceInfo& device = open_device(kOp, ctx);
  const DeviceGuard guard(device);

  std::size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), kOp, "reading the free memory");
  const std::size_t bytes = std::min<std::size_t>(std::size_t{4} << 30, free_bytes / 2) / 4096 * 4096;
  void* raw = nullptr;
  check(cudaMalloc(&raw, bytes), kOp, "allocating the test buffer");
  const std::unique_ptr<void, FreeDevice> buffer(raw);
  check(cudaMemset(raw, 0x5A, bytes), kOp, "filling the test buffer");

  Roof roof;
  const int resident = std::max(1, device.max_threads_per_sm / kReadThreads) * device.num_sms;
  roof.read_bytes_per_s = bytes / best_seconds([&] {
                            launch(kOp, device, {.grid = dim3(resident), .block = dim3(kReadThreads)},
                                   read_kernel, static_cast<const uint4*>(raw),
                                   static_cast<std::int64_t>(bytes / 16), static_cast<unsigned*>(raw));
                          });
  const int fma_blocks = device.num_sms * 64;
  roof.f32_flop_per_s = 2.0 * kFmaChains * kFmaSteps * kFmaThreads * fma_blocks / best_seconds([&] {
                          launch(kOp, device, {.grid = dim3(fma_blocks), .block = dim3(kFmaThreads)},
                                 fma_kernel, 1.0001f, 0.5f, static_cast<float*>(raw));
                        });
  return roof;
}

}  // namespace moecore::cuda
