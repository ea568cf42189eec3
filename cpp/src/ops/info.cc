#include "ops/info.h"

#include "build_config.h"

namespace moecore {

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

Roof measure_roof(Device device) {
  return device.type == DeviceType::kCUDA ? cuda::measure_roof(device.index) : cpu::measure_roof();
}

}  // namespace moecore
