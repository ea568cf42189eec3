// quantize, dequantize and their helpers on the CPU.
//
// A row is worked on in pieces of kPiece columns, which stay in the L1 cache: largest magnitude of each
// block, scales and factors, codes. The three steps are the kernels of kernels/quantize.inl; where a row's
// codes and scales go is decided here.
//
// Reading a piece from memory and encoding it would take turns, each waiting for the other's resource: so
// what is read next is prefetched line by line while a piece is encoded. Codes of a call whose rows pass
// through the last cache anyway are stored past it.

#include "ops/quantize.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "core/numeric.h"
#include "cpu/explain.h"
#include "cpu/kernels/kernels.h"
#include "cpu/stream.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

constexpr std::int64_t kPiece = 4096;  // columns; a multiple of every block and of kActivatePiece
constexpr std::int64_t kPieceBlocks = kQuantizeBlocks;
constexpr std::int64_t kSlack = 16;             // floats behind an array that vectors may write
constexpr std::int64_t kGrainElements = 32768;  // a task's least work, about 10 us
constexpr std::size_t kMaxThreads = 1024;       // the pool's own limit

static_assert(kPiece == 16 * kPieceBlocks && kPiece % kActivatePiece == 0);

std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b * b;
}

std::int64_t element_bytes(DType dtype) {
  return bit_width(dtype) / 8;
}

/// fp8's clamp of amax; NaN becomes the floor.
float clamp_amax(const QuantFormat& f, float amax) {
  return std::min(amax > f.amax_floor ? amax : f.amax_floor, f.amax_cap);
}

float reciprocal(float scale) {
  return scale == 0.0f ? 0.0f : 1.0f / scale;
}

/// Where row r of the output stands: its expert, and the rows of scales that it counts from.
struct Place {
  std::int64_t expert = 0;
  std::int64_t scale_base = 0;
  std::int64_t scale_row = 0;  // from scale_base
};

Place place_of(const ExpertRowsRef& experts, ScaleLayout layout, std::int64_t row) {
  Place place{.scale_row = row};
  if (experts.row_counts) {
    place.expert = row / experts.group_rows;
    if (is_swizzled(layout)) {
      place.scale_base = place.expert * round_up(experts.group_rows, scale_row_multiple(layout));
      place.scale_row = row % experts.group_rows;
    }
  } else if (experts.expert_offsets) {
    const std::int32_t* ends = experts.expert_offsets + 1;
    place.expert = std::upper_bound(ends, ends + experts.num_experts, row) - ends;
    if (experts.scale_offsets) {
      place.scale_base = experts.scale_offsets[place.expert];
      place.scale_row = row - experts.expert_offsets[place.expert];
    }
  }
  return place;
}

/// Rows that belong to an expert: all below a bound, and with row_counts the first of every group.
std::int64_t rows_bound(const ExpertRowsRef& experts, std::int64_t rows) {
  if (!experts.expert_offsets) return rows;
  return std::clamp<std::int64_t>(experts.expert_offsets[experts.num_experts], 0, rows);
}
bool row_is_live(const ExpertRowsRef& experts, std::int64_t row) {
  return !experts.row_counts || row % experts.group_rows < experts.row_counts[row / experts.group_rows];
}

/// Columns [column, column + n) of source row `row`, activated into `buffer` when the problem asks for it.
const void* source_piece(const QuantizeProblem& p, std::int64_t row, std::int64_t column, std::int64_t n,
                         std::byte* buffer) {
  const std::int64_t bytes = element_bytes(p.dtype);
  const std::byte* x = static_cast<const std::byte*>(p.x) + row * p.x_stride * bytes;
  if (!p.activation) return x + column * bytes;
  // activate() numbers the pieces of a row and writes where the row's column would be.
  const auto out = reinterpret_cast<std::uintptr_t>(buffer) - static_cast<std::uintptr_t>(column * bytes);
  const ActivateProblem activate{.x = x,
                                 .out = reinterpret_cast<void*>(out),
                                 .dtype = p.dtype,
                                 .rows = 1,
                                 .inter = p.cols,
                                 .activation = *p.activation};
  kernels().activate(activate, column / kActivatePiece, (column + n + kActivatePiece - 1) / kActivatePiece);
  return buffer;
}

