#pragma once
// Quantised operands of products: codes and scales as an op takes them, and what their elements stand for,
// decoded here from the definitions of the formats.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "moecore/grouped_gemm.h"
#include "support/fixture.h"

namespace moecore::test {

using Format = std::optional<QuantFormat>;

/// A row of the table of grouped_gemm.h.
struct FormatPair {
  std::string name;
  Format x, weights;
};

/// All of them but the one without a quantised operand.
const std::vector<FormatPair>& format_pairs();

bool is_fp4(const Format& f);
bool has_e8m0(const Format& f);

/// nvfp4's global scale.
enum class Global { kNone, kOne, kPerExpert };

enum class Values {
  kIntegers,  // integers of a few bits, scales that are powers of two near 1: every sum is exact in f32
  kRandom,    // every finite code, scales of any mantissa
  kExtreme,   // e8m0 scales from 2^-100 to 2^100, the same power of two along K
};

/// x [X,K] or weights [E,N,K].
class Operand {
 public:
  struct Spec {
    Format format;
    DType float_type;
    std::vector<std::int64_t> shape;
    Values values = Values::kIntegers;
    Global global = Global::kOne;
    bool as_bytes = true;  // codes and byte-sized scales come as u8
    Place place{};
    bool is_x() const { return shape.size() == 2; }
  };

  Array values;
  std::vector<std::uint8_t> codes;  // one for each element
  Array scales;                     // [E or 1, rows of blocks, blocks along K]
  std::int64_t block_rows = 1, block_cols = 0;
  Array global;  // [E or 1]

  Operand(const Spec& spec, Random& random);

  /// Everything that belongs to a row (of x) or an expert (of weights) becomes NaN, as far as the format has
  /// something of its own for it.
  void poison(std::int64_t index);

  /// The values, after codes or scales were changed by hand.
  void decode();

  /// To the device, from where the views show it.
  void upload(Device device);
  TensorView view() const { return data_->read_only(); }
  std::optional<OperandScales> scale_view() const;

 private:
  bool is_tensor() const;
  double reciprocal(std::int64_t e) const;
  void draw(Random& random);

  Spec spec_;
  std::int64_t experts_ = 1, rows_ = 0, cols_ = 0;
  std::optional<Tensor> data_, scales_, global_;
};

}  // namespace moecore::test
