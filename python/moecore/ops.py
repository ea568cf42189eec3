"""The ops as Python functions: they allocate with the framework of the first argument and call _core.

Letters: T tokens, K experts per token (top_k), E experts, H hidden, I inter, R = T*K rows. Every function
takes tensors of any DLPack framework; `out=` writes into the caller's tensors instead of allocating;
`stream=` is None (the framework's current stream), an int pointer, or an object with `__cuda_stream__`, and
means nothing on CPU.

Errors: TypeError for an element type or a non-tensor, ValueError for a shape, device or value,
NotImplementedError for valid input without a kernel in this build, BackendError for a missing device. Outputs
are untouched in each case.
"""

from __future__ import annotations

import sys
from typing import Any, Generic, NamedTuple, cast, overload

from moecore import _core
from moecore._core import QuantFormat
from moecore._frameworks import Framework, framework_of
from moecore.typing import DLPackTensor, StreamLike, TensorT

# An allocation of this many bytes more than an op asks for can be aligned to what ops expect.
_ALIGNMENT_SLACK = 255


def _compiled() -> Any:
    """moecore.torch_ops while torch.compile traces the call, else None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling():
        return None
    from moecore import torch_ops

    return torch_ops


def _format(format: QuantFormat | str | None) -> QuantFormat | None:
    """The format that a kind stands for."""
    return QuantFormat(format) if isinstance(format, str) else format


def _depth(weights: Any, format: QuantFormat | None) -> int:
    """Elements in a row of weights: a byte holds two of fp4, unless it was tagged as e2m1."""
    if format is None or not format.is_fp4:
        return _dim(weights, 2)
    tagged = framework_of("grouped_gemm", "weights", weights).dtype_name(weights) == "e2m1"
    return _dim(weights, 2) * (1 if tagged else 2)


def _dim(x: Any, axis: int) -> int:
    """x.shape[axis], or 0 where there is none: the op then refuses `x` itself."""
    try:
        return x.shape[axis]  # type: ignore[no-any-return]
    except (AttributeError, IndexError):
        return 0


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
    if (compiled := _compiled()) is not None:
        return compiled.route(  # type: ignore[no-any-return]
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
        shape = (_dim(logits, 0), top_k) if top_k >= 0 else (0, 0)
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
    if (compiled := _compiled()) is not None:
        return compiled.plan(  # type: ignore[no-any-return]
            ids, num_experts, expert_map, first_expert, scale_alignment, problem_sizes, gated, swap_ab, out
        )
    fw = framework_of("plan", "ids", ids)
    fw.admit("plan", ids, expert_map)
    num_tokens, top_k, experts = _dim(ids, 0), _dim(ids, 1), max(int(num_experts), 0)
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
    if (compiled := _compiled()) is not None:
        return compiled.route_plan(  # type: ignore[no-any-return]
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
    num_tokens, slots = _dim(logits, 0), max(int(top_k), 0)
    experts = _dim(logits, 1) if num_experts is None else int(num_experts)
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


@overload
def permute(
    x: TensorT, plan: Plan, *, scales: None = None, out: TensorT | None = None, stream: StreamLike = None
) -> TensorT: ...
@overload
def permute(
    x: TensorT,
    plan: Plan,
    *,
    scales: TensorT,
    out: tuple[TensorT, TensorT] | None = None,
    stream: StreamLike = None,
) -> tuple[TensorT, TensorT]: ...
def permute(x: Any, plan: Plan, *, scales: Any = None, out: Any = None, stream: StreamLike = None) -> Any:
    """rows[r] = x[plan.row_token[r]], zeros for rows that no route owns. x [T,H] of any dtype -> [R,H].

    With `scales` [T,B] of any dtype (linear: one for each token, or for each block of its columns), moves
    them beside the rows in the same pass and returns (rows, row_scales [R,B]).
    """
    if (compiled := _compiled()) is not None:
        return compiled.permute(x, scales, plan.row_token, plan.slot_row, plan.expert_offsets, out)
    fw = framework_of("permute", "x", x)
    fw.admit("permute", x, scales)
    rows, row_scales = _moved(fw, x, scales, plan.num_rows, out)
    _core.permute(
        x,
        plan.row_token,
        plan.slot_row,
        plan.expert_offsets,
        rows,
        scales=scales,
        row_scales=row_scales,
        stream=stream,
    )
    return fw.finish(rows) if scales is None else (fw.finish(rows), fw.finish(row_scales))


def _moved(fw: Framework, x: Any, scales: Any, rows: int, out: Any) -> tuple[Any, Any]:
    """The outputs of permute() and shuffle_rows(): rows, and their scales or None."""
    if scales is None:
        return (fw.empty(x, (rows, _dim(x, 1))) if out is None else out), None
    if out is not None:
        return out[0], out[1]
    return fw.empty(x, (rows, _dim(x, 1))), framework_of("permute", "scales", scales).empty(
        scales, (rows, _dim(scales, 1))
    )


@overload
def shuffle_rows(
    x: TensorT,
    map: DLPackTensor,
    *,
    scales: None = None,
    out: TensorT | None = None,
    stream: StreamLike = None,
) -> TensorT: ...
@overload
def shuffle_rows(
    x: TensorT,
    map: DLPackTensor,
    *,
    scales: TensorT,
    out: tuple[TensorT, TensorT] | None = None,
    stream: StreamLike = None,
) -> tuple[TensorT, TensorT]: ...
def shuffle_rows(
    x: Any, map: DLPackTensor, *, scales: Any = None, out: Any = None, stream: StreamLike = None
) -> Any:
    """out[d] = x[map[d]], zeros where map[d] is outside [0, S).

    x [S,C] of any dtype, map i32|i64 [D] -> [D,C]. Semantics: vLLM / SGLang shuffle_rows, for any width and
    alignment. With `scales` [S,B] returns (out, out_scales [D,B]), moved in the same pass.
    """
    if (compiled := _compiled()) is not None:
        return compiled.shuffle_rows(x, scales, map, out)
    fw = framework_of("shuffle_rows", "x", x)
    fw.admit("shuffle_rows", x, map, scales)
    rows, out_scales = _moved(fw, x, scales, _dim(map, 0), out)
    _core.shuffle_rows(x, map, rows, scales=scales, out_scales=out_scales, stream=stream)
    return fw.finish(rows) if scales is None else (fw.finish(rows), fw.finish(out_scales))


def activate(
    x: TensorT,
    kind: str = "silu",
    *,
    order: str = "gate_up",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    expert_offsets: DLPackTensor | None = None,
    out: TensorT | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """f(gate) * (up + beta). x [R,2I] f32|f16|bf16 -> [R,I]; order "plain": f(x), [R,I] -> [R,I].

    `kind`: silu, gelu, gelu_tanh, quick_gelu, relu, relu2, swiglu_oai. `order`: "gate_up" and "up_gate"
    (halves), "interleaved" (gate at even columns), "plain". `limit` clamps gate from above and up from both
    sides. Left out, alpha, beta and limit are 1.702, 1 and 7 for swiglu_oai (gpt-oss), else 1, 0 and
    infinity. With `expert_offsets` (i32 [E+1]) rows from expert_offsets[E] on are left as they are. NaN
    propagates.
    """
    if (compiled := _compiled()) is not None:
        return compiled.activate(x, kind, order, alpha, beta, limit, expert_offsets, out)  # type: ignore[no-any-return]
    fw = framework_of("activate", "x", x)
    fw.admit("activate", x)
    if out is None:
        width = _dim(x, 1)
        out = fw.empty(x, (_dim(x, 0), width if order == "plain" else width // 2))
    _core.activate(
        x,
        out,
        activation=kind,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        expert_offsets=expert_offsets,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


def grouped_gemm(
    x: TensorT,
    weights: DLPackTensor,
    expert_offsets: DLPackTensor,
    *,
    bias: DLPackTensor | None = None,
    row_token: DLPackTensor | None = None,
    activation: str | None = None,
    order: str = "gate_up",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    row_weights: DLPackTensor | None = None,
    x_format: QuantFormat | str | None = None,
    x_scales: DLPackTensor | None = None,
    x_global_scale: DLPackTensor | None = None,
    weight_format: QuantFormat | str | None = None,
    weight_scales: DLPackTensor | None = None,
    weight_global_scale: DLPackTensor | None = None,
    out_dtype: str | None = None,
    out: TensorT | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """out[r] = x[r] @ weights[e].T for the rows r of expert e, accumulated in f32 and rounded once.

    x [R,K], weights [E,N,K], expert_offsets i32 [E+1] -> [R,N]; one dtype of f32|bf16|f16. In this order:
    `row_weights` [R] multiply a row's product, `bias` [E,N] is added, `activation` (with `order`, `alpha`,
    `beta`, `limit` as in activate()) is applied to the f32 result and halves the columns. With `row_token`
    i32 [R], row r reads x[row_token[r]] of x [T,K]. Rows from expert_offsets[E] on are left as they are:
    uninitialised without `out`.

    Quantised operands are codes (u8, fp4 with half the columns, or the element type) with a format and
    scales, which stand in the linear layout:

    ==============  ==================================  ==============================
    format          x_scales                            weight_scales
    ==============  ==================================  ==============================
    "fp8_tensor"    f32 [1,1]                           f32 [E]
    "fp8_token"     f32 [X,1]                           f32 [E,N]
    "fp8_block128"  f32 [X,K/128], or "column_major"    f32 [E,N/128,K/128]
    "mxfp8"         e8m0 [X,K/32]                       -
    "nvfp4"         e4m3 [X,K/16], global scale [1]     e4m3 [E,N,K/16], global [1]|[E]
    "mxfp4"         -                                   e8m0 [E,N,K/32]
    ==============  ==================================  ==============================

    x may be a float with any weights; fp8_tensor and fp8_token go with each other, fp8_block128 with itself,
    mxfp8 and nvfp4 with mxfp4 and nvfp4 weights. The result has x's dtype, or where x is quantised
    `out_dtype` (f32|bf16|f16, by default bf16).
    """
    if (compiled := _compiled()) is not None:
        return compiled.grouped_gemm(  # type: ignore[no-any-return]
            x,
            weights,
            expert_offsets,
            bias,
            row_token,
            activation,
            order,
            alpha,
            beta,
            limit,
            row_weights,
            x_format,
            x_scales,
            x_global_scale,
            weight_format,
            weight_scales,
            weight_global_scale,
            out_dtype,
            out,
        )
    fw = framework_of("grouped_gemm", "x", x)
    fw.admit("grouped_gemm", x, weights, bias, row_weights, x_scales, weight_scales)
    x_format, weight_format = _format(x_format), _format(weight_format)
    num_rows, n = _dim(x if row_token is None else row_token, 0), _dim(weights, 1)
    if out is None:
        shape = (num_rows, n if activation is None or order == "plain" else n // 2)
        out = fw.empty(x, shape, out_dtype if x_format is None else out_dtype or "bf16")
    if workspace is None and not fw.on_host(x):
        size = grouped_gemm_workspace_bytes(
            num_rows,
            n,
            _depth(weights, weight_format),
            _dim(weights, 0),
            fw.dtype_name(out),
            fw.device(x),
            x_format,
            weight_format,
        )
        workspace = fw.empty(x, (size,), "u8")
    _core.grouped_gemm(
        x,
        weights,
        expert_offsets,
        out,
        bias=bias,
        row_token=row_token,
        activation=activation,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        row_weights=row_weights,
        x_format=x_format,
        x_scales=x_scales,
        x_global_scale=x_global_scale,
        weight_format=weight_format,
        weight_scales=weight_scales,
        weight_global_scale=weight_global_scale,
        workspace=workspace,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


def finalize(
    rows: TensorT,
    slot_row: Plan | DLPackTensor,
    weights: DLPackTensor | None = None,
    *,
    hidden: int | None = None,
    cast_weights: bool = False,
    residual: DLPackTensor | None = None,
    row_scales: DLPackTensor | None = None,
    scale_layout: str = "linear",
    dtype: str | None = None,
    out: TensorT | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """out[t] = sum_j weights[t,j] * rows[slot_row[t,j]] (+ residual[t]): a token's expert outputs, weighted.

    rows [R,Hp] f32|f16|bf16|e4m3, slot_row i32|i64 [T,K] or a Plan, weights f32|f16|bf16 [T,K] (none: all 1)
    -> [T,H]. H = `hidden` <= Hp, by default Hp. An f32 fma chain from +0 in slot order, one rounding: the
    same bits on every run and engine. Slots with a row outside [0, R) are skipped. `cast_weights` rounds each
    weight to the dtype of `out` first (vLLM and SGLang: `topk_weights.to(dtype)`).

    The output has the dtype of `rows`; of e4m3 rows also `dtype` "f32", "f16" or "bf16". `row_scales` f32 are
    the scales of every 128 columns of e4m3 rows: [R,C], or with `scale_layout` "column_major" [C,P]. A
    residual beside an e4m3 output is bf16.
    """
    slots: Any = slot_row.slot_row if isinstance(slot_row, Plan) else slot_row
    if (compiled := _compiled()) is not None:
        return compiled.finalize(  # type: ignore[no-any-return]
            rows, slots, weights, hidden, cast_weights, residual, row_scales, scale_layout, dtype, out
        )
    fw = framework_of("finalize", "rows", rows)
    fw.admit("finalize", rows, weights, residual, row_scales)
    if out is None:
        out = fw.empty(rows, (_dim(slots, 0), _dim(rows, 1) if hidden is None else hidden), dtype)
    _core.finalize(
        rows,
        slots,
        out,
        weights=weights,
        cast_weights=cast_weights,
        residual=residual,
        row_scales=row_scales,
        scale_layout=scale_layout,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


def finalize_quantize(
    rows: TensorT,
    slot_row: Plan | DLPackTensor,
    weights: DLPackTensor | None = None,
    *,
    hidden: int | None = None,
    residual: DLPackTensor | None = None,
    row_scales: DLPackTensor | None = None,
    scale_layout: str = "linear",
    out: tuple[TensorT, TensorT] | None = None,
    stream: StreamLike = None,
) -> tuple[TensorT, TensorT]:
    """finalize() of e4m3 rows in f32, quantised again as fp8 block128: (codes e4m3 [T,H], scales f32).

    The DeepSeek form: `row_scales` in and scales out have one f32 for every 128 columns, both in
    `scale_layout`: "linear" [T,C], or "column_major" [C,P] with T rounded up to 4. A block of zeros has the
    scale 1e-10 / 448 and zero codes.
    """
    slots: Any = slot_row.slot_row if isinstance(slot_row, Plan) else slot_row
    if (compiled := _compiled()) is not None:
        return compiled.finalize_quantize(  # type: ignore[no-any-return]
            rows, slots, weights, hidden, residual, row_scales, scale_layout, out
        )
    fw = framework_of("finalize_quantize", "rows", rows)
    fw.admit("finalize_quantize", rows, weights, residual, row_scales)
    if out is None:
        num_tokens, width = _dim(slots, 0), _dim(rows, 1) if hidden is None else hidden
        codes = fw.empty(rows, (num_tokens, width))
        scales = fw.empty(rows, block_scale_shape(num_tokens, width, scale_layout), "f32")
    else:
        codes, scales = out
    _core.finalize(
        rows,
        slots,
        codes,
        weights=weights,
        residual=residual,
        row_scales=row_scales,
        out_scales=scales,
        scale_layout=scale_layout,
        stream=stream,
    )
    return fw.finish(codes), fw.finish(scales)


def block_scale_shape(num_tokens: Any, hidden: Any, scale_layout: str) -> tuple[Any, Any]:
    """Shape of the scales that finalize_quantize() writes."""
    blocks = (hidden + 127) // 128
    return (blocks, (num_tokens + 3) // 4 * 4) if scale_layout == "column_major" else (num_tokens, blocks)


class Experts(Generic[TensorT]):
    """The weights of one layer's experts, and how to read them.

    w13 [E,2I,H] (order "plain": [E,I,H]), w2 [E,H,I], optional biases [E,2I] and [E,H] in f32 or the weights'
    dtype. `order` says how the gate and up rows stand in w13 and is never guessed: "gate_up", "up_gate",
    "interleaved", or "plain" for an activation without a gate. `transposed=True` takes w13 [E,H,2I] and w2
    [E,I,H] and packs them into new tensors; transpose_experts() does the same expert by expert into memory of
    the caller. `activation`, `alpha`, `beta` and `limit` are those of activate().

    Quantised weights: w13 and w2 are codes of `weight_format`, with scales (and for nvfp4 global scales) as
    grouped_gemm() takes them. That is how published checkpoints store them: docs/formats.md.
    """

    def __init__(
        self,
        w13: TensorT,
        w2: TensorT,
        *,
        order: str,
        transposed: bool = False,
        activation: str = "silu",
        alpha: float | None = None,
        beta: float | None = None,
        limit: float | None = None,
        w13_bias: TensorT | None = None,
        w2_bias: TensorT | None = None,
        weight_format: QuantFormat | str | None = None,
        w13_scales: TensorT | None = None,
        w2_scales: TensorT | None = None,
        w13_global_scale: TensorT | None = None,
        w2_global_scale: TensorT | None = None,
    ) -> None:
        if transposed and weight_format is not None:
            raise ValueError("Experts: transposed is True, expected False with a weight_format")
        self.w13 = transpose_experts(w13) if transposed else w13
        self.w2 = transpose_experts(w2) if transposed else w2
        self.order = order
        self.activation = activation
        self.alpha = alpha
        self.beta = beta
        self.limit = limit
        self.w13_bias = w13_bias
        self.w2_bias = w2_bias
        self.weight_format = weight_format
        self.w13_scales = w13_scales
        self.w2_scales = w2_scales
        self.w13_global_scale = w13_global_scale
        self.w2_global_scale = w2_global_scale

    @classmethod
    def from_gpt_oss(
        cls,
        gate_up_blocks: TensorT,
        gate_up_scales: TensorT,
        gate_up_bias: TensorT | None,
        down_blocks: TensorT,
        down_scales: TensorT,
        down_bias: TensorT | None,
    ) -> Experts[TensorT]:
        """The experts of a gpt-oss checkpoint, used where they lie.

        gate_up_proj_blocks u8 [E,2I,H/32,16], gate_up_proj_scales u8 [E,2I,H/32], down_proj_blocks u8
        [E,H,I/32,16], down_proj_scales u8 [E,H,I/32]; biases [E,2I] and [E,H] in f32 or the dtype of x.
        """
        w13, w2 = (
            cast(Any, blocks).reshape(*cast(Any, blocks).shape[:2], -1)
            for blocks in (gate_up_blocks, down_blocks)
        )
        return cls(
            w13,
            w2,
            order="interleaved",
            activation="swiglu_oai",
            w13_bias=gate_up_bias,
            w2_bias=down_bias,
            weight_format="mxfp4",
            w13_scales=gate_up_scales,
            w2_scales=down_scales,
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return _dim(self.w13, 0)

    @property
    def hidden(self) -> int:
        """H."""
        return _depth(self.w13, _format(self.weight_format))

    @property
    def inter(self) -> int:
        """I."""
        return _depth(self.w2, _format(self.weight_format))

    def workspace_bytes(
        self,
        num_tokens: int,
        top_k: int,
        *,
        dtype: str | None = None,
        x_format: QuantFormat | str | None = None,
    ) -> int:
        """Bytes of workspace that fused_experts() needs for any routing of T tokens to K experts each.

        `dtype` is that of x: by default the weights', or bf16 where they are quantised.
        """
        fw = framework_of("Experts", "w13", self.w13)
        if dtype is None:
            dtype = fw.dtype_name(self.w13) if self.weight_format is None else "bf16"
        return fused_experts_workspace_bytes(
            num_tokens,
            top_k,
            self.num_experts,
            self.hidden,
            self.inter,
            dtype,
            fw.device(self.w13),
            x_format,
            self.weight_format,
        )

    def __repr__(self) -> str:
        return (
            f"moecore.Experts(num_experts={self.num_experts}, hidden={self.hidden}, inter={self.inter}, "
            f"order={self.order!r}, activation={self.activation!r}"
            + (f", weight_format={self.weight_format!r})" if self.weight_format is not None else ")")
        )


def fused_experts(
    x: TensorT,
    weights: DLPackTensor,
    ids: DLPackTensor,
    experts: Experts[TensorT],
    *,
    expert_map: DLPackTensor | None = None,
    first_expert: int = 0,
    apply_router_weight_on_input: bool = False,
    residual: DLPackTensor | None = None,
    x_format: QuantFormat | str | None = None,
    x_scale: DLPackTensor | None = None,
    inter_scale: DLPackTensor | None = None,
    out: TensorT | None = None,
    workspace: DLPackTensor | None = None,
    stream: StreamLike = None,
) -> TensorT:
    """The whole expert layer: plan, grouped_gemm + activation, grouped_gemm, finalize.

    x [T,H], weights f32|f16|bf16 [T,K], ids i32|i64 [T,K] -> [T,H]; x and the experts share one dtype of
    f32|bf16|f16, unless these are quantised. `expert_map`, `first_expert`: as in plan().
    `apply_router_weight_on_input` multiplies the first product by the router weight instead of weighting the
    sum. `residual` [T,H] is added in f32. On cuda a workspace of experts.workspace_bytes(T, K) bytes (with
    `dtype` and `x_format` as here) is allocated unless passed; on cpu each thread keeps its own.

    With an `x_format` that grouped_gemm() takes beside the format of the experts, x and the activated rows
    (in x's dtype) are quantised before each product. `x_scale` and `inter_scale` are the scales f32 [1,1] of
    "fp8_tensor_static" or the global scales f32 [1] of "nvfp4".
    """
    if (compiled := _compiled()) is not None:
        return compiled.fused_experts(  # type: ignore[no-any-return]
            x,
            weights,
            ids,
            experts,
            expert_map,
            first_expert,
            apply_router_weight_on_input,
            residual,
            x_format,
            x_scale,
            inter_scale,
            out,
        )
    fw = framework_of("fused_experts", "x", x)
    fw.admit(
        "fused_experts",
        x,
        weights,
        experts.w13,
        experts.w2,
        experts.w13_bias,
        experts.w2_bias,
        experts.w13_scales,
        experts.w2_scales,
        residual,
    )
    x_format = _format(x_format)
    if out is None:
        out = fw.empty(x, (_dim(x, 0), _dim(x, 1)))
    if workspace is None and not fw.on_host(x):
        size = experts.workspace_bytes(_dim(ids, 0), _dim(ids, 1), dtype=fw.dtype_name(x), x_format=x_format)
        workspace = fw.empty(x, (size,), "u8")
    _core.fused_experts(
        x,
        weights,
        ids,
        experts.w13,
        experts.w2,
        out,
        activation=experts.activation,
        order=experts.order,
        alpha=experts.alpha,
        beta=experts.beta,
        limit=experts.limit,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        expert_map=expert_map,
        first_expert=first_expert,
        apply_router_weight_on_input=apply_router_weight_on_input,
        residual=residual,
        x_format=x_format,
        x_scale=x_scale,
        inter_scale=inter_scale,
        weight_format=_format(experts.weight_format),
        w13_scales=experts.w13_scales,
        w2_scales=experts.w2_scales,
        w13_global_scale=experts.w13_global_scale,
        w2_global_scale=experts.w2_global_scale,
        workspace=workspace,
        stream=stream,
    )
    return fw.finish(out)  # type: ignore[no-any-return]


def transpose_experts(src: TensorT, *, out: TensorT | None = None, stream: StreamLike = None) -> TensorT:
    """out[e,n,k] = src[e,k,n]: a transposed checkpoint's weights in the layout of Experts.

    [E,A,B] -> [E,B,A] of any dtype of 8 to 64 bits. With `out`, slices of experts (`src[e:e+1]`) convert a
    checkpoint one expert at a time without a second copy in memory.
    """
    fw = framework_of("transpose_experts", "src", src)
    fw.admit("transpose_experts", src)
    if out is None:
        out = fw.empty(src, (_dim(src, 0), _dim(src, 2), _dim(src, 1)))
    _core.transpose_experts(src, out, stream=stream)
    return fw.finish(out)  # type: ignore[no-any-return]


def view_as(x: DLPackTensor, dtype: str) -> Any:
    """The memory of `x` as a moecore dtype ("e4m3", "e8m0", "e2m1", ...), for frameworks that lack it.

    Bytes viewed as "e2m1" hold two elements each, the even one in the low nibble. torch tensors become native
    views where torch has the dtype; otherwise the result is an object that every moecore op takes, with
    `.base`, `.dtype`, `.shape`.
    """
    return framework_of("view_as", "x", x).view(x, dtype)


def plan_workspace_bytes(num_tokens: int, top_k: int, num_experts: int, device: str = "cpu") -> int:
    """Bytes of workspace that plan() needs, at any alignment."""
    return _padded(_core.plan_workspace_bytes(num_tokens, top_k, num_experts, device))


def grouped_gemm_workspace_bytes(
    rows: int,
    n: int,
    k: int,
    num_experts: int,
    dtype: str,
    device: str = "cpu",
    x_format: QuantFormat | str | None = None,
    weight_format: QuantFormat | str | None = None,
) -> int:
    """Bytes of workspace that grouped_gemm() needs, at any alignment, for weights [num_experts, n, k].

    `dtype` is that of the result.
    """
    return _padded(
        _core.grouped_gemm_workspace_bytes(
            rows, n, k, num_experts, dtype, device, _format(x_format), _format(weight_format)
        )
    )


def fused_experts_workspace_bytes(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inter: int,
    dtype: str,
    device: str = "cpu",
    x_format: QuantFormat | str | None = None,
    weight_format: QuantFormat | str | None = None,
) -> int:
    """Bytes of workspace that fused_experts() needs, at any alignment and for every routing."""
    return _padded(
        _core.fused_experts_workspace_bytes(
            num_tokens,
            top_k,
            num_experts,
            hidden,
            inter,
            dtype,
            device,
            _format(x_format),
            _format(weight_format),
        )
    )


def _padded(size: int) -> int:
    return size + _ALIGNMENT_SLACK if size else 0


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which kernel and policy `op` would take for these arguments, and why; runs nothing.

    `op` is the name of a function of moecore; the arguments are its own, and are validated.
    """
    if op not in OPS:
        raise ValueError(f'explain: op is "{op}", expected one of {", ".join(OPS)}')
    import moecore

    call = getattr(moecore, op)
    _core.explain_begin()
    try:
        call(*args, **kwargs)
    finally:
        text = _core.explain_end()
    return text


OPS = (
    "route",
    "plan",
    "permute",
    "shuffle_rows",
    "activate",
    "grouped_gemm",
    "finalize",
    "fused_experts",
    "transpose_experts",
    "quantize",
    "dequantize",
)
"""The names of the ops, in the order of the data path, then those beside it."""

__all__ = [
    "OPS",
    "Experts",
    "Framework",
    "Plan",
    "activate",
    "explain",
    "finalize",
    "finalize_quantize",
    "fused_experts",
    "fused_experts_workspace_bytes",
    "grouped_gemm",
    "grouped_gemm_workspace_bytes",
    "permute",
    "plan",
    "plan_workspace_bytes",
    "route",
    "route_plan",
    "shuffle_rows",
    "transpose_experts",
    "view_as",
]
