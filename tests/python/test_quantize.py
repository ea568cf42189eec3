"""quantize through Python: shapes, dtypes, layouts and upstream's names; tests/cpp/quantize_test.cc has the bits."""

from __future__ import annotations

import moecore
import numpy as np
import pytest
from moecore import (
    QuantFormat,
    convert_scales,
    dequantize,
    expert_scale_rows,
    global_scale,
    quantize,
)

torch = pytest.importorskip("torch")

KINDS = ["fp8_tensor", "fp8_token", "fp8_block128", "nvfp4", "mxfp8", "mxfp4"]
# Largest error of a code, as a share of the block's largest magnitude: half a step of e4m3 or e2m1, and for
# mxfp4 what clipping [6, 7) to 6 costs.
STEPS = {"nvfp4": 1 / 5, "mxfp4": 1 / 5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(37, 2880, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = global_scale(x) if kind == "nvfp4" else None
    fmt = QuantFormat(kind, layout="linear")
    q = quantize(x, fmt, global_scale=scale, multiple=256)
    padded = 3072
    assert q.data.dtype == torch.uint8
    assert q.data.shape == (37, padded // 2 if fmt.is_fp4 else padded)
    assert q.scales.shape == tuple(fmt.scale_shape(37, padded))
    assert q.scales.dtype == (torch.float32 if fmt.has_f32_scales else torch.uint8)
    back = dequantize(q.data, q.scales, fmt, hidden=2880, global_scale=scale)
    assert back.dtype == torch.float32
    block = fmt.block or 2880
    blocks = torch.nn.functional.pad(x.float(), (0, -2880 % block)).view(37, -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    if kind == "fp8_tensor":
        largest = x.float().abs().max()
    error = (torch.nn.functional.pad(back, (0, -2880 % block)).view(37, -1, block) - blocks).abs()
    assert (error <= largest * STEPS.get(kind, 1 / 16)).all()
    assert not q.data[:, (2880 // 2 if fmt.is_fp4 else 2880) :].any()


def test_golden_nvfp4_and_numpy() -> None:
    x = np.arange(16, dtype=np.float32).reshape(1, 16) - 7.5
    q = quantize(x, QuantFormat("nvfp4"))
    assert isinstance(q.data, np.ndarray)
    assert q.data.tobytes().hex() == "ffeecd9a21546677"
    assert q.scales[0, 0] == 0x3A


def test_static_scale() -> None:
    x = torch.tensor([[1.0, -2.0, 500.0, 0.0]])
    q = quantize(x, "fp8_tensor_static", scale=torch.tensor([[0.5]]))
    assert q.data.view(torch.float8_e4m3fn).float().tolist() == [[2.0, -4.0, 448.0, 0.0]]


@pytest.mark.parametrize("kind", ["fp8_token", "fp8_block128", "nvfp4", "mxfp8", "mxfp4"])
def test_fused_forms_are_the_pairs(kind: str) -> None:
    layout = "linear" if kind.startswith("fp8") else "swizzled_128x4"
    fmt = QuantFormat(kind, layout=layout)
    ids = torch.randint(-1, 9, (20, 3), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    plan = moecore.plan(ids, 8)
    x = torch.randn(20, 144, generator=torch.Generator().manual_seed(3), dtype=torch.float32).bfloat16()
    live = int(plan.expert_offsets[-1])
    offsets = {"expert_offsets": plan.expert_offsets, "scale_offsets": plan.scale_offsets}
    fused, pair = quantize(x, fmt, plan=plan), quantize(moecore.permute(x, plan), fmt, **offsets)
    assert torch.equal(fused.data[:live], pair.data[:live])
    rows = live if layout == "linear" else int(plan.scale_offsets[-1])
    assert torch.equal(fused.scales[:rows], pair.scales[:rows])
    if layout != "linear":
        assert fused.scales.shape[0] == expert_scale_rows(60, 8)

    gated = torch.randn(20, 144, generator=torch.Generator().manual_seed(4)).half()
    fused = quantize(gated, fmt, activation="swiglu_oai", order="interleaved")
    pair = quantize(moecore.activate(gated, "swiglu_oai", order="interleaved"), fmt)
    assert torch.equal(fused.data, pair.data)
    assert torch.equal(fused.scales, pair.scales)


def test_convert_scales() -> None:
    linear = torch.arange(33 * 7, dtype=torch.uint8).view(33, 7)
    for layout in ["swizzled_128x4", "swizzled_8x4", "column_major"]:
        moved = convert_scales(linear, "linear", layout, 33, 7)
        assert torch.equal(convert_scales(moved, layout, "linear", 33, 7), linear)
    moved = convert_scales(linear, "linear", "swizzled_128x4", 33, 7).view(-1)
    assert moved[(5 // 4) * 512 + 0 * 16 + 1 * 4 + 5 % 4] == linear[32, 5]


def test_rejects() -> None:
    x = torch.zeros(4, 64)
    with pytest.raises(ValueError, match='format is "int8", expected one of'):
        quantize(x, "int8")
    with pytest.raises(ValueError, match="layout"):
        quantize(x, QuantFormat("fp8_token", layout="swizzled_8x4"))
    with pytest.raises(TypeError, match="x is i32"):
        quantize(x.int(), "mxfp8")


def test_flashinfer_names() -> None:
    from moecore.compat import flashinfer as fi

    x = torch.randn(5, 1568, generator=torch.Generator().manual_seed(5)).bfloat16()
    data, scales = fi.mxfp8_quantize(x, alignment=128)
    assert data.shape == (5, 1664)
    assert data.dtype == torch.float8_e4m3fn
    assert scales.numel() == 128 * 52
    assert not data.view(torch.uint8)[:, 1568:].any()
    for layout, rows in [
        (fi.SfLayout.layout_128x4, 128),
        (fi.SfLayout.layout_8x4, 8),
        (fi.SfLayout.layout_linear, 5),
    ]:
        data, scales = fi.nvfp4_quantize(x, torch.tensor([64.0]), layout)
        assert data.shape == (5, 784)
        assert scales.shape[0] == rows
    grouped, scales = fi.scaled_fp4_grouped_quantize(
        x[None, :, :64].expand(2, -1, -1).contiguous(), torch.tensor([5, 2], dtype=torch.int32), torch.ones(2)
    )
    assert grouped.shape == (5, 32, 2)
    assert scales.shape == (32, 4, 1, 4, 1, 2)
    inverse, _ = fi.fp4_quantize(x, torch.tensor([1 / 64.0]), is_global_scale_inversed=True)
    assert torch.equal(inverse, fi.nvfp4_quantize(x, torch.tensor([64.0]))[0])


def test_vllm_names() -> None:
    from moecore.compat import vllm as v

    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    data, scales = v.scaled_fp4_quant(x, torch.tensor([50.0]))
    assert data.shape == (9, 128)
    assert scales.shape == (128, 16)
    assert scales.dtype == torch.float8_e4m3fn
    _, scale = v.per_token_group_fp8_quant(x, 128, column_major_scales=True, tma_aligned_scales=True)
    assert scale.shape == (9, 2)
    assert scale.stride() == (1, 12)
    expected = x.float().view(9, 2, 128).abs().amax(-1) / 448
    assert torch.equal(scale, expected)
    out, token = torch.empty(9, 256, dtype=torch.float8_e4m3fn), torch.empty(9, 1)
    v.dynamic_per_token_scaled_fp8_quant(out, x, token)
    assert torch.equal(token, x.float().abs().amax(-1, keepdim=True) / 448)
    tensor = torch.empty(1)
    v.dynamic_scaled_fp8_quant(out, x, tensor)
    again = torch.empty_like(out)
    v.static_scaled_fp8_quant(again, x, tensor)
    assert torch.equal(again.view(torch.uint8), out.view(torch.uint8))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 128, 256], dtype=torch.int32)
    one, _ = v.silu_and_mul_scaled_fp4_experts_quant(x, torch.ones(2), *offsets, 1)
    activated = torch.empty(9, 128, dtype=torch.bfloat16)
    v.silu_and_mul(activated, x)
    two, _ = v.scaled_fp4_experts_quant(activated, torch.ones(2), *offsets, 1)
    assert torch.equal(one, two)


@pytest.mark.parametrize("group", [16, 64, 128, 256])
@pytest.mark.parametrize("column_major", [False, True])
def test_vllm_groups_of_any_size(group: int, column_major: bool) -> None:
    from moecore.compat import vllm as v

    x = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[0, 1, :256] = 0
    grouped = x.float().view(10, -1, group)
    scale = grouped.abs().amax(-1).clamp(min=1e-10) / 448
    codes = (grouped * (1 / scale)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    q, s = v.per_token_group_fp8_quant(x, group, column_major_scales=column_major, tma_aligned_scales=True)
    assert q.shape == x.shape
    assert torch.equal(q.view(torch.uint8).flatten(), codes.flatten())
    assert torch.equal(s.reshape(10, -1), scale)
    assert s.stride()[-1] == (12 if column_major else 1)


@pytest.mark.parametrize("group", [64, 128])
def test_vllm_silu_groups(group: int) -> None:
    from moecore.compat import vllm as v

    x = torch.randn(7, 1024, generator=torch.Generator().manual_seed(4)).half()
    q, s = v.silu_and_mul_per_block_quant(x, group)
    grouped = moecore.activate(x, "silu").float().view(7, -1, group)
    scale = grouped.abs().amax(-1).clamp(min=1 / 512) / 448
    codes = (grouped * (1 / scale)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(q.view(torch.uint8).flatten(), codes.flatten())
    assert torch.equal(s, scale)


def test_vllm_groups_refuse() -> None:
    from moecore.compat import vllm as v

    with pytest.raises(ValueError, match="group_size is 60, expected a divisor of the 512 columns"):
        v.per_token_group_fp8_quant(torch.zeros(3, 512), 60)
    with pytest.raises(NotImplementedError, match="use_ue8m0 with group_size 64"):
        v.per_token_group_fp8_quant(torch.zeros(3, 512), 64, use_ue8m0=True)
