"""Quantising rows, alone and fused with what comes before, and the way back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

import moecore
from moecore import reference
from moecore.bench import checks
from moecore.bench.cases import Case
from moecore.bench.checks import Check
from moecore.bench.workloads.lab import CHECKED_ROWS, Lab, Work
from moecore.bench.workloads.routing import sampled
from moecore.bench.workloads.weights import BITS, activation_options

__all__ = ["activate_quantize", "dequantize", "permute_quantize", "quantize"]


def quantize(lab: Lab, case: Case, source: str = "rows") -> Work:
    """``source``: "rows" of a dense x, "gate_up" through the activation, "tokens" through a plan."""
    layer, space, kind = case.layer, lab.space, case.dtype
    t, k, bits = case.tokens, layer.top_k, BITS[case.dtype]
    rows = t if source == "rows" else t * k
    read_rows = t if source == "tokens" else rows
    columns = layer.inter if source == "gate_up" else layer.hidden
    width = 2 * columns if source == "gate_up" else columns
    fmt = _format(kind)
    scale_rows, scale_columns = (int(n) for n in fmt.scale_shape(rows, columns))
    scale_bytes = scale_rows * scale_columns * (4 if fmt.has_f32_scales else 1)
    moved = read_rows * width * 2, rows * columns * bits // 8 + scale_bytes
    global_scale = space.put(np.full(1, checks.GLOBAL_SCALE, np.float32), "f32") if kind == "nvfp4" else None
    static = space.put(np.full((1, 1), checks.STATIC_SCALE, np.float32), "f32")

    def make(index: int) -> SimpleNamespace:
        s = lab.planned(case, index) if source == "tokens" else SimpleNamespace()
        s.layer, s.x = layer, space.normal((read_rows, width), "bf16")
        s.data = space.empty((rows, columns * bits // 8), "u8")
        s.scales = (
            static
            if kind == "fp8_tensor_static"
            else space.empty((scale_rows, scale_columns), "f32" if fmt.has_f32_scales else "u8")
        )
        return s

    options: dict[str, Any] = {"global_scale": global_scale}
    if source == "gate_up":
        options |= {"activation": layer.activation, **activation_options(layer)}

    def run(s: SimpleNamespace) -> None:
        plan = {"plan": s.plan} if source == "tokens" else {}
        moecore.quantize(s.x, fmt, out=(s.data, s.scales), **options, **plan)

    sets = [make(i) for i in lab.sets(sum(moved))]
    sample = sampled(rows, CHECKED_ROWS)

    def check(output: Any) -> Check:
        data, scales = output
        from_rows = space.host(sets[0].plan.row_token, sample) if source == "tokens" else sample
        x = reference.to_float64(space.host(sets[0].x, from_rows))
        if source == "gate_up":
            x = checks.activation(*checks.split(x, layer.order), layer)
        held = space.host(scales) if scales.shape[0] == 1 else space.host(scales, sample)
        actual = checks.dequantize_rows(space.host(data, sample), held, kind, checks.GLOBAL_SCALE)
        return checks.quantized(actual, x, kind, 2.0**-16)

    shape = f"R{rows} I{columns}" if source == "gate_up" else f"T{t} H{columns}"
    return Work(shape, sets, run, lambda s: (s.data, s.scales), check, *moved)


def activate_quantize(lab: Lab, case: Case) -> Work:
    """Gate and up columns to codes."""
    return quantize(lab, case, "gate_up")


def permute_quantize(lab: Lab, case: Case) -> Work:
    """Tokens to codes in order of experts."""
    return quantize(lab, case, "tokens")


def dequantize(lab: Lab, case: Case) -> Work:
    """Codes back to bf16."""
    layer, space, kind = case.layer, lab.space, case.dtype
    t, h, bits = case.tokens, layer.hidden, BITS[case.dtype]
    fmt = _format(kind)
    global_scale = space.put(np.full(1, checks.GLOBAL_SCALE, np.float32), "f32") if kind == "nvfp4" else None
    scale_rows, scale_columns = (int(n) for n in fmt.scale_shape(t, h))
    scale_bytes = scale_rows * scale_columns * (4 if fmt.has_f32_scales else 1)
    moved = t * h * bits // 8 + scale_bytes, t * h * 2

    def make(index: int) -> SimpleNamespace:
        x = space.normal((t, h), "bf16")
        data, scales = moecore.quantize(x, fmt, global_scale=global_scale)
        return SimpleNamespace(data=data, scales=scales, out=space.empty((t, h), "bf16"))

    def run(s: SimpleNamespace) -> None:
        moecore.dequantize(
            s.data, s.scales, fmt, global_scale=global_scale, out=s.out, hidden=h, dtype="bf16"
        )

    sets = [make(i) for i in lab.sets(sum(moved))]
    sample = sampled(t, CHECKED_ROWS)

    def check(output: Any) -> Check:
        data, scales = space.host(sets[0].data, sample), space.host(sets[0].scales, sample)
        expected = checks.dequantize_rows(data, scales, kind, checks.GLOBAL_SCALE)
        bound = (2.0**-8 + 2.0**-22) * np.abs(expected) + 2.0**-134
        return checks.compare(reference.to_float64(space.host(output, sample)), expected, bound)

    return Work(f"T{t} H{h}", sets, run, lambda s: s.out, check, *moved)


def _format(kind: str) -> moecore.QuantFormat:
    """The format with its scales in rows, as dense tensors have them."""
    return moecore.QuantFormat(kind, layout="linear")
