#pragma once
// What the op tests share: the devices to test on, a context for a call, random values.

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "moecore/context.h"
#include "moecore/dtype.h"
#include "support/array.h"
#include "support/device_memory.h"
#include "support/tensor.h"

namespace moecore::test {

/// A suite that runs on every device. Its CUDA instances skip, with the reason, where no GPU is usable.
class OnDevice : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override;
  Device device() const { return GetParam(); }
};

/// The same for every device and element type.
struct DeviceDType {
  Device device;
  DType dtype;
};
std::ostream& operator<<(std::ostream& out, const DeviceDType& param);
class OnDeviceDType : public ::testing::TestWithParam<DeviceDType> {
 protected:
  void SetUp() override;
  Device device() const { return GetParam().device; }
  DType dtype() const { return GetParam().dtype; }
};

std::vector<Device> devices();
std::vector<DeviceDType> devices_times(const std::vector<DType>& dtypes);
std::string device_name(const ::testing::TestParamInfo<Device>& info);
std::string device_dtype_name(const ::testing::TestParamInfo<DeviceDType>& info);

const std::vector<DType>& float_types();

/// The context of one call: a stream of its own and a workspace full of poison, in which nothing may be
/// assumed.
class Call {
 public:
  explicit Call(Device device, std::size_t workspace_bytes = 0, int num_threads = 0);
  operator const ExecContext&() const { return context_; }
  ExecContext& context() { return context_; }
  /// The workspace's surroundings were not written.
  ::testing::AssertionResult workspace_intact() const { return workspace_.surroundings_intact(); }

 private:
  Stream stream_;
  Tensor workspace_;
  ExecContext context_;
};

/// A small, seeded generator with the same values everywhere (the standard distributions have not).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  std::uint64_t bits();
  /// Uniform in [0, n).
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n));
  }
  /// Uniform in [low, high).
  double uniform(double low, double high);
  /// Values of `dtype`, uniform in [low, high) before rounding.
  Array floats(std::vector<std::int64_t> shape, DType dtype, double low = -2, double high = 2);
  /// Integers in [low, high].
  Array integers(std::vector<std::int64_t> shape, std::int64_t low, std::int64_t high);
  std::vector<std::byte> bytes(std::size_t n);

 private:
  std::uint64_t state_;
};

}  // namespace moecore::test