/// The largest magnitude of some elements that is not NaN (NaN if there is none), and whether all are finite.
struct Largest {
  float amax = numeric::from_bits(numeric::kNanBits);
  bool finite = true;

  void include(const Largest& other) {
    if (other.amax > amax || numeric::is_nan(amax)) amax = other.amax;
    finite = finite && other.finite;
  }
};

/// Of one whole source row.
Largest largest_of_row(const QuantizeProblem& p, std::int64_t row) {
  alignas(64) std::byte buffer[kPiece * sizeof(float)];
  Largest all;
  for (std::int64_t c = 0; c < p.cols; c += kPiece) {
    const std::int64_t n = std::min(kPiece, p.cols - c);
    alignas(64) float amax[1 + kSlack];
    const bool finite = kernels().quantize_amax(p.dtype, source_piece(p, row, c, n, buffer), n, kPiece, amax);
    all.include({amax[0], finite});
  }
  return all;
}

/// The scales of a piece's blocks (as bytes or as floats) and the factors that bring its elements to codes.
struct PieceScales {
  alignas(64) float amax[kPieceBlocks + kSlack];
  alignas(64) float factor[kPieceBlocks + kSlack];
  alignas(64) float floats[kPieceBlocks];
  alignas(64) std::uint8_t bytes[kPieceBlocks + kSlack];

  /// Whether products of elements and factors are bounded as quantize_encode wants it, given that the
  /// elements are all finite.
  bool compute(const QuantFormat& f, std::int64_t blocks, float global) {
    std::fill(amax + blocks, amax + round_up(blocks, kSlack), 0.0f);
    if (f.kind == QuantKind::kNvfp4) return kernels().nvfp4_scales(amax, blocks, global, bytes, factor);
    bool bounded = true;
    if (f.kind == QuantKind::kFp8)
      for (std::int64_t b = 0; b < blocks; ++b) {
        bounded = bounded && amax[b] <= f.amax_cap;
        amax[b] = clamp_amax(f, amax[b]);
      }
    if (f.kind != QuantKind::kFp8 || f.power_of_two) {
      kernels().power_of_two_scales(amax, blocks, power_of_two_rule(f), bytes, factor);
      if (f.scale_dtype() == DType::kF32)
        for (std::int64_t b = 0; b < blocks; ++b) floats[b] = numeric::e8m0_to_f32(bytes[b]);
    } else {
      for (std::int64_t b = 0; b < blocks; ++b) {
        floats[b] = amax[b] / 448.0f;
        factor[b] = reciprocal(floats[b]);
      }
    }
    return bounded;
  }
};

/// Writes the scales of rows where they belong. Swizzled and column-major scales stand in words at a distance
/// that is often a power of two, on lines that neighbouring rows share and that L1 cannot keep from one row
/// to the next: words of a few rows are written together.
class ScaleWriter {
 public:
  explicit ScaleWriter(const ScaleRef& scales) : s_(scales) {}
  ~ScaleWriter() { flush(); }

  /// Blocks [col, col + n) of one row; `n` reaches up to the padding of the last word.
  void write(const Place& place, std::int64_t col, std::int64_t n, const PieceScales& from) {
    auto at = [&](std::int64_t c) { return s_.data + scale_byte(s_, place.scale_base, place.scale_row, c); };
    const bool floats = s_.bytes == 4;
    const void* scales = floats ? static_cast<const void*>(from.floats) : from.bytes;
    if (s_.layout == ScaleLayout::kLinear) {
      std::memcpy(at(col), scales, static_cast<std::size_t>(n * s_.bytes));
      return;
    }
    if (count_ == kRows) flush();
    Row& row = rows_[count_++];
    row.to = at(col);
    row.step = at(col + (floats ? 1 : kScaleWord)) - row.to;
    row.words = floats ? n : (n + kScaleWord - 1) / kScaleWord;
    std::memcpy(row.scales, scales, static_cast<std::size_t>(row.words * 4));
  }

