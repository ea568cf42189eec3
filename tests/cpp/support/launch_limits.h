#pragma once
// What every GPU allows a launch, and the sizes that launch policies are tried on.

#include <cstdint>
#include <vector>

namespace moecore::test {

inline constexpr int kMaxThreads = 1024, kMaxGridY = 65535;
inline constexpr std::int64_t kMaxGridX = 2147483647;
inline const std::vector<int> kSmCounts = {1, 20, 84, 108, 132, 148, 170};
inline const std::vector<std::int64_t> kCounts = {
    0, 1, 2, 7, 64, 1000, 65536, 1000003, std::int64_t{1} << 31};
inline const std::vector<std::int64_t> kWidths = {0, 1, 2, 8, 31, 33, 1000, 2880, 4096, 7168, 16384, 1 << 20};

/// An address with exactly the given alignment; never read.
inline void* address(std::uintptr_t alignment) {
  return reinterpret_cast<void*>((std::uintptr_t{1} << 40) + alignment);
}

}  // namespace moecore::test
