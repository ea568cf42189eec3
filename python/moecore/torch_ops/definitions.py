"""The ops in torch: schema, outputs, and the call of moecore."""

from __future__ import annotations

import ast
import atexit
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moecore import ops, quantization
from moecore._core import QuantFormat
from moecore.ops import Experts, Plan
from moecore.ops.rows import block_scale_shape


class Op(NamedTuple):
    """An op of torch.ops.moecore."""

    name: str
    parameters: str  # of the schema, in the order of `run` and `outputs`
    num_outputs: int
    outputs: Callable[..., tuple[Tensor, ...]]  # allocates: also the fake implementation
    run: Callable[..., Any]  # (outputs, *arguments): writes the outputs


def _route_outputs(logits: Tensor, top_k: int, *_: Any) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _route(
    out: Any, logits: Any, top_k: int, scoring: Any, bias: Any, num_groups: int, topk_groups: int,
    group_score: Any, renormalize: bool, scale: float, is_padding: Any,
) -> None:  # fmt: skip
    ops.route(
        logits, top_k, scoring=scoring, bias=bias, num_groups=num_groups, topk_groups=topk_groups,
        group_score=group_score, renormalize=renormalize, scale=scale, is_padding=is_padding, out=out,
    )  # fmt: skip


def _plan_outputs(
    ids: Tensor, num_experts: int, expert_map: Any, first_expert: int, hidden: int, inter: int, *_: Any
) -> tuple[Tensor, ...]:
    def i32(*shape: Any) -> Tensor:
        return ids.new_empty(shape, dtype=torch.int32)

    num_tokens, top_k = ids.shape
    rows = num_tokens * top_k
    return (
        i32(num_experts + 1), i32(num_experts + 1), i32(rows), i32(num_tokens, top_k), i32(rows),
        i32(num_experts, 3), i32(num_experts, 3),
    )  # fmt: skip


def _plan(
    out: Any, ids: Any, num_experts: int, expert_map: Any, first_expert: int, scale_alignment: int,
    hidden: int, inter: int, gated: bool, swap_ab: bool,
) -> None:  # fmt: skip
    ops.plan(
        ids, num_experts, expert_map=expert_map, first_expert=first_expert, scale_alignment=scale_alignment,
        problem_sizes=(hidden, inter), gated=gated, swap_ab=swap_ab, out=Plan(*out),
    )  # fmt: skip


