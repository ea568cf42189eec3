"""``moecore tune``: tries an op's launch policies on the present GPU and writes those that pay.

A policy is text, "slots=4 threads=64"; which knobs a call has, and their values, it says itself when it
refuses one. For every model and T the search changes one knob at a time and keeps what is faster, until
nothing is or the time is up; the winner is measured again, in turn with the default. The file is what
MOECORE_TUNING names: a line holds from the T that was measured halfway to the next one, on such GPUs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import moecore
from moecore import _core
from moecore.bench import machine
from moecore.bench.cases import Case
from moecore.bench.harness import duration
from moecore.bench.spaces import Space, open_space
from moecore.bench.workloads import Lab, SkippedError, Work, prepare
from moecore.models import MODELS

__all__ = ["OPS", "knobs_in", "run"]

OPS: dict[str, str] = {
    "route": "f32",
    "plan": "i32",
    "permute": "bf16",
    "activate": "bf16",
    "quantize": "fp8_block128",
    "finalize": "bf16",
    "grouped_gemm.up": "bf16",
    "grouped_gemm.down": "bf16",
}
"""What can be tuned, and the type it is tuned with unless --dtype says otherwise."""

_PROBE = "?=0"  # no knob is called so: the refusal lists those on offer
_SECONDS = 0.02  # of one measurement


@dataclasses.dataclass
class _Point:
    """One op, model and T."""

    case: Case
    work: Work
    sizes: dict[str, int]


def run(
    op: str,
    models: Sequence[str],
    tokens: Sequence[int],
    dtype: str,
    seconds: float,
    threshold: float,
    out: Path | None,
) -> int:
    """Searches, prints what would change, and writes `out`. ValueError for an op without policies."""
    if op not in OPS:
        raise ValueError(f"{op} has no launch policies, expected one of {', '.join(OPS)}")
    space = open_space("cuda")
    lab, gpu = Lab(space), _gpu_sizes()
    points = len(models) * len(tokens)
    print(f"tuning {op} on {space}: {points} sizes in {seconds:.0f} s")
    lines: list[str] = []
    begin, done = time.monotonic(), 0
    for model in models:
        counts = sorted(tokens)
        for i, count in enumerate(counts):
            done += 1
            deadline = begin + seconds * done / points
            name, _, part = op.partition(".")
            case = Case(name, MODELS[model], count, dtype or OPS[op], part)
            try:
                point = _Point(case, prepare(lab, case), sizes(case))
                found = _search(space, point, deadline, threshold)
            except (SkippedError, NotImplementedError) as error:
                print(f"{case.name:<50} skipped: {error}")
                continue
            if found is not None:
                policy, gain = found
                following = counts[i + 1] if i + 1 < len(counts) else None
                holds = condition(point.sizes, count, following, gpu)
                lines.append(f"{name} {holds} : {policy}  # {gain:.2f}x, {case.name}")
    header = f"# moecore {moecore.__version__} {machine.commit()}, {space}: moecore tune {op}"
    text = "\n".join([header, *lines]) + "\n"
    if not lines:
        print(f"nothing is faster than the defaults by more than {threshold:.0%}")
    else:
        print(f"\n{text}", end="")
    if out is not None:
        out.write_text(text)
        print(f"MOECORE_TUNING={out} loads {_core.check_tuning(str(out))} policies")
    return 0


def knobs_in(refusal: str) -> dict[str, list[int]]:
    """The knobs that a refused policy lists: "... expected one of slots=1|2|4 threads=32|64"."""
    listed = refusal.rpartition("expected one of")[2]
    return {
        name: [int(value) for value in values.split("|")]
        for name, values in re.findall(r"(\w+)=(-?\d+(?:\|-?\d+)*)", listed)
    }


def sizes(case: Case) -> dict[str, int]:
    """What a line can ask about a call, as the library counts it, per token where it grows with T."""
    layer, k = case.layer, case.layer.top_k
    if case.op == "grouped_gemm":
        wide = (2 * layer.inter, layer.hidden) if case.part == "up" else (layer.hidden, layer.inter)
        return {"per_token": k, "width": wide[0], "depth": wide[1], "experts": layer.num_experts}
    return {
        "route": {"per_token": 1, "experts": layer.num_experts},
        "plan": {"per_token": k, "experts": layer.num_experts},
        "permute": {"per_token": k, "width": layer.hidden * (1 if case.dtype == "e4m3" else 2)},
        "activate": {"per_token": k, "width": layer.inter},
        "quantize": {"per_token": 1, "width": layer.hidden},
        "finalize": {"per_token": 1, "width": layer.hidden},
    }[case.op]


def condition(sizes: dict[str, int], tokens: int, following: int | None, gpu: dict[str, int]) -> str:
    """Rows from this T up to halfway, in ratio, to the one measured next."""
    per_token = sizes["per_token"]
    most = tokens * per_token if following is None else int(per_token * math.sqrt(tokens * following))
    exact = {name: value for name, value in (sizes | gpu).items() if name != "per_token"}
    return " ".join(
        [
            f"rows>={tokens * per_token}",
            f"rows<={most}",
            *(f"{name}={value}" for name, value in exact.items()),
        ]
    )


def _gpu_sizes() -> dict[str, int]:
    import torch

    facts = torch.cuda.get_device_properties(0)
    return {"sms": facts.multi_processor_count, "capability": 10 * facts.major + facts.minor}


def _search(space: Space, point: _Point, deadline: float, threshold: float) -> tuple[str, float] | None:
    """Coordinate descent from the default policy; None when nothing beats it by `threshold`."""
    op, calls = point.case.op, point.work.calls
    offered = _offered(op, point.work)

    def measure(policy: str, seconds: float = _SECONDS) -> float:
        _core.set_policy(policy)
        try:
            return space.time(calls, seconds).median_us
        finally:
            _core.set_policy("")

    default = best = measure("")
    chosen: dict[str, int] = {}
    for name, value in _moves(offered, chosen):
        if time.monotonic() > deadline:
            break
        trial = chosen | {name: value}
        try:
            us = measure(_text(op, trial))
        except ValueError:  # this combination is not one
            continue
        if us < best * (1 - threshold / 4):
            best = us
            chosen[name] = value
    if chosen:  # once more, in turn
        pairs = [(measure("", 0.04), measure(_text(op, chosen), 0.04)) for _ in range(3)]
        default, best = (sorted(times)[1] for times in zip(*pairs, strict=True))
    gain = default / best
    policy = " ".join(f"{name}={value}" for name, value in chosen.items())
    pays = bool(chosen) and gain > 1 + threshold
    print(
        f"{point.case.name:<50} {duration(default):>10} -> {duration(best):>10} {gain:>6.2f}x  "
        f"{policy if pays else 'keep'}",
        flush=True,
    )
    return (policy, gain) if pays else None


def _text(op: str, chosen: dict[str, int]) -> str:
    return " ".join(f"{op}.{name}={value}" for name, value in chosen.items())


def _offered(op: str, work: Work) -> dict[str, list[int]]:
    """The knobs of this call."""
    _core.set_policy(f"{op}.{_PROBE}")
    try:
        work.calls[0]()
    except ValueError as error:
        return knobs_in(str(error))
    finally:
        _core.set_policy("")
    return {}


def _moves(offered: dict[str, list[int]], chosen: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Every value of every knob, twice: what the second knob wants may depend on the first."""
    for _ in range(2):
        for name, values in offered.items():
            for value in values:
                if len(values) > 1 and chosen.get(name) != value:
                    yield name, value
