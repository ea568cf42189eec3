#!/usr/bin/env python3
"""Tables and pictures from bench/results/*.jsonl: docs/performance.md, docs/*.svg and the README's table.

    PYTHONPATH=build/dev/python python bench/report.py            # rewrites them
    PYTHONPATH=build/dev/python python bench/report.py --check    # exit 1 if anything would change

Reads every file that `moecore bench --out` wrote there. Where files of one machine hold a case twice the
later one counts, with its peers: a time holds beside those of its own run only. Text is replaced between
`<!-- bench:NAME -->` and `<!-- /bench -->`. Pictures need matplotlib; the same results give the same bytes,
but for the last digit of a coordinate on another CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moecore.bench.cases import OPS
from moecore.models import MODELS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6a4f", "#555555")
TITLES = {
    "fused_experts": "The whole layer, `fused_experts`",
    "grouped_gemm.up": "The first product, `grouped_gemm` with N = 2I",
    "grouped_gemm.down": "The second product, `grouped_gemm` with N = H",
}
BEHIND = 0.97  # a ratio below says that a peer is faster, and not by noise
LAYER_DTYPES = ("bf16", "fp8_block128", "mxfp4")


@dataclasses.dataclass
class Machine:
    """What one machine's files hold."""

    name: str
    is_gpu: bool
    runs: list[dict[str, Any]]
    times: dict[tuple[str, str], dict[str, Any]]

    def ours(self) -> list[dict[str, Any]]:
        """Records of moecore."""
        return [t for (_, by), t in self.times.items() if by == "moecore"]

    def best_peer(self, case: str) -> dict[str, Any] | None:
        """The fastest peer whose result was right, or could not be compared."""
        peers = [t for (c, by), t in self.times.items() if c == case and by != "moecore"]
        return min((t for t in peers if t.get("check") != "FAIL"), key=lambda t: t["us"], default=None)


def load(folder: Path) -> list[Machine]:
    """The machines, GPUs first."""
    files = []
    for path in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if records and records[0].get("record") == "run" and "schema" in records[0]:
            files.append(records)
    machines: dict[str, Machine] = {}
    for records in sorted(files, key=lambda r: r[0]["date"]):
        hardware = records[0]["hardware"]
        name = hardware["name"]
        if hardware["device"] == "cpu":
            name += f", {hardware['isa']}, {hardware['threads']} threads"
        machine = machines.setdefault(name, Machine(name, hardware["device"] != "cpu", [], {}))
        machine.runs.append(records[0])
        for case, found in by_case(records[1:]).items():
            for key in [key for key in machine.times if key[0] == case]:
                del machine.times[key]
            machine.times |= {(case, by): record for by, record in found.items()}
    return sorted(machines.values(), key=lambda m: (not m.is_gpu, m.name))


