#pragma once
// The comparators. compare_test.cc proves that they notice what they must.

#include <gtest/gtest.h>

#include "moecore/dtype.h"
#include "support/array.h"

namespace moecore::test {

/// Same shape, and every element the same bits; NaN equals NaN whatever its payload, +0 differs from -0.
::testing::AssertionResult equal(const Array& actual, const Array& expected);

/// Same shape, and every element is the rounding to `dtype` of some value within `bound` of `expected`:
/// RN(expected - bound) <= actual <= RN(expected + bound). So the output's own rounding is held exactly, and
/// a bound of zero asks for the correctly rounded result. NaN needs NaN, infinity the same infinity.
::testing::AssertionResult within(const Array& actual, const Bounded& expected, DType dtype);

}  // namespace moecore::test
