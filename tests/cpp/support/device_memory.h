#pragma once
// Memory of the device under test. The only part of the tests that knows CUDA.

#include <cstddef>
#include <functional>

#include "moecore/tensor.h"

namespace moecore::test {

/// Uninitialised device memory, aligned to 256 bytes. Sparse memory takes address space alone until it is
/// written (CPU), so tensors of many GiB cost what is touched of them.
class DeviceMemory {
 public:
  enum class Kind { kNormal, kSparse };

  DeviceMemory(Device device, std::size_t bytes, Kind kind = Kind::kNormal);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }

  /// Copies between the host and [offset, offset + bytes). Waits for all work of the device first.
  void write(std::size_t offset, const void* from, std::size_t bytes);
  void read(std::size_t offset, void* to, std::size_t bytes) const;

 private:
  Device device_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  Kind kind_;
};

/// A CUDA stream that does not wait for the default stream; nullptr on the CPU.
class Stream {
 public:
  explicit Stream(Device device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void* get() const { return stream_; }

 private:
  void* stream_ = nullptr;
};

/// A CUDA graph of the work that `work` starts on `stream`, captured without running it.
class Graph {
 public:
  Graph(const Stream& stream, const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch();

 private:
  void* stream_ = nullptr;
  void* executable_ = nullptr;
};

/// Waits for everything that was started on the device; throws what went wrong there.
void synchronize(Device device);

}  // namespace moecore::test
