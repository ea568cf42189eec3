#include "support/quantized_operand.h"

#include <cmath>
#include <cstring>

#include "support/oracle.h"
#include "support/quantize_oracle.h"

namespace moecore::test {
namespace {

// The bytes of one scale.
void append(std::vector<std::byte>& bytes, DType type, double s) {
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

}  // namespace

const std::vector<FormatPair>& format_pairs() {
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
bool has_e8m0(const Format& f) {
  return f && f->scale_dtype() == DType::kE8M0;
}

Operand::Operand(const Spec& spec, Random& random) : spec_(spec) {
  const auto& s = spec.shape;
  experts_ = spec.is_x() ? 1 : s[0];
  rows_ = s[s.size() - 2];
  cols_ = s.back();
  if (!spec.format) {
    values = spec.values == Values::kIntegers ? random.integers(s, -3, 3) : random.floats(s, spec.float_type);
    return;
  }
  draw(random);
  decode();
}

void Operand::poison(std::int64_t index) {
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

void Operand::decode() {
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

void Operand::upload(Device device) {
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

std::optional<OperandScales> Operand::scale_view() const {
  if (!spec_.format) return {};
  OperandScales s{*spec_.format, scales_->read_only()};
  if (global_) s.global_scale = global_->read_only();
  return s;
}

bool Operand::is_tensor() const {
  return spec_.format->kind == QuantKind::kFp8 && spec_.format->granularity == Granularity::kTensor;
}
double Operand::reciprocal(std::int64_t e) const {
  if (global.size() == 0) return 1;
  return static_cast<double>(static_cast<float>(1.0 / global[global.size() > 1 ? e : 0]));
}

void Operand::draw(Random& random) {
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

}  // namespace moecore::test
