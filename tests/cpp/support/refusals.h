// Tables of refusals: every bad argument is refused with the promised exception, a message that names op,
// argument, value and expectation, and outputs left as they were. Each row spoils one thing of a good call.

#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "moecore/moecore.h"
#include "support/fixture.h"

namespace moecore::test {

inline constexpr Device kCpu{};

enum class Error { kInvalidArgument, kInvalidType, kBackend };

// Calls and expects that error, with a message of the op that contains the fragments.
void expect_refusal(const std::string& op, const std::function<void()>& call, Error error,
                    const std::vector<std::string>& fragments);

// A row of a table: how to spoil the good call, what must come, and what the message must contain.
template <class Args>
struct Bad {
  const char* claim;
  std::function<void(Args&)> spoil;
  Error error;
  std::vector<std::string> fragments;
};

template <class Args>
void expect_refusals(const std::string& op, const std::vector<Bad<Args>>& table) {
  {
    Args good;
    ASSERT_NO_THROW(good.call()) << "the good call that the table spoils";
  }
  for (const Bad<Args>& bad : table) {
    SCOPED_TRACE(op + ": " + bad.claim);
    Args args;
    bad.spoil(args);
    expect_refusal(op, [&] { args.call(); }, bad.error, bad.fragments);
    for (const Tensor* out : args.outputs()) EXPECT_TRUE(out->untouched());
  }
}

Tensor zeros(DType dtype, std::vector<std::int64_t> shape);

// Ways to spoil a view.
TensorView retyped(TensorView v, DType dtype);
TensorView resized(TensorView v, int axis, std::int64_t n);
TensorView restrided(TensorView v, int axis, std::int64_t stride);
TensorView flattened(TensorView v);
TensorView on_gpu(TensorView v);
TensorView null(TensorView v);
TensorView frozen(TensorView v);

}  // namespace moecore::test
