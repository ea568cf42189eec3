#include "support/compare.h"

#include <cmath>
#include <sstream>

#include "support/oracle.h"

namespace moecore::test {
namespace {

std::string text(const std::vector<std::int64_t>& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s.append(i ? "," : "").append(std::to_string(shape[i]));
  return s + "]";
}

std::string position(const Array& a, std::int64_t flat) {
  std::vector<std::int64_t> index(a.shape.size());
  for (std::size_t i = a.shape.size(); i-- > 0; flat /= a.shape[i]) index[i] = flat % a.shape[i];
  return text(index);
}

// Reports the first few elements for which `wrong` holds.
template <class Wrong, class Expectation>
::testing::AssertionResult check(const Array& actual, const Array& expected, Wrong wrong,
                                 Expectation expectation) {
  if (actual.shape != expected.shape || actual.values.size() != expected.values.size())
    return ::testing::AssertionFailure()
           << "shape is " << text(actual.shape) << ", expected " << text(expected.shape);
  std::int64_t bad = 0;
  std::ostringstream report;
  report.precision(9);
  for (std::int64_t i = 0; i < actual.size(); ++i) {
    if (!wrong(i)) continue;
    if (++bad <= 4)
      report << "\n  " << position(actual, i) << " is " << actual[i] << ", expected " << expectation(i);
  }
  if (bad == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << bad << " of " << actual.size() << " elements differ" << report.str();
}

}  // namespace

::testing::AssertionResult equal(const Array& actual, const Array& expected) {
  return check(
      actual, expected,
      [&](std::int64_t i) {
        const double a = actual[i], e = expected[i];
        if (std::isnan(a) || std::isnan(e)) return std::isnan(a) != std::isnan(e);
        return a != e || std::signbit(a) != std::signbit(e);
      },
      [&](std::int64_t i) { return std::to_string(expected[i]); });
}

::testing::AssertionResult within(const Array& actual, const Bounded& expected, DType dtype) {
  const Array &ref = expected.value, &bound = expected.bound;
  if (ref.shape != bound.shape) return ::testing::AssertionFailure() << "the bound has another shape";
  return check(
      actual, ref,
      [&](std::int64_t i) {
        const double a = actual[i], e = ref[i], b = bound[i];
        if (std::isnan(e) || std::isnan(a)) return std::isnan(e) != std::isnan(a);
        if (std::isinf(e)) return a != e;
        if (std::isnan(b)) return true;
        return !(oracle::round_to(dtype, e - b) <= a && a <= oracle::round_to(dtype, e + b));
      },
      [&](std::int64_t i) {
        std::ostringstream s;
        s.precision(9);
        s << ref[i] << " +- " << bound[i] << " rounded to " << name(dtype);
        return s.str();
      });
}

}  // namespace moecore::test
