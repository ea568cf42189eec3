#pragma once
// Launch policies from a file, named by the environment variable MOECORE_TUNING. A line is
//
//   <op> <size><relation><value> ... : <knob>=<value> ...
//   finalize rows>=65 rows<=256 width=4096 sms=132 : slots=4 threads=64
//
// and holds for calls of the op whose sizes satisfy every condition (relations =, <=, >=). Of several lines
// that hold, the last one counts; "#" begins a comment. `moecore tune` writes such files.

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moecore {

/// What a line may ask about a call. An op sets what it has; the rest is 0.
struct TuningSizes {
  std::int64_t rows = 0;        // rows, tokens or routes that the op works on
  std::int64_t width = 0;       // columns of the output; permute: bytes of a row
  std::int64_t depth = 0;       // grouped_gemm: K
  std::int64_t experts = 0;     // E
  std::int64_t sms = 0;         // of the device
  std::int64_t capability = 0;  // of the device: 90 for 9.0

  using Member = std::int64_t TuningSizes::*;
};

struct TuningRule {
  enum class Relation { kEqual, kAtMost, kAtLeast };
  struct Condition {
    TuningSizes::Member size;
    Relation relation;
    std::int64_t value;
  };

  std::string op;
  std::vector<Condition> conditions;
  std::string policy;  // "slots=4 threads=64"

  bool matches(const TuningSizes& sizes) const {
    return std::all_of(conditions.begin(), conditions.end(), [&](const Condition& c) {
      const std::int64_t size = sizes.*c.size;
      return c.relation == Relation::kEqual    ? size == c.value
             : c.relation == Relation::kAtMost ? size <= c.value
                                               : size >= c.value;
    });
  }
};

/// Throws InvalidArgument "<name>:<line>: ..." for a line that is none.
std::vector<TuningRule> parse_tuning(std::string_view text, std::string_view name);

/// The rules of a file. Throws InvalidArgument for one that cannot be read.
std::vector<TuningRule> read_tuning(const std::string& path);

/// The rules of MOECORE_TUNING, read at the first call of an op that has policies; none without it.
std::span<const TuningRule> tuning_rules();

}  // namespace moecore
