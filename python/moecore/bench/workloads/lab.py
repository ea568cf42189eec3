"""What a case is once it is ready to run, and the lab that makes its inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import moecore
from moecore.bench import checks
from moecore.bench.cases import Case
from moecore.bench.checks import Check
from moecore.bench.spaces import Space
from moecore.bench.workloads.routing import routed_ids, router_weights
from moecore.bench.workloads.weights import Weights
from moecore.models import MoeLayer

__all__ = ["CHECKED_ROWS", "Lab", "SkippedError", "Work"]

CHECKED_ROWS = 32


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
        self.oracles: dict[tuple[str, str, str], tuple[checks.F64, checks.F64]] = {}

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

    def sets(self, set_bytes: float, shared_bytes: float = 0.0) -> range:
        """Numbers of the sets to rotate, each of ``set_bytes``; a call moves ``shared_bytes`` beside."""
        self.need(set_bytes)
        return range(self.space.num_sets(int(set_bytes), shared_bytes))

    def routed(self, case: Case, index: int) -> SimpleNamespace:
        """Ids i32 and weights f32 [T, K] of set ``index``."""
        layer, put = case.layer, self.space.put
        ids = routed_ids(layer.num_experts, layer.top_k, case.tokens, case.routing, index)
        weights = router_weights(layer, case.tokens, index)
        return SimpleNamespace(host_ids=ids, ids=put(ids, "i32"), weights=put(weights, "f32"))

    def planned(self, case: Case, index: int) -> SimpleNamespace:
        """The same, with a plan."""
        s = self.routed(case, index)
        s.plan = moecore.plan(s.ids, case.layer.num_experts)
        return s
