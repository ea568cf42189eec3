"""FlashInfer's activation quantisers: import moecore.compat.flashinfer instead of flashinfer.

Sources of the semantics: FlashInfer 0.7. Differences, all where FlashInfer's bits are a defect: a block whose
NVFP4 scale underflows to 0 has zero codes (FlashInfer: the largest ones), an MXFP8 infinity keeps its sign,
NaN stays NaN in e4m3, and reciprocals are those of IEEE. Every call runs on any device.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from moecore.compat._shared import as_rows
from moecore.quantization import QuantFormat, quantize

_E4M3 = torch.float8_e4m3fn


class SfLayout(enum.Enum):
    """Where block scales stand."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


_LAYOUTS = {
    SfLayout.layout_128x4: "swizzled_128x4",
    SfLayout.layout_8x4: "swizzled_8x4",
    SfLayout.layout_linear: "linear",
}


def _layout_of(op: str, argument: str, layout: SfLayout) -> str:
    if not isinstance(layout, SfLayout):
        raise TypeError(f"{op}: {argument} is {layout!r}, expected a member of SfLayout")
    return _LAYOUTS[layout]


def _layout(swizzled: bool, small: bool = False) -> str:
    return ("swizzled_8x4" if small else "swizzled_128x4") if swizzled else "linear"


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """(e4m3 [.., K rounded up to `alignment`], flat u8 scales); padded columns and scales are zero."""
    if alignment < 1 or alignment % 32:
        raise ValueError(f"mxfp8_quantize: alignment is {alignment}, expected a positive multiple of 32")
    if sf_swizzle_layout is not None:
        layout = _layout_of("mxfp8_quantize", "sf_swizzle_layout", sf_swizzle_layout)
    else:
        layout = _layout(is_sf_swizzled_layout)
    q = quantize(as_rows(input), QuantFormat("mxfp8", layout=layout), multiple=alignment)
    return q.data.view(_E4M3).view(*input.shape[:-1], q.data.shape[1]), q.scales.view(-1)


def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """NVFP4 (sf_vec_size 16, e4m3 scales) or MXFP4 (32, ue8m0): (u8 [.., K/2], u8 scales)."""
    if (sf_vec_size, sf_use_ue8m0) not in ((16, False), (32, True)):
        raise NotImplementedError(
            f"fp4_quantize: sf_vec_size is {sf_vec_size} with sf_use_ue8m0 {sf_use_ue8m0}, "
            "expected 16 with False or 32 with True"
        )
    layout = _layout(is_sf_swizzled_layout, is_sf_8x4_layout)
    if sf_use_ue8m0:
        q = quantize(as_rows(input), QuantFormat("mxfp4", layout=layout, rounding="up"))
    else:
        scale = None if global_scale is None else global_scale.reshape(1).float()
        if scale is not None and is_global_scale_inversed:
            scale = scale.reciprocal()
        q = quantize(as_rows(input), QuantFormat("nvfp4", layout=layout), global_scale=scale)
    return q.data.view(*input.shape[:-1], q.data.shape[1]), q.scales


def nvfp4_quantize(
    a: Tensor,
    a_global_sf: Tensor,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    """NVFP4: (u8 [M, K/2], u8 scales in `sfLayout`)."""
    if do_shuffle or sf_vec_size != 16:
        raise NotImplementedError("nvfp4_quantize: expected do_shuffle False and sf_vec_size 16")
    layout = _layout_of("nvfp4_quantize", "sfLayout", sfLayout)
    q = quantize(as_rows(a), QuantFormat("nvfp4", layout=layout), global_scale=a_global_sf.reshape(1).float())
    return q.data, q.scales


def mxfp4_quantize(
    a: Tensor, backend: str = "cuda", sf_layout: SfLayout = SfLayout.layout_128x4
) -> tuple[Tensor, Tensor]:
    """MXFP4 with scales rounded up: (u8 [M, K/2], u8 scales)."""
    layout = _layout_of("mxfp4_quantize", "sf_layout", sf_layout)
    q = quantize(as_rows(a), QuantFormat("mxfp4", layout=layout, rounding="up"))
    return q.data, q.scales


def silu_and_mul_nvfp4_quantize(
    a: Tensor, a_global_sf: Tensor, sfLayout: SfLayout = SfLayout.layout_128x4
) -> tuple[Tensor, Tensor]:
    """nvfp4_quantize(silu(gate) * up) of a [M, 2K], gate first."""
    q = quantize(
        as_rows(a),
        QuantFormat("nvfp4", layout=_layout_of("silu_and_mul_nvfp4_quantize", "sfLayout", sfLayout)),
        global_scale=a_global_sf.reshape(1).float(),
        activation="silu",
    )
    return q.data, q.scales


def _grouped(
    a: Tensor, mask: Tensor, kind: str, scale: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    groups, rows, _ = a.shape
    q = quantize(
        as_rows(a),
        QuantFormat(kind, layout="swizzled_128x4"),
        global_scale=scale,
        row_counts=mask.to(torch.int32),
        activation=activation,
    )
    data = q.data.view(groups, rows, -1)
    tiles_m, tiles_k = -(-rows // 128), q.scales.shape[1] // 4
    # Stored [l, rm, rk, 32, 4, 4], seen as [32, 4, rm, 4, rk, l].
    scales = q.scales.view(groups, tiles_m, tiles_k, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)
    return data.permute(1, 2, 0), scales


def scaled_fp4_grouped_quantize(a: Tensor, mask: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 of a [l,m,k], the first mask[e] rows of each: (u8 [m,k/2,l], e4m3 scales [32,4,rm,4,rk,l])."""
    data, scales = _grouped(a, mask, "nvfp4", a_global_sf.reshape(-1).float(), None)
    return data, scales.view(_E4M3)


def silu_and_mul_scaled_nvfp4_experts_quantize(
    a: Tensor, mask: Tensor, a_global_sf: Tensor
) -> tuple[Tensor, Tensor]:
    """scaled_fp4_grouped_quantize(silu(gate) * up) of a [l,m,2k], gate first."""
    data, scales = _grouped(a, mask, "nvfp4", a_global_sf.reshape(-1).float(), "silu")
    return data, scales.view(_E4M3)


def mxfp8_grouped_quantize(a: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8 of a [l,m,k], the first mask[e] rows of each: (e4m3 [m,k,l], u8 scales [32,4,rm,4,rk,l])."""
    data, scales = _grouped(a, mask, "mxfp8", None, None)
    return data.view(_E4M3), scales


__all__ = [
    "SfLayout",
    "fp4_quantize",
    "mxfp4_quantize",
    "mxfp8_grouped_quantize",
    "mxfp8_quantize",
    "nvfp4_quantize",
    "scaled_fp4_grouped_quantize",
    "silu_and_mul_nvfp4_quantize",
    "silu_and_mul_scaled_nvfp4_experts_quantize",
]
