#pragma once
// Tensor: memory of the device under test, poisoned and surrounded by canaries, with a view for the op.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "moecore/tensor.h"
#include "support/array.h"
#include "support/device_memory.h"

namespace moecore::test {

/// How a tensor lies in memory.
struct Place {
  std::string name = "dense";
  std::int64_t row_padding = 0;  // elements between rows (and between experts)
  std::size_t byte_offset = 0;   // of the base pointer from a 256-byte boundary
};

class Tensor {
 public:
  /// Elements are poisoned: floats are NaN (all bits set), integers 0xA5A5...
  Tensor(Device device, DType dtype, std::vector<std::int64_t> shape, const Place& place = {});
  /// With values, which must be exact in `dtype`.
  Tensor(Device device, DType dtype, const Array& values, const Place& place = {});

  TensorView view() const { return view_; }
  TensorView read_only() const;
  /// The rows of a matrix from the last to the first, as NumPy's [::-1] views them.
  TensorView descending() const;
  operator TensorView() const { return view_; }

  void set(const Array& values);
  Array get() const;

  /// The elements' bytes row by row, without padding.
  void set_bytes(const std::vector<std::byte>& bytes);
  std::vector<std::byte> get_bytes() const;

  /// Fills the elements with poison again.
  void poison();
  /// Nothing outside of the elements was written: canaries before and after, padding between rows.
  ::testing::AssertionResult surroundings_intact() const;
  /// Nothing at all was written since the last poison(), set() or set_bytes().
  ::testing::AssertionResult untouched() const;

 private:
  std::int64_t num_rows() const;
  std::size_t row_bytes() const;
  std::size_t row_offset(std::int64_t row) const;
  std::vector<std::byte> download() const;

  TensorView view_;
  std::size_t begin_ = 0;  // of the first element in memory_
  std::unique_ptr<DeviceMemory> memory_;
  std::vector<std::byte> image_;  // what was last written to memory_ from here
};

}  // namespace moecore::test
