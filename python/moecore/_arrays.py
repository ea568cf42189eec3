"""Arrays on a device for the command line: NumPy on the CPU, torch or CuPy on a GPU, one small interface.

bf16 travels as uint16 bits, which every one of them has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import moecore
from moecore import _core

__all__ = ["Array", "Arrays", "DeviceMissingError", "open_device"]

_NATIVE = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
}


class DeviceMissingError(Exception):
    """No such device, or no framework that makes arrays on it; the message says which."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Memory under a moecore dtype: ``op`` is what ops take, ``raw`` the framework's own array."""

    raw: Any
    op: Any


class Arrays:
    """Arrays of NumPy, on the CPU. Subclasses put them on a GPU."""

    device = "cpu"

    def __str__(self) -> str:
        return f"cpu ({_core.cpu_isa()}, {moecore.get_num_threads() or _core.cpu_threads()} threads)"

    def put(self, host: npt.NDArray[np.generic], dtype: str) -> Array:
        """The values of a host array; bf16 comes as uint16 bits."""
        return Array(host, moecore.view_as(host, "bf16") if dtype == "bf16" else host)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory that no value is promised for."""
        return self.put(np.empty(shape, _NATIVE[dtype]), dtype)

    def get(self, array: Array, index: Any = ...) -> npt.NDArray[np.generic]:
        """``array[index]`` on the host, in the form that put() takes."""
        return np.asarray(array.raw[index])

    def synchronize(self) -> None:
        """Waits for the device."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long ``call`` takes."""
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


class _TorchArrays(Arrays):
    device = "cuda:0"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        if not torch.cuda.is_available():
            raise DeviceMissingError(f"torch {torch.__version__} sees no CUDA device")

    def __str__(self) -> str:
        return f"cuda:0 ({self._torch.cuda.get_device_name(0)}, through torch)"

    def put(self, host: npt.NDArray[np.generic], dtype: str) -> Array:
        tensor = self._torch.from_numpy(host.view(np.int16) if dtype == "bf16" else host).to(self.device)
        return self._array(tensor, dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        kind = "int16" if dtype == "bf16" else np.dtype(_NATIVE[dtype]).name
        return self._array(
            self._torch.empty(shape, dtype=getattr(self._torch, kind), device=self.device), dtype
        )

    def _array(self, tensor: Any, dtype: str) -> Array:
        return Array(tensor, tensor.view(self._torch.bfloat16) if dtype == "bf16" else tensor)

    def get(self, array: Array, index: Any = ...) -> npt.NDArray[np.generic]:
        host: npt.NDArray[np.generic] = array.raw[index].cpu().numpy()
        return host.view(np.uint16) if host.dtype == np.int16 else host

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class _CuPyArrays(Arrays):
    device = "cuda:0"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceMissingError(f"CuPy sees no CUDA device: {error}") from error

    def __str__(self) -> str:
        name = self._cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return f"cuda:0 ({name}, through CuPy)"

    def put(self, host: npt.NDArray[np.generic], dtype: str) -> Array:
        return self._array(self._cupy.asarray(host), dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._array(self._cupy.empty(shape, _NATIVE[dtype]), dtype)

    def _array(self, raw: Any, dtype: str) -> Array:
        return Array(raw, moecore.view_as(raw, "bf16") if dtype == "bf16" else raw)

    def get(self, array: Array, index: Any = ...) -> npt.NDArray[np.generic]:
        host: npt.NDArray[np.generic] = array.raw[index].get()
        return host

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3


def open_device(device: str) -> Arrays:
    """Arrays on ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU or else the CPU. DeviceMissingError tells why."""
    if device == "cpu":
        return Arrays()
    count, reason = _core.cuda_device_count()
    if count == 0:
        if device == "auto":
            return Arrays()
        raise DeviceMissingError(reason)
    if importlib.util.find_spec("torch"):
        return _TorchArrays()
    if importlib.util.find_spec("cupy"):
        return _CuPyArrays()
    raise DeviceMissingError(
        "a GPU is there, but neither torch nor CuPy to make arrays on it (pip install torch)"
    )
