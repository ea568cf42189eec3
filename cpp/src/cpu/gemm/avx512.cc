// The grouped GEMM's kernels for AVX-512 F, BW, DQ, VL.

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
MOECORE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
namespace {

inline constexpr bool kFusedMultiplyAdd = true;
#include "cpu/simd/vec_avx512.inl"
//
#include "cpu/simd/bytes_avx512.inl"
//
#include "cpu/simd/tail.inl"
//

// 32 registers: sums, as many weights, one x.
constexpr int tile_cols(int rows) {
  return rows <= 4 ? 6 : rows <= 6 ? 4 : 3;
}
#include "cpu/gemm/lanes_avx512.inl"
//
#include "cpu/gemm/decode_lanes.inl"
//
#include "cpu/gemm/decode.inl"
//
#include "cpu/gemm/dot.inl"
#include "cpu/gemm/finish.inl"

template <class T>
constexpr DecodedProduct kDecoded = {"codes as f32 dot products", dot_product<Decoded<T, 8>>};

template <class T>
constexpr Kernel make_kernel(const char* name) {
  return {name, dot_product<Widened<T, 8>>, kDecoded<T>, finish<T>, widen_elements<T>};
}

}  // namespace
}  // namespace avx512
MOECORE_TARGET_END

const KernelTable& avx512_kernels() {
  static constexpr KernelTable kTable = {
      .f32 = avx512::make_kernel<float>("f32 dot products"),
      .f16 = avx512::make_kernel<F16>("f16 dot products widened to f32"),
      .bf16 = avx512::make_kernel<BF16>("bf16 dot products widened to f32"),
      .coded_x = avx512::kDecoded<float>};
  return kTable;
}

}  // namespace moecore::cpu::gemm

#endif
