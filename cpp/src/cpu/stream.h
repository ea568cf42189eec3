#pragma once
// Stores that go past the caches. A plain store first reads the line it writes into; for an output that no
// cache holds until it is read again, that read is a third of the traffic of a copy.

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moecore::cpu {

/// Whether an output of so many bytes would leave the last cache before anybody reads it.
inline bool outgrows_cache(std::int64_t bytes) {
  static const std::int64_t cache = std::max<std::int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 8 << 20);
  return bytes > cache;
}

/// memcpy past the caches. Call stream_fence() before another thread may read the result.
inline void stream_copy(std::byte* to, const std::byte* from, std::size_t bytes) {
#if defined(__SSE2__)
  const std::size_t head = std::min(bytes, -reinterpret_cast<std::uintptr_t>(to) % 64);
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
    __m128i line[4];
    std::memcpy(line, from, 64);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, line[i]);
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace moecore::cpu
