// grouped_gemm on the CPU: the schedule. Weights are read where they are, once, and no copy of them is made.
//
// A panel is a run of up to kPanelRows rows of one expert; a task is a panel times one block of weight rows.
// Inside a task the panel passes block by block of rows; the f32 results of a block stay in the cache until
// bias, row weights, activation and the one rounding have been applied. For a gated activation a task owns
// the gate rows and the up rows of its output columns. Tasks of one panel are neighbours, so threads walk
// through the weights side by side; an expert with few rows (the decode case) still gives every thread work.

#include "ops/grouped_gemm.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/explain.h"
#include "cpu/gemm/kernels.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

using gemm::kBlockCols;
using gemm::kMaxBlockCols;
using gemm::kMaxBlockRows;

constexpr std::int64_t kPanelRows = 512;
constexpr int kPitch = kMaxBlockCols + 16;  // of a block's results; vectors may read past the last column

struct Panel {
  std::int32_t expert, first_row, rows;
};

// The codes of an operand of expert `e`.
gemm::Codes codes_of(const OperandScalesRef& s, std::int64_t e) {
  return {.e2m1 = element_bits(s.form, DType::kF32) == 4,
          .block = block_cols(s.form),
          .scale_dtype = s.dtype,
          .scales = s.data + e * s.expert_pitch,
          .row_pitch = s.row_pitch,
          .col_pitch = s.col_pitch,
          .block_rows = s.block_rows};
}

// The factor that the form leaves to the whole row: its scale, where it has one, and 1 / g.
float row_factor(const OperandScalesRef& s, std::int64_t e, std::int64_t row) {
  float factor = 1;
  if (s.form == OperandForm::kFp8Tensor || s.form == OperandForm::kFp8Token)
    std::memcpy(&factor, s.data + e * s.expert_pitch + row * s.row_pitch, sizeof factor);
  return s.global_scale ? 1 / s.global_scale[s.global_scale_per_expert ? e : 0] : factor;
}

const gemm::KernelTable& kernel_table() {
  static const gemm::KernelTable& table = []() -> const gemm::KernelTable& {
#if defined(__x86_64__)
    switch (active_isa()) {
      case Isa::kAmx:
        return gemm::amx_kernels();
      case Isa::kAvx512Bf16:
        return gemm::avx512_bf16_kernels();
      case Isa::kAvx512:
        return gemm::avx512_kernels();
      case Isa::kAvx2:
        return gemm::avx2_kernels();
      case Isa::kBaseline:
        break;
    }
#endif
    return gemm::baseline_kernels();
  }();
  return table;
}

const gemm::Kernel& kernel_for(DType dtype) {
  const gemm::KernelTable& table = kernel_table();
  return dtype == DType::kF32 ? table.f32 : dtype == DType::kF16 ? table.f16 : table.bf16;
}

// The kernel of a problem: of the output's type, with the product that reads the operands.
gemm::Kernel kernel_for(const GroupedGemmProblem& p) {
  gemm::Kernel kernel = kernel_for(p.dtype);
  if (p.weight_scales.form == OperandForm::kFloat) return kernel;
  const bool coded_x = p.x_scales.form != OperandForm::kFloat;
  const gemm::DecodedProduct& decoded = coded_x ? kernel_table().coded_x : kernel.decoded;
  kernel.name = decoded.name;
  kernel.product = decoded.product;
  kernel.max_rows = gemm::kBlockRows;
  kernel.max_cols = gemm::kBlockCols;
  return kernel;
}

std::int64_t max_panels(std::int64_t rows, std::int64_t num_experts) {
  return std::min(rows, num_experts) + rows / kPanelRows;
}

// A task: the rows of `panel` times the weight rows of output columns [first_col, first_col + cols).
struct Task {
  const GroupedGemmProblem& p;
  const gemm::Kernel& kernel;
  Panel panel;
  std::int64_t first_col;
  int cols;

  std::int64_t out_bytes() const { return bit_width(p.dtype) / 8; }
  std::int64_t x_bits() const { return element_bits(p.x_scales.form, p.dtype); }
  std::int64_t weight_bits() const { return element_bits(p.weight_scales.form, p.dtype); }
  GateOrder order() const { return p.activation ? p.activation->order : GateOrder::kPlain; }

  // The task's weight rows: one run, or as many of each half. Their order is that of the results in a block.
  std::array<gemm::WeightRows, 2> weight_rows() const {
    const std::byte* base =
        static_cast<const std::byte*>(p.weights) + panel.expert * p.weight_expert_stride * weight_bits() / 8;
    auto run = [&](std::int64_t row, int rows) {
      return gemm::WeightRows{base + row * p.weight_row_stride * weight_bits() / 8, rows, row};
    };
    switch (order()) {
      case GateOrder::kPlain:
        break;
      case GateOrder::kInterleaved:
        return {run(2 * first_col, 2 * cols), {}};
      case GateOrder::kGateUp:
      case GateOrder::kUpGate:
        return {run(first_col, cols), run(p.n / 2 + first_col, cols)};
    }
    return {run(first_col, cols), {}};
  }

  // The bias of those weight rows, in f32.
  void read_bias(float* bias) const {
    const std::int64_t bytes = bit_width(p.bias_dtype) / 8;
    const auto* base = static_cast<const std::byte*>(p.bias) + panel.expert * p.bias_stride * bytes;
    const auto widen = kernel_for(p.bias_dtype).widen;
    switch (order()) {
      case GateOrder::kPlain:
        return widen(base + first_col * bytes, bias, cols);
      case GateOrder::kInterleaved:
        return widen(base + 2 * first_col * bytes, bias, 2 * cols);
      case GateOrder::kGateUp:
      case GateOrder::kUpGate:
        widen(base + first_col * bytes, bias, cols);
        widen(base + (p.n / 2 + first_col) * bytes, bias + cols, cols);
    }
  }

