// The grouped GEMM's kernels for AVX512-BF16 and VBMI: bf16 pairs along K are multiplied as they lie in
// memory, and so are codes, of which bf16 holds every value. The instruction takes denormals as zero. f32 and
// f16 are those of AVX-512.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/gemm/kernels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu::gemm {
MOECORE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
namespace avx512_bf16 {
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

// Sums as in Widened, 32 elements a step.
struct Pairs : Widened<BF16, 8> {
  using Operand = __m512i;
  static constexpr int kStep = 32;
  static Operand x(const std::byte* p) { return _mm512_loadu_si512(p); }
  static Operand w(const std::byte* p) { return _mm512_loadu_si512(p); }
  static Vec multiply_add(Operand a, Operand b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
  }
};

#include "cpu/gemm/decode_pairs.inl"

}  // namespace
}  // namespace avx512_bf16
MOECORE_TARGET_END

const KernelTable& avx512_bf16_kernels() {
  static const KernelTable table = [] {
    KernelTable t = avx512_kernels();
    t.bf16.name = "bf16 dot products";
    t.bf16.product = avx512_bf16::dot_product<avx512_bf16::Pairs>;
    t.bf16.decoded = t.coded_x = {"codes as bf16 dot products", avx512_bf16::pairs_product};
    return t;
  }();
  return table;
}

}  // namespace moecore::cpu::gemm

#endif
