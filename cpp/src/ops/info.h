#pragma once
// What the engines tell about themselves.

#include <string>
#include <vector>

#include "moecore/info.h"

namespace moecore {
namespace cpu {
std::string isa_name();
std::vector<std::string> isa_names();
int default_threads();
Roof measure_roof();
}  // namespace cpu
namespace cuda {
int device_count(std::string* why);
Roof measure_roof(int device);
}  // namespace cuda
}  // namespace moecore