  void run() const {
    alignas(64) float c[kMaxBlockRows * kPitch], bias[kPitch], col_scales[kPitch],
        row_factors[kMaxBlockRows + 16];
    const std::byte *x[kMaxBlockRows], *x_scales[kMaxBlockRows];
    const bool coded_weights = p.weight_scales.form != OperandForm::kFloat,
               coded_x = p.x_scales.form != OperandForm::kFloat;
    const gemm::Codes w_codes = codes_of(p.weight_scales, panel.expert), x_codes = codes_of(p.x_scales, 0);
    gemm::Product product{.x = x,
                          .w = weight_rows(),
                          .w_pitch = p.weight_row_stride * weight_bits() / 8,
                          .depth = p.k,
                          .c = c,
                          .c_pitch = kPitch,
                          .w_codes = coded_weights ? &w_codes : nullptr,
                          .x_codes = coded_x ? &x_codes : nullptr,
                          .x_scales = x_scales};
    gemm::Finish finish{.c = c,
                        .width = product.w[0].rows + product.w[1].rows,
                        .c_pitch = kPitch,
                        .activation = p.activation ? &*p.activation : nullptr,
                        .out_pitch = p.out_stride * out_bytes()};
    if (coded_weights && w_codes.block == 0) {
      float* to = col_scales;
      for (const gemm::WeightRows& run : product.w)
        for (int n = 0; n < run.rows; ++n) *to++ = row_factor(p.weight_scales, panel.expert, run.first + n);
      finish.col_scales = col_scales;
    }
    // 1 / g of the weights, which all of a row shares, goes with the row.
    const float weight_factor = w_codes.block ? row_factor(p.weight_scales, panel.expert, 0) : 1;
    if (p.bias) {
      read_bias(bias);
      finish.bias = bias;
    }
    if (p.row_weights || coded_x || weight_factor != 1) finish.row_weights = row_factors;
    const std::int64_t end = panel.first_row + panel.rows;
    for (std::int64_t row = panel.first_row; row < end; row += kernel.max_rows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(kernel.max_rows, end - row));
      if (p.row_weights) {
        const std::int64_t bytes = bit_width(p.row_weight_dtype) / 8;
        kernel_for(p.row_weight_dtype)
            .widen(static_cast<const std::byte*>(p.row_weights) + row * bytes, row_factors, rows);
      } else {
        std::fill_n(row_factors, rows, 1.0f);
      }
      for (int i = 0; i < rows; ++i) {
        const std::int64_t from = p.row_token ? p.row_token[row + i] : row + i;
        x[i] = static_cast<const std::byte*>(p.x) + from * p.x_stride * x_bits() / 8;
        x_scales[i] = x_codes.scales_of(from);
        row_factors[i] *= weight_factor * row_factor(p.x_scales, 0, from);
      }
      product.rows = finish.rows = rows;
      kernel.product(product);
      finish.out = static_cast<std::byte*>(p.out) + (row * p.out_stride + first_col) * out_bytes();
      kernel.finish(finish);
    }
  }
};

// Fills `panels` with the runs of rows there are to compute, in expert order; returns their number. Offsets
// outside [0, R] are clipped, so that a wrong plan cannot reach past the tensors.
std::int64_t list_panels(const GroupedGemmProblem& p, Panel* panels) {
  std::int64_t count = 0;
  std::int64_t done = 0;
  for (std::int64_t e = 0; e < p.num_experts; ++e) {
    const std::int64_t first = std::clamp<std::int64_t>(p.expert_offsets[e], done, p.num_rows);
    const std::int64_t end = std::clamp<std::int64_t>(p.expert_offsets[e + 1], first, p.num_rows);
    for (std::int64_t row = first; row < end; row += kPanelRows)
      panels[count++] = {static_cast<std::int32_t>(e), static_cast<std::int32_t>(row),
                         static_cast<std::int32_t>(std::min(kPanelRows, end - row))};
    done = end;
  }
  return count;
}

}  // namespace

std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t, std::int64_t,
                                         std::int64_t num_experts, DType, FormPair) {
  return static_cast<std::size_t>(max_panels(rows, num_experts)) * sizeof(Panel);
}

void grouped_gemm(const GroupedGemmProblem& p, const ExecContext& ctx) {
  const gemm::Kernel kernel = kernel_for(p);
  const bool gated = p.activation && p.activation->gated();
  const std::int64_t out_cols = gated ? p.n / 2 : p.n;
  const int threads = threads_for(ctx, max_panels(p.num_rows, p.num_experts) * out_cols);
  if (explain(ctx, "grouped_gemm", kernel.name, threads)) return;

  auto* panels = reinterpret_cast<Panel*>(ctx.workspace.data());
  const std::int64_t num_panels = list_panels(p, panels);
  // The widest tasks of which every thread still gets eight.
  std::int64_t task_cols = kernel.max_cols / (gated ? 2 : 1), tasks_per_panel = 0;
  for (;; task_cols /= 2) {
    tasks_per_panel = (out_cols + task_cols - 1) / task_cols;
    if (num_panels * tasks_per_panel >= 8 * threads || task_cols <= kBlockCols / (gated ? 2 : 1)) break;
  }
  parallel_for(ctx, num_panels * tasks_per_panel, [&](std::int64_t task, int) {
    const std::int64_t first_col = task % tasks_per_panel * task_cols;
    Task{p, kernel, panels[task / tasks_per_panel], first_col,
         static_cast<int>(std::min(task_cols, out_cols - first_col))}
        .run();
  });
}

}  // namespace moecore::cpu
