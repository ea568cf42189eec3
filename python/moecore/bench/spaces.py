"""Arrays, randomness and clocks of a device: NumPy on the CPU, torch on a GPU, one interface.

What an op takes (``tensor``) is a NumPy array, or its view under a type that NumPy lacks, or a torch tensor.
The form on the host is NumPy's: bf16 as uint16 bits, codes and byte-sized scales as uint8.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import moecore
from moecore import _core, reference
from moecore._arrays import DeviceMissingError
from moecore.bench import checks, machine

__all__ = ["Space", "Timing", "open_space"]

Host = npt.NDArray[Any]
Call = Callable[[], Any]

_NATIVE: dict[str, Any] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
    "e4m3": np.uint8,
}
_TAGGED = ("bf16", "e4m3")
_WORDS: dict[str, tuple[Any, int, int]] = {  # word, mantissa bits, exponent bias
    "bf16": (np.uint16, 7, 127),
    "f16": (np.uint16, 10, 15),
    "f32": (np.uint32, 23, 127),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call: the median, and the distance from the 10th to the 90th percentile over it."""

    median_us: float
    spread: float
    samples: int
    clock_mhz: int | None = None
    power_w: float | None = None


class Space:
    """The CPU, with arrays of NumPy."""

    device = "cpu"
    cold_bytes = 128 << 20  # what rotated inputs should add up to, so that no cache holds them
    max_sets = 64

    def __init__(self, seed: int = 7) -> None:
        self._rng = np.random.default_rng(seed)

    def __str__(self) -> str:
        threads = moecore.get_num_threads() or _core.cpu_threads()
        return f"{machine.cpu_name()}, {_core.cpu_isa()}, {threads} threads"

    # --- arrays ---

    def put(self, host: Host, dtype: str) -> Any:
        """A tensor with the values of a host array."""
        return moecore.view_as(host, dtype) if dtype in _TAGGED else host

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory that no value is promised for."""
        return self.put(np.empty(tuple(shape), _NATIVE[dtype]), dtype)

    def normal(self, shape: Sequence[int], dtype: str, magnitude: float = 1.0) -> Any:
        """Numbers of about ``magnitude``, either sign: random mantissas under one exponent."""
        if dtype == "e4m3":
            return self.put(self._bytes(shape, 0x8F, 0x30), dtype)
        word, mantissa, bias = _WORDS[dtype]
        out: Host = np.empty(tuple(shape), _NATIVE[dtype])
        flat = out.reshape(-1).view(word)
        keep = word((1 << (8 * word().itemsize - 1)) | ((1 << mantissa) - 1))
        exponent = word((bias + round(np.log2(magnitude))) << mantissa)
        for first in range(0, len(flat), 1 << 20):  # what a cache holds
            part = flat[first : first + (1 << 20)]
            count = -(-part.nbytes // 8)
            part[...] = self._rng.integers(0, 2**64 - 1, count, np.uint64, endpoint=True).view(word)[
                : len(part)
            ]
            part &= keep
            part |= exponent
        return self.put(out, dtype)

    def codes(self, shape: Sequence[int], keep: int = 0xFF, ones: int = 0) -> Any:
        """Random bytes, ``byte & keep | ones``."""
        return self._bytes(shape, keep, ones)

    def _bytes(self, shape: Sequence[int], keep: int, ones: int) -> Host:
        out: Host = np.frombuffer(self._rng.bytes(int(np.prod(shape))), np.uint8).reshape(tuple(shape)).copy()
        out &= np.uint8(keep)
        out |= np.uint8(ones)
        return out

    def host(self, tensor: Any, index: Any = ...) -> Host:
        """``tensor[index]`` in NumPy's form."""
        return np.asarray(_base(tensor)[index])

    def matrix(self, tensor: Any, expert: int, rows: Any = slice(None)) -> Any:
        """``tensor[expert, rows]`` where it is: rows of one expert's weights or scales."""
        return np.asarray(_base(tensor)[expert][rows])

    def dequantized(self, codes: Any, scales: Any, kind: str, global_scale: float) -> Any:
        """The values of such rows, as `product` takes them."""
        return checks.dequantize_rows(codes, scales, kind, global_scale)

    def product(
        self, rows: checks.F64, weights: Any, variances: Sequence[checks.F64] = ()
    ) -> tuple[checks.F64, checks.F64, list[checks.F64]]:
        """`reference.product`, where the weights are."""
        return reference.product(rows, weights, variances)

    def assign(self, tensor: Any, rows: Sequence[int], values: Host) -> None:
        """tensor[rows] = values."""
        _base(tensor)[list(rows)] = values

    def torch(self, tensor: Any) -> Any:
        """The same memory as a torch tensor, for peers."""
        import torch

        base = _base(tensor)
        dtype = moecore_dtype(tensor)
        if dtype == "bf16":
            return torch.from_numpy(base.view(np.int16)).view(torch.bfloat16)
        if dtype == "e4m3":
            return torch.from_numpy(base).view(torch.float8_e4m3fn)
        return torch.from_numpy(base)

    def free_bytes(self) -> float:
        """Memory that this process can still get."""
        from moecore.demo import _available_bytes

        return _available_bytes()

    def synchronize(self) -> None:
        """Waits for the device."""

    def release(self) -> None:
        """Gives memory of dropped tensors back."""

    # --- time ---

    def num_sets(self, set_bytes: int, shared_bytes: float = 0.0) -> int:
        """How many sets of inputs to rotate, each of ``set_bytes``; a call moves ``shared_bytes`` beside."""
        del shared_bytes
        fitting = max(1, int(self.free_bytes() / 4 / max(1, set_bytes)))
        return max(1, min(self.max_sets, fitting, -(-self.cold_bytes // max(1, set_bytes)) + 1))

    def time(self, calls: Sequence[Call], seconds: float) -> Timing:
        """Calls one after the other, each timed by itself, after a round to warm up."""
        begin = time.perf_counter()
        for call in calls:
            call()
            if time.perf_counter() - begin > seconds:
                break
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 5000):
            call = calls[len(times) % len(calls)]
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return summary([t * 1e6 for t in times], machine.cpu_clock_mhz())


class _CudaSpace(Space):
    """A GPU, with torch tensors. Times are those of CUDA graphs."""

    device = "cuda:0"
    cold_bytes = 300 << 20
    max_sets = 64
    replay_us = 300.0  # a replay is at least this long, so that its start does not count

    def __init__(self, seed: int = 7) -> None:
        super().__init__(seed)
        import torch

        from moecore.bench import device_float64

        self._torch, self._float64 = torch, device_float64
        if not torch.cuda.is_available():
            raise DeviceMissingError(f"torch {torch.__version__} sees no CUDA device")
        self._gpu = machine.Gpu()
        self._dtypes = {
            "f32": torch.float32,
            "f16": torch.float16,
            "bf16": torch.bfloat16,
            "i32": torch.int32,
            "i64": torch.int64,
            "u8": torch.uint8,
            "e4m3": torch.float8_e4m3fn,
        }
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._flush = torch.empty(self.cold_bytes // 4, dtype=torch.int32, device=self.device).random_(
            generator=self._generator
        )
        self._sink = torch.empty((), dtype=torch.int64, device=self.device)
        self._stream = torch.cuda.Stream()

    def __str__(self) -> str:
        return f"{self._torch.cuda.get_device_name(0)}, through torch {self._torch.__version__}"

    def put(self, host: Host, dtype: str) -> Any:
        native = host.view(np.int16) if host.dtype == np.uint16 else host
        return self._torch.from_numpy(np.ascontiguousarray(native)).to(self.device).view(self._dtypes[dtype])

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self._torch.empty(tuple(shape), dtype=self._dtypes[dtype], device=self.device)

    def normal(self, shape: Sequence[int], dtype: str, magnitude: float = 1.0) -> Any:
        if dtype == "e4m3":
            return self.codes(shape, 0x8F, 0x30).view(self._dtypes[dtype])
        return self.empty(shape, dtype).normal_(0, magnitude, generator=self._generator)

    def codes(self, shape: Sequence[int], keep: int = 0xFF, ones: int = 0) -> Any:
        out = self.empty(shape, "u8").random_(0, 256, generator=self._generator)
        return out.bitwise_and_(keep).bitwise_or_(ones)

    def host(self, tensor: Any, index: Any = ...) -> Host:
        torch = self._torch
        view = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(tensor.dtype)
        if view is not None:
            tensor = tensor.view(view)
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index).to(self.device)
        host: Host = tensor[index].cpu().numpy()
        return host.view(np.uint16) if host.dtype == np.int16 else host

    def matrix(self, tensor: Any, expert: int, rows: Any = slice(None)) -> Any:
        index = self._torch.from_numpy(rows).to(self.device) if isinstance(rows, np.ndarray) else rows
        return tensor[expert][index]

    def dequantized(self, codes: Any, scales: Any, kind: str, global_scale: float) -> Any:
        return self._float64.dequantize_rows(codes, scales, kind, global_scale)

    def product(
        self, rows: checks.F64, weights: Any, variances: Sequence[checks.F64] = ()
    ) -> tuple[checks.F64, checks.F64, list[checks.F64]]:
        return self._float64.product(rows, weights, variances)

    def assign(self, tensor: Any, rows: Sequence[int], values: Host) -> None:
        dtype = next(name for name, native in self._dtypes.items() if native == tensor.dtype)
        tensor[list(rows)] = self.put(values, dtype)

    def torch(self, tensor: Any) -> Any:
        return tensor

    def free_bytes(self) -> float:
        return float(self._torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def release(self) -> None:
        self._torch.cuda.empty_cache()

    def num_sets(self, set_bytes: int, shared_bytes: float = 0.0) -> int:
        """At least two; more until a replay is long and moves much, as far as a third of the memory goes."""
        moved = set_bytes + shared_bytes
        wanted = max(
            2, round(self.replay_us / (moved / 4.0e6 + 2.0)), math.ceil(self.cold_bytes / max(1, moved))
        )
        fitting = max(1, int(self.free_bytes() / 3 / max(1, set_bytes)))
        return max(1, min(self.max_sets, wanted, fitting))

    def time(self, calls: Sequence[Call], seconds: float) -> Timing:
        """Replays of a graph of all calls, each after a read of more memory than the L2 cache holds."""
        torch, stream = self._torch, self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
            calls[-1]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def replays(count: int) -> list[tuple[Any, Any]]:
            """Queued one after the other, so that the GPU never waits for the host."""
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            with torch.cuda.stream(stream):
                for begin, end in events:
                    torch.sum(self._flush, (0,), dtype=torch.int64, out=self._sink)
                    begin.record()
                    graph.replay()
                    end.record()
            return [(begin, end) for begin, end in events]

        def microseconds(events: list[tuple[Any, Any]]) -> list[float]:
            events[-1][1].synchronize()
            return [float(begin.elapsed_time(end)) * 1e3 / len(calls) for begin, end in events]

        first = max(microseconds(replays(1))[0], 1e-3) * len(calls) * 1e-6  # seconds
        is_long = first > 0.05
        warm = 0 if is_long else max(1, min(20, int(0.25 * seconds / first)))
        count = max(3 if is_long else 7, min(40, int(seconds / (first + 1e-4))))
        events = replays(warm + count)
        clock, power = self._gpu.clock_mhz(), self._gpu.power_w()  # of a busy GPU
        return summary(microseconds(events)[warm:], clock, power)


def summary(times: Sequence[float], clock: int | None = None, power: float | None = None) -> Timing:
    """Median and spread of several times."""
    median = statistics.median(times)
    tenths = statistics.quantiles(times, n=10)
    return Timing(median, (tenths[-1] - tenths[0]) / median, len(times), clock, power)


def moecore_dtype(tensor: Any) -> str:
    """The moecore name of a CPU tensor's element type."""
    if isinstance(tensor, _core.Retagged):
        return str(tensor.dtype)
    return {"float32": "f32", "float16": "f16", "int32": "i32", "int64": "i64", "uint8": "u8"}[
        str(tensor.dtype)
    ]


def _base(tensor: Any) -> Any:
    return tensor.base if isinstance(tensor, _core.Retagged) else tensor


def open_space(device: str) -> Space:
    """``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU or else the CPU. DeviceMissingError says what lacks."""
    if device == "cpu":
        return Space()
    count, reason = _core.cuda_device_count()
    if count == 0:
        if device == "auto":
            return Space()
        raise DeviceMissingError(reason)
    if not importlib.util.find_spec("torch"):
        raise DeviceMissingError(
            "a GPU is measured by CUDA-graph replay through torch, which is not installed (pip install torch)"
        )
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return _CudaSpace()
