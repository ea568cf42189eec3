"""What outputs must be: sampled rows of every op against float64, with bounds as in ``moecore.reference``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moecore.reference import to_float64

__all__ = [
    "BLOCK",
    "Check",
    "code_values",
    "compare",
    "cut_sums",
    "decode",
    "dequantize_rows",
    "product_bound",
    "scale_values",
]

F64 = npt.NDArray[np.float64]
Host = npt.NDArray[Any]

_EPS = 2.0**-23
ROUNDING = {"bf16": (2.0**-8, 2.0**-134), "f16": (2.0**-11, 2.0**-25), "f32": (2.0**-24, 2.0**-150)}
"""Unit roundoff and half the smallest subnormal."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The largest error over the largest magnitude among the checked elements, and whether all is well."""

    max_rel_error: float
    passed: bool


def compare(actual: F64, expected: F64, bound: F64 | float = 0.0) -> Check:
    """``actual`` against ``expected``; NaN never passes."""
    if not expected.size:
        return Check(0.0, actual.shape == expected.shape)
    error = np.abs(actual - expected)
    scale = float(np.abs(expected).max()) or 1.0
    return Check(float(error.max()) / scale, bool((error <= bound).all()))


def exact(actual: Host, expected: Host) -> Check:
    """Equal bit by bit, or not."""
    same = actual.shape == expected.shape and bool((actual == expected).all())
    return Check(0.0 if same else math.inf, same)


def product_bound(reach: F64, value: F64, depth: int, dtype: str) -> F64:
    """Error of a sum of ``depth`` products in f32, then rounded: see ``moecore.reference``."""
    unit, subnormal = ROUNDING[dtype]
    return 8 * math.sqrt(depth + 2) * _EPS * reach + unit * np.abs(value) + subnormal


def cut_sums(squares: F64) -> F64:
    """Error of fp8 sums on Hopper's tensor cores, from the sums of the squared products.

    Every 32 columns 32 products and the sum so far, 33 terms, are each cut 13 bits behind the largest; every
    128 columns the sum starts anew. Signs are random, so the largest squared is taken as the sum of the
    squares of its 128 columns, four times; eight times the parameter, as everywhere.
    """
    return np.asarray(8 * math.sqrt(33 * 4) * 2.0**-13 * np.sqrt(squares))


def _e4m3_values() -> F64:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    value[[0x7F, 0xFF]] = np.nan
    return np.where(codes & 128, -value, value)


_E4M3 = _e4m3_values()
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E2M1_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=1)  # of a byte


def code_values(fp4: bool) -> F64:
    """The values of a byte [256, 1 or 2]: an e4m3 code, or two of e2m1, the even column in the low nibble."""
    return _E2M1_PAIRS if fp4 else _E4M3[:, None]


def decode(codes: Host, fp4: bool) -> F64:
    """The values of e4m3 codes, or of e2m1 codes two to the byte."""
    values = code_values(fp4)[codes]
    return np.asarray(values.reshape(*codes.shape[:-1], -1))


def scale_values(scales: Host, kind: str) -> F64:
    """Scales in float64: e8m0 of the mx formats, e4m3 of nvfp4, f32 otherwise."""
    if scales.dtype != np.uint8:
        return scales.astype(np.float64)
    return 2.0 ** (scales.astype(np.float64) - 127) if kind.startswith("mx") else np.asarray(_E4M3[scales])


STATIC_SCALE = 0.125
"""Of fp8_tensor_static: 448 times that is what the largest activation, gpt-oss's 7 * 8, needs."""

GLOBAL_SCALE = 32.0
"""Of nvfp4: magnitudes of up to 448 * 6 / 32 = 84 do not saturate."""

BLOCK = {"fp8_block128": 128, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def dequantize_rows(codes: Host, scales: Host, kind: str, global_scale: float = 1.0) -> F64:
    """Values of rows of codes [R, K'] with linear scales [R, blocks], [R, 1] or [1, 1]."""
    values = decode(codes, kind.endswith("fp4"))
    factors = scale_values(scales, kind) / (global_scale if kind == "nvfp4" else 1.0)
    if kind in BLOCK:
        factors = np.repeat(factors, BLOCK[kind], axis=1)[:, : values.shape[1]]
    values *= factors
    return values


def quantized(actual: F64, x: F64, kind: str, slack: float = 0.0) -> Check:
    """Dequantised ``actual`` against what was quantised: half a step of the format, saturation included.

    e4m3 steps by at most 1/8 of a value, and saturates at most 1/8 of it away; e2m1 steps by at most half,
    and saturates a quarter away. Below the smallest normal the step is that of the block's scale, 2^-9 or 1/2
    of its largest magnitude over 448 or 4. ``slack`` is the error of x itself, over its magnitude.
    """
    block = min(BLOCK.get(kind, x.shape[1]), x.shape[1])
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % block)))
    amax = padded.reshape(len(x), -1, block).max(axis=2)
    if kind.startswith("fp8_tensor"):
        amax[:] = 448 * STATIC_SCALE
    amax = np.repeat(amax, block, axis=1)[:, : x.shape[1]]
    relative, absolute = (0.25, 0.26 / 3.5) if kind.endswith("fp4") else (0.125, 2.0**-9 / 224)
    return compare(actual, x, relative * np.abs(x) + (absolute + slack) * amax + 1e-12)


def activation(gate: F64, up: F64, layer: Any) -> F64:
    """f(gate) * (up + beta) in float64."""
    if math.isfinite(layer.limit):
        gate, up = np.minimum(gate, layer.limit), np.clip(up, -layer.limit, layer.limit)
    alpha = layer.alpha if layer.activation == "swiglu_oai" else 1.0
    return np.asarray(gate / (1.0 + np.exp(-alpha * gate)) * (up + layer.beta))


def split(gate_up: F64, order: str) -> tuple[F64, F64]:
    """Gate and up columns."""
    if order == "interleaved":
        return gate_up[:, 0::2], gate_up[:, 1::2]
    half = gate_up.shape[1] // 2
    return gate_up[:, :half], gate_up[:, half:]


def values(host: Host, dtype: str) -> F64:
    """Elements of a host array in float64."""
    return decode(host, False) if dtype == "e4m3" else to_float64(host)
