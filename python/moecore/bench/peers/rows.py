"""How peers route, plan, move, activate and quantise rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from moecore.bench.peers.libraries import (
    Adapter,
    Call,
    Peers,
    block_shapes,
    dense16,
    of_type,
    plain,
    softmax,
    whole_blocks,
)


def _route_torch(p: Peers, s: Any) -> Call:
    torch, layer = p.torch, s.layer
    logits = p.space.torch(s.logits)
    call = Call(lambda: None)

    def run() -> None:
        weights, ids = torch.topk(torch.softmax(logits.float(), -1), layer.top_k)
        call.output = weights / weights.sum(-1, keepdim=True), ids.int()

    call.run = run
    return call


def _route_vllm(p: Peers, s: Any) -> Call:
    t, k = s.ids.shape
    weights, ids = p.new(t, k, dtype="float32"), p.new(t, k, dtype="int32")
    if s.layer.num_groups > 1:
        layer, call = s.layer, Call(lambda: None)

        def grouped() -> None:
            call.output = p.ops._moe_C.grouped_topk(
                s.logits, layer.num_groups, layer.topk_groups, k, True, layer.scale, s.bias, 1
            )

        call.run = grouped
        return call
    origin = p.new(t, k, dtype="int32")
    return Call(lambda: p.ops._moe_C.topk_softmax(weights, ids, origin, s.logits, True, None), (weights, ids))


def _route_sgl(p: Peers, s: Any) -> Call:
    t, k = s.ids.shape
    weights, ids = p.new(t, k, dtype="float32"), p.new(t, k, dtype="int32")
    run = p.ops.sgl_kernel.topk_softmax.default
    return Call(lambda: run(weights, ids, s.logits, True, 0.0, None), (weights, ids))


def plan_buffers(p: Peers, s: Any) -> tuple[Any, ...]:
    """What vLLM and SGLang write for a plan: offsets of rows and scales, problem sizes twice, both maps."""
    e, r = s.layer.num_experts, s.ids.numel()
    sizes = p.new(e, 3, dtype="int32"), p.new(e, 3, dtype="int32")
    return (
        p.new(e + 1, dtype="int32"),
        p.new(e + 1, dtype="int32"),
        *sizes,
        p.new(r, dtype="int32"),
        p.new(r, dtype="int32"),
    )


def _plan_vllm(p: Peers, s: Any) -> Call:
    layer = s.layer
    offsets, blocks, one, two, rows, slots = plan_buffers(p, s)
    run = p.ops._C.get_cutlass_moe_mm_data
    return Call(
        lambda: run(
            s.ids, offsets, one, two, rows, slots, layer.num_experts, layer.inter, layer.hidden, blocks, True
        )
    )


def _plan_sgl(p: Peers, s: Any) -> Call:
    layer = s.layer
    offsets, blocks, one, two, rows, slots = plan_buffers(p, s)
    run = p.ops.sgl_kernel.prepare_moe_input.default
    return Call(
        lambda: run(
            s.ids, offsets, blocks, one, two, rows, slots, layer.num_experts, layer.inter, layer.hidden
        )
    )


def _plan_sgl_align(p: Peers, s: Any) -> Call:
    e, r, block = s.layer.num_experts, s.ids.numel(), 64
    most = r + e * (block - 1)
    rows, experts = p.new(most, dtype="int32"), p.new((most + block - 1) // block, dtype="int32")
    padded, scratch = p.new(1, dtype="int32"), p.new(e + 2, dtype="int32")
    run = p.ops.sgl_kernel.moe_align_block_size.default
    return Call(lambda: run(s.ids, e + 1, block, rows, experts, padded, scratch, True, False))


def _plan_vllm_align(p: Peers, s: Any) -> Call:
    e, r, block = s.layer.num_experts, s.ids.numel(), 64
    most = r + e * (block - 1)
    rows, experts = p.new(most, dtype="int32"), p.new((most + block - 1) // block, dtype="int32")
    padded, run = p.new(1, dtype="int32"), p.ops._moe_C.moe_align_block_size
    return Call(lambda: run(s.ids, e, block, rows, experts, padded, None))


def _plan_torch(p: Peers, s: Any) -> Call:
    torch, e, k = p.torch, s.layer.num_experts, s.layer.top_k
    ids = p.space.torch(s.ids).view(-1)
    experts = torch.arange(e, device=ids.device, dtype=ids.dtype)

    def run() -> Any:
        keys, order = torch.sort(ids, stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device)
        return torch.searchsorted(keys, experts), order // k, slots

    return Call(run)


def _rows_out(p: Peers, s: Any) -> tuple[Any, Any, Any]:
    x, rows = p.space.torch(s.x), p.space.torch(s.plan.row_token)
    return x, rows, p.torch.empty((len(rows), x.shape[1]), dtype=x.dtype, device=x.device)


def _permute_ops(namespace: str) -> Callable[[Peers, Any], Call]:
    def prepare(p: Peers, s: Any) -> Call:
        x, rows, out = _rows_out(p, s)
        run = getattr(p.ops, namespace).shuffle_rows.default
        return Call(lambda: run(x, rows, out), out)

    return prepare


def _permute_torch(p: Peers, s: Any) -> Call:
    x, rows, out = _rows_out(p, s)
    rows = rows.long()
    if x.dtype == p.torch.float8_e4m3fn:
        bits, written = x.view(p.torch.uint8), out.view(p.torch.uint8)
        return Call(lambda: p.torch.index_select(bits, 0, rows, out=written), out)
    return Call(lambda: p.torch.index_select(x, 0, rows, out=out), out)


def _finalize_sgl(p: Peers, s: Any) -> Call:
    out, slots, weights = p.torch.empty_like(s.out), s.plan.slot_row.view(-1), s.weights.to(s.rows.dtype)
    run = p.ops.sgl_kernel.apply_shuffle_mul_sum.default
    return Call(lambda: run(s.rows, out, slots, weights), out)


def _finalize_vllm(p: Peers, s: Any) -> Call:
    out, k = p.torch.empty_like(s.out), s.weights.shape[1]
    run = p.ops._moe_C.moe_unpermute
    return Call(lambda: run(s.rows, s.weights, s.plan.slot_row, None, k, out), out)


def _finalize_torch(p: Peers, s: Any) -> Call:
    rows, slots = p.space.torch(s.rows), p.space.torch(s.plan.slot_row).long()
    weights = p.space.torch(s.weights).to(rows.dtype)[:, :, None]
    call = Call(lambda: None)

    def run() -> None:
        call.output = (rows[slots] * weights).sum(1)

    call.run = run
    return call


def gated(p: Peers, layer: Any) -> Callable[[Any, Any], Any]:
    """The activation of a layer among vLLM's kernels: run(out, gate_up)."""
    if layer.activation == "swiglu_oai":
        run = p.ops._C.swigluoai_and_mul.default
        return lambda out, x: run(out, x, layer.alpha, layer.limit)
    if hasattr(p.ops._C, "silu_and_mul"):
        return p.ops._C.silu_and_mul.default  # type: ignore[no-any-return]
    # Where only one of vLLM's two binaries is there, SGLang's, which is no slower.
    return p.ops.sgl_kernel.silu_and_mul.default  # type: ignore[no-any-return]


