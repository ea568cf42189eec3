"""Every case made ready to run: rotated inputs, the call, what it moves and computes, and how to check it.

Letters as everywhere: T tokens, K experts a token, E experts, H hidden, I inter, R = T * K rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

import moecore
from moecore import reference
from moecore.bench import checks
from moecore.bench.cases import Case
from moecore.bench.checks import Check
from moecore.bench.spaces import Space
from moecore.models import MoeLayer

__all__ = ["Lab", "SkippedError", "Work"]

ITEMSIZE = {"f32": 4, "f16": 2, "bf16": 2, "e4m3": 1}
BITS = {"fp8_token": 8, "fp8_block128": 8, "fp8_tensor_static": 8, "mxfp8": 8, "nvfp4": 4, "mxfp4": 4}
_SEED = 7
_CHECKED_ROWS = 32
_CHECKED_COLUMNS = 512
_CHECKED_WEIGHTS = 200_000_000  # that the float64 layer may visit
_MOST_TOKENS_CHECKED = 4


class SkippedError(Exception):
    """The case cannot run here; the message says why."""


@dataclasses.dataclass
class Work:
    """One case. `calls` has an entry for every rotated set, `sets` what peers need of each."""

    shape: str
    sets: list[SimpleNamespace]
    run: Callable[[SimpleNamespace], Any]
    output: Callable[[SimpleNamespace], Any]
    """What `run` wrote."""
    check: Callable[[Any], Check]
    """Of an output of set 0."""
    read_bytes: float
    written_bytes: float
    flops: float = 0.0
    rate: str = ""
    """Whose matrix rate holds: bf16, fp8 or f32; empty for none."""

    @property
    def calls(self) -> list[Callable[[], Any]]:
        """One call per set."""
        return [functools.partial(self.run, s) for s in self.sets]


class Lab:
    """Inputs on one device; what cases share is made once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._weights: tuple[tuple[str, str], Weights] | None = None
        self._oracles: dict[tuple[str, str, str], tuple[checks.F64, checks.F64]] = {}
        self._estimate = (4.0e6, 4.0e6)  # bytes per microsecond, read and written; only sets' number needs it

    def prepare(self, case: Case) -> Work:
        """The case, ready to run. SkippedError says why not."""
        return getattr(self, f"_{case.op}")(case)  # type: ignore[no-any-return]

    def weights(self, layer: MoeLayer, dtype: str) -> Weights:
        """The layer's weights in a type or format; the ones before are dropped."""
        key = (layer.name, dtype)
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            self.space.release()
            needed = Weights.num_bytes(layer, dtype)
            self.need(needed * 1.05)
            self._weights = (key, Weights(self.space, layer, dtype))
        return self._weights[1]

    def need(self, num_bytes: float) -> None:
        """SkippedError where that much memory is not free."""
        free = self.space.free_bytes()
        if num_bytes > 0.9 * free:
            raise SkippedError(f"needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def _sets(self, set_bytes: float, extra_bytes: float = 0.0) -> range:
        """Numbers of the sets to rotate: ``set_bytes`` are rotated, ``extra_bytes`` more are moved."""
        self.need(set_bytes)
        roof_us = (set_bytes + extra_bytes) / 4.0e6
        return range(self.space.num_sets(int(set_bytes), roof_us))

    # --- routing ---

    def _routed(self, case: Case, index: int) -> SimpleNamespace:
        """Ids i32 and weights f32 [T, K] of set ``index``, and a plan of them."""
        layer, put = case.layer, self.space.put
        ids = routed_ids(layer.num_experts, layer.top_k, case.tokens, case.routing, index)
        weights = _router_weights(layer, case.tokens, index)
        return SimpleNamespace(host_ids=ids, ids=put(ids, "i32"), weights=put(weights, "f32"))

    def _planned(self, case: Case, index: int) -> SimpleNamespace:
        s = self._routed(case, index)
        s.plan = moecore.plan(s.ids, case.layer.num_experts)
        return s

    # --- ops of the data path ---

    def _route(self, case: Case) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        e, k = layer.num_experts, layer.top_k
        moved = t * e * ITEMSIZE[case.dtype], 8 * t * k
        rng = np.random.default_rng(_SEED)
        bias = space.put(rng.uniform(-0.1, 0.1, e).astype(np.float32), "f32")

        def make(index: int) -> SimpleNamespace:
            return SimpleNamespace(
                logits=space.normal((t, e), case.dtype, 1.5),
                bias=bias if layer.selection_bias else None,
                weights=space.empty((t, k), "f32"),
                ids=space.empty((t, k), "i32"),
                layer=layer,
            )

        def run(s: SimpleNamespace) -> None:
            moecore.route(
                s.logits,
                k,
                out=(s.weights, s.ids),
                scoring=layer.scoring,
                bias=s.bias,
                num_groups=layer.num_groups,
                topk_groups=layer.topk_groups,
                renormalize=layer.renormalize,
                scale=layer.scale,
            )

        sets = [make(i) for i in self._sets(sum(moved))]
        rows = _sample(t, 512)

        def check(output: Any) -> Check:
            weights, ids = (space.host(x, rows) for x in output)
            logits = reference.to_float64(space.host(sets[0].logits, rows))
            key_bias = None if sets[0].bias is None else space.host(bias).astype(np.float64)
            expected, right = reference.route(logits, key_bias, ids.astype(np.int64), layer)
            found = checks.compare(weights.astype(np.float64), expected, (2 * e + 64) * 2.0**-23 * expected)
            return Check(found.max_rel_error, found.passed and right)

        return Work(f"E{e} K{k}", sets, run, lambda s: (s.weights, s.ids), check, *moved)

    def _plan(self, case: Case) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        e, k = layer.num_experts, layer.top_k
        r = t * k
        moved = 4 * r, 4 * (3 * r + 2 * (e + 1))

        def make(index: int) -> SimpleNamespace:
            s = self._routed(case, index)
            empty = functools.partial(space.empty, dtype="i32")
            s.layer = layer
            s.plan = moecore.Plan(empty((e + 1,)), empty((e + 1,)), empty((r,)), empty((t, k)), empty((r,)))
            s.workspace = space.empty((moecore.plan_workspace_bytes(t, k, e, space.device) or 1,), "u8")
            return s

        def run(s: SimpleNamespace) -> None:
            moecore.plan(s.ids, e, out=s.plan, workspace=s.workspace)

        sets = [make(i) for i in self._sets(sum(moved))]

        def check(output: Any) -> Check:
            ids = sets[0].host_ids.reshape(-1)
            order = np.argsort(ids, kind="stable")
            offsets = np.searchsorted(ids[order], np.arange(e + 1))
            found = [space.host(x) for x in (output.expert_offsets, output.row_token, output.slot_row)]
            slots = np.empty(r, np.int64)
            slots[order] = np.arange(r)
            wanted = [offsets, order // k, slots.reshape(t, k)]
            passed = all(checks.exact(a, b).passed for a, b in zip(found, wanted, strict=True))
            return Check(0.0 if passed else math.inf, passed)

        return Work(f"E{e} K{k}", sets, run, lambda s: s.plan, check, *moved)

    def _permute(self, case: Case, by_map: bool = False) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        h, r, size = layer.hidden, case.tokens * layer.top_k, ITEMSIZE[case.dtype]
        moved = t * h * size + 4 * r, r * h * size

        def make(index: int) -> SimpleNamespace:
            s = self._planned(case, index)
            s.x, s.out = space.normal((t, h), case.dtype), space.empty((r, h), case.dtype)
            return s

        def run(s: SimpleNamespace) -> None:
            if by_map:
                moecore.shuffle_rows(s.x, s.plan.row_token, out=s.out)
            else:
                moecore.permute(s.x, s.plan, out=s.out)

        sets = [make(i) for i in self._sets(sum(moved))]
        rows = _sample(r, _CHECKED_ROWS)

        def check(output: Any) -> Check:
            tokens = space.host(sets[0].plan.row_token, rows)
            return checks.exact(space.host(output, rows), space.host(sets[0].x, tokens))

        return Work(f"K{layer.top_k} H{h}", sets, run, lambda s: s.out, check, *moved)

    def _shuffle_rows(self, case: Case) -> Work:
        return self._permute(case, by_map=True)

    def _activate(self, case: Case) -> Work:
        layer, space = case.layer, self.space
        i, r, size = layer.inter, case.tokens * layer.top_k, ITEMSIZE[case.dtype]
        moved = r * 2 * i * size, r * i * size

        def make(index: int) -> SimpleNamespace:
            return SimpleNamespace(
                layer=layer,
                x=space.normal((r, 2 * i), case.dtype),
                out=space.empty((r, i), case.dtype),
            )

        def run(s: SimpleNamespace) -> None:
            moecore.activate(s.x, layer.activation, **activation_options(layer), out=s.out)

        sets = [make(i) for i in self._sets(sum(moved))]
        rows = _sample(r, _CHECKED_ROWS)

        def check(output: Any) -> Check:
            gate, up = checks.split(reference.to_float64(space.host(sets[0].x, rows)), layer.order)
            expected = checks.activation(gate, up, layer)
            unit, subnormal = checks.ROUNDING[case.dtype]
            bound = (unit + 64 * 2.0**-23) * np.abs(expected) + subnormal
            return checks.compare(reference.to_float64(space.host(output, rows)), expected, bound)

        return Work(f"R{r} I{i}", sets, run, lambda s: s.out, check, *moved)

    def _finalize(self, case: Case) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        h, k, size = layer.hidden, layer.top_k, ITEMSIZE[case.dtype]
        r = t * k
        moved = r * h * size + 8 * r, t * h * size

        def make(index: int) -> SimpleNamespace:
            s = self._planned(case, index)
            s.rows, s.out = space.normal((r, h), case.dtype), space.empty((t, h), case.dtype)
            return s

        def run(s: SimpleNamespace) -> None:
            moecore.finalize(s.rows, s.plan, s.weights, out=s.out)

        sets = [make(i) for i in self._sets(sum(moved))]
        tokens = _sample(t, _CHECKED_ROWS)

        def check(output: Any) -> Check:
            s = sets[0]
            slots = space.host(s.plan.slot_row, tokens).astype(np.int64)
            rows = reference.to_float64(space.host(s.rows, slots.reshape(-1))).reshape(len(tokens), k, h)
            terms = rows * space.host(s.weights, tokens).astype(np.float64)[:, :, None]
            expected = terms.sum(axis=1)
            bound = checks.product_bound(np.abs(terms).sum(axis=1), expected, k, case.dtype)
            return checks.compare(reference.to_float64(space.host(output, tokens)), expected, bound)

        return Work(f"K{k} H{h}", sets, run, lambda s: s.out, check, *moved, flops=0.0)

    # --- quantise ---

    def _quantize(self, case: Case, source: str = "rows") -> Work:
        """``source``: "rows" of a dense x, "gate_up" through the activation, "tokens" through a plan."""
        layer, space, kind = case.layer, self.space, case.dtype
        t, k, bits = case.tokens, layer.top_k, BITS[case.dtype]
        rows = t if source == "rows" else t * k
        read_rows = t if source == "tokens" else rows
        columns = layer.inter if source == "gate_up" else layer.hidden
        width = 2 * columns if source == "gate_up" else columns
        fmt = quant_format(kind)
        scale_rows, scale_columns = (int(n) for n in fmt.scale_shape(rows, columns))
        scale_bytes = scale_rows * scale_columns * (4 if fmt.has_f32_scales else 1)
        moved = read_rows * width * 2, rows * columns * bits // 8 + scale_bytes
        global_scale = (
            space.put(np.full(1, checks.GLOBAL_SCALE, np.float32), "f32") if kind == "nvfp4" else None
        )
        static = space.put(np.full((1, 1), checks.STATIC_SCALE, np.float32), "f32")

        def make(index: int) -> SimpleNamespace:
            s = self._planned(case, index) if source == "tokens" else SimpleNamespace()
            s.layer, s.x = layer, space.normal((read_rows, width), "bf16")
            s.data = space.empty((rows, columns * bits // 8), "u8")
            s.scales = (
                static
                if kind == "fp8_tensor_static"
                else space.empty((scale_rows, scale_columns), "f32" if fmt.has_f32_scales else "u8")
            )
            return s

        options: dict[str, Any] = {"global_scale": global_scale}
        if source == "gate_up":
            options |= {"activation": layer.activation, **activation_options(layer)}

        def run(s: SimpleNamespace) -> None:
            plan = {"plan": s.plan} if source == "tokens" else {}
            moecore.quantize(s.x, fmt, out=(s.data, s.scales), **options, **plan)

        sets = [make(i) for i in self._sets(sum(moved))]
        sample = _sample(rows, _CHECKED_ROWS)

        def check(output: Any) -> Check:
            data, scales = output
            from_rows = space.host(sets[0].plan.row_token, sample) if source == "tokens" else sample
            x = reference.to_float64(space.host(sets[0].x, from_rows))
            if source == "gate_up":
                x = checks.activation(*checks.split(x, layer.order), layer)
            held = space.host(scales) if scales.shape[0] == 1 else space.host(scales, sample)
            actual = checks.dequantize_rows(space.host(data, sample), held, kind, checks.GLOBAL_SCALE)
            return checks.quantized(actual, x, kind, 2.0**-16)

        shape = f"R{rows} I{columns}" if source == "gate_up" else f"T{t} H{columns}"
        return Work(shape, sets, run, lambda s: (s.data, s.scales), check, *moved)

    def _activate_quantize(self, case: Case) -> Work:
        return self._quantize(case, "gate_up")

    def _permute_quantize(self, case: Case) -> Work:
        return self._quantize(case, "tokens")

    def _dequantize(self, case: Case) -> Work:
        layer, space, kind = case.layer, self.space, case.dtype
        t, h, bits = case.tokens, layer.hidden, BITS[case.dtype]
        fmt = quant_format(kind)
        global_scale = (
            space.put(np.full(1, checks.GLOBAL_SCALE, np.float32), "f32") if kind == "nvfp4" else None
        )
        scale_rows, scale_columns = (int(n) for n in fmt.scale_shape(t, h))
        scale_bytes = scale_rows * scale_columns * (4 if fmt.has_f32_scales else 1)
        moved = t * h * bits // 8 + scale_bytes, t * h * 2

        def make(index: int) -> SimpleNamespace:
            x = space.normal((t, h), "bf16")
            data, scales = moecore.quantize(x, fmt, global_scale=global_scale)
            return SimpleNamespace(data=data, scales=scales, out=space.empty((t, h), "bf16"))

        def run(s: SimpleNamespace) -> None:
            moecore.dequantize(
                s.data, s.scales, fmt, global_scale=global_scale, out=s.out, hidden=h, dtype="bf16"
            )

        sets = [make(i) for i in self._sets(sum(moved))]
        sample = _sample(t, _CHECKED_ROWS)

        def check(output: Any) -> Check:
            data, scales = space.host(sets[0].data, sample), space.host(sets[0].scales, sample)
            expected = checks.dequantize_rows(data, scales, kind, checks.GLOBAL_SCALE)
            bound = (2.0**-8 + 2.0**-22) * np.abs(expected) + 2.0**-134
            return checks.compare(reference.to_float64(space.host(output, sample)), expected, bound)

        return Work(f"T{t} H{h}", sets, run, lambda s: s.out, check, *moved)

    def _transpose_experts(self, case: Case) -> Work:
        layer, space, size = case.layer, self.space, ITEMSIZE[case.dtype]
        shape = (min(8, layer.num_experts), layer.hidden, 2 * layer.inter)
        moved = (math.prod(shape) * size,) * 2

        def make(index: int) -> SimpleNamespace:
            out = space.empty((shape[0], shape[2], shape[1]), case.dtype)
            return SimpleNamespace(src=space.normal(shape, case.dtype), out=out)

        def run(s: SimpleNamespace) -> None:
            moecore.transpose_experts(s.src, out=s.out)

        sets = [make(i) for i in self._sets(sum(moved))]

        def check(output: Any) -> Check:
            return checks.exact(space.host(output, 1), space.host(sets[0].src, 1).T)

        return Work("x".join(map(str, shape)), sets, run, lambda s: s.out, check, *moved)

    # --- products and the layer ---

    def _grouped_gemm(self, case: Case) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        w = self.weights(layer, case.dtype)
        e, r = layer.num_experts, t * layer.top_k
        n, depth = (2 * layer.inter, layer.hidden) if case.part == "up" else (layer.hidden, layer.inter)
        matrix = w.w13 if case.part == "up" else w.w2
        expert_bytes = n * depth * w.bits / 8
        size, out_type = w.row_bytes, w.out_type
        rows_moved = r * depth * size, r * n * ITEMSIZE[out_type]
        scratch = moecore.grouped_gemm_workspace_bytes(
            r, n, depth, e, out_type, space.device, w.row_format, case.dtype if w.quantized else None
        )

        def make(index: int) -> SimpleNamespace:
            s = self._planned(case, index)
            s.x, s.out = space.normal((r, depth), out_type), space.empty((r, n), out_type)
            s.x_scales = None
            if w.row_format:
                s.x, s.x_scales = moecore.quantize(s.x, w.row_format)
            s.weights_of, s.matrix, s.part, s.layer = w, matrix, case.part, layer
            s.workspace = space.empty((max(scratch, 1),), "u8")
            return s

        def run(s: SimpleNamespace) -> None:
            moecore.grouped_gemm(
                s.x,
                matrix.tensor,
                s.plan.expert_offsets,
                out=s.out,
                workspace=s.workspace,
                **w.gemm_options(matrix, s.x_scales),
            )

        estimate = _touched(case, 1) * expert_bytes
        sets = [make(i) for i in self._sets(sum(rows_moved), estimate)]
        weight_bytes = _touched(case, len(sets)) * expert_bytes
        rng = np.random.default_rng(_SEED)
        sample = _sample(r, _CHECKED_ROWS // 2)
        columns = np.sort(rng.permutation(n)[:_CHECKED_COLUMNS])

        def check(output: Any) -> Check:
            s = sets[0]
            offsets = space.host(s.plan.expert_offsets).astype(np.int64)
            x = space.host(s.x, sample)
            if s.x_scales is not None:
                x = checks.dequantize_rows(x, space.host(s.x_scales, sample), case.dtype)
            else:
                x = reference.to_float64(x)
            expected = np.empty((len(sample), len(columns)))
            reach = np.empty_like(expected)
            for j, row in enumerate(sample):
                expert = int(np.searchsorted(offsets, row, side="right")) - 1
                weights = w.rows(matrix, expert, columns)
                expected[j], reach[j] = weights @ x[j], np.abs(weights) @ np.abs(x[j])
            actual = reference.to_float64(space.host(output, sample))[:, columns]
            bound = checks.product_bound(reach, expected, depth, out_type)
            return checks.compare(actual, expected, bound)

        return Work(
            f"E{e} K{layer.top_k} N{n} K{depth}",
            sets,
            run,
            lambda s: s.out,
            check,
            rows_moved[0] + weight_bytes,
            rows_moved[1],
            2.0 * r * n * depth,
            w.rate,
        )

    def _fused_experts(self, case: Case) -> Work:
        layer, t, space = case.layer, case.tokens, self.space
        w = self.weights(layer, case.dtype)
        e, k, h, i = layer.num_experts, layer.top_k, layer.hidden, layer.inter
        out_type = w.out_type
        expert_bytes = layer.weights_per_expert * w.bits / 8
        experts = w.experts()
        workspace = 0
        if space.device != "cpu":
            workspace = experts.workspace_bytes(t, k, dtype=out_type, x_format=w.row_format)
        held, head = _checked_tokens(layer, t), _head(layer, out_type)

        def make(index: int) -> SimpleNamespace:
            s = self._routed(case, index)
            s.x, s.out = space.normal((t, h), out_type), space.empty((t, h), out_type)
            if index == 0:
                space.assign(s.x, held, head[: len(held)])
            s.weights_of, s.layer = w, layer
            return s

        self.need(workspace)
        scratch = space.empty((workspace,), "u8") if workspace else None

        def run(s: SimpleNamespace) -> None:
            moecore.fused_experts(
                s.x,
                s.weights,
                s.ids,
                experts,
                x_format=w.row_format,
                out=s.out,
                workspace=scratch,
            )

        estimate = _touched(case, 1) * expert_bytes + 8 * t * k * (h + 2 * i)
        rotated = self._sets(2 * t * h * ITEMSIZE[out_type], estimate)
        sets = [make(i) for i in rotated[: max(2, min(len(rotated), 16))]]
        weight_bytes = _touched(case, len(sets)) * expert_bytes

        def check(output: Any) -> Check:
            expected, bound = self._oracle(case, w)
            actual = reference.to_float64(space.host(output, np.asarray(held)))
            return checks.compare(actual, expected[: len(held)], bound[: len(held)])

        return Work(
            f"E{e} K{k} H{h} I{i}",
            sets,
            run,
            lambda s: s.out,
            check,
            weight_bytes + t * h * ITEMSIZE[out_type],
            t * h * ITEMSIZE[out_type],
            6.0 * t * k * h * i,
            w.rate,
        )

    def _oracle(self, case: Case, w: Weights) -> tuple[checks.F64, checks.F64]:
        """Output of the checked tokens and its bound; the same tokens stand in every batch of a layer."""
        layer = case.layer
        key = (layer.name, case.dtype, case.routing)
        if key not in self._oracles:
            tokens = _checked_tokens(layer, 1 << 20)
            ids = routed_ids(layer.num_experts, layer.top_k, 1 << 10, case.routing, 0)[_head_rows(1 << 10)]
            weights = _router_weights(layer, 1 << 10, 0)[_head_rows(1 << 10)].astype(np.float64)
            count = len(tokens)
            x = reference.to_float64(_head(layer, w.out_type)[:count])
            expected, _, bound = reference.experts_layer(
                x, ids[:count], weights[:count], w.expert, layer, w.out_type
            )
            self._oracles[key] = expected, bound + w.extra_error * np.abs(expected).max()
        return self._oracles[key]


@dataclasses.dataclass
class Matrix:
    """One of a layer's weight tensors [E, N, depth]: what the ops take, and its scales."""

    tensor: Any
    scales: Any = None
    global_scale: Any = None


class Weights:
    """Random weights of a layer in an element type or a format."""

    def __init__(self, space: Space, layer: MoeLayer, dtype: str) -> None:
        self.space, self.layer, self.dtype = space, layer, dtype
        self.quantized = dtype in BITS
        self.bits = BITS.get(dtype) or 8 * ITEMSIZE[dtype]
        self.out_type = "bf16" if self.quantized else dtype
        # fp8 rows beside fp8 weights, as checkpoints of this format are run; 4-bit weights beside bf16 rows.
        self.row_format = "fp8_block128" if dtype == "fp8_block128" else None
        self.row_bytes = 1 if self.row_format else ITEMSIZE[self.out_type]
        self.rate = "fp8" if self.row_format else {"f32": "f32"}.get(self.out_type, "bf16")
        # Rows that a layer quantises between its products: e4m3 rounds by at most 2^-4.
        self.extra_error = 0.06 if self.row_format else 0.0
        e, h, i = layer.num_experts, layer.hidden, layer.inter
        self.w13 = self._matrix((e, 2 * i, h))
        self.w2 = self._matrix((e, h, i))
        self.w13_bias = space.normal((e, 2 * i), self.out_type, 0.1) if layer.expert_bias else None
        self.w2_bias = space.normal((e, h), self.out_type, 0.1) if layer.expert_bias else None

    @staticmethod
    def num_bytes(layer: MoeLayer, dtype: str) -> float:
        """Memory of the weights."""
        return layer.weight_bytes(1) * (BITS.get(dtype) or 8 * ITEMSIZE[dtype]) / 8

    def _matrix(self, shape: tuple[int, int, int]) -> Matrix:
        space, (e, n, depth) = self.space, shape
        magnitude = 0.7 / math.sqrt(depth)
        if not self.quantized:
            return Matrix(space.normal(shape, self.dtype, magnitude))
        if self.dtype == "fp8_block128":
            blocks = (e, -(-n // 128), -(-depth // 128))
            factors = np.random.default_rng(_SEED).uniform(0.5, 1.5, blocks).astype(np.float32)
            scales = space.put(factors * np.float32(magnitude), "f32")
            return Matrix(space.codes(shape, 0x8F, 0x30), scales)  # magnitudes of 0.5 to 2
        codes = space.codes((e, n, depth // 2))
        if self.dtype == "mxfp4":
            low = 126 + round(math.log2(magnitude / 2.5))
            return Matrix(codes, space.codes((e, n, -(-depth // 32)), 0x01, low & 0xFE))
        scales = space.codes((e, n, -(-depth // 16)), 0x0F, 0x30)
        global_scale = space.put(np.full(1, 2.5 / magnitude, np.float32), "f32")
        return Matrix(codes, scales, global_scale)

    def gemm_options(self, matrix: Matrix, x_scales: Any) -> dict[str, Any]:
        """What grouped_gemm() takes beside the codes."""
        if not self.quantized:
            return {}
        options: dict[str, Any] = {
            "weight_format": self.dtype,
            "weight_scales": matrix.scales,
            "weight_global_scale": matrix.global_scale,
        }
        if self.row_format:
            options |= {"x_format": self.row_format, "x_scales": x_scales}
        return options

    def experts(self) -> moecore.Experts[Any]:
        """The weights as fused_experts() takes them."""
        quantized = {
            "weight_format": self.dtype,
            "w13_scales": self.w13.scales,
            "w2_scales": self.w2.scales,
            "w13_global_scale": self.w13.global_scale,
            "w2_global_scale": self.w2.global_scale,
        }
        return moecore.Experts(
            self.w13.tensor,
            self.w2.tensor,
            activation=self.layer.activation,
            **activation_options(self.layer),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            **(quantized if self.quantized else {}),
        )

    def rows(self, matrix: Matrix, expert: int, rows: Any = slice(None)) -> checks.F64:
        """Rows of one expert's matrix in float64."""
        host, of_expert = self.space.host, self.space.of_expert
        codes = of_expert(matrix.tensor, expert, rows)
        if not self.quantized:
            return reference.to_float64(codes)
        if self.dtype == "fp8_block128":
            scales = np.repeat(host(matrix.scales, expert), 128, axis=0)[rows]
            scales = scales[: len(codes)]
        else:
            scales = of_expert(matrix.scales, expert, rows)
        factor = 1.0 if matrix.global_scale is None else float(host(matrix.global_scale)[0])
        return checks.dequantize_rows(codes, scales, self.dtype, factor)

    def expert(self, index: int) -> reference.ExpertWeights:
        """One expert for the float64 layer."""
        if not self.quantized:
            w13, w2 = (self.space.host(m.tensor, index) for m in (self.w13, self.w2))
        else:
            w13, w2 = (self.rows(m, index).astype(np.float32) for m in (self.w13, self.w2))
        biases = (
            None if bias is None else self.space.host(bias, index) for bias in (self.w13_bias, self.w2_bias)
        )
        return reference.ExpertWeights(w13, w2, *biases)


def activation_options(layer: MoeLayer) -> dict[str, Any]:
    """A layer's activation, as activate() and Experts() take it besides its kind."""
    return {"order": layer.order, "alpha": layer.alpha, "beta": layer.beta, "limit": layer.limit}


def quant_format(kind: str) -> moecore.QuantFormat:
    """The format with its scales in rows, as dense tensors have them."""
    return moecore.QuantFormat(kind, layout="linear")


# --- Routing ------------------------------------------------------------------------------------------------


def _head_rows(tokens: int) -> list[int]:
    """Where the checked tokens stand in a batch: spread over it."""
    count = min(tokens, _MOST_TOKENS_CHECKED)
    return [round(j * (tokens - 1) / max(1, count - 1)) for j in range(count)]


def _checked_tokens(layer: MoeLayer, tokens: int) -> list[int]:
    """As many of them as the float64 layer can afford."""
    most = max(1, _CHECKED_WEIGHTS // (layer.weights_per_expert * layer.top_k))
    return _head_rows(tokens)[:most]


@functools.lru_cache(maxsize=2)
def _head(layer: MoeLayer, dtype: str) -> npt.NDArray[Any]:
    """The checked tokens' x, the same in every batch."""
    space = Space(_SEED + 1)
    return space.host(space.normal((_MOST_TOKENS_CHECKED, layer.hidden), dtype, 1.0))


@functools.lru_cache(maxsize=96)
def routed_ids(num_experts: int, top_k: int, tokens: int, routing: str, index: int) -> npt.NDArray[np.int32]:
    """Ids [T, K] of set ``index``: K distinct experts a token.

    "uniform": each equally likely. "zipf": the n-th most popular with a weight of 1 / n. "one_hot": every
    token takes the same K. The checked tokens of set 0 are the same for every T. Drawing large batches takes
    time, so beyond two sets these are the first two with their tokens moved on.
    """
    if tokens > 512 and index > 1:
        return np.roll(routed_ids(num_experts, top_k, tokens, routing, index % 2), index, axis=0)
    rng = np.random.default_rng([_SEED, index, num_experts])
    popularity = np.zeros(num_experts, np.float32)
    if routing == "zipf":
        popularity = -np.log(1 + rng.permutation(num_experts)).astype(np.float32)
    if routing == "one_hot":
        popularity[rng.permutation(num_experts)[:top_k]] = 1e3
    draw = functools.partial(_draw, popularity=popularity, top_k=top_k)
    head = draw(_MOST_TOKENS_CHECKED, rng)
    ids = draw(tokens, np.random.default_rng([_SEED, index, num_experts, tokens]))
    places = _head_rows(tokens)
    ids[places] = head[: len(places)]
    return ids


def _touched(case: Case, sets: int) -> float:
    """Experts that have tokens, on average over the sets."""
    layer = case.layer
    draws = (
        routed_ids(layer.num_experts, layer.top_k, case.tokens, case.routing, i)
        for i in range(sets if case.tokens <= 512 else min(sets, 2))
    )
    return float(np.mean([len(np.unique(ids)) for ids in draws]))


def _draw(
    tokens: int, rng: np.random.Generator, popularity: npt.NDArray[np.float32], top_k: int
) -> npt.NDArray[np.int32]:
    ids = np.empty((tokens, top_k), np.int32)
    for first in range(0, tokens, 4096):
        part = ids[first : first + 4096]
        keys = popularity + rng.gumbel(size=(len(part), len(popularity))).astype(np.float32)
        part[...] = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
    return ids


def _router_weights(layer: MoeLayer, tokens: int, index: int) -> npt.NDArray[np.float32]:
    head = np.random.default_rng([_SEED, index]).uniform(0.1, 1, (_MOST_TOKENS_CHECKED, layer.top_k))
    weights = np.random.default_rng([_SEED, index, tokens]).uniform(0.1, 1, (tokens, layer.top_k))
    places = _head_rows(tokens)
    weights[places] = head[: len(places)]
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _sample(count: int, most: int) -> npt.NDArray[np.int64]:
    """Up to ``most`` of ``count`` rows, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
