"""The ops as Python functions: they allocate with the framework of the first argument and call _core.

Letters: T tokens, K experts per token (top_k), E experts, H hidden, I inter, R = T*K rows. Every function
takes tensors of any DLPack framework; `out=` writes into the caller's tensors instead of allocating;
`stream=` is None (the framework's current stream), an int pointer, or an object with `__cuda_stream__`, and
means nothing on CPU.

Errors: TypeError for an element type or a non-tensor, ValueError for a shape, device or value,
NotImplementedError for valid input without a kernel in this build, BackendError for a missing device, and
RuntimeError for an input that requires a gradient while torch records them. Outputs are untouched in each
case.
"""

from __future__ import annotations

from typing import Any

from moecore import _core
from moecore._frameworks import Framework, framework_of
from moecore.ops.experts import (
    Experts,
    fused_experts,
    fused_experts_workspace_bytes,
    grouped_gemm,
    grouped_gemm_workspace_bytes,
    transpose_experts,
)
from moecore.ops.routing import Plan, plan, plan_workspace_bytes, route, route_plan
from moecore.ops.rows import activate, finalize, finalize_quantize, permute, shuffle_rows
from moecore.typing import DLPackTensor


def view_as(x: DLPackTensor, dtype: str) -> Any:
    """The memory of `x` as a moecore dtype ("e4m3", "e8m0", "e2m1", ...), for frameworks that lack it.

    Bytes viewed as "e2m1" hold two elements each, the even one in the low nibble. torch tensors become native
    views where torch has the dtype; otherwise the result is an object that every moecore op takes, with
    `.base`, `.dtype`, `.shape`.
    """
    return framework_of("view_as", "x", x).view(x, dtype)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which kernel and policy `op` would take for these arguments, and why; runs nothing.

    `op` is the name of a function of moecore; the arguments are its own, and are validated.
    """
    if op not in OPS:
        raise ValueError(f'explain: op is "{op}", expected one of {", ".join(OPS)}')
    import moecore

    call = getattr(moecore, op)
    _core.explain_begin()
    try:
        call(*args, **kwargs)
    finally:
        text = _core.explain_end()
    return text


OPS = (
    "route",
    "plan",
    "route_plan",
    "permute",
    "shuffle_rows",
    "activate",
    "grouped_gemm",
    "finalize",
    "fused_experts",
    "transpose_experts",
    "quantize",
    "dequantize",
)
"""The names of the ops, in the order of the data path, then those beside it."""

__all__ = [
    "OPS",
    "Experts",
    "Framework",
    "Plan",
    "activate",
    "explain",
    "finalize",
    "finalize_quantize",
    "fused_experts",
    "fused_experts_workspace_bytes",
    "grouped_gemm",
    "grouped_gemm_workspace_bytes",
    "permute",
    "plan",
    "plan_workspace_bytes",
    "route",
    "route_plan",
    "shuffle_rows",
    "transpose_experts",
    "view_as",
]
