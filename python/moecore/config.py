"""What this build and this machine offer, where the C++ package is, and logging."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

from moecore import _core
from moecore.ops import OPS


def cuda_archs() -> list[str]:
    """Compiled-in CUDA architectures ("80", "90a", ...); empty for a build without CUDA."""
    return list(_core.cuda_architectures())


def cpu_features() -> dict[str, Any]:
    """The instruction set the CPU engine chose, every one it could run with, and its default thread count."""
    return {"isa": _core.cpu_isa(), "isas": list(_core.cpu_isas()), "threads": _core.cpu_threads()}


def is_available(device: str) -> bool:
    """Whether ops run on `device`, "cpu" or "cuda"."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'is_available: device is "{device}", expected "cpu" or "cuda"')
    return device == "cpu" or _core.cuda_device_count()[0] > 0


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Prints what this build and this machine offer, or with mode="dicts" returns it."""
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'show_config: mode is "{mode}", expected "stdout" or "dicts"')
    devices, why = _core.cuda_device_count()
    config: dict[str, Any] = {
        "version": _core.version(),
        "cpu": cpu_features(),
        "cuda": {
            "architectures": cuda_archs(),
            "devices": devices,
            "unavailable": why if devices == 0 else None,
        },
        "ops": {op: list(_core.supported(op)) for op in OPS},
        "cmake_dir": cmake_dir(),
        "include_dir": include_dir(),
    }
    if mode == "dicts":
        return config
    cpu, cuda = config["cpu"], config["cuda"]
    print(f"moecore {config['version']}")
    print(f"  cpu   {cpu['isa']} of {', '.join(cpu['isas'])}; {cpu['threads']} threads")
    if cuda["architectures"]:
        archs = " ".join(f"sm_{arch}" for arch in cuda["architectures"])
        print(f"  cuda  {archs}; {devices} devices" + (f" ({why})" if devices == 0 else ""))
    else:
        print(f"  cuda  {why}")
    for op, dtypes in config["ops"].items():
        print(f"  {op:18s}{' '.join(dtypes)}")
    return None


_PACKAGE = os.path.dirname(os.path.abspath(__file__))  # pathlib would be a third of the import time


def include_dir() -> str | None:
    """The directory of the C++ headers in this installation, or None for a build without them."""
    path = os.path.join(_PACKAGE, "include")
    return path if os.path.isdir(path) else None


def cmake_dir() -> str | None:
    """The directory of moecore-config.cmake in this installation, or None for a build without it."""
    path = os.path.join(_PACKAGE, "lib", "cmake", "moecore")
    return path if os.path.isdir(path) else None


def configure_logging(level: str | None = None) -> None:
    """Logs to the logger "moecore" which kernel each op takes.

    "info" logs each choice once, "debug" every call. Called on import with the environment variable
    MOECORE_LOG. None or "off" stops it.
    """
    level = (level or "off").lower()
    if level in ("off", "0", ""):
        _core.set_log_sink(None)
        return
    if level not in ("info", "debug"):
        raise ValueError(f'MOECORE_LOG is "{level}", expected "info", "debug" or "off"')
    import logging

    logger = logging.getLogger("moecore")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("moecore: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level.upper())
    seen: set[tuple[str, str]] = set()

    def sink(op: str, reasons: str) -> None:
        text = reasons.strip() or op
        if (op, text) not in seen:
            seen.add((op, text))
            logger.info(text)
        else:
            logger.debug(text)

    _core.set_log_sink(sink)


if os.environ.get("MOECORE_LOG"):
    configure_logging(os.environ["MOECORE_LOG"])
