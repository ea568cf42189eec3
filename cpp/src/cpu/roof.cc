// measure_roof on the CPU: how fast this machine reads memory and multiplies, with all threads of the engine.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/roof.h"
#include "cpu/thread_pool.h"
#include "ops/info.h"

namespace moecore::cpu {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// 512 MiB or four times the last cache, whichever is more, but at most a quarter of the free memory.
std::size_t read_buffer_bytes() {
  const std::size_t cache = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
  const std::size_t free = static_cast<std::size_t>(std::max(0L, sysconf(_SC_AVPHYS_PAGES))) *
                           static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return std::min(std::max(std::size_t{512} << 20, 4 * cache), free / 4);
}

// Bytes per second of the best of a few passes over a buffer that no cache holds.
double measure_read() {
  constexpr std::size_t kSlice = 1 << 20, kHugePage = 2 << 20;
  const auto slices = static_cast<std::int64_t>(read_buffer_bytes() / kSlice);
  const std::size_t bytes = static_cast<std::size_t>(slices) * kSlice;
  std::unique_ptr<float, decltype(&std::free)> buffer(
      static_cast<float*>(std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage)),
      &std::free);
  if (!buffer) return 0;
  madvise(buffer.get(), bytes, MADV_HUGEPAGE);  // a wish: without it the passes also measure the page walks
  float* const data = buffer.get();
  constexpr std::int64_t kFloats = kSlice / sizeof(float);
  parallel_for({}, slices, [&](std::int64_t s, int) { std::fill_n(data + s * kFloats, kFloats, 1.0f); });

  std::vector<float> sums(static_cast<std::size_t>(slices));
  double best = 0;
  const double start = seconds();
  for (int pass = 0; pass < 8 && (pass < 2 || seconds() - start < 0.5); ++pass) {
    const double begin = seconds();
    parallel_for({}, slices, [&](std::int64_t s, int) {
      sums[static_cast<std::size_t>(s)] = kernels().read_all(data + s * kFloats, kSlice);
    });
    best = std::max(best, static_cast<double>(bytes) / (seconds() - begin));
  }
  return best;
}

// Flops per second of loop(rounds, sink) -> flops, on all threads.
template <class Loop>
double measure_flops(Loop loop) {
  // Enough tasks, each long enough, that starting and ending them does not show: 0.1 ms a task.
  float sink = 0;
  std::int64_t rounds = 1024;
  for (;; rounds *= 2) {
    const double begin = seconds();
    loop(rounds, &sink);
    if (seconds() - begin > 1e-4) break;
  }
  const std::int64_t tasks = 200 * default_threads();
  std::vector<double> flops(static_cast<std::size_t>(tasks));
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double begin = seconds();
    parallel_for({}, tasks, [&](std::int64_t task, int) {
      float unused = 0;
      flops[static_cast<std::size_t>(task)] = loop(rounds, &unused);
    });
    const double elapsed = seconds() - begin;
    double total = 0;
    for (const double f : flops) total += f;
    best = std::max(best, total / elapsed);
  }
  return best;
}

}  // namespace

Roof measure_roof() {
  Roof roof;
  roof.read_bytes_per_s = measure_read();
  roof.f32_flop_per_s = measure_flops(kernels().fma_flops);
  roof.bf16_flop_per_s = roof.f32_flop_per_s;
#if defined(__x86_64__)
  if (active_isa() == Isa::kAmx)
    roof.bf16_flop_per_s = measure_flops(amx_flops);
  else if (active_isa() == Isa::kAvx512Bf16)
    roof.bf16_flop_per_s = measure_flops(bf16_dot_flops);
#endif
  return roof;
}

}  // namespace moecore::cpu
