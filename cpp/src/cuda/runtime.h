#pragma once
// The host side of every CUDA op: device facts, errors, launches and the record of what was chosen.
//
// An op reads
//   const DeviceInfo& device = open_device("finalize", ctx);      // exists, and this build has code for it
//   const FinalizePolicy policy = select_finalize_policy(device.num_sms, ...);
//   if (explained(ctx, "finalize", [&] { return describe(policy); })) return;
//   DeviceGuard guard(device);
//   launch("finalize", device, {.grid = ..., .block = ..., .stream = stream(ctx)}, kernel, args);
// Nothing here synchronises or allocates device memory, and the calling thread's current device is restored.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "moecore/context.h"

namespace moecore::cuda {

/// Facts of one device, read once per process.
struct DeviceInfo {
  int index = 0;
  int compute_capability = 0;  // 90 for 9.0
  int num_sms = 0;
  int max_threads_per_sm = 0;
  std::size_t l2_bytes = 0;
  std::size_t smem_per_block = 0;  // with opt-in
  std::size_t smem_per_sm = 0;
  int max_cluster = 1;  // the most blocks of a cluster, of one block an SM; 1: there are no clusters
};

/// The device of the call. Throws BackendError when it does not exist or the build holds no code for it.
const DeviceInfo& open_device(const char* op, const ExecContext& ctx);

/// Throws BackendError "<op>: <what>: <CUDA's text>".
void check(cudaError_t status, const char* op, const char* what);

inline cudaStream_t stream(const ExecContext& ctx) {
  return static_cast<cudaStream_t>(ctx.stream);
}

/// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(const DeviceInfo& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

/// Blocks that a grid may have in y.
inline constexpr std::int64_t kMaxGridY = 65535;

struct LaunchConfig {
  dim3 grid{1};
  dim3 block{1};
  std::size_t smem_bytes = 0;  // dynamic shared memory; a kernel's limit is raised where needed
  cudaStream_t stream = nullptr;
  /// Programmatic dependent launch: the kernel may start while its predecessor drains, so it must call
  /// dev::wait_for_predecessor() before it touches global memory. Ignored below compute capability 9.0.
  bool dependent = false;
  dim3 cluster{1};
  /// Start only when all blocks fit the device at once, for kernels whose blocks wait for each other.
  bool cooperative = false;
};

/// The untyped half of launch().
void launch_kernel(const char* op, const DeviceInfo& device, const LaunchConfig& config, const void* kernel,
                   void** args);

/// Launches on the current device, which must be `device`. Throws BackendError naming the op.
template <class... Params, class... Args>
void launch(const char* op, const DeviceInfo& device, const LaunchConfig& config, void (*kernel)(Params...),
            Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args));
  [&](Params... params) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
    launch_kernel(op, device, config, reinterpret_cast<const void*>(kernel), pointers);
  }(std::forward<Args>(args)...);
}

/// Blocks of `kernel` that fit one SM of the current device, which must be `device`.
int blocks_per_sm(const char* op, const DeviceInfo& device, const void* kernel, int threads,
                  std::size_t smem_bytes);

/// MOECORE_LOG: 0 unset, 1 "info" (each distinct choice once), 2 "debug" (every call).
int log_level();
void log_choice(const char* op, const std::string& choice);

/// For the point where an op knows its kernel: with ctx.explain set, appends "<op>: <describe()>" and returns
/// true (the op returns without running); else logs the choice when MOECORE_LOG asks for it.
template <class Describe>
bool explained(const ExecContext& ctx, const char* op, Describe&& describe) {
  if (ctx.explain) {
    ctx.explain->append(op).append(": ").append(describe()).append("\n");
    return true;
  }
  if (log_level() > 0) [[unlikely]]
    log_choice(op, describe());
  return false;
}

}  // namespace moecore::cuda
