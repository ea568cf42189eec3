"""The public functions of moecore as torch.compile traces them: calls of torch.ops.moecore."""

from __future__ import annotations

from typing import Any

import torch

from moecore.ops import Experts, Plan
from moecore.quantization import check_static_scale
from moecore.torch_ops.definitions import format_kind, format_name


def _call(name: str, out: Any, *args: Any) -> Any:
    """The functional op, or the `_out` op and the caller's tensors."""
    if out is None:
        return getattr(torch.ops.moecore, name)(*args)
    if isinstance(out, list):
        out = tuple(out)
    getattr(torch.ops.moecore, f"{name}_out")(*args, *(out if isinstance(out, tuple) else (out,)))
    return out


def route(logits: Any, top_k: int, *rest: Any) -> Any:
    """moecore.route() in a traced program."""
    *arguments, out = rest
    return _call("route", out, logits, top_k, *arguments)


def plan(
    ids: Any, num_experts: int, expert_map: Any, first_expert: int, scale_alignment: int, problem_sizes: Any,
    gated: bool, swap_ab: bool, out: Any,
) -> Any:  # fmt: skip
    """moecore.plan() in a traced program."""
    hidden, inter = problem_sizes if problem_sizes is not None else (0, 0)
    if out is not None:
        out = tuple(out)
        if any(tensor is None for tensor in out):
            raise ValueError("plan: out has no problem_sizes tensors, expected all seven under torch.compile")
    result = _call(
        "plan", out, ids, num_experts, expert_map, first_expert, scale_alignment, hidden, inter, gated,
        swap_ab,
    )  # fmt: skip
    return Plan(*result) if problem_sizes is not None else Plan(*result[:5])


def route_plan(
    logits: Any, top_k: int, num_experts: int | None, scoring: Any, bias: Any, num_groups: int,
    topk_groups: int, group_score: Any, renormalize: bool, scale: float, is_padding: Any, expert_map: Any,
    first_expert: int, scale_alignment: int, problem_sizes: Any, gated: bool, swap_ab: bool, out: Any,
) -> Any:  # fmt: skip
    """moecore.route_plan() in a traced program."""
    hidden, inter = problem_sizes if problem_sizes is not None else (0, 0)
    if out is not None:
        out = (out[0], out[1], *out[2])
        if any(tensor is None for tensor in out):
            raise ValueError("route_plan: out has no problem_sizes tensors, expected all under torch.compile")
    experts = logits.shape[1] if num_experts is None else num_experts
    result = _call(
        "route_plan", out, logits, top_k, experts, scoring, bias, num_groups, topk_groups, group_score,
        renormalize, scale, is_padding, expert_map, first_expert, hidden, inter, scale_alignment, gated,
        swap_ab,
    )  # fmt: skip
    plan = Plan(*result[2:]) if problem_sizes is not None else Plan(*result[2:7])
    return result[0], result[1], plan


def permute(x: Any, scales: Any, row_token: Any, slot_row: Any, expert_offsets: Any, out: Any) -> Any:
    """moecore.permute() in a traced program."""
    if scales is not None:
        return _call("permute_scales", out, x, scales, row_token, slot_row, expert_offsets)
    return _call("permute", out, x, row_token, slot_row, expert_offsets)


def shuffle_rows(x: Any, scales: Any, map: Any, out: Any) -> Any:
    """moecore.shuffle_rows() in a traced program."""
    if scales is not None:
        return _call("shuffle_rows_scales", out, x, scales, map)
    return _call("shuffle_rows", out, x, map)


def transpose_experts(src: Any, out: Any) -> Any:
    """moecore.transpose_experts() in a traced program."""
    return _call("transpose_experts", out, src)


def activate(x: Any, *rest: Any) -> Any:
    """moecore.activate() in a traced program."""
    *arguments, out = rest
    return _call("activate", out, x, *arguments)


def grouped_gemm(
    x: Any, weights: Any, expert_offsets: Any, bias: Any, row_token: Any, activation: Any, order: Any,
    alpha: Any, beta: Any, limit: Any, row_weights: Any, x_format: Any, x_scales: Any, x_global_scale: Any,
    weight_format: Any, weight_scales: Any, weight_global_scale: Any, out_dtype: Any, out: Any,
) -> Any:  # fmt: skip
    """moecore.grouped_gemm() in a traced program."""
    return _call(
        "grouped_gemm", out, x, weights, expert_offsets, bias, row_token, activation, order, alpha, beta,
        limit, row_weights, format_name(x_format), x_scales, x_global_scale, format_name(weight_format),
        weight_scales, weight_global_scale, out_dtype,
    )  # fmt: skip


def finalize(rows: Any, *rest: Any) -> Any:
    """moecore.finalize() in a traced program."""
    *arguments, out = rest
    return _call("finalize", out, rows, *arguments)


def finalize_quantize(rows: Any, *rest: Any) -> Any:
    """moecore.finalize_quantize() in a traced program."""
    *arguments, out = rest
    return _call("finalize_quantize", out, rows, *arguments)


def fused_experts(
    x: Any, weights: Any, ids: Any, experts: Experts[Any], expert_map: Any, first_expert: int,
    apply_router_weight_on_input: bool, residual: Any, x_format: Any, x_scale: Any, inter_scale: Any,
    out: Any,
) -> Any:  # fmt: skip
    """moecore.fused_experts() in a traced program."""
    return _call(
        "fused_experts", out, x, weights, ids, experts.w13, experts.w2, experts.w13_bias, experts.w2_bias,
        experts.activation, experts.order, experts.alpha, experts.beta, experts.limit, expert_map,
        first_expert, apply_router_weight_on_input, residual, format_name(experts.weight_format),
        experts.w13_scales, experts.w2_scales, experts.w13_global_scale, experts.w2_global_scale,
        format_name(x_format), x_scale, inter_scale,
    )  # fmt: skip


def quantize(
    x: Any, format: Any, global_scale: Any, scale: Any, plan: Plan | None, expert_offsets: Any,
    scale_offsets: Any, row_counts: Any, activation: Any, order: Any, alpha: Any, beta: Any, limit: Any,
    multiple: int, out: Any,
) -> Any:  # fmt: skip
    """moecore.quantize() in a traced program."""
    check_static_scale(format_kind(format), scale, out)
    row_token, slot_row = None, None
    if plan is not None:
        expert_offsets, scale_offsets = plan.expert_offsets, plan.scale_offsets
        row_token, slot_row = plan.row_token, plan.slot_row
    return _call(
        "quantize", out, x, format_name(format), global_scale,
        scale if out is None else None, expert_offsets, scale_offsets, row_counts, row_token, slot_row,
        activation, order, alpha, beta, limit, multiple,
    )  # fmt: skip


def dequantize(data: Any, scales: Any, format: Any, *rest: Any) -> Any:
    """moecore.dequantize() in a traced program."""
    *arguments, out = rest
    return _call("dequantize", out, data, scales, format_name(format), *arguments)


def global_scale(x: Any, *rest: Any) -> Any:
    """moecore.global_scale() in a traced program."""
    *arguments, out = rest
    return _call("global_scale", out, x, *arguments)
