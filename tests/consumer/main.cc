// A project that knows moecore by find_package alone: gathers rows, quantises them, runs a layer, and catches
// what the library throws.
#include <moecore/moecore.h>
#include <cstdio>
#include <cstdlib>

void layer(const void* x, const void* w13, const void* w2, const float* weights, const int* ids, void* out,
           std::int64_t T, std::int64_t K, std::int64_t E, std::int64_t H, std::int64_t I,
           std::span<std::byte> workspace);

// A token of ones through two experts of ones, H = I = 2: silu(2) * 2 is 3.515625 in bf16, and two of these
// 7.03125.
void run_layer() {
  constexpr unsigned short kOne = 0x3F80;
  const unsigned short x[2] = {kOne, kOne}, w13[16] = {kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne,
                                                       kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne},
                       w2[8] = {kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne};
  const float weights[2] = {0.5f, 0.5f};
  const int ids[2] = {0, 1};
  unsigned short out[2];
  const std::size_t bytes =
      moecore::fused_experts_workspace_bytes(1, 2, 2, 2, 2, moecore::DType::kBF16, moecore::Device{});
  const std::size_t whole = (bytes + moecore::kWorkspaceAlignment - 1) / moecore::kWorkspaceAlignment *
                            moecore::kWorkspaceAlignment;
  auto* workspace = static_cast<std::byte*>(std::aligned_alloc(moecore::kWorkspaceAlignment, whole));
  layer(x, w13, w2, weights, ids, out, 1, 2, 2, 2, 2, {workspace, bytes});
  std::free(workspace);
  std::printf("%x %x\n", out[0], out[1]);
}

int main() {
  using moecore::TensorView, moecore::DType;
  const float x[2][3] = {{1, 2, 3}, {4, 5, 6}};
  const int map[3] = {1, -1, 0};
  float out[3][3];
  const TensorView view = TensorView::dense(out, DType::kF32, {3, 3});
  moecore::shuffle_rows(TensorView::dense(x, DType::kF32, {2, 3}), TensorView::dense(map, DType::kI32, {3}),
                        view);
  for (const auto& row : out) std::printf("%g %g %g\n", row[0], row[1], row[2]);
  const moecore::QuantFormat format = moecore::QuantFormat::fp8_token();
  unsigned char codes[3][3];
  float scales[3][1];
  moecore::quantize(view, TensorView::dense(codes, format.data_dtype(), {3, 3}),
                    TensorView::dense(scales, format.scale_dtype(), {3, 1}), format);
  for (const auto& row : codes) std::printf("%x %x %x\n", row[0], row[1], row[2]);
  run_layer();
  try {
    moecore::shuffle_rows(view, view, view);
  } catch (const moecore::InvalidType& error) {
    std::printf("moecore %s: %s\n", moecore::version().c_str(), error.what());
  }
}
