// The CPU engine's threads: calls from several threads of the program at once, and in a forked child.

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <thread>
#include <vector>

#include "moecore/moecore.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

// One op with enough work for several threads, and its expected bits.
class Work {
 public:
  Work()
      : rows_(Random(1).floats({4000, 128}, DType::kF32)),
        slots_(Random(2).integers({1000, 4}, 0, 3999)),
        expected_(oracle::finalize(rows_, slots_, 128, DType::kF32, {}, false, {})),
        rows_tensor_({}, DType::kF32, rows_),
        slot_tensor_({}, DType::kI32, slots_) {}

  bool run(int num_threads) const {
    const Tensor out({}, DType::kF32, {1000, 128});
    finalize(rows_tensor_, slot_tensor_, out, {}, {.num_threads = num_threads});
    return static_cast<bool>(equal(out.get(), expected_));
  }

 private:
  Array rows_, slots_, expected_;
  Tensor rows_tensor_, slot_tensor_;
};

TEST(Threads, ConcurrentCallsAreIndependent) {
  const Work work;
  std::array<int, 4> good{};
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < good.size(); ++i)
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 50; ++repeat) good[i] += work.run(static_cast<int>(i) + 1);
    });
  for (std::thread& t : callers) t.join();
  for (int n : good) EXPECT_EQ(n, 50);
}

TEST(Threads, CountsMayChangeFromCallToCall) {
  const Work work;
  for (int threads : {1, 7, 2, 0, 16, 3, 1, 5}) EXPECT_TRUE(work.run(threads)) << threads;
}

// A forked child has none of its parent's worker threads.
TEST(Threads, AForkedChildCanCall) {
  const Work work;
  ASSERT_TRUE(work.run(2));  // the parent's pool is up
  for (int generation = 0; generation < 3; ++generation) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);  // a hang ends in SIGALRM
      _exit(work.run(2) && work.run(4) ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  }
  EXPECT_TRUE(work.run(2));
}

TEST(Threads, AChildForkedDuringCallsCanCall) {
  const Work work;
  std::thread busy([&] {
    for (int i = 0; i < 200; ++i) work.run(2);
  });
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);
      // No allocation: another thread may have held the heap's lock when this child came to be.
      std::array<float, 64> in{}, out{};
      const std::array<std::int32_t, 4> map = {3, 2, 1, 0};
      in[0] = 5;
      shuffle_rows(TensorView::dense(in.data(), DType::kF32, {4, 16}),
                   TensorView::dense(static_cast<const void*>(map.data()), DType::kI32, {4}),
                   TensorView::dense(out.data(), DType::kF32, {4, 16}));
      _exit(out[48] == 5 ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  }
  busy.join();
}

}  // namespace
}  // namespace moecore::test
