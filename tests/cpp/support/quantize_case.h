// What tests of quantize share: the formats by name, inputs with special values, which rows are quantised and
// where their scales stand, and the bytes that both outputs must hold.

#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "moecore/quantize.h"
#include "support/quantize_oracle.h"
#include "support/tensor.h"

namespace moecore::test {

using Bytes = std::vector<std::byte>;

inline constexpr std::byte kPoison{0xA5};  // of u8 tensors

std::int64_t round_up(std::int64_t a, std::int64_t b);

struct NamedFormat {
  const char* name;
  QuantFormat format;
};

const std::vector<NamedFormat>& formats();

bool is_fp4(const QuantFormat& f);
bool is_swizzled(const QuantFormat& f);
bool is_tensor(const QuantFormat& f);  // one scale for all

/// Values in memory, with their f32 meaning.
struct Values {
  Bytes bytes;
  std::vector<float> floats;
};

Values encoded(DType dtype, const std::vector<double>& values);

/// Values of many magnitudes, with runs of zeros, denormals, infinities, NaNs and overflowing ones.
Values random_values(std::uint64_t seed, DType dtype, std::int64_t rows, std::int64_t cols);

/// Which rows are quantised, and where their scales stand.
struct RowMap {
  std::vector<bool> live;
  std::vector<std::int64_t> base, local, expert;
  std::vector<std::pair<std::int64_t, std::int64_t>> scale_blocks;  // swizzled rows that are defined
  std::int64_t scale_rows = 0;                                      // of the tensor, swizzled

  static RowMap dense(const QuantFormat& f, std::int64_t rows);
  static RowMap experts(const std::vector<std::int64_t>& offsets,
                        const std::vector<std::int64_t>& scale_offsets, std::int64_t rows);
  static RowMap groups(const QuantFormat& f, const std::vector<std::int64_t>& counts,
                       std::int64_t group_rows);

 private:
  void add(bool is_live, std::int64_t b, std::int64_t l, std::int64_t e);
};

/// The two outputs of a call.
struct Outputs {
  Tensor data, scales;

  Outputs(Device device, const QuantFormat& f, std::int64_t rows, std::int64_t padded, const RowMap& map,
          const Place& place = {});
};

Bytes expected_data(const oracle::Quantized& q, const QuantFormat& f, const RowMap& map);
Bytes expected_scales(const oracle::Quantized& q, const QuantFormat& f, const RowMap& map);
::testing::AssertionResult same_bytes(const Bytes& actual, const Bytes& expected);

/// A host array of those integers.
Array integers(const std::vector<std::int64_t>& values);

}  // namespace moecore::test
