#pragma once
// The tensor maps that the Hopper engine's kernels are launched with.

#include <cuda.h>

namespace moecore::cuda::sm90 {

/// Of the weights, of x where its rows come as boxes, of its scales where they do, and of out where tokens
/// are the operand of rows.
struct Maps {
  CUtensorMap weights{}, x{}, x_scales{}, out{};
};

}  // namespace moecore::cuda::sm90
