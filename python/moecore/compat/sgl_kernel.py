"""SGLang's data-path ops: import moecore.compat.sgl_kernel instead of sgl_kernel.

Source of the semantics: sglang-kernel 0.4 and the ops of SGLang 0.5. Outputs are deterministic: inside an
expert, rows ascend by route, and sums run in slot order in f32.
"""

from __future__ import annotations

import torch
from torch import Tensor

import moecore
from moecore.compat import _shared


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: Tensor | None = None,
) -> None:
    """Softmax scores, the top k: gating_output [T,E] -> topk_weights f32, topk_ids i32|i64 [T,K].

    As in SGLang, the soft cap c*tanh(x/c) and the bias change the logits before the softmax, so they weigh
    too.
    """
    logits = gating_output
    if moe_softcapping != 0.0:
        logits = moe_softcapping * torch.tanh(logits.float() / moe_softcapping)
    if correction_bias is not None:
        logits = logits.float() + correction_bias.float()
    _shared.route_into(topk_weights, topk_ids, logits, renormalize=renormalize)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    correction_bias: Tensor | None = None,
) -> None:
    """Sigmoid scores, the top k; the bias selects and does not weigh."""
    bias = None if correction_bias is None else correction_bias.float()
    _shared.route_into(
        topk_weights, topk_ids, gating_output, scoring="sigmoid", bias=bias, renormalize=renormalize
    )


def moe_fused_gate(
    input_tensor: Tensor,
    bias: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """DeepSeek's grouped top-k with renormalised sigmoid weights: [T,E] -> (weights f32, ids i32 [T,K]).

    With `num_fused_shared_experts` = n the last n slots are the experts E .. E+n-1 with weight 1 /
    routed_scaling_factor (1 when the factor is applied to the output).
    """
    routed = topk - num_fused_shared_experts
    scale = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    weights, ids = moecore.route(
        input_tensor,
        routed,
        scoring="sigmoid",
        bias=bias.float(),
        num_groups=num_expert_group,
        topk_groups=topk_group,
        renormalize=True,
        scale=scale,
    )
    if num_fused_shared_experts == 0:
        return weights, ids
    num_tokens, num_experts = input_tensor.shape
    shared = torch.arange(
        num_experts, num_experts + num_fused_shared_experts, dtype=ids.dtype, device=ids.device
    )
    shared_weight = scale / routed_scaling_factor if routed_scaling_factor else 1.0
    shared_weights = weights.new_full((num_tokens, num_fused_shared_experts), shared_weight)
    return torch.cat([weights, shared_weights], 1), torch.cat([ids, shared.expand(num_tokens, -1)], 1)


def prepare_moe_input(
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
) -> None:
    """Offsets, problem sizes (count, 2n, k) and (count, k, n), and both permutations of a routing.

    A dropped route has output_permutation -1, an unused row input_permutation -1.
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
    )


def shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor, output_tensor_shape: tuple[int, ...]) -> Tensor:
    """out[d] = input_tensor[dst2src_map[d]], zeros where the map is out of range. Any width and dtype."""
    out = torch.empty(output_tensor_shape, dtype=input_tensor.dtype, device=input_tensor.device)
    return moecore.shuffle_rows(input_tensor, dst2src_map, out=out)


def apply_shuffle_mul_sum(
    input: Tensor, output: Tensor, permutation: Tensor, factors: Tensor | None = None
) -> None:
    """output[t] = sum_j factors[t,j] * input[permutation[t*K+j]], in f32 and slot order.

    K = permutation.numel() / T. factors [T*K] or [T,K] f32|f16|bf16, used as given; without them a plain sum.
    Rows out of range are skipped.
    """
    num_tokens = output.shape[0]
    slot_row = permutation.view(num_tokens, permutation.numel() // max(num_tokens, 1))
    weights = None if factors is None else factors.view(slot_row.shape)
    moecore.finalize(input, slot_row, weights, out=output)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor | None = None,
    pad_sorted_token_ids: bool = False,
) -> None:
    """Routes in expert order, every expert padded to whole blocks with the marker R.

    As in SGLang, `num_experts` is one more than the experts there are. cumsum_buffer is not needed, and the
    output is always padded, whatever pad_sorted_token_ids says.
    """
    _shared.align_block_size(
        topk_ids, num_experts - 1, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad
    )


def moe_sum(input_tensor: Tensor, output_tensor: Tensor) -> None:
    """output_tensor[t] = sum_j input_tensor[t,j], in f32 and slot order."""
    _shared.sum_slots(input_tensor, output_tensor)


def silu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up for rows gate|up, computed in f32 and rounded once."""
    return _activate("silu_and_mul", input, out, "silu")


def gelu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up (with erf) for rows gate|up, computed in f32 and rounded once."""
    return _activate("gelu_and_mul", input, out, "gelu")


def gelu_tanh_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up (with tanh) for rows gate|up, computed in f32 and rounded once."""
    return _activate("gelu_tanh_and_mul", input, out, "gelu_tanh")


def _activate(op: str, input: Tensor, out: Tensor | None, kind: str) -> Tensor:
    width = input.shape[-1]
    if out is None:
        out = input.new_empty((*input.shape[:-1], width // 2))
    moecore.activate(input.reshape(-1, width), kind, order="gate_up", out=_shared.in_rows(op, "out", out))
    return out
