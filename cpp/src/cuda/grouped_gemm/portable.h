#pragma once
// The portable engine's host side: portable.cu has the engine and the kernels for floats, the other file
// those for quantised operands.

#include "cuda/grouped_gemm/engines.h"

namespace moecore::cuda::portable {

inline constexpr int kNarrow = 16, kWide = 64;  // tokens of a tile

/// Whether all rows of x and weights can be read in pieces of 16 bytes.
bool rows_aligned(const GroupedGemmProblem& p);

void run_quantized(const GroupedGemmProblem& p, int tokens, const DeviceInfo& device, const ExecContext& ctx);

}  // namespace moecore::cuda::portable
