"""``python -m moecore demo``: one full-size expert layer, stage by stage and fused, timed and checked.

Weights are random numbers of a realistic size. Every stage is one public op writing into memory allocated
before the clock starts. The results of a sample of tokens, of all of them when that is cheap, are compared
with the float64 computation of ``moecore.reference`` and must lie within its derived error bound.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moecore
from moecore import reference
from moecore._arrays import Array, Arrays, DeviceMissingError, open_device
from moecore.models import MODELS, MoeLayer

__all__ = ["DemoError", "explain", "run"]

ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2}
_SEED = 7
_TIMED_SECONDS = 0.4  # per stage, after one call to warm up
_CHECKED_WEIGHTS = 700_000_000  # weights that the float64 computation may visit beyond its eight tokens
_LEAST_CHECKED = 8


class DemoError(Exception):
    """The demo cannot run as asked; the message says what to change."""


def run(model: str, tokens: int, dtype: str, device: str, scale: float, threads: int) -> int:
    """Runs the demo and prints its table; 0 when every checked token is within the bound, else 1."""
    layer = MODELS[model].scaled(scale)
    moecore.set_num_threads(threads)
    arrays = _choose_device(device, layer, dtype)
    _require_memory(layer, tokens, dtype, scale)

    print(
        f"moecore {moecore.__version__}, {model}{'' if scale == 1 else f' at scale {scale:g}'}, {dtype}, "
        f"{arrays}"
    )
    print(
        f"T={tokens} tokens, K={layer.top_k} of E={layer.num_experts} experts, H={layer.hidden}, "
        f"I={layer.inter}; weights {layer.weight_bytes(ITEMSIZE[dtype]) / 1e9:.2f} GB"
    )
    with _Progress("measuring what this machine can do"):
        roof = moecore.measure_roof(arrays.device)
    # A device whose 16-bit matrix rate is not measured is held against its f32 rate.
    roof_dtype = dtype if dtype != "f32" and roof.bf16_flop_per_s > 0 else "f32"
    roof_flops = (
        roof.f32_flop_per_s if roof_dtype == "f32" else max(roof.bf16_flop_per_s, roof.f32_flop_per_s)
    )
    print(
        f"measured roof: {roof.read_bytes_per_s / 1e9:.1f} GB/s read, "
        f"{roof_flops / 1e9:.0f} GFLOP/s {roof_dtype}\n"
    )

    data = _Data(layer, tokens, dtype, arrays)
    print(f"{'stage':<14}{'time':>12}{'GB/s':>10}{'GFLOP/s':>10}{'of roof':>9}")
    total = 0.0
    for stage in _stages(data):
        with _Progress(f"timing {stage.name}") as progress:
            seconds = _median_seconds(stage.call, arrays, progress)
        if stage.name == "fused_experts":
            print(f"{'together':<14}{_duration(total):>12}")
        _print_row(stage, seconds, roof.read_bytes_per_s, roof_flops)
        total += seconds
    print(
        "\nGB/s counts what a stage must read and write at least once. 'of roof' is the time that the slower"
        "\nof memory and arithmetic would need, over the time taken; data in a cache can exceed it.\n"
    )
    return _check(data)


def explain(op: str, model: str, tokens: int, dtype: str, device: str) -> str:
    """Which kernel ``op`` takes for the layer of ``model``; its tensors are shapes without contents."""
    layer, arrays = MODELS[model], open_device(device)
    e, k, h, i = layer.num_experts, layer.top_k, layer.hidden, layer.inter
    rows = tokens * k

    def empty(*shape: int, of: str = dtype) -> Any:
        return arrays.empty(shape, of).op

    ids, weights = empty(tokens, k, of="i32"), empty(tokens, k, of="f32")
    offsets, x = empty(e + 1, of="i32"), empty(tokens, h)
    row_token, slot_row = empty(rows, of="i32"), empty(tokens, k, of="i32")
    grouping = moecore.Plan(offsets, offsets, row_token, slot_row, row_token)
    activation: dict[str, Any] = {
        "order": layer.order,
        "alpha": layer.alpha,
        "beta": layer.beta,
        "limit": layer.limit,
    }
    bias = empty(e, of="f32") if layer.selection_bias else None

    def routing() -> dict[str, Any]:
        groups = {"num_groups": layer.num_groups, "topk_groups": layer.topk_groups}
        return {
            "scoring": layer.scoring,
            "bias": bias,
            "renormalize": layer.renormalize,
            "scale": layer.scale,
            **groups,
        }

    calls: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "route": lambda: ((empty(tokens, e, of="f32"), k), routing()),
        "plan": lambda: ((ids, e), {}),
        "route_plan": lambda: ((empty(tokens, e, of="f32"), k), routing()),
        "permute": lambda: ((x, grouping), {}),
        "shuffle_rows": lambda: ((x, row_token), {}),
        "activate": lambda: ((empty(rows, 2 * i), layer.activation), activation),
        "grouped_gemm": lambda: ((empty(rows, h), empty(e, 2 * i, h), offsets), {}),
        "finalize": lambda: ((empty(rows, h), grouping, weights), {}),
        "fused_experts": lambda: (
            (
                x,
                weights,
                ids,
                moecore.Experts(
                    empty(e, 2 * i, h), empty(e, h, i), activation=layer.activation, **activation
                ),
            ),
            {},
        ),
        "transpose_experts": lambda: ((empty(e, h, 2 * i),), {}),
        "quantize": lambda: ((x, "fp8_block128"), {}),
        "dequantize": lambda: (
            (empty(tokens, h, of="u8"), empty(tokens, -(-h // 128), of="f32"), "fp8_block128"),
            {},
        ),
    }
    arguments, options = calls[op]()
    reasons = moecore.explain(op, *arguments, **options)
    return f"{op} of {model}, {tokens} tokens, {dtype}, {arrays}\n{reasons}"


# --- Data ---------------------------------------------------------------------------------------------------


class _Data:
    """Inputs, weights, and room for every stage's output. Letters as in ``MoeLayer``; R = T * K rows."""

    def __init__(self, layer: MoeLayer, tokens: int, dtype: str, arrays: Arrays) -> None:
        self.layer, self.dtype, self.arrays, self.tokens = layer, dtype, arrays, tokens
        e, k, h, i = layer.num_experts, layer.top_k, layer.hidden, layer.inter
        rng = np.random.default_rng(_SEED)
        self.logits = arrays.put(rng.standard_normal((tokens, e), dtype=np.float32) * np.float32(1.5), "f32")
        self.bias: Array | None = None
        if layer.selection_bias:
            self.bias = arrays.put(rng.uniform(-0.1, 0.1, e).astype(np.float32), "f32")
        self.x = arrays.put(_random_bits(rng, (tokens, h), dtype, magnitude=0.6), dtype)
        with _Progress("generating weights", total=2 * e) as progress:
            self.w13 = arrays.put(
                _random_experts(rng, (e, 2 * i, h), dtype, 0.7 / math.sqrt(h), progress), dtype
            )
            self.w2 = arrays.put(_random_experts(rng, (e, h, i), dtype, 0.7 / math.sqrt(i), progress), dtype)
        self.w13_bias: Array | None = None
        self.w2_bias: Array | None = None
        if layer.expert_bias:
            self.w13_bias = arrays.put(_random_bits(rng, (e, 2 * i), dtype, 0.1), dtype)
            self.w2_bias = arrays.put(_random_bits(rng, (e, h), dtype, 0.1), dtype)

        rows = tokens * k
        empty = arrays.empty
        self.weights, self.ids = empty((tokens, k), "f32"), empty((tokens, k), "i32")
        self.plan = moecore.Plan(
            expert_offsets=empty((e + 1,), "i32").op,
            scale_offsets=empty((e + 1,), "i32").op,
            row_token=empty((rows,), "i32").op,
            slot_row=empty((tokens, k), "i32").op,
            row_route=empty((rows,), "i32").op,
        )
        self.rows, self.gate_up = empty((rows, h), dtype), empty((rows, 2 * i), dtype)
        self.inter, self.products = empty((rows, i), dtype), empty((rows, h), dtype)
        self.out, self.fused_out = empty((tokens, h), dtype), empty((tokens, h), dtype)

    @property
    def activation(self) -> dict[str, Any]:
        """The layer's activation, as activate() and Experts() take it besides its kind."""
        a = self.layer
        return {"order": a.order, "alpha": a.alpha, "beta": a.beta, "limit": a.limit}


