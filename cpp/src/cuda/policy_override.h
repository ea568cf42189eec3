#pragma once
// Changes to a launch policy: ExecContext::policy ("threads=128 unroll=2"), or else what MOECORE_TUNING says
// for the sizes of the call.

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string>
#include <string_view>

#include "core/tuning.h"
#include "moecore/context.h"
#include "moecore/error.h"

namespace moecore::cuda {

/// A field that may be replaced, and the values the kernels take.
struct PolicyKnob {
  std::string_view name;
  int* value;
  std::initializer_list<int> allowed;
};

/// Replaces the fields that `text` names. An entry "op.name=value" is for that op alone: a call that runs
/// other ops hands its text on to them. Throws InvalidArgument for a name or value that is not on offer.
inline void override_policy(std::string_view op, std::string_view text,
                            std::initializer_list<PolicyKnob> knobs) {
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find(' '));
    text.remove_prefix(std::min(text.size(), entry.size() + 1));
    if (entry.empty()) continue;
    const std::size_t equals = entry.find('=');
    std::string_view name = entry.substr(0, equals);
    if (const std::size_t dot = name.find('.'); dot != name.npos) {
      if (name.substr(0, dot) != op) continue;
      name.remove_prefix(dot + 1);
    }
    int value = 0;
    bool taken = false;
    if (equals != std::string_view::npos) {
      const char* end = entry.data() + entry.size();
      const auto [rest, error] = std::from_chars(entry.data() + equals + 1, end, value);
      for (const PolicyKnob& knob : knobs) {
        if (knob.name != name || error != std::errc() || rest != end) continue;
        taken = std::find(knob.allowed.begin(), knob.allowed.end(), value) != knob.allowed.end();
        if (taken) *knob.value = value;
      }
    }
    if (taken) continue;
    std::string message(op);
    message.append(": policy is \"").append(entry).append("\", expected one of");
    for (const PolicyKnob& knob : knobs) {
      message.append(" ").append(knob.name).append("=");
      const char* separator = "";
      for (int v : knob.allowed) {
        message.append(separator).append(std::to_string(v));
        separator = "|";
      }
    }
    throw InvalidArgument(message);
  }
}

/// choose(text) for the text that holds for this call: the caller's, or the last line of MOECORE_TUNING that
/// matches `sizes`. A line that `choose` refuses is passed over: a file speaks of sizes, not of alignments.
template <class Choose>
auto tuned(std::string_view op, const TuningSizes& sizes, const ExecContext& ctx, Choose&& choose) {
  const std::span<const TuningRule> rules =
      ctx.policy.empty() ? tuning_rules() : std::span<const TuningRule>();
  for (auto rule = rules.rbegin(); rule != rules.rend(); ++rule) {
    if (rule->op != op || !rule->matches(sizes)) continue;
    try {
      return choose(std::string_view(rule->policy));
    } catch (const InvalidArgument&) {
      break;
    }
  }
  return choose(ctx.policy);
}

}  // namespace moecore::cuda
