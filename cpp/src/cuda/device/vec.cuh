#pragma once
// Vector loads and stores with cache hints. "Streaming" data is touched once: it should not displace what is
// read again.

#include <cstdint>

namespace moecore::cuda::dev {

/// An unsigned vector of B bytes: the unit in which rows are moved.
template <int B>
struct Bytes;
template <>
struct Bytes<16> {
  using type = uint4;
};
template <>
struct Bytes<8> {
  using type = uint2;
};
template <>
struct Bytes<4> {
  using type = unsigned int;
};
template <>
struct Bytes<2> {
  using type = unsigned short;
};
template <>
struct Bytes<1> {
  using type = unsigned char;
};
template <int B>
using bytes_t = typename Bytes<B>::type;

/// Read-only for the kernel's lifetime, not kept in L1.
template <class V>
__device__ __forceinline__ V load_streaming(const V* p) {
  return __ldcs(p);
}

/// Read-only for the kernel's lifetime.
template <class V>
__device__ __forceinline__ V load_readonly(const V* p) {
  return __ldg(p);
}

/// Written once, evicted first.
template <class V>
__device__ __forceinline__ void store_streaming(V* p, const V& value) {
  __stcs(p, value);
}

}  // namespace moecore::cuda::dev
