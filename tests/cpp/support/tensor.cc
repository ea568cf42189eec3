#include "support/tensor.h"

#include <algorithm>
#include <cstring>

#include "support/oracle.h"

namespace moecore::test {
namespace {

// The address sanitizer has red zones of its own, and sees reads in them too.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kCanaryBytes = 0;
#else
constexpr std::size_t kCanaryBytes = 256;
#endif
constexpr std::byte kCanary{0xC3};

std::byte poison_of(DType dtype) {
  switch (dtype) {
    case DType::kI8:
    case DType::kI16:
    case DType::kI32:
    case DType::kI64:
    case DType::kU8:
    case DType::kU16:
    case DType::kU32:
    case DType::kU64:
      return std::byte{0xA5};  // -1 is a value that ops write
    case DType::kBool:
      return std::byte{1};
    default:
      return std::byte{0xFF};
  }
}

}  // namespace

Tensor::Tensor(Device device, DType dtype, std::vector<std::int64_t> shape, const Place& place) {
  view_.dtype = dtype;
  view_.device = device;
  view_.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    view_.shape[i] = shape[static_cast<std::size_t>(i)];
    view_.strides[i] = stride;
    stride = stride * view_.shape[i] + (i == 0 ? 0 : place.row_padding);
  }
  std::size_t bytes = 0;
  if (view_.numel() > 0) {
    std::int64_t last = 0;
    for (int i = 0; i < view_.ndim; ++i) last += (view_.shape[i] - 1) * view_.strides[i];
    bytes = (static_cast<std::size_t>(last + 1) * static_cast<std::size_t>(bit_width(dtype)) + 7) / 8;
  }
  // Elements lie at multiples of their size, also where the place was meant for smaller ones.
  const auto element = static_cast<std::size_t>(bit_width(dtype) + 7) / 8;
  begin_ = kCanaryBytes + (place.byte_offset + element - 1) / element * element;
  memory_ = std::make_unique<DeviceMemory>(device, begin_ + bytes + kCanaryBytes);
  view_.data = memory_->data() + begin_;
  image_.assign(memory_->size(), kCanary);
  poison();
}

Tensor::Tensor(Device device, DType dtype, const Array& values, const Place& place)
    : Tensor(device, dtype, values.shape, place) {
  set(values);
}

TensorView Tensor::read_only() const {
  TensorView v = view_;
  v.read_only = true;
  return v;
}

TensorView Tensor::descending() const {
  TensorView v = read_only();
  v.data = static_cast<std::byte*>(v.data) + (v.shape[0] - 1) * v.strides[0] * bit_width(v.dtype) / 8;
  v.strides[0] = -v.strides[0];
  return v;
}

std::int64_t Tensor::num_rows() const {
  if (view_.numel() == 0) return 0;
  return view_.ndim == 0 ? 1 : view_.numel() / view_.shape[view_.ndim - 1];
}

std::size_t Tensor::row_bytes() const {
  const std::int64_t width = view_.ndim == 0 ? 1 : view_.shape[view_.ndim - 1];
  return (static_cast<std::size_t>(width) * static_cast<std::size_t>(bit_width(view_.dtype)) + 7) / 8;
}

std::size_t Tensor::row_offset(std::int64_t row) const {
  std::int64_t element = 0;
  for (int i = view_.ndim - 2; i >= 0; --i) {
    element += row % view_.shape[i] * view_.strides[i];
    row /= view_.shape[i];
  }
  return begin_ + static_cast<std::size_t>(element) * static_cast<std::size_t>(bit_width(view_.dtype)) / 8;
}

std::vector<std::byte> Tensor::download() const {
  std::vector<std::byte> now(memory_->size());
  memory_->read(0, now.data(), now.size());
  return now;
}

void Tensor::set_bytes(const std::vector<std::byte>& bytes) {
  const std::size_t width = row_bytes();
  if (bytes.size() != width * static_cast<std::size_t>(num_rows())) throw std::logic_error("set_bytes: size");
  for (std::int64_t r = 0; r < num_rows(); ++r)
    std::memcpy(image_.data() + row_offset(r), bytes.data() + static_cast<std::size_t>(r) * width, width);
  memory_->write(0, image_.data(), image_.size());
}

std::vector<std::byte> Tensor::get_bytes() const {
  const std::vector<std::byte> now = download();
  const std::size_t width = row_bytes();
  std::vector<std::byte> bytes(width * static_cast<std::size_t>(num_rows()));
  for (std::int64_t r = 0; r < num_rows(); ++r)
    std::memcpy(bytes.data() + static_cast<std::size_t>(r) * width, now.data() + row_offset(r), width);
  return bytes;
}

void Tensor::set(const Array& values) {
  const auto size = static_cast<std::size_t>(bit_width(view_.dtype)) / 8;
  std::vector<std::byte> bytes(values.values.size() * size);
  for (std::size_t i = 0; i < values.values.size(); ++i) {
    const std::uint64_t bits = oracle::encode(view_.dtype, values.values[i]);
    const double back = oracle::decode(view_.dtype, bits);
    if (!(back == values.values[i] || (back != back && values.values[i] != values.values[i])))
      throw std::logic_error("Tensor::set: a value that is not exact in " + std::string(name(view_.dtype)));
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  set_bytes(bytes);
}

Array Tensor::get() const {
  const auto size = static_cast<std::size_t>(bit_width(view_.dtype)) / 8;
  const std::vector<std::byte> bytes = get_bytes();
  Array values(std::vector<std::int64_t>(view_.shape.begin(), view_.shape.begin() + view_.ndim));
  for (std::size_t i = 0; i < values.values.size(); ++i) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, bytes.data() + i * size, size);
    values.values[i] = oracle::decode(view_.dtype, bits);
  }
  return values;
}

void Tensor::poison() {
  for (std::int64_t r = 0; r < num_rows(); ++r)
    std::memset(image_.data() + row_offset(r), static_cast<int>(poison_of(view_.dtype)), row_bytes());
  memory_->write(0, image_.data(), image_.size());
}

::testing::AssertionResult Tensor::surroundings_intact() const {
  std::vector<std::byte> now = download();
  for (std::int64_t r = 0; r < num_rows(); ++r)
    std::memcpy(now.data() + row_offset(r), image_.data() + row_offset(r), row_bytes());
  const auto at = std::mismatch(now.begin(), now.end(), image_.begin()).first;
  if (at == now.end()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "memory outside of " << view_.describe() << " was written, "
         << at - now.begin() - static_cast<std::ptrdiff_t>(begin_) << " bytes from its first element";
}

::testing::AssertionResult Tensor::untouched() const {
  const std::vector<std::byte> now = download();
  const auto at = std::mismatch(now.begin(), now.end(), image_.begin()).first;
  if (at == now.end()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << view_.describe() << " was written, " << at - now.begin() - static_cast<std::ptrdiff_t>(begin_)
         << " bytes from its first element";
}

}  // namespace moecore::test
