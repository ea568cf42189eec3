"""Cost of a call: tiny tensors, so that the time is the boundary's and not the kernel's.

    python bench/call_overhead.py [--json FILE]

Median and fastest of many batches. The bar is 1 us for four torch tensors through the bindings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moecore
import numpy as np
from moecore import _core


def measure(call: Callable[[], Any], batch: int = 2000, batches: int = 200) -> tuple[float, float]:
    """(median, fastest) nanoseconds of one call, over batches."""
    for _ in range(batch):
        call()
    times = []
    for _ in range(batches):
        start = time.perf_counter_ns()
        for _ in range(batch):
            call()
        times.append((time.perf_counter_ns() - start) / batch)
    return statistics.median(times), min(times)


def cases(make: Callable[[np.ndarray], Any]) -> dict[str, Callable[[], Any]]:
    """Calls of `_core` and of the public functions, on one token."""
    rows, out = make(np.ones((1, 8), np.float32)), make(np.empty((1, 8), np.float32))
    slot_row, weights = make(np.zeros((1, 1), np.int32)), make(np.ones((1, 1), np.float32))
    map = make(np.zeros(1, np.int32))
    return {
        "_core.shuffle_rows, 3 tensors": lambda: _core.shuffle_rows(rows, map, out),
        "_core.finalize, 4 tensors": lambda: _core.finalize(rows, slot_row, out, weights=weights),
        "moecore.finalize(out=), 4 tensors": lambda: moecore.finalize(rows, slot_row, weights, out=out),
        "moecore.finalize, 3 tensors + 1 new": lambda: moecore.finalize(rows, slot_row, weights),
    }


def main() -> int:
    """Prints the table; exit status 1 when the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    moecore.set_num_threads(1)

    makers: dict[str, Callable[[np.ndarray], Any]] = {"numpy": lambda a: a.copy()}
    try:
        import torch
    except ImportError:
        print("torch is not installed: NumPy only", file=sys.stderr)
    else:
        torch.set_grad_enabled(False)
        makers = {"torch": torch.from_numpy, **makers}

    results = []
    print(f"{'framework':10s}{'call':38s}{'median ns':>10s}{'fastest ns':>12s}")
    for framework, make in makers.items():
        for name, call in cases(make).items():
            median, fastest = measure(call)
            results.append({"framework": framework, "call": name, "median_ns": median, "fastest_ns": fastest})
            print(f"{framework:10s}{name:38s}{median:10.0f}{fastest:12.0f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    bar = [r for r in results if r["framework"] == "torch" and r["call"].startswith("_core.finalize")]
    return int(any(r["median_ns"] >= 1000 for r in bar))


if __name__ == "__main__":
    raise SystemExit(main())
