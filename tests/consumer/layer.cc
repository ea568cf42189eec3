// The C++ example of docs/usage.md, word for word from the next line on.
#include <moecore/moecore.h>

using namespace moecore;

void layer(const void* x, const void* w13, const void* w2, const float* weights, const int* ids, void* out,
           std::int64_t T, std::int64_t K, std::int64_t E, std::int64_t H, std::int64_t I,
           std::span<std::byte> workspace) {
  const DType type = DType::kBF16;
  const Device device{};  // CUDA: {DeviceType::kCUDA, 0}, of every tensor and of the context
  auto tensor = [&](auto* data, DType dtype, std::initializer_list<std::int64_t> shape) {
    return TensorView::dense(data, dtype, shape, device);
  };
  const Experts experts{.w13 = tensor(w13, type, {E, 2 * I, H}), .w2 = tensor(w2, type, {E, H, I})};
  // At least fused_experts_workspace_bytes(T, K, E, H, I, type, device), at a multiple of
  // kWorkspaceAlignment.
  const ExecContext context{.device = device, .workspace = workspace};  // CUDA: .stream = a cudaStream_t
  fused_experts(tensor(x, type, {T, H}), tensor(weights, DType::kF32, {T, K}),
                tensor(ids, DType::kI32, {T, K}), experts, tensor(out, type, {T, H}), {}, context);
}
