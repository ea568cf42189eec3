"""Weights in float64 where they are, by torch: what `reference` and `checks` do on the host.

An expert of a large layer takes seconds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moecore.bench.checks import BLOCK, F64, code_values, scale_values

__all__ = ["dequantize_rows", "product"]


def dequantize_rows(codes: Any, scales: Any, kind: str, global_scale: float = 1.0) -> Any:
    """`checks.dequantize_rows` of tensors: codes u8 [R, K'], scales [R, blocks]."""
    values = _looked_up(code_values(kind.endswith("fp4")), codes).flatten(1)
    if scales.dtype == torch.uint8:
        factors = _looked_up(scale_values(np.arange(256, dtype=np.uint8), kind), scales)
    else:
        factors = scales.double()
    if kind == "nvfp4":
        factors = factors / global_scale
    return values.mul_(factors.repeat_interleave(BLOCK[kind], 1)[:, : values.shape[1]])


def product(rows: F64, weights: Any, variances: Sequence[F64] = ()) -> tuple[F64, F64, list[F64]]:
    """`reference.product` with a tensor [N, K] of weights."""

    def times(left: F64, right: Any) -> F64:
        found: F64 = (_like(left, weights) @ right.T).cpu().numpy()
        return found

    wide = weights.double()
    squares = wide.square() if variances else wide
    return times(rows, wide), times(np.abs(rows), wide.abs()), [times(v, squares) for v in variances]


def _looked_up(table: F64, index: Any) -> Any:
    return _like(table, index)[index.long()]


def _like(host: F64, tensor: Any) -> Any:
    """A float64 array beside a tensor."""
    return torch.from_numpy(host).to(tensor.device)
