// quantize and its fused forms, bit for bit: data, scales and their padding, on every format, layout and
// shape, with special values strewn in. Outputs start poisoned, so a byte that should be written and is not
// shows as well as one that should not be.

#include "moecore/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moecore/activate.h"
#include "moecore/permute.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/fixture.h"
#include "support/oracle.h"
#include "support/quantize_case.h"

namespace moecore::test {
namespace {

class Quantize : public OnDeviceDType {
 protected:
  Tensor tensor(const Values& v, std::int64_t rows, std::int64_t cols, const Place& place = {}) {
    Tensor t(device(), dtype(), {rows, cols}, place);
    t.set_bytes(v.bytes);
    return t;
  }

  /// quantize() of random rows against the oracle.
  void expect_quantize(const NamedFormat& n, std::int64_t rows, std::int64_t cols, std::int64_t padded,
                       const Place& place, const RowMap& map, const ExpertRows& experts = {},
                       std::int64_t num_experts = 1, int num_threads = 0) {
    SCOPED_TRACE(::testing::Message()
                 << n.name << " " << rows << " x " << cols << " -> " << padded << " " << place.name);
    const QuantFormat& f = n.format;
    Random random(static_cast<std::uint64_t>(rows * 131 + cols));
    const Values x = random_values(random.bits(), dtype(), rows, cols);
    const Tensor input = tensor(x, rows, cols, place);
    QuantizeOptions options{.rows = experts};
    std::vector<float> global(static_cast<std::size_t>(rows), 1.0f);
    std::optional<Tensor> global_tensor;
    if (f.kind == QuantKind::kNvfp4 && cols % 3 != 0) {  // else: none given
      Array g = random.floats({num_experts}, DType::kF32, 0.01, 50);
      global_tensor.emplace(device(), DType::kF32, g);
      options.global_scale = global_tensor->read_only();
      for (std::size_t r = 0; r < global.size(); ++r) global[r] = static_cast<float>(g[map.expert[r]]);
    }
    Outputs out(device(), f, rows, padded, map, place);
    constexpr float kStatic = 0.0371f;
    if (f.static_scale) out.scales.set(Array({1, 1}, kStatic));
    Call call(device(), 0, num_threads);
    call.context().policy = policy_;
    quantize(input.read_only(), out.data, out.scales, f, options, call);
    const oracle::Quantized q = oracle::quantize(x.floats, cols, padded, f, global, kStatic, map.live);
    EXPECT_TRUE(same_bytes(out.data.get_bytes(), expected_data(q, f, map)));
    EXPECT_TRUE(same_bytes(out.scales.get_bytes(), expected_scales(q, f, map)));
    EXPECT_TRUE(out.data.surroundings_intact());
    EXPECT_TRUE(out.scales.surroundings_intact());
  }

  /// Rows of some of the experts, a tenth of them behind the last.
  void expect_per_expert(const NamedFormat& n, std::int64_t num_experts, std::int64_t rows,
                         std::int64_t cols = 80, std::int64_t padded = 96) {
    Random random(static_cast<std::uint64_t>(num_experts * 1000 + rows));
    std::vector<std::int64_t> offsets{0}, scale_offsets{0};
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const std::int64_t left = rows - rows / 10 - offsets.back();
      const std::int64_t count =
          random.below(3) ? std::min(left, random.below(2 * rows / num_experts + 3)) : 0;
      offsets.push_back(offsets.back() + count);
      scale_offsets.push_back(scale_offsets.back() + round_up(count, 128));
    }
    const Tensor offsets_tensor(device(), DType::kI32, integers(offsets));
    const Tensor scale_offsets_tensor(device(), DType::kI32, integers(scale_offsets));
    const RowMap map = RowMap::experts(offsets, scale_offsets, rows);
    const ExpertRows experts{.expert_offsets = offsets_tensor.read_only(),
                             .scale_offsets = scale_offsets_tensor.read_only()};
    expect_quantize(n, rows, cols, padded, {}, map, experts, num_experts);
  }

