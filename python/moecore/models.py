"""Expert layers of published models: the shapes that the demo, `explain` and the benchmarks use."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

__all__ = ["MODELS", "MoeLayer"]


@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """One expert layer.

    Letters as everywhere: E ``num_experts``, K ``top_k``, H ``hidden``, I ``inter`` (one of gate and up).
    ``limit``, ``alpha`` and ``beta`` belong to the activation ``f(gate) * (up + beta)``; ``scale`` is the
    factor on the renormalised router weights; ``selection_bias`` says that the router adds a learned bias for
    selection.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    selection_bias: bool = False
    activation: Literal["silu", "swiglu_oai"] = "silu"
    order: Literal["gate_up", "interleaved"] = "gate_up"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    expert_bias: bool = False

    @property
    def weights_per_expert(self) -> int:
        """Elements of w13 [2I, H] and w2 [H, I] of one expert."""
        return 3 * self.hidden * self.inter

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of every expert's w13 and w2."""
        return self.num_experts * self.weights_per_expert * itemsize

    def scaled(self, factor: float) -> MoeLayer:
        """About ``factor`` of the weights, 0 < factor <= 1: fewer experts first, then narrower ones.

        Experts go down to 2K, in whole groups that still hold K experts in the groups a token may use. What
        is then left to save comes off H and I alike, in steps of 64.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"scale is {factor}, expected a number in (0, 1]")
        target = factor * self.num_experts * self.weights_per_expert
        least = max(2 * self.top_k, math.ceil(self.top_k / self.topk_groups) * self.num_groups)
        experts = max(min(least, self.num_experts), int(factor * self.num_experts))
        experts = experts // self.num_groups * self.num_groups
        shrink = min(1.0, math.sqrt(target / (experts * self.weights_per_expert)))
        if shrink == 1.0:
            return dataclasses.replace(self, num_experts=experts)
        return dataclasses.replace(
            self,
            num_experts=experts,
            hidden=max(64, int(self.hidden * shrink) // 64 * 64),
            inter=max(64, int(self.inter * shrink) // 64 * 64),
        )


def _table(*layers: MoeLayer) -> dict[str, MoeLayer]:
    return {layer.name: layer for layer in layers}


_GPT_OSS = MoeLayer(
    "gpt-oss-20b",
    num_experts=32,
    top_k=4,
    hidden=2880,
    inter=2880,
    activation="swiglu_oai",
    order="interleaved",
    alpha=1.702,
    beta=1.0,
    limit=7.0,
    expert_bias=True,
)

MODELS: dict[str, MoeLayer] = _table(
    MoeLayer("qwen3-30b-a3b", num_experts=128, top_k=8, hidden=2048, inter=768),
    MoeLayer("qwen3-235b-a22b", num_experts=128, top_k=8, hidden=4096, inter=1536),
    MoeLayer("mixtral-8x7b", num_experts=8, top_k=2, hidden=4096, inter=14336),
    _GPT_OSS,
    dataclasses.replace(_GPT_OSS, name="gpt-oss-120b", num_experts=128),
    MoeLayer(
        "deepseek-v3",
        num_experts=256,
        top_k=8,
        hidden=7168,
        inter=2048,
        scoring="sigmoid",
        scale=2.5,
        num_groups=8,
        topk_groups=4,
        selection_bias=True,
    ),
    MoeLayer(
        "kimi-k2",
        num_experts=384,
        top_k=8,
        hidden=7168,
        inter=2048,
        scoring="sigmoid",
        scale=2.827,
        selection_bias=True,
    ),
)
