#include "moecore/tensor.h"

#include "moecore/error.h"

namespace moecore {

std::string to_string(Device device) {
  return device.type == DeviceType::kCPU ? "cpu" : "cuda:" + std::to_string(device.index);
}

TensorView TensorView::dense(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                             Device device) {
  if (shape.size() > kMaxDims) throw InvalidArgument("TensorView: more than 4 dimensions");
  TensorView t;
  t.data = data;
  t.dtype = dtype;
  t.ndim = static_cast<int>(shape.size());
  t.device = device;
  int i = 0;
  for (std::int64_t n : shape) t.shape[i++] = n;
  std::int64_t stride = 1;
  for (int axis = t.ndim - 1; axis >= 0; --axis) {
    t.strides[axis] = stride;
    stride *= t.shape[axis];
  }
  return t;
}

TensorView TensorView::dense(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                             Device device) {
  TensorView t = dense(const_cast<void*>(data), dtype, shape, device);
  t.read_only = true;
  return t;
}

std::int64_t TensorView::numel() const {
  std::int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool TensorView::is_dense() const {
  if (numel() == 0) return true;
  std::int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] > 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

std::string TensorView::describe() const {
  auto list = [this](const std::array<std::int64_t, kMaxDims>& values) {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text.append(i ? "," : "").append(std::to_string(values[i]));
    return text.append("]");
  };
  std::string text(name(dtype));
  text.append(list(shape)).append(" ").append(to_string(device));
  if (!is_dense()) text.append(" strides ").append(list(strides));
  return text;
}

}  // namespace moecore
