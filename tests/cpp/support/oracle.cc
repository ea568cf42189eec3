#include "support/oracle.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace moecore::oracle {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// A binary floating-point format with IEEE infinities and subnormals.
struct FloatFormat {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int min_exponent() const { return 1 - bias(); }
  std::uint64_t exponent_mask() const { return (1u << exponent_bits) - 1; }
};

std::optional<FloatFormat> float_format(DType dtype) {
  if (dtype == DType::kF32) return FloatFormat{8, 23};
  if (dtype == DType::kF16) return FloatFormat{5, 10};
  if (dtype == DType::kBF16) return FloatFormat{8, 7};
  return std::nullopt;
}

std::uint64_t encode_float(FloatFormat f, double x) {
  const std::uint64_t sign = std::uint64_t{std::signbit(x)} << (f.exponent_bits + f.mantissa_bits);
  const std::uint64_t infinity = f.exponent_mask() << f.mantissa_bits;
  if (std::isnan(x)) return infinity | std::uint64_t{1} << (f.mantissa_bits - 1);
  const double a = std::fabs(x);
  if (std::isinf(a)) return sign | infinity;
  if (a == 0) return sign;
  // The value in units of its last mantissa bit: nearbyint rounds it to nearest even.
  const int exponent = std::max(std::ilogb(a), f.min_exponent());
  const auto units = static_cast<std::uint64_t>(std::nearbyint(std::ldexp(a, f.mantissa_bits - exponent)));
  // Adding, not or-ing: a carry out of the mantissa moves on to the next exponent. Subnormals have units
  // below 2^mantissa_bits and exponent field 0.
  const std::uint64_t bits =
      (static_cast<std::uint64_t>(exponent - f.min_exponent()) << f.mantissa_bits) + units;
  return sign | std::min(bits, infinity);
}

double decode_float(FloatFormat f, std::uint64_t bits) {
  const std::uint64_t exponent = (bits >> f.mantissa_bits) & f.exponent_mask();
  const std::uint64_t mantissa = bits & ((std::uint64_t{1} << f.mantissa_bits) - 1);
  const double sign = (bits >> (f.exponent_bits + f.mantissa_bits)) & 1 ? -1.0 : 1.0;
  if (exponent == f.exponent_mask()) return mantissa ? kNaN : sign * kInf;
  const double units =
      static_cast<double>(exponent ? mantissa | std::uint64_t{1} << f.mantissa_bits : mantissa);
  const int scale = std::max<int>(static_cast<int>(exponent), 1) - f.bias() - f.mantissa_bits;
  return sign * std::ldexp(units, scale);
}

}  // namespace

std::uint64_t encode(DType dtype, double x) {
  if (const auto format = float_format(dtype)) return encode_float(*format, x);
  const auto integer = static_cast<std::int64_t>(x);
  if (static_cast<double>(integer) != x) throw std::logic_error("encode: not an integer");
  const int bits = bit_width(dtype);
  return static_cast<std::uint64_t>(integer) &
         (bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1);
}

double decode(DType dtype, std::uint64_t bits) {
  if (const auto format = float_format(dtype)) return decode_float(*format, bits);
  switch (dtype) {
    case DType::kI32:
      return static_cast<std::int32_t>(bits);
    case DType::kI64:
      return static_cast<double>(static_cast<std::int64_t>(bits));
    case DType::kU8:
    case DType::kBool:
      return static_cast<double>(bits);
    default:
      throw std::logic_error("decode: a type that the tests move as bytes");
  }
}

double round_to(DType dtype, double x) {
  // The machine's conversion, which compare_test proves equal to encode(), for speed.
  if (dtype == DType::kF32) return static_cast<double>(static_cast<float>(x));
  return decode(dtype, encode(dtype, x));
}

Array round_to(DType dtype, Array a) {
  for (double& v : a.values) v = round_to(dtype, v);
  return a;
}