def gated_torch(p: Peers, layer: Any, x: Any) -> Any:
    """The activation of a layer by torch."""
    if layer.order == "interleaved":
        gate, up = x[:, 0::2], x[:, 1::2]
    else:
        gate, up = x[:, : layer.inter], x[:, layer.inter :]
    if layer.activation == "silu":
        return p.torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
    return gate * p.torch.sigmoid(gate * layer.alpha) * (up + layer.beta)


def _activate_vllm(p: Peers, s: Any) -> Call:
    out, run = p.torch.empty_like(s.out), gated(p, s.layer)
    return Call(lambda: run(out, s.x), out)


def _activate_sgl(p: Peers, s: Any) -> Call:
    out, run = p.torch.empty_like(s.out), p.ops.sgl_kernel.silu_and_mul.default
    return Call(lambda: run(out, s.x), out)


def _activate_torch(p: Peers, s: Any) -> Call:
    x = p.space.torch(s.x)
    call = Call(lambda: None)

    def run() -> None:
        call.output = gated_torch(p, s.layer, x)

    call.run = run
    return call


def _activate_flashinfer(p: Peers, s: Any) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    out = p.torch.empty_like(s.out)
    return Call(lambda: flashinfer.silu_and_mul(s.x, out=out), out)


def _codes(p: Peers, s: Any, columns: int) -> Any:
    return p.new(s.data.shape[0], columns, dtype="float8_e4m3fn")


