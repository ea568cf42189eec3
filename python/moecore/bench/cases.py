"""The named cases: which op, on whose layer's shapes, for how many tokens, in which type or format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from moecore.models import MODELS, MoeLayer

__all__ = ["OPS", "ROUTINGS", "Case", "Selection", "select"]

ROUTINGS = ("uniform", "zipf", "one_hot")

_ROWS = ("bf16", "f16", "f32")
_FORMATS = ("fp8_token", "fp8_block128", "mxfp8", "nvfp4", "mxfp4")

# Per op: the types measured by default, further ones on request. A format is what an op writes, or what the
# weights of a product are stored in.
_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "route": (("f32",), ("bf16", "f16")),
    "plan": (("i32",), ()),
    "permute": (("bf16", "e4m3"), ("f16", "f32")),
    "shuffle_rows": (("bf16",), ("f16", "f32", "e4m3")),
    "activate": (("bf16",), ("f16", "f32")),
    "quantize": ((*_FORMATS, "fp8_tensor_static"), ()),
    "activate_quantize": (_FORMATS, ("fp8_tensor_static",)),
    "permute_quantize": (_FORMATS, ()),
    "dequantize": (("fp8_block128", "mxfp4"), ("fp8_token", "mxfp8", "nvfp4")),
    "finalize": (("bf16",), ("f16", "f32")),
    "transpose_experts": (("bf16",), ("f16", "f32")),
    "grouped_gemm": (("bf16", "fp8_block128", "mxfp4"), ("f16", "f32", "nvfp4")),
    "fused_experts": (("bf16", "fp8_block128", "mxfp4"), ("f16", "f32", "nvfp4")),
}
_FREE = ("route", "plan")  # their type says nothing about the rows', so --dtype does not filter them
_PARTS = {"grouped_gemm": ("up", "down")}
_HEAVY = ("grouped_gemm", "fused_experts")  # these share weights

OPS = tuple(_TYPES)

QUICK_MODELS = ("qwen3-30b-a3b",)
QUICK_TOKENS = (1, 64)
QUICK_SKIPS = ("shuffle_rows", "transpose_experts", "dequantize")
FULL_MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b", "gpt-oss-120b", "deepseek-v3")
FULL_TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement. `part` says which of a layer's two products; `dtype` as in `select`."""

    op: str
    layer: MoeLayer
    tokens: int
    dtype: str
    part: str = ""
    routing: str = "uniform"

    @property
    def name(self) -> str:
        """Unique among the cases of a run, and the same from run to run."""
        op = f"{self.op}.{self.part}" if self.part else self.op
        name = f"{op}/{self.layer.name}/T{self.tokens}/{self.dtype}"
        return name if self.routing == "uniform" else f"{name}/{self.routing}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the command line asked for; empty means the default."""

    ops: Sequence[str] = ()
    models: Sequence[str] = ()
    tokens: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    routing: str = "uniform"
    quick: bool = False


def all_dtypes() -> list[str]:
    """Every value of --dtype."""
    return sorted({dtype for default, more in _TYPES.values() for dtype in default + more})


def select(wanted: Selection) -> list[Case]:
    """The cases of a run, those that share weights beside each other."""
    models = wanted.models or (QUICK_MODELS if wanted.quick else FULL_MODELS)
    tokens = wanted.tokens or (QUICK_TOKENS if wanted.quick else FULL_TOKENS)
    ops = wanted.ops or [op for op in OPS if not (wanted.quick and op in QUICK_SKIPS)]
    cases: list[Case] = []
    for name in models:
        layer = MODELS[name]
        for op in (op for op in OPS if op in ops and op not in _HEAVY):
            for dtype in _dtypes(op, wanted.dtypes):
                counts: Sequence[int] = tokens[:1] if op == "transpose_experts" else tokens
                cases += [Case(op, layer, t, dtype, routing=wanted.routing) for t in counts]
        heavy = [op for op in _HEAVY if op in ops]
        for dtype in dict.fromkeys(d for op in heavy for d in _dtypes(op, wanted.dtypes)):
            for op, part in _parts(heavy):
                if dtype in _dtypes(op, wanted.dtypes):
                    cases += [Case(op, layer, t, dtype, part, wanted.routing) for t in tokens]
    return cases


def _dtypes(op: str, wanted: Sequence[str]) -> tuple[str, ...]:
    default, more = _TYPES[op]
    if not wanted or (op in _FREE and not set(wanted) & set(default + more)):
        return default
    return tuple(dtype for dtype in default + more if dtype in wanted)


def _parts(ops: Sequence[str]) -> Iterator[tuple[str, str]]:
    for op in ops:
        for part in _PARTS.get(op, ("",)):
            yield op, part
