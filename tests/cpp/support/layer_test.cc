#include "support/layer_test.h"

#include <cmath>
#include <utility>

#include "moecore/finalize.h"
#include "moecore/grouped_gemm.h"
#include "moecore/permute.h"
#include "moecore/plan.h"
#include "support/oracle.h"

namespace moecore::test {

double roundoff(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}

std::ostream& operator<<(std::ostream& out, const LayerCase& c) {
  return out << c.routing << " H=" << c.hidden << " I=" << c.inter << " kind "
             << static_cast<int>(c.activation.kind) << " order " << static_cast<int>(c.activation.order)
             << (c.bias ? " bias" : "") << (c.weight_on_input ? " weight on input" : "")
             << (c.residual ? " residual" : "") << (c.expert_map ? " map" : "") << " first " << c.first_expert
             << " " << c.place.name;
}

Layer::Layer(const LayerCase& c, Device device, DType dtype, Random random)
    : x(random.floats({c.routing.num_tokens, c.hidden}, dtype)),
      weights(random.floats({c.routing.num_tokens, c.routing.top_k}, c.weight_type, 0, 1)),
      ids(c.routing.ids()),
      w13(random.floats({c.num_experts(), c.activation.gated() ? 2 * c.inter : c.inter, c.hidden}, dtype,
                        -0.3, 0.3)),
      w2(random.floats({c.num_experts(), c.hidden, c.inter}, dtype, -0.3, 0.3)),
      x_tensor(device, dtype, x, c.place),
      weight_tensor(device, c.weight_type, weights),
      id_tensor(device, c.id_type, ids),
      w13_tensor(device, dtype, w13, c.place),
      w2_tensor(device, dtype, w2, c.place) {
  if (c.bias) {
    w13_bias = random.floats({c.num_experts(), w13.shape[1]}, *c.bias, -0.5, 0.5);
    w2_bias = random.floats({c.num_experts(), c.hidden}, *c.bias, -0.5, 0.5);
    w13_bias_tensor.emplace(device, *c.bias, *w13_bias);
    w2_bias_tensor.emplace(device, *c.bias, *w2_bias);
  }
  if (c.residual) {
    residual = random.floats({c.routing.num_tokens, c.hidden}, dtype);
    residual_tensor.emplace(device, dtype, *residual, c.place);
  }
  if (c.expert_map) {
    Array map({static_cast<std::int64_t>(c.expert_map->size())});
    for (std::int64_t i = 0; i < map.size(); ++i) map[i] = (*c.expert_map)[static_cast<std::size_t>(i)];
    map_tensor.emplace(device, DType::kI32, map);
  }
}

Array LayerTest::run(const LayerCase& c, const Layer& layer, int num_threads, std::string_view policy) {
  const RoutingCase& r = c.routing;
  Tensor out(device(), dtype(), {r.num_tokens, c.hidden}, c.place);
  Call call(device(),
            fused_experts_workspace_bytes(r.num_tokens, r.top_k, c.num_experts(), c.hidden, c.inter, dtype(),
                                          device()),
            num_threads);
  call.context().policy = policy;
  fused_experts(layer.x_tensor.read_only(), layer.weight_tensor.read_only(), layer.id_tensor.read_only(),
                layer.experts(c.activation), out,
                {.expert_map = Layer::view(layer.map_tensor),
                 .first_expert = c.first_expert,
                 .apply_router_weight_on_input = c.weight_on_input,
                 .residual = Layer::view(layer.residual_tensor)},
                call);
  EXPECT_TRUE(out.surroundings_intact());
  EXPECT_TRUE(call.workspace_intact());
  return out.get();
}

Array LayerTest::compose(const LayerCase& c, const Layer& layer) {
  const std::int64_t t = c.routing.num_tokens, k = c.routing.top_k, e = c.num_experts(), rows = t * k;
  auto i32 = [&](std::vector<std::int64_t> shape) { return Tensor(device(), DType::kI32, std::move(shape)); };
  Tensor offsets = i32({e + 1}), scales = i32({e + 1}), row_token = i32({rows}), slot_row = i32({t, k}),
         row_route = i32({rows});
  plan(layer.id_tensor.read_only(), {offsets, scales, row_token, slot_row, row_route},
       {.num_experts = e, .expert_map = Layer::view(layer.map_tensor), .first_expert = c.first_expert},
       Call(device(), plan_workspace_bytes(t, k, e, device())));
  GroupedGemmOptions gemm1{.bias = Layer::view(layer.w13_bias_tensor),
                           .row_token = row_token.read_only(),
                           .activation = c.activation};
  Tensor row_weights(device(), c.weight_type, {rows, 1});
  if (c.weight_on_input) {
    const Tensor by_route(device(), c.weight_type, Array({rows, 1}, layer.weights.values));
    shuffle_rows(by_route.read_only(), row_route.read_only(), row_weights, Call(device()));
    TensorView flat = row_weights.read_only();
    flat.ndim = 1;
    flat.strides[0] = 1;
    gemm1.row_weights = flat;
  }
  auto gemm = [&](const TensorView& a, const Tensor& b, Tensor& to, const GroupedGemmOptions& options) {
    const TensorView w = b.view();
    grouped_gemm(
        a, b.read_only(), offsets.read_only(), to, options,
        Call(device(), grouped_gemm_workspace_bytes(rows, w.shape[1], w.shape[2], e, dtype(), device())));
  };
  Tensor inter_rows(device(), dtype(), {rows, c.inter}), out_rows(device(), dtype(), {rows, c.hidden}),
      out(device(), dtype(), {t, c.hidden});
  gemm(layer.x_tensor.read_only(), layer.w13_tensor, inter_rows, gemm1);
  gemm(inter_rows.read_only(), layer.w2_tensor, out_rows, {.bias = Layer::view(layer.w2_bias_tensor)});
  FinalizeOptions last{.residual = Layer::view(layer.residual_tensor)};
  if (!c.weight_on_input) last.weights = layer.weight_tensor.read_only();
  finalize(out_rows.read_only(), slot_row.read_only(), out, last, Call(device()));
  return out.get();
}

Bounded LayerTest::reference(const LayerCase& c, const Layer& layer, int scale_roundings) {
  const std::int64_t t = c.routing.num_tokens, k = c.routing.top_k, rows = t * k;
  const oracle::PlanResult p = oracle::plan(
      layer.ids,
      {.num_experts = c.num_experts(), .expert_map = c.expert_map, .first_expert = c.first_expert});
  oracle::GemmSpec gemm1{.bias = layer.w13_bias,
                         .row_token = p.row_token,
                         .activation = c.activation,
                         .scale_roundings = scale_roundings};
  if (c.weight_on_input) {
    gemm1.row_weights = Array({rows});
    for (std::int64_t r = 0; r < rows; ++r)
      if (p.row_route[r] >= 0)
        (*gemm1.row_weights)[r] = layer.weights[static_cast<std::int64_t>(p.row_route[r])];
  }
  const double u = roundoff(dtype());
  auto after_rounding = [&](Bounded& b) {
    for (std::int64_t i = 0; i < b.value.size(); ++i)
      b.bound[i] += u * (std::fabs(b.value[i]) + b.bound[i]) + 0x1p-25;
  };
  Bounded inter = oracle::grouped_gemm(layer.x, layer.w13, p.expert_offsets, rows, gemm1);
  after_rounding(inter);
  Bounded outer = oracle::grouped_gemm(inter.value, layer.w2, p.expert_offsets, rows,
                                       {.bias = layer.w2_bias, .scale_roundings = scale_roundings});
  Array magnitude = layer.w2;
  for (double& v : magnitude.values) v = std::fabs(v);
  const Bounded carried = oracle::grouped_gemm(inter.bound, magnitude, p.expert_offsets, rows, {});
  for (std::int64_t i = 0; i < outer.bound.size(); ++i) outer.bound[i] += carried.value[i] * (1 + 1e-3);
  after_rounding(outer);

  Bounded out{Array({t, c.hidden}), Array({t, c.hidden})};
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t h = 0; h < c.hidden; ++h) {
      double sum = 0, error = 0, absolute = 0;
      for (std::int64_t j = 0; j < k; ++j) {
        const auto row = static_cast<std::int64_t>(p.slot_row.at(i, j));
        if (row < 0) continue;
        const double w = c.weight_on_input ? 1 : layer.weights.at(i, j);
        sum += w * outer.value.at(row, h);
        absolute += std::fabs(w * outer.value.at(row, h));
        error += std::fabs(w) * outer.bound.at(row, h);
      }
      if (c.residual) {
        sum += layer.residual->at(i, h);
        absolute += std::fabs(layer.residual->at(i, h));
      }
      out.value.at(i, h) = sum;
      out.bound.at(i, h) = error + oracle::kF32Roundoff * static_cast<double>(k + 1) * (absolute + error);
    }
  return out;
}

void LayerTest::expect_layer(const LayerCase& c) {
  SCOPED_TRACE(::testing::Message() << c);
  const Layer layer(c, device(), dtype(), Random(17));
  const Array composed = run(c, layer, 0, "fused_experts.fused=0");
  EXPECT_TRUE(equal(composed, compose(c, layer))) << "against the composition of the public ops";
  const Bounded expected = reference(c, layer);
  EXPECT_TRUE(within(composed, expected, dtype())) << "against the layer in double";
  if (device().type == DeviceType::kCUDA) {
    EXPECT_TRUE(within(run(c, layer, 0, kOneKernel), expected, dtype()))
        << "one kernel against the layer in double";
  }
}

std::vector<DeviceDType> one_kernel_types() {
  std::vector<DeviceDType> types;
  for (const DeviceDType& t : devices_times({DType::kF16, DType::kBF16}))
    if (t.device.type == DeviceType::kCUDA) types.push_back(t);
  return types;
}
}  // namespace moecore::test
