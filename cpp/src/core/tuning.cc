#include "core/tuning.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

#include "moecore/error.h"
#include "moecore/info.h"

namespace moecore {
namespace {

struct SizeName {
  std::string_view name;
  TuningSizes::Member member;
};
constexpr SizeName kSizes[] = {
    {"rows", &TuningSizes::rows},   {"width", &TuningSizes::width},
    {"depth", &TuningSizes::depth}, {"experts", &TuningSizes::experts},
    {"sms", &TuningSizes::sms},     {"capability", &TuningSizes::capability},
};

// Ops with a launch policy.
constexpr std::string_view kOps[] = {"route",    "plan",         "route_plan", "plan_quantize",
                                     "permute",  "activate",     "quantize",   "grouped_gemm",
                                     "finalize", "fused_experts"};

template <class Range, class Name>
std::string listed(const Range& range, Name&& name) {
  std::string text;
  for (const auto& item : range) text.append(text.empty() ? "" : ", ").append(name(item));
  return text;
}

bool parse_number(std::string_view text, std::int64_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty();
}

std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> found;
  constexpr std::string_view kSpace = " \t\r";
  for (std::size_t at = text.find_first_not_of(kSpace); at != text.npos;
       at = text.find_first_not_of(kSpace, at)) {
    const std::size_t end = std::min(text.find_first_of(kSpace, at), text.size());
    found.push_back(text.substr(at, end - at));
    at = end;
  }
  return found;
}

TuningRule parse_line(std::string_view line, const std::string& where) {
  auto refuse = [&](const std::string& what) { throw InvalidArgument(where + ": " + what); };
  const std::size_t colon = line.find(':');
  if (colon == line.npos) refuse("no \":\" between what the line holds for and the policy");
  const auto left = words(line.substr(0, colon)), right = words(line.substr(colon + 1));
  TuningRule rule;
  if (left.empty()) refuse("no op before the \":\"");
  if (std::find(std::begin(kOps), std::end(kOps), left[0]) == std::end(kOps))
    refuse("op is \"" + std::string(left[0]) + "\", expected one of " +
           listed(kOps, [](std::string_view op) { return std::string(op); }));
  rule.op = left[0];
  for (std::size_t i = 1; i < left.size(); ++i) {
    const std::string_view word = left[i];
    const std::size_t at = word.find_first_of("<>=");
    const std::string_view name = word.substr(0, at);
    std::string_view rest = at == word.npos ? "" : word.substr(at);
    TuningRule::Condition condition{nullptr, TuningRule::Relation::kEqual, 0};
    for (const SizeName& size : kSizes)
      if (size.name == name) condition.size = size.member;
    if (rest.substr(0, 2) == "<=") {
      condition.relation = TuningRule::Relation::kAtMost;
      rest.remove_prefix(2);
    } else if (rest.substr(0, 2) == ">=") {
      condition.relation = TuningRule::Relation::kAtLeast;
      rest.remove_prefix(2);
    } else if (rest.substr(0, 1) == "=") {
      rest.remove_prefix(1);
    } else {
      rest = {};
    }
    if (!condition.size || !parse_number(rest, condition.value))
      refuse("condition is \"" + std::string(word) + "\", expected one of " +
             listed(kSizes, [](const SizeName& size) { return std::string(size.name); }) +
             " with =, <= or >= and a number");
    rule.conditions.push_back(condition);
  }
  if (right.empty()) refuse("no policy behind the \":\"");
  for (std::string_view word : right) {
    const std::size_t equals = word.find('=');
    std::int64_t value = 0;
    if (equals == word.npos || equals == 0 || !parse_number(word.substr(equals + 1), value))
      refuse("policy is \"" + std::string(word) + "\", expected <knob>=<number>");
    rule.policy.append(rule.policy.empty() ? "" : " ").append(word);
  }
  return rule;
}

}  // namespace

std::vector<TuningRule> parse_tuning(std::string_view text, std::string_view name) {
  std::vector<TuningRule> rules;
  for (int number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    line = line.substr(0, line.find('#'));
    if (words(line).empty()) continue;
    rules.push_back(parse_line(line, std::string(name) + ":" + std::to_string(number)));
  }
  return rules;
}

std::vector<TuningRule> read_tuning(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  if (!file || !(text << file.rdbuf() || file.peek() == std::ifstream::traits_type::eof()))
    throw InvalidArgument(path + ": cannot be read as a tuning file");
  return parse_tuning(text.str(), path);
}

std::span<const TuningRule> tuning_rules() {
  static const std::vector<TuningRule> rules = [] {
    const char* path = std::getenv("MOECORE_TUNING");
    return path && *path ? read_tuning(path) : std::vector<TuningRule>();
  }();
  return rules;
}

int check_tuning(const std::string& path) {
  return static_cast<int>(read_tuning(path).size());
}

}  // namespace moecore
