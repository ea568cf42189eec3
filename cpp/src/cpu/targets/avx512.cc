// The kernels for AVX-512 F, BW, DQ and VL. AVX512-BF16 and AMX serve matrix products only.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu {
MOECORE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
namespace {

#include "cpu/simd/vec_avx512.inl"
//
#include "cpu/simd/bytes_avx512.inl"
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
}  // namespace avx512
MOECORE_TARGET_END

const Kernels kAvx512Kernels = {
    .route = avx512::route,
    .activate = avx512::activate,
    .finalize = avx512::finalize,
    .activate_floats = avx512::activate_floats,
    .quantize_amax = avx512::quantize_amax,
    .quantize_encode = avx512::quantize_encode,
    .nvfp4_scales = avx512::nvfp4_scales,
    .power_of_two_scales = avx512::power_of_two_scales,
    .dequantize_decode = avx512::dequantize_decode,
    .read_all = avx512::read_all,
    .fma_flops = avx512::fma_flops,
};

}  // namespace moecore::cpu

#endif
