#pragma once
// grouped_gemm: every expert multiplies its own rows by its own weights.

#include <cstddef>
#include <optional>

#include "moecore/activate.h"
#include "moecore/context.h"
#include "moecore/quantize.h"

namespace [[gnu::visibility("default")]] moecore {

/// What the codes of a quantised operand stand for: value = code * scale, exactly; nvfp4: code * S * rcp(g).
///
///   format                 scales of x [X,K]                   scales of weights [E,N,K]
///   fp8 tensor             f32 [1,1]                           f32 [E]
///   fp8 token              f32 [X,1], one for each row         f32 [E,N], one for each output channel
///   fp8 block128           f32 [X,K/128] or column-major       f32 [E,N/128,K/128], squares of 128 x 128
///   mxfp8                  e8m0 [X,K/32]                       -
///   nvfp4                  e4m3 [X,K/16]                       e4m3 [E,N,K/16]
///   mxfp4                  -                                   e8m0 [E,N,K/32]
///
/// Counts of blocks are rounded up. Byte-sized scales may come as u8, and stand in the linear layout
/// (convert_scales() brings swizzled ones there). Weights are in the order of published checkpoints: fp4
/// packs two elements to the byte, the even column in the low nibble, so K and row strides are even.
struct OperandScales {
  QuantFormat format;
  TensorView scales;
  /// nvfp4: g, f32 [1], for weights also [E]. Checkpoints that store the factor 1 / g want its reciprocal.
  std::optional<TensorView> global_scale{};
};

struct GroupedGemmOptions {
  /// f32 or out's dtype, [E,N].
  std::optional<TensorView> bias{};
  /// i32 [R]: row r reads x[row_token[r]], which must exist for every row of an expert; without it x has R
  /// rows, already in expert order.
  std::optional<TensorView> row_token{};
  /// Fused on the f32 result (bias included): out has N/2 columns for a gated activation.
  std::optional<Activation> activation{};
  /// f32 [R]: factor on the row's product before the bias (router weight on the input).
  std::optional<TensorView> row_weights{};
  /// x and weights are codes of these formats. See grouped_gemm() for the pairs.
  std::optional<OperandScales> x_scales{};
  std::optional<OperandScales> weight_scales{};
  /// CUDA: expert_offsets and weights were complete before the kernel that precedes this call in the stream
  /// began, as between the two products of a layer. Weights are then fetched while that kernel still runs.
  bool offsets_settled = false;
};

/// out[r,n] = sum_k x[row,k] * weights[e,n,k] (* row_weights[r]) (+ bias[e,n]) for rows of expert e.
/// x [R,K] or, with row_token, [T,K]; weights [E,N,K]; expert_offsets i32 [E+1]; out [R,N]. Rows >=
/// expert_offsets[E] of out are left untouched. Any R, E, N, K (K = 0 gives the bias). Rows may be strided,
/// weights[e,n] must be dense along k. f32 accumulation, one rounding.
///
/// On CUDA, fp8 x fp8 to bf16 may be summed as tensor cores do it: the products of 32 columns and the sum so
/// far, each cut 13 bits behind the leading bit of the largest of them; every 128 columns that sum joins the
/// others in f32. That is off by at most 33 * 2^-13 of this largest for each 32 columns, and usually by 2^-16
/// of the sum of |x * w|.
///
///   x                    weights                                          out
///   f32 | f16 | bf16     x's dtype                                        x's dtype
///   f32 | f16 | bf16     fp8 tensor | token | block128, mxfp4, nvfp4      x's dtype
///   fp8 tensor | token   fp8 tensor | token                               f32 | f16 | bf16
///   fp8 block128         fp8 block128                                     f32 | f16 | bf16
///   mxfp8 | nvfp4        mxfp4 | nvfp4                                    f32 | f16 | bf16
///
/// Quantised codes are e4m3 (or u8) and e2m1 (or u8 with half the columns). Sources: the FP8 and FP4 expert
/// layers of vLLM and FlashInfer, the MXFP4 checkpoint of gpt-oss, DeepSeek-V3's 128-block FP8.
void grouped_gemm(const TensorView& x, const TensorView& weights, const TensorView& expert_offsets,
                  const TensorView& out, const GroupedGemmOptions& options = {}, const ExecContext& ctx = {});

/// Bytes of workspace that grouped_gemm() needs: rows R, N = weight rows, K = depth, `dtype` that of out, the
/// formats of quantised operands. On CUDA up to a copy of x's rows in the order of out, and what tiles that
/// are cut along K exchange.
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, Device device,
                                         const std::optional<QuantFormat>& x_format = {},
                                         const std::optional<QuantFormat>& weight_format = {});

}  // namespace moecore
