#pragma once
// Argument validation, used by src/ops and nowhere else. Every failure throws with one message format:
//   <op>: <argument> is <actual>, expected <expectation>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "moecore/context.h"
#include "moecore/error.h"
#include "moecore/tensor.h"

namespace moecore {

/// Validates the arguments of one call of one op. Methods throw InvalidType for element types and
/// InvalidArgument for everything else.
class Check {
 public:
  enum class Access { kIn, kOut };

  Check(std::string_view op, const ExecContext& ctx) : op_(op), ctx_(ctx) {}

  /// Device, element type, rank, dense last dimension, non-null data, on CUDA elements at multiples of their
  /// size; for outputs also writable, with rows that do not overlap.
  void tensor(std::string_view arg, const TensorView& t, std::span<const DType> dtypes, int ndim,
              Access access = Access::kIn) const;
  /// The same with any element type.
  void tensor(std::string_view arg, const TensorView& t, int ndim, Access access = Access::kIn) const;

  /// t.shape[axis] == expected, where `meaning` names the expected value: "num_tokens", "num_experts + 1".
  void dim(std::string_view arg, const TensorView& t, int axis, std::int64_t expected,
           std::string_view meaning) const;

  void same_dtype(std::string_view arg, const TensorView& t, std::string_view other_arg,
                  const TensorView& other) const;

  /// An output that shares no memory with an input whose rows are read in another order than `out` is
  /// written.
  void disjoint(std::string_view arg, const TensorView& out, std::string_view other_arg,
                const TensorView& other) const;

  /// Whether contents may be looked at: on the CPU, where something is to run.
  bool reads() const { return ctx_.device.type == DeviceType::kCPU && !ctx_.explain; }

  /// ctx.workspace is on hand, aligned and long enough.
  void workspace(std::size_t bytes) const;

  /// Any other condition: throws InvalidArgument "<op>: <arg> is <actual>, expected <expected>" unless `ok`.
  void that(bool ok, std::string_view arg, std::int64_t actual, std::string_view expected) const {
    if (!ok) fail(arg, std::to_string(actual), expected);
  }
  [[noreturn]] void fail(std::string_view arg, std::string_view actual, std::string_view expected) const;
  [[noreturn]] void fail_type(std::string_view arg, std::string_view actual, std::string_view expected) const;

 private:
  std::string_view op_;
  const ExecContext& ctx_;
};

}  // namespace moecore
