#!/usr/bin/env python3
"""The CPU expert layer against transformers' own experts implementations, on one machine in one run.

A Qwen3MoeExperts module with random weights is the common ground: `eager`, `batched_mm` and `grouped_mm` run
it as transformers does, moecore runs fused_experts() on the same parameter tensors. Candidates alternate for
several rounds; every call has its own random routing (uniform, K distinct experts a token), so at T = 1 the
weights of a call are not the last one's, and all weights together (1.2 GB) are far larger than any cache.
Reported: the median over rounds of each round's median call, the bytes of the touched experts' weights over
that time as a share of the measured read bandwidth, and the layer's flops over that time as a share of the
measured peak.

    PYTHONPATH=build/dev/python python bench/layer_vs_transformers.py --threads 2

Needs torch and transformers; appends a JSON line per measurement to bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

SHAPES = {
    # name: experts, top_k, hidden, inter
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "small": (16, 4, 512, 256),
}
PEERS = ("eager", "batched_mm", "grouped_mm")
MAX_COPY_BYTES = 8 << 30


def cpu_model() -> str:
    """The CPU's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Measures, prints a table, appends the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one candidate in one round")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "layer_vs_transformers.jsonl"
    )
    args = parser.parse_args()
    os.environ["MOECORE_NUM_THREADS"] = str(args.threads)  # read by measure_roof and the pool

    import moecore
    import torch
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.set_num_threads(args.threads)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[args.dtype]
    num_experts, top_k, hidden, inter = SHAPES[args.shape]
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_experts=num_experts,
        num_local_experts=num_experts,
        hidden_size=hidden,
        moe_intermediate_size=inter,
        intermediate_size=inter,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    module = Qwen3MoeExperts(config).eval().requires_grad_(False)
    torch.set_default_dtype(previous)
    for parameter in module.parameters():
        for expert in parameter:  # expert by expert, so that no f32 copy of all weights is made
            expert.copy_(torch.randn(expert.shape) * expert.shape[-1] ** -0.5)

    experts = moecore.Experts(
        module.gate_up_proj.data, module.down_proj.data, order="gate_up", activation="silu"
    )
    roof = moecore.measure_roof("cpu")
    peak = roof.bf16_flop_per_s if args.dtype == "bf16" else roof.f32_flop_per_s
    hardware = {
        "cpu": cpu_model(),
        "threads": args.threads,
        "isa": moecore._core.cpu_isa(),
        "read_gb_per_s": round(roof.read_bytes_per_s / 1e9, 2),
        "peak_gflop_per_s": round(peak / 1e9, 1),
    }
    versions = {lib.__name__: lib.__version__ for lib in (moecore, torch, transformers)}
    print(f"{args.shape} {args.dtype}: {hardware}, {versions}")
    columns = f"{'T':>6} {'candidate':<12} {'ms':>9} {'GB/s':>7} {'read':>6} {'GFLOP/s':>8} {'peak':>6}"
    print(f"{columns} {'moecore is':>11}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    for tokens in args.tokens:
        calls = 32 if tokens < 16 else 4
        x = torch.randn(calls, tokens, hidden, dtype=dtype)
        scores = torch.rand(calls, tokens, num_experts)
        ids = scores.topk(top_k, dim=-1).indices
        weights = torch.rand(calls, tokens, top_k).softmax(-1).to(dtype)
        element = torch.finfo(dtype).bits // 8
        touched = statistics.mean(len(i.unique()) for i in ids) * 3 * inter * hidden * element
        flops = 6.0 * tokens * top_k * inter * hidden

        def run_peer(i: int, name: str) -> torch.Tensor:
            config._experts_implementation = name
            return module(x[i], ids[i], weights[i])  # noqa: B023

        def run_moecore(i: int) -> torch.Tensor:
            return moecore.fused_experts(x[i], weights[i], ids[i], experts)  # noqa: B023

        candidates: dict[str, Callable[[int], torch.Tensor]] = {"moecore": run_moecore}
        for name in args.peers:
            if name == "batched_mm" and tokens * top_k * 3 * inter * hidden * element > MAX_COPY_BYTES:
                print(f"{tokens:>6} {name:<12} skipped: it copies the weights of every route")
                continue
            candidates[name] = lambda i, name=name: run_peer(i, name)

        with torch.no_grad():
            reference = run_peer(0, "eager").float() if "eager" in candidates else run_moecore(0).float()
            error = ((run_moecore(0).float() - reference).norm() / reference.norm()).item()
            if error > 0.02:
                sys.exit(f"moecore differs from eager by {error:.3g} of its norm")
            rounds: dict[str, list[float]] = {name: [] for name in candidates}
            for _ in range(args.rounds):
                for name, call in candidates.items():
                    gc.collect()
                    time.sleep(0.05)  # the other library's threads go to sleep
                    call(calls - 1)
                    times: list[float] = []
                    while not times or (sum(times) < args.seconds and len(times) < 4 * calls):
                        start = time.perf_counter()
                        call(len(times) % calls)
                        times.append(time.perf_counter() - start)
                    rounds[name].append(statistics.median(times))

        medians = {name: statistics.median(times) for name, times in rounds.items()}
        with args.out.open("a") as lines:
            for name, seconds in medians.items():
                record = {
                    "shape": args.shape,
                    "dtype": args.dtype,
                    "tokens": tokens,
                    "candidate": name,
                    "ms": round(seconds * 1e3, 4),
                    "rounds_ms": [round(t * 1e3, 4) for t in rounds[name]],
                    "weight_gb_per_s": round(touched / seconds / 1e9, 2),
                    "share_of_read": round(touched / seconds / roof.read_bytes_per_s, 3),
                    "gflop_per_s": round(flops / seconds / 1e9, 1),
                    "share_of_peak": round(flops / seconds / peak, 3),
                    "moecore_speedup": round(seconds / medians["moecore"], 3),
                    **hardware,
                    **versions,
                    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    "command": " ".join(["bench/layer_vs_transformers.py", *sys.argv[1:]]),
                }
                lines.write(json.dumps(record) + "\n")
                print(
                    f"{tokens:>6} {name:<12} {record['ms']:>9.3f} {record['weight_gb_per_s']:>7.2f} "
                    f"{record['share_of_read']:>6.1%} {record['gflop_per_s']:>8.1f} "
                    f"{record['share_of_peak']:>6.1%} {record['moecore_speedup']:>10.2f}x"
                )


if __name__ == "__main__":
    main()
