"""Quantised activations: fp8, nvfp4, mxfp8 and mxfp4, dense and per expert, fused with what comes before.

Codes and byte-sized scales are u8 tensors (two e2m1 codes to the byte, the even column in the low nibble);
`moecore.view_as(data, "e4m3")` re-tags them. f32 scales are f32 tensors. The same bits on CPU and CUDA, for
every batch split and in every fused form; docs/formats.md has the tables and the rules for NaN and infinity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moecore import _core
from moecore._core import QuantFormat, expert_scale_rows
from moecore._frameworks import framework_of
from moecore.ops import Plan
from moecore.ops.arguments import (
    FLOATS,
    check_dtype,
    check_least,
    check_out,
    dim,
    need_format,
    traced_ops,
)
from moecore.ops.routing import check_plan
from moecore.typing import DLPackTensor, StreamLike


class Quantized(NamedTuple):
    """What quantize() gives."""

    data: Any
    """Codes [R,Hp] u8, fp4: [R,Hp/2] u8."""
    scales: Any
    """u8 or f32, of the shape and layout that the format says."""


def _rows_options(
    expert_offsets: DLPackTensor | None, scale_offsets: DLPackTensor | None, row_counts: DLPackTensor | None
) -> dict[str, DLPackTensor | None]:
    return {"expert_offsets": expert_offsets, "scale_offsets": scale_offsets, "row_counts": row_counts}


def padded_columns(format: QuantFormat, cols: Any, multiple: int) -> Any:
    """Columns of the output: `cols` rounded up to `multiple`, and to whole bytes."""
    step = multiple * (2 if format.is_fp4 and multiple % 2 else 1)
    return -(-cols // step) * step


def check_static_scale(kind: str, scale: Any, out: Any) -> None:
    """ValueError for a `scale` that would not be read, and for a static format without one."""
    if kind != "fp8_tensor_static":
        if scale is not None:
            raise ValueError(f'quantize: scale is given, expected None with "{kind}"')
    elif out is None:
        if scale is None:
            raise ValueError("quantize: scale is None, expected f32 [1,1] with fp8_tensor_static")
    elif scale is not None and scale is not out[1]:
        raise ValueError("quantize: scale is given, expected None with out, whose second tensor is the scale")


def _check_planned(plan: Plan, order: str, **others: Any) -> None:
    """ValueError for what a plan leaves no room for."""
    check_plan("quantize", plan)
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"quantize: {name} is given, expected None with a plan")
    if order != "gate_up":
        raise ValueError(f'quantize: order is "{order}", expected the default with a plan: no activation')


def _scale_rows(format: QuantFormat, rows: int, experts: Any, row_counts: Any) -> int:
    """Rows of a swizzled scale tensor: every split over the experts must fit."""
    if experts is not None:
        return int(expert_scale_rows(rows, int(experts.shape[0]) - 1))
    if row_counts is not None:
        groups = int(row_counts.shape[0])
        return groups * int(format.scale_shape(rows // max(groups, 1), 1)[0])
    return int(format.scale_shape(rows, 1)[0])


def quantize(
    x: Any,
    format: QuantFormat | str,
    *,
    global_scale: DLPackTensor | None = None,
    scale: Any = None,
    plan: Plan | None = None,
    expert_offsets: DLPackTensor | None = None,
    scale_offsets: DLPackTensor | None = None,
    row_counts: DLPackTensor | None = None,
    activation: str | None = None,
    order: str = "gate_up",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    multiple: int = 1,
    out: Quantized | tuple[Any, Any] | None = None,
    stream: StreamLike = None,
) -> Quantized:
    """Quantises rows x [R,H] f32|f16|bf16.

    `format` is a QuantFormat or its kind: "fp8_tensor", "fp8_tensor_static" (with `scale` f32 [1,1]),
    "fp8_token", "fp8_block128", "nvfp4" (with `global_scale` f32 [1] or [E]), "mxfp8", "mxfp4". The output
    has H rounded up to `multiple` columns, with zero codes and zero scales behind column H.

    Per expert: `expert_offsets` i32 [E+1], and for swizzled layouts `scale_offsets` i32 [E+1]; rows from
    expert_offsets[E] on are not touched. Or `row_counts` i32 [E]: x is E equal groups of rows, of which the
    first row_counts[e] are quantised.
    With `plan`, x is [T,H] and row r of the output is x[plan.row_token[r]]: a token is quantised once and
    written to all its rows. A plan brings its own offsets and excludes an activation. With `activation` (and
    `order`, `alpha`, `beta`, `limit` as in activate()), x is [R,2I] and what is quantised is activate(x).

    Bytes that belong to no row are undefined without `out` and untouched with it. With `out` a static scale
    is read from out[1].

    ValueError for a static format without its scale, for `scale` with another format or beside another
    out[1], and for arguments that a plan excludes.
    """
    if plan is not None:
        _check_planned(
            plan,
            order,
            expert_offsets=expert_offsets,
            scale_offsets=scale_offsets,
            row_counts=row_counts,
            activation=activation,
            alpha=alpha,
            beta=beta,
            limit=limit,
        )
    check_least("quantize", 1, multiple=multiple)
    if (traced := traced_ops()) is not None:
        return Quantized(
            *traced.quantize(
                x,
                format,
                global_scale,
                scale,
                plan,
                expert_offsets,
                scale_offsets,
                row_counts,
                activation,
                order,
                alpha,
                beta,
                limit,
                multiple,
                out,
            )
        )
    fmt = need_format("quantize", format)
    check_static_scale(fmt.kind, scale, out)
    fw = framework_of("quantize", "x", x)
    fw.admit("quantize", x, scale, global_scale)
    rows, width = dim(x, 0), dim(x, 1)
    if plan is not None:
        rows = plan.num_rows
        expert_offsets, scale_offsets = plan.expert_offsets, plan.scale_offsets
    cols = width // 2 if activation is not None and order != "plain" else width
    if out is None:
        padded = padded_columns(fmt, cols, multiple)
        data = fw.empty(x, (rows, padded // 2 if fmt.is_fp4 else padded), "u8")
        if scale is None:
            scale_rows, scale_cols = fmt.scale_shape(rows, padded)
            if fmt.layout.startswith("swizzled"):
                scale_rows = _scale_rows(fmt, rows, expert_offsets, row_counts)
            scale = fw.empty(x, (scale_rows, scale_cols), "f32" if fmt.has_f32_scales else "u8")
    else:
        data, scale = out
    _core.quantize(
        x,
        data,
        scale,
        fmt,
        global_scale=global_scale,
        **_rows_options(expert_offsets, scale_offsets, row_counts),
        row_token=None if plan is None else plan.row_token,
        slot_row=None if plan is None else plan.slot_row,
        activation=activation,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        stream=stream,
    )
    return Quantized(fw.finish(data), fw.finish(scale))


def dequantize(
    data: Any,
    scales: Any,
    format: QuantFormat | str,
    *,
    dtype: str = "f32",
    hidden: int | None = None,
    global_scale: DLPackTensor | None = None,
    expert_offsets: DLPackTensor | None = None,
    scale_offsets: DLPackTensor | None = None,
    row_counts: DLPackTensor | None = None,
    out: Any = None,
    stream: StreamLike = None,
) -> Any:
    """RN(code * scale), of data and scales as quantize() gives them -> [R,hidden] of `dtype`.

    `dtype` is f32, f16 or bf16; `hidden` is at most the columns of data, and by default all of them.
    ValueError for other values, and for a `hidden` that is not that of `out`.
    """
    check_dtype("dequantize", "dtype", dtype, FLOATS)
    check_least("dequantize", 0, hidden=hidden)
    if (traced := traced_ops()) is not None:
        return traced.dequantize(
            data,
            scales,
            format,
            dtype,
            hidden,
            global_scale,
            expert_offsets,
            scale_offsets,
            row_counts,
            out,
        )
    fmt = need_format("dequantize", format)
    fw = framework_of("dequantize", "data", data)
    fw.admit("dequantize", data, scales, global_scale)
    if out is None:
        cols = dim(data, 1) * (2 if fmt.is_fp4 else 1)
        out = fw.empty(data, (dim(data, 0), cols if hidden is None else hidden), dtype)
    else:
        check_out(fw, "dequantize", out, hidden=hidden)
    _core.dequantize(
        data,
        scales,
        out,
        fmt,
        global_scale=global_scale,
        **_rows_options(expert_offsets, scale_offsets, row_counts),
        stream=stream,
    )
    return fw.finish(out)


def global_scale(
    x: Any,
    *,
    expert_offsets: DLPackTensor | None = None,
    row_counts: DLPackTensor | None = None,
    per_expert: bool = False,
    out: Any = None,
    stream: StreamLike = None,
) -> Any:
    """nvfp4's global scale min(2688 / largest |x|, largest f32), 1 for zeros. x [R,H] -> f32 [1].

    With `expert_offsets` i32 [E+1] or `row_counts` i32 [E] of the rows of experts alone, and with
    `per_expert` f32 [E], one for each.
    """
    if per_expert and expert_offsets is None and row_counts is None:
        raise ValueError("global_scale: per_expert is True, expected it with expert_offsets or row_counts")
    if (traced := traced_ops()) is not None:
        return traced.global_scale(x, expert_offsets, row_counts, per_expert, out)
    fw = framework_of("global_scale", "x", x)
    fw.admit("global_scale", x)
    if out is None:
        experts: Any = expert_offsets if expert_offsets is not None else row_counts
        count = max(dim(experts, 0) - (expert_offsets is not None), 0) if per_expert else 1
        out = fw.empty(x, (count,), "f32")
    _core.global_scale(x, out, expert_offsets=expert_offsets, row_counts=row_counts, stream=stream)
    return fw.finish(out)


def convert_scales(
    scales: Any,
    source: str,
    target: str,
    rows: int,
    cols: int,
    *,
    out: Any = None,
    stream: StreamLike = None,
) -> Any:
    """Moves u8 scales of `rows` x `cols` blocks from one layout to another; padding is zeroed."""
    check_least("convert_scales", 0, rows=rows, cols=cols)
    fw = framework_of("convert_scales", "scales", scales)
    if out is None:
        if target == "linear":
            shape = (rows, cols)
        elif target == "column_major":
            shape = (-(-cols // 4), -(-rows // 4) * 16)
        else:
            tile = 128 if target == "swizzled_128x4" else 8
            shape = (-(-rows // tile) * tile, -(-cols // 4) * 4)
        out = fw.empty(scales, shape, "u8")
    _core.convert_scales(scales, source, out, target, rows, cols, stream=stream)
    return fw.finish(out)


__all__ = [
    "QuantFormat",
    "Quantized",
    "convert_scales",
    "dequantize",
    "expert_scale_rows",
    "global_scale",
    "quantize",
]
