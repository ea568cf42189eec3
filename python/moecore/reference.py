"""One expert layer in float64 NumPy, with a derived bound on the error of an engine that accumulates in f32.

Shares no code with the engines: experts are matrices, tokens are rows, sums are NumPy's. The demo checks
sampled tokens of a full-size layer with it.

The bound
---------
Every rounding is taken as an independent error of mean zero (round to nearest on generic data) and at most
``b``, so it is subgaussian with parameter b; a sum of errors ``c_i b_i`` has the parameter
``sqrt(sum (c_i b_i)^2)`` and exceeds 8 times that with a probability below ``2 exp(-32) = 3e-14`` an element.
Adding up absolute values instead would allow errors of a third of the result, and check nothing.

``u`` is the unit roundoff of the rows' dtype (2^-8 bf16, 2^-11 f16, 2^-24 f32), ``eta`` half its smallest
subnormal, ``eps`` = 2^-23 an f32 operation, with room for accumulators that do not round to nearest.
``r[z]`` is the parameter of the error of z, to first order: products of two errors are far smaller.

1. ``g = sum_k x_k W_k + b``, up alike. H + 2 roundings of partial sums, each at most eps times
   ``sum_k |x_k W_k| + |b|``: ``r[g] = sqrt(H + 2) eps (sum_k |x_k W_k| + |b|)``. When the product is an op of
   its own, gate and up are rounded to the dtype: add ``u |g| + eta`` in square.
2. ``a = f(g) (u + beta)``, both clamped, which enlarges no error; |f'| <= 1.1 for silu and swiglu_oai; exp of
   a rounded argument is off by ``|alpha g| eps``, its evaluation and the operations around it by 16 eps. In
   square: ``1.1 r[g] |u + beta|``, ``|f| r[u]``, ``(|alpha g| + 16) eps |a|``, the rounding ``u |a| + eta``.
3. ``o = sum_i a_i V_i + c``. In square: ``r[a_i] V_i`` for every i, the sum's own roundings
   ``sqrt(I + 2) eps (sum_i |a_i V_i| + |c|)``, the rounding ``u |o| + eta``.
4. ``y = sum_j w_j o_j``. In square: ``w_j r[o_j]`` for every j, ``sqrt(K + 1) eps sum_j |w_j o_j|``, and
   ``(2 E + 64) eps sum_j |w_j o_j|`` for the router weights (softmax sums E terms). The final rounding comes
   on top of eight times that, as ``u |y| + eta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .models import MoeLayer

__all__ = ["ExpertWeights", "Product", "experts_layer", "product", "route", "to_float64"]

F64 = npt.NDArray[np.float64]
Product = Callable[[F64, Any, Sequence[F64]], tuple[F64, F64, list[F64]]]

_EPS = 2.0**-23
_UNIT_ROUNDOFF = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}
_HALF_SUBNORMAL = {"bf16": 2.0**-134, "f16": 2.0**-25, "f32": 2.0**-150}
_LIPSCHITZ = 1.1  # of x * sigmoid(alpha * x): its derivative peaks at 1.0998
_BLOCK = 2**18  # elements of a weight matrix taken at a time
_TAIL = 8.0  # how many times its parameter an error may reach


class ExpertWeights(NamedTuple):
    """One expert: w13 [2I, H], w2 [H, I], as the product takes them; biases [2I] and [H] or None.

    bf16 comes as its uint16 bits.
    """

    w13: Any
    w2: Any
    w13_bias: npt.NDArray[np.generic] | None = None
    w2_bias: npt.NDArray[np.generic] | None = None


def to_float64(values: npt.NDArray[np.generic]) -> F64:
    """The values of an array; uint16 holds the bits of bf16."""
    if values.dtype == np.uint16:
        wide = values.astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def route(logits: F64, bias: F64 | None, ids: npt.NDArray[np.integer], layer: MoeLayer) -> tuple[F64, bool]:
    """Router weights [T, K] of the chosen experts ``ids`` [T, K], and whether the choice is a right one.

    logits [T, E], bias [E]. A choice is right when the ids of a token are distinct and no expert that was
    left out has a selection key above a chosen one's by more than the keys' f32 rounding.
    """
    if layer.scoring == "softmax":
        score = np.exp(logits - logits.max(axis=1, keepdims=True))
        score /= score.sum(axis=1, keepdims=True)
    else:
        score = 1.0 / (1.0 + np.exp(-logits))
    key = score if bias is None else score + bias
    slack = 16 * _EPS * np.abs(key).max(axis=1, keepdims=True)
    possible = certain = np.ones_like(key, dtype=bool)
    if layer.topk_groups < layer.num_groups:
        members = key.reshape(len(key), layer.num_groups, -1)
        rank = np.sort(members, axis=2)[:, :, -2:].sum(axis=2)
        ordered = np.sort(rank, axis=1)
        last, next_best = ordered[:, -layer.topk_groups, None], ordered[:, -layer.topk_groups - 1, None]
        possible = np.repeat(rank >= last - 2 * slack, members.shape[2], axis=1)
        certain = np.repeat(rank > next_best + 2 * slack, members.shape[2], axis=1)
    chosen = np.zeros_like(possible)
    np.put_along_axis(chosen, ids, True, axis=1)
    distinct = bool((chosen.sum(axis=1) == ids.shape[1]).all())
    lowest = np.where(chosen, key, np.inf).min(axis=1, keepdims=True)
    missed = certain & ~chosen & (key > lowest + slack)
    right = distinct and bool((chosen <= possible).all()) and not bool(missed.any())

    weights = np.take_along_axis(score, ids, axis=1)
    if layer.renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return weights * layer.scale, right


def product(
    rows: F64, weights: npt.NDArray[np.generic], variances: Sequence[F64] = ()
) -> tuple[F64, F64, list[F64]]:
    """``rows @ weights.T``, the same of absolute values, and every ``variances @ (weights ** 2).T``.

    In blocks of output columns that stay in a cache: one expert in float64 can be a gigabyte.
    """
    shape = (len(rows), len(weights))
    out, reach, carried = np.empty(shape), np.empty(shape), [np.empty(shape) for _ in variances]
    magnitude = np.abs(rows)
    step = max(1, _BLOCK // weights.shape[1])
    for first in range(0, len(weights), step):
        block = slice(first, first + step)
        w = to_float64(weights[block])
        out[:, block] = rows @ w.T
        np.abs(w, out=w)
        reach[:, block] = magnitude @ w.T
        np.square(w, out=w)
        for target, variance in zip(carried, variances, strict=True):
            target[:, block] = variance @ w.T
    return out, reach, carried


def experts_layer(
    x: F64,
    ids: npt.NDArray[np.integer],
    weights: F64,
    expert: Callable[[int], ExpertWeights],
    layer: MoeLayer,
    dtype: str,
    product: Product = product,
) -> tuple[F64, F64, F64]:
    """``(y, separate, fused)``: the layer's output [T, H] and two bounds on its error.

    x [T, H], ids and weights [T, K]. ``expert(e)`` gives the weights of expert e and is called once for each
    expert that a token uses. ``separate`` holds when gate and up are rounded to ``dtype`` before the
    activation (one op after the other), ``fused`` when the activation takes the f32 sums. Another ``product``
    takes weights of its own form.
    """
    u, eta = _UNIT_ROUNDOFF[dtype], _HALF_SUBNORMAL[dtype]
    num_tokens, top_k = ids.shape
    out = np.zeros((num_tokens, top_k, x.shape[1]))
    variance = np.zeros((2, *out.shape))  # squares of r[o]: separate, fused
    for e in np.unique(ids[ids >= 0]):
        token, slot = np.nonzero(ids == e)
        w = expert(int(e))
        gate_up, reach, _ = _biased(product(x[token], w.w13, ()), w.w13_bias)
        summed = (x.shape[1] + 2) * (_EPS * reach) ** 2
        paths = [_activate(gate_up, v, layer) for v in (summed + (u * np.abs(gate_up) + eta) ** 2, summed)]
        a = paths[0][0]
        rounding = (u * np.abs(a) + eta) ** 2
        o, reach, carried = _biased(product(a, w.w2, [da + rounding for _, da in paths]), w.w2_bias)
        own = (a.shape[1] + 2) * (_EPS * reach) ** 2 + (u * np.abs(o) + eta) ** 2
        out[token, slot] = o
        for path, do in enumerate(carried):
            variance[path, token, slot] = do + own

    w_j = weights[:, :, None]
    y = (w_j * out).sum(axis=1)
    reach = np.abs(w_j * out).sum(axis=1)
    routed = (top_k + 1 + (2 * layer.num_experts + 64) ** 2) * (_EPS * reach) ** 2
    separate, fused = (
        _TAIL * np.sqrt((w_j**2 * do).sum(axis=1) + routed) + u * np.abs(y) + eta for do in variance
    )
    return y, separate, fused


def _biased(
    products: tuple[F64, F64, list[F64]], bias: npt.NDArray[np.generic] | None
) -> tuple[F64, F64, list[F64]]:
    if bias is None:
        return products
    out, reach, carried = products
    offset = to_float64(bias)
    return out + offset, reach + np.abs(offset), carried


def _activate(gate_up: F64, error: F64, layer: MoeLayer) -> tuple[F64, F64]:
    """The activation, and the square of its error's parameter before it is rounded, from that of gate_up."""
    if layer.order == "interleaved":
        parts = [slice(0, None, 2), slice(1, None, 2)]
    else:
        half = gate_up.shape[1] // 2
        parts = [slice(0, half), slice(half, None)]
    gate, up = (gate_up[:, p] for p in parts)
    gate_error, up_error = (error[:, p] for p in parts)
    if math.isfinite(layer.limit):
        gate, up = np.minimum(gate, layer.limit), np.clip(up, -layer.limit, layer.limit)
    alpha = layer.alpha if layer.activation == "swiglu_oai" else 1.0
    f = gate / (1.0 + np.exp(-alpha * gate))
    up = up + layer.beta
    evaluation = ((np.abs(alpha * gate) + 16) * _EPS * f * up) ** 2
    return f * up, _LIPSCHITZ**2 * gate_error * up**2 + f**2 * up_error + evaluation