def _route_plan_outputs(
    logits: Tensor, top_k: int, num_experts: int, scoring: Any, bias: Any, num_groups: int, topk_groups: int,
    group_score: Any, renormalize: bool, scale: float, is_padding: Any, expert_map: Any, first_expert: int,
    hidden: int, inter: int, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights, ids = _route_outputs(logits, top_k)
    return weights, ids, *_plan_outputs(ids, num_experts, expert_map, first_expert, hidden, inter)


def _route_plan(
    out: Any, logits: Any, top_k: int, num_experts: int, scoring: Any, bias: Any, num_groups: int,
    topk_groups: int, group_score: Any, renormalize: bool, scale: float, is_padding: Any, expert_map: Any,
    first_expert: int, hidden: int, inter: int, scale_alignment: int, gated: bool, swap_ab: bool,
) -> None:  # fmt: skip
    ops.route_plan(
        logits, top_k, num_experts, scoring=scoring, bias=bias, num_groups=num_groups,
        topk_groups=topk_groups, group_score=group_score, renormalize=renormalize, scale=scale,
        is_padding=is_padding, expert_map=expert_map, first_expert=first_expert,
        scale_alignment=scale_alignment, problem_sizes=(hidden, inter), gated=gated, swap_ab=swap_ab,
        out=(out[0], out[1], Plan(*out[2:])),
    )  # fmt: skip


def _permute_outputs(x: Tensor, row_token: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (x.new_empty((row_token.shape[0], x.shape[1])),)


def _permute(out: Any, x: Any, row_token: Any, slot_row: Any, expert_offsets: Any) -> None:
    ops.permute(x, Plan(expert_offsets, None, row_token, slot_row, None), out=out[0])


def _permute_scales_outputs(x: Tensor, scales: Tensor, row_token: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _permute_outputs(x, row_token) + _permute_outputs(scales, row_token)


def _permute_scales(
    out: Any, x: Any, scales: Any, row_token: Any, slot_row: Any, expert_offsets: Any
) -> None:
    ops.permute(x, Plan(expert_offsets, None, row_token, slot_row, None), scales=scales, out=tuple(out))


def _shuffle_rows(out: Any, x: Any, map: Any) -> None:
    ops.shuffle_rows(x, map, out=out[0])


def _shuffle_rows_scales(out: Any, x: Any, scales: Any, map: Any) -> None:
    ops.shuffle_rows(x, map, scales=scales, out=tuple(out))


def _transpose_experts_outputs(src: Tensor) -> tuple[Tensor, ...]:
    return (src.new_empty((src.shape[0], src.shape[2], src.shape[1])),)


def _transpose_experts(out: Any, src: Any) -> None:
    ops.transpose_experts(src, out=out[0])


def _activate_outputs(x: Tensor, kind: str, order: str, *_: Any) -> tuple[Tensor, ...]:
    return (x.new_empty((x.shape[0], x.shape[1] if order == "plain" else x.shape[1] // 2)),)


def _activate(
    out: Any, x: Any, kind: Any, order: Any, alpha: Any, beta: Any, limit: Any, expert_offsets: Any
) -> None:
    ops.activate(
        x, kind, order=order, alpha=alpha, beta=beta, limit=limit, expert_offsets=expert_offsets, out=out[0]
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def format_name(format: QuantFormat | str | None) -> str | None:
    """What stands for a format among the arguments: its kind, or the call that makes it."""
    return format if format is None or isinstance(format, str) else repr(format)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def format_kind(format: QuantFormat | str) -> str:
    """The kind of a format."""
    return format if isinstance(format, str) else format.kind


@functools.lru_cache(maxsize=64)
def _format_object(name: str) -> QuantFormat:
    """The format of a format_name(), of this process or another."""
    if not name.startswith("QuantFormat("):
        return QuantFormat(name)
    call: Any = ast.parse(name, mode="eval").body
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return QuantFormat(*map(ast.literal_eval, call.args), **options)


atexit.register(_format_object.cache_clear)


def _format(name: str | None) -> QuantFormat | None:
    return None if name is None else _format_object(name)


def _grouped_gemm_outputs(
    x: Tensor, weights: Tensor, expert_offsets: Any, bias: Any, row_token: Any, activation: Any, order: str,
    alpha: Any, beta: Any, limit: Any, row_weights: Any, x_format: Any, x_scales: Any, x_global_scale: Any,
    weight_format: Any, weight_scales: Any, weight_global_scale: Any, out_dtype: str | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, n = (x if row_token is None else row_token).shape[0], weights.shape[1]
    shape = (rows, n if activation is None or order == "plain" else n // 2)
    if out_dtype is None and x_format is None:
        return (x.new_empty(shape),)
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return (x.new_empty(shape, dtype=dtypes[out_dtype or "bf16"]),)


def _grouped_gemm(
    out: Any, x: Any, weights: Any, expert_offsets: Any, bias: Any, row_token: Any, activation: Any,
    order: Any, alpha: Any, beta: Any, limit: Any, row_weights: Any, x_format: Any, x_scales: Any,
    x_global_scale: Any, weight_format: Any, weight_scales: Any, weight_global_scale: Any, out_dtype: Any,
) -> None:  # fmt: skip
    ops.grouped_gemm(
        x, weights, expert_offsets, bias=bias, row_token=row_token, activation=activation, order=order,
        alpha=alpha, beta=beta, limit=limit, row_weights=row_weights, x_format=_format(x_format),
        x_scales=x_scales, x_global_scale=x_global_scale, weight_format=_format(weight_format),
        weight_scales=weight_scales, weight_global_scale=weight_global_scale, out_dtype=out_dtype, out=out[0],
    )  # fmt: skip


_DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn
}  # fmt: skip


def _finalize_outputs(
    rows: Tensor, slot_row: Tensor, weights: Any, hidden: int | None, cast_weights: bool, residual: Any,
    row_scales: Any, scale_layout: str, dtype: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (slot_row.shape[0], rows.shape[1] if hidden is None else hidden)
    return (rows.new_empty(shape, dtype=rows.dtype if dtype is None else _DTYPES[dtype]),)


def _finalize(
    out: Any, rows: Any, slot_row: Any, weights: Any, hidden: Any, cast_weights: bool, residual: Any,
    row_scales: Any, scale_layout: str, dtype: Any,
) -> None:  # fmt: skip
    ops.finalize(
        rows, slot_row, weights, hidden=hidden, cast_weights=cast_weights, residual=residual,
        row_scales=row_scales, scale_layout=scale_layout, dtype=dtype, out=out[0],
    )  # fmt: skip


def _finalize_quantize_outputs(
    rows: Tensor, slot_row: Tensor, weights: Any, hidden: int | None, residual: Any, row_scales: Any,
    scale_layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    num_tokens, width = slot_row.shape[0], rows.shape[1] if hidden is None else hidden
    scales = rows.new_empty(block_scale_shape(num_tokens, width, scale_layout), dtype=torch.float32)
    return rows.new_empty((num_tokens, width)), scales


def _finalize_quantize(
    out: Any, rows: Any, slot_row: Any, weights: Any, hidden: Any, residual: Any, row_scales: Any,
    scale_layout: str,
) -> None:  # fmt: skip
    ops.finalize_quantize(
        rows, slot_row, weights, hidden=hidden, residual=residual, row_scales=row_scales,
        scale_layout=scale_layout, out=tuple(out),
    )  # fmt: skip


def _fused_experts_outputs(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape),)


def _fused_experts(
    out: Any, x: Any, weights: Any, ids: Any, w13: Any, w2: Any, w13_bias: Any, w2_bias: Any, activation: Any,
    order: Any, alpha: Any, beta: Any, limit: Any, expert_map: Any, first_expert: int,
    apply_router_weight_on_input: bool, residual: Any, weight_format: Any, w13_scales: Any, w2_scales: Any,
    w13_global_scale: Any, w2_global_scale: Any, x_format: Any, x_scale: Any, inter_scale: Any,
) -> None:  # fmt: skip
    experts: Experts[Any] = Experts(
        w13, w2, order=order, activation=activation, alpha=alpha, beta=beta, limit=limit, w13_bias=w13_bias,
        w2_bias=w2_bias, weight_format=_format(weight_format), w13_scales=w13_scales, w2_scales=w2_scales,
        w13_global_scale=w13_global_scale, w2_global_scale=w2_global_scale,
    )  # fmt: skip
    ops.fused_experts(
        x, weights, ids, experts, expert_map=expert_map, first_expert=first_expert,
        apply_router_weight_on_input=apply_router_weight_on_input, residual=residual,
        x_format=_format(x_format), x_scale=x_scale, inter_scale=inter_scale, out=out[0],
    )  # fmt: skip


def _up(n: Any, multiple: int) -> Any:
    return (n + multiple - 1) // multiple * multiple


def _scale_shape(format: QuantFormat, rows: Any, cols: Any, experts: Any, groups: Any) -> tuple[Any, Any]:
    """QuantFormat.scale_shape() and expert_scale_rows() for sizes that may be symbols."""
    if format.block == 0:
        return (1 if format.scale_shape(2, 1)[0] == 1 else rows), 1
    blocks = (cols + format.block - 1) // format.block
    if format.layout == "linear":
        return rows, blocks
    if format.layout == "column_major":
        pitch = _up(rows, 4)
        return (blocks, pitch) if format.has_f32_scales else (_up(blocks, 4) // 4, 4 * pitch)
    tile = 128 if format.layout == "swizzled_128x4" else 8
    if experts is not None:
        rows = (rows + 127 * torch.sym_min(rows, experts)) // 128 * 128
    elif groups is not None:
        rows = groups * _up(rows // groups, tile)
    return _up(rows, tile), _up(blocks, 4)


def _quantize_outputs(
    x: Tensor, format: str, global_scale: Any, scale: Any, expert_offsets: Any, scale_offsets: Any,
    row_counts: Any, row_token: Any, slot_row: Any, activation: str | None, order: str, alpha: Any, beta: Any,
    limit: Any, multiple: int, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    fmt = _format_object(format)
    quantization.check_static_scale(fmt.kind, scale, None)
    rows, width = (x if row_token is None else row_token).shape[0], x.shape[1]
    cols = width // 2 if activation is not None and order != "plain" else width
    padded = quantization.padded_columns(fmt, cols, multiple)
    experts = None if expert_offsets is None else expert_offsets.shape[0] - 1
    groups = None if row_counts is None else row_counts.shape[0]
    return (
        x.new_empty((rows, padded // 2 if fmt.is_fp4 else padded), dtype=torch.uint8),
        x.new_empty(
            _scale_shape(fmt, rows, padded, experts, groups),
            dtype=torch.float32 if fmt.has_f32_scales else torch.uint8,
        ),
    )


def _quantize(
    out: Any, x: Any, format: str, global_scale: Any, scale: Any, expert_offsets: Any, scale_offsets: Any,
    row_counts: Any, row_token: Any, slot_row: Any, activation: Any, order: Any, alpha: Any, beta: Any,
    limit: Any, multiple: int,
) -> None:  # fmt: skip
    fmt = _format_object(format)
    if scale is not None:
        quantization.check_static_scale(fmt.kind, scale, None)
        out[1].copy_(scale)
    rows: dict[str, Any] = {
        "expert_offsets": expert_offsets, "scale_offsets": scale_offsets, "row_counts": row_counts
    }  # fmt: skip
    if row_token is not None:
        rows = {"plan": Plan(expert_offsets, scale_offsets, row_token, slot_row, None)}
    quantization.quantize(
        x, fmt, global_scale=global_scale, **rows, activation=activation, order=order, alpha=alpha,
        beta=beta, limit=limit, out=(out[0], out[1]),
    )  # fmt: skip


def _dequantize_outputs(
    data: Tensor, scales: Tensor, format: str, dtype: str, hidden: Any, *_: Any
) -> tuple[Tensor, ...]:
    cols = data.shape[1] * (2 if _format_object(format).is_fp4 else 1)
    return (data.new_empty((data.shape[0], cols if hidden is None else hidden), dtype=_DTYPES[dtype]),)


def _dequantize(
    out: Any, data: Any, scales: Any, format: str, dtype: Any, hidden: Any, global_scale: Any,
    expert_offsets: Any, scale_offsets: Any, row_counts: Any,
) -> None:  # fmt: skip
    quantization.dequantize(
        data, scales, _format_object(format), hidden=hidden, global_scale=global_scale,
        expert_offsets=expert_offsets, scale_offsets=scale_offsets, row_counts=row_counts, out=out[0],
    )  # fmt: skip


def _global_scale_outputs(
    x: Tensor, expert_offsets: Any, row_counts: Any, per_expert: bool, *_: Any
) -> tuple[Tensor, ...]:
    experts: Any = expert_offsets if expert_offsets is not None else row_counts
    count = experts.shape[0] - (expert_offsets is not None) if per_expert else 1
    return (x.new_empty((count,), dtype=torch.float32),)


def _global_scale(out: Any, x: Any, expert_offsets: Any, row_counts: Any, per_expert: bool) -> None:
    quantization.global_scale(
        x, expert_offsets=expert_offsets, row_counts=row_counts, per_expert=per_expert, out=out[0]
    )


_ACTIVATION = "str order, float? alpha, float? beta, float? limit"
OPS = [
    Op(
        "route",
        "Tensor logits, SymInt top_k, str scoring, Tensor? bias, int num_groups, int topk_groups, "
        "str group_score, bool renormalize, float scale, Tensor? is_padding",
        2, _route_outputs, _route,
    ),
    Op(
        "plan",
        "Tensor ids, SymInt num_experts, Tensor? expert_map, SymInt first_expert, int scale_alignment, "
        "SymInt hidden, SymInt inter, bool gated, bool swap_ab",
        7, _plan_outputs, _plan,
    ),
    Op(
        "route_plan",
        "Tensor logits, SymInt top_k, SymInt num_experts, str scoring, Tensor? bias, int num_groups, "
        "int topk_groups, str group_score, bool renormalize, float scale, Tensor? is_padding, "
        "Tensor? expert_map, SymInt first_expert, SymInt hidden, SymInt inter, int scale_alignment, "
        "bool gated, bool swap_ab",
        9, _route_plan_outputs, _route_plan,
    ),
    Op(
        "permute", "Tensor x, Tensor row_token, Tensor slot_row, Tensor expert_offsets",
        1, _permute_outputs, _permute,
    ),
    Op(
        "permute_scales", "Tensor x, Tensor scales, Tensor row_token, Tensor slot_row, Tensor expert_offsets",
        2, _permute_scales_outputs, _permute_scales,
    ),
    Op("shuffle_rows", "Tensor x, Tensor map", 1, _permute_outputs, _shuffle_rows),
    Op(
        "shuffle_rows_scales", "Tensor x, Tensor scales, Tensor map",
        2, _permute_scales_outputs, _shuffle_rows_scales,
    ),
    Op("transpose_experts", "Tensor src", 1, _transpose_experts_outputs, _transpose_experts),
    Op(
        "activate", f"Tensor x, str kind, {_ACTIVATION}, Tensor? expert_offsets",
        1, _activate_outputs, _activate,
    ),
    Op(
        "grouped_gemm",
        "Tensor x, Tensor weights, Tensor expert_offsets, Tensor? bias, Tensor? row_token, str? activation, "
        f"{_ACTIVATION}, Tensor? row_weights, str? x_format, Tensor? x_scales, Tensor? x_global_scale, "
        "str? weight_format, Tensor? weight_scales, Tensor? weight_global_scale, str? out_dtype",
        1, _grouped_gemm_outputs, _grouped_gemm,
    ),
    Op(
        "finalize",
        "Tensor rows, Tensor slot_row, Tensor? weights, SymInt? hidden, bool cast_weights, Tensor? residual, "
        "Tensor? row_scales, str scale_layout, str? dtype",
        1, _finalize_outputs, _finalize,
    ),
    Op(
        "finalize_quantize",
        "Tensor rows, Tensor slot_row, Tensor? weights, SymInt? hidden, Tensor? residual, "
        "Tensor? row_scales, str scale_layout",
        2, _finalize_quantize_outputs, _finalize_quantize,
    ),
    Op(
        "fused_experts",
        "Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
        f"str activation, {_ACTIVATION}, Tensor? expert_map, SymInt first_expert, "
        "bool apply_router_weight_on_input, Tensor? residual, str? weight_format, Tensor? w13_scales, "
        "Tensor? w2_scales, Tensor? w13_global_scale, Tensor? w2_global_scale, str? x_format, "
        "Tensor? x_scale, Tensor? inter_scale",
        1, _fused_experts_outputs, _fused_experts,
    ),
    Op(
        "quantize",
        "Tensor x, str format, Tensor? global_scale, Tensor? scale, Tensor? expert_offsets, "
        "Tensor? scale_offsets, Tensor? row_counts, Tensor? row_token, Tensor? slot_row, str? activation, "
        f"{_ACTIVATION}, int multiple",
        2, _quantize_outputs, _quantize,
    ),
    Op(
        "dequantize",
        "Tensor data, Tensor scales, str format, str dtype, SymInt? hidden, Tensor? global_scale, "
        "Tensor? expert_offsets, Tensor? scale_offsets, Tensor? row_counts",
        1, _dequantize_outputs, _dequantize,
    ),
    Op(
        "global_scale", "Tensor x, Tensor? expert_offsets, Tensor? row_counts, bool per_expert",
        1, _global_scale_outputs, _global_scale,
    ),
]  # fmt: skip