 private:
  static constexpr int kRows = 8;
  struct Row {
    std::byte* to;
    std::int64_t step, words;
    std::byte scales[kPieceBlocks];
  };
  static_assert(kPiece / 128 * sizeof(float) <= kPieceBlocks);

  void flush() {
    std::int64_t words = 0;
    for (int r = 0; r < count_; ++r) words = std::max(words, rows_[r].words);
    for (std::int64_t w = 0; w < words; ++w)
      for (int r = 0; r < count_; ++r)
        if (const Row& row = rows_[r]; w < row.words)
          std::memcpy(row.to + w * row.step, row.scales + w * 4, 4);
    count_ = 0;
  }

  const ScaleRef& s_;
  int count_ = 0;
  Row rows_[kRows];
};

/// Zeroes the scales of rows [begin, end) of one swizzled block.
void zero_scale_rows(const ScaleRef& s, std::int64_t base, std::int64_t begin, std::int64_t end) {
  for (std::int64_t word = 0; word < s.words(); ++word)
    for (std::int64_t row = begin; row < end; ++row)
      std::memset(s.data + scale_byte(s, base, row, word * kScaleWord), 0, kScaleWord);
}

/// Every byte of `scales` that belongs to no row but to the padding.
void zero_padding(const ScaleRef& s, const ExpertRowsRef& experts, std::int64_t rows,
                  const ExecContext& ctx) {
  if (s.layout == ScaleLayout::kColumnMajor) {
    const std::int64_t columns = s.bytes == 4 ? s.cols : s.words();
    for (std::int64_t c = 0; c < columns && rows < s.rows; ++c)
      std::memset(s.data + c * s.pitch + rows * 4, 0, static_cast<std::size_t>((s.rows - rows) * 4));
  }
  if (!is_swizzled(s.layout)) return;
  const std::int64_t multiple = scale_row_multiple(s.layout);
  if (!experts.num_experts) return zero_scale_rows(s, 0, rows, round_up(rows, multiple));
  parallel_chunks(ctx, experts.num_experts, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) {
      if (experts.row_counts) {
        const std::int64_t padded = round_up(experts.group_rows, multiple);
        const std::int64_t count = std::clamp<std::int64_t>(experts.row_counts[e], 0, experts.group_rows);
        zero_scale_rows(s, e * padded, count, padded);
      } else {
        const std::int32_t base = experts.scale_offsets[e];
        zero_scale_rows(s, base, experts.expert_offsets[e + 1] - experts.expert_offsets[e],
                        experts.scale_offsets[e + 1] - base);
      }
    }
  });
}

/// Quantises one source row and writes it to `count` rows of the output.
class RowQuantizer {
 public:
  /// `tensor_factor` is for the fp8 tensor format alone.
  RowQuantizer(const QuantizeProblem& p, float tensor_factor) : p_(p) { scales_.factor[0] = tensor_factor; }
  ~RowQuantizer() {
    if (streams_) stream_fence();
  }

  /// `next_source` is the row that comes after this one.
  void run(std::int64_t source, std::int64_t next_source, const std::int64_t* targets, std::int64_t count) {
    if (by_row_) row_scale(source);
    for (std::int64_t c = 0; c < p_.padded_cols; c += kPiece) {
      const std::int64_t padded = std::min(kPiece, p_.padded_cols - c);
      const std::int64_t n = std::clamp<std::int64_t>(p_.cols - c, 0, padded);
      const void* x = n > 0 ? source_piece(p_, source, c, n, buffer_) : nullptr;
      if (block_ > 0)
        block_scales(x, n, padded, targets[0]);
      else if (!by_row_ && n > 0)
        bounded_ = tensor_is_bounded(x, n);
      std::uint8_t* codes = streams_ ? codes_ : data(targets[0], c);
      kernels().quantize_encode(p_.dtype, e2m1_, bounded_, x, n, block_ > 0 ? block_ : kPiece, scales_.factor,
                                p_.activation ? x : next_piece(source, next_source, c), codes);
      const std::size_t used = static_cast<std::size_t>(code_bytes(n)),
                        all = static_cast<std::size_t>(code_bytes(padded));
      std::memset(codes + used, 0, all - used);
      for (std::int64_t j = 0; j < count; ++j) {
        store_codes(codes, data(targets[j], c), all);
        if (block_ > 0) writer_.write(place(targets[j]), c / block_, stored_blocks(c, padded), scales_);
      }
    }
    if (by_row_)
      for (std::int64_t j = 0; j < count; ++j) writer_.write(place(targets[j]), 0, 1, scales_);
  }

