#pragma once
// A layer of experts as the tests of fused_experts want it: its inputs, the call, the same by the public ops,
// and the layer in double.

#include <cstdint>
#include <optional>
#include <ostream>
#include <string_view>
#include <vector>

#include "moecore/fused_experts.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"

namespace moecore::test {

/// The unit roundoff of a type that an intermediate result is rounded to.
double roundoff(DType dtype);

struct LayerCase {
  RoutingCase routing;
  std::int64_t hidden = 48, inter = 40;
  Activation activation{};
  std::optional<DType> bias{};
  DType weight_type = DType::kF32;
  DType id_type = DType::kI32;
  bool weight_on_input = false;
  bool residual = false;
  std::int64_t first_expert = 0;
  std::optional<std::vector<std::int32_t>> expert_map{};
  std::optional<std::int64_t> num_local{};
  Place place{};

  std::int64_t num_experts() const { return num_local.value_or(routing.num_experts); }
};
std::ostream& operator<<(std::ostream& out, const LayerCase& c);

/// The inputs of one call, on the host and on the device.
struct Layer {
  Array x, weights, ids, w13, w2;
  std::optional<Array> w13_bias, w2_bias, residual;
  Tensor x_tensor, weight_tensor, id_tensor, w13_tensor, w2_tensor;
  std::optional<Tensor> w13_bias_tensor, w2_bias_tensor, residual_tensor, map_tensor;

  Layer(const LayerCase& c, Device device, DType dtype, Random random);

  static std::optional<TensorView> view(const std::optional<Tensor>& t) {
    return t ? std::optional(t->read_only()) : std::nullopt;
  }
  Experts experts(const Activation& activation) const {
    return {w13_tensor.read_only(), w2_tensor.read_only(), view(w13_bias_tensor), view(w2_bias_tensor),
            activation};
  }
};

/// Asks for the kernel that runs a layer in one piece, also where the composition is the faster one.
inline constexpr std::string_view kOneKernel = "fused_experts.fused=1";

class LayerTest : public OnDeviceDType {
 protected:
  Array run(const LayerCase& c, const Layer& layer, int num_threads = 0, std::string_view policy = "");
  Array compose(const LayerCase& c, const Layer& layer);
  /// The layer in double, with the error of each stage carried into the next.
  Bounded reference(const LayerCase& c, const Layer& layer, int scale_roundings = 0);
  void expect_layer(const LayerCase& c);
};

/// Where that kernel may run.
std::vector<DeviceDType> one_kernel_types();

}  // namespace moecore::test
