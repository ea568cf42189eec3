#pragma once
// OpCall: what every op's binding does around the C++ call: names bad arguments, finds the stream, lends
// workspace, releases the interpreter lock, and lets explain() and logging ask which kernel would run.

#include <cstddef>
#include <optional>
#include <string>

#include "moecore/context.h"
#include "tensor_arg.h"

namespace moecore::python {

/// `stream=`: None (the framework's current stream), an int pointer, or an object with `__cuda_stream__`.
struct StreamArg {
  nb::handle object;
};

class OpCall {
 public:
  /// `first` decides the device of the call; every other tensor must live there too.
  OpCall(const char* op, const TensorArg& first, StreamArg stream);

  /// The view of an argument, or TypeError / ValueError that names op and argument.
  const TensorView& in(const char* argument, const TensorArg& arg) const;
  std::optional<TensorView> in(const char* argument, const std::optional<TensorArg>& arg) const;

  /// Caller's workspace, of any alignment, or for CPU calls this thread's own scratch memory.
  void workspace(const std::optional<TensorArg>& arg, std::size_t bytes);

  /// f(const ExecContext&), without the interpreter lock.
  template <class F>
  void run(F&& f) {
    if (explaining_ || logging()) report(f);
    if (explaining_) return;
    nb::gil_scoped_release unlocked;
    f(ctx_);
  }

  const ExecContext& context() const { return ctx_; }

 private:
  template <class F>
  void report(F& f) {
    std::string reasons;
    ctx_.explain = &reasons;
    f(ctx_);
    ctx_.explain = nullptr;
    emit(reasons);
  }
  static bool logging();
  void emit(const std::string& reasons) const;

  const char* op_;
  ExecContext ctx_;
  std::string policy_;  // what ctx_.policy refers to
  bool explaining_;
};

/// explain_begin(), explain_end(), set_log_sink(), set_num_threads(), get_num_threads(), set_policy(),
/// release_scratch().
void bind_call_settings(nb::module_& m);

}  // namespace moecore::python

namespace nanobind::detail {

template <>
struct type_caster<moecore::python::StreamArg> {
  NB_TYPE_CASTER(moecore::python::StreamArg, const_name("int | moecore.typing.CudaStream | None"))

  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    value.object = src;
    return true;
  }
};

}  // namespace nanobind::detail
