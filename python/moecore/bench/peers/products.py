"""How peers multiply rows with the weights of experts, and run a layer."""

from __future__ import annotations

import importlib
from typing import Any

from moecore.bench.peers.libraries import Adapter, Call, Padded, Peers, block_shapes, dense16, of_type, plain
from moecore.bench.peers.rows import plan_buffers


def _gemm_torch(p: Peers, s: Any) -> Call:
    torch = p.torch
    x, weights = p.space.torch(s.x), p.space.torch(s.matrix.tensor).transpose(1, 2)
    offsets = p.space.torch(s.plan.expert_offsets)[1:]
    call = Call(lambda: None)

    def run() -> None:
        call.output = torch._grouped_mm(x, weights, offs=offsets)

    call.run = run
    return call


def _deep_gemm_rows(p: Peers, s: Any) -> tuple[Any, Any, Any]:
    """Rows padded to 128 for each expert, as its contiguous form wants them: index, source and target row."""
    torch = p.torch
    offsets = s.plan.expert_offsets.long()
    counts = offsets.diff()
    starts = torch.cat([counts.new_zeros(1), ((counts + 127) // 128 * 128).cumsum(0)])
    experts = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    rows = torch.arange(len(experts), device=counts.device)
    target = starts[experts] + rows - offsets[experts]
    index = torch.full((int(starts[-1]),), -1, dtype=torch.int32, device=counts.device)
    index[target] = experts.int()
    return index, rows, target


def _gemm_deep_bf16(p: Peers, s: Any) -> Call:
    index, rows, target = _deep_gemm_rows(p, s)
    x = p.torch.zeros(len(index), s.x.shape[1], dtype=s.x.dtype, device=s.x.device)
    x[target] = s.x[rows]
    out = p.new(len(index), s.out.shape[1])
    run = p.deep_gemm.m_grouped_bf16_gemm_nt_contiguous
    return Call(lambda: run(x, s.matrix.tensor, out, index), Padded(out, target))


def _gemm_deep_fp8(p: Peers, s: Any) -> Call:
    torch = p.torch
    index, rows, target = _deep_gemm_rows(p, s)
    x = torch.zeros(len(index), s.x.shape[1], dtype=torch.uint8, device=s.x.device)
    x[target] = s.x.view(torch.uint8)[rows]
    scales = torch.ones(len(index), s.x_scales.shape[1], device=s.x.device)
    scales[target] = s.x_scales[rows]
    scales = p.deep_gemm.get_mn_major_tma_aligned_tensor(scales)
    codes, weights = x.view(torch.float8_e4m3fn), s.matrix.tensor.view(torch.float8_e4m3fn)
    out = p.new(len(index), s.out.shape[1])
    run = p.deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    return Call(lambda: run((codes, scales), (weights, s.matrix.scales), out, index), Padded(out, target))


def _layer_triton(p: Peers, s: Any, fp8: bool) -> Call:
    """The fused MoE of vLLM, its kernels strung together as its own layer does."""
    torch, kernel, layer, w = p.torch, p.triton, s.layer, s.weights_of
    t, k = s.ids.shape
    e, h, i = layer.num_experts, layer.hidden, layer.inter
    config = p.triton_config(e, i, h, t, k, fp8)
    block = config["BLOCK_SIZE_M"]
    most = t * k + e * (block - 1)
    most = min(t * k * block, most) if t * k < e else most
    sorted_ids, padded = p.new(most, dtype="int32"), p.new(1, dtype="int32")
    expert_ids = p.new((most + block - 1) // block, dtype="int32")
    gate_up, rows = p.new(t, k, 2 * i), p.new(t * k, i)
    down, out = p.new(t, k, h), p.new(t, h)
    w13, w2 = w.w13.tensor, w.w2.tensor
    shape = [128, 128] if fp8 else None
    x = x_scales = rows8 = rows_scales = None
    if fp8:
        w13, w2 = w13.view(torch.float8_e4m3fn), w2.view(torch.float8_e4m3fn)
        x, x_scales = p.new(t, h, dtype="float8_e4m3fn"), p.new(t, h // 128, dtype="float32")
        rows8, rows_scales = p.new(t * k, i, dtype="float8_e4m3fn"), p.new(t * k, i // 128, dtype="float32")
    quantize = p.ops._C.per_token_group_fp8_quant if fp8 else None
    # Where only one of vLLM's two binaries is there, SGLang's activation, which is no slower.
    own = hasattr(p.ops._C, "silu_and_mul")
    activate = p.ops._C.silu_and_mul if own else p.ops.sgl_kernel.silu_and_mul.default
    limits = (128, 1e-10, -448.0, 448.0, False, False, False)
    bf16 = importlib.import_module("triton.language").bfloat16
    tail = (config, bf16, fp8, False, False, False, False, shape)
    product = kernel.invoke_fused_moe_triton_kernel

    def run() -> None:
        p.ops._moe_C.moe_align_block_size(s.ids, e, block, sorted_ids, expert_ids, padded, None)
        if quantize is not None:
            quantize(s.x, x, x_scales, *limits)
        routes = (sorted_ids, expert_ids, padded)
        product(x if fp8 else s.x, w13, gate_up, x_scales, w.w13.scales, None, *routes, False, k, *tail)
        activate(rows, gate_up.view(t * k, 2 * i))
        if quantize is not None:
            quantize(rows, rows8, rows_scales, *limits)
        product(
            rows8 if fp8 else rows, w2, down, rows_scales, w.w2.scales, s.weights, *routes, True, 1, *tail
        )
        p.ops._moe_C.moe_sum(down, out)

    return Call(run, out)


def _layer_torch(p: Peers, s: Any) -> Call:
    """Argsort, torch._grouped_mm twice, index_add."""
    torch, layer, w = p.torch, s.layer, s.weights_of
    x, ids, weights = (p.space.torch(v) for v in (s.x, s.ids, s.weights))
    w13, w2 = (p.space.torch(m.tensor).transpose(1, 2) for m in (w.w13, w.w2))
    e, k, i = layer.num_experts, layer.top_k, layer.inter
    experts = torch.arange(e, device=x.device, dtype=ids.dtype)
    call = Call(lambda: None)

    def run() -> None:
        keys, order = ids.view(-1).sort()
        offsets = torch.searchsorted(keys, experts, right=True).int()
        gate_up = torch._grouped_mm(x[order // k], w13, offs=offsets)
        rows = torch.nn.functional.silu(gate_up[:, :i]) * gate_up[:, i:]
        products = torch._grouped_mm(rows, w2, offs=offsets) * weights.view(-1)[order, None].to(x.dtype)
        call.output = torch.zeros_like(x).index_add_(0, order // k, products)

    call.run = run
    return call


def _layer_sgl_torch(p: Peers, s: Any) -> Call:
    """SGLang's data movement around torch._grouped_mm."""
    torch, layer, w = p.torch, s.layer, s.weights_of
    offsets, blocks, one, two, rows, slots = plan_buffers(p, s)
    t, k = s.ids.shape
    e, h, i = layer.num_experts, layer.hidden, layer.inter
    moved, inter, out = p.new(t * k, h), p.new(t * k, i), p.new(t, h)
    w13, w2, weights = w.w13.tensor.transpose(1, 2), w.w2.tensor.transpose(1, 2), s.weights.to(s.x.dtype)
    ops = p.ops.sgl_kernel

    def run() -> None:
        ops.prepare_moe_input.default(s.ids, offsets, blocks, one, two, rows, slots, e, i, h)
        ops.shuffle_rows.default(s.x, rows, moved)
        gate_up = torch._grouped_mm(moved, w13, offs=offsets[1:])
        ops.silu_and_mul.default(inter, gate_up)
        products = torch._grouped_mm(inter, w2, offs=offsets[1:])
        ops.apply_shuffle_mul_sum.default(products, out, slots, weights)

    return Call(run, out)


def _layer_loop(p: Peers, s: Any) -> Call:
    """One expert after the other, as transformers' eager path does."""
    torch, layer, w = p.torch, s.layer, s.weights_of
    x, ids, weights = (p.space.torch(v) for v in (s.x, s.ids, s.weights))
    w13, w2, i = p.space.torch(w.w13.tensor), p.space.torch(w.w2.tensor), layer.inter
    call = Call(lambda: None)

    def run() -> None:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            gate_up = x[token] @ w13[e].T
            rows = (torch.nn.functional.silu(gate_up[:, :i]) * gate_up[:, i:]) @ w2[e].T
            out.index_add_(0, token, rows * weights[token, slot, None].to(x.dtype))
        call.output = out

    call.run = run
    return call


def _layer_flashinfer(p: Peers, s: Any) -> Call:
    """FlashInfer's CUTLASS layer. It reads up rows before gate rows, so it gets the halves exchanged."""
    moe = importlib.import_module("flashinfer.fused_moe")
    torch, w, out = p.torch, s.weights_of, p.torch.empty_like(s.x)
    if not hasattr(w, "up_gate"):
        w.up_gate = torch.cat(w.w13.tensor.chunk(2, dim=1)[::-1], dim=1)
    arguments = (s.x, s.ids, s.weights, w.up_gate, w.w2.tensor, s.x.dtype)
    return Call(lambda: moe.cutlass_fused_moe(*arguments, quant_scales=None, output=out), out)


ADAPTERS: dict[str, list[Adapter]] = {
    "grouped_gemm": [
        Adapter("torch", "torch", _gemm_torch, of_type("bf16")),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_bf16, of_type("bf16")),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_fp8, block_shapes),
    ],
    "fused_experts": [
        Adapter(
            "torch loop",
            "torch",
            _layer_loop,
            lambda c: c.dtype in ("bf16", "f32") and plain(c),
            ("cpu",),
        ),
        Adapter("torch grouped_mm", "torch", _layer_torch, lambda c: c.dtype == "bf16" and plain(c)),
        Adapter(
            "sgl + torch",
            "sgl_kernel",
            _layer_sgl_torch,
            lambda c: c.dtype == "bf16" and plain(c),
        ),
        Adapter(
            "vllm triton",
            "vllm",
            lambda p, s: _layer_triton(p, s, False),
            lambda c: c.dtype == "bf16" and plain(c),
        ),
        Adapter(
            "vllm triton",
            "vllm",
            lambda p, s: _layer_triton(p, s, True),
            lambda c: block_shapes(c) and plain(c),
        ),
        Adapter("flashinfer", "flashinfer", _layer_flashinfer, lambda c: dense16(c) and plain(c)),
    ],
}
