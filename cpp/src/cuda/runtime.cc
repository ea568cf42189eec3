#include "cuda/runtime.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>

#include "build_config.h"
#include "cuda/probe.h"
#include "moecore/error.h"
#include "ops/info.h"

namespace moecore::cuda {
namespace {

constexpr int kMaxDevices = 64;

int attribute(const char* op, cudaDeviceAttr attr, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attr, index), op, "reading a device attribute");
  return value;
}

/// Blocks of the largest cluster that the current device has a place for: GPCs with fewer SMs and slices of a
/// GPU have less than the portable 8, most Hoppers room for 16.
int largest_cluster(const void* kernel) {
  constexpr int kPortable = 8, kMost = 16;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMost);
  config.blockDim = dim3(1024);
  int blocks = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
      cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return kPortable;
  }
  return std::clamp(blocks, 1, kMost);
}

std::unique_ptr<DeviceInfo> read_device(const char* op, int index) {
  std::string why;
  const int count = device_count(&why);
  if (index < 0 || index >= count) {
    std::string text(op);
    text.append(": there is no device cuda:").append(std::to_string(index)).append(", ");
    text.append(count == 0 ? why : "the machine has " + std::to_string(count));
    throw BackendError(text);
  }
  auto device = std::make_unique<DeviceInfo>();
  device->index = index;
  device->compute_capability = 10 * attribute(op, cudaDevAttrComputeCapabilityMajor, index) +
                               attribute(op, cudaDevAttrComputeCapabilityMinor, index);
  device->num_sms = attribute(op, cudaDevAttrMultiProcessorCount, index);
  device->max_threads_per_sm = attribute(op, cudaDevAttrMaxThreadsPerMultiProcessor, index);
  device->l2_bytes = attribute(op, cudaDevAttrL2CacheSize, index);
  device->smem_per_block = attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device->smem_per_sm = attribute(op, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  const DeviceGuard guard(*device);
  cudaFuncAttributes probe;
  const cudaError_t status = cudaFuncGetAttributes(&probe, probe_kernel());
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw BackendError(std::string(op) + ": cuda:" + std::to_string(index) + " has compute capability " +
                       std::to_string(device->compute_capability / 10) + "." +
                       std::to_string(device->compute_capability % 10) +
                       ", this build was compiled for " MOECORE_CUDA_ARCHS " (" + cudaGetErrorString(status) +
                       ")");
  }
  if (device->compute_capability >= 90) device->max_cluster = largest_cluster(probe_kernel());
  return device;
}

}  // namespace

void check(cudaError_t status, const char* op, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error is kept as the thread's last error: the caller must not meet it again
  throw BackendError(std::string(op) + ": " + what + ": " + cudaGetErrorName(status) + ", " +
                     cudaGetErrorString(status));
}

const DeviceInfo& open_device(const char* op, const ExecContext& ctx) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<std::unique_ptr<DeviceInfo>, kMaxDevices> devices;
  const int index = ctx.device.index;
  if (index < 0 || index >= kMaxDevices) return *read_device(op, index);  // throws
  std::call_once(once[index], [&] { devices[index] = read_device(op, index); });
  return *devices[index];
}

DeviceGuard::DeviceGuard(const DeviceInfo& device) {
  int current = 0;
  check(cudaGetDevice(&current), "moecore", "reading the current device");
  if (current == device.index) return;
  check(cudaSetDevice(device.index), "moecore", "selecting a device");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

namespace {

/// The kernels whose limit of some kind has been raised, each once on a device.
class Raised {
 public:
  template <class Raise>
  void once(const DeviceInfo& device, const void* kernel, Raise&& raise) {
    const std::lock_guard lock(mutex_);
    if (kernels_.contains({device.index, kernel})) return;
    raise();
    kernels_.emplace(device.index, kernel);
  }

 private:
  std::mutex mutex_;
  std::set<std::pair<int, const void*>> kernels_;
};

/// Lets a kernel have `bytes` of dynamic shared memory. Its limit goes to all that the device gives a block
/// and stays there: it is one for all threads, and lowering it would take it from another one's launch.
void admit_smem(const char* op, const DeviceInfo& device, const void* kernel, std::size_t bytes) {
  // Without opt-in a kernel gets 48 KiB, of which its static arrays take their part.
  constexpr std::size_t kSafeSmem = 32 * 1024;
  static Raised raised;
  if (bytes <= kSafeSmem) return;
  raised.once(device, kernel, [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), op, "reading the attributes of the kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device.smem_per_block - attributes.sharedSizeBytes)),
          op, "raising the shared memory limit");
  });
}

/// Lets a kernel have clusters of `blocks`.
void admit_cluster(const char* op, const DeviceInfo& device, const void* kernel, unsigned blocks) {
  constexpr unsigned kPortable = 8;
  static Raised raised;
  if (blocks <= kPortable) return;
  raised.once(device, kernel, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), op,
          "allowing clusters beyond the portable size");
  });
}

}  // namespace

void launch_kernel(const char* op, const DeviceInfo& device, const LaunchConfig& config, const void* kernel,
                   void** args) {
  admit_smem(op, device, kernel, config.smem_bytes);
  cudaLaunchAttribute attributes[3];
  unsigned num_attributes = 0;
  if (config.dependent && device.compute_capability >= 90) {
    attributes[num_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  const unsigned cluster = config.cluster.x * config.cluster.y * config.cluster.z;
  admit_cluster(op, device, kernel, cluster);
  if (cluster > 1) {
    attributes[num_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[num_attributes].val.clusterDim.x = config.cluster.x;
    attributes[num_attributes].val.clusterDim.y = config.cluster.y;
    attributes[num_attributes++].val.clusterDim.z = config.cluster.z;
  }
  if (config.cooperative) {
    attributes[num_attributes].id = cudaLaunchAttributeCooperative;
    attributes[num_attributes++].val.cooperative = 1;
  }
  cudaLaunchConfig_t raw{};
  raw.gridDim = config.grid;
  raw.blockDim = config.block;
  raw.dynamicSmemBytes = config.smem_bytes;
  raw.stream = config.stream;
  raw.attrs = attributes;
  raw.numAttrs = num_attributes;
  check(cudaLaunchKernelExC(&raw, kernel, args), op, "launching the kernel");
}

int blocks_per_sm(const char* op, const DeviceInfo& device, const void* kernel, int threads,
                  std::size_t smem_bytes) {
  admit_smem(op, device, kernel, smem_bytes);  // a kernel whose limit is not raised fits nowhere
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, smem_bytes), op,
        "reading the occupancy");
  return blocks;
}

int log_level() {
  static const int level = [] {
    const char* text = std::getenv("MOECORE_LOG");
    const std::string_view value = text ? text : "";
    return value == "debug" ? 2 : value == "info" ? 1 : 0;
  }();
  return level;
}

void log_choice(const char* op, const std::string& choice) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::string line = std::string(op) + ": " + choice;
  const std::lock_guard lock(mutex);
  if (seen.insert(line).second || log_level() > 1) std::fprintf(stderr, "moecore: %s\n", line.c_str());
}

int device_count(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  if (why) *why = status == cudaSuccess ? "the machine has no CUDA device" : cudaGetErrorString(status);
  return 0;
}

}  // namespace moecore::cuda
