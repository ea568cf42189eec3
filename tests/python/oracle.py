"""Every op in NumPy, straight from its definition: float64, or exact where the op promises bits.

Shares no code with the engines. Values are NumPy arrays; bf16 is carried as float32 that happens to be
representable (`round_to`), so that the tests of all frameworks compare the same numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

UNIT_ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
SMALLEST = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}
EPS32 = 2.0**-23


def round_to(values: npt.ArrayLike, dtype: str) -> F32:
    """f32 values rounded to nearest even in `dtype`, back as f32."""
    x = np.asarray(values, np.float32)
    if dtype == "f32":
        return x
    with np.errstate(over="ignore"):
        if dtype == "f16":
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def fma32(a: F32, b: F32, c: F32) -> F32:
    """a * b + c of f32 values, rounded once.

    The product is exact in f64. The sum is rounded to odd there (its lost part sets the last bit), after
    which the rounding to f32 is that of the exact sum.
    """
    p = a.astype(np.float64) * b.astype(np.float64)
    c64 = c.astype(np.float64)
    s = p + c64
    t = s - p
    lost = (p - (s - t)) + (c64 - t)
    bits = s.view(np.int64)
    away = np.where((lost > 0) == (s > 0), 1, -1)
    odd = np.where((lost != 0) & np.isfinite(s) & (bits & 1 == 0), bits + away, bits)
    with np.errstate(over="ignore"):
        return odd.view(np.float64).astype(np.float32)


class Routed(NamedTuple):
    """Weights f64 [T,K], ids [T,K]."""

    weights: F64
    ids: npt.NDArray[np.int32]


def route(
    logits: F32,
    top_k: int,
    scoring: str = "softmax",
    bias: F32 | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    renormalize: bool = False,
    scale: float = 1.0,
    is_padding: npt.NDArray[np.bool_] | None = None,
) -> Routed:
    """Token by token: keys, groups, selection, weights."""
    num_tokens, num_experts = logits.shape
    weights = np.zeros((num_tokens, top_k))
    ids = np.full((num_tokens, top_k), -1, np.int32)
    size = num_experts // num_groups
    for t in range(num_tokens):
        if is_padding is not None and is_padding[t]:
            continue
        row = logits[t].astype(np.float64)
        alive = np.isfinite(row)
        if bias is not None:
            alive &= np.isfinite(bias)
        finite = np.isfinite(row)
        score = np.zeros(num_experts)
        if scoring == "sigmoid":
            score[finite] = [_sigmoid(v) for v in row[finite]]
        elif finite.any():
            e = np.exp(row[finite] - row[finite].max())
            score[finite] = e / e.sum()
        grouped = num_groups > 1
        key = score if grouped or bias is not None else row
        if bias is not None:
            key = key + bias.astype(np.float64)
        key = np.where(alive, key, -np.inf)
        if grouped:
            ranks = []
            for g in range(num_groups):
                best = sorted(key[g * size : (g + 1) * size], reverse=True)
                ranks.append(best[0] if group_score == "max" or size == 1 else best[0] + best[1])
            kept = sorted(range(num_groups), key=lambda g: (-ranks[g], g))[:topk_groups]
            key = np.where(np.isin(np.arange(num_experts) // size, kept), key, -np.inf)
        order = [e for e in sorted(range(num_experts), key=lambda e: (-key[e], e)) if key[e] > -np.inf][
            :top_k
        ]
        chosen = score[order]
        if renormalize:
            chosen = chosen / (chosen.sum() + 1e-20)
        weights[t, : len(order)] = chosen * scale
        ids[t, : len(order)] = order
    return Routed(weights, ids)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class Planned(NamedTuple):
    """The plan's tensors, i32."""

    expert_offsets: npt.NDArray[np.int32]
    scale_offsets: npt.NDArray[np.int32]
    row_token: npt.NDArray[np.int32]
    slot_row: npt.NDArray[np.int32]
    row_route: npt.NDArray[np.int32]