  std::string policy_;  // of the calls
};

TEST_P(Quantize, AnyWidth) {
  for (const NamedFormat& n : formats())
    for (std::int64_t cols : {0,  1,   2,   15,  16,  17,  31,  32,   33,   48,   64,   80,
                              96, 127, 128, 130, 255, 257, 360, 1000, 2880, 4096, 4100, 7168})
      for (const Place& place : places(dtype()))
        if (cols < 1000 || place.name == "dense")
          expect_quantize(n, 3, cols, is_fp4(n.format) ? round_up(cols, 2) : cols, place,
                          RowMap::dense(n.format, 3));
}

TEST_P(Quantize, PaddedColumns) {
  for (const NamedFormat& n : formats())
    for (auto [cols, padded] : {std::pair<std::int64_t, std::int64_t>{2880, 3072},
                                {0, 256},
                                {1, 2},
                                {63, 256},
                                {360, 512},
                                {128, 130},
                                {4000, 4608},
                                {30, 34}})
      expect_quantize(n, 5, cols, padded, {}, RowMap::dense(n.format, 5));
}

TEST_P(Quantize, AnyRowCount) {
  for (const NamedFormat& n : formats())
    for (std::int64_t rows : {0, 1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 300})
      expect_quantize(n, rows, 96, 96, {}, RowMap::dense(n.format, rows));
}

TEST_P(Quantize, ThreadsDoNotMatter) {
  for (const NamedFormat& n : formats())
    for (int threads : {1, 2, 5})
      expect_quantize(n, 200, 400, 400, {}, RowMap::dense(n.format, 200), {}, 1, threads);
}

// Every expert count and split, rows behind the last expert, empty experts.
TEST_P(Quantize, PerExpert) {
  for (const NamedFormat& n : formats())
    for (std::int64_t num_experts : {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 256, 257})
      for (std::int64_t rows : {0, 1, 40, 331})
        if (num_experts <= 20 || rows <= 40 || num_experts % 2 != 0) expect_per_expert(n, num_experts, rows);
}

// Blocks that go from row to row, across experts and past the last, however they look them up.
TEST_P(Quantize, PerExpertInEveryOrder) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "a CUDA policy, which the cuda instances take";
  for (const char* policy :
       {"tasks=2", "tasks=4 lookup=1", "tasks=8 threads=32", "tasks=8 threads=256 lookup=1"}) {
    policy_ = policy;
    SCOPED_TRACE(policy);
    for (const NamedFormat& n : formats())
      for (std::int64_t num_experts : {3, 40, 257, 600}) expect_per_expert(n, num_experts, 331);
  }
}

// Rows that are loaded while the row before is worked on: of two tiles a warp, or of one, or of padding.
TEST_P(Quantize, LoadedAhead) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "a CUDA policy, which the cuda instances take";
  const std::vector<std::int64_t> counts{0, 13, 1, 6};
  const Tensor counts_tensor(device(), DType::kI32, integers(counts));
  for (const char* policy : {"unroll=2 tasks=4", "unroll=2 tasks=8 threads=32 lookup=1"}) {
    policy_ = policy;
    SCOPED_TRACE(policy);
    for (const NamedFormat& n : formats())
      for (auto [cols, padded] :
           {std::pair<std::int64_t, std::int64_t>{80, 96}, {1040, 2176}, {2048, 2048}}) {
        expect_quantize(n, 45, cols, padded, {}, RowMap::dense(n.format, 45));
        expect_quantize(n, 52, cols, padded, {}, RowMap::groups(n.format, counts, 13),
                        {.row_counts = counts_tensor.read_only()}, 4);
        expect_per_expert(n, 7, 101, cols, padded);
      }
  }
}

TEST_P(Quantize, Groups) {
  for (const NamedFormat& n : formats())
    for (std::int64_t group_rows : {1, 7, 128, 130}) {
      const std::vector<std::int64_t> counts{0, group_rows, 1, group_rows / 2};
      const Tensor counts_tensor(device(), DType::kI32, integers(counts));
      expect_quantize(n, group_rows * 4, 112, 112, {}, RowMap::groups(n.format, counts, group_rows),
                      {.row_counts = counts_tensor.read_only()}, 4);
    }
}

