"""Which experts the tokens take, and the order of rows that follows."""

from __future__ import annotations

from typing import Any, NamedTuple

from moecore import _core
from moecore._frameworks import Framework, framework_of
from moecore.ops.arguments import check_least, dim, padded, traced_ops
from moecore.typing import DLPackTensor, StreamLike, TensorT


def route(
    logits: TensorT,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: DLPackTensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    renormalize: bool = False,
    scale: float = 1.0,
    is_padding: DLPackTensor | None = None,
    out: tuple[TensorT, TensorT] | None = None,
    stream: StreamLike = None,
) -> tuple[TensorT, TensorT]:
    """The `top_k` experts of every token, and their weights.

    logits [T,E] f32|f16|bf16 -> (weights f32 [T,K], ids i32 [T,K]), 1 <= K <= E <= 2048. f32 inside.

    `scoring` is "softmax", "sigmoid" or "identity" (the logits are scores already). `bias` f32 [E] is added
    to the score for selection only. Of `num_groups` equal groups of experts only the `topk_groups` best
    compete, ranked by "top2_sum" or "max". Ties go to the lower expert; an expert whose logit or bias is not
    finite is never selected; a slot without an expert has id -1 and weight 0. `renormalize` divides a token's
    weights by their sum, then `scale` multiplies them. `is_padding` (bool|u8 [T]) marks tokens whose ids are
    all -1. Semantics: vLLM topk_softmax / grouped_topk in f32, DeepSeek-V3 noaux_tc.
    """
    if (traced := traced_ops()) is not None:
        return traced.route(  # type: ignore[no-any-return]
            logits,
            top_k,
            scoring,
            bias,
            num_groups,
            topk_groups,
            group_score,
            renormalize,
            scale,
            is_padding,
            out,
        )
    fw = framework_of("route", "logits", logits)
    fw.admit("route", logits, bias)
    if out is None:
        shape = (dim(logits, 0), top_k) if top_k >= 0 else (0, 0)
        weights, ids = fw.empty(logits, shape, "f32"), fw.empty(logits, shape, "i32")
    else:
        weights, ids = out
    _core.route(
        logits,
        weights,
        ids,
        scoring=scoring,
        bias=bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
        is_padding=is_padding,
        stream=stream,
    )
    return fw.finish(weights), fw.finish(ids)


class Plan(NamedTuple):
    """The row order that groups routes by expert, and every index the other ops need. All i32."""

    expert_offsets: Any
    """[E+1]: expert e owns rows expert_offsets[e] .. expert_offsets[e+1]-1."""
    scale_offsets: Any
    """[E+1]: the same with every expert's count rounded up to scale_alignment."""
    row_token: Any
    """[R]: token of a row; -1 for rows that no route owns."""
    slot_row: Any
    """[T,K]: row of a slot; -1 for a dropped route."""
    row_route: Any
    """[R]: route t*K + j of a row; -1 for rows that no route owns."""
    problem_sizes1: Any = None
    """[E,3]: (count, 2*inter, hidden) of the first product; None unless asked for."""
    problem_sizes2: Any = None
    """[E,3]: (count, hidden, inter) of the second product; None unless asked for."""

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.expert_offsets.shape[0]) - 1

    @property
    def num_rows(self) -> int:
        """R = T*K; rows from expert_offsets[E] on belong to dropped routes."""
        return int(self.row_token.shape[0])

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.slot_row.shape[0])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.slot_row.shape[1])