def plan(
    ids: npt.NDArray[np.integer],
    num_experts: int,
    expert_map: npt.NDArray[np.integer] | None = None,
    first_expert: int = 0,
) -> Planned:
    """One list of routes per expert."""
    num_tokens, top_k = ids.shape
    buckets: list[list[int]] = [[] for _ in range(num_experts)]
    for route_index, g in enumerate(int(v) for v in ids.reshape(-1)):
        if expert_map is None:
            local = g - first_expert
        else:
            local = int(expert_map[g]) if 0 <= g < len(expert_map) else -1
        if 0 <= local < num_experts:
            buckets[local].append(route_index)
    offsets = np.cumsum([0, *map(len, buckets)]).astype(np.int32)
    padded = np.cumsum([0, *(-(-len(b) // 128) * 128 for b in buckets)]).astype(np.int32)
    rows = num_tokens * top_k
    row_route = np.full(rows, -1, np.int32)
    row_route[: offsets[-1]] = [r for bucket in buckets for r in bucket]
    row_token = np.where(row_route < 0, -1, row_route // max(top_k, 1)).astype(np.int32)
    slot_row = np.full(rows, -1, np.int32)
    for row, r in enumerate(row_route[: offsets[-1]]):
        slot_row[r] = row
    return Planned(offsets, padded, row_token, slot_row.reshape(num_tokens, top_k), row_route)


def shuffle_rows(x: npt.NDArray[np.generic], map: npt.NDArray[np.integer]) -> npt.NDArray[np.generic]:
    """Row by row; zeros where the map points nowhere."""
    out = np.zeros((len(map), x.shape[1]), x.dtype)
    for d, s in enumerate(map):
        if 0 <= s < x.shape[0]:
            out[d] = x[s]
    return out


def _f(kind: str, x: F64, alpha: float) -> F64:
    with np.errstate(over="ignore"):
        if kind == "silu":
            return x / (1 + np.exp(-x))
        if kind == "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        if kind == "swiglu_oai":
            return x / (1 + np.exp(-alpha * x))
        if kind == "gelu":
            return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.reshape(-1)]).reshape(x.shape)
        if kind == "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    relu = np.maximum(x, 0)
    return relu if kind == "relu" else relu * relu


def activate(
    x: npt.ArrayLike,
    kind: str = "silu",
    order: str = "gate_up",
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
) -> F64:
    """f(gate) * (up + beta) in f64."""
    oai = kind == "swiglu_oai"
    alpha = (1.702 if oai else 1.0) if alpha is None else alpha
    beta = (1.0 if oai else 0.0) if beta is None else beta
    limit = (7.0 if oai else math.inf) if limit is None else limit
    v = np.asarray(x, np.float64)
    half = v.shape[1] // 2
    if order == "plain":
        return _f(kind, np.minimum(v, limit), alpha)
    gate, up = {
        "gate_up": (v[:, :half], v[:, half:]),
        "up_gate": (v[:, half:], v[:, :half]),
        "interleaved": (v[:, 0::2], v[:, 1::2]),
    }[order]
    return _f(kind, np.minimum(gate, limit), alpha) * (np.clip(up, -limit, limit) + beta)


class Bounded(NamedTuple):
    """A value in f64 and how far an engine's result may be from it."""

    value: F64
    bound: F64


def rounded(value: F64, error: F64, dtype: str) -> Bounded:
    """Adds the rounding to `dtype` to an error."""
    return Bounded(value, error + UNIT_ROUNDOFF[dtype] * (np.abs(value) + error) + SMALLEST[dtype])


def grouped_gemm(
    x: F32,
    weights: F32,
    expert_offsets: npt.NDArray[np.integer],
    dtype: str,
    bias: F32 | None = None,
    row_token: npt.NDArray[np.integer] | None = None,
    row_weights: F32 | None = None,
) -> Bounded:
    """Rows below expert_offsets[E] of the product. f32 accumulation in any order: gamma(k + 2) * sum |x
    w|."""
    live = int(expert_offsets[-1])
    k, n = x.shape[1], weights.shape[1]
    value, magnitude = np.zeros((live, n)), np.zeros((live, n))
    for e in range(len(expert_offsets) - 1):
        for r in range(expert_offsets[e], expert_offsets[e + 1]):
            row = x[r if row_token is None else row_token[r]].astype(np.float64)
            w = weights[e].astype(np.float64)
            factor = 1.0 if row_weights is None else float(row_weights[r])
            b = np.zeros(n) if bias is None else bias[e].astype(np.float64)
            value[r] = factor * (w @ row) + b
            magnitude[r] = abs(factor) * (np.abs(w) @ np.abs(row)) + np.abs(b)
    gamma = (k + 2) * EPS32 / (1 - (k + 2) * EPS32)
    return rounded(value, gamma * magnitude, dtype)


def finalize(
    rows: F32,
    slot_row: npt.NDArray[np.integer],
    dtype: str,
    weights: F32 | None = None,
    hidden: int | None = None,
    cast_weights: bool = False,
    residual: F32 | None = None,
) -> F32:
    """The exact bits: an f32 fma chain from +0 in slot order, one rounding."""
    num_tokens, top_k = slot_row.shape
    h = rows.shape[1] if hidden is None else hidden
    out = np.zeros((num_tokens, h), np.float32)
    for t in range(num_tokens):
        acc = np.zeros(h, np.float32)
        for j in range(top_k):
            r = int(slot_row[t, j])
            if not 0 <= r < rows.shape[0]:
                continue
            w = np.float32(1) if weights is None else weights[t, j]
            if cast_weights:
                w = round_to(w, dtype)
            acc = fma32(np.full(h, w, np.float32), rows[r, :h], acc)
        out[t] = acc if residual is None else acc + residual[t]
    return round_to(out, dtype)


def fused_experts(
    x: F32,
    weights: F32,
    ids: npt.NDArray[np.integer],
    w13: F32,
    w2: F32,
    dtype: str,
    kind: str = "silu",
    order: str = "gate_up",
    w13_bias: F32 | None = None,
    w2_bias: F32 | None = None,
    weight_on_input: bool = False,
) -> Bounded:
    """The layer in f64, expert by expert, with the error that the roundings of its stages can add up to."""
    num_tokens, hidden = x.shape
    u, eta = UNIT_ROUNDOFF[dtype], SMALLEST[dtype]
    value, error = np.zeros((num_tokens, hidden)), np.zeros((num_tokens, hidden))
    for t in range(num_tokens):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if not 0 <= e < w13.shape[0]:
                continue
            w = float(weights[t, j])
            v, first, second = x[t].astype(np.float64), w13[e].astype(np.float64), w2[e].astype(np.float64)
            factor = w if weight_on_input else 1.0
            b1 = np.zeros(len(first)) if w13_bias is None else w13_bias[e].astype(np.float64)
            b2 = np.zeros(hidden) if w2_bias is None else w2_bias[e].astype(np.float64)
            g = factor * (first @ v) + b1
            dg = (hidden + 2) * EPS32 * (abs(factor) * (np.abs(first) @ np.abs(v)) + np.abs(b1))
            a = activate(g[None], kind, order)[0]
            # Every kind here has |f'| <= 1.13 and |f(x)| <= |x| or x^2; a pair of errors in gate and up moves the
            # product by at most 1.13 dg (|up| + 1 + du) + |f| du.
            pairs = g[None] if order == "plain" else _halves(g[None], order)
            dpairs = dg[None] if order == "plain" else _halves(dg[None], order)
            if order == "plain":
                slope = 2 * np.abs(pairs[0]) + 1.13
                da = slope * dpairs[0]
            else:
                gate, up, dgate, dup = pairs[0][0], pairs[1][0], dpairs[0][0], dpairs[1][0]
                da = 1.13 * dgate * (np.abs(up) + 1 + dup) + (np.abs(gate) + dgate) * dup
            da = da + 32 * EPS32 * (np.abs(a) + da)
            da = da + u * (np.abs(a) + da) + eta
            o = second @ a + b2
            do = np.abs(second) @ da + (len(a) + 2) * EPS32 * (np.abs(second) @ (np.abs(a) + da) + np.abs(b2))
            do = do + u * (np.abs(o) + do) + eta
            scale = 1.0 if weight_on_input else w
            value[t] += scale * o
            error[t] += abs(scale) * (do + (ids.shape[1] + 1) * EPS32 * (np.abs(o) + do))
    return rounded(value, error, dtype)


def _halves(v: F64, order: str) -> tuple[F64, F64]:
    half = v.shape[1] // 2
    if order == "gate_up":
        return v[:, :half], v[:, half:]
    if order == "up_gate":
        return v[:, half:], v[:, :half]
    return v[:, 0::2], v[:, 1::2]
