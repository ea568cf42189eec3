"""The libraries of a run: installed, or binaries of ``--peers-dir``."""

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

__all__ = [
    "PEERS",
    "Adapter",
    "Call",
    "Padded",
    "Peers",
    "block_shapes",
    "dense16",
    "of_type",
    "plain",
    "softmax",
    "whole_blocks",
]

PEERS = ("torch", "vllm", "sgl_kernel", "flashinfer", "deep_gemm")

# Binaries in --peers-dir, for those that are not installed.
_BINARIES = {"vllm": ("vllm_C.so", "vllm_moe_C.so"), "sgl_kernel": ("sgl_sm90.so",)}
_OPS_NAMESPACE = {"vllm": ("vllm._C", "vllm._moe_C"), "sgl_kernel": ("sgl_kernel",)}


@dataclasses.dataclass
class Padded:
    """An output whose rows stand at `target`."""

    out: Any
    target: Any


@dataclasses.dataclass
class Call:
    """A peer's call on one set, and what it wrote where that can be compared with moecore's output."""

    run: Callable[[], Any]
    output: Any = None

    def result(self) -> Any:
        """The output, as moecore would have written it."""
        if isinstance(self.output, Padded):
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


def plain(case: Case) -> bool:
    """A layer that every peer computes: silu, halves, no bias."""
    return case.layer.activation == "silu" and not case.layer.expert_bias


def of_type(*dtypes: str) -> Callable[[Case], bool]:
    """In one of these types or formats."""
    return lambda case: case.dtype in dtypes


def dense16(case: Case) -> bool:
    """In a type of two bytes."""
    return case.dtype in ("bf16", "f16")


def softmax(case: Case) -> bool:
    """Softmax of f32 logits."""
    return case.layer.scoring == "softmax" and case.dtype == "f32"


def block_shapes(case: Case) -> bool:
    """fp8 weights of whole blocks of 128 x 128."""
    return case.dtype == "fp8_block128" and case.layer.hidden % 128 == 0 and case.layer.inter % 128 == 0


def whole_blocks(case: Case) -> bool:
    """fp8 rows of whole blocks of 128."""
    return case.dtype == "fp8_block128" and case.layer.hidden % 128 == 0
