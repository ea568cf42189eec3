#pragma once
// Array: values on the host as the tests see them. Every type the ops compute with (and every index that
// occurs) is exact in double, so one representation serves oracles, inputs and outputs.

#include <cstdint>
#include <utility>
#include <vector>

namespace moecore::test {

struct Array {
  std::vector<std::int64_t> shape;
  std::vector<double> values;  // row-major

  Array() = default;
  explicit Array(std::vector<std::int64_t> dims, double fill = 0)
      : shape(std::move(dims)), values(static_cast<std::size_t>(count(shape)), fill) {}
  Array(std::vector<std::int64_t> dims, std::vector<double> v)
      : shape(std::move(dims)), values(std::move(v)) {}

  static std::int64_t count(const std::vector<std::int64_t>& dims) {
    std::int64_t n = 1;
    for (std::int64_t d : dims) n *= d;
    return n;
  }
  std::int64_t size() const { return static_cast<std::int64_t>(values.size()); }

  double& operator[](std::int64_t i) { return values[static_cast<std::size_t>(i)]; }
  double operator[](std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
  double& at(std::int64_t i, std::int64_t j) { return (*this)[i * shape[1] + j]; }
  double at(std::int64_t i, std::int64_t j) const { return (*this)[i * shape[1] + j]; }
  double& at(std::int64_t i, std::int64_t j, std::int64_t k) {
    return (*this)[(i * shape[1] + j) * shape[2] + k];
  }
  double at(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return (*this)[(i * shape[1] + j) * shape[2] + k];
  }
};

/// A value and how far a correct implementation may be from it, before the output is rounded to its type.
struct Bounded {
  Array value, bound;
};

}  // namespace moecore::test
