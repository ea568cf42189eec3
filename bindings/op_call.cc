#include "op_call.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace moecore::python {
namespace {

std::atomic<int> num_threads{0};
PyObject* log_sink = nullptr;  // callable(op, reasons) or null; guarded by the interpreter lock
// ExecContext::policy of every call; guarded by the interpreter lock.
std::string policy;
// What this thread's explain() collects.
thread_local std::string* explained = nullptr;

// CPU workspace of one thread, kept between calls so that a layer does not fault in fresh pages every time.
class Scratch {
 public:
  ~Scratch() { release(); }

  std::span<std::byte> get(std::size_t bytes) {
    if (bytes > capacity_) {
      release();
      const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
      if (!data_) return {};  // the op's own check names what is missing
      capacity_ = rounded;
      madvise(data_, rounded, MADV_HUGEPAGE);
    }
    return {data_, bytes};
  }

  void release() {
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
  }

 private:
  static constexpr std::size_t kAlignment = std::size_t{2} << 20;  // one huge page
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
};
thread_local Scratch scratch;

void* stream_of(const char* op, StreamArg stream, const TensorArg& first, Device device) {
  if (stream.object.is_none()) {
    if (first.api) {
      void* current = nullptr;
      if (first.api->current_work_stream(dlpack::kCuda, device.index, &current) != 0)
        throw nb::python_error();
      return current;
    }
    stream.object = nb::handle();
  }
  nb::object value;
  if (!stream.object.is_valid()) {
    value = nb::module_::import_("moecore._frameworks").attr("current_stream")(first.source);
  } else if (nb::hasattr(stream.object, "__cuda_stream__")) {
    value = stream.object.attr("__cuda_stream__")()[1];
  } else {
    value = nb::borrow(stream.object);
  }
  std::uintptr_t pointer = 0;
  if (!nb::try_cast(value, pointer))
    throw InvalidType(std::string(op) + ": stream is " + nb::str(nb::repr(value)).c_str() +
                      ", expected None, an int pointer, or an object with __cuda_stream__");
  return reinterpret_cast<void*>(pointer);
}

}  // namespace

OpCall::OpCall(const char* op, const TensorArg& first, StreamArg stream)
    : op_(op), explaining_(explained != nullptr) {
  ctx_.device = first.view.device;
  ctx_.num_threads = num_threads.load(std::memory_order_relaxed);
  if (!policy.empty()) {
    policy_ = policy;
    ctx_.policy = policy_;
  }
  if (ctx_.device.type == DeviceType::kCUDA) ctx_.stream = stream_of(op, stream, first, ctx_.device);
}

const TensorView& OpCall::in(const char* argument, const TensorArg& arg) const {
  arg.check(op_, argument);
  return arg.view;
}

std::optional<TensorView> OpCall::in(const char* argument, const std::optional<TensorArg>& arg) const {
  if (!arg) return std::nullopt;
  return in(argument, *arg);
}

void OpCall::workspace(const std::optional<TensorArg>& arg, std::size_t bytes) {
  if (!arg) {
    if (ctx_.device.type == DeviceType::kCPU) ctx_.workspace = scratch.get(bytes);
    return;
  }
  const TensorView& view = in("workspace", *arg);
  auto refuse = [&](const char* expected) {
    throw InvalidArgument(std::string(op_) + ": workspace is " + view.describe() + ", expected " + expected);
  };
  if (view.device != ctx_.device) refuse(("a tensor on " + to_string(ctx_.device)).c_str());
  if (!view.is_dense()) refuse("a dense tensor");
  if (view.read_only) refuse("a writable tensor");
  const std::size_t size = static_cast<std::size_t>(view.numel()) * bit_width(view.dtype) / 8;
  const std::size_t skip = -reinterpret_cast<std::uintptr_t>(view.data) % kWorkspaceAlignment;
  if (size >= skip) ctx_.workspace = {static_cast<std::byte*>(view.data) + skip, size - skip};
}

bool OpCall::logging() {
  return log_sink != nullptr;
}

void OpCall::emit(const std::string& reasons) const {
  if (explaining_) {
    explained->append(reasons);
    if (!explained->empty() && explained->back() != '\n') explained->push_back('\n');
  }
  if (log_sink) nb::borrow<nb::callable>(log_sink)(op_, reasons);
}

void bind_call_settings(nb::module_& m) {
  m.def("explain_begin", [] { delete std::exchange(explained, new std::string); });
  m.def("explain_end", [] {
    std::string text = explained ? *explained : std::string();
    delete std::exchange(explained, nullptr);
    return text;
  });
  m.def(
      "set_log_sink",
      [](nb::object sink) {
        Py_XDECREF(std::exchange(log_sink, sink.is_none() ? nullptr : sink.release().ptr()));
      },
      nb::arg("sink").none());
  m.def(
      "set_num_threads",
      [](int count) {
        if (count < 0)
          throw InvalidArgument("set_num_threads: num_threads is " + std::to_string(count) +
                                ", expected 0 (the default) or a positive number");
        num_threads = count;
      },
      nb::arg("num_threads"),
      "CPU threads that ops use; 0 means MOECORE_NUM_THREADS, else every available CPU.");
  m.def("get_num_threads", [] { return num_threads.load(); });
  m.def(
      "set_policy", [](std::string_view text) { policy = text; }, nb::arg("policy"),
      "Replaces fields of CUDA launch policies in every call that follows: \"finalize.slots=4\"; \"\" ends "
      "it.");
  m.def(
      "release_scratch", [] { scratch.release(); },
      "Frees the CPU workspace that this thread keeps between calls.");
}

}  // namespace moecore::python
