// The grouped GEMM's kernels for any CPU, in the compiler's vector extension.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/gemm/kernels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu::gemm {
namespace baseline {
namespace {

#ifdef __FP_FAST_FMAF
inline constexpr bool kFusedMultiplyAdd = true;
#else
inline constexpr bool kFusedMultiplyAdd = false;  // it would be a function call per lane
#endif
#include "cpu/simd/vec_baseline.inl"
//
#include "cpu/simd/bytes_baseline.inl"
//
#include "cpu/simd/tail.inl"
//

// 16 registers where it matters, and room for widening in them.
constexpr int tile_cols(int rows) {
  return rows <= 2 ? 3 : 2;
}
#include "cpu/gemm/decode_in_order.inl"
//
#include "cpu/gemm/decode.inl"
//
#include "cpu/gemm/dot.inl"
#include "cpu/gemm/finish.inl"

template <class T>
constexpr DecodedProduct kDecoded = {"codes as f32 dot products", dot_product<Decoded<T, 4>>};

template <class T>
constexpr Kernel make_kernel(const char* name) {
  return {name, dot_product<Widened<T, 4>>, kDecoded<T>, finish<T>, widen_elements<T>};
}

}  // namespace
}  // namespace baseline

const KernelTable& baseline_kernels() {
  static constexpr KernelTable kTable = {
      .f32 = baseline::make_kernel<float>("f32 dot products"),
      .f16 = baseline::make_kernel<F16>("f16 dot products widened to f32"),
      .bf16 = baseline::make_kernel<BF16>("bf16 dot products widened to f32"),
      .coded_x = baseline::kDecoded<float>};
  return kTable;
}

}  // namespace moecore::cpu::gemm
