#pragma once
// TensorView: a non-owning, strided view of memory on one device. The only tensor type of the library.

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "moecore/dtype.h"

namespace [[gnu::visibility("default")]] moecore {

enum class DeviceType : std::uint8_t { kCPU, kCUDA };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;
  bool operator==(const Device&) const = default;
};

/// "cpu" or "cuda:1".
std::string to_string(Device device);

struct TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};  // in elements
  Device device{};
  bool read_only = false;

  /// A dense row-major view. The const overload marks the view read-only, so that no op writes through it.
  static TensorView dense(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                          Device device = {});
  static TensorView dense(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                          Device device = {});

  std::int64_t numel() const;
  bool is_dense() const;

  /// "bf16[16,7168] cuda:0", with strides appended when the view is not dense.
  std::string describe() const;
};

}  // namespace moecore