// Per expert, row by row, is what the dense form makes of the same rows; and rows do not see each other.
TEST_P(Quantize, BatchSplit) {
  for (const NamedFormat& n : formats()) {
    SCOPED_TRACE(n.name);
    if (is_tensor(n.format) || n.format.layout != ScaleLayout::kLinear) continue;
    const std::int64_t rows = 37, cols = 300;
    const Values x = random_values(9, dtype(), rows, cols);
    const Tensor input = tensor(x, rows, cols);
    Outputs whole(device(), n.format, rows, cols, RowMap::dense(n.format, rows));
    Outputs parts(device(), n.format, rows, cols, RowMap::dense(n.format, rows));
    quantize(input.read_only(), whole.data, whole.scales, n.format, {}, Call(device()));
    auto slice = [](TensorView v, std::int64_t begin, std::int64_t count) {
      v.data = static_cast<std::byte*>(v.data) + begin * v.strides[0] * bit_width(v.dtype) / 8;
      v.shape[0] = count;
      return v;
    };
    for (std::int64_t begin = 0; begin < rows; begin += 5) {
      const std::int64_t count = std::min<std::int64_t>(5, rows - begin);
      quantize(slice(input.read_only(), begin, count), slice(parts.data, begin, count),
               slice(parts.scales, begin, count), n.format, {}, Call(device()));
    }
    EXPECT_TRUE(same_bytes(parts.data.get_bytes(), whole.data.get_bytes()));
    EXPECT_TRUE(same_bytes(parts.scales.get_bytes(), whole.scales.get_bytes()));
  }
}

TEST_P(Quantize, ActivateFusedIsThePair) {
  const std::int64_t rows = 9;
  for (const NamedFormat& n : formats())
    for (std::int64_t inter : {1, 40, 360, 2880, 4400})
      for (ActivationKind kind :
           {ActivationKind::kSilu, ActivationKind::kSwigluOai, ActivationKind::kRelu2, ActivationKind::kGelu,
            ActivationKind::kGeluTanh, ActivationKind::kQuickGelu})
        for (GateOrder order :
             {GateOrder::kGateUp, GateOrder::kUpGate, GateOrder::kInterleaved, GateOrder::kPlain}) {
          if (inter > 1000 && (kind != ActivationKind::kSilu || order == GateOrder::kUpGate)) continue;
          SCOPED_TRACE(::testing::Message()
                       << n.name << " I=" << inter << " kind " << int(kind) << " order " << int(order));
          const Activation a{.kind = kind, .order = order, .alpha = 1.702f, .beta = 1.0f, .limit = 7.0f};
          const std::int64_t padded = round_up(inter, 64);
          const std::int64_t width = order == GateOrder::kPlain ? inter : 2 * inter;
          const Values x = random_values(static_cast<std::uint64_t>(inter), dtype(), rows, width);
          const Tensor input = tensor(x, rows, width);
          const Tensor offsets(device(), DType::kI32, integers({0, 3, 3, 8})),
              scale_offsets(device(), DType::kI32, integers({0, 128, 128, 256}));
          const QuantizeOptions options{
              .rows = {.expert_offsets = offsets.read_only(), .scale_offsets = scale_offsets.read_only()}};
          const RowMap map = RowMap::experts({0, 3, 3, 8}, {0, 128, 128, 256}, rows);
          Outputs fused(device(), n.format, rows, padded, map), pair(device(), n.format, rows, padded, map);
          if (n.format.static_scale) {
            fused.scales.set(Array({1, 1}, 0.5));
            pair.scales.set(Array({1, 1}, 0.5));
          }
          Tensor activated(device(), dtype(), {rows, inter});
          activate(input.read_only(), activated, a, {}, Call(device()));
          quantize(activated.read_only(), pair.data, pair.scales, n.format, options, Call(device()));
          activate_quantize(input.read_only(), a, fused.data, fused.scales, n.format, options,
                            Call(device()));
          EXPECT_TRUE(same_bytes(fused.data.get_bytes(), pair.data.get_bytes()));
          EXPECT_TRUE(same_bytes(fused.scales.get_bytes(), pair.scales.get_bytes()));
        }
}

