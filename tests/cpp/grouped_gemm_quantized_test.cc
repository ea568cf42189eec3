// grouped_gemm on quantised operands: every pair of formats against a product in double of what the codes
// stand for. Exact where codes are small integers and scales powers of two (so that a scale of the wrong
// block cannot hide in a tolerance), within the derived bound on random codes and scales.

#include <cmath>
#include <cstring>

#include "moecore/grouped_gemm.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantize_oracle.h"

namespace moecore::test {
namespace {

using Format = std::optional<QuantFormat>;

struct FormatPair {
  std::string name;
  Format x, weights;
};

/// The table of grouped_gemm.h.
const std::vector<FormatPair>& pairs() {
  static const std::vector<FormatPair> list = [] {
    using F = QuantFormat;
    constexpr ScaleLayout kLinear = ScaleLayout::kLinear;
    const std::pair<const char*, Format> none{"float", {}}, tensor{"fp8 tensor", F::fp8_tensor()},
        token{"fp8 token", F::fp8_token()}, block{"fp8 block128", F::fp8_block128()},
        column{"fp8 block128 column major", F::fp8_block128(ScaleLayout::kColumnMajor)},
        mxfp8{"mxfp8", F::mxfp8(kLinear)}, nvfp4{"nvfp4", F::nvfp4(kLinear)},
        mxfp4{"mxfp4", F::mxfp4(kLinear)};
    std::vector<FormatPair> pairs;
    for (const auto& [x, weights] : {std::pair{none, tensor},
                                     {none, token},
                                     {none, block},
                                     {none, nvfp4},
                                     {none, mxfp4},
                                     {tensor, tensor},
                                     {tensor, token},
                                     {token, tensor},
                                     {token, token},
                                     {block, block},
                                     {column, block},
                                     {mxfp8, nvfp4},
                                     {mxfp8, mxfp4},
                                     {nvfp4, nvfp4},
                                     {nvfp4, mxfp4}})
      pairs.push_back({std::string(x.first) + " x " + weights.first, x.second, weights.second});
    return pairs;
  }();
  return list;
}

bool is_fp4(const Format& f) {
  return f && f->data_dtype() == DType::kE2M1;
}
bool any_fp4(const FormatPair& p) {
  return is_fp4(p.x) || is_fp4(p.weights);
}
bool has_e8m0(const Format& f) {
  return f && f->scale_dtype() == DType::kE8M0;
}

enum class Values {
  kIntegers,  // integers of a few bits, scales that are powers of two near 1: every sum is exact in f32
  kRandom,    // every finite code, scales of any mantissa
  kExtreme,   // e8m0 scales from 2^-100 to 2^100, the same power of two along K
};

/// nvfp4's global scale.
enum class Global { kNone, kOne, kPerExpert };

/// x [X,K] or weights [E,N,K] as the op takes them, and what their elements stand for.
struct Operand {
  struct Spec {
    Format format;
    DType float_type;
    std::vector<std::int64_t> shape;
    Values values = Values::kIntegers;
    Global global = Global::kOne;
    bool as_bytes = true;  // codes and byte-sized scales come as u8
    Place place{};
    bool is_x() const { return shape.size() == 2; }
  };

  Array values;
  std::vector<std::uint8_t> codes;  // one for each element
  Array scales;                     // [E or 1, rows of blocks, blocks along K]
  std::int64_t block_rows = 1, block_cols = 0;
  Array global;  // [E or 1]

  Operand(const Spec& spec, Random& random) : spec_(spec) {
    const auto& s = spec.shape;
    experts_ = spec.is_x() ? 1 : s[0];
    rows_ = s[s.size() - 2];
    cols_ = s.back();
    if (!spec.format) {
      values =
          spec.values == Values::kIntegers ? random.integers(s, -3, 3) : random.floats(s, spec.float_type);
      return;
    }
    draw(random);
    decode();
  }

