#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moecore::cpu {
namespace {

int count_cpus() {
  if (const char* text = std::getenv("MOECORE_NUM_THREADS"))
    if (const int n = std::atoi(text); n > 0) return n;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Workers wait for a new job number: first by spinning, so that the ops of a layer, which follow each other
// within microseconds, find them awake, then on a condition variable.
class Pool {
 public:
  // False when the pool is busy (a nested call, or another thread of the program): the caller then works
  // alone.
  bool try_run(int threads, std::int64_t tasks, detail::TaskFn fn, void* closure) {
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(threads - 1);
    fn_ = fn;
    closure_ = closure;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    pending_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      const std::uint64_t number = (job_.load(std::memory_order_relaxed) >> kThreadBits) + 1;
      job_.store(number << kThreadBits | static_cast<unsigned>(threads), std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin)
      spin < kSpins ? relax() : std::this_thread::yield();
    return true;
  }

 private:
  void grow(int workers) {
    while (workers_ < workers) {
      const int id = ++workers_;
      std::thread([this, id, seen = job_.load()] { worker(id, seen); }).detach();
    }
  }

  void worker(int id, std::uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && job_.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (job_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
      }
      seen = job_.load(std::memory_order_acquire);
      if (id >= static_cast<int>(seen & ((1 << kThreadBits) - 1))) continue;  // not asked this time
      work(id);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  void work(int thread) {
    for (std::int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
      fn_(closure_, task, thread);
  }

  static constexpr int kSpins = 20000;  // about 0.2 ms
  static constexpr int kThreadBits = 16;

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  // Job number, and in the low bits how many threads take part. One word, so that a worker that wakes late
  // never pairs one job's number with another's thread count.
  std::atomic<std::uint64_t> job_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> pending_{0};
  int workers_ = 0;
  std::int64_t tasks_ = 0;
  detail::TaskFn fn_ = nullptr;
  void* closure_ = nullptr;
};

// Leaked on purpose: detached workers may outlive static destruction. A forked child has no workers, so it
// gets a fresh pool.
Pool* g_pool = nullptr;
std::once_flag g_once;

Pool& pool() {
  std::call_once(g_once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

thread_local bool t_inside = false;

}  // namespace

int default_threads() {
  static const int n = count_cpus();
  return n;
}

int threads_for(const ExecContext& ctx, std::int64_t tasks) {
  const int limit = std::min(ctx.num_threads > 0 ? ctx.num_threads : default_threads(), 1024);
  return static_cast<int>(std::clamp<std::int64_t>(tasks, 1, limit));
}

void detail::run(int threads, std::int64_t tasks, TaskFn fn, void* closure) {
  if (tasks <= 0) return;
  if (threads > 1 && !t_inside) {
    t_inside = true;
    const bool done = pool().try_run(threads, tasks, fn, closure);
    t_inside = false;
    if (done) return;
  }
  for (std::int64_t task = 0; task < tasks; ++task) fn(closure, task, 0);
}

}  // namespace moecore::cpu
