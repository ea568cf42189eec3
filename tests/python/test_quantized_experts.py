"""Quantised weights and activations in grouped_gemm and the layer: checkpoint layouts of published models against
a dequantisation written here, the other pairs against the composition of the public functions."""

from __future__ import annotations

import math
from typing import Any

import moecore
import numpy as np
import oracle
import pytest
from conftest import Frame
from moecore import QuantFormat

PAIRS = [
    (None, "fp8_tensor"),
    (None, "fp8_token"),
    (None, "fp8_block128"),
    (None, "nvfp4"),
    (None, "mxfp4"),
    ("fp8_tensor", "fp8_tensor"),
    ("fp8_tensor", "fp8_token"),
    ("fp8_token", "fp8_tensor"),
    ("fp8_token", "fp8_token"),
    ("fp8_block128", "fp8_block128"),
    ("mxfp8", "nvfp4"),
    ("mxfp8", "mxfp4"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "mxfp4"),
]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -value if sign else value


E4M3 = np.array([_e4m3(code) for code in range(256)])


def unpack(packed: np.ndarray) -> np.ndarray:
    """Two e2m1 codes to the byte, the even one in the low nibble."""
    return np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(*packed.shape[:-1], -1)


def spread(scales: np.ndarray, rows: int, cols: int, block: tuple[int, int]) -> np.ndarray:
    """A scale for each element of [E, rows, cols]."""
    return scales.repeat(block[0], 1)[:, :rows].repeat(block[1], 2)[:, :, :cols]