 private:
  std::uint8_t* data(std::int64_t row, std::int64_t column) const {
    return p_.data + row * p_.data_pitch + (e2m1_ ? column / 2 : column);
  }
  std::int64_t code_bytes(std::int64_t n) const { return e2m1_ ? (n + 1) / 2 : n; }
  Place place(std::int64_t row) const { return place_of(p_.experts, p_.scales.layout, row); }

  void store_codes(const std::uint8_t* codes, std::uint8_t* to, std::size_t bytes) const {
    if (streams_)
      stream_copy(reinterpret_cast<std::byte*>(to), reinterpret_cast<const std::byte*>(codes), bytes);
    else if (to != codes)
      std::memcpy(to, codes, bytes);
  }

  /// What is read after piece c of a row: the piece behind it, or the same one of the next row where all
  /// pieces have been read for the row's scale.
  const void* next_piece(std::int64_t row, std::int64_t next_row, std::int64_t c) const {
    if (by_row_)
      row = next_row;
    else if ((c += kPiece) >= p_.cols)
      row = next_row, c = 0;
    return static_cast<const std::byte*>(p_.x) + (row * p_.x_stride + c) * element_bytes(p_.dtype);
  }

  void row_scale(std::int64_t source) {
    const Largest largest = largest_of_row(p_, source);
    scales_.amax[0] = largest.amax;
    bounded_ = scales_.compute(p_.format, 1, 1.0f) && largest.finite;
  }

  bool tensor_is_bounded(const void* x, std::int64_t n) {
    const float factor = scales_.factor[0];
    return kernels().quantize_amax(p_.dtype, x, n, kPiece, scales_.amax) && factor > 0.0f &&
           scales_.amax[0] * factor < 0x1p16f;
  }

  void block_scales(const void* x, std::int64_t n, std::int64_t padded, std::int64_t target) {
    const std::int64_t blocks = (n + block_ - 1) / block_,
                       padded_blocks = round_up((padded + block_ - 1) / block_, kScaleWord);
    float global = 1.0f;
    if (p_.global_scale) global = p_.global_scale[p_.global_scale_per_expert ? place(target).expert : 0];
    const bool finite = kernels().quantize_amax(p_.dtype, x, n, block_, scales_.amax);
    bounded_ = scales_.compute(p_.format, blocks, global) && finite;
    std::memset(scales_.bytes + blocks, 0, static_cast<std::size_t>(padded_blocks - blocks));
    std::fill(scales_.floats + blocks, scales_.floats + std::min(padded_blocks, kPieceBlocks), 0.0f);
  }

  /// Blocks whose scales are stored for a piece: with layouts of words, up to the end of the last word.
  std::int64_t stored_blocks(std::int64_t column, std::int64_t padded) const {
    const std::int64_t blocks = (padded + block_ - 1) / block_;
    const bool words = p_.scales.bytes == 1 && p_.scales.layout != ScaleLayout::kLinear;
    return words && column + padded == p_.padded_cols ? round_up(blocks, kScaleWord) : blocks;
  }

