"""What a measurement was made on: hardware, clocks, versions, commit."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import moecore
from moecore import _core

__all__ = ["Gpu", "commit", "cpu_clock_mhz", "cpu_name", "hardware", "versions"]

_PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "sgl-kernel",
    "sglang-kernel",
    "flashinfer-python",
    "deep-gemm",
)


class Gpu:
    """Clocks and power of one GPU: through NVML where Python has it, else through nvidia-smi."""

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._nvml: Any = None
        try:
            pynvml = importlib.import_module("pynvml")
            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        except Exception:  # no module, no library, no permission: all the same here
            self._nvml = None

    def clock_mhz(self) -> int | None:
        """The SM clock at this moment."""
        if self._nvml is not None:
            return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))
        value = self.query("clocks.sm")
        return int(value) if value.isdigit() else None

    def power_w(self) -> float | None:
        """Power drawn, averaged by the driver."""
        if self._nvml is not None:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3
        return None

    def query(self, field: str) -> str:
        """One field of ``nvidia-smi --query-gpu``, empty where that fails."""
        if shutil.which("nvidia-smi") is None:
            return ""
        command = [
            "nvidia-smi",
            f"--id={self._index}",
            f"--query-gpu={field}",
            "--format=csv,noheader,nounits",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()


def hardware(device: str) -> dict[str, Any]:
    """The device that was measured."""
    if device == "cpu":
        return {
            "device": "cpu",
            "name": cpu_name(),
            "isa": _core.cpu_isa(),
            "threads": moecore.get_num_threads() or _core.cpu_threads(),
            "clock_mhz": cpu_clock_mhz(),
        }
    gpu = Gpu()
    fields = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    name, driver, sm, memory, power = (gpu.query(field) for field in fields)
    return {
        "device": "cuda",
        "name": name,
        "driver": driver,
        "max_sm_clock_mhz": sm,
        "memory_clock_mhz": memory,
        "power_limit_w": power,
        "clock_mhz": gpu.clock_mhz(),
        "host": cpu_name(),
    }


def cpu_name() -> str:
    """The CPU's name as the kernel gives it, or the architecture's."""
    return _cpuinfo("model name") or platform.machine()


def cpu_clock_mhz() -> int | None:
    """The first CPU's clock at this moment, where the kernel says it."""
    value = _cpuinfo("cpu MHz")
    return round(float(value)) if value else None


def _cpuinfo(field: str) -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith(field):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def versions() -> dict[str, str]:
    """moecore, Python and whatever a peer may come from."""
    found = {"moecore": moecore.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.__version__
        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The commit of the checkout that moecore was imported from, MOECORE_COMMIT, or nothing."""
    if named := os.environ.get("MOECORE_COMMIT"):
        return named
    for folder in (Path(moecore.__file__).parent, Path.cwd()):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), "describe", "--always", "--dirty"],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return done.stdout.strip()
    return ""
