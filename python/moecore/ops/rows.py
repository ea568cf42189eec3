"""Ops on rows: moved, activated, summed."""

from __future__ import annotations

from typing import Any, overload

from moecore import _core
from moecore._frameworks import Framework, framework_of
from moecore.ops.arguments import FLOATS, check_dtype, check_least, check_out, dim, traced_ops
from moecore.ops.routing import Plan, check_plan
from moecore.typing import DLPackTensor, StreamLike, TensorT


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
    check_plan("permute", plan)
    if (traced := traced_ops()) is not None:
        return traced.permute(x, scales, plan.row_token, plan.slot_row, plan.expert_offsets, out)
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
        return (fw.empty(x, (rows, dim(x, 1))) if out is None else out), None
    if out is not None:
        return out[0], out[1]
    return fw.empty(x, (rows, dim(x, 1))), framework_of("permute", "scales", scales).empty(
        scales, (rows, dim(scales, 1))
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
    if (traced := traced_ops()) is not None:
        return traced.shuffle_rows(x, scales, map, out)
    fw = framework_of("shuffle_rows", "x", x)
    fw.admit("shuffle_rows", x, map, scales)
    rows, out_scales = _moved(fw, x, scales, dim(map, 0), out)
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
    if (traced := traced_ops()) is not None:
        return traced.activate(x, kind, order, alpha, beta, limit, expert_offsets, out)  # type: ignore[no-any-return]
    fw = framework_of("activate", "x", x)
    fw.admit("activate", x)
    if out is None:
        width = dim(x, 1)
        out = fw.empty(x, (dim(x, 0), width if order == "plain" else width // 2))
    _core.activate(
        x,
        out,
        kind=kind,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        expert_offsets=expert_offsets,
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
    check_dtype("finalize", "dtype", dtype, (*FLOATS, "e4m3"))
    check_least("finalize", 0, hidden=hidden)
    slots: Any = slot_row.slot_row if isinstance(slot_row, Plan) else slot_row
    if (traced := traced_ops()) is not None:
        return traced.finalize(  # type: ignore[no-any-return]
            rows, slots, weights, hidden, cast_weights, residual, row_scales, scale_layout, dtype, out
        )
    fw = framework_of("finalize", "rows", rows)
    fw.admit("finalize", rows, weights, residual, row_scales)
    if out is None:
        out = fw.empty(rows, (dim(slots, 0), dim(rows, 1) if hidden is None else hidden), dtype)
    else:
        check_out(fw, "finalize", out, hidden=hidden, dtype=dtype)
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
    check_least("finalize_quantize", 0, hidden=hidden)
    slots: Any = slot_row.slot_row if isinstance(slot_row, Plan) else slot_row
    if (traced := traced_ops()) is not None:
        return traced.finalize_quantize(  # type: ignore[no-any-return]
            rows, slots, weights, hidden, residual, row_scales, scale_layout, out
        )
    fw = framework_of("finalize_quantize", "rows", rows)
    fw.admit("finalize_quantize", rows, weights, residual, row_scales)
    if out is None:
        num_tokens, width = dim(slots, 0), dim(rows, 1) if hidden is None else hidden
        codes = fw.empty(rows, (num_tokens, width))
        scales = fw.empty(rows, block_scale_shape(num_tokens, width, scale_layout), "f32")
    else:
        codes, scales = out
        check_out(fw, "finalize_quantize", codes, hidden=hidden)
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