TEST_P(Quantize, PermuteFusedIsThePair) {
  for (const NamedFormat& n : formats()) {
    if (is_tensor(n.format) && !n.format.static_scale) continue;
    for (const RoutingCase& c : {RoutingCase{0, 2, 4},
                                 {1, 1, 1},
                                 {7, 2, 5, Routing::kInvalid},
                                 {40, 8, 64},
                                 {33, 3, 17, Routing::kGaps},
                                 {5, 2, 3, Routing::kAllDropped},
                                 {9, 20, 32}})
      for (bool per_expert_global : {false, true}) {
        if (per_expert_global && n.format.kind != QuantKind::kNvfp4) continue;
        SCOPED_TRACE(::testing::Message()
                     << n.name << " " << c << (per_expert_global ? " a global each" : ""));
        const std::int64_t cols = 144, padded = 160, rows = c.num_tokens * c.top_k;
        const oracle::PlanResult p = oracle::plan(c.ids(), {.num_experts = c.num_experts});
        const Tensor expert_offsets(device(), DType::kI32, p.expert_offsets),
            scale_offsets(device(), DType::kI32, p.scale_offsets),
            row_token(device(), DType::kI32, p.row_token), slot_row(device(), DType::kI32, p.slot_row);
        const Plan plan{.expert_offsets = expert_offsets,
                        .scale_offsets = scale_offsets,
                        .row_token = row_token,
                        .slot_row = slot_row};
        Random random(7);
        const Tensor global(device(), DType::kF32,
                            random.floats({per_expert_global ? c.num_experts : 1}, DType::kF32, 0.1, 9));
        QuantizeOptions options;
        if (n.format.kind == QuantKind::kNvfp4) options.global_scale = global.read_only();
        const Tensor input = tensor(random_values(3, dtype(), c.num_tokens, cols), c.num_tokens, cols);
        RowMap map;
        map.live.assign(static_cast<std::size_t>(rows), true);
        map.scale_rows = expert_scale_rows(rows, c.num_experts);
        Outputs fused(device(), n.format, rows, padded, map), pair(device(), n.format, rows, padded, map);
        if (n.format.static_scale) {
          fused.scales.set(Array({1, 1}, 0.5));
          pair.scales.set(Array({1, 1}, 0.5));
        }
        Tensor permuted(device(), dtype(), {rows, cols});
        permute(input.read_only(), plan, permuted, Call(device()));
        QuantizeOptions per_expert = options;
        per_expert.rows = {.expert_offsets = expert_offsets.read_only(),
                           .scale_offsets = scale_offsets.read_only()};
        quantize(permuted.read_only(), pair.data, pair.scales, n.format, per_expert, Call(device()));
        permute_quantize(input.read_only(), plan, fused.data, fused.scales, n.format, options,
                         Call(device()));
        EXPECT_TRUE(same_bytes(fused.data.get_bytes(), pair.data.get_bytes()));
        EXPECT_TRUE(same_bytes(fused.scales.get_bytes(), pair.scales.get_bytes()));
      }
  }
}

