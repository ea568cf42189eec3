#pragma once
// The CPU engine's threads: one process-wide pool, started on first use.

#include <cstdint>
#include <type_traits>

#include "moecore/context.h"

namespace moecore::cpu {

/// Threads used when a context asks for none in particular: MOECORE_NUM_THREADS, else the CPUs of this
/// process.
int default_threads();

namespace detail {
using TaskFn = void (*)(void* closure, std::int64_t task, int thread);
void run(int threads, std::int64_t tasks, TaskFn fn, void* closure);
}  // namespace detail

/// Threads that parallel_for will use for this many tasks.
int threads_for(const ExecContext& ctx, std::int64_t tasks);

/// Calls fn(task, thread) once for every task in [0, tasks), on up to threads_for(ctx, tasks) threads. Tasks
/// are handed out in ascending order; `thread` is in [0, threads). Returns when all are done. fn must not
/// throw. A call from inside a task, or while another thread of the program is using the pool, runs its tasks
/// on the caller.
template <class Fn>
void parallel_for(const ExecContext& ctx, std::int64_t tasks, Fn&& fn) {
  using Closure = std::remove_reference_t<Fn>;
  detail::run(
      threads_for(ctx, tasks), tasks,
      [](void* closure, std::int64_t task, int thread) { (*static_cast<Closure*>(closure))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

/// Splits [0, n) into chunks of at least `grain` items and calls fn(begin, end) for each, in parallel.
template <class Fn>
void parallel_chunks(const ExecContext& ctx, std::int64_t n, std::int64_t grain, Fn&& fn) {
  if (n <= 0) return;
  const std::int64_t threads = threads_for(ctx, (n + grain - 1) / grain);
  // Four chunks a thread: enough to even out uneven cores, few enough to cost nothing.
  const std::int64_t chunks = threads == 1 ? 1 : threads * 4;
  std::int64_t size = (n + chunks - 1) / chunks;
  if (size < grain) size = grain;
  const std::int64_t tasks = (n + size - 1) / size;
  parallel_for(ctx, tasks, [&](std::int64_t task, int) {
    const std::int64_t begin = task * size;
    fn(begin, begin + size < n ? begin + size : n);
  });
}

}  // namespace moecore::cpu
