"""quantize through Python: shapes, dtypes, layouts and upstream's names; tests/cpp/quantize_test.cc has the bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

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

from moecore.compat import flashinfer, sgl_kernel, vllm  # noqa: E402

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


def test_static_scale_is_given_once() -> None:
    x, scale = torch.ones(2, 16), torch.tensor([[0.5]])
    out = (torch.zeros(2, 16, dtype=torch.uint8), torch.tensor([[0.25]]))
    with pytest.raises(ValueError, match=r"^quantize: scale is None, expected f32 \[1,1\]"):
        quantize(x, "fp8_tensor_static")
    with pytest.raises(ValueError, match=r"^quantize: scale is given, expected None with out"):
        quantize(x, "fp8_tensor_static", scale=scale, out=out)
    assert not out[0].any()
    for kind in KINDS:
        with pytest.raises(ValueError, match=rf'^quantize: scale is given, expected None with "{kind}"'):
            quantize(x, kind, scale=scale)
    assert scale == 0.5
    expected = quantize(x, "fp8_tensor_static", scale=out[1].clone())
    for options in ({}, {"scale": out[1]}):
        quantize(x, "fp8_tensor_static", out=out, **options)
        assert torch.equal(out[0], expected.data)


@pytest.mark.parametrize(
    "option",
    [
        {"activation": "silu"},
        {"order": "plain"},
        {"alpha": 1.0},
        {"beta": 1.0},
        {"limit": 1.0},
        {"expert_offsets": torch.zeros(5, dtype=torch.int32)},
        {"scale_offsets": torch.zeros(5, dtype=torch.int32)},
        {"row_counts": torch.zeros(4, dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_plan_excludes(option: dict[str, Any]) -> None:
    plan = moecore.plan(torch.zeros(4, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=rf"^quantize: {next(iter(option))} is .* with a plan"):
        quantize(torch.zeros(4, 64), "mxfp8", plan=plan, **option)


F, S, U8 = torch.zeros(4, 64), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 64, dtype=torch.uint8)
MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: moecore.finalize(F, S, dtype="float32"), ValueError, "finalize: dtype is 'float32', expected one of f32"),
    (lambda: moecore.finalize(F, S, hidden=-1), ValueError, "finalize: hidden is -1, expected at least 0"),
    (lambda: moecore.finalize(F, S, hidden=8, out=F), ValueError, "finalize: hidden is 8, expected None or the 64"),
    (lambda: moecore.finalize(F, S, dtype="f16", out=F), ValueError, "finalize: dtype is 'f16', expected None or the d"),
    (lambda: moecore.finalize_quantize(F, S, hidden=-1), ValueError, "finalize_quantize: hidden is -1"),
    (lambda: moecore.finalize_quantize(F, S, hidden=8, out=(U8, F)), ValueError, "finalize_quantize: hidden is 8"),
    (lambda: moecore.finalize_quantize(F, S, scale_layout="row"), ValueError, "finalize_quantize: scale_layout is"),
    (lambda: moecore.finalize_quantize(F, U8.tolist()), TypeError, "finalize_quantize: slot_row is a list"),
    (lambda: dequantize(U8, F, "fp8_token", dtype="f64"), ValueError, "dequantize: dtype is 'f64', expected one of f32"),
    (lambda: dequantize(U8[0], F, "fp8_token"), ValueError, "dequantize: data is u8[64] cpu, expected 2 dimensions"),
    (lambda: dequantize(U8, F, None), TypeError, "dequantize: format is None, expected a QuantFormat"),
    (lambda: dequantize(U8, F, "fp8_token", hidden=-1), ValueError, "dequantize: hidden is -1, expected at least 0"),
    (lambda: dequantize(U8, F, "fp8_token", hidden=8, out=F), ValueError, "dequantize: hidden is 8, expected None or"),
    (lambda: moecore.grouped_gemm(F, F[None], S[:2, 0], out_dtype="fp32"), ValueError,
     "grouped_gemm: out_dtype is 'fp32', expected one of f32, f16, bf16"),
    (lambda: quantize(F[0], "mxfp8"), ValueError, "quantize: x is f32[64] cpu, expected 2 dimensions"),
    (lambda: quantize(F, None), TypeError, "quantize: format is None, expected a QuantFormat or the name of a kind"),
    (lambda: quantize(F, "mxfp8", multiple=-5), ValueError, "quantize: multiple is -5, expected at least 1"),
    (lambda: quantize(F, "mxfp8", plan=S), TypeError, "quantize: plan is a Tensor, expected a moecore.Plan"),
    (lambda: moecore.permute(F, None), TypeError, "permute: plan is a NoneType, expected a moecore.Plan"),
    (lambda: global_scale(F, per_expert=True), ValueError, "global_scale: per_expert is True, expected it with"),
    (lambda: convert_scales(U8, "linear", "linear", -4, 4), ValueError, "convert_scales: rows is -4, expected at"),
    (lambda: convert_scales(U8, "row", "linear", 4, 64), ValueError, 'convert_scales: source is "row", expected one of'),
    (lambda: convert_scales(U8, "linear", "row", 4, 64), ValueError, 'convert_scales: target is "row", expected one of'),
    (lambda: QuantFormat("nvfp4", rounding="bogus"), ValueError, 'quantize: rounding is "bogus", expected one of "up"'),
    (lambda: moecore.plan_workspace_bytes(-4, 2, 8), ValueError, "plan_workspace_bytes: num_tokens is -4"),
    (lambda: moecore.fused_experts_workspace_bytes(-4, 2, 8, 64, 64, "f32"), ValueError,
     "fused_experts_workspace_bytes: num_tokens is -4, expected at least 0"),
    (lambda: moecore.grouped_gemm_workspace_bytes(4, 8, -8, 1, "f32"), ValueError,
     "grouped_gemm_workspace_bytes: k is -8"),
    (lambda: moecore.Experts(F[None], F[None], order="plain").workspace_bytes(-1, 2), ValueError,
     "num_tokens is -1, expected at least 0"),
    (lambda: flashinfer.nvfp4_quantize(F, torch.ones(1), sfLayout=0), TypeError, "nvfp4_quantize: sfLayout is 0"),
    (lambda: flashinfer.mxfp4_quantize(F, sf_layout=0), TypeError, "mxfp4_quantize: sf_layout is 0"),
    (lambda: flashinfer.mxfp8_quantize(F, alignment=0), ValueError, "mxfp8_quantize: alignment is 0"),
    (lambda: flashinfer.mxfp8_quantize(F, alignment=-32), ValueError, "mxfp8_quantize: alignment is -32"),
    (lambda: vllm.per_token_group_fp8_quant(F, 0), ValueError, "per_token_group_fp8_quant: group_size is 0"),
    (lambda: vllm.silu_and_mul_per_block_quant(F, 0), ValueError, "silu_and_mul_per_block_quant: group_size is 0"),
    (lambda: vllm.silu_and_mul_per_block_quant(F, 128, torch.int8), TypeError, "quant_dtype is torch.int8"),
    (lambda: vllm.grouped_topk(F, 4, 2, 2, True, 1.0, F[0], 7), ValueError, "grouped_topk: scoring_func is 7"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    assert message in str(caught.value)


def test_dequantize_has_no_gradient() -> None:
    q = quantize(torch.ones(2, 16), "fp8_token")
    with pytest.raises(RuntimeError, match=r"^dequantize: an input requires grad"):
        dequantize(q.data, q.scales.requires_grad_(), "fp8_token")


def test_formats_are_values() -> None:
    texts = {
        "QuantFormat('nvfp4')": QuantFormat("nvfp4"),
        "QuantFormat('nvfp4', layout='swizzled_8x4')": QuantFormat("nvfp4", layout="swizzled_8x4"),
        "QuantFormat('mxfp4', rounding='up')": QuantFormat("mxfp4", rounding="up"),
        "QuantFormat('fp8_block128', power_of_two=True)": QuantFormat("fp8_block128", power_of_two=True),
        "QuantFormat('fp8_block128', e8m0_scales=True)": QuantFormat("fp8_block128", e8m0_scales=True),
        "QuantFormat('fp8_token', amax_cap=0.5)": QuantFormat("fp8_token", amax_cap=0.5),
        "QuantFormat('fp8_tensor_static')": QuantFormat("fp8_tensor_static"),
        "QuantFormat('fp8_token', amax_floor=0.10000000149011612)": QuantFormat("fp8_token", amax_floor=0.1),
    }
    assert len(set(texts.values())) == len(texts)
    for text, fmt in texts.items():
        assert repr(fmt) == text
        assert text.startswith(f"QuantFormat('{fmt.kind}'")
        for same in (eval(text), copy.deepcopy(fmt), pickle.loads(pickle.dumps(fmt))):
            assert same == fmt
            assert hash(same) == hash(fmt)
            assert repr(same) == text
        assert fmt != text


def test_lazy_views_of_torch_are_refused() -> None:
    z, first = torch.randn(3, 4, dtype=torch.complex64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^shuffle_rows: x is a torch.Tensor with the conjugate bit"):
        moecore.shuffle_rows(z.conj(), first)
    assert torch.equal(moecore.shuffle_rows(z.conj().resolve_conj(), first), z.conj()[:1])
    negative = torch._neg_view(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"^activate: x is a torch.Tensor with the negative bit"):
        moecore.activate(negative)
    with pytest.raises(ValueError, match=r"^activate: out is a torch.Tensor with the negative bit"):
        moecore.activate(torch.randn(4, 128), out=negative)
    with pytest.raises(ValueError, match=r"^finalize: weights is a torch.Tensor with the negative bit"):
        moecore.finalize(F, S, torch._neg_view(torch.ones(4, 2)))


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


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bound", [1e-9, 0.002, 1.0, 1e37])
def test_vllm_silu_groups_have_a_bound(group: int, transposed: bool, bound: float) -> None:
    x = 3 * torch.randn(7, 1024, generator=torch.Generator().manual_seed(4))
    q, s = vllm.silu_and_mul_per_block_quant(x, group, torch.float8_e4m3fn, torch.tensor([bound]), transposed)
    values = moecore.activate(x, "silu").view(7, -1, group)
    expected = (values.abs().amax(-1) / 448).clamp(max=bound).clamp(min=1 / (448 * 512))
    torch.testing.assert_close(s, expected, rtol=1e-6, atol=0)
    assert s.stride() == ((1, 7) if transposed else (512 // group, 1))
    codes = (values * (1 / s)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(q.view(torch.uint8).flatten(), codes.flatten())


def test_compat_outputs_are_written_or_refused() -> None:
    """Of 3-D outputs, whose rows cannot be numbered without a copy, and the same ones where they can."""
    x, scale = torch.randn(2, 3, 128), torch.ones(1)
    calls: list[tuple[str, str, int, torch.dtype, Callable[[Any], Any]]] = [
        ("silu_and_mul", "out", 64, torch.float32, lambda out: vllm.silu_and_mul(out, x)),
        ("swigluoai_and_mul", "out", 64, torch.float32, lambda out: vllm.swigluoai_and_mul(out, x)),
        ("silu_and_mul", "out", 64, torch.float32, lambda out: sgl_kernel.silu_and_mul(x, out)),
        ("gelu_and_mul", "out", 64, torch.float32, lambda out: sgl_kernel.gelu_and_mul(x, out)),
        ("static_scaled_fp8_quant", "result", 128, torch.float8_e4m3fn,
         lambda out: vllm.static_scaled_fp8_quant(out, x, scale)),
        ("dynamic_scaled_fp8_quant", "result", 128, torch.float8_e4m3fn,
         lambda out: vllm.dynamic_scaled_fp8_quant(out, x, scale.clone())),
        ("dynamic_per_token_scaled_fp8_quant", "result", 128, torch.float8_e4m3fn,
         lambda out: vllm.dynamic_per_token_scaled_fp8_quant(out, x, torch.empty(6, 1))),
        ("per_token_group_fp8_quant", "out_q", 128, torch.float8_e4m3fn,
         lambda out: vllm.per_token_group_fp8_quant(x, 128, out_q=out)),
        ("per_token_group_fp8_quant", "out_q", 128, torch.float8_e4m3fn,
         lambda out: vllm.per_token_group_fp8_quant(x, 64, out_q=out)),
    ]  # fmt: skip
    for op, argument, width, dtype, call in calls:
        memory = torch.zeros(2, 4, width, dtype=dtype)
        with pytest.raises(ValueError, match=rf"^{op}: {argument} has the shape .* without a copy"):
            call(memory[:, :3])
        assert not memory.float().any()
        out = torch.zeros(2, 3, width, dtype=dtype)
        call(out)
        assert out.float().any()
        if dtype == torch.float8_e4m3fn:
            with pytest.raises(TypeError, match=rf"^{op}: {argument} is torch.float32, expected"):
                call(torch.zeros(2, 3, width))
    with pytest.raises(ValueError, match=r"^per_token_group_fp8_quant: out_q has the shape"):
        vllm.per_token_group_fp8_quant(
            x[0], 64, out_q=torch.zeros(3, 192, dtype=torch.float8_e4m3fn)[:, :128]
        )