// Where nothing can be read back, offsets of scales that do not fit lead to other scales of the tensor, never
// out of it; codes are what they are anyway.
TEST_P(Quantize, OffsetsThatDoNotFitStayInside) {
  if (device().type != DeviceType::kCUDA) GTEST_SKIP() << "the CPU reads the offsets and refuses them";
  const RoutingCase c{60, 4, 3};
  const std::int64_t rows = c.num_tokens * c.top_k, cols = 96, room = expert_scale_rows(rows, c.num_experts);
  const oracle::PlanResult p = oracle::plan(c.ids(), {.num_experts = c.num_experts});
  const Tensor expert_offsets(device(), DType::kI32, p.expert_offsets),
      row_token(device(), DType::kI32, p.row_token), slot_row(device(), DType::kI32, p.slot_row);
  const Tensor input = tensor(random_values(3, dtype(), c.num_tokens, cols), c.num_tokens, cols);
  Tensor permuted(device(), dtype(), {rows, cols});
  Plan plan{.expert_offsets = expert_offsets,
            .scale_offsets = expert_offsets,
            .row_token = row_token,
            .slot_row = slot_row};
  permute(input.read_only(), plan, permuted, Call(device()));
  RowMap map;
  map.live.assign(static_cast<std::size_t>(rows), true);
  map.scale_rows = 3 * room;
  for (const NamedFormat& n : formats()) {
    if (!is_swizzled(n.format)) continue;
    auto run = [&](const std::vector<std::int64_t>& offsets, Outputs& out, bool fused, bool inside) {
      const Tensor scale_offsets(device(), DType::kI32, integers(offsets));
      TensorView scales = out.scales;  // the middle third
      const std::int64_t third = room * scales.strides[0];
      scales.data = static_cast<std::byte*>(scales.data) + third;
      scales.shape[0] = room;
      plan.scale_offsets = scale_offsets;
      const ExpertRows experts{.expert_offsets = expert_offsets.read_only(),
                               .scale_offsets = scale_offsets.read_only()};
      if (fused)
        permute_quantize(input.read_only(), plan, out.data, scales, n.format, {}, Call(device()));
      else
        quantize(permuted.read_only(), out.data, scales, n.format, {.rows = experts}, Call(device()));
      if (inside) return;
      const Bytes bytes = out.scales.get_bytes();
      for (std::int64_t i = 0; i < third; ++i) {
        ASSERT_EQ(bytes[static_cast<std::size_t>(i)], kPoison) << "before";
        ASSERT_EQ(bytes[static_cast<std::size_t>(2 * third + i)], kPoison) << "behind";
      }
      Tensor back(device(), dtype(), {rows, cols});
      dequantize(out.data.read_only(), scales, back, n.format, {.rows = experts}, Call(device()));
      EXPECT_TRUE(back.surroundings_intact());
    };
    for (bool fused : {false, true}) {
      Outputs right(device(), n.format, rows, cols, map);
      run({0, 128, 256, 384}, right, fused, true);
      for (const std::vector<std::int64_t>& offsets : std::vector<std::vector<std::int64_t>>{
               {0, room, 2 * room, 2 * room}, {-room, 0, 5, 2 * room}, {room - 8, 1, -1, room + 1}}) {
        SCOPED_TRACE(::testing::Message() << n.name << (fused ? " fused " : " ") << offsets[0]);
        Outputs out(device(), n.format, rows, cols, map);
        run(offsets, out, fused, false);
        EXPECT_TRUE(same_bytes(out.data.get_bytes(), right.data.get_bytes()));
        EXPECT_TRUE(out.scales.surroundings_intact());
      }
    }
  }
}

