"""``moecore bench compare A B``: the ratio of every case that two result files share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moecore.bench.harness import duration, read

__all__ = ["compare"]


def compare(before: Path, after: Path, threshold: float) -> int:
    """Prints after over before; 1 when a time of moecore grew by more than `threshold` and the runs' spread.

    A file may hold a case several times; the last one counts.
    """
    old, new = (_times(path) for path in (before, after))
    shared = [key for key in new if key in old]
    if not shared:
        raise ValueError(f"{before} and {after} have no case in common")
    print(f"{'case':<50} {'by':<18} {'before':>10} {'after':>10} {'ratio':>7}")
    regressions, ratios = [], []
    for key in shared:
        a, b = old[key], new[key]
        ratio = b["us"] / a["us"]
        mark = ""
        if key[1] == "moecore":
            ratios.append(ratio)
            noise = max(a.get("spread", 0.0), b.get("spread", 0.0))
            if ratio > 1 + max(threshold, noise):
                regressions.append(key[0])
                mark = "  slower"
            elif ratio < 1 / (1 + max(threshold, noise)):
                mark = "  faster"
        print(
            f"{key[0]:<50} {key[1]:<18} {duration(a['us']):>10} {duration(b['us']):>10} {ratio:>7.3f}{mark}"
        )
    for path, only in ((before, old.keys() - new.keys()), (after, new.keys() - old.keys())):
        if only:
            print(f"only in {path}: {len(only)} of {len(only) + len(shared)}")
    if ratios:
        mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
        print(f"moecore, geometric mean of {len(ratios)}: {mean:.3f}")
    if regressions:
        print(f"{len(regressions)} slower by more than {threshold:.0%}: {', '.join(regressions)}")
    return 1 if regressions else 0


def _times(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(t["case"], t["by"]): t for t in read(path)[1] if "us" in t}
