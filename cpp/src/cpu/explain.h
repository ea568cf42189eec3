#pragma once
// The line that an op of the CPU engine leaves in ExecContext::explain.

#include <string>
#include <string_view>

#include "cpu/isa.h"
#include "moecore/context.h"

namespace moecore::cpu {

/// Appends "<op>: cpu <isa>, <kernel>, <threads> threads". False when the context asks for no explanation,
/// and the op is to run.
inline bool explain(const ExecContext& ctx, std::string_view op, std::string_view kernel, int threads) {
  if (!ctx.explain) return false;
  std::string& text = *ctx.explain;
  text.append(op).append(": cpu ").append(name(active_isa())).append(", ").append(kernel);
  text.append(", ").append(std::to_string(threads)).append(threads == 1 ? " thread\n" : " threads\n");
  return true;
}

}  // namespace moecore::cpu