  const QuantizeProblem& p_;
  const bool e2m1_ = p_.format.data_dtype() == DType::kE2M1;
  const std::int64_t block_ = p_.format.block();  // 0: the row or the tensor
  const bool by_row_ = block_ == 0 && p_.format.granularity == Granularity::kToken;
  const bool streams_ =
      outgrows_cache(p_.rows * p_.cols * element_bytes(p_.dtype) + p_.out_rows * p_.data_pitch);
  bool bounded_ = false;  // see quantize_encode
  PieceScales scales_;
  ScaleWriter writer_{p_.scales};
  alignas(64) std::byte buffer_[kPiece * sizeof(float)];
  alignas(64) std::uint8_t codes_[kPiece];
};

/// Over the rows for which `of_row` is called, on all threads.
template <class OfRow>
Largest largest_of_rows(const ExecContext& ctx, std::int64_t rows, std::int64_t grain, OfRow&& of_row) {
  std::array<Largest, kMaxThreads> by_thread;
  parallel_for(ctx, (rows + grain - 1) / grain, [&](std::int64_t task, int thread) {
    for (std::int64_t r = task * grain; r < std::min(rows, (task + 1) * grain); ++r)
      by_thread[static_cast<std::size_t>(thread)].include(of_row(r));
  });
  Largest all;
  for (const Largest& part : by_thread) all.include(part);
  return all;
}

/// The factor of the fp8 tensor format, 0 for the others. A dynamic scale is found and stored first.
float tensor_factor(const QuantizeProblem& p, std::int64_t rows, std::int64_t grain, const ExecContext& ctx) {
  if (p.format.kind != QuantKind::kFp8 || p.format.granularity != Granularity::kTensor) return 0.0f;
  float scale;
  if (p.format.static_scale) {
    std::memcpy(&scale, p.scales.data, sizeof scale);
  } else {
    const float amax = largest_of_rows(ctx, rows, grain, [&](std::int64_t r) {
                         return row_is_live(p.experts, r) ? largest_of_row(p, r) : Largest{};
                       }).amax;
    scale = clamp_amax(p.format, amax) / 448.0f;
    std::memcpy(p.scales.data, &scale, sizeof scale);
  }
  return reciprocal(scale);
}

}  // namespace

void quantize(const QuantizeProblem& p, const ExecContext& ctx) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, p.padded_cols));
  const bool by_token = p.slot_row && !p.global_scale_per_expert;
  if (explain(ctx, "quantize",
              p.activation ? "activated in pieces of 4096 columns"
              : by_token   ? "each token once, pieces of 4096 columns"
                           : "pieces of 4096 columns",
              threads_for(ctx, (by_token ? p.rows : p.out_rows) / grain)))
    return;
  const std::int64_t live_rows = rows_bound(p.experts, p.out_rows);
  const float factor = tensor_factor(p, live_rows, grain, ctx);
  parallel_chunks(ctx, by_token ? p.rows : live_rows, grain, [&](std::int64_t begin, std::int64_t end) {
    RowQuantizer quantizer(p, factor);
    for (std::int64_t r = begin; r < end; ++r) {
      if (by_token) {
        // The token's live slots, a few at a time.
        constexpr std::int64_t kSlots = 16;
        std::int64_t targets[kSlots];
        for (std::int64_t j = 0; j < p.top_k; j += kSlots) {
          const std::int32_t* slots = p.slot_row + r * p.top_k + j;
          const std::int64_t* last =
              std::copy_if(slots, slots + std::min(kSlots, p.top_k - j), targets,
                           [&](std::int32_t slot) { return slot >= 0 && slot < live_rows; });
          if (last > targets) quantizer.run(r, std::min(r + 1, end - 1), targets, last - targets);
        }
      } else if (row_is_live(p.experts, r)) {
        const std::int64_t next = std::min(r + 1, end - 1);
        if (p.row_token)
          quantizer.run(p.row_token[r], p.row_token[next], &r, 1);
        else
          quantizer.run(r, next, &r, 1);
      }
    }
  });
  zero_padding(p.scales, p.experts, p.out_rows, ctx);
}

