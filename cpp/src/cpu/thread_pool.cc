#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
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

// How long an idle worker spins before it sleeps. The ops of a layer follow each other within microseconds
// and find it awake; waking a sleeping thread takes 50 us, and up to a scheduler tick.
constexpr auto kSpinTime = std::chrono::microseconds(200);

// Spins until done() or kSpinTime has passed; whether done.
template <class Done>
bool spin_until(Done done) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() - begin < kSpinTime);
  return false;
}

// A job is open to every worker that comes in time. The caller starts on the tasks at once, closes the job
// when none is left and waits for those who joined, not for those who still sleep: a small job never takes
// longer than the caller would alone.
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
    left_.store(0, std::memory_order_relaxed);
    int sleepers;
    {
      std::lock_guard lock(mutex_);
      const State last{state_.load(std::memory_order_relaxed)};
      state_.store(State::open(last.number() + 1, threads - 1).word, std::memory_order_release);
      sleepers = sleepers_;
    }
    if (sleepers > 0) wake_.notify_all();
    work(0);
    const State closed{state_.fetch_and(~State::kOpen, std::memory_order_acquire)};
    auto all_left = [&] { return left_.load(std::memory_order_acquire) == closed.joined(); };
    while (!spin_until(all_left)) std::this_thread::yield();
    return true;
  }

 private:
  // The job's number, whether it is open, how many workers may join and how many have: one word, so that a
  // worker joins the very job it has seen.
  struct State {
    static constexpr std::uint64_t kOpen = 1ull << 31;
    std::uint64_t word;

    static State open(std::uint32_t number, int limit) {
      return {std::uint64_t{number} << 32 | kOpen | static_cast<std::uint64_t>(limit) << 16};
    }
    std::uint32_t number() const { return static_cast<std::uint32_t>(word >> 32); }
    int limit() const { return static_cast<int>(word >> 16 & 0x7fff); }
    int joined() const { return static_cast<int>(word & 0xffff); }
    bool joinable() const { return (word & kOpen) && joined() < limit(); }
  };

  State state(std::memory_order order) const { return {state_.load(order)}; }

  // Fewer where the system gives no more threads: a job does without those who do not come.
  void grow(int workers) try {
    for (; workers_ < workers; ++workers_)
      std::thread([this, seen = state(std::memory_order_relaxed).number()] { worker(seen); }).detach();
  } catch (const std::system_error&) {
  }

  void worker(std::uint32_t seen) {
    for (;;) {
      auto new_job = [&] { return state(std::memory_order_relaxed).number() != seen; };
      if (!spin_until(new_job)) {
        std::unique_lock lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, new_job);
        --sleepers_;
      }
      State now = state(std::memory_order_relaxed);
      while (now.joinable() &&
             !state_.compare_exchange_weak(now.word, now.word + 1, std::memory_order_acquire))
        relax();
      seen = now.number();
      if (!now.joinable()) continue;
      work(now.joined() + 1);
      left_.fetch_add(1, std::memory_order_release);
    }
  }

  void work(int thread) {
    for (std::int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
      fn_(closure_, task, thread);
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> left_{0};  // workers that joined the job and are done with it
  int workers_ = 0;
  int sleepers_ = 0;
  std::int64_t tasks_ = 0;
  detail::TaskFn fn_ = nullptr;
  void* closure_ = nullptr;
};

// Leaked on purpose: detached workers may outlive static destruction. A forked child has no workers, so it
// gets a fresh pool. Not std::call_once: it passes its function through a thread-local of libstdc++, which
// the extension's static TLS model could not reach once another package has loaded that library.
Pool* g_pool = nullptr;

Pool& pool() {
  static const int once = (g_pool = new Pool, pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; }));
  static_cast<void>(once);
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
