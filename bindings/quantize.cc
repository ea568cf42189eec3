// quantize, dequantize and their helpers. Formats arrive as the fields of moecore.quantize.QuantFormat.

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <string_view>

#include "moecore/quantize.h"
#include "op_call.h"

namespace moecore::python {

Activation parse_activation(const char* op, std::string_view kind, std::string_view order,
                            std::optional<float> alpha, std::optional<float> beta,
                            std::optional<float> limit);

namespace {

using namespace nb::literals;
using OptionalTensor = std::optional<TensorArg>;
using OptionalFloat = std::optional<float>;

ScaleLayout parse_layout(const char* op, const char* argument, std::string_view text) {
  if (text == "linear") return ScaleLayout::kLinear;
  if (text == "swizzled_128x4") return ScaleLayout::kSwizzled128x4;
  if (text == "swizzled_8x4") return ScaleLayout::kSwizzled8x4;
  if (text == "column_major") return ScaleLayout::kColumnMajor;
  throw InvalidArgument(
      std::string(op) + ": " + argument + " is \"" + std::string(text) +
      "\", expected one of \"linear\", \"swizzled_128x4\", \"swizzled_8x4\", \"column_major\"");
}

/// `kind` of fp8 is "fp8_tensor", "fp8_tensor_static", "fp8_token" or "fp8_block128".
QuantFormat parse_format(std::string_view kind, std::string_view layout, std::string_view rounding,
                         bool power_of_two, bool e8m0_scales, OptionalFloat amax_floor,
                         OptionalFloat amax_cap) {
  const ScaleLayout parsed_layout = parse_layout("quantize", "layout", layout);
  QuantFormat format;
  if (kind == "fp8_tensor") {
    format = QuantFormat::fp8_tensor();
  } else if (kind == "fp8_tensor_static") {
    format = QuantFormat::fp8_tensor_static();
  } else if (kind == "fp8_token") {
    format = QuantFormat::fp8_token();
  } else if (kind == "fp8_block128") {
    format = QuantFormat::fp8_block128();
  } else if (kind == "nvfp4") {
    format = QuantFormat::nvfp4();
  } else if (kind == "mxfp8") {
    format = QuantFormat::mxfp8();
  } else if (kind == "mxfp4") {
    format = QuantFormat::mxfp4();
    if (rounding == "up")
      format.mxfp4_rounding = Mxfp4Rounding::kUp;
    else if (rounding == "floor")
      format.mxfp4_rounding = Mxfp4Rounding::kFloor;
    else if (rounding != "nearest_1_75")
      throw InvalidArgument("quantize: rounding is \"" + std::string(rounding) +
                            "\", expected one of \"up\", \"nearest_1_75\", \"floor\"");
  } else {
    throw InvalidArgument("quantize: format is \"" + std::string(kind) +
                          "\", expected one of \"fp8_tensor\", \"fp8_tensor_static\", \"fp8_token\", "
                          "\"fp8_block128\", \"nvfp4\", \"mxfp8\", \"mxfp4\"");
  }
  format.layout = parsed_layout;
  format.power_of_two = power_of_two || e8m0_scales;
  format.e8m0_scales = e8m0_scales;
  if (amax_floor) format.amax_floor = *amax_floor;
  if (amax_cap) format.amax_cap = *amax_cap;
  return format;
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
      .def_prop_ro("layout",
                   [](const QuantFormat& f) -> std::string_view {
                     switch (f.layout) {
                       case ScaleLayout::kLinear:
                         return "linear";
                       case ScaleLayout::kSwizzled128x4:
                         return "swizzled_128x4";
                       case ScaleLayout::kSwizzled8x4:
                         return "swizzled_8x4";
                       default:
                         return "column_major";
                     }
                   })
      .def_prop_ro("is_fp4", [](const QuantFormat& f) { return f.data_dtype() == DType::kE2M1; })
      .def_prop_ro("has_f32_scales", [](const QuantFormat& f) { return f.scale_dtype() == DType::kF32; })
      .def(
          "scale_shape",
          [](const QuantFormat& f, std::int64_t rows, std::int64_t cols) {
            return scale_shape(f, rows, cols);
          },
          "rows"_a, "cols"_a, "Shape of the scales of `rows` dense rows of `cols` padded columns.");
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
          const Activation parsed = parse_activation("quantize", *activation, order, alpha, beta, limit);
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
      [](const TensorArg& src, std::string_view src_layout, const TensorArg& dst, std::string_view dst_layout,
         std::int64_t rows, std::int64_t cols, StreamArg stream) {
        OpCall call("convert_scales", src, stream);
        const TensorView &src_view = call.in("src", src), &dst_view = call.in("dst", dst);
        const ScaleLayout from = parse_layout("convert_scales", "src_layout", src_layout),
                          to = parse_layout("convert_scales", "dst_layout", dst_layout);
        call.run(
            [&](const ExecContext& ctx) { convert_scales(src_view, from, dst_view, to, rows, cols, ctx); });
      },
      "src"_a, "src_layout"_a, "dst"_a, "dst_layout"_a, "rows"_a, "cols"_a, nb::kw_only(),
      "stream"_a = nb::none());
}

}  // namespace moecore::python