PlanResult plan(const Array& ids, const PlanSpec& spec) {
  const std::int64_t num_tokens = ids.shape[0], top_k = ids.shape[1], routes = num_tokens * top_k;
  const std::int64_t num_experts = spec.num_experts;
  std::vector<std::vector<std::int64_t>> routes_of(static_cast<std::size_t>(num_experts));
  for (std::int64_t r = 0; r < routes; ++r) {
    auto id = static_cast<std::int64_t>(ids[r]);
    if (spec.expert_map) {
      const auto& map = *spec.expert_map;
      id = id >= 0 && id < static_cast<std::int64_t>(map.size()) ? map[static_cast<std::size_t>(id)] : -1;
    } else {
      id = id < 0 ? -1 : id - spec.first_expert;
    }
    if (id >= 0 && id < num_experts) routes_of[static_cast<std::size_t>(id)].push_back(r);
  }
  PlanResult p{Array({num_experts + 1}),       Array({num_experts + 1}), Array({routes}, -1),
               Array({num_tokens, top_k}, -1), Array({routes}, -1),      Array({num_experts, 3}),
               Array({num_experts, 3})};
  std::int64_t row = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const auto& mine = routes_of[static_cast<std::size_t>(e)];
    const auto n = static_cast<std::int64_t>(mine.size());
    for (std::int64_t r : mine) {
      p.row_token[row] = static_cast<double>(r / top_k);
      p.row_route[row] = static_cast<double>(r);
      p.slot_row[r] = static_cast<double>(row++);
    }
    p.expert_offsets[e + 1] = static_cast<double>(row);
    p.scale_offsets[e + 1] =
        p.scale_offsets[e] +
        static_cast<double>((n + spec.scale_alignment - 1) / spec.scale_alignment * spec.scale_alignment);
    const std::int64_t wide = spec.gated ? 2 * spec.inter : spec.inter;
    const std::int64_t sizes1[3] = {spec.swap_ab ? wide : n, spec.swap_ab ? n : wide, spec.hidden};
    const std::int64_t sizes2[3] = {spec.swap_ab ? spec.hidden : n, spec.swap_ab ? n : spec.hidden,
                                    spec.inter};
    for (int i = 0; i < 3; ++i) {
      p.problem_sizes1.at(e, i) = static_cast<double>(sizes1[i]);
      p.problem_sizes2.at(e, i) = static_cast<double>(sizes2[i]);
    }
  }
  return p;
}

