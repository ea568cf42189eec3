#pragma once
// Table: the closed set of instances an op promises. The same rows feed validation and its message, dispatch,
// instantiation and tests, so that adding a row is the whole of adding an instance.

#include <array>
#include <string>

#include "moecore/dtype.h"
#include "moecore/error.h"

namespace moecore {

template <auto... Rows>
struct Table {
  static constexpr std::array kRows{Rows...};
};

/// Calls f.template operator()<Row>() for the row of the table that equals `row`.
template <auto... Rows, class Row, class F>
void visit_instance(Table<Rows...>, Row row, F&& f) {
  const bool found = ((row == Rows ? (f.template operator()<Rows>(), true) : false) || ...);
  if (!found) throw InternalError("visit_instance: a row that validation should have refused");
}

using FloatTypes = Table<DType::kF32, DType::kF16, DType::kBF16>;
using IndexTypes = Table<DType::kI32, DType::kI64>;
using F32Type = Table<DType::kF32>;
using I32Type = Table<DType::kI32>;
using MaskTypes = Table<DType::kBool, DType::kU8>;

}  // namespace moecore
