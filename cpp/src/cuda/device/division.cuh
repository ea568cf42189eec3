#pragma once
// Division by a number that is known when the kernel is launched: a multiplication and a shift.

#include <cstdint>

namespace moecore::cuda::dev {

/// n / divisor for 0 <= n < 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(unsigned divisor) {
    while ((std::uint64_t{1} << shift_) < divisor) ++shift_;
    magic_ = static_cast<unsigned>((((std::uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }

  __device__ __forceinline__ unsigned divide(unsigned n) const { return (__umulhi(n, magic_) + n) >> shift_; }

 private:
  unsigned magic_ = 1;
  unsigned shift_ = 0;
};

}  // namespace moecore::cuda::dev