  /// Everything that belongs to a row (of x) or an expert (of weights) becomes NaN, as far as the format has
  /// something of its own for it.
  void poison(std::int64_t index) {
    const std::int64_t first = spec_.is_x() ? index : index * rows_,
                       end = spec_.is_x() ? index + 1 : first + rows_;
    for (std::int64_t i = first * cols_; i < end * cols_; ++i) values[i] = std::nan("");
    if (!spec_.format) return;
    if (!is_fp4(spec_.format))
      for (std::int64_t i = first * cols_; i < end * cols_; ++i) codes[static_cast<std::size_t>(i)] = 0x7F;
    const std::int64_t per_expert = scales.shape[1] * scales.shape[2];
    if (!spec_.is_x()) {
      for (std::int64_t i = 0; i < per_expert; ++i) scales[index * per_expert + i] = std::nan("");
      if (global.size() > 1) global[index] = std::nan("");
    } else if (!is_tensor()) {
      for (std::int64_t i = 0; i < scales.shape[2]; ++i) scales.at(0, index, i) = std::nan("");
    }
  }

  /// The values, after codes or scales were changed by hand.
  void decode() {
    const oracle::SmallFloat& code =
        is_fp4(spec_.format) ? oracle::SmallFloat::e2m1() : oracle::SmallFloat::e4m3();
    values = Array(spec_.shape);
    for (std::int64_t e = 0; e < experts_; ++e)
      for (std::int64_t r = 0; r < rows_; ++r)
        for (std::int64_t c = 0; c < cols_; ++c) {
          const std::int64_t i = (e * rows_ + r) * cols_ + c;
          const double s = scales.at(e, is_tensor() ? 0 : r / block_rows, block_cols ? c / block_cols : 0);
          values[i] = code.decode(codes[static_cast<std::size_t>(i)]) * s * reciprocal(e);
        }
  }

  /// On the device.
  void upload(Device device) {
    if (!spec_.format) {
      data_.emplace(device, spec_.float_type, values, spec_.place);
      return;
    }
    const QuantFormat& f = *spec_.format;
    std::vector<std::int64_t> shape = spec_.shape;
    std::vector<std::byte> bytes;
    if (is_fp4(f)) {
      if (spec_.as_bytes) shape.back() /= 2;
      for (std::size_t i = 0; i < codes.size(); i += 2)
        bytes.push_back(static_cast<std::byte>(codes[i] | codes[i + 1] << 4));
    } else {
      for (std::uint8_t c : codes) bytes.push_back(static_cast<std::byte>(c));
    }
    Place place = spec_.place;
    if (is_fp4(f) && !spec_.as_bytes) place.row_padding = (place.row_padding + 1) / 2 * 2;
    data_.emplace(device, spec_.as_bytes ? DType::kU8 : f.data_dtype(), shape, place);
    data_->set_bytes(bytes);

    // Scales in the shape of the format: without the axes it does not have.
    const bool column_major = f.layout == ScaleLayout::kColumnMajor;
    const std::int64_t pitch = column_major ? rows_ + 3 : rows_;
    std::vector<std::int64_t> scale_shape;
    if (!spec_.is_x()) scale_shape.push_back(experts_);
    if (column_major) {
      scale_shape = {scales.shape[2], pitch};
    } else {
      if (spec_.is_x() || !is_tensor()) scale_shape.push_back(scales.shape[1]);
      if (spec_.is_x() || block_cols) scale_shape.push_back(scales.shape[2]);
    }
    Array laid_out(scale_shape, column_major ? std::nan("") : 0);
    if (column_major) {
      for (std::int64_t r = 0; r < rows_; ++r)
        for (std::int64_t c = 0; c < scales.shape[2]; ++c) laid_out.at(c, r) = scales.at(0, r, c);
    } else {
      laid_out.values = scales.values;
    }
    const DType type = f.scale_dtype();
    const bool scale_bytes = spec_.as_bytes && type != DType::kF32;
    Place scale_place = spec_.place;
    if (type == DType::kF32) scale_place.byte_offset = scale_place.byte_offset / 4 * 4;
    scales_.emplace(device, scale_bytes ? DType::kU8 : type, scale_shape, scale_place);
    std::vector<std::byte> scale_data;
    for (double s : laid_out.values) append(scale_data, type, s);
    scales_->set_bytes(scale_data);
    if (global.size() > 0) global_.emplace(device, DType::kF32, global);
  }

