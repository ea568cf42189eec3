"""Runs cases: check, time, and hold every number against the roof of the same run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import moecore
from moecore import _core
from moecore.bench import machine, roof
from moecore.bench.cases import Case, Selection, select
from moecore.bench.peers import Adapter, Peers, adapters
from moecore.bench.spaces import Space, Timing, open_space
from moecore.bench.workloads import Lab, SkippedError, Work, prepare

__all__ = ["SCHEMA", "Request", "run"]

SCHEMA = 1
WRONG = 0.05  # a peer that is further off than this, and than moecore may be, computes something else

HEADER = (
    f"{'case':<50} {'by':<18} {'median':>10} {'spread':>7} {'GB/s':>8} {'TFLOP/s':>8} {'of roof':>8}"
    f" {'rel err':>8} {'to moecore':>11}"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    selection: Selection
    device: str = "auto"
    peers: str = "auto"
    peers_dir: Path | None = None
    seconds: float | None = None
    out: Path | None = None
    command: str = ""


def run(request: Request) -> int:
    """Measures every case, prints the table and writes JSON lines; 1 when a check of moecore failed."""
    space = open_space(request.device)
    peers = _open_peers(request, space)
    cases = select(request.selection)
    print(f"moecore {moecore.__version__} {machine.commit()} on {space}", flush=True)
    for name, why in peers.missing.items():
        print(f"peer {name} is missing: {why}")
    for name, version in peers.found.items():
        print(f"peer {name}: {version}")
    ceiling = roof.measure(space)
    print(f"measured roof: {ceiling}\n")

    runner = _Runner(space, peers, ceiling, request)
    with _Lines(request.out) as lines, _Progress(len(cases)) as progress:
        lines.write(_run_record(request, space, peers, ceiling))
        progress.say(HEADER)
        for case in cases:
            progress.advance(case.name)
            for record in runner.measure(case):
                lines.write(record)
                progress.say(row(record))
    if request.out is not None:
        print(f"\nwritten to {request.out}")
    return 1 if runner.failed else 0


def _open_peers(request: Request, space: Space) -> Peers:
    peers = Peers(request.peers, request.peers_dir, space)
    if space.device == "cpu" and "torch" in peers.found:
        peers.torch.set_num_threads(moecore.get_num_threads() or _core.cpu_threads())
    return peers


class _Runner:
    """Measures one case after the other and remembers whether moecore was ever wrong."""

    def __init__(self, space: Space, peers: Peers, ceiling: roof.Roof, request: Request) -> None:
        self._space, self._peers, self._roof = space, peers, ceiling
        self._lab = Lab(space)
        quick = request.selection.quick
        default = (0.04 if quick else 0.12) if space.device != "cpu" else (0.15 if quick else 0.5)
        self._seconds = request.seconds or default
        self.failed = False

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Records of moecore and of every peer that does this op."""
        try:
            work = prepare(self._lab, case)
            work.run(work.sets[0])
            self._space.synchronize()
            check = work.check(work.output(work.sets[0]))
            timing = self._space.time(work.calls, self._seconds)
        except (SkippedError, NotImplementedError) as error:
            return [self._record(case, "moecore") | {"skipped": str(error).splitlines()[0][:200]}]
        self.failed |= not check.passed
        ours = self._record(case, "moecore", work, timing)
        ours |= {"max_rel_error": _rounded(check.max_rel_error), "check": "pass" if check.passed else "FAIL"}
        ours["kernel"] = _explained(case, work)
        records = [ours]
        for adapter in adapters.get(case.op, ()):
            here = self._space.device in adapter.devices
            if adapter.peer in self._peers.found and here and adapter.suits(case):
                records.append(self._measure_peer(case, adapter, work, timing.median_us))
        del work
        return records

    def _measure_peer(self, case: Case, adapter: Adapter, work: Work, ours_us: float) -> dict[str, Any]:
        try:
            calls = [adapter.prepare(self._peers, s) for s in work.sets]
            calls[0].run()
            self._space.synchronize()
            record: dict[str, Any] = {}
            output = calls[0].result()
            if output is not None:
                check = work.check(_as_tensor(output))
                record["max_rel_error"] = _rounded(check.max_rel_error)
                record["check"] = "pass" if check.passed or check.max_rel_error < WRONG else "FAIL"
            timing = self._space.time([call.run for call in calls], self._seconds)
        except Exception as error:  # a peer's trouble is not the run's
            self._recover()
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            return self._record(case, adapter.name) | {"peer": adapter.peer, "skipped": text[:200]}
        record = self._record(case, adapter.name, work, timing) | record
        return record | {"peer": adapter.peer, "over_moecore": round(timing.median_us / ours_us, 4)}

    def _recover(self) -> None:
        try:
            self._space.synchronize()
        except RuntimeError:
            print("moecore: a peer left the GPU in an error; measure it by itself", file=sys.stderr)
            raise
        self._space.release()

    def _record(
        self, case: Case, by: str, work: Work | None = None, timing: Timing | None = None
    ) -> dict[str, Any]:
        record: dict[str, Any] = {
            "record": "time",
            "case": case.name,
            "op": case.op,
            "part": case.part,
            "model": case.layer.name,
            "tokens": case.tokens,
            "dtype": case.dtype,
            "routing": case.routing,
            "by": by,
        }
        if work is None or timing is None:
            return record
        seconds = timing.median_us * 1e-6
        least = self._roof.seconds(work.read_bytes, work.written_bytes, work.flops, work.rate)
        return record | {
            "shape": work.shape,
            "us": round(timing.median_us, 3),
            "spread": round(timing.spread, 4),
            "samples": timing.samples,
            "sets": len(work.sets),
            "bytes": round(work.read_bytes + work.written_bytes),
            "flops": round(work.flops),
            "gb_per_s": round((work.read_bytes + work.written_bytes) / seconds / 1e9, 2),
            "tflop_per_s": round(work.flops / seconds / 1e12, 3),
            "roof_us": round(least * 1e6, 3),
            "of_roof": round(least / seconds, 4),
            "clock_mhz": timing.clock_mhz,
            "power_w": timing.power_w,
        }


