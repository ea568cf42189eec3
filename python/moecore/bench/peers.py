"""Other libraries on the same inputs. Only called: nothing of theirs is built or kept here.

A peer is a library, found by import or as a binary in ``--peers-dir``; an adapter prepares one op of a peer
for one set of inputs and gives the call and what it writes. An adapter that fails is named, and the run goes
on.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from moecore.bench.cases import Case
from moecore.bench.spaces import Space

__all__ = ["PEERS", "Adapter", "Peers", "adapters"]

PEERS = ("torch", "vllm", "sgl_kernel", "flashinfer", "deep_gemm")

# Binaries in --peers-dir, for those that are not installed.
_BINARIES = {"vllm": ("vllm_C.so", "vllm_moe_C.so"), "sgl_kernel": ("sgl_sm90.so",)}
_OPS_NAMESPACE = {"vllm": ("vllm._C", "vllm._moe_C"), "sgl_kernel": ("sgl_kernel",)}


@dataclasses.dataclass
class Call:
    """A peer's call on one set, and what it wrote where that can be compared with moecore's output."""

    run: Callable[[], Any]
    output: Any = None

    def result(self) -> Any:
        """The output, as moecore would have written it."""
        if isinstance(self.output, _Padded):
            return self.output.out[self.output.target]
        return self.output


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How one peer does one op. `prepare(peers, set)` gives a Call."""

    name: str
    peer: str
    prepare: Callable[[Peers, Any], Call]
    suits: Callable[[Case], bool] = lambda case: True
    devices: tuple[str, ...] = ("cpu", "cuda:0")


class Peers:
    """The peers of a run: which are there, and why the others are not."""

    def __init__(self, wanted: str, folder: Path | None, space: Space) -> None:
        self.space = space
        self.found: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._triton: Any = None
        self._deep_gemm: Any = None
        self.folder = folder
        names = PEERS if wanted == "auto" else () if wanted == "none" else tuple(wanted.split(","))
        for name in names:
            if name not in PEERS:
                raise ValueError(
                    f"--peers: {name} is unknown, expected auto, none or some of {', '.join(PEERS)}"
                )
            try:
                self.found[name] = self._load(name)
            except Exception as error:  # whatever keeps another library from loading is the reason to name
                self.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"

    def _load(self, name: str) -> str:
        if name != "torch" and self.space.device == "cpu":
            raise RuntimeError("needs a GPU")
        if name in _BINARIES and importlib.util.find_spec(name) is None:
            import torch

            if self.folder is None:
                raise ModuleNotFoundError(f"{name} is not installed")
            binaries = [binary for binary in _BINARIES[name] if (self.folder / binary).exists()]
            if not binaries:
                raise FileNotFoundError(f"no {' or '.join(_BINARIES[name])} in {self.folder}")
            for binary in binaries:
                torch.ops.load_library(str(self.folder / binary))
            return f"{' and '.join(binaries)} of {self.folder.name}"
        if name == "deep_gemm" and importlib.util.find_spec(name) is None and self.folder is not None:
            sys.path.insert(0, str(self.folder))
        module = importlib.import_module(name)
        if name in _OPS_NAMESPACE:
            for part in _OPS_NAMESPACE[name]:
                importlib.import_module(part)
        if name == "deep_gemm":
            self._deep_gemm = module
        return str(getattr(module, "__version__", "installed"))

    @property
    def torch(self) -> Any:
        """The module."""
        return sys.modules["torch"]

    @property
    def ops(self) -> Any:
        """torch.ops."""
        return self.torch.ops

    @property
    def deep_gemm(self) -> Any:
        """The module."""
        return self._deep_gemm

    def new(self, *shape: int, dtype: str = "bfloat16") -> Any:
        """Uninitialised memory on the device."""
        torch = self.torch
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.space.device)

    @property
    def triton(self) -> Any:
        """The Triton kernel of vLLM: the package's, or --peers-dir's source with its imports stubbed."""
        if self._triton is None:
            self._triton = self._load_triton()
        return self._triton

    def _load_triton(self) -> Any:
        if importlib.util.find_spec("vllm") is not None:
            return importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
        if self.folder is None:
            raise ModuleNotFoundError("vllm is not installed")
        base = "vllm.model_executor.layers.fused_moe"
        stubs = [
            "vllm",
            "vllm.envs",
            "vllm._custom_ops",
            "vllm.logger",
            "vllm.platforms",
            "vllm.utils",
            "vllm.utils.platform_utils",
            "vllm.utils.torch_utils",
            "vllm.model_executor",
            "vllm.model_executor.layers",
            base,
            *(f"{base}.{part}" for part in ("activation", "config", "modular_kernel")),
            *(f"{base}.{part}" for part in ("moe_align_block_size", "utils")),
        ]
        before = {name: sys.modules.get(name) for name in [*stubs, "vllm.triton_utils"]}
        for name in stubs:
            sys.modules[name] = MagicMock()
        utils: Any = types.ModuleType("vllm.triton_utils")
        utils.tl, utils.triton = importlib.import_module("triton.language"), importlib.import_module("triton")
        sys.modules["vllm.triton_utils"] = utils
        sys.modules["vllm.platforms"].current_platform.is_rocm = lambda: False
        stub: Any = sys.modules["vllm.envs"]
        stub.VLLM_BATCH_INVARIANT = False
        try:
            source = self.folder / "vllm_fused_moe" / "fused_moe.py"
            spec = importlib.util.spec_from_file_location("moecore_bench_vllm_fused_moe", source)
            assert spec is not None
            assert spec.loader is not None
            module: Any = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        finally:
            for name, old in before.items():
                if old is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = old
        module.current_platform.is_rocm = lambda: False
        module.envs.VLLM_BATCH_INVARIANT = False
        module.enable_swap_ab = lambda m, n: m < 64 and n >= 64  # the rule of its own on sm_90
        return module

    def triton_config(self, experts: int, inter: int, hidden: int, tokens: int, top_k: int, fp8: bool) -> Any:
        """The tuned configuration for this GPU nearest to T, or the default."""
        kernel = self.triton
        block = [128, 128] if fp8 else None
        if self.folder is not None:
            gpu = self.torch.cuda.get_device_name(0).replace(" ", "_")
            tag = f"E={experts},N={inter},device_name={gpu}"
            tag += ",dtype=fp8_w8a8,block_shape=[128,128]" if fp8 else ""
            path = self.folder / "vllm_fused_moe" / f"{tag}.json"
            if path.exists():
                table = {int(k): v for k, v in json.loads(path.read_text()).items() if k.isdigit()}
                return dict(table[min(table, key=lambda t: abs(t - tokens))])
        elif hasattr(kernel, "get_moe_configs"):
            table = kernel.get_moe_configs(
                experts, inter, "fp8_w8a8" if fp8 else None, *(block or (None, None))
            )
            if table:
                return dict(table[min(table, key=lambda t: abs(t - tokens))])
        return kernel.get_default_config(
            tokens, experts, inter, hidden, top_k, "fp8_w8a8" if fp8 else None, block
        )