def _random_bits(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, magnitude: float
) -> npt.NDArray[np.generic]:
    """Numbers of about ``magnitude``, either sign: random mantissas under one exponent are quick to draw."""
    word, mantissa_bits, exponent_bias = {
        "bf16": (np.uint16, 7, 127),
        "f16": (np.uint16, 10, 15),
        "f32": (np.uint32, 23, 127),
    }[dtype]
    width = np.dtype(word).itemsize * 8
    count = math.prod(shape)
    words = rng.integers(0, 2**64 - 1, size=-(-count * width // 64), dtype=np.uint64, endpoint=True).view(
        word
    )[:count]
    words &= word((1 << (width - 1)) | ((1 << mantissa_bits) - 1))
    words |= word((exponent_bias + round(math.log2(magnitude))) << mantissa_bits)
    native = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[dtype]
    return words.view(native).reshape(shape)


def _random_experts(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: str, magnitude: float, progress: _Progress
) -> npt.NDArray[np.generic]:
    native = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[dtype]
    out: npt.NDArray[np.generic] = np.empty(shape, native)
    step = max(1, 2**20 // shape[2])  # rows whose random bits stay in a cache
    for e in range(shape[0]):
        for first in range(0, shape[1], step):
            rows = out[e, first : first + step]
            rows[...] = _random_bits(rng, rows.shape, dtype, magnitude)
        progress.advance()
    return out


def _require_memory(layer: MoeLayer, tokens: int, dtype: str, scale: float) -> None:
    """DemoError with a scale that fits, when the layer does not fit into this machine's free memory."""
    available = _available_bytes()
    needed = _needed_bytes(layer, tokens, dtype)
    if needed <= available:
        return
    full = MODELS[layer.name]
    smaller = (s / 100 for s in range(math.ceil(100 * scale) - 1, 0, -1))
    fitting = next((s for s in smaller if _needed_bytes(full.scaled(s), tokens, dtype) <= available), None)
    advice = "try fewer --tokens" if fitting is None else f"try --scale {fitting:g}"
    raise DemoError(
        f"{layer.name} in {dtype} needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free: {advice}"
    )


def _needed_bytes(layer: MoeLayer, tokens: int, dtype: str) -> int:
    """Memory of the demo: weights, the stages' rows, the check, the interpreter."""
    rows = 2 * tokens * layer.top_k * (2 * layer.hidden + 3 * layer.inter)
    return layer.weight_bytes(ITEMSIZE[dtype]) + rows * ITEMSIZE[dtype] + 300_000_000


def _available_bytes() -> float:
    """Memory this process can still get: what the kernel calls available, within the cgroup's limit."""
    available = math.inf
    try:
        with Path("/proc/meminfo").open() as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return available


# --- Device -------------------------------------------------------------------------------------------------


def _choose_device(device: str, layer: MoeLayer, dtype: str) -> Arrays:
    """The arrays to work with. ``auto`` takes the GPU when one is there and has a kernel for every stage."""
    if device == "cpu":
        return open_device("cpu")
    try:
        arrays = open_device("cuda")
        _try_every_stage(arrays, layer, dtype)
        return arrays
    except (DeviceMissingError, moecore.BackendError, NotImplementedError) as error:
        if device == "cuda":
            raise DemoError(f"--device cuda: {error}") from error
        print(f"on the CPU, because: {error}", file=sys.stderr)
        return open_device("cpu")


def _try_every_stage(arrays: Arrays, layer: MoeLayer, dtype: str) -> None:
    """Runs a thumbnail of the layer, so that a stage without a kernel shows before the weights are made."""
    k, groups = layer.top_k, layer.num_groups
    thumbnail = dataclasses.replace(
        layer, num_experts=max(2 * k, 2 * groups) // groups * groups, hidden=64, inter=64
    )
    for stage in _stages(_Data(thumbnail, 2, dtype, arrays)):
        stage.call()
    arrays.synchronize()


# --- Stages -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stage:
    name: str
    call: Callable[[], Any]
    num_bytes: int
    flops: int = 0


def _stages(d: _Data) -> Iterator[_Stage]:
    """Every stage, with the least it must move and compute.

    A stage reads what the ones before it wrote, and how many experts are touched is known once route ran: run
    each stage before asking for the next.
    """
    layer, size = d.layer, ITEMSIZE[d.dtype]
    t, e, k, h, i = d.tokens, layer.num_experts, layer.top_k, layer.hidden, layer.inter
    r = t * k
    yield _Stage("route", lambda: _route(d), 4 * t * e + 8 * r)
    touched = len(np.unique(d.arrays.get(d.ids)))
    w13_bytes, w2_bytes = touched * 2 * i * h * size, touched * h * i * size
    yield _Stage(
        "plan",
        lambda: moecore.plan(d.ids.op, e, out=d.plan),
        4 * (3 * r + 2 * (e + 1)),
    )
    yield _Stage("permute", lambda: moecore.permute(d.x.op, d.plan, out=d.rows.op), (t + r) * h * size)
    yield _Stage(
        "grouped_gemm 1",
        lambda: moecore.grouped_gemm(
            d.rows.op, d.w13.op, d.plan.expert_offsets, out=d.gate_up.op, bias=_op(d.w13_bias)
        ),
        w13_bytes + r * (h + 2 * i) * size,
        2 * r * 2 * i * h,
    )
    yield _Stage(
        "activate",
        lambda: moecore.activate(d.gate_up.op, layer.activation, **d.activation, out=d.inter.op),
        r * 3 * i * size,
    )
    yield _Stage(
        "grouped_gemm 2",
        lambda: moecore.grouped_gemm(
            d.inter.op, d.w2.op, d.plan.expert_offsets, out=d.products.op, bias=_op(d.w2_bias)
        ),
        w2_bytes + r * (h + i) * size,
        2 * r * i * h,
    )
    yield _Stage(
        "finalize",
        lambda: moecore.finalize(d.products.op, d.plan, d.weights.op, out=d.out.op),
        (r + t) * h * size + 8 * r,
        2 * r * h,
    )
    experts = moecore.Experts(
        d.w13.op,
        d.w2.op,
        activation=layer.activation,
        **d.activation,
        w13_bias=_op(d.w13_bias),
        w2_bias=_op(d.w2_bias),
    )
    yield _Stage(
        "fused_experts",
        lambda: moecore.fused_experts(d.x.op, d.weights.op, d.ids.op, experts, out=d.fused_out.op),
        w13_bytes + w2_bytes + 2 * t * h * size,
        2 * r * 3 * i * h,
    )


def _route(d: _Data) -> None:
    layer = d.layer
    moecore.route(
        d.logits.op,
        layer.top_k,
        out=(d.weights.op, d.ids.op),
        scoring=layer.scoring,
        bias=_op(d.bias),
        num_groups=layer.num_groups,
        topk_groups=layer.topk_groups,
        renormalize=layer.renormalize,
        scale=layer.scale,
    )


def _op(array: Array | None) -> Any:
    return None if array is None else array.op


def _median_seconds(call: Callable[[], Any], arrays: Arrays, progress: _Progress) -> float:
    """The median of at least three calls, after one that is not counted."""
    times: list[float] = []
    call()
    arrays.synchronize()
    while len(times) < 3 or (sum(times) < _TIMED_SECONDS and len(times) < 200):
        progress.advance()
        times.append(arrays.seconds(call))
    return statistics.median(times)


def _print_row(stage: _Stage, seconds: float, read_bytes_per_s: float, flop_per_s: float) -> None:
    roof_seconds = max(stage.num_bytes / read_bytes_per_s, stage.flops / flop_per_s)
    flops = f"{stage.flops / seconds / 1e9:.1f}" if stage.flops else "-"
    print(
        f"{stage.name:<14}{_duration(seconds):>12}{stage.num_bytes / seconds / 1e9:>10.2f}{flops:>10}"
        f"{roof_seconds / seconds:>9.0%}",
        flush=True,
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


# --- Check --------------------------------------------------------------------------------------------------


def _check(d: _Data) -> int:
    """Compares both results with float64 and says so; 1 when the routing or an element is off."""
    layer = d.layer
    ids = d.arrays.get(d.ids).astype(np.int64)
    tokens = _sample(ids, layer)
    logits = d.arrays.get(d.logits)[tokens].astype(np.float64)
    bias = None if d.bias is None else d.arrays.get(d.bias).astype(np.float64)
    weights, routed = reference.route(logits, bias, ids[tokens], layer)

    def values(array: Array, index: Any) -> reference.F64:
        return reference.to_float64(d.arrays.get(array, index))

    x = values(d.x, tokens)
    passed = routed
    print(f"{len(tokens)} of {d.tokens} tokens against float64:")
    print(f"  {'route':<14} {'the right experts' if routed else 'WRONG EXPERTS'}")
    with _Progress("computing in float64", total=len(np.unique(ids[tokens]))) as progress:

        def expert(e: int) -> reference.ExpertWeights:
            progress.advance()
            get = d.arrays.get
            return reference.ExpertWeights(
                get(d.w13, e),
                get(d.w2, e),
                None if d.w13_bias is None else get(d.w13_bias, e),
                None if d.w2_bias is None else get(d.w2_bias, e),
            )

        expected, separate, fused = reference.experts_layer(x, ids[tokens], weights, expert, layer, d.dtype)
    for name, array, bound in (("stage by stage", d.out, separate), ("fused_experts", d.fused_out, fused)):
        error = np.abs(values(array, tokens) - expected)
        within = bool((error <= bound).all())  # a NaN is not
        passed &= within
        print(
            f"  {name:<14} max error {error.max():.2e}, bound {bound.min():.2e} to {bound.max():.2e} "
            f"(at most {(error / bound).max():.1%} of it used), |y| up to {np.abs(expected).max():.3g}: "
            f"{'within the bound' if within else 'OUT OF BOUND'}"
        )
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _sample(ids: npt.NDArray[np.integer], layer: MoeLayer) -> npt.NDArray[np.integer]:
    """Tokens to check, spread over the batch: eight, and more while the experts they use cost little."""
    order = np.random.default_rng(_SEED).permutation(len(ids))
    most = max(1, _CHECKED_WEIGHTS // layer.weights_per_expert)
    seen: set[int] = set()
    for count, token in enumerate(order):
        seen.update(int(e) for e in ids[token])
        if count >= _LEAST_CHECKED and len(seen) > most:
            return np.sort(order[:count])
        if count >= 512:
            return np.sort(order[:count])
    return np.sort(order)


# --- Progress -----------------------------------------------------------------------------------------------


class _Progress:
    """Says on standard error what takes longer than a second. A terminal's line is rewritten and removed."""

    def __init__(self, label: str, total: int = 0) -> None:
        self._label, self._total, self._done = label, total, 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        self._start = self._last = time.monotonic()
        self._shown = self._terminal
        if self._terminal:
            print(f"{self._label:<70}", end="", file=sys.stderr, flush=True)
        return self

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._start < 1 or now - self._last < (0.2 if self._terminal else 5 if self._shown else 1):
            return
        self._last, self._shown = now, True
        share = f" {self._done / self._total:.0%}" if self._total else ""
        text = f"{self._label}{share}, {now - self._start:.0f} s"
        print(
            f"\r{text:<70}" if self._terminal else text,
            end="" if self._terminal else os.linesep,
            file=sys.stderr,
        )
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown and self._terminal:
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)
