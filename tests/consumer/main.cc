// A project that knows moecore by find_package alone: gathers rows, quantises them, and catches what the
// library throws.
#include <moecore/moecore.h>
#include <cstdio>

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
  try {
    moecore::shuffle_rows(view, view, view);
  } catch (const moecore::InvalidType& error) {
    std::printf("moecore %s: %s\n", moecore::version().c_str(), error.what());
  }
}
