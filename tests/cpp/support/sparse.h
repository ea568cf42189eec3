#pragma once
// SparseTensor: a tensor of more than 2^31 elements of which a few rows are looked at.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "support/array.h"
#include "support/device_memory.h"
#include "support/oracle.h"

namespace moecore::test {

class SparseTensor {
 public:
  /// Dense rows unless `strides` says otherwise; memory is zero on the CPU and undefined on a GPU.
  SparseTensor(Device device, DType dtype, std::initializer_list<std::int64_t> shape,
               std::vector<std::int64_t> strides = {})
      : view_(TensorView::dense(static_cast<void*>(nullptr), dtype, shape, device)) {
    for (std::size_t i = 0; i < strides.size(); ++i) view_.strides[i] = strides[i];
    std::int64_t last = 0;
    for (int i = 0; i < view_.ndim; ++i) last += (view_.shape[i] - 1) * view_.strides[i];
    memory_.emplace(device, static_cast<std::size_t>(last + 1) * element(), DeviceMemory::Kind::kSparse);
    view_.data = memory_->data();
  }

  operator TensorView() const { return view_; }

  /// `values.size()` elements from element `offset` on.
  void set(std::int64_t offset, const std::vector<double>& values) {
    std::vector<std::byte> bytes(values.size() * element());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint64_t bits = oracle::encode(view_.dtype, values[i]);
      std::memcpy(bytes.data() + i * element(), &bits, element());
    }
    memory_->write(static_cast<std::size_t>(offset) * element(), bytes.data(), bytes.size());
  }

  std::vector<double> get(std::int64_t offset, std::int64_t count) const {
    std::vector<std::byte> bytes(static_cast<std::size_t>(count) * element());
    memory_->read(static_cast<std::size_t>(offset) * element(), bytes.data(), bytes.size());
    std::vector<double> values(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, bytes.data() + i * element(), element());
      values[i] = oracle::decode(view_.dtype, bits);
    }
    return values;
  }

 private:
  std::size_t element() const { return static_cast<std::size_t>(bit_width(view_.dtype)) / 8; }

  TensorView view_;
  std::optional<DeviceMemory> memory_;
};

}  // namespace moecore::test
