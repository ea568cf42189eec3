#pragma once
// DType -> CUDA element type, and loads whose type is known at run time.

#include "cuda/device/convert.cuh"
#include "moecore/dtype.h"

namespace moecore::cuda {

template <DType D>
struct CudaType;
template <>
struct CudaType<DType::kF32> {
  using type = float;
};
template <>
struct CudaType<DType::kF16> {
  using type = __half;
};
template <>
struct CudaType<DType::kBF16> {
  using type = __nv_bfloat16;
};

template <>
struct CudaType<DType::kE4M3> {
  using type = dev::E4M3;
};

template <DType D>
using cuda_t = typename CudaType<D>::type;

/// Element i of an array of f32, f16 or bf16.
template <class Index>
__device__ __forceinline__ float load_f32(const void* p, DType dtype, Index i) {
  switch (dtype) {
    case DType::kF16:
      return dev::to_f32(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return dev::to_f32(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

}  // namespace moecore::cuda
