#include "ops/info.h"

#include <span>

#include "build_config.h"
#include "moecore/error.h"
#include "ops/activate.h"
#include "ops/finalize.h"
#include "ops/grouped_gemm.h"
#include "ops/quantize.h"
#include "ops/route.h"

namespace moecore {
namespace {

struct OpInstances {
  std::string_view op;
  std::span<const DType> dtypes;  // empty: moves any type
};
constexpr OpInstances kInstances[] = {
    {"route", RouteTypes::kRows},
    {"plan", IndexTypes::kRows},
    {"route_plan", RouteTypes::kRows},
    {"permute", {}},
    {"shuffle_rows", {}},
    {"activate", ActivateTypes::kRows},
    {"grouped_gemm", GroupedGemmTypes::kRows},
    {"finalize", FinalizeRowTypes::kRows},
    {"fused_experts", GroupedGemmTypes::kRows},
    {"transpose_experts", {}},
    {"quantize", QuantizeTypes::kRows},
    {"dequantize", QuantizeTypes::kRows},
};

}  // namespace

std::string version() {
  return MOECORE_VERSION;
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> list;
  std::string item;
  for (char c : std::string(MOECORE_CUDA_ARCHS) + ";") {
    if (c != ';') {
      item += c;
    } else if (!item.empty()) {
      list.push_back(item);
      item.clear();
    }
  }
  return list;
}

int cuda_device_count(std::string* why) {
  return cuda::device_count(why);
}

std::string cpu_isa() {
  return cpu::isa_name();
}

std::vector<std::string> cpu_isas() {
  return cpu::isa_names();
}

int cpu_threads() {
  return cpu::default_threads();
}

std::vector<std::string> supported(std::string_view op) {
  for (const OpInstances& row : kInstances) {
    if (row.op != op) continue;
    std::vector<std::string> names;
    for (DType dtype : row.dtypes) names.emplace_back(name(dtype));
    if (names.empty()) names.emplace_back("any");
    return names;
  }
  std::string names;
  for (const OpInstances& row : kInstances) names += (names.empty() ? "" : ", ") + std::string(row.op);
  throw InvalidArgument("supported: op is \"" + std::string(op) + "\", expected one of " + names);
}

Roof measure_roof(Device device) {
  return device.type == DeviceType::kCUDA ? cuda::measure_roof(device.index) : cpu::measure_roof();
}

}  // namespace moecore
