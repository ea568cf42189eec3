#pragma once
// The one place that picks an engine: every op's entry exists as cpu::<op> and cuda::<op> of one function
// type.

#include "moecore/context.h"

namespace moecore {

template <class Problem>
using BackendFn = void(const Problem&, const ExecContext&);

template <class Problem>
void run_on_backend(BackendFn<Problem>* cpu_entry, BackendFn<Problem>* cuda_entry, const Problem& problem,
                    const ExecContext& ctx) {
  (ctx.device.type == DeviceType::kCUDA ? cuda_entry : cpu_entry)(problem, ctx);
}

}  // namespace moecore
