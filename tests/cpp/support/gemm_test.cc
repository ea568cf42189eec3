#include "support/gemm_test.h"

#include <algorithm>

#include "support/compare.h"
#include "support/oracle.h"

namespace moecore::test {
namespace {

bool both_fp8(const FormatPair& p) {
  return p.x && p.x->kind == QuantKind::kFp8 && p.weights && p.weights->kind == QuantKind::kFp8;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const GemmCase& c) {
  out << "counts";
  for (std::int64_t n : c.counts) out << " " << n;
  return out << " N=" << c.n << " K=" << c.k << (c.gather ? " gather" : "") << (c.bias ? " bias" : "")
             << (c.row_weights ? " row_weights" : "") << (c.activation ? " activation" : "") << " global "
             << static_cast<int>(c.global) << (c.as_bytes ? "" : " typed") << " " << c.place.name << " "
             << c.policy;
}

std::size_t GemmTest::workspace(const FormatPair& p, std::int64_t rows, std::int64_t n, std::int64_t k,
                                std::int64_t num_experts) const {
  return grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype(), device(), p.x, p.weights);
}

std::string GemmTest::no_tilings() const {
  if (device().type != DeviceType::kCUDA) return "a CUDA policy, which the cuda instances take";
  const Tensor x(device(), DType::kBF16, {8, 64}), w(device(), DType::kBF16, {1, 64, 64}),
      offsets(device(), DType::kI32, Array({2}, {0, 8}));
  Tensor out(device(), DType::kBF16, {8, 64});
  Call call(device(), grouped_gemm_workspace_bytes(8, 64, 64, 1, DType::kBF16, device()));
  std::string text;
  call.context().explain = &text;
  moecore::grouped_gemm(x.read_only(), w.read_only(), offsets.read_only(), out, {}, call);
  if (text.find("wgmma") != text.npos) return "";
  return "tilings are those of Hopper's kernels: needs a GPU of compute capability 9.0";
}

void GemmTest::expect_gemm(const FormatPair& p, GemmCase c, Values kind) {
  if (is_fp4(p.x) || is_fp4(p.weights)) c.k += c.k % 2;
  SCOPED_TRACE(::testing::Message() << p.name << " " << c);
  Random random(static_cast<std::uint64_t>(c.n * 1000 + c.k));
  const auto num_experts = static_cast<std::int64_t>(c.counts.size());
  Array offsets({num_experts + 1});
  for (std::int64_t e = 0; e < num_experts; ++e)
    offsets[e + 1] = offsets[e] + static_cast<double>(c.counts[static_cast<std::size_t>(e)]);
  const auto live = static_cast<std::int64_t>(offsets[num_experts]);
  const std::int64_t num_rows = live + c.spare_rows,
                     x_rows = c.gather ? std::max<std::int64_t>(1, live / 2 + 1) : num_rows;

  Operand x({.format = p.x,
             .float_type = dtype(),
             .shape = {x_rows, c.k},
             .values = kind == Values::kExtreme && !has_e8m0(p.x) ? Values::kIntegers : kind,
             .global = c.global == Global::kNone ? Global::kNone : Global::kOne,
             .as_bytes = c.as_bytes,
             .place = c.place},
            random),
      weights({.format = p.weights,
               .float_type = dtype(),
               .shape = {num_experts, c.n, c.k},
               // Of two extreme scales the product would leave the range.
               .values = kind == Values::kExtreme && has_e8m0(p.x) ? Values::kIntegers : kind,
               .global = c.global,
               .as_bytes = c.as_bytes,
               .place = c.place},
              random);
  // What must not be read is NaN: rows behind the offsets and the weights of experts without rows.
  if (!c.gather)
    for (std::int64_t r = live; r < num_rows; ++r) x.poison(r);
  for (std::int64_t e = 0; e < num_experts; ++e)
    if (c.counts[static_cast<std::size_t>(e)] == 0) weights.poison(e);
  x.upload(device());
  weights.upload(device());

  const bool has_codes = p.x || p.weights;
  // Floats at a place of their own: that of codes counts bytes.
  const Place place = has_codes ? Place{c.place.name, c.place.row_padding, 0} : c.place;
  oracle::GemmSpec spec{.activation = c.activation,
                        .scale_roundings = has_codes ? 8 : 0,
                        .short_sums = device().type == DeviceType::kCUDA && dtype() == DType::kBF16 &&
                                      both_fp8(p) && c.policy.find("portable=1") == c.policy.npos};
  GroupedGemmOptions options{
      .activation = c.activation, .x_scales = x.scale_view(), .weight_scales = weights.scale_view()};
  const Tensor offset_tensor(device(), DType::kI32, offsets);
  std::optional<Tensor> bias, row_token, row_weights;
  auto values = [&](std::vector<std::int64_t> shape, DType type) {
    return kind == Values::kRandom ? random.floats(std::move(shape), type)
                                   : random.integers(std::move(shape), -3, 3);
  };
  if (c.bias) {
    spec.bias = values({num_experts, c.n}, *c.bias);
    bias.emplace(device(), *c.bias, *spec.bias, place);
    options.bias = bias->read_only();
  }
  if (c.gather) {
    spec.row_token = Array({num_rows}, -1);
    for (std::int64_t r = 0; r < live; ++r) (*spec.row_token)[r] = static_cast<double>(random.below(x_rows));
    row_token.emplace(device(), DType::kI32, *spec.row_token);
    options.row_token = row_token->read_only();
  }
  if (c.row_weights) {
    spec.row_weights = values({num_rows}, *c.row_weights);
    row_weights.emplace(device(), *c.row_weights, *spec.row_weights);
    options.row_weights = row_weights->read_only();
  }
  const std::int64_t width = c.activation && c.activation->gated() ? c.n / 2 : c.n;
  Tensor out(device(), dtype(), {num_rows, width}, place);
  Call call(device(), workspace(p, num_rows, c.n, c.k, num_experts));
  call.context().policy = c.policy;
  grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out, options, call);

  Bounded expected = oracle::grouped_gemm(x.values, weights.values, offsets, num_rows, spec);
  // Every product and every partial sum is a multiple of 2^-6 below 2^17: only the output's rounding is
  // left.
  if (kind == Values::kIntegers && !c.activation) expected.bound = Array({num_rows, width});
  EXPECT_TRUE(within(out.get(), expected, dtype()));
  EXPECT_TRUE(out.surroundings_intact());
  EXPECT_TRUE(call.workspace_intact());
}

}  // namespace moecore::test