def by_case(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Times of uniform routing: case, then who."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        if "us" in record and record["routing"] == "uniform":
            found.setdefault(record["case"], {})[record["by"]] = record
    return found


# --- Tables -------------------------------------------------------------------------------------------------


def number(us: float) -> str:
    """Three digits."""
    return f"{us:.3g}" if us < 1000 else f"{us:,.0f}".replace(",", " ")


def cell(machine: Machine, record: dict[str, Any]) -> str:
    """Time, share of the roof, speed-up over the best peer."""
    text = f"{number(record['us'])} ({record['of_roof']:.0%})"
    peer = machine.best_peer(record["case"])
    if peer is not None:
        text += f" {peer['us'] / record['us']:.2f}x"
    return text if record["check"] == "pass" else f"WRONG {text}"


def op_key(record: dict[str, Any]) -> str:
    return f"{record['op']}.{record['part']}" if record["part"] else record["op"]


def op_keys(machine: Machine) -> list[str]:
    found = {op_key(t) for t in machine.ours()}
    order = ["fused_experts", "grouped_gemm.up", "grouped_gemm.down", *OPS]
    return [key for key in dict.fromkeys(order) if key in found]


def op_table(machine: Machine, key: str) -> str:
    """One op: a row per model and type, a column per T."""
    records = [t for t in machine.ours() if op_key(t) == key]
    tokens = sorted({t["tokens"] for t in records})
    rows = {}
    for t in records:
        rows.setdefault((list(MODELS).index(t["model"]), t["model"], t["dtype"]), {})[t["tokens"]] = t
    order = {dtype: i for i, dtype in enumerate(dict.fromkeys(t["dtype"] for t in records))}
    lines = [
        "| layer | type | " + " | ".join(f"T={t}" for t in tokens) + " |",
        "|---|---|" + "---|" * len(tokens),
    ]
    for (_, model, dtype), cells in sorted(rows.items(), key=lambda r: (r[0][0], order[r[0][2]])):
        texts = (cell(machine, cells[t]) if t in cells else "" for t in tokens)
        lines.append(f"| {model} | {dtype} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def machine_text(machine: Machine) -> str:
    """What was measured, by which command, against which roof."""
    lines = []
    for run in machine.runs:
        roof = run["roof"]
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        hardware = ", ".join(f"{k} {v}" for k, v in run["hardware"].items() if v not in ("", None))
        bandwidth = ", ".join(f"{k} {roof[k]:,.0f}" for k in ("read", "write", "copy") if roof[k])
        rates = ", ".join(f"{k} {roof[k] / 1e3:,.3g}" for k in ("f32", "bf16", "fp8") if roof[k])
        lines += [
            f"- `{run['command']}`, commit {run['commit'] or 'unknown'}, {run['date'][:10]}",
            f"  - {hardware}; {versions}",
            f"  - roof of the run: {bandwidth} GB/s; {rates} TFLOP/s",
        ]
        if run["peers"]:
            lines.append("  - peers: " + ", ".join(f"{k} ({v})" for k, v in run["peers"].items()))
        if run["missing_peers"]:
            lines.append("  - not there: " + ", ".join(run["missing_peers"]))
    return "\n".join(lines)


def tables(machine: Machine) -> str:
    """Everything of one machine."""
    parts = [machine_text(machine)]
    for key in op_keys(machine):
        peers = sorted({by for (_, by), t in machine.times.items() if op_key(t) == key and by != "moecore"})
        parts.append(f"### {TITLES.get(key, f'`{key}`')}\n")
        if peers:
            parts[-1] += f"\nBeside: {', '.join(peers)}.\n"
        parts[-1] += "\n" + op_table(machine, key)
    return "\n\n".join(parts)


def summary(machine: Machine) -> str:
    """One row per op: the geometric means over all cases, small and large batches apart."""
    beside: dict[str, int] = {}
    for t in machine.times.values():
        if "peer" in t:
            beside[t["peer"]] = beside.get(t["peer"], 0) + 1
    lines = [
        f"{len(machine.ours())} cases; measurements of peers: "
        + ", ".join(f"{name} {count}" for name, count in sorted(beside.items()))
        + ". A ratio is to the fastest of those that the case's own run had.",
        "",
        "| op | type | cases | of roof, T >= 1024 | best peer's time over ours: T <= 8 | 64, 256 | >= 1024 |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for t in machine.ours():
        groups.setdefault((op_key(t), t["dtype"]), []).append(t)
    keys = op_keys(machine)
    for (key, dtype), records in sorted(groups.items(), key=lambda g: keys.index(g[0][0])):
        large = [t for t in records if t["tokens"] >= 1024]
        share = f"{mean(t['of_roof'] for t in large):.0%}" if large else ""
        cells = []
        for low, high in ((1, 8), (9, 256), (257, 1 << 30)):
            ratios = [
                peer["us"] / t["us"]
                for t in records
                if low <= t["tokens"] <= high and (peer := machine.best_peer(t["case"]))
            ]
            cells.append(f"{mean(ratios):.2f}x" if ratios else "")
        lines.append(f"| `{key}` | {dtype} | {len(records)} | {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    found = list(values)
    return math.exp(sum(math.log(v) for v in found) / len(found))


def behind(machine: Machine) -> str:
    """Per op and type, the cases in which a peer is faster."""
    groups: dict[tuple[str, str], list[tuple[float, dict[str, Any], dict[str, Any]]]] = {}
    for t in machine.ours():
        peer = machine.best_peer(t["case"])
        if peer is not None:
            groups.setdefault((op_key(t), t["dtype"]), []).append((peer["us"] / t["us"], t, peer))
    keys = op_keys(machine)
    lines = ["| op | type | cases behind | T | worst |", "|---|---|---|---|---|"]
    for (key, dtype), found in sorted(groups.items(), key=lambda g: keys.index(g[0][0])):
        slower = [case for case in found if case[0] < BEHIND]
        if slower:
            ratio, ours, peer = min(slower, key=lambda case: case[0])
            tokens = sorted({t["tokens"] for _, t, _ in slower})
            lines.append(
                f"| `{key}` | {dtype} | {len(slower)} of {len(found)} | {', '.join(map(str, tokens))} | "
                f"{ratio:.2f}x, {ours['model']} at T = {ours['tokens']}, {peer['by']} |"
            )
    return "\n".join(lines)


def readme(machines: list[Machine]) -> str:
    """The layer at a few batch sizes, in milliseconds."""
    lines = ["| machine | layer | weights | T | moecore | fastest other |", "|---|---|---|---|---|---|"]
    models = ("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3")
    for machine in machines:
        times = {t["case"]: t for t in machine.ours() if t["op"] == "fused_experts"}
        for model in models:
            for dtype in LAYER_DTYPES:
                cases = [f"fused_experts/{model}/T{t}/{dtype}" for t in (1, 64, 1024, 4096)]
                cases = [c for c in cases if c in times]
                if not cases:
                    continue
                peers = [machine.best_peer(c) for c in cases]
                by = " or ".join(sorted({p["by"] for p in peers if p}))
                others = " / ".join(f"{p['us'] / 1e3:.3g}" if p else "-" for p in peers)
                counts = " / ".join(str(times[c]["tokens"]) for c in cases)
                ours = " / ".join(f"{times[c]['us'] / 1e3:.3g}" for c in cases)
                lines.append(
                    f"| {short_name(machine)} | {model} | {dtype} | {counts} | {ours} | "
                    f"{f'{others} ({by})' if by else 'not measured'} |"
                )
    return "\n".join(lines)


def short_name(machine: Machine) -> str:
    if machine.is_gpu:
        return machine.name.removeprefix("NVIDIA ")
    hardware = machine.runs[-1]["hardware"]
    return f"{hardware['threads']} cores, {hardware['isa']}"


def fill(text: str, blocks: dict[str, str]) -> str:
    """Replaces what stands between the markers."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in blocks:
            return match.group(0)
        return f"<!-- bench:{name} -->\n{blocks[name]}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\S+) -->.*?<!-- /bench -->", block, text, flags=re.DOTALL)


# --- Pictures -----------------------------------------------------------------------------------------------


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "moecore",  # element ids, otherwise random
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "legend.frameon": False,
            "figure.facecolor": "white",
        }
    )
    import matplotlib.pyplot as plt

    return plt


def svg(figure: Any) -> bytes:
    """Bytes that depend on the drawing alone: hundredths of a point, ids in order of appearance."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    pyplot().close(figure)
    text = re.sub(r"[ \t]+\n", "\n", buffer.getvalue())
    text = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found.group()):.2f}", text)
    names: dict[str, str] = {}
    text = re.sub(
        r"\b[a-z][0-9a-f]{10}\b", lambda found: names.setdefault(found.group(), f"e{len(names)}"), text
    )
    return text.encode()


def same(before: bytes, after: bytes) -> bool:
    """Equal but for the last digit of a picture's numbers, which depends on the machine's arithmetic."""
    number = rb"-?\d+(?:\.\d+)?"
    if re.sub(number, b"0", before) != re.sub(number, b"0", after):
        return False
    pairs = zip(re.findall(number, before), re.findall(number, after), strict=True)
    return before == after or all(abs(float(a) - float(b)) < 0.015 for a, b in pairs)


def draw_layer_roofline(machine: Machine) -> bytes:
    """FLOP rate of the layer and its products over FLOP per byte, below the roofs of the run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    roof = machine.runs[-1]["roof"]
    for axis, op in zip(axes, ("fused_experts", "grouped_gemm"), strict=True):
        records = [t for t in machine.ours() if t["op"] == op]
        rates = {"bf16": roof["bf16"] or roof["f32"], "fp8": roof["fp8"]}
        span = [10 ** (x / 20) for x in range(-10, 81)]
        for name, rate in rates.items():
            if rate:
                tops = [min(rate, x * roof["read"]) / 1e3 for x in span]
                axis.plot(span, tops, color="#999999", lw=1)
                axis.annotate(name, (span[-1], rate / 1e3), color="#777777", va="bottom", ha="right")
        for i, dtype in enumerate(dict.fromkeys(t["dtype"] for t in records)):
            points = [t for t in records if t["dtype"] == dtype]
            axis.scatter(
                [t["flops"] / t["bytes"] for t in points],
                [t["tflop_per_s"] for t in points],
                s=14,
                color=COLORS[i],
                label=dtype,
                zorder=3,
            )
        axis.set(xscale="log", yscale="log", title=op, xlabel="FLOP per byte")
        if records:
            axis.legend(loc="lower right")
    axes[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"{short_name(machine)}: all layers and batch sizes below the measured roof", y=1.03)
    return svg(figure)


def draw_ops_roofline(machine: Machine) -> bytes:
    """Share of the roof over bytes moved, for ops that only move data."""
    plt = pyplot()
    keys = [key for key in op_keys(machine) if key.partition(".")[0] not in ("fused_experts", "grouped_gemm")]
    columns = 4
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.4 * rows), sharex=True, sharey=True)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, keys, strict=False):
        records = [t for t in machine.ours() if op_key(t) == key]
        for i, dtype in enumerate(dict.fromkeys(t["dtype"] for t in records)):
            points = sorted((t for t in records if t["dtype"] == dtype), key=lambda t: t["bytes"])
            axis.plot(
                [t["bytes"] for t in points],
                [100 * t["of_roof"] for t in points],
                "o",
                ms=2.5,
                color=COLORS[i],
                label=dtype,
            )
        axis.axhline(100, color="#999999", lw=1)
        axis.set(xscale="log", title=key)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6, loc="upper left", handletextpad=0.1)
    figure.supxlabel("bytes that have to move")
    figure.supylabel("% of the measured roof")
    figure.suptitle(f"{short_name(machine)}: data movement")
    figure.tight_layout()
    return svg(figure)


def draw_speedup(machine: Machine) -> bytes:
    """Bars: geometric mean over layers of the best peer's time over moecore's."""
    plt = pyplot()
    groups = {"T <= 8": (1, 8), "T = 64, 256": (9, 256), "T >= 1024": (257, 1 << 30)}
    bars: dict[tuple[str, str], dict[str, list[float]]] = {}
    for t in machine.ours():
        peer = machine.best_peer(t["case"])
        if peer is None:
            continue
        group = next(name for name, (low, high) in groups.items() if low <= t["tokens"] <= high)
        ratios = bars.setdefault((op_key(t), t["dtype"]), {}).setdefault(group, [])
        ratios.append(peer["us"] / t["us"])
    keys = op_keys(machine)
    labels = sorted(bars, key=lambda label: keys.index(label[0]))
    figure, axis = plt.subplots(figsize=(10, 0.42 * len(labels) + 1.2))
    for i, group in enumerate(groups):
        places = [y + (i - 1) * 0.26 for y, label in enumerate(labels) if group in bars[label]]
        values = [mean(bars[label][group]) for label in labels if group in bars[label]]
        axis.barh(places, [v - 1 for v in values], 0.24, left=1, color=COLORS[i], label=group)
    axis.axvline(1, color="#333333", lw=1)
    axis.set_yticks(range(len(labels)), [f"{key} {dtype}" for key, dtype in labels])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="times as fast as the best peer (geometric mean over layers)")
    ticks = [0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10]
    widths = [value for by_group in bars.values() for values in by_group.values() for value in values]
    ticks = [tick for tick in ticks if min(widths) * 0.7 < tick < max(widths) * 1.4]
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right")
    axis.set_title(f"{short_name(machine)}: beside the fastest of the other libraries")
    return svg(figure)


def draw_time(machine: Machine) -> bytes:
    """Time of the layer over T, per model; peers dashed."""
    plt = pyplot()
    records = [t for t in machine.ours() if t["op"] == "fused_experts"]
    models = [m for m in MODELS if any(t["model"] == m for t in records)]
    figure, axes = plt.subplots(1, len(models), figsize=(3.1 * len(models), 3.2), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        for i, dtype in enumerate(LAYER_DTYPES):
            points = sorted(
                (t for t in records if t["model"] == model and t["dtype"] == dtype), key=lambda t: t["tokens"]
            )
            if not points:
                continue
            axis.plot(
                [t["tokens"] for t in points],
                [t["us"] for t in points],
                "o-",
                ms=3,
                color=COLORS[i],
                label=dtype,
            )
            least = [t["roof_us"] for t in points]
            axis.plot([t["tokens"] for t in points], least, ":", lw=0.8, color=COLORS[i])
            peers = [(t["tokens"], p["us"]) for t in points if (p := machine.best_peer(t["case"]))]
            if peers:
                axis.plot(
                    *zip(*peers, strict=True),
                    "x--",
                    ms=4,
                    lw=0.9,
                    color=COLORS[i],
                    label=f"{dtype}, best peer",
                )
        axis.set(xscale="log", yscale="log", title=model, xlabel="tokens")
        axis.legend(fontsize=6)
    axes.flat[0].set_ylabel("us")
    figure.suptitle(f"{short_name(machine)}: the layer; dotted: the measured roof", y=1.03)
    figure.tight_layout()
    return svg(figure)


PICTURES: dict[str, Callable[[Machine], bytes]] = {
    "roofline-layer": draw_layer_roofline,
    "roofline-ops": draw_ops_roofline,
    "speedup": draw_speedup,
    "time": draw_time,
}


# --- Files --------------------------------------------------------------------------------------------------


def build(results: Path, root: Path) -> dict[Path, bytes]:
    """Every file that the results determine, with its contents."""
    machines = load(results)
    blocks = {"readme": readme(machines)}
    files: dict[Path, bytes] = {}
    for machine in machines:
        tag = "gpu" if machine.is_gpu else "cpu"
        blocks |= {
            f"{tag}-summary": summary(machine),
            f"{tag}-behind": behind(machine),
            f"{tag}-tables": tables(machine),
        }
        for name, draw in PICTURES.items():
            if name in ("time", "roofline-layer") and "fused_experts" not in op_keys(machine):
                continue
            files[root / "docs" / f"{name}-{tag}.svg"] = draw(machine)
    for path in (root / "docs" / "performance.md", root / "README.md"):
        if path.exists():
            files[path] = fill(path.read_text(), blocks).encode()
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if something would change"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")
    args = parser.parse_args()
    stale = []
    for path, contents in build(args.results, args.root).items():
        before = path.read_bytes() if path.exists() else b""
        if before == contents or (path.suffix == ".svg" and same(before, contents)):
            continue
        stale.append(path)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        print(f"{'stale' if args.check else 'written'}: {path}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