def _as_tensor(output: Any) -> Any:
    """A peer's output as checks read it: torch tensors on the CPU become NumPy arrays."""
    if isinstance(output, tuple):
        return tuple(_as_tensor(part) for part in output)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(output, torch.Tensor) or output.is_cuda:
        return output
    views = {torch.bfloat16: ("int16", "uint16"), torch.float8_e4m3fn: ("uint8", "uint8")}
    if output.dtype in views:
        integer, native = views[output.dtype]
        return output.contiguous().view(getattr(torch, integer)).numpy().view(native)
    return output.numpy()


def _explained(case: Case, work: Work) -> str:
    """Which kernel the op took."""
    _core.explain_begin()
    try:
        work.run(work.sets[0])
    finally:
        text: str = _core.explain_end()
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _run_record(request: Request, space: Space, peers: Peers, ceiling: roof.Roof) -> dict[str, Any]:
    return {
        "record": "run",
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": request.command or shlex.join(["moecore", *sys.argv[1:]]),
        "commit": machine.commit(),
        "hardware": machine.hardware("cpu" if space.device == "cpu" else "cuda"),
        "versions": machine.versions(),
        "roof": {f.name: round(getattr(ceiling, f.name) / 1e9, 2) for f in dataclasses.fields(ceiling)},
        "roof_unit": "GB/s, GFLOP/s",
        "peers": peers.found,
        "missing_peers": peers.missing,
        "timing": "CUDA-graph replay after a read of 300 MB, one node per rotated set; median"
        if space.device != "cpu"
        else "single calls over rotated sets; median",
    }


# --- Output -------------------------------------------------------------------------------------------------


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    name = record["case"]
    if "skipped" in record:
        return f"{name:<50} {record['by']:<18} skipped: {record['skipped'][:80]}"
    error = record.get("max_rel_error")
    text = "-" if "check" not in record else "none" if error is None else f"{error:.1e}" if error else "exact"
    if record.get("check") == "FAIL":
        text = f"!{text}"
    ratio = f"{record['over_moecore']:.2f}x" if "over_moecore" in record else ""
    flops = f"{record['tflop_per_s']:.2f}" if record["flops"] else "-"
    return (
        f"{name:<50} {record['by']:<18} {duration(record['us']):>10} {record['spread']:>6.1%} "
        f"{record['gb_per_s']:>8.1f} {flops:>8} {record['of_roof']:>8.1%} {text:>8} {ratio:>11}"
    )


def duration(us: float) -> str:
    """Microseconds, or milliseconds from a thousand on."""
    return f"{us:.2f} us" if us < 1e3 else f"{us / 1e3:.2f} ms"


class _Lines:
    """JSON lines, flushed one by one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> _Lines:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        return self

    def write(self, record: dict[str, Any]) -> None:
        """One more line."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class _Progress:
    """On standard error: tqdm's bar where it is installed and there is a terminal, else a line at times."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._last = self._start
        self._bar: Any = None
        self._say: Callable[[str], None] = lambda text: print(text, flush=True)
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            tqdm = importlib.import_module("tqdm").tqdm
            self._bar = tqdm(total=total, file=sys.stderr, leave=False, unit="case")
            self._say = tqdm.write

    def __enter__(self) -> _Progress:
        return self

    def say(self, text: str) -> None:
        """A line of the table."""
        self._say(text)

    def advance(self, name: str) -> None:
        """The next case begins."""
        if self._bar is not None:
            self._bar.set_description(name)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._last > 10:
            self._last = now
            print(
                f"{self._done} of {self._total} cases, {now - self._start:.0f} s", file=sys.stderr, flush=True
            )
        self._done += 1

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run records and time records of a file. ValueError names the line that is not one."""
    runs: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            kind = record["record"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a record of a benchmark ({error})") from error
        (runs if kind == "run" else times).append(record)
    return runs, times
