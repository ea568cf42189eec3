// The kernels for any CPU.

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/simd/target.h"
#include "cpu/simd/types.h"

namespace moecore::cpu {
namespace baseline {
namespace {

#include "cpu/simd/vec_baseline.inl"
//
#include "cpu/simd/bytes_baseline.inl"
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
}  // namespace baseline

const Kernels kBaselineKernels = {
    .route = baseline::route,
    .activate = baseline::activate,
    .finalize = baseline::finalize,
    .activate_floats = baseline::activate_floats,
    .quantize_amax = baseline::quantize_amax,
    .quantize_encode = baseline::quantize_encode,
    .nvfp4_scales = baseline::nvfp4_scales,
    .power_of_two_scales = baseline::power_of_two_scales,
    .dequantize_decode = baseline::dequantize_decode,
    .read_all = baseline::read_all,
    .fma_flops = baseline::fma_flops,
};

}  // namespace moecore::cpu
