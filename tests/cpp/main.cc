// The entry of the C++ tests. MOECORE_TEST_REQUIRE (an instruction set, or "cuda") makes the run exit with
// 77, which ctest reports as skipped, on a machine that has not got it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>

#include "moecore/info.h"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  ::testing::InitGoogleTest(&argc, argv);
  if (const char* required = std::getenv("MOECORE_TEST_REQUIRE")) {
    const std::vector<std::string> isas = moecore::cpu_isas();
    std::string why = "this CPU has not got it";
    const bool present = std::string(required) == "cuda"
                             ? moecore::cuda_device_count(&why) > 0
                             : std::find(isas.begin(), isas.end(), required) != isas.end();
    if (!present) {
      std::cout << "skipped: needs " << required << ", but " << why << "\n";
      return kSkipped;
    }
  }
  const int status = RUN_ALL_TESTS();
  if (::testing::GTEST_FLAG(list_tests) || ::testing::UnitTest::GetInstance()->test_to_run_count() > 0)
    return status;
  std::cout << "no test has such a name\n";  // a filter of ctest that nobody meets must not pass
  return 1;
}
