"""The weights of a layer, random, in an element type or a format."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

import moecore
from moecore import reference
from moecore.bench.spaces import Space
from moecore.bench.workloads.routing import SEED
from moecore.models import MoeLayer

__all__ = ["BITS", "ITEMSIZE", "Matrix", "Weights", "activation_options"]

ITEMSIZE = {"f32": 4, "f16": 2, "bf16": 2, "e4m3": 1}
BITS = {"fp8_token": 8, "fp8_block128": 8, "fp8_tensor_static": 8, "mxfp8": 8, "nvfp4": 4, "mxfp4": 4}


@dataclasses.dataclass
class Matrix:
    """One of a layer's weight tensors [E, N, depth]: what the ops take, and its scales."""

    tensor: Any
    scales: Any = None
    global_scale: Any = None


class Weights:
    """Random weights of a layer in an element type or a format."""

    def __init__(self, space: Space, layer: MoeLayer, dtype: str) -> None:
        self.space, self.layer, self.dtype = space, layer, dtype
        self.quantized = dtype in BITS
        self.bits = BITS.get(dtype) or 8 * ITEMSIZE[dtype]
        self.out_type = "bf16" if self.quantized else dtype
        # fp8 rows beside fp8 weights, as checkpoints of this format are run; 4-bit weights beside bf16 rows.
        self.row_format = "fp8_block128" if dtype == "fp8_block128" else None
        self.row_bytes = 1 if self.row_format else ITEMSIZE[self.out_type]
        self.rate = "fp8" if self.row_format else {"f32": "f32"}.get(self.out_type, "bf16")
        # Rows that a layer quantises between its products: e4m3 rounds by at most 2^-4.
        self.extra_error = 0.06 if self.row_format else 0.0
        e, h, i = layer.num_experts, layer.hidden, layer.inter
        self.w13 = self._matrix((e, 2 * i, h))
        self.w2 = self._matrix((e, h, i))
        self.w13_bias = space.normal((e, 2 * i), self.out_type, 0.1) if layer.expert_bias else None
        self.w2_bias = space.normal((e, h), self.out_type, 0.1) if layer.expert_bias else None

    @staticmethod
    def num_bytes(layer: MoeLayer, dtype: str) -> float:
        """Memory of the weights."""
        return layer.weight_bytes(1) * (BITS.get(dtype) or 8 * ITEMSIZE[dtype]) / 8

    def _matrix(self, shape: tuple[int, int, int]) -> Matrix:
        space, (e, n, depth) = self.space, shape
        magnitude = 0.7 / math.sqrt(depth)
        if not self.quantized:
            return Matrix(space.normal(shape, self.dtype, magnitude))
        if self.dtype == "fp8_block128":
            blocks = (e, -(-n // 128), -(-depth // 128))
            factors = np.random.default_rng(SEED).uniform(0.5, 1.5, blocks).astype(np.float32)
            scales = space.put(factors * np.float32(magnitude), "f32")
            return Matrix(space.codes(shape, 0x8F, 0x30), scales)  # magnitudes of 0.5 to 2
        codes = space.codes((e, n, depth // 2))
        if self.dtype == "mxfp4":
            low = 126 + round(math.log2(magnitude / 2.5))
            return Matrix(codes, space.codes((e, n, -(-depth // 32)), 0x01, low & 0xFE))
        scales = space.codes((e, n, -(-depth // 16)), 0x0F, 0x30)
        global_scale = space.put(np.full(1, 2.5 / magnitude, np.float32), "f32")
        return Matrix(codes, scales, global_scale)

    def gemm_options(self, matrix: Matrix, x_scales: Any) -> dict[str, Any]:
        """What grouped_gemm() takes beside the codes."""
        if not self.quantized:
            return {}
        options: dict[str, Any] = {
            "weight_format": self.dtype,
            "weight_scales": matrix.scales,
            "weight_global_scale": matrix.global_scale,
        }
        if self.row_format:
            options |= {"x_format": self.row_format, "x_scales": x_scales}
        return options

    def experts(self) -> moecore.Experts[Any]:
        """The weights as fused_experts() takes them."""
        quantized = {
            "weight_format": self.dtype,
            "w13_scales": self.w13.scales,
            "w2_scales": self.w2.scales,
            "w13_global_scale": self.w13.global_scale,
            "w2_global_scale": self.w2.global_scale,
        }
        return moecore.Experts(
            self.w13.tensor,
            self.w2.tensor,
            activation=self.layer.activation,
            **activation_options(self.layer),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            **(quantized if self.quantized else {}),
        )

    def rows(self, matrix: Matrix, expert: int, rows: Any = slice(None)) -> Any:
        """Rows of one expert's matrix, as `Space.product` takes them."""
        space = self.space
        codes = space.matrix(matrix.tensor, expert, rows)
        if not self.quantized:
            return codes
        scale_rows = rows
        if self.dtype == "fp8_block128":
            scale_rows = np.arange(matrix.tensor.shape[1])[rows] // 128
        scales = space.matrix(matrix.scales, expert, scale_rows)
        factor = 1.0 if matrix.global_scale is None else float(space.host(matrix.global_scale)[0])
        return space.dequantized(codes, scales, self.dtype, factor)

    def expert(self, index: int) -> reference.ExpertWeights:
        """One expert for the float64 layer."""
        matrices = (self.rows(m, index) for m in (self.w13, self.w2))
        biases = (
            None if bias is None else self.space.host(bias, index) for bias in (self.w13_bias, self.w2_bias)
        )
        return reference.ExpertWeights(*matrices, *biases)


def activation_options(layer: MoeLayer) -> dict[str, Any]:
    """A layer's activation, as activate() and Experts() take it besides its kind."""
    return {"order": layer.order, "alpha": layer.alpha, "beta": layer.beta, "limit": layer.limit}