  TensorView view() const { return data_->read_only(); }
  std::optional<OperandScales> scale_view() const {
    if (!spec_.format) return {};
    OperandScales s{*spec_.format, scales_->read_only()};
    if (global_) s.global_scale = global_->read_only();
    return s;
  }

 private:
  bool is_tensor() const {
    return spec_.format->kind == QuantKind::kFp8 && spec_.format->granularity == Granularity::kTensor;
  }
  double reciprocal(std::int64_t e) const {
    if (global.size() == 0) return 1;
    return static_cast<double>(static_cast<float>(1.0 / global[global.size() > 1 ? e : 0]));
  }

  static void append(std::vector<std::byte>& bytes, DType type, double s) {
    if (type == DType::kF32) {
      const auto f = static_cast<float>(s);
      bytes.resize(bytes.size() + 4);
      std::memcpy(bytes.data() + bytes.size() - 4, &f, 4);
    } else if (type == DType::kE8M0) {
      bytes.push_back(static_cast<std::byte>(std::isnan(s) ? 255 : std::ilogb(s) + 127));
    } else {
      bytes.push_back(static_cast<std::byte>(oracle::SmallFloat::e4m3().encode(s)));
    }
  }

  void draw(Random& random) {
    const QuantFormat& f = *spec_.format;
    const bool integers = spec_.values == Values::kIntegers;
    const oracle::SmallFloat& code = is_fp4(f) ? oracle::SmallFloat::e2m1() : oracle::SmallFloat::e4m3();
    for (std::int64_t i = 0; i < experts_ * rows_ * cols_; ++i) {
      std::uint8_t c;
      if (spec_.values == Values::kRandom) {
        do c = static_cast<std::uint8_t>(random.below(is_fp4(f) ? 16 : 256));
        while (std::isnan(code.decode(c)));
      } else {
        c = code.encode(static_cast<double>(random.below(7) - 3));
      }
      codes.push_back(c);
    }
    if (f.kind == QuantKind::kFp8 && f.granularity == Granularity::kBlock128) {
      block_cols = 128;
      block_rows = spec_.is_x() ? 1 : 128;
    } else if (f.kind != QuantKind::kFp8) {
      block_cols = f.kind == QuantKind::kNvfp4 ? 16 : 32;
    }
    auto blocks = [](std::int64_t n, std::int64_t block) { return block ? (n + block - 1) / block : 1; };
    scales = Array({experts_, is_tensor() ? 1 : blocks(rows_, block_rows), blocks(cols_, block_cols)});
    const DType type = f.scale_dtype();
    for (std::int64_t i = 0; i < scales.size(); ++i) {
      const double near_one = std::ldexp(1.0, static_cast<int>(random.below(3)) - 1);
      if (spec_.values == Values::kExtreme && type == DType::kE8M0) {
        constexpr int kExponents[] = {-100, -61, 0, 62, 100};
        scales[i] = std::ldexp(near_one, kExponents[i / scales.shape[2] % 5]);
      } else if (spec_.values != Values::kRandom) {
        scales[i] = near_one;
      } else if (type == DType::kE8M0) {
        scales[i] = std::ldexp(1.0, static_cast<int>(random.below(13)) - 6);
      } else if (type == DType::kE4M3) {
        scales[i] = oracle::SmallFloat::e4m3().decode(static_cast<std::uint8_t>(random.below(0x7F)));
      } else {
        scales[i] = oracle::round_to(DType::kF32, random.uniform(0.001, 2));
      }
    }
    if (f.kind == QuantKind::kNvfp4 && spec_.global != Global::kNone) {
      global = Array({spec_.global == Global::kPerExpert ? experts_ : 1});
      for (double& g : global.values)
        g = integers ? std::ldexp(1.0, static_cast<int>(random.below(4)) - 1)
                     : oracle::round_to(DType::kF32, random.uniform(0.1, 3000));
    }
  }

