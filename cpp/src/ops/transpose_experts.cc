#include "ops/transpose_experts.h"

#include "core/check.h"
#include "moecore/fused_experts.h"

namespace moecore {

void transpose_experts(const TensorView& src, const TensorView& dst, const ExecContext& ctx) {
  const Check check("transpose_experts", ctx);
  check.tensor("src", src, 3);
  check.tensor("dst", dst, 3, Check::Access::kOut);
  check.same_dtype("dst", dst, "src", src);
  if (bit_width(src.dtype) < 8 || bit_width(src.dtype) > 64)
    check.fail_type("src", src.describe(), "elements of 8 to 64 bits");
  check.dim("dst", dst, 0, src.shape[0], "num_experts");
  check.dim("dst", dst, 1, src.shape[2], "src.shape[2]");
  check.dim("dst", dst, 2, src.shape[1], "src.shape[1]");
  const TransposeProblem problem{.src = static_cast<const std::byte*>(src.data),
                                 .src_expert_stride = src.strides[0],
                                 .src_row_stride = src.strides[1],
                                 .dst = static_cast<std::byte*>(dst.data),
                                 .dst_expert_stride = dst.strides[0],
                                 .dst_row_stride = dst.strides[1],
                                 .num_experts = src.shape[0],
                                 .rows = src.shape[1],
                                 .cols = src.shape[2],
                                 .element_bytes = bit_width(src.dtype) / 8};
  run_on_backend(cpu::transpose_experts, cuda::transpose_experts, problem, ctx);
}

}  // namespace moecore
