#pragma once
// One product as grouped_gemm's tests want it: operands of floats or codes, whatever may go wrong around
// them.

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "moecore/grouped_gemm.h"
#include "support/fixture.h"
#include "support/quantized_operand.h"

namespace moecore::test {

struct GemmCase {
  std::vector<std::int64_t> counts;  // rows of each expert
  std::int64_t n = 64, k = 64;
  std::int64_t spare_rows = 0;  // rows behind expert_offsets[E]
  bool gather = false;
  std::optional<DType> bias{};
  std::optional<DType> row_weights{};
  std::optional<Activation> activation{};
  Global global = Global::kOne;
  bool as_bytes = true;
  Place place{};
  std::string_view policy = "";
};
std::ostream& operator<<(std::ostream& out, const GemmCase& c);

class GemmTest : public OnDeviceDType {
 protected:
  std::size_t workspace(const FormatPair& p, std::int64_t rows, std::int64_t n, std::int64_t k,
                        std::int64_t num_experts) const;

  /// Why the tilings of Hopper's kernels cannot be tested here; empty where they can.
  std::string no_tilings() const;

  /// The product of a case against the one in double: exact for integers, within the bound otherwise.
  void expect_gemm(const FormatPair& p, GemmCase c, Values kind);
};

}  // namespace moecore::test