# --- route, plan --------------------------------------------------------------------------------------------


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
        layer = s.layer

        def grouped() -> None:
            p.ops._moe_C.grouped_topk(
                s.logits, layer.num_groups, layer.topk_groups, k, True, layer.scale, s.bias, 1
            )

        return Call(grouped)
    origin = p.new(t, k, dtype="int32")
    return Call(lambda: p.ops._moe_C.topk_softmax(weights, ids, origin, s.logits, True, None), (weights, ids))


def _route_sgl(p: Peers, s: Any) -> Call:
    t, k = s.ids.shape
    weights, ids = p.new(t, k, dtype="float32"), p.new(t, k, dtype="int32")
    run = p.ops.sgl_kernel.topk_softmax.default
    return Call(lambda: run(weights, ids, s.logits, True, 0.0, None), (weights, ids))


def _plan_buffers(p: Peers, s: Any) -> tuple[Any, ...]:
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
    offsets, blocks, one, two, rows, slots = _plan_buffers(p, s)
    run = p.ops._C.get_cutlass_moe_mm_data
    return Call(
        lambda: run(
            s.ids, offsets, one, two, rows, slots, layer.num_experts, layer.inter, layer.hidden, blocks, True
        )
    )


def _plan_sgl(p: Peers, s: Any) -> Call:
    layer = s.layer
    offsets, blocks, one, two, rows, slots = _plan_buffers(p, s)
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


# --- rows ---------------------------------------------------------------------------------------------------


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


def _activate_ops(namespace: str, name: str) -> Callable[[Peers, Any], Call]:
    def prepare(p: Peers, s: Any) -> Call:
        out = p.torch.empty_like(s.out)
        run = getattr(getattr(p.ops, namespace), name).default
        return Call(lambda: run(out, s.x), out)

    return prepare


def _activate_torch(p: Peers, s: Any) -> Call:
    x, i = p.space.torch(s.x), s.layer.inter
    call = Call(lambda: None)

    def run() -> None:
        call.output = p.torch.nn.functional.silu(x[:, :i]) * x[:, i:]

    call.run = run
    return call


def _activate_flashinfer(p: Peers, s: Any) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    out = p.torch.empty_like(s.out)
    return Call(lambda: flashinfer.silu_and_mul(s.x, out=out), out)


# --- quantise -----------------------------------------------------------------------------------------------


def _codes(p: Peers, s: Any, columns: int) -> Any:
    return p.new(s.data.shape[0], columns, dtype="float8_e4m3fn")