def check_plan(op: str, plan: Any) -> None:
    """TypeError for what is no Plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{op}: plan is a {type(plan).__name__}, expected a moecore.Plan")


def _empty_plan(fw: Framework, like: Any, num_tokens: int, top_k: int, experts: int, sizes: bool) -> Plan:
    rows = num_tokens * top_k
    return Plan(
        fw.empty(like, (experts + 1,), "i32"),
        fw.empty(like, (experts + 1,), "i32"),
        fw.empty(like, (rows,), "i32"),
        fw.empty(like, (num_tokens, top_k), "i32"),
        fw.empty(like, (rows,), "i32"),
        fw.empty(like, (experts, 3), "i32") if sizes else None,
        fw.empty(like, (experts, 3), "i32") if sizes else None,
    )


def plan(
    ids: DLPackTensor,
    num_experts: int,
    *,
    expert_map: DLPackTensor | None = None,
    first_expert: int = 0,
    scale_alignment: int = 128,
    problem_sizes: tuple[int, int] | None = None,
    gated: bool = True,
    swap_ab: bool = False,
    out: Plan | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> Plan:
    """Groups the routes of `ids` (i32|i64 [T,K]) by expert. Stable: inside an expert rows ascend by route.

    `num_experts` counts local experts. A global id g is local expert `expert_map[g]` (i32 [G], -1 = not
    here), or without a map g - `first_expert`; routes outside [0, num_experts) are dropped (slot_row = -1).
    `scale_offsets` rounds every expert's count up to `scale_alignment`. `problem_sizes` = (hidden, inter)
    also fills the two [E,3] tables, for a gated activation unless `gated` is False, and with the first two
    columns exchanged with `swap_ab`.
    """
    if (traced := traced_ops()) is not None:
        return traced.plan(  # type: ignore[no-any-return]
            ids, num_experts, expert_map, first_expert, scale_alignment, problem_sizes, gated, swap_ab, out
        )
    fw = framework_of("plan", "ids", ids)
    fw.admit("plan", ids, expert_map)
    num_tokens, top_k, experts = dim(ids, 0), dim(ids, 1), max(int(num_experts), 0)
    hidden, inter = problem_sizes if problem_sizes is not None else (0, 0)
    if out is None:
        out = _empty_plan(fw, ids, num_tokens, top_k, experts, problem_sizes is not None)
    if workspace is None and not fw.on_host(ids):
        size = plan_workspace_bytes(num_tokens, top_k, experts, fw.device(ids))
        workspace = fw.empty(ids, (size,), "u8")
    _core.plan(
        ids,
        *out,
        num_experts=num_experts,
        expert_map=expert_map,
        first_expert=first_expert,
        scale_alignment=scale_alignment,
        hidden=hidden,
        inter=inter,
        gated=gated,
        swap_ab=swap_ab,
        workspace=workspace,
        stream=stream,
    )
    return Plan(*(None if tensor is None else fw.finish(tensor) for tensor in out))


def route_plan(
    logits: TensorT,
    top_k: int,
    num_experts: int | None = None,
    *,
    scoring: str = "softmax",
    bias: DLPackTensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    renormalize: bool = False,
    scale: float = 1.0,
    is_padding: DLPackTensor | None = None,
    expert_map: DLPackTensor | None = None,
    first_expert: int = 0,
    scale_alignment: int = 128,
    problem_sizes: tuple[int, int] | None = None,
    gated: bool = True,
    swap_ab: bool = False,
    out: tuple[TensorT, TensorT, Plan] | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> tuple[TensorT, TensorT, Plan]:
    """route() and then plan() of its ids: (weights, ids, plan), with the same bits.

    For few tokens CUDA does both in one launch. `num_experts` counts local experts, by default all of
    `logits`; the other arguments are those of route() and plan().
    """
    if (traced := traced_ops()) is not None:
        return traced.route_plan(  # type: ignore[no-any-return]
            logits,
            top_k,
            num_experts,
            scoring,
            bias,
            num_groups,
            topk_groups,
            group_score,
            renormalize,
            scale,
            is_padding,
            expert_map,
            first_expert,
            scale_alignment,
            problem_sizes,
            gated,
            swap_ab,
            out,
        )
    fw = framework_of("route_plan", "logits", logits)
    fw.admit("route_plan", logits, bias, expert_map)
    num_tokens, slots = dim(logits, 0), max(int(top_k), 0)
    experts = dim(logits, 1) if num_experts is None else int(num_experts)
    hidden, inter = problem_sizes if problem_sizes is not None else (0, 0)
    if out is None:
        weights, ids = (
            fw.empty(logits, (num_tokens, slots), "f32"),
            fw.empty(logits, (num_tokens, slots), "i32"),
        )
        planned = _empty_plan(fw, logits, num_tokens, slots, max(experts, 0), problem_sizes is not None)
    else:
        weights, ids, planned = out
    if workspace is None and not fw.on_host(logits):
        size = plan_workspace_bytes(num_tokens, slots, max(experts, 0), fw.device(logits))
        workspace = fw.empty(logits, (size,), "u8")
    _core.route_plan(
        logits,
        weights,
        ids,
        *planned,
        scoring=scoring,
        bias=bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
        is_padding=is_padding,
        num_experts=experts,
        expert_map=expert_map,
        first_expert=first_expert,
        scale_alignment=scale_alignment,
        hidden=hidden,
        inter=inter,
        gated=gated,
        swap_ab=swap_ab,
        workspace=workspace,
        stream=stream,
    )
    finished = Plan(*(None if tensor is None else fw.finish(tensor) for tensor in planned))
    return fw.finish(weights), fw.finish(ids), finished


def plan_workspace_bytes(num_tokens: int, top_k: int, num_experts: int, device: str = "cpu") -> int:
    """Bytes of workspace that plan() needs, at any alignment."""
    check_least("plan_workspace_bytes", 0, num_tokens=num_tokens, top_k=top_k, num_experts=num_experts)
    return padded(_core.plan_workspace_bytes(num_tokens, top_k, num_experts, device))
