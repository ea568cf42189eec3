"""How peers multiply rows with the weights of experts, and run a layer."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from moecore.bench.peers.libraries import Adapter, Call, Padded, Peers, block_shapes, dense16, of_type, plain
from moecore.bench.peers.rows import GROUP_128, gated, gated_torch, plan_buffers

_BLOCK = 128  # rows of one expert that DeepGEMM takes at a time
_DEEP_GEMM_FROM = 256  # tokens; below, an expert's few rows would be mostly padding


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
    starts = torch.cat([counts.new_zeros(1), ((counts + _BLOCK - 1) // _BLOCK * _BLOCK).cumsum(0)])
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


@dataclasses.dataclass
class _Triton:
    """vLLM's Triton kernel for one set: its configuration, and blocks of rows of one expert each."""

    peers: Peers
    ids: Any
    experts: int
    config: dict[str, Any]
    fp8: bool

    def __post_init__(self) -> None:
        p, block = self.peers, self.config["BLOCK_SIZE_M"]
        routes, width = self.ids.numel(), self.ids.shape[1]
        # vLLM's rule: with few routes every one is a block of its own, and nothing has to be sorted.
        self.naive = width > 1 and routes * 4 <= self.experts
        if self.naive:
            self.routes = (None, self.ids.view(-1), p.torch.full_like(self.ids.view(-1)[:1], routes * block))
            return
        most = min(routes * block, routes + self.experts * (block - 1))
        self.routes = (
            p.new(most, dtype="int32"),
            p.new((most + block - 1) // block, dtype="int32"),
            p.new(1, dtype="int32"),
        )

    def align(self) -> None:
        """Sorts the routes into blocks."""
        if not self.naive:
            rows, experts, count = self.routes
            self.peers.ops._moe_C.moe_align_block_size(
                self.ids, self.experts, self.config["BLOCK_SIZE_M"], rows, experts, count, None
            )

    def product(self, x: Any, matrix: Any, out: Any, scales: Any, weights: Any, bias: Any = None) -> None:
        """out[route] = x[route // K] @ matrix[expert].T, times the router's weights where given."""
        bf16 = importlib.import_module("triton.language").bfloat16
        codes = matrix.tensor.view(self.peers.torch.float8_e4m3fn) if self.fp8 else matrix.tensor
        self.peers.triton.invoke_fused_moe_triton_kernel(
            x,
            codes,
            out,
            scales,
            matrix.scales,
            weights,
            *self.routes,
            weights is not None,
            self.ids.numel() // len(x),
            self.config,
            bf16,
            self.fp8,
            False,
            False,
            False,
            False,
            [128, 128] if self.fp8 else None,
            bias,
        )


def _gemm_triton(p: Peers, s: Any, fp8: bool) -> Call:
    """One product by vLLM's kernel, its blocks sorted beforehand as the plan of moecore is."""
    layer, (t, k) = s.layer, s.ids.shape
    experts = p.torch.repeat_interleave(s.plan.expert_offsets.diff())[:, None].int()
    config = p.triton_config(layer.num_experts, layer.inter, layer.hidden, t, k, fp8)
    kernel = _Triton(p, experts, layer.num_experts, config, fp8)
    kernel.align()
    x = s.x.view(p.torch.float8_e4m3fn) if fp8 else s.x
    out = p.torch.empty_like(s.out)
    return Call(lambda: kernel.product(x, s.matrix, out[:, None], s.x_scales, None), out)


def _layer_triton(p: Peers, s: Any, fp8: bool) -> Call:
    """The fused MoE of vLLM, its kernels strung together as its own layer does."""
    layer, w, (t, k) = s.layer, s.weights_of, s.ids.shape
    h, i = layer.hidden, layer.inter
    config = p.triton_config(layer.num_experts, i, h, t, k, fp8)
    kernel = _Triton(p, s.ids, layer.num_experts, config, fp8)
    gate_up, rows = p.new(t, k, 2 * i), p.new(t * k, i)
    down, out = p.new(t, k, h), p.new(t, h)
    x, x_scales = (
        (p.new(t, h, dtype="float8_e4m3fn"), p.new(t, h // 128, dtype="float32")) if fp8 else (s.x, None)
    )
    rows8, row_scales = (
        (p.new(t * k, i, dtype="float8_e4m3fn"), p.new(t * k, i // 128, dtype="float32"))
        if fp8
        else (rows, None)
    )
    activate = gated(p, layer)

    def run() -> None:
        kernel.align()
        if fp8:
            p.ops._C.per_token_group_fp8_quant(s.x, x, x_scales, *GROUP_128)
        kernel.product(x, w.w13, gate_up, x_scales, None, w.w13_bias)
        activate(rows, gate_up.view(t * k, 2 * i))
        if fp8:
            p.ops._C.per_token_group_fp8_quant(rows, rows8, row_scales, *GROUP_128)
        kernel.product(rows8, w.w2, down, row_scales, s.weights, w.w2_bias)
        p.ops._moe_C.moe_sum(down, out)

    return Call(run, out)


def _layer_deep_gemm(p: Peers, s: Any) -> Call:
    """VLLM's kernels around DeepGEMM's products: rows gathered into whole blocks of an expert, as codes."""
    torch, layer, w, (t, k) = p.torch, s.layer, s.weights_of, s.ids.shape
    e, h, i = layer.num_experts, layer.hidden, layer.inter
    most = -(-(t * k + e * (_BLOCK - 1)) // _BLOCK) * _BLOCK
    routes, experts = p.new(most, dtype="int32"), p.new(most // _BLOCK, dtype="int32")
    count, slots = p.new(1, dtype="int32"), p.new(t * k + 1, dtype="int32")
    places = torch.arange(most, dtype=torch.int32, device=s.x.device)
    x, x_scales = p.new(t, h, dtype="float8_e4m3fn"), p.new(t, h // 128, dtype="float32")
    moved, gate_up = p.new(most, h, dtype="float8_e4m3fn"), p.new(most, 2 * i)
    rows, row_scales = p.new(most, i, dtype="float8_e4m3fn"), p.new(most, i // 128, dtype="float32")
    down, out = p.new(most, h), p.new(t, h)
    w13, w2 = (m.tensor.view(torch.float8_e4m3fn) for m in (w.w13, w.w2))
    aligned, product = (
        p.deep_gemm.get_mn_major_tma_aligned_tensor,
        p.deep_gemm.m_grouped_fp8_gemm_nt_contiguous,
    )

    def run() -> None:
        p.ops._moe_C.moe_align_block_size(s.ids, e, _BLOCK, routes, experts, count, None)
        unused = places[::_BLOCK] >= count
        index = experts.masked_fill(unused, -1)[:, None].expand(-1, _BLOCK).reshape(most)
        slot = routes.clamp(0, t * k).masked_fill_(index < 0, t * k)
        slots.index_copy_(0, slot.long(), places)
        token = slot.clamp(max=t * k - 1) // k
        p.ops._C.per_token_group_fp8_quant(s.x, x, x_scales, *GROUP_128)
        p.ops._moe_C.shuffle_rows(x, token, moved)
        product((moved, aligned(x_scales[token])), (w13, w.w13.scales), gate_up, index)
        p.ops._C.silu_and_mul_per_block_quant(rows, gate_up, row_scales, 128, None, False)
        product((rows, aligned(row_scales)), (w2, w.w2.scales), down, index)
        p.ops._moe_C.moe_unpermute(down, s.weights, slots[:-1].view(t, k), None, k, out)

    return Call(run, out)


def _layer_torch(p: Peers, s: Any) -> Call:
    """Argsort, torch._grouped_mm twice, index_add."""
    torch, layer, w = p.torch, s.layer, s.weights_of
    x, ids, weights = (p.space.torch(v) for v in (s.x, s.ids, s.weights))
    w13, w2 = (p.space.torch(m.tensor).transpose(1, 2) for m in (w.w13, w.w2))
    biases = [None if b is None else p.space.torch(b) for b in (w.w13_bias, w.w2_bias)]
    e, k = layer.num_experts, layer.top_k
    experts = torch.arange(e, device=x.device, dtype=ids.dtype)
    call = Call(lambda: None)

    def run() -> None:
        keys, order = ids.view(-1).sort()
        offsets = torch.searchsorted(keys, experts, right=True).int()
        gate_up = torch._grouped_mm(x[order // k], w13, offs=offsets)
        rows = gated_torch(p, layer, gate_up if biases[0] is None else gate_up + biases[0][keys])
        products = torch._grouped_mm(rows, w2, offs=offsets)
        if biases[1] is not None:
            products = products + biases[1][keys]
        products = products * weights.view(-1)[order, None].to(x.dtype)
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
        Adapter("vllm triton", "vllm", lambda p, s: _gemm_triton(p, s, False), of_type("bf16")),
        Adapter("vllm triton", "vllm", lambda p, s: _gemm_triton(p, s, True), block_shapes),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_bf16, of_type("bf16")),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_fp8, block_shapes),
    ],
    "fused_experts": [
        Adapter(
            "torch loop", "torch", _layer_loop, lambda c: c.dtype in ("bf16", "f32") and plain(c), ("cpu",)
        ),
        Adapter("torch grouped_mm", "torch", _layer_torch, of_type("bf16")),
        Adapter("sgl + torch", "sgl_kernel", _layer_sgl_torch, lambda c: c.dtype == "bf16" and plain(c)),
        Adapter("vllm triton", "vllm", lambda p, s: _layer_triton(p, s, False), of_type("bf16")),
        Adapter("vllm triton", "vllm", lambda p, s: _layer_triton(p, s, True), block_shapes),
        Adapter(
            "vllm + deep_gemm",
            "deep_gemm",
            _layer_deep_gemm,
            lambda c: block_shapes(c) and c.tokens >= _DEEP_GEMM_FROM,
        ),
        Adapter("flashinfer", "flashinfer", _layer_flashinfer, lambda c: dense16(c) and plain(c)),
    ],
}
