#pragma once
// The validated form of grouped_gemm.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/table.h"
#include "moecore/activate.h"
#include "moecore/grouped_gemm.h"
#include "ops/backend.h"

namespace moecore {

class Check;

using GroupedGemmTypes = FloatTypes;  // of x, weights and out

/// What the elements of an operand stand for.
enum class OperandForm : std::uint8_t {
  kFloat,  // themselves
  kFp8Tensor,
  kFp8Token,  // a scale for each row of x, for each output channel of weights
  kFp8Block128,
  kMxfp8,
  kNvfp4,
  kMxfp4,
};

struct FormPair {
  OperandForm x = OperandForm::kFloat, weights = OperandForm::kFloat;
  friend constexpr bool operator==(const FormPair&, const FormPair&) = default;
};

/// The pairs of forms that can be multiplied.
using GemmForms = Table<
    FormPair{OperandForm::kFloat, OperandForm::kFloat},
    FormPair{OperandForm::kFloat, OperandForm::kFp8Tensor},
    FormPair{OperandForm::kFloat, OperandForm::kFp8Token},
    FormPair{OperandForm::kFloat, OperandForm::kFp8Block128},
    FormPair{OperandForm::kFloat, OperandForm::kNvfp4}, FormPair{OperandForm::kFloat, OperandForm::kMxfp4},
    FormPair{OperandForm::kFp8Tensor, OperandForm::kFp8Tensor},
    FormPair{OperandForm::kFp8Tensor, OperandForm::kFp8Token},
    FormPair{OperandForm::kFp8Token, OperandForm::kFp8Tensor},
    FormPair{OperandForm::kFp8Token, OperandForm::kFp8Token},
    FormPair{OperandForm::kFp8Block128, OperandForm::kFp8Block128},
    FormPair{OperandForm::kMxfp8, OperandForm::kNvfp4}, FormPair{OperandForm::kMxfp8, OperandForm::kMxfp4},
    FormPair{OperandForm::kNvfp4, OperandForm::kNvfp4}, FormPair{OperandForm::kNvfp4, OperandForm::kMxfp4}>;

constexpr OperandForm operand_form(const QuantFormat& f) {
  switch (f.kind) {
    case QuantKind::kFp8:
      return f.granularity == Granularity::kTensor  ? OperandForm::kFp8Tensor
             : f.granularity == Granularity::kToken ? OperandForm::kFp8Token
                                                    : OperandForm::kFp8Block128;
    case QuantKind::kNvfp4:
      return OperandForm::kNvfp4;
    case QuantKind::kMxfp8:
      return OperandForm::kMxfp8;
    case QuantKind::kMxfp4:
      break;
  }
  return OperandForm::kMxfp4;
}

/// Columns that share a scale; 0 for all of them.
constexpr int block_cols(OperandForm form) {
  switch (form) {
    case OperandForm::kFp8Block128:
      return 128;
    case OperandForm::kMxfp8:
    case OperandForm::kMxfp4:
      return 32;
    case OperandForm::kNvfp4:
      return 16;
    default:
      return 0;
  }
}

/// Bits of one element of an operand of `form` whose floats are `dtype`.
constexpr int element_bits(OperandForm form, DType dtype) {
  switch (form) {
    case OperandForm::kFloat:
      return bit_width(dtype);
    case OperandForm::kNvfp4:
    case OperandForm::kMxfp4:
      return 4;
    default:
      return 8;
  }
}

/// The scale of element (e, row, col) of an operand stands at byte
///   e * expert_pitch + row / block_rows * row_pitch + col / block_cols(form) * col_pitch
/// where a pitch of 0 says that all share one.
struct OperandScalesRef {
  OperandForm form = OperandForm::kFloat;
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;  // f32, e8m0, e4m3
  std::int64_t expert_pitch = 0;
  std::int64_t row_pitch = 0;
  std::int64_t col_pitch = 0;
  int block_rows = 1;                    // 128 for fp8 block128 weights
  const float* global_scale = nullptr;   // nvfp4: g, or none: 1
  bool global_scale_per_expert = false;  // weights only
};

/// Where a product leaves its rows as codes: what quantize() makes of them, without their way through memory.
struct QuantizedOutRef {
  QuantFormat format{};
  std::uint8_t* codes = nullptr;  // [R, columns of out], rows `pitch` bytes apart
  std::int64_t pitch = 0;
  float* scales = nullptr;  // [R, blocks of a row], rows `scale_pitch` scales apart
  std::int64_t scale_pitch = 0;
};

/// How the engine that takes a product reads x fastest, so that whoever writes x had better write it so.
struct XLayout {
  bool rows_in_order = false;      // of out: else it begins with a copy of the rows
  bool scales_in_columns = false;  // ScaleLayout::kColumnMajor
};

struct GroupedGemmProblem {
  DType dtype = DType::kF32;  // of out, and of every operand whose form is kFloat
  OperandScalesRef x_scales{};
  OperandScalesRef weight_scales{};
  // Strides of operands count elements, e2m1 too; a row of e2m1 starts at a byte.
  const void* x = nullptr;  // [x_rows, K]
  std::int64_t x_rows = 0;
  std::int64_t x_stride = 0;
  const std::int32_t* row_token = nullptr;  // [R] or none: row r reads x[r]
  const void* weights = nullptr;            // [E,N,K], dense along K
  std::int64_t weight_expert_stride = 0;
  std::int64_t weight_row_stride = 0;
  const std::int32_t* expert_offsets = nullptr;  // [E+1]
  std::int64_t num_experts = 0;
  std::int64_t num_rows = 0;  // R, an upper bound of expert_offsets[E]
  std::int64_t n = 0;         // rows of one expert's weights
  std::int64_t k = 0;
  const void* bias = nullptr;  // [E,N] or none
  DType bias_dtype = DType::kF32;
  std::int64_t bias_stride = 0;
  const void* row_weights = nullptr;  // [R] or none
  DType row_weight_dtype = DType::kF32;
  std::optional<Activation> activation{};
  bool offsets_settled = false;
  void* out = nullptr;  // [R, n] or [R, n/2]
  std::int64_t out_stride = 0;
  std::optional<QuantizedOutRef> quantized_out{};  // instead of out, see quantized_out_refusal()
};

// The parts of grouped_gemm's validation that fused_experts has in common with it.

std::string_view name(OperandForm form);
OperandForm form_of(const std::optional<QuantFormat>& format);
OperandForm form_of(const std::optional<OperandScales>& scales);
/// Refuses a pair that cannot be multiplied, with the list of those that can.
void check_forms(const Check& check, std::string_view arg, FormPair pair);
/// An operand as elements: of a float dtype, or the codes of its format.
TensorView check_operand(const Check& check, std::string_view arg, const TensorView& t, int ndim,
                         const std::optional<OperandScales>& scales);
/// The scales of `codes`, an operand as elements: x [X,K] or weights [E,N,K].
OperandScalesRef check_operand_scales(const Check& check, const std::string& arg, const OperandScales& s,
                                      const TensorView& codes);

/// Checks the arguments of grouped_gemm, its workspace included.
GroupedGemmProblem make_grouped_gemm_problem(const Check& check, const TensorView& x,
                                             const TensorView& weights, const TensorView& expert_offsets,
                                             const TensorView& out, const GroupedGemmOptions& options,
                                             const ExecContext& ctx);

namespace cpu {
BackendFn<GroupedGemmProblem> grouped_gemm;
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, FormPair forms);
}  // namespace cpu
namespace cuda {
BackendFn<GroupedGemmProblem> grouped_gemm;
/// Why a problem with a quantized_out must be run without it, its out being quantised afterwards; empty where
/// the engine that takes the problem leaves the codes itself.
std::string quantized_out_refusal(const GroupedGemmProblem& problem, const ExecContext& ctx);
XLayout preferred_x_layout(const GroupedGemmProblem& problem, const ExecContext& ctx);
std::size_t grouped_gemm_workspace_bytes(std::int64_t rows, std::int64_t n, std::int64_t k,
                                         std::int64_t num_experts, DType dtype, FormPair forms);
}  // namespace cuda

}  // namespace moecore