void dequantize(const DequantizeProblem& p, const ExecContext& ctx) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, p.cols));
  if (explain(ctx, "dequantize", "pieces of 4096 columns", threads_for(ctx, p.rows / grain))) return;
  const bool e2m1 = p.format.data_dtype() == DType::kE2M1;
  const bool tensor = p.format.kind == QuantKind::kFp8 && p.format.granularity == Granularity::kTensor;
  const std::int64_t block = p.format.block() > 0 ? p.format.block() : std::max<std::int64_t>(1, p.cols);
  parallel_chunks(ctx, rows_bound(p.experts, p.rows), grain, [&](std::int64_t begin, std::int64_t end) {
    float scale[kPieceBlocks];
    for (std::int64_t r = begin; r < end; ++r) {
      if (!row_is_live(p.experts, r)) continue;
      const Place place = place_of(p.experts, p.scales.layout, r);
      const float global =
          p.global_scale ? p.global_scale[p.global_scale_per_expert ? place.expert : 0] : 1.0f;
      const float rcp_global = 1.0f / global;
      for (std::int64_t c = 0; c < p.cols; c += kPiece) {
        const std::int64_t n = std::min(kPiece, p.cols - c);
        for (std::int64_t b = 0; b * block < n; ++b) {
          const std::byte* at =
              p.scales.data +
              (tensor ? 0 : scale_byte(p.scales, place.scale_base, place.scale_row, c / block + b));
          if (p.scales.bytes == 4)
            std::memcpy(&scale[b], at, 4);
          else if (p.format.kind == QuantKind::kNvfp4)
            scale[b] = numeric::e4m3_to_f32(static_cast<std::uint8_t>(*at)) * rcp_global;
          else
            scale[b] = numeric::e8m0_to_f32(static_cast<std::uint8_t>(*at));
        }
        std::byte* out = static_cast<std::byte*>(p.out) + (r * p.out_stride + c) * element_bytes(p.dtype);
        kernels().dequantize_decode(p.dtype, e2m1, p.data + r * p.data_pitch + (e2m1 ? c / 2 : c), n, block,
                                    scale, out);
      }
    }
  });
}

void global_scale(const GlobalScaleProblem& p, const ExecContext& ctx) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, p.cols));
  if (explain(ctx, "global_scale", "one pass", threads_for(ctx, p.rows / grain))) return;
  const QuantizeProblem source{.x = p.x, .dtype = p.dtype, .x_stride = p.x_stride, .cols = p.cols};
  auto scale_of = [&](std::int64_t begin, std::int64_t end) {
    const float amax =
        largest_of_rows(ctx, std::max<std::int64_t>(0, end - begin), grain, [&](std::int64_t r) {
          return row_is_live(p.experts, begin + r) ? largest_of_row(source, begin + r) : Largest{};
        }).amax;
    constexpr float kLargest = std::numeric_limits<float>::max();
    return amax > 0.0f ? std::min(2688.0f / std::min(amax, kLargest), kLargest) : 1.0f;
  };
  if (!p.per_expert) {
    *p.out = scale_of(0, rows_bound(p.experts, p.rows));
    return;
  }
  for (std::int64_t e = 0; e < p.experts.num_experts; ++e) {
    if (p.experts.row_counts)
      p.out[e] = scale_of(e * p.experts.group_rows, (e + 1) * p.experts.group_rows);
    else
      p.out[e] = scale_of(p.experts.expert_offsets[e],
                          std::min<std::int64_t>(p.experts.expert_offsets[e + 1], p.rows));
  }
}

void convert_scales(const ConvertScalesProblem& p, const ExecContext& ctx) {
  if (explain(ctx, "convert_scales", "byte by byte", threads_for(ctx, p.rows / 64))) return;
  const bool words = p.dst.layout != ScaleLayout::kLinear;
  const std::int64_t cols = words ? p.dst.words() * kScaleWord : p.dst.cols;
  parallel_chunks(ctx, p.rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t c = 0; c < cols; ++c)
        p.dst.data[scale_byte(p.dst, 0, r, c)] =
            c < p.src.cols ? p.src.data[scale_byte(p.src, 0, r, c)] : std::byte{0};
  });
  zero_padding(p.dst, {}, p.rows, ctx);
}

}  // namespace moecore::cpu
