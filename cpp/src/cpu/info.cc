#include "ops/info.h"

#include "cpu/isa.h"

namespace moecore::cpu {

std::string isa_name() {
  return std::string(name(active_isa()));
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.emplace_back(name(static_cast<Isa>(i)));
  return names;
}

}  // namespace moecore::cpu
