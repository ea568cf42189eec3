"""vLLM's data-path ops: import moecore.compat.vllm instead of vllm._custom_ops.

Also `moe_permute` and `moe_unpermute` of vllm.model_executor.layers.fused_moe.moe_permute_unpermute. Sources
of the semantics: vLLM 0.33. Outputs are deterministic: inside an expert, rows ascend by route.
"""

from __future__ import annotations

import torch
from torch import Tensor

import moecore
from moecore.compat import _shared
from moecore.compat._vllm_quantization import (
    dynamic_per_token_scaled_fp8_quant,
    dynamic_scaled_fp8_quant,
    mxfp4_experts_quant,
    per_token_group_fp8_quant,
    scaled_fp4_experts_quant,
    scaled_fp4_quant,
    silu_and_mul,
    silu_and_mul_mxfp4_experts_quant,
    silu_and_mul_per_block_quant,
    silu_and_mul_scaled_fp4_experts_quant,
    static_scaled_fp8_quant,
    swigluoai_and_mul,
)


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """The top k softmax scores of every token.

    gating_output [T,E] -> topk_weights f32, topk_ids i32|i64 [T,K]. token_expert_indices [T,K] gets j*T + t.
    Padding tokens have ids -1 and weights 0.
    """
    _topk(
        "softmax",
        topk_weights,
        topk_ids,
        token_expert_indices,
        gating_output,
        renormalize,
        e_score_correction_bias,
        is_padding,
    )


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """topk_softmax() with sigmoid scores."""
    _topk(
        "sigmoid",
        topk_weights,
        topk_ids,
        token_expert_indices,
        gating_output,
        renormalize,
        e_score_correction_bias,
        is_padding,
    )


def _topk(
    scoring: str,
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    _shared.route_into(
        topk_weights,
        topk_ids,
        gating_output,
        scoring=scoring,
        bias=bias,
        renormalize=renormalize,
        is_padding=is_padding,
    )
    num_tokens, top_k = topk_ids.shape
    slots = torch.arange(
        num_tokens * top_k, dtype=token_expert_indices.dtype, device=token_expert_indices.device
    )
    token_expert_indices.copy_(slots.view(top_k, num_tokens).t())


def grouped_topk(
    scores: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: Tensor,
    scoring_func: int = 0,
) -> tuple[Tensor, Tensor]:
    """DeepSeek's grouped top-k: scores [T,E] -> (weights f32 [T,K], ids i32 [T,K]).

    scoring_func 1: sigmoid of raw logits; 0: `scores` are activated already, ValueError for others. Every
    shape computes in f32.
    """
    if scoring_func not in (0, 1):
        raise ValueError(f"grouped_topk: scoring_func is {scoring_func}, expected 0 or 1")
    return moecore.route(
        scores,
        topk,
        scoring="sigmoid" if scoring_func == 1 else "identity",
        bias=bias.float(),
        num_groups=num_expert_group,
        topk_groups=topk_group,
        renormalize=renormalize,
        scale=routed_scaling_factor,
    )


def shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor) -> Tensor:
    """out[d] = input_tensor[dst2src_map[d]], zeros where the map is out of range. Any width and dtype."""
    return moecore.shuffle_rows(input_tensor, dst2src_map)


def get_cutlass_moe_mm_data(
    topk_ids: Tensor,
    expert_offsets: Tensor,
    problem_sizes1: Tensor,
    problem_sizes2: Tensor,
    input_permutation: Tensor,
    output_permutation: Tensor,
    num_experts: int,
    n: int,
    k: int,
    blockscale_offsets: Tensor | None = None,
    is_gated: bool = True,
) -> None:
    """Offsets, problem sizes (count, 2n or n, k) and (count, k, n), and both permutations of a routing.

    Without blockscale_offsets and with at most 64 routes the first two columns of the sizes change places, as
    upstream's grouped GEMM expects. A dropped route has output_permutation -1 (upstream: R); shuffle_rows
    reads both as a row of zeros.
    """
    _shared.plan_into(
        topk_ids,
        expert_offsets,
        blockscale_offsets,
        problem_sizes1,
        problem_sizes2,
        input_permutation,
        output_permutation,
        num_experts,
        n,
        k,
        gated=is_gated,
        swap_ab=blockscale_offsets is None and topk_ids.numel() <= 64,
    )


