#pragma once
// The values of an enumeration that Python names by strings.

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "moecore/error.h"

namespace moecore::python {

template <class T>
using Choices = std::initializer_list<std::pair<std::string_view, T>>;

/// The value that `text` names, or ValueError with every choice.
template <class T>
T parse(const char* op, const char* argument, std::string_view text, Choices<T> choices) {
  std::string names;
  for (const auto& [name, value] : choices) {
    if (name == text) return value;
    names.append(names.empty() ? "\"" : ", \"").append(name).append("\"");
  }
  throw InvalidArgument(std::string(op) + ": " + argument + " is \"" + std::string(text) +
                        "\", expected one of " + names);
}

/// The name of a value that is one of the choices.
template <class T>
std::string_view name_of(T value, Choices<T> choices) {
  for (const auto& [name, choice] : choices)
    if (choice == value) return name;
  return {};
}

}  // namespace moecore::python
