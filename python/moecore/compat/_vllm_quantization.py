"""The quantisation half of moecore.compat.vllm: vLLM's _custom_ops for fp8, NVFP4 and MXFP4 activations.

Sources of the semantics: vLLM 0.33. Where vLLM leaves bytes undefined (padding of expert scales) they are
zero, a zero tensor gets a finite fp8 scale, and a NaN stays NaN (e4m3 0x7F). fp8 codes are those of
x * rcp(scale) for every granularity; vLLM divides in its per-token kernel, which differs by one code in rare
ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

import moecore
from moecore.compat._shared import as_rows, in_rows
from moecore.quantization import QuantFormat, Quantized, quantize

_SWIZZLED, _LINEAR, _SMALL = "swizzled_128x4", "linear", "swizzled_8x4"
_E4M3 = torch.float8_e4m3fn


def _codes(op: str, argument: str, out: Tensor) -> Tensor:
    """An output of e4m3 codes as rows of bytes."""
    if out.dtype not in (_E4M3, torch.uint8):
        raise TypeError(f"{op}: {argument} is {out.dtype}, expected torch.float8_e4m3fn or torch.uint8")
    return in_rows(op, argument, out).view(torch.uint8)


def scaled_fp4_quant(
    input: Tensor,
    input_global_scale: Tensor,
    is_sf_swizzled_layout: bool = True,
    backend: str = "none",
    padded_n: int | None = None,
) -> tuple[Tensor, Tensor]:
    """NVFP4: input [..,n] -> (u8 [m, padded_n/2], e4m3 scales); scale padding is zero."""
    x = as_rows(input)
    cols = x.shape[1]
    padded = cols if padded_n is None else padded_n
    small = "trtllm" in backend and x.shape[0] <= 32
    layout = (_SMALL if small else _SWIZZLED) if is_sf_swizzled_layout else _LINEAR
    fmt = QuantFormat("nvfp4", layout=layout)
    data = torch.empty(x.shape[0], padded // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(fmt.scale_shape(x.shape[0], padded), dtype=torch.uint8, device=x.device)
    quantize(x, fmt, global_scale=input_global_scale.reshape(1), out=(data, scales))
    return data, scales.view(_E4M3)


def _experts(
    x: Tensor, kind: str, expert_offsets: Tensor, scale_offsets: Tensor, **options: object
) -> Quantized:
    return quantize(
        x,
        QuantFormat(kind, layout=_SWIZZLED),
        expert_offsets=expert_offsets,
        scale_offsets=scale_offsets,
        **options,  # type: ignore[arg-type]
    )


def scaled_fp4_experts_quant(
    input_tensor: Tensor,
    input_global_scale: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """NVFP4 per expert: (u8 [m_topk, k/2], e4m3 scales [rows that fit every split, k/16 rounded up to 4])."""
    q = _experts(
        input_tensor, "nvfp4", expert_offsets, blockscale_offsets, global_scale=input_global_scale.reshape(-1)
    )
    return q.data, q.scales.view(_E4M3)


def silu_and_mul_scaled_fp4_experts_quant(
    input_tensor: Tensor,
    input_global_scale: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """scaled_fp4_experts_quant(silu(gate) * up) of input [m_topk, 2k], gate first."""
    q = _experts(
        input_tensor,
        "nvfp4",
        expert_offsets,
        blockscale_offsets,
        global_scale=input_global_scale.reshape(-1),
        activation="silu",
    )
    return q.data, q.scales.view(_E4M3)


def mxfp4_experts_quant(
    input_tensor: Tensor, expert_offsets: Tensor, blockscale_offsets: Tensor, n_experts: int, topk: int
) -> tuple[Tensor, Tensor]:
    """MXFP4 per expert, scales rounded at 1.75: (u8 [m_topk, k/2], u8 e8m0 scales)."""
    return _experts(input_tensor, "mxfp4", expert_offsets, blockscale_offsets)


def silu_and_mul_mxfp4_experts_quant(
    input_tensor: Tensor, expert_offsets: Tensor, blockscale_offsets: Tensor, n_experts: int, topk: int
) -> tuple[Tensor, Tensor]:
    """mxfp4_experts_quant(silu(gate) * up) of input [m_topk, 2k], gate first."""
    return _experts(input_tensor, "mxfp4", expert_offsets, blockscale_offsets, activation="silu")


def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    """Writes e4m3(input * rcp(scale)) to `result`, scale f32 [1]."""
    codes = _codes("static_scaled_fp8_quant", "result", result)
    quantize(as_rows(input), "fp8_tensor_static", out=(codes, scale.reshape(1, 1)))


def dynamic_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    """The same with scale = largest magnitude / 448, which is written to `scale`."""
    op = "dynamic_scaled_fp8_quant"
    codes, scales = _codes(op, "result", result), in_rows(op, "scale", scale, 1, 1)
    quantize(as_rows(input), "fp8_tensor", out=(codes, scales))


def dynamic_per_token_scaled_fp8_quant(
    result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None = None
) -> None:
    """One scale a row, at least 1 / (448 * 512), to `scale` [m,1]; `scale_ub` caps the magnitude.

    The cap is read on the host: a `scale_ub` on a GPU waits for the work before it.
    """
    op = "dynamic_per_token_scaled_fp8_quant"
    codes, scales = _codes(op, "result", result), in_rows(op, "scale", scale, -1, 1)
    fmt = QuantFormat("fp8_token", amax_cap=None if scale_ub is None else _cap(float(scale_ub)))
    quantize(as_rows(input), fmt, out=(codes, scales))


def _cap(magnitude: float) -> float:
    """An upper bound of magnitudes as a format takes it: the least scale 1 / (448 * 512) comes first."""
    return min(max(magnitude, 1 / 512), torch.finfo(torch.float32).max)


def _check_groups(op: str, group_size: int, k: int) -> None:
    if group_size != 128 and (group_size < 1 or k % group_size):
        raise ValueError(f"{op}: group_size is {group_size}, expected a divisor of the {k} columns, or 128")


def _scales(rows: int, groups: int, like: Tensor, column_major: bool, aligned: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised f32 scales, as they lie in memory and as [rows, groups], a view of that."""
    if not column_major:
        held = torch.empty(rows, groups, dtype=torch.float32, device=like.device)
        return held, held
    pitch = -(-rows // 4) * 4 if aligned else rows
    held = torch.empty(groups, pitch, dtype=torch.float32, device=like.device)
    return held, held.t()[:rows]


def _group_quant(
    rows: Tensor, group_size: int, codes: Tensor, scales: Tensor, amax_floor: float, amax_cap: float | None
) -> None:
    """fp8 of rows [m,k] in groups of any size that divides k: codes u8 [m,k], f32 scales [m, k/group_size].

    A group is a row of its own to the token format, whose scale follows the same rule.
    """
    fmt = QuantFormat("fp8_token", amax_floor=amax_floor, amax_cap=amax_cap)
    groups = torch.empty(scales.numel(), 1, dtype=torch.float32, device=rows.device)
    quantize(
        rows.reshape(-1, group_size),
        fmt,
        out=(in_rows("per_token_group_fp8_quant", "out_q", codes, -1, group_size), groups),
    )
    scales.copy_(groups.view(scales.shape))


def per_token_group_fp8_quant(
    x: Tensor,
    group_size: int,
    eps: float = 1e-10,
    dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    out_q: Tensor | None = None,
    use_ue8m0: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """fp8 in groups of columns: (e4m3 [..,k], f32 scales [.., k/group_size], strided when column-major).

    Groups of other than 128 columns must divide k, and their scales are no powers of two.
    """
    op = "per_token_group_fp8_quant"
    if dtype not in (None, _E4M3):
        raise TypeError(f"{op}: dtype is {dtype}, expected torch.float8_e4m3fn")
    rows = as_rows(x)
    _check_groups(op, group_size, rows.shape[1])
    if group_size != 128 and use_ue8m0:
        raise NotImplementedError(
            f"{op}: use_ue8m0 with group_size {group_size}; scales that are powers of two are those of the "
            "128-column format, and of mxfp8 for 32"
        )
    m, groups = rows.shape[0], -(-rows.shape[1] // group_size)
    q = torch.empty(x.shape, dtype=_E4M3, device=x.device) if out_q is None else out_q
    codes = _codes(op, "out_q", q)
    held, scales = _scales(m, groups, x, column_major_scales, tma_aligned_scales)
    if group_size != 128:
        held.zero_()  # the padding of a pitch
        _group_quant(rows, group_size, codes, scales, eps, None)
    else:
        fmt = QuantFormat(
            "fp8_block128",
            layout="column_major" if column_major_scales else _LINEAR,
            power_of_two=bool(use_ue8m0),
            amax_floor=eps,
        )
        quantize(rows, fmt, out=(codes, held))
    return q, scales if column_major_scales else scales.view(*x.shape[:-1], groups)


def silu_and_mul_per_block_quant(
    input: Tensor,
    group_size: int,
    quant_dtype: torch.dtype = _E4M3,
    scale_ub: Tensor | float | None = None,
    is_scale_transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, rounded to the input's type, in groups: (e4m3 [m,k], f32 scales [m, k/group_size]).

    A scale is max(min(largest magnitude / 448, scale_ub), 1 / (448 * 512)). `is_scale_transposed`: the scales
    are a view of memory [k/group_size, m]. Groups of 128 columns take one pass, others must divide k. The
    bound is read on the host: a `scale_ub` on a GPU waits for the work before it.
    """
    op = "silu_and_mul_per_block_quant"
    if quant_dtype != _E4M3:
        raise TypeError(f"{op}: quant_dtype is {quant_dtype}, expected torch.float8_e4m3fn")
    x = as_rows(input)
    m, k = x.shape[0], x.shape[1] // 2
    _check_groups(op, group_size, k)
    cap = None if scale_ub is None else _cap(448 * float(scale_ub))
    codes = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    held, scales = _scales(m, -(-k // group_size), x, is_scale_transposed, aligned=False)
    if group_size != 128:
        _group_quant(moecore.activate(x, "silu"), group_size, codes, scales, 1 / 512, cap)
    else:
        layout = "column_major" if is_scale_transposed else _LINEAR
        fmt = QuantFormat("fp8_block128", layout=layout, amax_floor=1 / 512, amax_cap=cap)
        quantize(x, fmt, activation="silu", out=(codes, held))
    return codes.view(_E4M3), scales


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    """Writes silu(gate) * up to `out`, rounded once (vLLM rounds silu(gate) first)."""
    moecore.activate(as_rows(x), "silu", out=in_rows("silu_and_mul", "out", out))


def swigluoai_and_mul(out: Tensor, x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    """gpt-oss's activation of interleaved (gate, up) pairs."""
    rows = in_rows("swigluoai_and_mul", "out", out)
    moecore.activate(as_rows(x), "swiglu_oai", order="interleaved", alpha=alpha, limit=limit, out=rows)


__all__ = [
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "mxfp4_experts_quant",
    "per_token_group_fp8_quant",
    "scaled_fp4_experts_quant",
    "scaled_fp4_quant",
    "silu_and_mul",
    "silu_and_mul_mxfp4_experts_quant",
    "silu_and_mul_per_block_quant",
    "silu_and_mul_scaled_fp4_experts_quant",
    "static_scaled_fp8_quant",
    "swigluoai_and_mul",
]
