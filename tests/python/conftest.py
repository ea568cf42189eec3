"""The same values as tensors of every framework, and back."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import moecore
import numpy as np
import pytest

# JAX would take most of a GPU's memory at its first array, in every worker.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_NUMPY = {
    "f32": np.float32,
    "f16": np.float16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
    "bool": np.bool_,
}


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


def _bf16_values(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


class Frame:
    """A framework in the tests: `make` turns f32 (or integer) values into a tensor, `read` turns one into
    values."""

    name = "?"
    device = "cpu"
    writable = True

    def make(self, values: Any, dtype: str) -> Any:
        raise NotImplementedError

    def read(self, tensor: Any) -> np.ndarray:
        raise NotImplementedError


class _Torch(Frame):
    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        if device == "cuda" and not (self.torch.cuda.is_available() and moecore.is_available("cuda")):
            pytest.skip("no CUDA device, or moecore without CUDA")
        self.device = device

    def make(self, values: Any, dtype: str) -> Any:
        names = {
            "f32": "float32",
            "f16": "float16",
            "bf16": "bfloat16",
            "i32": "int32",
            "i64": "int64",
            "u8": "uint8",
        }
        t = self.torch.from_numpy(np.array(values))
        return t.to(self.device, dtype=getattr(self.torch, names.get(dtype, dtype)))

    def read(self, tensor: Any) -> np.ndarray:
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


class _NumPy(Frame):
    """NumPy; bf16 with ml_dtypes."""

    name = "numpy"

    def make(self, values: Any, dtype: str) -> Any:
        if dtype == "bf16":
            ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
            return _bf16_bits(np.asarray(values)).view(ml_dtypes.bfloat16)
        return np.array(values).astype(_NUMPY[dtype])

    def read(self, tensor: Any) -> np.ndarray:
        array = np.asarray(tensor)
        return array.astype(np.float32) if array.dtype.kind in "fV" else array


class _Retagged(_NumPy):
    """NumPy without ml_dtypes: bf16 as tagged bytes."""

    name = "retagged"

    def make(self, values: Any, dtype: str) -> Any:
        if dtype == "bf16":
            return moecore.view_as(_bf16_bits(np.asarray(values)), "bf16")
        return super().make(values, dtype)

    def read(self, tensor: Any) -> np.ndarray:
        return (
            _bf16_values(tensor.base) if isinstance(tensor, moecore._core.Retagged) else super().read(tensor)
        )


class _Jax(_NumPy):
    name = "jax"
    writable = False

    def __init__(self) -> None:
        self.jax = pytest.importorskip("jax", reason="jax is not installed")

    def make(self, values: Any, dtype: str) -> Any:
        if dtype == "i64":
            pytest.skip("JAX has no 64-bit integers by default")
        return self.jax.device_put(super().make(values, dtype), self.jax.devices("cpu")[0])


class _CuPy(Frame):
    name = "cupy"
    device = "cuda"

    def __init__(self) -> None:
        self.cupy = pytest.importorskip("cupy", reason="cupy is not installed")
        if not moecore.is_available("cuda"):
            pytest.skip("no CUDA device, or moecore without CUDA")

    def make(self, values: Any, dtype: str) -> Any:
        if dtype == "bf16":
            return moecore.view_as(self.cupy.asarray(_bf16_bits(np.asarray(values))), "bf16")
        return self.cupy.asarray(np.array(values).astype(_NUMPY[dtype]))

    def read(self, tensor: Any) -> np.ndarray:
        if isinstance(tensor, moecore._core.Retagged):
            return _bf16_values(self.cupy.asnumpy(tensor.base))
        array = self.cupy.asnumpy(tensor)
        return array.astype(np.float32) if array.dtype.kind == "f" else array


_FRAMES = {
    "torch": _Torch,
    "torch-cuda": lambda: _Torch("cuda"),
    "numpy": _NumPy,
    "retagged": _Retagged,
    "jax": _Jax,
    "cupy": _CuPy,
}


@pytest.fixture(params=list(_FRAMES))
def frame(request: pytest.FixtureRequest) -> Frame:
    return _FRAMES[request.param]()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per reason for skipping."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:5d} {reason}")
