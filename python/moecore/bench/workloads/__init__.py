"""Every case made ready to run: rotated inputs, the call, what it moves and computes, and how to check it.

Letters as everywhere: T tokens, K experts a token, E experts, H hidden, I inter, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable

from moecore.bench.cases import Case
from moecore.bench.workloads import products, quantize, rows
from moecore.bench.workloads.lab import Lab, SkippedError, Work
from moecore.bench.workloads.routing import routed_ids
from moecore.bench.workloads.weights import Weights

__all__ = ["Lab", "SkippedError", "Weights", "Work", "prepare", "routed_ids"]

_PREPARE: dict[str, Callable[[Lab, Case], Work]] = {
    "route": rows.route,
    "plan": rows.plan,
    "permute": rows.permute,
    "shuffle_rows": rows.shuffle_rows,
    "activate": rows.activate,
    "quantize": quantize.quantize,
    "activate_quantize": quantize.activate_quantize,
    "permute_quantize": quantize.permute_quantize,
    "dequantize": quantize.dequantize,
    "finalize": rows.finalize,
    "transpose_experts": rows.transpose_experts,
    "grouped_gemm": products.grouped_gemm,
    "fused_experts": products.fused_experts,
}


def prepare(lab: Lab, case: Case) -> Work:
    """The case, ready to run. SkippedError says why not."""
    return _PREPARE[case.op](lab, case)