RouteResult route(const Array& logits, const RouteSpec& spec) {
  const std::int64_t num_tokens = logits.shape[0], num_experts = logits.shape[1], top_k = spec.top_k;
  const std::int64_t group_size = num_experts / spec.num_groups;
  const bool grouped = spec.num_groups > 1;
  // Keys that involve exp carry its error; the logit itself is exact.
  const bool exact_keys = !spec.bias && !grouped;
  RouteResult result{
      {Array({num_tokens, top_k}), Array({num_tokens, top_k})}, Array({num_tokens, top_k}, -1), {}};
  result.ambiguous.assign(static_cast<std::size_t>(num_tokens), false);

  for (std::int64_t t = 0; t < num_tokens; ++t) {
    if (spec.is_padding && (*spec.is_padding)[t] != 0) continue;
    // Scores: value and relative error of an f32 evaluation.
    double largest = -kInf;
    for (std::int64_t e = 0; e < num_experts; ++e)
      if (std::isfinite(logits.at(t, e))) largest = std::max(largest, logits.at(t, e));
    double sum = 0;
    for (std::int64_t e = 0; e < num_experts; ++e)
      if (std::isfinite(logits.at(t, e))) sum += std::exp(logits.at(t, e) - largest);
    const auto n = static_cast<std::size_t>(num_experts);
    std::vector<double> score(n), error(n), key(n);
    std::vector<bool> eligible(n);
    for (std::size_t e = 0; e < n; ++e) {
      const double x = logits.at(t, static_cast<std::int64_t>(e));
      const double bias = spec.bias ? (*spec.bias)[static_cast<std::int64_t>(e)] : 0;
      eligible[e] = std::isfinite(x) && std::isfinite(bias);
      if (!std::isfinite(x)) continue;
      if (spec.scoring == Scoring::kSoftmax) {
        // x - max (one rounding of up to |x - max|), exp (4 ulp), a sum of E terms, one division.
        score[e] = std::exp(x - largest) / sum;
        error[e] = kF32Roundoff * (std::fabs(x - largest) + static_cast<double>(num_experts) + 12) * score[e];
      } else if (spec.scoring == Scoring::kIdentity) {
        score[e] = x;
        error[e] = 0;
      } else {
        score[e] = 1 / (1 + std::exp(-x));
        error[e] = kF32Roundoff * 12 * score[e];
      }
      error[e] += 0x1p-126;  // results below the normal range may be flushed
      key[e] = exact_keys ? x : score[e] + bias;
    }
    // How far an f32 key (or sum of two) may be off.
    double slack = 0;
    if (!exact_keys)
      for (std::size_t e = 0; e < n; ++e)
        if (eligible[e]) slack = std::max(slack, 4 * error[e] + 4 * kF32Roundoff * std::fabs(key[e]));

    // Equal inputs are equal keys and no matter of rounding; keys that differ by less than the slack are.
    auto close = [&](double high, double low) {
      return std::isfinite(low) && high != low && high - low <= 2 * slack;
    };
    auto better = [](const std::vector<double>& v, std::size_t a, std::size_t b) {
      return v[a] != v[b] ? v[a] > v[b] : a < b;
    };
    bool ambiguous = false;
    if (grouped) {
      const auto groups = static_cast<std::size_t>(spec.num_groups);
      std::vector<double> rank(groups, -kInf);
      for (std::size_t g = 0; g < groups; ++g) {
        std::vector<double> keys;
        for (auto e = g * static_cast<std::size_t>(group_size);
             e < (g + 1) * static_cast<std::size_t>(group_size); ++e)
          keys.push_back(eligible[e] ? key[e] : -kInf);
        std::sort(keys.rbegin(), keys.rend());
        rank[g] = keys[0] + (spec.group_score == GroupScore::kTop2Sum && keys.size() > 1 ? keys[1] : 0);
      }
      std::vector<std::size_t> order(groups);
      std::iota(order.begin(), order.end(), std::size_t{0});
      std::sort(order.begin(), order.end(), [&](auto a, auto b) { return better(rank, a, b); });
      for (auto i = static_cast<std::size_t>(spec.topk_groups); i < groups; ++i)
        for (auto e = order[i] * static_cast<std::size_t>(group_size);
             e < (order[i] + 1) * static_cast<std::size_t>(group_size); ++e)
          eligible[e] = false;
      if (spec.topk_groups < spec.num_groups) {
        const double last = rank[order[static_cast<std::size_t>(spec.topk_groups) - 1]];
        const double next = rank[order[static_cast<std::size_t>(spec.topk_groups)]];
        ambiguous = close(last, next);
      }
    }
    std::vector<std::size_t> order;
    for (std::size_t e = 0; e < n; ++e)
      if (eligible[e]) order.push_back(e);
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return better(key, a, b); });
    if (!exact_keys)
      for (std::size_t j = 0; j + 1 < order.size() && j < static_cast<std::size_t>(top_k); ++j)
        ambiguous = ambiguous || close(key[order[j]], key[order[j + 1]]);
    result.ambiguous[static_cast<std::size_t>(t)] = ambiguous;

    const auto picked = std::min<std::size_t>(order.size(), static_cast<std::size_t>(top_k));
    double total = 0, total_error = 0;
    for (std::size_t j = 0; j < picked; ++j) {
      total += score[order[j]];
      total_error += error[order[j]];
    }
    total_error += kF32Roundoff * static_cast<double>(picked) * total;
    for (std::size_t j = 0; j < picked; ++j) {
      const auto slot = static_cast<std::int64_t>(j);
      double w = score[order[j]], b = error[order[j]];
      if (spec.renormalize) {
        b = b / (total + 1e-20) + w / (total + 1e-20) * (total_error / (total + 1e-20) + 3 * kF32Roundoff);
        w /= total + 1e-20;
      }
      const double scale = static_cast<double>(spec.scale);
      result.ids.at(t, slot) = static_cast<double>(order[j]);
      result.weights.value.at(t, slot) = w * scale;
      result.weights.bound.at(t, slot) = std::fabs(scale) * (b + kF32Roundoff * w);
    }
  }
  return result;
}

Array shuffle_rows(const Array& x, const Array& map) {
  const std::int64_t width = x.shape[1];
  Array out({map.size(), width});
  for (std::int64_t d = 0; d < map.size(); ++d)
    if (map[d] >= 0 && map[d] < static_cast<double>(x.shape[0]))
      for (std::int64_t c = 0; c < width; ++c) out.at(d, c) = x.at(static_cast<std::int64_t>(map[d]), c);
  return out;
}