def moe_permute(
    hidden_states: Tensor,
    a1q_scale: Tensor | None,
    topk_ids: Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: Tensor | None = None,
    permuted_hidden_states: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Rows in expert order, stable by route.

    Returns (rows [R,H], permuted 2-D a1q_scale or a1q_scale, expert_first_token_offset i64 [n_local+1],
    inv_permuted_idx i32 [T,K], permuted_idx i32 [R]). Rows that no local route owns are zero; their
    permuted_idx is R and a dropped route's inv_permuted_idx is -1.
    """
    plan = moecore.plan(topk_ids, n_expert if n_local_expert == -1 else n_local_expert, expert_map=expert_map)
    scale = a1q_scale
    if a1q_scale is not None and a1q_scale.dim() > 1:
        scale = a1q_scale.new_empty((plan.num_rows, a1q_scale.shape[1]))
        rows = permuted_hidden_states
        if rows is None:
            rows = hidden_states.new_empty((plan.num_rows, hidden_states.shape[1]))
        moecore.permute(hidden_states, plan, scales=a1q_scale, out=(rows, scale))
    else:
        rows = moecore.permute(hidden_states, plan, out=permuted_hidden_states)
    permuted_idx = torch.where(plan.row_route >= 0, plan.row_route, plan.num_rows)
    return rows, scale, plan.expert_offsets.to(torch.int64), plan.slot_row, permuted_idx


def moe_unpermute(
    out: Tensor,
    permuted_hidden_states: Tensor,
    topk_weights: Tensor,
    inv_permuted_idx: Tensor,
    expert_first_token_offset: Tensor | None = None,
) -> None:
    """out[t] = sum_j topk_weights[t,j] * permuted_hidden_states[inv_permuted_idx[t,j]].

    In f32 and slot order.

    Slots with a negative row are skipped, and with expert_first_token_offset those of rows at or beyond its
    last entry.
    """
    slot_row = inv_permuted_idx.view(topk_weights.shape)
    if expert_first_token_offset is not None:
        slot_row = torch.where(slot_row < expert_first_token_offset[-1], slot_row, -1)
    moecore.finalize(permuted_hidden_states, slot_row, topk_weights, out=out)


def moe_sum(
    input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None
) -> None:
    """output[t] = sum_j input[t,j], in f32 and slot order.

    With topk_ids, slots whose id is -1 or not local are skipped.
    """
    live = None
    if topk_ids is not None:
        live = topk_ids >= 0
        if expert_map is not None:
            live &= expert_map[topk_ids.clamp(min=0).long()] >= 0
    _shared.sum_slots(input, output, live)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
) -> None:
    """Routes in expert order, every expert padded to whole blocks with the marker R = topk_ids.numel().

    sorted_token_ids i32 [capacity], experts_ids i32 [blocks] (-1 behind the last block), num_tokens_post_pad
    i32 [1]. With expert_map, experts are local ones and routes to others are left out.
    """
    _shared.align_block_size(
        topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, expert_map
    )


__all__ = [
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "get_cutlass_moe_mm_data",
    "grouped_topk",
    "moe_align_block_size",
    "moe_permute",
    "moe_sum",
    "moe_unpermute",
    "mxfp4_experts_quant",
    "per_token_group_fp8_quant",
    "scaled_fp4_experts_quant",
    "scaled_fp4_quant",
    "shuffle_rows",
    "silu_and_mul",
    "silu_and_mul_mxfp4_experts_quant",
    "silu_and_mul_per_block_quant",
    "silu_and_mul_scaled_fp4_experts_quant",
    "static_scaled_fp8_quant",
    "swigluoai_and_mul",
    "topk_sigmoid",
    "topk_softmax",
]
