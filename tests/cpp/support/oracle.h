#pragma once
// The oracle: what every op must compute, written from the contract in plain loops over doubles. It shares no
// code with the engines, down to the conversions, which are done here by arithmetic on the formats'
// definitions.
//
// Where the contract fixes the bits (plan, permute, finalize) the oracle returns them. Elsewhere it returns
// the exact value together with a bound derived from the rounding steps that an f32 implementation takes.

#include <cstdint>
#include <optional>
#include <vector>

#include "moecore/activate.h"
#include "moecore/dtype.h"
#include "moecore/route.h"
#include "support/array.h"

namespace moecore::oracle {

using test::Array;
using test::Bounded;

/// Unit roundoff of f32.
inline constexpr double kF32Roundoff = 0x1p-24;

/// The bit pattern of x rounded to nearest even. Floats overflow to infinity; integers must be exact.
std::uint64_t encode(DType dtype, double x);
double decode(DType dtype, std::uint64_t bits);
/// decode(encode(x)).
double round_to(DType dtype, double x);
Array round_to(DType dtype, Array a);

struct PlanSpec {
  std::int64_t num_experts = 0;
  std::optional<std::vector<std::int32_t>> expert_map{};
  std::int64_t first_expert = 0;
  std::int64_t scale_alignment = 128;
  std::int64_t hidden = 0;
  std::int64_t inter = 0;
  bool gated = true;
  bool swap_ab = false;
};
struct PlanResult {
  Array expert_offsets, scale_offsets, row_token, slot_row, row_route, problem_sizes1, problem_sizes2;
};
PlanResult plan(const Array& ids, const PlanSpec& spec);

struct RouteSpec {
  std::int64_t top_k = 1;
  Scoring scoring = Scoring::kSoftmax;
  std::optional<Array> bias{};
  std::int64_t num_groups = 1;
  std::int64_t topk_groups = 1;
  GroupScore group_score = GroupScore::kTop2Sum;
  bool renormalize = false;
  float scale = 1.0f;
  std::optional<Array> is_padding{};
};
struct RouteResult {
  Bounded weights;
  Array ids;
  /// Tokens whose selection hangs on a difference that f32 rounding could turn: their ids may differ.
  std::vector<bool> ambiguous;
};
RouteResult route(const Array& logits, const RouteSpec& spec);

/// out[d] = x[map[d]] or zeros.
Array shuffle_rows(const Array& x, const Array& map);

/// f(gate) * (up + beta) when gate and up carry errors of at most `gate_error` and `up_error`.
struct BoundedValue {
  double value = 0, bound = 0;
};
BoundedValue activation(const Activation& a, double gate, double up, double gate_error = 0,
                        double up_error = 0);

/// Rows below `num_rows`; the others are NaN, the poison that an untouched row keeps.
Bounded activate(const Array& x, const Activation& a, std::int64_t num_rows);

struct GemmSpec {
  std::optional<Array> bias{};
  std::optional<Array> row_token{};
  std::optional<Activation> activation{};
  std::optional<Array> row_weights{};
  /// Quantised operands: how often an element's value or a sum may be rounded on account of its scales.
  int scale_roundings = 0;
  /// The sums of 128 columns are those of Hopper's fp8 tensor cores.
  bool short_sums = false;
};
/// x [X,K], weights [E,N,K], expert_offsets [E+1], out [num_rows, N or N/2]. Untouched rows are NaN.
Bounded grouped_gemm(const Array& x, const Array& weights, const Array& expert_offsets, std::int64_t num_rows,
                     const GemmSpec& spec);

/// The f32 fma chain of the contract, rounded to `dtype`: exact bits. `row_scales` [R, ceil(Hp / 128)]
/// multiply the weights.
Array finalize(const Array& rows, const Array& slot_row, std::int64_t hidden, DType dtype,
               const std::optional<Array>& weights, bool cast_weights, const std::optional<Array>& residual,
               const std::optional<Array>& row_scales = {});

}  // namespace moecore::oracle
