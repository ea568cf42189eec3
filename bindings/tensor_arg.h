#pragma once
// TensorArg: a tensor argument of any framework, seen as a moecore::TensorView for the duration of one call.
//
// Three ways in, decided once per Python type and cached:
//   exchange API  the type has `__dlpack_c_exchange_api__` (torch): a C call, about 80 ns, no Python object
//   made protocol      `__dlpack__` (NumPy, CuPy, JAX, ...), asked for no stream synchronisation; ml_dtypes
//   arrays, which
//                 NumPy cannot export, are viewed as unsigned integers first
//   Retagged      the result of moecore.view_as(): bytes of another tensor under a moecore dtype
//
// Conversion never fails on its own: what is wrong is kept and thrown by in() of OpCall, which knows the op
// and the argument.

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <utility>

#include "dlpack_abi.h"
#include "moecore/error.h"
#include "moecore/tensor.h"

namespace moecore::python {

namespace nb = nanobind;

struct TensorArg {
  TensorView view;
  const dlpack::ExchangeApi* api = nullptr;
  nb::handle source;  // borrowed: the caller's object
  nb::object owner;   // keeps an exported capsule alive

  /// Why this is no argument: "<actual>, expected <expectation>", and whether that is a matter of type.
  struct Problem {
    bool is_type;
    std::string text;
  };
  std::unique_ptr<Problem> problem;

  void load(nb::handle object);
  void refuse_type(std::string text) { problem.reset(new Problem{true, std::move(text)}); }
  void refuse_value(std::string text) { problem.reset(new Problem{false, std::move(text)}); }
  /// Throws InvalidType or InvalidArgument "<op>: <argument> is <problem>" when there is one.
  void check(const char* op, const char* argument) const {
    if (problem) [[unlikely]]
      fail(op, argument);
  }

 private:
  [[noreturn]] void fail(const char* op, const char* argument) const;
};

/// moecore.view_as(): the memory of `base` under another element type.
struct Retagged {
  nb::object base;
  DType dtype;
};

/// Declares Retagged to Python.
void bind_retagged(nb::module_& m);

}  // namespace moecore::python

namespace nanobind::detail {

template <>
struct type_caster<moecore::python::TensorArg> {
  NB_TYPE_CASTER(moecore::python::TensorArg, const_name("moecore.typing.DLPackTensor"))

  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    value.load(src);
    return true;
  }
};

}  // namespace nanobind::detail
