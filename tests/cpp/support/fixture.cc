#include "support/fixture.h"

#include <algorithm>

#include "moecore/info.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

// Empty when the device is usable.
std::string why_not(Device device) {
  std::string why;
  if (device.type == DeviceType::kCUDA && cuda_device_count(&why) == 0)
    return why.empty() ? "no CUDA device" : why;
  return "";
}

std::string short_name(Device device) {
  return device.type == DeviceType::kCPU ? "cpu" : "cuda";
}

}  // namespace

void OnDevice::SetUp() {
  if (const std::string why = why_not(device()); !why.empty()) GTEST_SKIP() << why;
}

void OnDeviceDType::SetUp() {
  if (const std::string why = why_not(device()); !why.empty()) GTEST_SKIP() << why;
}

std::ostream& operator<<(std::ostream& out, const DeviceDType& param) {
  return out << name(param.dtype) << " on " << to_string(param.device);
}

std::vector<Device> devices() {
  return {{DeviceType::kCPU, 0}, {DeviceType::kCUDA, 0}};
}

std::vector<DeviceDType> devices_times(const std::vector<DType>& dtypes) {
  std::vector<DeviceDType> params;
  for (Device device : devices())
    for (DType dtype : dtypes) params.push_back({device, dtype});
  return params;
}

std::string device_name(const ::testing::TestParamInfo<Device>& info) {
  return short_name(info.param);
}

std::string device_dtype_name(const ::testing::TestParamInfo<DeviceDType>& info) {
  return std::string(name(info.param.dtype)) + "_" + short_name(info.param.device);
}

const std::vector<DType>& float_types() {
  static const std::vector<DType> types = {DType::kF32, DType::kF16, DType::kBF16};
  return types;
}

Call::Call(Device device, std::size_t workspace_bytes, int num_threads)
    : stream_(device), workspace_(device, DType::kE8M0, {static_cast<std::int64_t>(workspace_bytes)}) {
  context_.device = device;
  context_.stream = stream_.get();
  context_.num_threads = num_threads;
  context_.workspace = {static_cast<std::byte*>(workspace_.view().data), workspace_bytes};
}

std::uint64_t Random::bits() {
  state_ += 0x9E3779B97F4A7C15ull;
  std::uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

double Random::uniform(double low, double high) {
  return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53);
}

Array Random::floats(std::vector<std::int64_t> shape, DType dtype, double low, double high) {
  Array a(std::move(shape));
  for (double& v : a.values) v = oracle::round_to(dtype, uniform(low, high));
  return a;
}

Array Random::integers(std::vector<std::int64_t> shape, std::int64_t low, std::int64_t high) {
  Array a(std::move(shape));
  for (double& v : a.values) v = static_cast<double>(low + below(high - low + 1));
  return a;
}

std::vector<std::byte> Random::bytes(std::size_t n) {
  std::vector<std::byte> b(n);
  std::generate(b.begin(), b.end(), [this] { return static_cast<std::byte>(bits() >> 56); });
  return b;
}

}  // namespace moecore::test
