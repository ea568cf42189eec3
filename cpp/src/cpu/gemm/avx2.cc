// The grouped GEMM's kernels for AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/gemm/kernels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu::gemm {
MOECORE_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
namespace {

inline constexpr bool kFusedMultiplyAdd = true;
#include "cpu/simd/vec_avx2.inl"
//
#include "cpu/simd/bytes_avx2.inl"
//
#include "cpu/simd/tail.inl"
//

// 16 registers: sums, as many weights, one x.
constexpr int tile_cols(int rows) {
  return rows <= 2 ? 4 : 3;
}
#include "cpu/gemm/lanes_avx2.inl"
//
#include "cpu/gemm/decode_lanes.inl"
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
}  // namespace avx2
MOECORE_TARGET_END

const KernelTable& avx2_kernels() {
  static constexpr KernelTable kTable = {.f32 = avx2::make_kernel<float>("f32 dot products"),
                                         .f16 = avx2::make_kernel<F16>("f16 dot products widened to f32"),
                                         .bf16 = avx2::make_kernel<BF16>("bf16 dot products widened to f32"),
                                         .coded_x = avx2::kDecoded<float>};
  return kTable;
}

}  // namespace moecore::cpu::gemm

#endif
