#include "support/refusals.h"

#include <utility>

namespace moecore::test {

void expect_refusal(const std::string& op, const std::function<void()>& call, Error error,
                    const std::vector<std::string>& fragments) {
  std::string message;
  try {
    call();
    ADD_FAILURE() << "was accepted";
    return;
  } catch (const InvalidType& e) {
    EXPECT_EQ(error, Error::kInvalidType);
    message = e.what();
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(error, Error::kInvalidArgument);
    message = e.what();
  } catch (const BackendError& e) {
    EXPECT_EQ(error, Error::kBackend);
    message = e.what();
  }
  EXPECT_EQ(message.rfind(op + ": ", 0), 0u) << message;
  for (const std::string& fragment : fragments)
    EXPECT_NE(message.find(fragment), std::string::npos) << "\"" << fragment << "\" is not in: " << message;
}

Tensor zeros(DType dtype, std::vector<std::int64_t> shape) {
  return {kCpu, dtype, Array(std::move(shape))};
}

TensorView retyped(TensorView v, DType dtype) {
  v.dtype = dtype;
  return v;
}

TensorView resized(TensorView v, int axis, std::int64_t n) {
  v.shape[axis] = n;
  return v;
}

TensorView flattened(TensorView v) {
  v.ndim = 1;
  return v;
}

TensorView on_gpu(TensorView v) {
  v.device = {DeviceType::kCUDA, 0};
  return v;
}

TensorView null(TensorView v) {
  v.data = nullptr;
  return v;
}

TensorView frozen(TensorView v) {
  v.read_only = true;
  return v;
}

TensorView restrided(TensorView v, int axis, std::int64_t stride) {
  v.strides[axis] = stride;
  return v;
}

}  // namespace moecore::test
