#pragma once
// The engines of grouped_gemm on CUDA, each a row of one table (grouped_gemm.cc).

#include <string>

#include "cuda/grouped_gemm/args.h"
#include "cuda/runtime.h"
#include "ops/grouped_gemm.h"

namespace moecore::cuda {

struct GroupedGemmEngine {
  const char* name;
  /// Why this engine cannot take the problem; empty when it can.
  std::string (*refusal)(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&);
  /// The tiles it takes and why.
  std::string (*describe)(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&);
  void (*run)(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&);
  /// How it reads x fastest; none: it takes x as it is.
  XLayout (*preferred_x_layout)(const GroupedGemmProblem&, const DeviceInfo&, const ExecContext&) = nullptr;
};

extern const GroupedGemmEngine kSm90Engine;
extern const GroupedGemmEngine kPortableEngine;

/// The device's view of a problem, but for the tiles.
GroupedGemmArgs device_args(const GroupedGemmProblem& p);

/// silu, quick_gelu, swiglu_oai and gelu_tanh are one formula (epilogue.cuh).
bool is_sigmoid_family(const Activation& activation);

}  // namespace moecore::cuda
