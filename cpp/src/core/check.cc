#include "core/check.h"

namespace moecore {
namespace {

std::string list(std::span<const DType> dtypes) {
  std::string text;
  for (DType d : dtypes) {
    if (!text.empty()) text += "|";
    text += name(d);
  }
  return text;
}

// Whether two elements of an output could share an address. Every writable view the ops accept has
// non-negative, descending strides, so comparing neighbours is enough.
bool overlaps_itself(const TensorView& t) {
  std::int64_t extent = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] < extent) return true;
    if (t.shape[i] > 1) extent = t.strides[i] * (t.shape[i] - 1) + extent;
  }
  return false;
}

// The bytes of a view that is dense along its last dimension, [first, last), and of one row.
struct Extent {
  std::intptr_t first, last, row_bytes;

  explicit Extent(const TensorView& t) {
    auto bytes = [&](std::int64_t elements) { return (elements * bit_width(t.dtype) + 7) / 8; };
    row_bytes = bytes(t.shape[t.ndim - 1]);
    first = reinterpret_cast<std::intptr_t>(t.data);
    last = first + row_bytes;
    for (int i = 0; i < t.ndim - 1; ++i) {
      const std::int64_t span = bytes(t.strides[i] * (t.shape[i] - 1));
      (span < 0 ? first : last) += span;
    }
  }
};

// Whether two matrices share bytes. Of the same pitch, they can be columns of one buffer or take turns in it;
// of different pitches they are taken to share them where their ranges meet.
bool share_memory(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const Extent x(a), y(b);
  if (x.last <= y.first || y.last <= x.first) return false;
  const std::int64_t pitch = a.strides[0] * bit_width(a.dtype) / 8;
  if (pitch <= 0 || pitch != b.strides[0] * bit_width(b.dtype) / 8) return true;
  const std::int64_t apart = ((y.first - x.first) % pitch + pitch) % pitch;
  return apart < x.row_bytes || apart + y.row_bytes > pitch;
}

std::string message(std::string_view op, std::string_view arg, std::string_view actual,
                    std::string_view expected) {
  std::string text(op);
  text.append(": ").append(arg).append(" is ").append(actual).append(", expected ").append(expected);
  return text;
}

}  // namespace

void Check::fail(std::string_view arg, std::string_view actual, std::string_view expected) const {
  throw InvalidArgument(message(op_, arg, actual, expected));
}

void Check::fail_type(std::string_view arg, std::string_view actual, std::string_view expected) const {
  throw InvalidType(message(op_, arg, actual, expected));
}

void Check::tensor(std::string_view arg, const TensorView& t, int ndim, Access access) const {
  if (t.device != ctx_.device) fail(arg, t.describe(), "a tensor on " + to_string(ctx_.device));
  if (t.ndim != ndim) fail(arg, t.describe(), std::to_string(ndim) + " dimensions");
  if (t.numel() > 0 && t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1)
    fail(arg, t.describe(), "a dense last dimension");
  if (t.numel() > 0 && t.data == nullptr)
    fail(arg, t.describe() + " without data", "real memory (a fake or meta tensor cannot be read)");
  if (access == Access::kOut) {
    if (t.read_only) fail(arg, t.describe() + " (read-only)", "a writable tensor");
    if (t.numel() > 0 && overlaps_itself(t)) fail(arg, t.describe(), "an output whose rows do not overlap");
  }
}

void Check::tensor(std::string_view arg, const TensorView& t, std::span<const DType> dtypes, int ndim,
                   Access access) const {
  bool known = false;
  for (DType d : dtypes) known = known || d == t.dtype;
  if (!known) fail_type(arg, t.describe(), "dtype " + list(dtypes));
  tensor(arg, t, ndim, access);
  // A GPU faults on an element that straddles its alignment, and the fault outlives the call.
  const auto element = static_cast<std::uintptr_t>(bit_width(t.dtype) + 7) / 8;
  if (ctx_.device.type == DeviceType::kCUDA && reinterpret_cast<std::uintptr_t>(t.data) % element != 0)
    fail(arg, t.describe() + " at a misaligned address",
         "an address that is a multiple of " + std::to_string(element));
}

void Check::dim(std::string_view arg, const TensorView& t, int axis, std::int64_t expected,
                std::string_view meaning) const {
  if (t.shape[axis] == expected) return;
  std::string text = "shape[" + std::to_string(axis) + "] = ";
  text.append(meaning).append(" = ").append(std::to_string(expected));
  fail(arg, t.describe(), text);
}

void Check::same_dtype(std::string_view arg, const TensorView& t, std::string_view other_arg,
                       const TensorView& other) const {
  if (t.dtype == other.dtype) return;
  std::string text = "the dtype of ";
  text.append(other_arg).append(", ").append(name(other.dtype));
  fail_type(arg, t.describe(), text);
}

void Check::disjoint(std::string_view arg, const TensorView& out, std::string_view other_arg,
                     const TensorView& other) const {
  if (share_memory(out, other))
    fail(arg, out.describe() + " in the memory of " + std::string(other_arg), "memory of its own");
}

void Check::workspace(std::size_t bytes) const {
  if (bytes == 0) return;
  if (ctx_.workspace.size() < bytes)
    fail("workspace", std::to_string(ctx_.workspace.size()) + " bytes",
         "at least " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<std::uintptr_t>(ctx_.workspace.data()) % kWorkspaceAlignment != 0)
    fail("workspace", "misaligned",
         "an address that is a multiple of " + std::to_string(kWorkspaceAlignment));
}

}  // namespace moecore