TEST_P(Quantize, Dequantize) {
  constexpr std::int64_t kRows = 6, kPadded = 288;
  for (const NamedFormat& n : formats())
    for (std::int64_t cols : {0, 1, 17, 250, 288}) {
      SCOPED_TRACE(::testing::Message() << n.name << " H=" << cols);
      const QuantFormat& f = n.format;
      // Every byte is a code, and every byte a scale.
      Random random(5);
      const RowMap map = RowMap::experts({0, 2, 2, 5}, {0, 128, 128, 256}, kRows);
      Outputs q(device(), f, kRows, kPadded, map);
      const Bytes data = random.bytes(q.data.get_bytes().size());
      q.data.set_bytes(data);
      Bytes scales;
      if (f.scale_dtype() == DType::kF32) {
        Array s = random.floats({q.scales.view().shape[0], q.scales.view().shape[1]}, DType::kF32, 1e-3, 10);
        q.scales.set(s);
      } else {
        q.scales.set_bytes(random.bytes(q.scales.get_bytes().size()));
      }
      scales = q.scales.get_bytes();
      const Array g = random.floats({3}, DType::kF32, 0.1, 10);
      const Tensor global(device(), DType::kF32, g), offsets(device(), DType::kI32, integers({0, 2, 2, 5})),
          scale_offsets(device(), DType::kI32, integers({0, 128, 128, 256}));
      QuantizeOptions options{
          .rows = {.expert_offsets = offsets.read_only(), .scale_offsets = scale_offsets.read_only()}};
      if (f.kind == QuantKind::kNvfp4) options.global_scale = global.read_only();
      Tensor out(device(), dtype(), {kRows, cols});
      dequantize(q.data.read_only(), q.scales.read_only(), out, f, options, Call(device()));

      const std::int64_t block = f.block() ? f.block() : kPadded, blocks = (kPadded + block - 1) / block;
      Array expected({kRows, cols}, std::numeric_limits<double>::quiet_NaN());
      for (std::int64_t r = 0; r < 5; ++r)
        for (std::int64_t c = 0; c < cols; ++c) {
          const auto i = static_cast<std::size_t>(r);
          std::int64_t at = 0;
          if (is_swizzled(f))
            at = map.base[i] * round_up(blocks, 4) +
                 oracle::scale_position(f.layout, map.local[i], c / block, 0, blocks);
          else if (f.layout == ScaleLayout::kColumnMajor)
            at =
                f.e8m0_scales ? oracle::scale_position(f.layout, r, c / block, 8, blocks) : c / block * 8 + r;
          else if (!is_tensor(f))
            at = r * blocks + c / block;
          float scale;
          if (f.scale_dtype() == DType::kF32) {
            std::memcpy(&scale, scales.data() + at * 4, 4);
          } else {
            const auto byte = static_cast<std::uint8_t>(scales[static_cast<std::size_t>(at)]);
            scale = f.kind == QuantKind::kNvfp4
                        ? static_cast<float>(oracle::SmallFloat::e4m3().decode(byte) *
                                             static_cast<float>(1.0 / static_cast<float>(g[map.expert[i]])))
                        : static_cast<float>(oracle::e8m0_value(byte));
          }
          const auto byte = static_cast<std::uint8_t>(
              data[static_cast<std::size_t>(is_fp4(f) ? (r * kPadded + c) / 2 : r * kPadded + c)]);
          const double code = is_fp4(f) ? oracle::SmallFloat::e2m1().decode(byte >> (c % 2 * 4) & 15)
                                        : oracle::SmallFloat::e4m3().decode(byte);
          expected.at(r, c) = oracle::round_to(dtype(), static_cast<float>(code * scale));
        }
      EXPECT_TRUE(equal(out.get(), expected));
      EXPECT_TRUE(out.surroundings_intact());
    }
}

TEST_P(Quantize, GlobalScale) {
  const std::int64_t rows = 12, cols = 70;
  Values x = random_values(21, dtype(), rows, cols);
  const Tensor input = tensor(x, rows, cols, {.name = "apart", .row_padding = 3, .byte_offset = 4});
  auto expected = [&](std::int64_t begin, std::int64_t end) {
    double amax = 0;
    for (std::int64_t i = begin * cols; i < end * cols; ++i)
      amax = std::fmax(amax, std::fabs(static_cast<double>(x.floats[static_cast<std::size_t>(i)])));
    constexpr double kLargest = std::numeric_limits<float>::max();
    return amax == 0 ? 1.0
                     : static_cast<double>(
                           static_cast<float>(std::fmin(2688.0 / std::fmin(amax, kLargest), kLargest)));
  };
  Tensor one(device(), DType::kF32, {1}), each(device(), DType::kF32, {4});
  global_scale(input.read_only(), one, {}, Call(device()));
  EXPECT_TRUE(equal(one.get(), Array({1}, {expected(0, rows)})));
  const Tensor offsets(device(), DType::kI32, integers({0, 3, 3, 4, 10}));
  const ExpertRows experts{.expert_offsets = offsets.read_only()};
  global_scale(input.read_only(), each, experts, Call(device()));
  EXPECT_TRUE(equal(each.get(), Array({4}, {expected(0, 3), 1, expected(3, 4), expected(4, 10)})));
  global_scale(input.read_only(), one, experts, Call(device()));
  EXPECT_TRUE(equal(one.get(), Array({1}, {expected(0, 10)})));
}

INSTANTIATE_TEST_SUITE_P(, Quantize, ::testing::ValuesIn(devices_times(float_types())), device_dtype_name);

}  // namespace
}  // namespace moecore::test
