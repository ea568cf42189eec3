"""What the device can do at most, measured in the same run as everything that is held against it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import moecore
from moecore import _core
from moecore.bench.spaces import Space

__all__ = ["Roof", "measure"]

_CPU_BYTES = 256 << 20
_GPU_BYTES = 4 << 30
_MATRIX = 8192


@dataclasses.dataclass(frozen=True)
class Roof:
    """Bytes per second read, written, and copied (both counted); FLOP per second by element type.

    0 where the device or torch has no such thing.
    """

    read: float
    write: float
    copy: float
    f32: float
    bf16: float
    fp8: float

    def seconds(self, read_bytes: float, written_bytes: float, flops: float, rate: str) -> float:
        """The least time: moving the bytes at the rates of reading and writing, or the arithmetic."""
        moving = read_bytes / self.read + written_bytes / (self.write or self.read)
        peak = {"": 0.0, "f32": self.f32, "bf16": self.bf16 or self.f32, "fp8": self.fp8 or self.bf16}[rate]
        return max(moving, flops / peak if peak else 0.0)

    def __str__(self) -> str:
        unit, scale = ("TB/s", 1e12) if self.read > 1e12 else ("GB/s", 1e9)
        moved = "read {:.2f}, write {:.2f}, copy {:.2f} ".format(
            *(value / scale for value in (self.read, self.write, self.copy))
        )
        rates = ", ".join(
            f"{name} {value / 1e12:.3g}"
            for name, value in (("f32", self.f32), ("bf16", self.bf16), ("fp8", self.fp8))
            if value
        )
        return f"{moved}{unit}; {rates} TFLOP/s"


def measure(space: Space) -> Roof:
    """Takes a second or two; what torch is needed for is 0 without it."""
    library = moecore.measure_roof(space.device)
    if space.device == "cpu":
        write, copy = _cpu_bandwidth()
        read = library.read_bytes_per_s
        return Roof(read, write, copy, library.f32_flop_per_s, library.bf16_flop_per_s, 0.0)
    write, copy, bf16, fp8 = _gpu_rates()
    return Roof(library.read_bytes_per_s, write, copy, library.f32_flop_per_s, bf16, fp8)


def _cpu_bandwidth() -> tuple[float, float]:
    """Writing and copying, by as many threads as ops use."""
    threads = moecore.get_num_threads() or _core.cpu_threads()
    share = _CPU_BYTES // threads // 8
    parts = [(np.ones(share), np.ones(share)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def best(work: Callable[[Any], Any]) -> float:
            times = []
            for _ in range(6):
                start = time.perf_counter()
                list(pool.map(work, parts))
                times.append(time.perf_counter() - start)
            return min(times)

        writing = best(lambda pair: pair[0].fill(1.5))
        copying = best(lambda pair: np.copyto(pair[0], pair[1]))
    total = share * 8 * threads
    return total / writing, 2 * total / copying


def _gpu_rates() -> tuple[float, float, float, float]:
    import torch

    def best(work: Callable[[], Any], runs: int = 8) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        work()
        for _ in range(runs):
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return min(times)

    size = min(_GPU_BYTES, torch.cuda.mem_get_info()[0] // 4)
    target = torch.empty(size // 4, dtype=torch.int32, device="cuda")
    source = torch.empty_like(target).random_()
    write = 4 * target.numel() / best(functools.partial(target.fill_, 7))
    copy = 8 * target.numel() / best(functools.partial(target.copy_, source))
    del target, source
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    flops = 2.0 * _MATRIX**3
    # The median, not the best: under a power limit the first products are faster than the chip can go on.
    bf16 = flops / _sustained(functools.partial(torch.mm, a, b.T, out=out))
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        options: dict[str, Any] = {
            "scale_a": one,
            "scale_b": one,
            "out_dtype": torch.bfloat16,
            "use_fast_accum": True,
        }
        fp8 = flops / _sustained(functools.partial(torch._scaled_mm, a8, b8.T, **options))
    except (RuntimeError, ValueError):  # no fp8 on this GPU
        fp8 = 0.0
    del a, b, out
    torch.cuda.empty_cache()
    return write, copy, bf16, fp8


def _sustained(work: Callable[[], Any]) -> float:
    """Seconds of a call in the middle of 0.15 s of them."""
    import torch

    work()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        begin.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e4)
    return sorted(times)[len(times) // 2]
