"""The two products of a layer, and the layer."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np

import moecore
from moecore import reference
from moecore.bench import checks
from moecore.bench.cases import Case
from moecore.bench.checks import Check
from moecore.bench.workloads.lab import CHECKED_ROWS, Lab, Work
from moecore.bench.workloads.routing import (
    SEED,
    checked_tokens,
    head_rows,
    head_values,
    routed_ids,
    router_weights,
    sampled,
    touched,
)
from moecore.bench.workloads.weights import ITEMSIZE, Weights

__all__ = ["fused_experts", "grouped_gemm"]

_CHECKED_COLUMNS = 256


def grouped_gemm(lab: Lab, case: Case) -> Work:
    """One of the layer's two products, rows in order of experts."""
    layer, t, space = case.layer, case.tokens, lab.space
    w = lab.weights(layer, case.dtype)
    e, r = layer.num_experts, t * layer.top_k
    n, depth = (2 * layer.inter, layer.hidden) if case.part == "up" else (layer.hidden, layer.inter)
    matrix = w.w13 if case.part == "up" else w.w2
    expert_bytes = n * depth * w.bits / 8
    size, out_type = w.row_bytes, w.out_type
    rows_moved = r * depth * size, r * n * ITEMSIZE[out_type]
    scratch = moecore.grouped_gemm_workspace_bytes(
        r, n, depth, e, out_type, space.device, w.row_format, case.dtype if w.quantized else None
    )

    def make(index: int) -> SimpleNamespace:
        s = lab.planned(case, index)
        s.x, s.out = space.normal((r, depth), out_type), space.empty((r, n), out_type)
        s.x_scales = None
        if w.row_format:
            s.x, s.x_scales = moecore.quantize(s.x, w.row_format)
        s.weights_of, s.matrix, s.part, s.layer = w, matrix, case.part, layer
        s.workspace = space.empty((max(scratch, 1),), "u8")
        return s

    def run(s: SimpleNamespace) -> None:
        moecore.grouped_gemm(
            s.x,
            matrix.tensor,
            s.plan.expert_offsets,
            out=s.out,
            workspace=s.workspace,
            **w.gemm_options(matrix, s.x_scales),
        )

    estimate = touched(case, 1) * expert_bytes
    sets = [make(i) for i in lab.sets(sum(rows_moved), estimate)]
    weight_bytes = touched(case, len(sets)) * expert_bytes
    rng = np.random.default_rng(SEED)
    rows = sampled(r, CHECKED_ROWS // 2)
    columns = np.sort(rng.permutation(n)[:_CHECKED_COLUMNS])

    @functools.cache  # for moecore and every peer
    def expected() -> tuple[checks.F64, checks.F64]:
        s = sets[0]
        offsets = space.host(s.plan.expert_offsets).astype(np.int64)
        x = space.host(s.x, rows)
        if s.x_scales is not None:
            x = checks.dequantize_rows(x, space.host(s.x_scales, rows), case.dtype)
        else:
            x = reference.to_float64(x)
        products, reach, squares = np.empty((3, len(rows), len(columns)))
        for j, row in enumerate(rows):
            expert = int(np.searchsorted(offsets, row, side="right")) - 1
            found = space.product(x[j : j + 1], w.rows(matrix, expert, columns), [x[j : j + 1] ** 2])
            products[j], reach[j], (squares[j],) = found
        bound = checks.product_bound(reach, products, depth, out_type)
        if w.row_format and space.device != "cpu":
            bound += checks.cut_sums(squares)
        return products, bound

    def check(output: Any) -> Check:
        actual = reference.to_float64(space.host(output, rows))[:, columns]
        return checks.compare(actual, *expected())

    return Work(
        f"E{e} K{layer.top_k} N{n} K{depth}",
        sets,
        run,
        lambda s: s.out,
        check,
        rows_moved[0] + weight_bytes,
        rows_moved[1],
        2.0 * r * n * depth,
        w.rate,
    )


def fused_experts(lab: Lab, case: Case) -> Work:
    """The layer, from tokens and their routes to tokens."""
    layer, t, space = case.layer, case.tokens, lab.space
    w = lab.weights(layer, case.dtype)
    e, k, h, i = layer.num_experts, layer.top_k, layer.hidden, layer.inter
    out_type = w.out_type
    expert_bytes = layer.weights_per_expert * w.bits / 8
    experts = w.experts()
    workspace = 0
    if space.device != "cpu":
        workspace = experts.workspace_bytes(t, k, dtype=out_type, x_format=w.row_format)
    held, head = checked_tokens(layer, t), head_values(layer, out_type)

    def make(index: int) -> SimpleNamespace:
        s = lab.routed(case, index)
        s.x, s.out = space.normal((t, h), out_type), space.empty((t, h), out_type)
        if index == 0:
            space.assign(s.x, held, head[: len(held)])
        s.weights_of, s.layer = w, layer
        return s

    lab.need(workspace)
    scratch = space.empty((workspace,), "u8") if workspace else None

    def run(s: SimpleNamespace) -> None:
        moecore.fused_experts(
            s.x,
            s.weights,
            s.ids,
            experts,
            x_format=w.row_format,
            out=s.out,
            workspace=scratch,
        )

    estimate = touched(case, 1) * expert_bytes + 8 * t * k * (h + 2 * i)
    sets = [make(i) for i in lab.sets(2 * t * h * ITEMSIZE[out_type], estimate)[:16]]
    weight_bytes = touched(case, len(sets)) * expert_bytes

    def check(output: Any) -> Check:
        expected, bound = _oracle(lab, case, w)
        actual = reference.to_float64(space.host(output, np.asarray(held)))
        return checks.compare(actual, expected[: len(held)], bound[: len(held)])

    return Work(
        f"E{e} K{k} H{h} I{i}",
        sets,
        run,
        lambda s: s.out,
        check,
        weight_bytes + t * h * ITEMSIZE[out_type],
        t * h * ITEMSIZE[out_type],
        6.0 * t * k * h * i,
        w.rate,
    )


def _oracle(lab: Lab, case: Case, w: Weights) -> tuple[checks.F64, checks.F64]:
    """Output of the checked tokens and its bound; the same tokens stand in every batch of a layer."""
    layer = case.layer
    key = (layer.name, case.dtype, case.routing)
    if key not in lab.oracles:
        tokens = checked_tokens(layer, 1 << 20)
        ids = routed_ids(layer.num_experts, layer.top_k, 1 << 10, case.routing, 0)[head_rows(1 << 10)]
        weights = router_weights(layer, 1 << 10, 0)[head_rows(1 << 10)].astype(np.float64)
        count = len(tokens)
        x = reference.to_float64(head_values(layer, w.out_type)[:count])
        expected, _, bound = reference.experts_layer(
            x, ids[:count], weights[:count], w.expert, layer, w.out_type, lab.space.product
        )
        lab.oracles[key] = expected, bound + w.extra_error * np.abs(expected).max()
    return lab.oracles[key]
