"""What more than one compat module needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moecore
from moecore import Plan


def as_rows(x: Tensor) -> Tensor:
    """An input of any number of dimensions as rows."""
    return x.reshape(-1, x.shape[-1])


def in_rows(op: str, argument: str, out: Tensor, *shape: int) -> Tensor:
    """An output as rows, or in `shape`: its own memory, or ValueError where that takes a copy."""
    wanted = shape or (-1, out.shape[-1])
    try:
        return out.view(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: {argument} has the shape {list(out.shape)} and strides {list(out.stride())}, expected "
            f"memory that can be viewed as {list(wanted)} without a copy"
        ) from error


def route_into(topk_weights: Tensor, topk_ids: Tensor, logits: Tensor, **options: Any) -> None:
    """moecore.route() into upstream's outputs; ids that are not i32 go through a temporary."""
    if topk_ids.dtype == torch.int32:
        ids = topk_ids
    else:
        ids = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    moecore.route(logits, topk_ids.shape[1], out=(topk_weights, ids), **options)
    if ids is not topk_ids:
        topk_ids.copy_(ids)


def plan_into(
    topk_ids: Tensor,
    expert_offsets: Tensor,
    blockscale_offsets: Tensor | None,
    problem_sizes1: Tensor,
    problem_sizes2: Tensor,
    input_permutation: Tensor,
    output_permutation: Tensor,
    num_experts: int,
    inter: int,
    hidden: int,
    *,
    gated: bool = True,
    swap_ab: bool = False,
) -> None:
    """moecore.plan() into the tensors of get_cutlass_moe_mm_data and prepare_moe_input."""
    if blockscale_offsets is None:
        blockscale_offsets = torch.empty_like(expert_offsets)
    out = Plan(
        expert_offsets,
        blockscale_offsets,
        input_permutation,
        output_permutation.view(topk_ids.shape),
        None,
        problem_sizes1,
        problem_sizes2,
    )
    moecore.plan(topk_ids, num_experts, problem_sizes=(hidden, inter), gated=gated, swap_ab=swap_ab, out=out)


def sum_slots(input: Tensor, output: Tensor, live: Tensor | None = None) -> None:
    """output[t] = sum_j input[t,j] over the slots where `live` [T,K] is true (none: all)."""
    num_tokens, top_k, hidden = input.shape
    slots = torch.arange(num_tokens * top_k, dtype=torch.int32, device=input.device).view(num_tokens, top_k)
    if live is not None:
        slots = torch.where(live, slots, -1)
    moecore.finalize(input.reshape(num_tokens * top_k, hidden), slots, out=output)


def align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
) -> None:
    """Routes in expert order, every expert padded to whole blocks, from a plan aligned to `block_size`."""
    plan = moecore.plan(topk_ids, num_experts, expert_map=expert_map, scale_alignment=block_size)
    num_routes, capacity = topk_ids.numel(), sorted_token_ids.numel()
    rows = torch.arange(num_routes, device=topk_ids.device)
    expert = torch.searchsorted(plan.expert_offsets[1:], rows, right=True).clamp_(max=num_experts - 1)
    padding = plan.scale_offsets - plan.expert_offsets
    # Rows that no route owns all land in one spare place behind the output.
    place = torch.where(plan.row_route >= 0, rows + padding[expert], capacity)
    padded = torch.full((capacity + 1,), num_routes, dtype=sorted_token_ids.dtype, device=topk_ids.device)
    padded.scatter_(0, place, plan.row_route.to(padded.dtype))
    sorted_token_ids.copy_(padded[:capacity])

    starts = torch.arange(experts_ids.numel(), device=topk_ids.device) * block_size
    owner = torch.searchsorted(plan.scale_offsets[1:], starts, right=True)
    experts_ids.copy_(torch.where(owner < num_experts, owner, -1))
    num_tokens_post_pad.copy_(plan.scale_offsets[-1:])