BoundedValue activation(const Activation& a, double gate, double up, double gate_error, double up_error) {
  const double limit = static_cast<double>(a.limit), alpha = static_cast<double>(a.alpha);
  const double beta = static_cast<double>(a.beta);
  if (!std::isnan(gate)) gate = std::min(gate, limit);
  if (!std::isnan(up)) up = std::clamp(up, -limit, limit);
  const double u = kF32Roundoff, magnitude = std::fabs(gate);
  // f, its largest slope near `gate`, and the error of evaluating it in f32. x * sigmoid(s x): rounding s*x
  // by |s x| u moves the sigmoid by that times (1 - sigmoid) of itself; exp, add and divide take a few ulp
  // more; below -87 exp leaves the f32 range.
  double f = 0, slope = 1.13, error = 0;
  auto swish = [&](double s) {
    const double e = std::exp(-s * gate);
    f = gate / (1 + e);
    error = u * (16 + 4 * std::fabs(s * gate) * (std::isinf(e) ? 1 : e / (1 + e))) * std::fabs(f) + 1e-35;
  };
  // 0.5 x (1 + g(x)): the sum may cancel, so the error is relative to x.
  auto half_sum = [&](double g) {
    f = 0.5 * gate * (1 + g);
    error = u * 16 * magnitude;
  };
  constexpr double kSqrt2OverPi = 0.79788456080286535588;
  switch (a.kind) {
    case ActivationKind::kSilu:
      swish(1);
      break;
    case ActivationKind::kQuickGelu:
      swish(1.702);
      break;
    case ActivationKind::kSwigluOai:
      swish(alpha);
      break;
    case ActivationKind::kGelu:
      half_sum(std::erf(gate / std::sqrt(2.0)));
      break;
    case ActivationKind::kGeluTanh:
      half_sum(std::tanh(kSqrt2OverPi * (gate + 0.044715 * gate * gate * gate)));
      break;
    case ActivationKind::kRelu:
      f = std::isnan(gate) ? kNaN : std::max(gate, 0.0);
      slope = 1;
      break;
    case ActivationKind::kRelu2:
      f = std::isnan(gate) ? kNaN : std::max(gate, 0.0) * std::max(gate, 0.0);
      slope = 2 * (std::max(gate, 0.0) + gate_error);
      error = u * f;
      break;
  }
  error += slope * gate_error;
  if (!a.gated()) return {f, error};
  const double factor = up + beta, factor_error = up_error + u * std::fabs(factor);
  return {f * factor, error * (std::fabs(factor) + factor_error) + std::fabs(f) * factor_error +
                          2 * u * std::fabs(f * factor)};
}

namespace {

// Gate and up of output column c in a row of 2*I or I columns.
struct Pair {
  std::int64_t gate, up;
};
Pair columns_of(GateOrder order, std::int64_t c, std::int64_t inter) {
  switch (order) {
    case GateOrder::kGateUp:
      return {c, inter + c};
    case GateOrder::kUpGate:
      return {inter + c, c};
    case GateOrder::kInterleaved:
      return {2 * c, 2 * c + 1};
    case GateOrder::kPlain:
      return {c, c};
  }
  throw std::logic_error("columns_of: no such order");
}

}  // namespace

Bounded activate(const Array& x, const Activation& a, std::int64_t num_rows) {
  const std::int64_t rows = x.shape[0], inter = a.gated() ? x.shape[1] / 2 : x.shape[1];
  Bounded out{Array({rows, inter}, kNaN), Array({rows, inter})};
  for (std::int64_t r = 0; r < std::min(rows, num_rows); ++r)
    for (std::int64_t c = 0; c < inter; ++c) {
      const Pair p = columns_of(a.order, c, inter);
      const BoundedValue v = activation(a, x.at(r, p.gate), x.at(r, p.up));
      out.value.at(r, c) = v.value;
      out.bound.at(r, c) = std::isnan(v.value) ? 0 : v.bound;
    }
  return out;
}

namespace {

/// How far sums may be off that keep 13 bits: in steps of 32 columns each product and the sum so far loses
/// what is more than 13 bits behind the leading bit of the largest of these 33. Every 128 columns the sum is
/// taken away, exactly, and starts from zero.
double short_sum_error(const double* a, const double* b, std::int64_t depth) {
  double error = 0;
  for (std::int64_t block = 0; block < depth; block += 128) {
    double sum = 0, off = 0;
    for (std::int64_t step = block; step < std::min(block + 128, depth); step += 32) {
      double largest = std::fabs(sum) + off;
      for (std::int64_t k = step; k < std::min(step + 32, depth); ++k) {
        largest = std::max(largest, std::fabs(a[k] * b[k]));
        sum += a[k] * b[k];
      }
      off += 33 * 0x1p-13 * largest;
    }
    error += off;
  }
  return error;
}

}  // namespace