def _quantize_vllm_token(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops._C.dynamic_per_token_scaled_fp8_quant
    return Call(lambda: run(codes, s.x, scales, None), (codes, scales))


def _quantize_vllm_block(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops._C.per_token_group_fp8_quant
    return Call(
        lambda: run(s.x, codes, scales, 128, 1e-10, -448.0, 448.0, False, False, False), (codes, scales)
    )


def _quantize_sgl_token(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.x.shape[1]), p.torch.empty_like(s.scales)
    run = p.ops.sgl_kernel.sgl_per_token_quant_fp8.default
    return Call(lambda: run(s.x, codes, scales), (codes, scales))


def _silu_quantize_vllm(p: Peers, s: Any) -> Call:
    codes, scales = _codes(p, s, s.layer.inter), p.torch.empty_like(s.scales)
    run = p.ops._C.silu_and_mul_per_block_quant
    return Call(lambda: run(codes, s.x, scales, 128, None, False), (codes, scales))


# --- products and the layer ---------------------------------------------------------------------------------


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
    return Call(lambda: run(x, s.matrix.tensor, out, index), _Padded(out, target))


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
    return Call(lambda: run((codes, scales), (weights, s.matrix.scales), out, index), _Padded(out, target))


@dataclasses.dataclass
class _Padded:
    """An output whose rows stand at `target`."""

    out: Any
    target: Any


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
    offsets, blocks, one, two, rows, slots = _plan_buffers(p, s)
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


def _plain(case: Case) -> bool:
    """A layer that every peer computes: silu, halves, no bias."""
    return case.layer.activation == "silu" and not case.layer.expert_bias


def _is(*dtypes: str) -> Callable[[Case], bool]:
    return lambda case: case.dtype in dtypes


def _dense16(case: Case) -> bool:
    return case.dtype in ("bf16", "f16")


def _softmax(case: Case) -> bool:
    return case.layer.scoring == "softmax" and case.dtype == "f32"


def _block_shapes(case: Case) -> bool:
    return case.dtype == "fp8_block128" and case.layer.hidden % 128 == 0 and case.layer.inter % 128 == 0


adapters: dict[str, list[Adapter]] = {
    "route": [
        Adapter("torch topk", "torch", _route_torch, _softmax),
        Adapter(
            "vllm",
            "vllm",
            _route_vllm,
            lambda c: c.dtype == "f32" and (c.layer.scoring == "softmax" or c.layer.num_groups > 1),
        ),
        Adapter("sgl", "sgl_kernel", _route_sgl, _softmax),
    ],
    "plan": [
        Adapter("torch argsort", "torch", _plan_torch),
        Adapter("vllm mm_data", "vllm", _plan_vllm),
        Adapter("sgl prepare", "sgl_kernel", _plan_sgl),
        Adapter("sgl align", "sgl_kernel", _plan_sgl_align),
    ],
    "permute": [
        Adapter("torch index_select", "torch", _permute_torch),
        Adapter("vllm shuffle", "vllm", _permute_ops("_moe_C")),
        Adapter("sgl shuffle", "sgl_kernel", _permute_ops("sgl_kernel")),
    ],
    "activate": [
        Adapter("torch silu*mul", "torch", _activate_torch, _plain),
        Adapter("vllm", "vllm", _activate_ops("_C", "silu_and_mul"), _plain),
        Adapter("sgl", "sgl_kernel", _activate_ops("sgl_kernel", "silu_and_mul"), _plain),
        Adapter("flashinfer", "flashinfer", _activate_flashinfer, _plain),
    ],
    "quantize": [
        Adapter("vllm token", "vllm", _quantize_vllm_token, _is("fp8_token")),
        Adapter("sgl token", "sgl_kernel", _quantize_sgl_token, _is("fp8_token")),
        Adapter("vllm group", "vllm", _quantize_vllm_block, _block_shapes),
    ],
    "activate_quantize": [
        Adapter("vllm", "vllm", _silu_quantize_vllm, lambda c: _block_shapes(c) and _plain(c)),
    ],
    "finalize": [
        Adapter("torch eager", "torch", _finalize_torch),
        Adapter("vllm unpermute", "vllm", _finalize_vllm, _dense16),
        Adapter("sgl", "sgl_kernel", _finalize_sgl, _dense16),
    ],
    "grouped_gemm": [
        Adapter("torch", "torch", _gemm_torch, _is("bf16")),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_bf16, _is("bf16")),
        Adapter("deep_gemm", "deep_gemm", _gemm_deep_fp8, _block_shapes),
    ],
    "fused_experts": [
        Adapter(
            "torch loop", "torch", _layer_loop, lambda c: c.dtype in ("bf16", "f32") and _plain(c), ("cpu",)
        ),
        Adapter("torch grouped_mm", "torch", _layer_torch, lambda c: c.dtype == "bf16" and _plain(c)),
        Adapter(
            "sgl + torch",
            "sgl_kernel",
            _layer_sgl_torch,
            lambda c: c.dtype == "bf16" and _plain(c),
        ),
        Adapter(
            "vllm triton",
            "vllm",
            lambda p, s: _layer_triton(p, s, False),
            lambda c: c.dtype == "bf16" and _plain(c),
        ),
        Adapter(
            "vllm triton",
            "vllm",
            lambda p, s: _layer_triton(p, s, True),
            lambda c: _block_shapes(c) and _plain(c),
        ),
        Adapter("flashinfer", "flashinfer", _layer_flashinfer, lambda c: _dense16(c) and _plain(c)),
    ],
}
"""By op. shuffle_rows has those of permute."""
adapters["shuffle_rows"] = adapters["permute"]
