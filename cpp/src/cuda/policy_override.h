#pragma once
// ExecContext::policy: "threads=128 unroll=2" replaces fields of a launch policy. For tuning and tests.

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string>
#include <string_view>

#include "moecore/error.h"

namespace moecore::cuda {

/// A field that may be replaced, and the values the kernels take.
struct PolicyKnob {
  std::string_view name;
  int* value;
  std::initializer_list<int> allowed;
};

/// Replaces the fields that `text` names. Throws InvalidArgument for a name or value that is not on offer.
inline void override_policy(std::string_view op, std::string_view text,
                            std::initializer_list<PolicyKnob> knobs) {
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find(' '));
    text.remove_prefix(std::min(text.size(), entry.size() + 1));
    if (entry.empty()) continue;
    const std::size_t equals = entry.find('=');
    const std::string_view name = entry.substr(0, equals);
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

}  // namespace moecore::cuda
