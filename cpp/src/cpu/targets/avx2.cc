// The kernels for AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu {
MOECORE_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
namespace {

#include "cpu/simd/vec_avx2.inl"
//
#include "cpu/simd/bytes_avx2.inl"
#include "cpu/simd/magnitudes_x86.inl"
//
#include "cpu/simd/tail.inl"
//
#include "cpu/simd/math.inl"
//
#include "cpu/kernels/activation.inl"
//
#include "cpu/kernels/activate.inl"
#include "cpu/kernels/quantize.inl"
//
#include "cpu/kernels/finalize.inl"
#include "cpu/kernels/roof.inl"
#include "cpu/kernels/route.inl"

}  // namespace
}  // namespace avx2
MOECORE_TARGET_END

const Kernels kAvx2Kernels = {
    .route = avx2::route,
    .activate = avx2::activate,
    .finalize = avx2::finalize,
    .activate_floats = avx2::activate_floats,
    .quantize_amax = avx2::quantize_amax,
    .quantize_encode = avx2::quantize_encode,
    .nvfp4_scales = avx2::nvfp4_scales,
    .power_of_two_scales = avx2::power_of_two_scales,
    .dequantize_decode = avx2::dequantize_decode,
    .read_all = avx2::read_all,
    .fma_flops = avx2::fma_flops,
};

}  // namespace moecore::cpu

#endif
