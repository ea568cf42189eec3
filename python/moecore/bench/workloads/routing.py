"""Which experts the tokens of a batch take, and which tokens and rows a check looks at."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from moecore.bench.cases import Case
from moecore.bench.spaces import Space
from moecore.models import MoeLayer

__all__ = [
    "SEED",
    "checked_tokens",
    "head_rows",
    "head_values",
    "routed_ids",
    "router_weights",
    "sampled",
    "touched",
]

SEED = 7
_CHECKED_WEIGHTS = 200_000_000  # that the float64 layer may visit
_MOST_TOKENS_CHECKED = 4


def head_rows(tokens: int) -> list[int]:
    """Where the checked tokens stand in a batch: spread over it."""
    count = min(tokens, _MOST_TOKENS_CHECKED)
    return [round(j * (tokens - 1) / max(1, count - 1)) for j in range(count)]


def checked_tokens(layer: MoeLayer, tokens: int) -> list[int]:
    """As many of them as the float64 layer can afford."""
    most = max(1, _CHECKED_WEIGHTS // (layer.weights_per_expert * layer.top_k))
    return head_rows(tokens)[:most]


@functools.lru_cache(maxsize=2)
def head_values(layer: MoeLayer, dtype: str) -> npt.NDArray[Any]:
    """The checked tokens' x, the same in every batch."""
    space = Space(SEED + 1)
    return space.host(space.normal((_MOST_TOKENS_CHECKED, layer.hidden), dtype, 1.0))


@functools.lru_cache(maxsize=2048)
def routed_ids(num_experts: int, top_k: int, tokens: int, routing: str, index: int) -> npt.NDArray[np.int32]:
    """Ids [T, K] of set ``index``: K distinct experts a token.

    "uniform": each equally likely. "zipf": the n-th most popular with a weight of 1 / n. "one_hot": every
    token takes the same K. The checked tokens of set 0 are the same for every T. Drawing large batches takes
    time, so beyond two sets these are the first two with their tokens moved on.
    """
    if tokens > 512 and index > 1:
        return np.roll(routed_ids(num_experts, top_k, tokens, routing, index % 2), index, axis=0)
    rng = np.random.default_rng([SEED, index, num_experts])
    popularity = np.zeros(num_experts, np.float32)
    if routing == "zipf":
        popularity = -np.log(1 + rng.permutation(num_experts)).astype(np.float32)
    if routing == "one_hot":
        popularity[rng.permutation(num_experts)[:top_k]] = 1e3
    draw = functools.partial(_draw, popularity=popularity, top_k=top_k)
    head = draw(_MOST_TOKENS_CHECKED, rng)
    ids = draw(tokens, np.random.default_rng([SEED, index, num_experts, tokens]))
    places = head_rows(tokens)
    ids[places] = head[: len(places)]
    return ids


def touched(case: Case, sets: int) -> float:
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


def router_weights(layer: MoeLayer, tokens: int, index: int) -> npt.NDArray[np.float32]:
    """Weights [T, K] of set ``index``, those of a token adding up to 1."""
    head = np.random.default_rng([SEED, index]).uniform(0.1, 1, (_MOST_TOKENS_CHECKED, layer.top_k))
    weights = np.random.default_rng([SEED, index, tokens]).uniform(0.1, 1, (tokens, layer.top_k))
    places = head_rows(tokens)
    weights[places] = head[: len(places)]
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def sampled(count: int, most: int) -> npt.NDArray[np.int64]:
    """Up to ``most`` of ``count`` rows, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
