#pragma once
// DType -> CUDA element type.

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

}  // namespace moecore::cuda
