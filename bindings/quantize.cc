// quantize, dequantize and their helpers. Formats arrive as the fields of moecore.quantize.QuantFormat.

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "choices.h"
#include "moecore/quantize.h"
#include "op_call.h"

namespace moecore::python {

Activation parse_activation(const char* op, const char* argument, std::string_view kind,
                            std::string_view order, std::optional<float> alpha, std::optional<float> beta,
                            std::optional<float> limit);

namespace {

using namespace nb::literals;
using OptionalTensor = std::optional<TensorArg>;
using OptionalFloat = std::optional<float>;

const Choices<ScaleLayout> kLayouts = {{"linear", ScaleLayout::kLinear},
                                       {"swizzled_128x4", ScaleLayout::kSwizzled128x4},
                                       {"swizzled_8x4", ScaleLayout::kSwizzled8x4},
                                       {"column_major", ScaleLayout::kColumnMajor}};
const Choices<Mxfp4Rounding> kRoundings = {{"up", Mxfp4Rounding::kUp},
                                           {"nearest_1_75", Mxfp4Rounding::kNearest175},
                                           {"floor", Mxfp4Rounding::kFloor}};

/// Every kind, with the values of what is left out.
const Choices<QuantFormat>& kinds() {
  static const Choices<QuantFormat> all = {{"fp8_tensor", QuantFormat::fp8_tensor()},
                                           {"fp8_tensor_static", QuantFormat::fp8_tensor_static()},
                                           {"fp8_token", QuantFormat::fp8_token()},
                                           {"fp8_block128", QuantFormat::fp8_block128()},
                                           {"nvfp4", QuantFormat::nvfp4()},
                                           {"mxfp8", QuantFormat::mxfp8()},
                                           {"mxfp4", QuantFormat::mxfp4()}};
  return all;
}

const std::pair<std::string_view, QuantFormat>& kind_of(const QuantFormat& f) {
  return *std::find_if(kinds().begin(), kinds().end(), [&](const auto& entry) {
    const QuantFormat& k = entry.second;
    return k.kind == f.kind && k.granularity == f.granularity && k.static_scale == f.static_scale;
  });
}

QuantFormat parse_format(std::string_view kind, std::string_view layout, std::string_view rounding,
                         bool power_of_two, bool e8m0_scales, OptionalFloat amax_floor,
                         OptionalFloat amax_cap) {
  QuantFormat format = parse("quantize", "format", kind, kinds());
  format.layout = parse("quantize", "layout", layout, kLayouts);
  const Mxfp4Rounding parsed_rounding = parse("quantize", "rounding", rounding, kRoundings);
  if (format.kind == QuantKind::kMxfp4) format.mxfp4_rounding = parsed_rounding;
  format.power_of_two = power_of_two || e8m0_scales;
  format.e8m0_scales = e8m0_scales;
  if (amax_floor) format.amax_floor = *amax_floor;
  if (amax_cap) format.amax_cap = *amax_cap;
  return format;
}

// The call that makes the format, with what differs from the defaults: equal formats have equal texts.
std::string repr(const QuantFormat& f) {
  const auto& [kind, plain] = kind_of(f);
  std::string text = "QuantFormat('" + std::string(kind) + "'";
  auto option = [&](const char* name, const nb::object& value) {
    text.append(", ").append(name).append("=").append(nb::repr(value).c_str());
  };
  auto named = [](std::string_view name) { return nb::str(name.data(), name.size()); };
  if (f.layout != ScaleLayout::kLinear) option("layout", named(name_of(f.layout, kLayouts)));
  if (f.mxfp4_rounding != plain.mxfp4_rounding)
    option("rounding", named(name_of(f.mxfp4_rounding, kRoundings)));
  if (f.power_of_two && !f.e8m0_scales) option("power_of_two", nb::bool_(true));
  if (f.e8m0_scales) option("e8m0_scales", nb::bool_(true));
  if (f.amax_floor != plain.amax_floor) option("amax_floor", nb::float_(f.amax_floor));
  if (f.amax_cap != plain.amax_cap) option("amax_cap", nb::float_(f.amax_cap));
  return text + ")";
}

// The arguments of parse_format().
using FormatState = std::tuple<std::string, std::string, std::string, bool, bool, float, float>;

FormatState state_of(const QuantFormat& f) {
  return {std::string(kind_of(f).first),
          std::string(name_of(f.layout, kLayouts)),
          std::string(name_of(f.mxfp4_rounding, kRoundings)),
          f.power_of_two,
          f.e8m0_scales,
          f.amax_floor,
          f.amax_cap};
}

}  // namespace

void bind_quantize(nb::module_& m) {
  nb::class_<QuantFormat>(m, "QuantFormat", "A quantised format and where its scales stand.")
      .def(
          "__init__",
          [](QuantFormat* self, std::string_view kind, std::string_view layout, std::string_view rounding,
             bool power_of_two, bool e8m0_scales, OptionalFloat amax_floor, OptionalFloat amax_cap) {
            new (self) QuantFormat(
                parse_format(kind, layout, rounding, power_of_two, e8m0_scales, amax_floor, amax_cap));
          },
          "kind"_a, nb::kw_only(), "layout"_a = "linear", "rounding"_a = "nearest_1_75",
          "power_of_two"_a = false, "e8m0_scales"_a = false, "amax_floor"_a = nb::none(),
          "amax_cap"_a = nb::none())
      .def_prop_ro("block", &QuantFormat::block, "Columns that share a scale; 0 for a whole row or tensor.")
      .def_prop_ro(
          "kind", [](const QuantFormat& f) { return kind_of(f).first; }, "The name that makes such a format.")
      .def_prop_ro("layout", [](const QuantFormat& f) { return name_of(f.layout, kLayouts); })
      .def_prop_ro("is_fp4", [](const QuantFormat& f) { return f.data_dtype() == DType::kE2M1; })
      .def_prop_ro("has_f32_scales", [](const QuantFormat& f) { return f.scale_dtype() == DType::kF32; })
      .def(
          "scale_shape",
          [](const QuantFormat& f, std::int64_t rows, std::int64_t cols) {
            return scale_shape(f, rows, cols);
          },
          "rows"_a, "cols"_a, "Shape of the scales of `rows` dense rows of `cols` padded columns.")
      .def("__repr__", &repr)
      .def(
          "__eq__", [](const QuantFormat& a, const QuantFormat& b) { return repr(a) == repr(b); },
          nb::is_operator(), nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__hash__", [](const QuantFormat& f) { return std::hash<std::string>()(repr(f)); })
      .def("__getstate__", &state_of)
      .def("__setstate__", [](QuantFormat* self, const FormatState& state) {
        new (self) QuantFormat(std::apply(parse_format, state));
      });
  m.def("expert_scale_rows", &expert_scale_rows, "rows"_a, "num_experts"_a);
  m.def(
      "quantize",
      [](const TensorArg& x, const TensorArg& data, const TensorArg& scales, const QuantFormat& format,
         const OptionalTensor& global_scale, const OptionalTensor& expert_offsets,
         const OptionalTensor& scale_offsets, const OptionalTensor& row_counts,
         const OptionalTensor& row_token, const OptionalTensor& slot_row,
         std::optional<std::string_view> activation, std::string_view order, OptionalFloat alpha,
         OptionalFloat beta, OptionalFloat limit, StreamArg stream) {
        OpCall call("quantize", x, stream);
        const TensorView &x_view = call.in("x", x), &data_view = call.in("data", data),
                         &scales_view = call.in("scales", scales);
        const QuantizeOptions options{.rows = {.expert_offsets = call.in("expert_offsets", expert_offsets),
                                               .scale_offsets = call.in("scale_offsets", scale_offsets),
                                               .row_counts = call.in("row_counts", row_counts)},
                                      .global_scale = call.in("global_scale", global_scale)};
        if (slot_row && row_token && expert_offsets) {
          Plan plan;
          plan.expert_offsets = *options.rows.expert_offsets;
          if (options.rows.scale_offsets) plan.scale_offsets = *options.rows.scale_offsets;
          plan.row_token = call.in("row_token", *row_token);
          plan.slot_row = call.in("slot_row", *slot_row);
          call.run([&](const ExecContext& ctx) {
            permute_quantize(x_view, plan, data_view, scales_view, format,
                             {.global_scale = options.global_scale}, ctx);
          });
        } else if (activation) {
          const Activation parsed =
              parse_activation("quantize", "activation", *activation, order, alpha, beta, limit);
          call.run([&](const ExecContext& ctx) {
            activate_quantize(x_view, parsed, data_view, scales_view, format, options, ctx);
          });
        } else {
          call.run([&](const ExecContext& ctx) {
            quantize(x_view, data_view, scales_view, format, options, ctx);
          });
        }
      },
      "x"_a, "data"_a, "scales"_a, "format"_a, nb::kw_only(), "global_scale"_a = nb::none(),
      "expert_offsets"_a = nb::none(), "scale_offsets"_a = nb::none(), "row_counts"_a = nb::none(),
      "row_token"_a = nb::none(), "slot_row"_a = nb::none(), "activation"_a = nb::none(),
      "order"_a = "gate_up", "alpha"_a = nb::none(), "beta"_a = nb::none(), "limit"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "dequantize",
      [](const TensorArg& data, const TensorArg& scales, const TensorArg& out, const QuantFormat& format,
         const OptionalTensor& global_scale, const OptionalTensor& expert_offsets,
         const OptionalTensor& scale_offsets, const OptionalTensor& row_counts, StreamArg stream) {
        OpCall call("dequantize", data, stream);
        const TensorView &data_view = call.in("data", data), &scales_view = call.in("scales", scales),
                         &out_view = call.in("out", out);
        const QuantizeOptions options{.rows = {.expert_offsets = call.in("expert_offsets", expert_offsets),
                                               .scale_offsets = call.in("scale_offsets", scale_offsets),
                                               .row_counts = call.in("row_counts", row_counts)},
                                      .global_scale = call.in("global_scale", global_scale)};
        call.run([&](const ExecContext& ctx) {
          dequantize(data_view, scales_view, out_view, format, options, ctx);
        });
      },
      "data"_a, "scales"_a, "out"_a, "format"_a, nb::kw_only(), "global_scale"_a = nb::none(),
      "expert_offsets"_a = nb::none(), "scale_offsets"_a = nb::none(), "row_counts"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "global_scale",
      [](const TensorArg& x, const TensorArg& out, const OptionalTensor& expert_offsets,
         const OptionalTensor& row_counts, StreamArg stream) {
        OpCall call("global_scale", x, stream);
        const TensorView &x_view = call.in("x", x), &out_view = call.in("out", out);
        const ExpertRows rows{.expert_offsets = call.in("expert_offsets", expert_offsets),
                              .row_counts = call.in("row_counts", row_counts)};
        call.run([&](const ExecContext& ctx) { global_scale(x_view, out_view, rows, ctx); });
      },
      "x"_a, "out"_a, nb::kw_only(), "expert_offsets"_a = nb::none(), "row_counts"_a = nb::none(),
      "stream"_a = nb::none());
  m.def(
      "convert_scales",
      [](const TensorArg& scales, std::string_view source, const TensorArg& out, std::string_view target,
         std::int64_t rows, std::int64_t cols, StreamArg stream) {
        OpCall call("convert_scales", scales, stream);
        const TensorView &scales_view = call.in("scales", scales), &out_view = call.in("out", out);
        const ScaleLayout from = parse("convert_scales", "source", source, kLayouts),
                          to = parse("convert_scales", "target", target, kLayouts);
        call.run([&](const ExecContext& ctx) {
          convert_scales(scales_view, from, out_view, to, rows, cols, ctx);
        });
      },
      "scales"_a, "source"_a, "out"_a, "target"_a, "rows"_a, "cols"_a, nb::kw_only(),
      "stream"_a = nb::none());
}

}  // namespace moecore::python