  Spec spec_;
  std::int64_t experts_ = 1, rows_ = 0, cols_ = 0;
  std::optional<Tensor> data_, scales_, global_;
};

struct GemmCase {
  std::vector<std::int64_t> counts;  // rows of each expert
  std::int64_t n = 64, k = 64;
  std::int64_t spare_rows = 0;  // rows behind expert_offsets[E]
  bool gather = false;
  std::optional<DType> bias{};
  bool row_weights = false;
  std::optional<Activation> activation{};
  Global global = Global::kOne;
  bool as_bytes = true;
  Place place{};

  friend std::ostream& operator<<(std::ostream& out, const GemmCase& c) {
    out << "counts";
    for (std::int64_t n : c.counts) out << " " << n;
    return out << " N=" << c.n << " K=" << c.k << (c.gather ? " gather" : "") << (c.bias ? " bias" : "")
               << (c.row_weights ? " row_weights" : "") << (c.activation ? " activation" : "") << " global "
               << static_cast<int>(c.global) << (c.as_bytes ? "" : " typed") << " " << c.place.name;
  }
};

class GroupedGemmQuantized : public OnDeviceDType {
 protected:
  std::size_t workspace(const FormatPair& p, std::int64_t rows, std::int64_t n, std::int64_t k,
                        std::int64_t num_experts) const {
    return grouped_gemm_workspace_bytes(rows, n, k, num_experts, dtype(), device(), p.x, p.weights);
  }

  void expect_gemm(const FormatPair& p, GemmCase c, Values kind) {
    if (any_fp4(p)) c.k += c.k % 2;
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

    oracle::GemmSpec spec{.activation = c.activation, .scale_roundings = 8};
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
      bias.emplace(device(), *c.bias, *spec.bias);
      options.bias = bias->read_only();
    }
    if (c.gather) {
      spec.row_token = Array({num_rows}, -1);
      for (std::int64_t r = 0; r < live; ++r)
        (*spec.row_token)[r] = static_cast<double>(random.below(x_rows));
      row_token.emplace(device(), DType::kI32, *spec.row_token);
      options.row_token = row_token->read_only();
    }
    if (c.row_weights) {
      spec.row_weights = values({num_rows}, DType::kF32);
      row_weights.emplace(device(), DType::kF32, *spec.row_weights);
      options.row_weights = row_weights->read_only();
    }
    const std::int64_t width = c.activation && c.activation->gated() ? c.n / 2 : c.n;
    // Outputs at a place of their own: the operands' offsets are those of bytes.
    const Place out_place{c.place.name, c.place.row_padding, 0};
    Tensor out(device(), dtype(), {num_rows, width}, out_place);
    const Call call(device(), workspace(p, num_rows, c.n, c.k, num_experts));
    grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out, options, call);

    Bounded expected = oracle::grouped_gemm(x.values, weights.values, offsets, num_rows, spec);
    // Every product and every partial sum is a multiple of 2^-6 below 2^17: only the output's rounding is
    // left.
    if (kind == Values::kIntegers && !c.activation) expected.bound = Array({num_rows, width});
    EXPECT_TRUE(within(out.get(), expected, dtype()));
    EXPECT_TRUE(out.surroundings_intact());
    EXPECT_TRUE(call.workspace_intact());
  }

