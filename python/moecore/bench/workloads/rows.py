"""Route, plan and what moves or activates rows."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

import moecore
from moecore import reference
from moecore.bench import checks
from moecore.bench.cases import Case
from moecore.bench.checks import Check
from moecore.bench.workloads.lab import CHECKED_ROWS, Lab, Work
from moecore.bench.workloads.routing import SEED, sampled
from moecore.bench.workloads.weights import ITEMSIZE, activation_options

__all__ = ["activate", "finalize", "permute", "plan", "route", "shuffle_rows", "transpose_experts"]


def route(lab: Lab, case: Case) -> Work:
    """Logits to the K experts of every token and their weights."""
    layer, t, space = case.layer, case.tokens, lab.space
    e, k = layer.num_experts, layer.top_k
    moved = t * e * ITEMSIZE[case.dtype], 8 * t * k
    rng = np.random.default_rng(SEED)
    bias = space.put(rng.uniform(-0.1, 0.1, e).astype(np.float32), "f32")

    def make(index: int) -> SimpleNamespace:
        return SimpleNamespace(
            logits=space.normal((t, e), case.dtype, 1.5),
            bias=bias if layer.selection_bias else None,
            weights=space.empty((t, k), "f32"),
            ids=space.empty((t, k), "i32"),
            layer=layer,
        )

    def run(s: SimpleNamespace) -> None:
        moecore.route(
            s.logits,
            k,
            out=(s.weights, s.ids),
            scoring=layer.scoring,
            bias=s.bias,
            num_groups=layer.num_groups,
            topk_groups=layer.topk_groups,
            renormalize=layer.renormalize,
            scale=layer.scale,
        )

    sets = [make(i) for i in lab.sets(sum(moved))]
    rows = sampled(t, 512)

    def check(output: Any) -> Check:
        weights, ids = (space.host(x, rows) for x in output)
        logits = reference.to_float64(space.host(sets[0].logits, rows))
        key_bias = None if sets[0].bias is None else space.host(bias).astype(np.float64)
        expected, right = reference.route(logits, key_bias, ids.astype(np.int64), layer)
        found = checks.compare(weights.astype(np.float64), expected, (2 * e + 64) * 2.0**-23 * expected)
        return Check(found.max_rel_error, found.passed and right)

    return Work(f"E{e} K{k}", sets, run, lambda s: (s.weights, s.ids), check, *moved)


def plan(lab: Lab, case: Case) -> Work:
    """Ids to rows in order of experts."""
    layer, t, space = case.layer, case.tokens, lab.space
    e, k = layer.num_experts, layer.top_k
    r = t * k
    moved = 4 * r, 4 * (3 * r + 2 * (e + 1))

    def make(index: int) -> SimpleNamespace:
        s = lab.routed(case, index)
        empty = functools.partial(space.empty, dtype="i32")
        s.layer = layer
        s.plan = moecore.Plan(empty((e + 1,)), empty((e + 1,)), empty((r,)), empty((t, k)), empty((r,)))
        s.workspace = space.empty((moecore.plan_workspace_bytes(t, k, e, space.device) or 1,), "u8")
        return s

    def run(s: SimpleNamespace) -> None:
        moecore.plan(s.ids, e, out=s.plan, workspace=s.workspace)

    sets = [make(i) for i in lab.sets(sum(moved))]

    def check(output: Any) -> Check:
        ids = sets[0].host_ids.reshape(-1)
        order = np.argsort(ids, kind="stable")
        offsets = np.searchsorted(ids[order], np.arange(e + 1))
        found = [space.host(x) for x in (output.expert_offsets, output.row_token, output.slot_row)]
        slots = np.empty(r, np.int64)
        slots[order] = np.arange(r)
        wanted = [offsets, order // k, slots.reshape(t, k)]
        passed = all(checks.exact(a, b).passed for a, b in zip(found, wanted, strict=True))
        return Check(0.0 if passed else math.inf, passed)

    return Work(f"E{e} K{k}", sets, run, lambda s: s.plan, check, *moved)


def permute(lab: Lab, case: Case, by_map: bool = False) -> Work:
    """Tokens to rows in order of experts."""
    layer, t, space = case.layer, case.tokens, lab.space
    h, r, size = layer.hidden, case.tokens * layer.top_k, ITEMSIZE[case.dtype]
    moved = t * h * size + 4 * r, r * h * size

    def make(index: int) -> SimpleNamespace:
        s = lab.planned(case, index)
        s.x, s.out = space.normal((t, h), case.dtype), space.empty((r, h), case.dtype)
        return s

    def run(s: SimpleNamespace) -> None:
        if by_map:
            moecore.shuffle_rows(s.x, s.plan.row_token, out=s.out)
        else:
            moecore.permute(s.x, s.plan, out=s.out)

    sets = [make(i) for i in lab.sets(sum(moved))]
    rows = sampled(r, CHECKED_ROWS)

    def check(output: Any) -> Check:
        tokens = space.host(sets[0].plan.row_token, rows)
        return checks.exact(space.host(output, rows), space.host(sets[0].x, tokens))

    return Work(f"K{layer.top_k} H{h}", sets, run, lambda s: s.out, check, *moved)


def shuffle_rows(lab: Lab, case: Case) -> Work:
    """The same by a map of rows."""
    return permute(lab, case, by_map=True)


def activate(lab: Lab, case: Case) -> Work:
    """Gate and up columns to one."""
    layer, space = case.layer, lab.space
    i, r, size = layer.inter, case.tokens * layer.top_k, ITEMSIZE[case.dtype]
    moved = r * 2 * i * size, r * i * size

    def make(index: int) -> SimpleNamespace:
        return SimpleNamespace(
            layer=layer,
            x=space.normal((r, 2 * i), case.dtype),
            out=space.empty((r, i), case.dtype),
        )

    def run(s: SimpleNamespace) -> None:
        moecore.activate(s.x, layer.activation, **activation_options(layer), out=s.out)

    sets = [make(i) for i in lab.sets(sum(moved))]
    rows = sampled(r, CHECKED_ROWS)

    def check(output: Any) -> Check:
        gate, up = checks.split(reference.to_float64(space.host(sets[0].x, rows)), layer.order)
        expected = checks.activation(gate, up, layer)
        unit, subnormal = checks.ROUNDING[case.dtype]
        bound = (unit + 64 * 2.0**-23) * np.abs(expected) + subnormal
        return checks.compare(reference.to_float64(space.host(output, rows)), expected, bound)

    return Work(f"R{r} I{i}", sets, run, lambda s: s.out, check, *moved)


def finalize(lab: Lab, case: Case) -> Work:
    """The rows of a token, weighted and summed."""
    layer, t, space = case.layer, case.tokens, lab.space
    h, k, size = layer.hidden, layer.top_k, ITEMSIZE[case.dtype]
    r = t * k
    moved = r * h * size + 8 * r, t * h * size

    def make(index: int) -> SimpleNamespace:
        s = lab.planned(case, index)
        s.rows, s.out = space.normal((r, h), case.dtype), space.empty((t, h), case.dtype)
        return s

    def run(s: SimpleNamespace) -> None:
        moecore.finalize(s.rows, s.plan, s.weights, out=s.out)

    sets = [make(i) for i in lab.sets(sum(moved))]
    tokens = sampled(t, CHECKED_ROWS)

    def check(output: Any) -> Check:
        s = sets[0]
        slots = space.host(s.plan.slot_row, tokens).astype(np.int64)
        rows = reference.to_float64(space.host(s.rows, slots.reshape(-1))).reshape(len(tokens), k, h)
        terms = rows * space.host(s.weights, tokens).astype(np.float64)[:, :, None]
        expected = terms.sum(axis=1)
        bound = checks.product_bound(np.abs(terms).sum(axis=1), expected, k, case.dtype)
        return checks.compare(reference.to_float64(space.host(output, tokens)), expected, bound)

    return Work(f"K{k} H{h}", sets, run, lambda s: s.out, check, *moved, flops=0.0)


def transpose_experts(lab: Lab, case: Case) -> Work:
    """[E, K, N] to [E, N, K]."""
    layer, space, size = case.layer, lab.space, ITEMSIZE[case.dtype]
    shape = (min(8, layer.num_experts), layer.hidden, 2 * layer.inter)
    moved = (math.prod(shape) * size,) * 2

    def make(index: int) -> SimpleNamespace:
        out = space.empty((shape[0], shape[2], shape[1]), case.dtype)
        return SimpleNamespace(src=space.normal(shape, case.dtype), out=out)

    def run(s: SimpleNamespace) -> None:
        moecore.transpose_experts(s.src, out=s.out)

    sets = [make(i) for i in lab.sets(sum(moved))]

    def check(output: Any) -> Check:
        return checks.exact(space.host(output, 1), space.host(sets[0].src, 1).T)

    return Work("x".join(map(str, shape)), sets, run, lambda s: s.out, check, *moved)
