"""What a bug report should contain: the machine, the frameworks and this build."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import moecore

__all__ = ["collect_env"]

_PACKAGES = (
    "numpy",
    "ml_dtypes",
    "torch",
    "transformers",
    "jax",
    "cupy",
    "nanobind-backend",
    "vllm",
    "sglang",
    "flashinfer-python",
)
_VARIABLES = ("MOECORE_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


def collect_env() -> str:
    """Text to paste into an issue. Reads versions from package metadata; imports no framework."""
    config = moecore.show_config(mode="dicts")
    cpu, cuda = config["cpu"], config["cuda"]
    compiled = " ".join(f"sm_{arch}" for arch in cuda["architectures"]) or "none, built without CUDA"
    sections = {
        "moecore": [
            ("version", config["version"]),
            ("location", str(Path(moecore.__file__).parent)),
            ("CPU engine", f"{cpu['isa']} of {' '.join(cpu['isas'])}, {cpu['threads']} threads"),
            ("CUDA kernels", compiled),
            (
                "CUDA devices",
                str(cuda["devices"]) + (f" ({cuda['unavailable']})" if cuda["unavailable"] else ""),
            ),
        ],
        "machine": [
            ("OS", _os_name()),
            ("kernel", platform.platform()),
            ("libc", " ".join(platform.libc_ver())),
            ("CPU", _cpu_name()),
            (
                "usable CPUs",
                str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
            ),
            ("memory", _memory()),
            ("GPU", _gpu()),
        ],
        "Python": [
            ("version", sys.version.replace("\n", " ")),
            ("executable", sys.executable),
            *((name, _version(name)) for name in _PACKAGES),
        ],
        "environment": [
            (name, value) for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        ]
        or [("", "no variable that moecore reads is set")],
    }
    lines = []
    for title, rows in sections.items():
        lines.append(f"[{title}]")
        lines += [f"{name + ':':<18} {value}" if name else value for name, value in rows]
        lines.append("")
    return "\n".join(lines).rstrip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _proc_field(path: str, name: str) -> str:
    try:
        with Path(path).open() as file:
            for line in file:
                if line.startswith(name):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


def _cpu_name() -> str:
    name = _proc_field("/proc/cpuinfo", "model name")
    return f"{platform.machine()} {name}"


def _memory() -> str:
    total = _proc_field("/proc/meminfo", "MemTotal").split()
    available = _proc_field("/proc/meminfo", "MemAvailable").split()
    if not (total[0].isdigit() and available[0].isdigit()):
        return "unknown"
    return f"{int(total[0]) / 2**20:.1f} GiB, {int(available[0]) / 2**20:.1f} GiB available"


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "; ".join((answer.stdout or answer.stderr).split("\n")).strip("; ") or "none"
