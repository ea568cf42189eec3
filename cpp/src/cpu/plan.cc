// plan on the CPU: a counting sort by local expert, stable by route.
//
// Routes are cut into parts. Each part counts its routes per expert; a prefix over (expert, part) turns the
// counts into the first row of every part in every expert; each part then hands out its rows in route order.
// The parts depend on the shapes alone, and the result not even on them.

#include "ops/plan.h"

#include <algorithm>

#include "cpu/explain.h"
#include "cpu/thread_pool.h"

namespace moecore::cpu {
namespace {

// Few enough parts that their counters cost less than the routes, many enough for every thread.
constexpr std::int64_t kMaxParts = 64;

std::int64_t num_parts(std::int64_t num_routes, std::int64_t num_experts) {
  const std::int64_t routes_per_part = std::max<std::int64_t>(4096, 4 * num_experts);
  return std::clamp<std::int64_t>(num_routes / routes_per_part, 1, kMaxParts);
}

// Local expert of a global id, or -1.
struct LocalExpert {
  const std::int32_t* map;
  std::uint64_t num_global, first, num_experts;

  std::int32_t operator()(std::int64_t id) const {
    std::uint64_t local = static_cast<std::uint64_t>(id) - first;
    if (map) {
      if (static_cast<std::uint64_t>(id) >= num_global) return -1;
      local = static_cast<std::uint64_t>(std::int64_t{map[id]});
    }
    return local < num_experts ? static_cast<std::int32_t>(local) : -1;
  }
};

// Writes every route's local expert into slot_row, for the second pass, and counts them.
template <class Id>
void count_part(const PlanProblem& p, const LocalExpert& local_expert, std::int64_t t0, std::int64_t t1,
                std::int32_t* counts) {
  for (std::int64_t t = t0; t < t1; ++t) {
    const Id* ids = static_cast<const Id*>(p.ids.data) + t * p.ids_stride;
    std::int32_t* experts = p.slot_row + t * p.top_k;
    for (std::int64_t j = 0; j < p.top_k; ++j) {
      experts[j] = local_expert(ids[j]);
      if (experts[j] >= 0) ++counts[experts[j]];
    }
  }
}

void place_part(const PlanProblem& p, std::int64_t t0, std::int64_t t1, std::int32_t* next_row) {
  for (std::int64_t t = t0; t < t1; ++t) {
    for (std::int64_t r = t * p.top_k; r < (t + 1) * p.top_k; ++r) {
      const std::int32_t expert = p.slot_row[r];
      if (expert < 0) continue;
      const std::int32_t row = next_row[expert]++;
      p.slot_row[r] = row;
      p.row_token[row] = static_cast<std::int32_t>(t);
      if (p.row_route) p.row_route[row] = static_cast<std::int32_t>(r);
    }
  }
}

// Turns counts [parts, E] into the first row of every part in every expert, and writes the offsets. Returns
// the number of rows in use. Loops run over experts inside parts, so that all but the scan vectorise.
std::int64_t prefix(const PlanProblem& p, std::int32_t* counts, std::int64_t parts) {
  const std::int64_t num_experts = p.num_experts;
  std::int32_t* const offsets = p.expert_offsets;
  std::copy_n(counts, num_experts, offsets + 1);
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += counts[part * num_experts + e];

  const auto align = static_cast<std::int32_t>(p.scale_alignment);
  const bool power_of_two = (align & (align - 1)) == 0;  // a division takes longer than the rest of the scan
  auto round_up = [&](std::int32_t count) {
    return power_of_two ? (count + align - 1) & -align : (count + align - 1) / align * align;
  };
  std::int32_t rows = 0, scale_rows = 0;
  offsets[0] = p.scale_offsets[0] = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const std::int32_t count = offsets[e + 1];
    offsets[e + 1] = rows += count;
    p.scale_offsets[e + 1] = scale_rows += round_up(count);
  }

  // Part 0 starts at the expert's first row, every other part where the one before it ends.
  if (parts == 1) {
    std::copy_n(offsets, num_experts, counts);
    return rows;
  }
  std::int32_t* next = counts + parts * num_experts;
  std::copy_n(offsets, num_experts, next);
  for (std::int64_t part = 0; part < parts; ++part)
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const std::int32_t count = counts[part * num_experts + e];
      counts[part * num_experts + e] = next[e];
      next[e] += count;
    }
  return rows;
}

// sizes [E,3]: every expert's (count, n, k), or (n, count, k) with swap_ab.
void write_problem_sizes(const PlanProblem& p, std::int32_t* sizes, std::int64_t n, std::int64_t k) {
  if (!sizes) return;
  for (std::int64_t e = 0; e < p.num_experts; ++e) {
    sizes[3 * e + (p.swap_ab ? 1 : 0)] = p.expert_offsets[e + 1] - p.expert_offsets[e];
    sizes[3 * e + (p.swap_ab ? 0 : 1)] = static_cast<std::int32_t>(n);
    sizes[3 * e + 2] = static_cast<std::int32_t>(k);
  }
}

}  // namespace

std::size_t plan_workspace_bytes(std::int64_t num_routes, std::int64_t num_experts) {
  return static_cast<std::size_t>((num_parts(num_routes, num_experts) + 1) * num_experts) *
         sizeof(std::int32_t);
}

void plan(const PlanProblem& p, const ExecContext& ctx) {
  const std::int64_t num_routes = p.num_tokens * p.top_k;
  const std::int64_t parts = num_parts(num_routes, p.num_experts);
  if (explain(ctx, "plan", "counting sort in " + std::to_string(parts) + " parts", threads_for(ctx, parts)))
    return;
  auto* const counts = reinterpret_cast<std::int32_t*>(ctx.workspace.data());
  const LocalExpert local_expert{p.expert_map, static_cast<std::uint64_t>(p.num_global),
                                 static_cast<std::uint64_t>(p.first_expert),
                                 static_cast<std::uint64_t>(p.num_experts)};
  const std::int64_t tokens = (p.num_tokens + parts - 1) / parts;
  auto for_each_part = [&](auto&& fn) {
    parallel_for(ctx, parts, [&](std::int64_t part, int) {
      fn(std::min(part * tokens, p.num_tokens), std::min((part + 1) * tokens, p.num_tokens),
         counts + part * p.num_experts);
    });
  };
  for_each_part([&](std::int64_t t0, std::int64_t t1, std::int32_t* mine) {
    std::fill_n(mine, p.num_experts, 0);
    p.ids.is_i64 ? count_part<std::int64_t>(p, local_expert, t0, t1, mine)
                 : count_part<std::int32_t>(p, local_expert, t0, t1, mine);
  });
  const std::int64_t rows = prefix(p, counts, parts);
  write_problem_sizes(p, p.problem_sizes1, p.gated ? 2 * p.inter : p.inter, p.hidden);
  write_problem_sizes(p, p.problem_sizes2, p.hidden, p.inter);
  for_each_part([&](std::int64_t t0, std::int64_t t1, std::int32_t* mine) { place_part(p, t0, t1, mine); });
  std::fill(p.row_token + rows, p.row_token + num_routes, -1);
  if (p.row_route) std::fill(p.row_route + rows, p.row_route + num_routes, -1);
}

}  // namespace moecore::cpu
