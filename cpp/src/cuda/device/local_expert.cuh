#pragma once
// From the router's expert ids to this device's experts: the one rule that plan and decode share.

#include <cstdint>

namespace moecore::cuda::dev {

/// The local expert of ids[i], or -1 where the id is another device's or nobody's. Args are a kernel's
/// arguments with ids (i64 if ids_are_i64, else i32), expert_map ([num_global] or none), first_expert and
/// num_experts.
template <class Args>
__device__ __forceinline__ int local_expert(const Args& args, std::int64_t i) {
  std::int64_t id = args.ids_are_i64 ? static_cast<const std::int64_t*>(args.ids)[i]
                                     : static_cast<const std::int32_t*>(args.ids)[i];
  if (args.expert_map)
    id = id >= 0 && id < args.num_global ? args.expert_map[id] : -1;
  else
    id -= args.first_expert;
  return id >= 0 && id < args.num_experts ? static_cast<int>(id) : -1;
}

}  // namespace moecore::cuda::dev