  void for_all_pairs(const GemmCase& c, Values kind) {
    for (const FormatPair& p : pairs()) expect_gemm(p, c, kind);
  }
};

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyShape) {
  for (std::int64_t n : {1, 7, 32, 130})
    for (std::int64_t k : {1, 2, 16, 31, 34, 64, 100, 128, 130, 257, 384})
      for_all_pairs({.counts = {3, 0, 1, 17, 5}, .n = n, .k = k}, Values::kIntegers);
  for_all_pairs({.counts = {2, 0, 3}, .n = 300, .k = 300}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyRowCount) {
  for (std::int64_t rows : {0, 1, 2, 4, 7, 8, 9, 16, 31, 33, 40})
    for_all_pairs({.counts = {rows, 1, 0, rows}, .n = 48, .k = 160, .spare_rows = rows % 3},
                  Values::kIntegers);
  for_all_pairs({.counts = {200}, .n = 96, .k = 72}, Values::kIntegers);
  for_all_pairs({.counts = {0, 0, 0}, .n = 16, .k = 16, .spare_rows = 4}, Values::kIntegers);
  for_all_pairs({.counts = std::vector<std::int64_t>(129, 1), .n = 8, .k = 24}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, ExactOnIntegersForAnyLayout) {
  for (const Place& place : places(DType::kU8))
    for (bool gather : {false, true})
      for (std::int64_t k : {2, 64, 200})
        for_all_pairs({.counts = {2, 9, 0, 33},
                       .n = 37,
                       .k = k,
                       .spare_rows = 3,
                       .gather = gather,
                       .as_bytes = place.byte_offset == 0,
                       .place = place},
                      Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, GlobalScaleForNoneOneOrEachExpert) {
  for (Global global : {Global::kNone, Global::kOne, Global::kPerExpert})
    for (const FormatPair& p : pairs()) {
      const GemmCase c{.counts = {5, 0, 2, 1}, .n = 40, .k = 96, .gather = true, .global = global};
      expect_gemm(p, c, Values::kIntegers);
      expect_gemm(p, c, Values::kRandom);
    }
}

TEST_P(GroupedGemmQuantized, RandomWithinTheBound) {
  for (auto [n, k] : {std::pair<std::int64_t, std::int64_t>{64, 64}, {130, 1000}, {256, 2048}, {33, 4100}})
    for_all_pairs({.counts = {1, 0, 4, 20}, .n = n, .k = k}, Values::kRandom);
  for_all_pairs({.counts = {1}, .n = 300, .k = 512}, Values::kRandom);
  for_all_pairs({.counts = {64, 64}, .n = 96, .k = 320, .gather = true}, Values::kRandom);
}

TEST_P(GroupedGemmQuantized, ExtremeScales) {
  for (const FormatPair& p : pairs())
    if (has_e8m0(p.x) || has_e8m0(p.weights))
      expect_gemm(p, {.counts = {1, 0, 9}, .n = 37, .k = 130}, Values::kExtreme);
}

TEST_P(GroupedGemmQuantized, NoDepthGivesTheBias) {
  for (std::optional<DType> bias : {std::optional<DType>{}, std::optional{DType::kF32}})
    for_all_pairs({.counts = {2, 0, 5}, .n = 9, .k = 0, .bias = bias}, Values::kIntegers);
  for_all_pairs({.counts = {2, 3}, .n = 0, .k = 16}, Values::kIntegers);
}

TEST_P(GroupedGemmQuantized, BiasRowWeightsAndActivation) {
  for (const FormatPair& p : pairs()) {
    for (DType bias : {DType::kF32, dtype()}) {
      GemmCase c{.counts = {1, 6, 0, 21}, .n = 50, .k = 136, .spare_rows = 2, .gather = true, .bias = bias};
      c.row_weights = true;
      expect_gemm(p, c, Values::kIntegers);
      expect_gemm(p, c, Values::kRandom);
    }
    for (GateOrder order :
         {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain})
      for (std::int64_t n : {2, 34, 260}) {
        GemmCase c{.counts = {1, 5, 0, 18}, .n = n, .k = 64, .gather = true, .bias = DType::kF32};
        c.activation = Activation{.order = order};
        expect_gemm(p, c, Values::kRandom);
        c.activation = Activation{.kind = ActivationKind::kRelu, .order = order};
        expect_gemm(p, c, Values::kIntegers);
      }
    GemmCase c{.counts = {1, 0, 18}, .n = 60, .k = 96, .gather = true, .bias = dtype()};
    c.activation = Activation::gpt_oss();
    expect_gemm(p, c, Values::kRandom);
  }
}

// A code or a scale that is NaN is one, and stays where it belongs.
TEST_P(GroupedGemmQuantized, NanStaysInItsRowAndColumn) {
  const std::int64_t num_experts = 2, n = 140, k = 256, num_rows = 5, bad_row = 3, bad_col = 129;
  const Array offsets({num_experts + 1}, {0, 2, 5});
  for (const FormatPair& p : pairs())
    for (bool in_scales : {false, true}) {
      SCOPED_TRACE(::testing::Message() << p.name << (in_scales ? " scales" : " codes"));
      Random random(3);
      Operand x({.format = p.x, .float_type = dtype(), .shape = {num_rows, k}}, random),
          weights({.format = p.weights, .float_type = dtype(), .shape = {num_experts, n, k}}, random);
      auto spoil = [&](Operand& o, const Format& f, std::int64_t e, std::int64_t row) {
        if (!f) {
          o.values[row * k + 5] = std::nan("");
        } else if (in_scales) {
          const bool tensor = o.scales.shape[1] == 1;
          o.scales.at(e, tensor ? 0 : row / o.block_rows, 0) = std::nan("");
          o.decode();
        } else if (!is_fp4(f)) {
          const std::int64_t rows = o.values.size() / k / o.scales.shape[0];
          o.codes[static_cast<std::size_t>((e * rows + row) * k + 5)] = 0xFF;
          o.decode();
        }
      };
      spoil(x, p.x, 0, bad_row);
      spoil(weights, p.weights, 1, bad_col);
      x.upload(device());
      weights.upload(device());
      const Tensor offset_tensor(device(), DType::kI32, offsets);
      Tensor out(device(), dtype(), {num_rows, n});
      grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out,
                   {.x_scales = x.scale_view(), .weight_scales = weights.scale_view()},
                   Call(device(), workspace(p, num_rows, n, k, num_experts)));
      const Bounded expected = oracle::grouped_gemm(x.values, weights.values, offsets, num_rows, {});
      EXPECT_TRUE(equal(out.get(), oracle::round_to(dtype(), expected.value)));
    }
}

TEST_P(GroupedGemmQuantized, BitsDoNotDependOnThreadsOrRepeats) {
  const std::int64_t num_experts = 6, n = 200, k = 334, num_rows = 90;
  const Array offsets({num_experts + 1}, {0, 1, 1, 20, 25, 80, 88});
  const Tensor offset_tensor(device(), DType::kI32, offsets);
  for (const FormatPair& p : pairs()) {
    SCOPED_TRACE(p.name);
    Random random(8);
    Operand x({.format = p.x, .float_type = dtype(), .shape = {num_rows, k}, .values = Values::kRandom},
              random),
        weights({.format = p.weights,
                 .float_type = dtype(),
                 .shape = {num_experts, n, k},
                 .values = Values::kRandom},
                random);
    x.upload(device());
    weights.upload(device());
    std::optional<Array> first;
    for (int threads : {1, 2, 5, 3}) {
      Tensor out(device(), dtype(), {num_rows, n});
      grouped_gemm(x.view(), weights.view(), offset_tensor.read_only(), out,
                   {.x_scales = x.scale_view(), .weight_scales = weights.scale_view()},
                   Call(device(), workspace(p, num_rows, n, k, num_experts), threads));
      if (!first)
        first = out.get();
      else
        EXPECT_TRUE(equal(out.get(), *first)) << threads << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, GroupedGemmQuantized, ::testing::ValuesIn(devices_times(float_types())),
                         device_dtype_name);

}  // namespace
}  // namespace moecore::test