def _quantize_vllm_token(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops._C.dynamic_per_token_scaled_fp8_quant
    return Call(lambda: run(codes, s.x, scales, None), (codes, scales))


def _quantize_vllm_block(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops._C.per_token_group_fp8_quant
    return Call(lambda: run(s.x, codes, scales, *GROUP_128), (codes, scales))


def _quantize_vllm_static(p: Peers, s: Any) -> Call:
    codes, run = _codes(p, s, s.x.shape[1]), p.ops._C.static_scaled_fp8_quant
    return Call(lambda: run(codes, s.x, s.scales, None), (codes, s.scales))


def _quantize_sgl_token(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops.sgl_kernel.sgl_per_token_quant_fp8.default
    return Call(lambda: run(s.x, codes, scales), (codes, scales))


def _quantize_sgl_block(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops.sgl_kernel.sgl_per_token_group_quant_8bit.default
    return Call(lambda: run(s.x, codes, scales, *GROUP_128[:5]), (codes, scales))


def _activate_quantize_vllm(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.layer.inter), p.torch.empty_like(s.scales)
    run = p.ops._C.silu_and_mul_per_block_quant
    return Call(lambda: run(codes, s.x, scales, 128, None, False), (codes, scales))


def _activate_quantize_vllm_token(p: Peers, s: Any) -> Call:
    """Two kernels: none of vLLM's does both."""
    codes, scales = _codes(p, s, s.layer.inter), p.torch.empty_like(s.scales)
    rows = p.new(len(s.x), s.layer.inter)
    activate, quantize = gated(p, s.layer), p.ops._C.dynamic_per_token_scaled_fp8_quant

    def run() -> None:
        activate(rows, s.x)
        quantize(codes, rows, scales, None)

    return Call(run, (codes, scales))


def _permute_quantize_vllm(p: Peers, s: Any) -> Call:
    """As vLLM does: tokens are quantised, then codes and scales are gathered."""
    t, h = s.x.shape
    tokens, token_scales = p.new(t, h, dtype="float8_e4m3fn"), p.new(t, s.scales.shape[1], dtype="float32")
    codes, scales = _codes(p, s, h), p.torch.empty_like(s.scales)
    rows, is_token = s.plan.row_token, s.scales.shape[1] == 1

    def run() -> None:
        if is_token:
            p.ops._C.dynamic_per_token_scaled_fp8_quant(tokens, s.x, token_scales, None)
        else:
            p.ops._C.per_token_group_fp8_quant(s.x, tokens, token_scales, *GROUP_128)
        p.ops._moe_C.shuffle_rows(tokens, rows, codes)
        p.torch.index_select(token_scales, 0, rows, out=scales)

    return Call(run, (codes, scales))


GROUP_128 = (128, 1e-10, -448.0, 448.0, False, False, False)
"""What kernels of 1 x 128 blocks take: size, smallest magnitude, range, f32 scales in rows."""

ADAPTERS: dict[str, list[Adapter]] = {
    "route": [
        Adapter("torch topk", "torch", _route_torch, softmax),
        Adapter(
            "vllm",
            "vllm",
            _route_vllm,
            lambda c: c.dtype == "f32" and (c.layer.scoring == "softmax" or c.layer.num_groups > 1),
        ),
        Adapter("sgl", "sgl_kernel", _route_sgl, softmax),
    ],
    "plan": [
        Adapter("torch argsort", "torch", _plan_torch),
        Adapter("vllm mm_data", "vllm", _plan_vllm),
        Adapter("vllm align", "vllm", _plan_vllm_align),
        Adapter("sgl prepare", "sgl_kernel", _plan_sgl),
        Adapter("sgl align", "sgl_kernel", _plan_sgl_align),
    ],
    "permute": [
        Adapter("torch index_select", "torch", _permute_torch),
        Adapter("vllm shuffle", "vllm", _permute_ops("_moe_C")),
        Adapter("sgl shuffle", "sgl_kernel", _permute_ops("sgl_kernel")),
    ],
    "activate": [
        Adapter("torch", "torch", _activate_torch),
        Adapter("vllm", "vllm", _activate_vllm),
        Adapter("sgl", "sgl_kernel", _activate_sgl, plain),
        Adapter("flashinfer", "flashinfer", _activate_flashinfer, plain),
    ],
    "quantize": [
        Adapter("vllm", "vllm", _quantize_vllm_token, of_type("fp8_token")),
        Adapter("sgl", "sgl_kernel", _quantize_sgl_token, of_type("fp8_token")),
        Adapter("vllm", "vllm", _quantize_vllm_block, whole_blocks),
        Adapter("sgl", "sgl_kernel", _quantize_sgl_block, whole_blocks),
        Adapter("vllm", "vllm", _quantize_vllm_static, of_type("fp8_tensor_static")),
    ],
    "activate_quantize": [
        Adapter("vllm", "vllm", _activate_quantize_vllm, lambda c: block_shapes(c) and plain(c)),
        Adapter("vllm, 2 kernels", "vllm", _activate_quantize_vllm_token, of_type("fp8_token")),
    ],
    "permute_quantize": [
        Adapter("vllm, 3 kernels", "vllm", _permute_quantize_vllm, of_type("fp8_token")),
        Adapter("vllm, 3 kernels", "vllm", _permute_quantize_vllm, whole_blocks),
    ],
    "finalize": [
        Adapter("torch eager", "torch", _finalize_torch),
        Adapter("vllm unpermute", "vllm", _finalize_vllm, dense16),
        Adapter("sgl", "sgl_kernel", _finalize_sgl, dense16),
    ],
}
"""By op. shuffle_rows has those of permute."""
ADAPTERS["shuffle_rows"] = ADAPTERS["permute"]
