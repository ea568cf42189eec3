#pragma once
// moecore: the Mixture-of-Experts data path on CPU and CUDA. This header brings in every op.
//
// Letters used throughout: T tokens, K experts per token (top_k), E experts, H hidden size, I intermediate
// size (one of gate/up), R = T*K routes. Route r = t*K + j, slot = (t, j), row = a routed copy of a token.

#include "moecore/activate.h"       // IWYU pragma: export
#include "moecore/context.h"        // IWYU pragma: export
#include "moecore/dtype.h"          // IWYU pragma: export
#include "moecore/error.h"          // IWYU pragma: export
#include "moecore/finalize.h"       // IWYU pragma: export
#include "moecore/fused_experts.h"  // IWYU pragma: export
#include "moecore/grouped_gemm.h"   // IWYU pragma: export
#include "moecore/info.h"           // IWYU pragma: export
#include "moecore/permute.h"        // IWYU pragma: export
#include "moecore/plan.h"           // IWYU pragma: export
#include "moecore/quantize.h"       // IWYU pragma: export
#include "moecore/route.h"          // IWYU pragma: export
#include "moecore/route_plan.h"     // IWYU pragma: export
#include "moecore/tensor.h"         // IWYU pragma: export
