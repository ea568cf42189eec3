#pragma once
// ExecContext: where an op runs and what it may use. Ops allocate nothing and synchronise nothing.

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "moecore/tensor.h"

namespace [[gnu::visibility("default")]] moecore {

struct ExecContext {
  /// Every tensor of the call must live here.
  Device device{};
  /// CUDA: a cudaStream_t; nullptr is the legacy default stream. CPU: unused, ops return when they are done.
  void* stream = nullptr;
  /// Device memory that the op may overwrite, at least `<op>_workspace_bytes(...)` long, 256-byte aligned.
  std::span<std::byte> workspace{};
  /// CPU: threads to use; 0 means MOECORE_NUM_THREADS, else every CPU this process may run on.
  int num_threads = 0;
  /// Set: the op validates its arguments, appends which kernel and policy it would take and why, and returns
  /// without running anything.
  std::string* explain = nullptr;
  /// For tuning: replaces fields of the op's CUDA launch policy, as in "threads=128 unroll=2". A name or
  /// value that is not on offer throws InvalidArgument with those that are. "finalize.slots=4" is for that op
  /// alone, wherever it runs inside another one. MOECORE_TUNING names a file that does the same by size.
  std::string_view policy{};
};

/// Alignment that ops expect of `ExecContext::workspace`.
inline constexpr std::size_t kWorkspaceAlignment = 256;

}  // namespace moecore
