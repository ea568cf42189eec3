// The ops of the data path one after the other, as a layer calls them: the same bits on every device, in
// every repeat, on two streams at once and replayed from a graph. What each op computes is tested elsewhere;
// here it is that nothing of one call leaks into the next, whose kernels may start before their predecessor
// ends.

#include <memory>

#include "moecore/moecore.h"
#include "support/fixture.h"

namespace moecore::test {
namespace {

constexpr std::int64_t kExperts = 24, kTopK = 4, kHidden = 200;
const Device kCpu{};

// route_plan, permute, permute_quantize, activate_quantize and finalize over tensors of their own.
class Chain {
 public:
  Chain(Device device, std::int64_t num_tokens, std::uint64_t seed)
      : device_(device),
        tokens_(num_tokens),
        rows_(num_tokens * kTopK),
        logits_(device, DType::kF32, Random(seed).floats({tokens_, kExperts}, DType::kF32)),
        x_(device, DType::kBF16, Random(seed + 1).floats({tokens_, kHidden}, DType::kBF16)),
        call_(device, plan_workspace_bytes(tokens_, kTopK, kExperts, device)) {}

  ExecContext& context() { return call_.context(); }

  void reseed(std::uint64_t seed) { logits_.set(Random(seed).floats({tokens_, kExperts}, DType::kF32)); }

  void run() {
    route_plan(logits_.read_only(), weights_, ids_, plan_, {.renormalize = true}, {.num_experts = kExperts},
               call_);
    permute(x_.read_only(), plan_, permuted_, call_);
    permute_quantize(x_.read_only(), plan_, codes4_, scales4_, QuantFormat::nvfp4(), {}, call_);
    activate_quantize(permuted_.read_only(), {.kind = ActivationKind::kSilu}, codes8_, scales8_,
                      QuantFormat::fp8_block128(), {.rows = {.expert_offsets = offsets_.read_only()}}, call_);
    finalize(permuted_.read_only(), slot_row_.read_only(), out_, {.weights = weights_.read_only()}, call_);
    finalize(codes8_.read_only(), slot_row_.read_only(), out8_,
             {.weights = weights_.read_only(), .row_scales = scales8_.read_only()}, call_);
  }

  void poison() {
    for (Tensor* t : outputs_) t->poison();
  }

  // The bytes of every output.
  std::vector<std::vector<std::byte>> results() const {
    std::vector<std::vector<std::byte>> all;
    for (const Tensor* t : outputs_) all.push_back(t->get_bytes());
    return all;
  }

 private:
  Device device_;
  std::int64_t tokens_, rows_;
  Tensor logits_, x_;
  Call call_;
  Tensor weights_{device_, DType::kF32, {tokens_, kTopK}}, ids_{device_, DType::kI32, {tokens_, kTopK}};
  Tensor offsets_{device_, DType::kI32, {kExperts + 1}}, scale_offsets_{device_, DType::kI32, {kExperts + 1}};
  Tensor row_token_{device_, DType::kI32, {rows_}}, slot_row_{device_, DType::kI32, {tokens_, kTopK}};
  Plan plan_{.expert_offsets = offsets_,
             .scale_offsets = scale_offsets_,
             .row_token = row_token_,
             .slot_row = slot_row_};
  Tensor permuted_{device_, DType::kBF16, {rows_, kHidden}};
  Tensor codes4_{device_, DType::kU8, {rows_, kHidden / 2}},
      scales4_{device_, DType::kE4M3, {expert_scale_rows(rows_, kExperts), 16}};
  Tensor codes8_{device_, DType::kE4M3, {rows_, kHidden / 2}}, scales8_{device_, DType::kF32, {rows_, 1}};
  Tensor out_{device_, DType::kBF16, {tokens_, kHidden}},
      out8_{device_, DType::kBF16, {tokens_, kHidden / 2}};
  std::vector<Tensor*> outputs_{&weights_,  &ids_,      &offsets_, &scale_offsets_, &row_token_,
                                &slot_row_, &permuted_, &codes4_,  &scales4_,       &codes8_,
                                &scales8_,  &out_,      &out8_};
};

class DataPath : public OnDevice {
 protected:
  void SetUp() override {
    OnDevice::SetUp();
    is_cuda_ = device().type == DeviceType::kCUDA;
  }
  static std::vector<std::vector<std::byte>> on_cpu(std::int64_t num_tokens, std::uint64_t seed) {
    Chain chain(kCpu, num_tokens, seed);
    chain.context().num_threads = 1;
    chain.run();
    return chain.results();
  }
  bool is_cuda_ = false;
};

// 2 tokens: route_plan in one launch.
TEST_P(DataPath, TheBitsAreThoseOfOneThread) {
  for (std::int64_t tokens : {1, 2, 70, 600}) {
    const auto expected = on_cpu(tokens, 3);
    Chain chain(device(), tokens, 3);
    for (int threads : {1, 2, 5}) {
      chain.context().num_threads = threads;
      chain.poison();
      chain.run();
      synchronize(device());
      EXPECT_EQ(chain.results(), expected) << tokens << " tokens, " << threads << " threads";
    }
  }
}

TEST_P(DataPath, ThousandRunsOnTwoStreams) {
  if (!is_cuda_) GTEST_SKIP() << "streams are a CUDA feature";
  for (std::int64_t tokens : {2, 70}) {
    const auto first_expected = on_cpu(tokens, 4), second_expected = on_cpu(tokens, 40);
    Chain first(device(), tokens, 4), second(device(), tokens, 40);  // each on a stream of its own
    for (int round = 0; round < 10; ++round) {
      first.poison();
      second.poison();
      for (int i = 0; i < 100; ++i) {
        first.run();
        second.run();
      }
      synchronize(device());
      ASSERT_EQ(first.results(), first_expected) << tokens << " tokens, round " << round;
      ASSERT_EQ(second.results(), second_expected) << tokens << " tokens, round " << round;
    }
  }
}

TEST_P(DataPath, ReplaysAsAGraph) {
  if (!is_cuda_) GTEST_SKIP() << "graphs are a CUDA feature";
  for (std::int64_t tokens : {2, 70}) {
    const Stream stream(device());
    Chain chain(device(), tokens, 5);
    chain.context().stream = stream.get();
    chain.run();  // the first call may load kernels
    synchronize(device());
    Graph graph(stream, [&] {
      for (int i = 0; i < 10; ++i) chain.run();
    });
    Chain reference(kCpu, tokens, 5);
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      chain.reseed(seed);
      reference.reseed(seed);
      chain.poison();
      reference.poison();
      graph.launch();
      synchronize(device());
      reference.run();
      ASSERT_EQ(chain.results(), reference.results()) << tokens << " tokens, replay " << seed;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, DataPath, ::testing::ValuesIn(devices()), device_name);

}  // namespace
}  // namespace moecore::test