Bounded grouped_gemm(const Array& x, const Array& weights, const Array& expert_offsets, std::int64_t num_rows,
                     const GemmSpec& spec) {
  const std::int64_t num_experts = weights.shape[0], n = weights.shape[1], depth = weights.shape[2];
  const std::int64_t width = spec.activation && spec.activation->gated() ? n / 2 : n;
  Bounded out{Array({num_rows, width}, kNaN), Array({num_rows, width})};
  std::vector<double> value(static_cast<std::size_t>(n)), bound(static_cast<std::size_t>(n));
  for (std::int64_t e = 0; e < num_experts; ++e)
    for (auto r = static_cast<std::int64_t>(expert_offsets[e]);
         r < static_cast<std::int64_t>(expert_offsets[e + 1]); ++r) {
      const std::int64_t source = spec.row_token ? static_cast<std::int64_t>((*spec.row_token)[r]) : r;
      const double* a = x.values.data() + source * depth;
      for (std::int64_t c = 0; c < n; ++c) {
        const double* b = weights.values.data() + (e * n + c) * depth;
        double sum = 0, absolute = 0;
        for (std::int64_t k = 0; k < depth; ++k) {
          sum += a[k] * b[k];
          absolute += std::fabs(a[k] * b[k]);
        }
        // Any order of K f32 multiply-adds: at most K+1 roundings of partial sums no larger than `absolute`;
        // operands or products below the normal range may be flushed.
        double error = kF32Roundoff * static_cast<double>(depth + 1 + spec.scale_roundings) * absolute +
                       0x1p-126 * static_cast<double>(depth) +
                       (spec.short_sums ? short_sum_error(a, b, depth) : 0);
        if (spec.row_weights) {
          const double w = (*spec.row_weights)[r];
          error = (error + kF32Roundoff * std::fabs(sum)) * std::fabs(w);
          sum *= w;
        }
        if (spec.bias) {
          sum += spec.bias->at(e, c);
          error += kF32Roundoff * (std::fabs(sum) + error);
        }
        value[static_cast<std::size_t>(c)] = sum;
        bound[static_cast<std::size_t>(c)] = error;
      }
      for (std::int64_t c = 0; c < width; ++c) {
        BoundedValue v;
        if (spec.activation) {
          const Pair p = columns_of(spec.activation->order, c, width);
          const auto g = static_cast<std::size_t>(p.gate), u = static_cast<std::size_t>(p.up);
          v = activation(*spec.activation, value[g], value[u], bound[g], bound[u]);
        } else {
          v = {value[static_cast<std::size_t>(c)], bound[static_cast<std::size_t>(c)]};
        }
        out.value.at(r, c) = v.value;
        out.bound.at(r, c) = v.bound;
      }
    }
  return out;
}

Array finalize(const Array& rows, const Array& slot_row, std::int64_t hidden, DType dtype,
               const std::optional<Array>& weights, bool cast_weights, const std::optional<Array>& residual,
               const std::optional<Array>& row_scales) {
  const std::int64_t num_tokens = slot_row.shape[0], top_k = slot_row.shape[1];
  Array out({num_tokens, hidden});
  for (std::int64_t t = 0; t < num_tokens; ++t)
    for (std::int64_t h = 0; h < hidden; ++h) {
      float sum = 0.0f;
      for (std::int64_t j = 0; j < top_k; ++j) {
        const double row = slot_row.at(t, j);
        if (row < 0 || row >= static_cast<double>(rows.shape[0])) continue;
        double w = weights ? weights->at(t, j) : 1.0;
        if (cast_weights) w = round_to(dtype, w);
        // The product of two floats is exact in double.
        if (row_scales)
          w = round_to(DType::kF32, w * row_scales->at(static_cast<std::int64_t>(row), h / 128));
        sum = std::fma(static_cast<float>(w), static_cast<float>(rows.at(static_cast<std::int64_t>(row), h)),
                       sum);
      }
      if (residual) sum += static_cast<float>(residual->at(t, h));
      out.at(t, h) = round_to(dtype, static_cast<double>(sum));
    }
  return out;
}

}  // namespace moecore::oracle