class Weights:
    """Random weights [E,N,K] of a format: codes, scales and g as a checkpoint has them, and their values."""

    def __init__(self, rng: np.random.Generator, kind: str, shape: tuple[int, int, int]) -> None:
        e, n, k = shape
        self.kind = kind
        self.global_scale: np.ndarray | None = None
        fp4 = kind in ("nvfp4", "mxfp4")
        self.codes = rng.integers(0, 256, (e, n, k // 2 if fp4 else k)).astype(np.uint8)
        if not fp4:
            self.codes[self.codes & 0x7F == 0x7F] = 0
        values = unpack(self.codes) if fp4 else E4M3[self.codes]
        size = k**-0.5 / (3 if fp4 else 150)
        if kind == "mxfp4":
            self.scales: np.ndarray = rng.integers(-2, 2, (e, n, -(-k // 32))) + 127 + round(math.log2(size))
            self.scales = self.scales.astype(np.uint8)
            each = spread(2.0 ** (self.scales.astype(float) - 127), n, k, (1, 32))
        elif kind == "nvfp4":
            self.scales = rng.integers(0x30, 0x48, (e, n, -(-k // 16))).astype(np.uint8)
            self.global_scale = (rng.uniform(0.5, 2, e) / size).astype(np.float32)
            each = spread(E4M3[self.scales], n, k, (1, 16))
            each = each * (np.float32(1) / self.global_scale).astype(float)[:, None, None]
        else:
            shapes = {
                "fp8_tensor": (e,),
                "fp8_token": (e, n),
                "fp8_block128": (e, -(-n // 128), -(-k // 128)),
            }
            self.scales = (rng.uniform(0.5, 2, shapes[kind]) * size).astype(np.float32)
            wide = self.scales.astype(float)
            if kind == "fp8_block128":
                each = spread(wide, n, k, (128, 128))
            else:
                each = wide[:, None, None] if kind == "fp8_tensor" else wide[:, :, None]
        self.values = values * each

    def make(self, frame: Frame) -> dict[str, Any]:
        return {
            "codes": frame.make(self.codes, "u8"),
            "scales": frame.make(self.scales, "u8" if self.scales.dtype == np.uint8 else "f32"),
            "global": None if self.global_scale is None else frame.make(self.global_scale, "f32"),
        }


def check(actual: np.ndarray, expected: oracle.Bounded) -> None:
    assert actual.shape == expected.value.shape
    assert np.isfinite(actual).all()
    excess = np.abs(actual.astype(np.float64) - expected.value) - expected.bound
    assert excess.size == 0 or excess.max() <= 0, f"off by {excess.max()} more than the bound"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["fp8_tensor", "fp8_token", "fp8_block128", "nvfp4", "mxfp4"])
def test_weights(frame: Frame, rng: np.random.Generator, kind: str, dtype: str) -> None:
    num_tokens, hidden, inter, top_k, num_experts = 9, 144, 72, 2, 4
    x = oracle.round_to(rng.standard_normal((num_tokens, hidden)), dtype)
    weights = rng.random((num_tokens, top_k)).astype(np.float32)
    ids = rng.integers(-1, num_experts, (num_tokens, top_k)).astype(np.int32)
    w13 = Weights(rng, kind, (num_experts, 2 * inter, hidden))
    w2 = Weights(rng, kind, (num_experts, hidden, inter))
    first, second = w13.make(frame), w2.make(frame)

    planned = oracle.plan(ids, num_experts)
    plan = moecore.plan(frame.make(ids, "i32"), num_experts)
    product = moecore.grouped_gemm(
        frame.make(x, dtype),
        first["codes"],
        plan.expert_offsets,
        row_token=plan.row_token,
        weight_format=kind,
        weight_scales=first["scales"],
        weight_global_scale=first["global"],
    )
    expected = oracle.grouped_gemm(x, w13.values, planned.expert_offsets, dtype, row_token=planned.row_token)
    check(frame.read(product)[: planned.expert_offsets[-1]], expected)

    experts = moecore.Experts(
        first["codes"],
        second["codes"],
        order="gate_up",
        weight_format=kind,
        w13_scales=first["scales"],
        w2_scales=second["scales"],
        w13_global_scale=first["global"],
        w2_global_scale=second["global"],
    )
    assert (experts.num_experts, experts.hidden, experts.inter) == (num_experts, hidden, inter)
    out = moecore.fused_experts(
        frame.make(x, dtype), frame.make(weights, "f32"), frame.make(ids, "i32"), experts
    )
    check(frame.read(out), oracle.fused_experts(x, weights, ids, w13.values, w2.values, dtype))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gpt_oss_checkpoint(frame: Frame, rng: np.random.Generator, dtype: str) -> None:
    num_tokens, hidden, inter, top_k, num_experts = 7, 96, 64, 4, 6
    w13 = Weights(rng, "mxfp4", (num_experts, 2 * inter, hidden))
    w2 = Weights(rng, "mxfp4", (num_experts, hidden, inter))
    b13 = oracle.round_to(rng.standard_normal((num_experts, 2 * inter)), dtype)
    b2 = oracle.round_to(rng.standard_normal((num_experts, hidden)), dtype)
    experts = moecore.Experts.from_gpt_oss(
        frame.make(w13.codes.reshape(num_experts, 2 * inter, hidden // 32, 16), "u8"),
        frame.make(w13.scales, "u8"),
        frame.make(b13, dtype),
        frame.make(w2.codes.reshape(num_experts, hidden, inter // 32, 16), "u8"),
        frame.make(w2.scales, "u8"),
        frame.make(b2, dtype),
    )
    x = oracle.round_to(rng.standard_normal((num_tokens, hidden)) * 4, dtype)
    weights = rng.random((num_tokens, top_k)).astype(np.float32)
    ids = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    out = moecore.fused_experts(
        frame.make(x, dtype), frame.make(weights, "f32"), frame.make(ids, "i32"), experts
    )
    expected = oracle.fused_experts(
        x, weights, ids, w13.values, w2.values, dtype, "swiglu_oai", "interleaved", b13, b2
    )
    check(frame.read(out), expected)


def test_checkpoint_layouts_need_no_conversion(torch: Any, rng: np.random.Generator) -> None:
    """compressed-tensors' weight_scale [E,N,1] and modelopt's weight_scale_2 = 1 / g, through views."""
    e, n, k = 3, 48, 64
    x, offsets = torch.randn(5, k), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    channel = Weights(rng, "fp8_token", (e, n, k))
    weight, weight_scale = (
        torch.from_numpy(channel.codes).view(torch.float8_e4m3fn),
        torch.from_numpy(channel.scales)[:, :, None],
    )
    out = moecore.grouped_gemm(
        x, weight, offsets, weight_format="fp8_token", weight_scales=weight_scale.squeeze(-1)
    )
    check(out.numpy(), oracle.grouped_gemm(x.numpy(), channel.values, offsets.numpy(), "f32"))

    nvfp4 = Weights(rng, "nvfp4", (e, n, k))
    weight_scale_2 = torch.from_numpy(np.float32(1) / nvfp4.global_scale)
    out = moecore.grouped_gemm(
        x,
        torch.from_numpy(nvfp4.codes),
        offsets,
        weight_format="nvfp4",
        weight_scales=torch.from_numpy(nvfp4.scales).view(torch.float8_e4m3fn),
        weight_global_scale=1 / weight_scale_2,
    )
    expected = oracle.grouped_gemm(x.numpy(), nvfp4.values, offsets.numpy(), "f32")
    # 1 / (1 / g) is g within an ulp.
    check(out.numpy(), expected._replace(bound=expected.bound + 2 * oracle.EPS32 * np.abs(expected.value)))


@pytest.mark.parametrize(("x_format", "weight_format"), PAIRS)
def test_layer_is_the_composition(
    frame: Frame, rng: np.random.Generator, x_format: str | None, weight_format: str
) -> None:
    num_tokens, hidden, inter, num_experts, top_k = 11, 160, 136, 5, 2
    x = frame.make(oracle.round_to(rng.standard_normal((num_tokens, hidden)), "f16"), "f16")
    ids = frame.make(rng.integers(-1, num_experts, (num_tokens, top_k)).astype(np.int32), "i32")
    weights = frame.make(rng.random((num_tokens, top_k)).astype(np.float32), "f32")
    first, second = (
        Weights(rng, weight_format, shape).make(frame)
        for shape in ((num_experts, 2 * inter, hidden), (num_experts, hidden, inter))
    )
    g = frame.make(np.array([3.0], np.float32), "f32") if x_format == "nvfp4" else None
    experts = moecore.Experts(
        first["codes"],
        second["codes"],
        order="up_gate",
        weight_format=weight_format,
        w13_scales=first["scales"],
        w2_scales=second["scales"],
        w13_global_scale=first["global"],
        w2_global_scale=second["global"],
    )
    out = moecore.fused_experts(x, weights, ids, experts, x_format=x_format, x_scale=g, inter_scale=g)

    def operand(rows: Any, offsets: Any = None) -> tuple[Any, dict[str, Any]]:
        if x_format is None:
            return rows, {}
        q = moecore.quantize(rows, x_format, global_scale=g, expert_offsets=offsets)
        return q.data, {"x_format": x_format, "x_scales": q.scales, "x_global_scale": g, "out_dtype": "f16"}

    plan = moecore.plan(ids, num_experts)
    data, options = operand(x)
    narrow = moecore.grouped_gemm(
        data,
        first["codes"],
        plan.expert_offsets,
        row_token=plan.row_token,
        activation="silu",
        order="up_gate",
        weight_format=weight_format,
        weight_scales=first["scales"],
        weight_global_scale=first["global"],
        **options,
    )
    data, options = operand(narrow, plan.expert_offsets)
    rows = moecore.grouped_gemm(
        data,
        second["codes"],
        plan.expert_offsets,
        weight_format=QuantFormat(weight_format),
        weight_scales=second["scales"],
        weight_global_scale=second["global"],
        **options,
    )
    np.testing.assert_array_equal(frame.read(out), frame.read(moecore.finalize(rows, plan, weights)))


def test_result_types(torch: Any, rng: np.random.Generator) -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    weights = Weights(rng, "fp8_token", (1, 8, 32))
    q = moecore.quantize(torch.randn(4, 32), "fp8_token")
    options = {
        "x_format": "fp8_token",
        "x_scales": q.scales,
        "weight_format": "fp8_token",
        "weight_scales": torch.from_numpy(weights.scales),
    }
    args = (q.data, torch.from_numpy(weights.codes), offsets)
    assert moecore.grouped_gemm(*args, **options).dtype == torch.bfloat16
    full = moecore.grouped_gemm(*args, **options, out_dtype="f32")
    assert full.dtype == torch.float32
    out = torch.empty(4, 8, dtype=torch.float16)
    assert moecore.grouped_gemm(*args, **options, out=out) is out
    assert torch.equal(out, full.half())


def test_static_scale_and_other_formats_of_x(torch: Any, rng: np.random.Generator) -> None:
    num_experts, hidden, inter = 3, 128, 128
    x, ids = torch.randn(6, hidden).bfloat16(), torch.randint(0, num_experts, (6, 2), dtype=torch.int32)
    weights = torch.rand(6, 2)
    scale = torch.tensor([[0.02]])

    def experts(kind: str) -> moecore.Experts[Any]:
        first, second = (
            Weights(rng, kind, shape)
            for shape in ((num_experts, 2 * inter, hidden), (num_experts, hidden, inter))
        )
        return moecore.Experts(
            torch.from_numpy(first.codes).view(torch.float8_e4m3fn),
            torch.from_numpy(second.codes).view(torch.float8_e4m3fn),
            order="gate_up",
            weight_format=kind,
            w13_scales=torch.from_numpy(first.scales),
            w2_scales=torch.from_numpy(second.scales),
        )

    layer = experts("fp8_tensor")
    exact = moecore.fused_experts(x, weights, ids, layer).float()
    static = moecore.fused_experts(
        x, weights, ids, layer, x_format="fp8_tensor_static", x_scale=scale, inter_scale=scale
    )
    assert (static.float() - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(ValueError, match=r"fused_experts: inter_scale is missing, expected f32 \[1,1\]"):
        moecore.fused_experts(x, weights, ids, layer, x_format="fp8_tensor_static", x_scale=scale)
    layer = experts("fp8_block128")
    powers = QuantFormat("fp8_block128", e8m0_scales=True, layout="column_major")
    exact = moecore.fused_experts(x, weights, ids, layer).float()
    rounded = moecore.fused_experts(x, weights, ids, layer, x_format=powers)
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


def test_rejects(torch: Any, rng: np.random.Generator) -> None:
    weights = Weights(rng, "mxfp4", (2, 32, 64))
    args = (torch.randn(3, 64), torch.from_numpy(weights.codes), torch.tensor([0, 1, 3], dtype=torch.int32))
    scales = torch.from_numpy(weights.scales)
    with pytest.raises(ValueError, match="weight_format is None, expected a format with weight_scales"):
        moecore.grouped_gemm(*args, weight_scales=scales)
    with pytest.raises(ValueError, match="weight_scales is None, expected scales with weight_format"):
        moecore.grouped_gemm(*args, weight_format="mxfp4")
    with pytest.raises(ValueError, match=r"mxfp8, expected one of .*f32.f16.bf16 x mxfp4"):
        moecore.grouped_gemm(*args, weight_format="mxfp8", weight_scales=scales)
    with pytest.raises(ValueError, match=r"weight_scales is u8\[2,32,1\]"):
        moecore.grouped_gemm(*args, weight_format="mxfp4", weight_scales=scales[:, :, :1])
    with pytest.raises(ValueError, match="transposed is True"):
        moecore.Experts(args[1], args[1], order="gate_up", transposed=True, weight_format="mxfp4")


@pytest.mark.parametrize("x_format", [None, "mxfp8", "nvfp4 object"])
def test_compiled(torch: Any, rng: np.random.Generator, x_format: Any) -> None:
    if x_format == "nvfp4 object":
        x_format = QuantFormat("nvfp4")
    num_experts, hidden, inter = 4, 64, 32
    first, second = (
        Weights(rng, "mxfp4", shape)
        for shape in ((num_experts, 2 * inter, hidden), (num_experts, hidden, inter))
    )
    experts = moecore.Experts(
        torch.from_numpy(first.codes),
        torch.from_numpy(second.codes),
        order="interleaved",
        weight_format="mxfp4",
        w13_scales=torch.from_numpy(first.scales),
        w2_scales=torch.from_numpy(second.scales),
    )

    def layer(x: Any, weights: Any, ids: Any) -> Any:
        y = moecore.fused_experts(x, weights, ids, experts, x_format=x_format)
        plan = moecore.plan(ids, num_experts)
        rows = moecore.grouped_gemm(
            x,
            experts.w13,
            plan.expert_offsets,
            row_token=plan.row_token,
            weight_format=experts.weight_format,
            weight_scales=experts.w13_scales,
        )
        return y + rows[: y.shape[0], : y.shape[1]]

    x, ids = torch.randn(6, hidden), torch.randint(0, num_experts, (6, 2), dtype=torch.int32)
    weights = torch.rand(6, 2)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, weights, ids)
    assert torch.equal(compiled, layer(x, weights, ids))
