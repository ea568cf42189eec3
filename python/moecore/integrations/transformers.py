"""The experts of transformers models on moecore.

    import moecore.integrations.transformers
    model.set_experts_implementation("moecore")

One function serves every class decorated with ``transformers.integrations.use_experts_implementation``. It
reads the layout that the decorator declares (``has_gate``, ``has_bias``, ``is_transposed``,
``is_concatenated``) and recognises the activation by what the module's own ``_apply_gate`` computes on a
probe, once per module: a formula that moecore does not have is refused by name and never approximated.

Weights are used where they lie. Transposed ones ([E, H, 2I] as in gpt-oss) are brought to [E, 2I, H] once and
kept until their storage dies or is written to, which doubles the memory of those layers; repack() is for
writes that torch does not count.

FP8 checkpoints with blocks of 128 x 128 (DeepSeek-V3, Qwen3-FP8: ``FP8Experts``) keep their e4m3 weights and
``weight_scale_inv`` as they are; activations are quantised in blocks of 128 before each product, as those
models prescribe.

Forward only: with gradients enabled on any input the call raises. Slots whose id is ``num_experts`` (the
sentinel of expert parallelism) are dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moecore

__all__ = ["experts_forward", "fp8_experts_forward", "register", "repack"]

NAME = "moecore"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Make ``"moecore"`` an experts implementation of transformers. Importing the module does it too."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:  # a transformers whose FP8 experts take no other implementation
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, fp8_experts_forward)


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts function: hidden_states [T, H], ids and router weights [T, K] -> [T, H] of the same dtype.

    Raises NotImplementedError when the layer's dtype, weights or activation have no fused path, and
    RuntimeError when a gradient would be needed.
    """
    layer = _describe(self)
    gate_up = self.gate_up_proj if layer.gated else self.up_proj
    gate_up_bias = down_bias = None
    if layer.has_bias:
        gate_up_bias = self.gate_up_proj_bias if layer.gated else self.up_proj_bias
        down_bias = self.down_proj_bias
    tensors = (hidden_states, top_k_weights, gate_up, self.down_proj, gate_up_bias, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"moecore computes {layer.owner} forward only, and an input requires a gradient. Run under "
            "torch.no_grad() or torch.inference_mode(), or train with "
            "model.set_experts_implementation('grouped_mm')"
        )
    # Under autocast the hidden states may be wider than the weights; the product runs in the weights' dtype.
    rows = hidden_states.to(gate_up.dtype)
    if top_k_weights.dtype not in _DTYPES:
        top_k_weights = top_k_weights.float()
    out: torch.Tensor = torch.ops.moecore_transformers.experts(
        rows,
        top_k_weights,
        top_k_index,
        gate_up,
        self.down_proj,
        gate_up_bias,
        down_bias,
        layer.transposed,
        layer.kind,
        layer.order,
        layer.alpha,
        layer.beta,
        layer.limit,
    )
    return out.to(hidden_states.dtype)


def fp8_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """experts_forward() for ``FP8Experts``: weights e4m3 with f32 scales of 128 x 128 blocks.

    Raises NotImplementedError for other blocks, static activation scales, e8m0 scales, experts without a gate
    and FP4 weights.
    """
    layer = _describe_fp8(self)
    if top_k_weights.dtype not in _DTYPES:
        top_k_weights = top_k_weights.float()
    with torch.no_grad():
        out: torch.Tensor = torch.ops.moecore_transformers.fp8_experts(
            hidden_states.detach(),
            top_k_weights.detach(),
            top_k_index,
            self.gate_up_proj.detach(),
            self.down_proj.detach(),
            self.gate_up_proj_scale_inv.detach(),
            self.down_proj_scale_inv.detach(),
            layer.kind,
            layer.order,
            layer.alpha,
            layer.beta,
            layer.limit,
        )
    return out


# --- What a module is ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What the function needs to know of an experts module, besides its tensors."""

    owner: str
    gated: bool
    has_bias: bool
    transposed: bool
    kind: str
    order: str
    alpha: float
    beta: float
    limit: float


_layers: weakref.WeakKeyDictionary[torch.nn.Module, tuple[object, torch.dtype, _Layer]] = (
    weakref.WeakKeyDictionary()
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _describe(module: Any) -> _Layer:
    """The module's layout and activation, worked out once and again for a new act_fn or dtype."""
    act_fn = getattr(module, "act_fn", None)
    dtype = module.down_proj.dtype
    known = _layers.get(module)
    if known is not None and known[0] is act_fn and known[1] == dtype:
        return known[2]
    owner = type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (torch.nn.Parameter, torch.Tensor) or parameter.dtype not in _DTYPES:
            raise NotImplementedError(
                f"moecore: {owner}.{name} is a {type(parameter).__name__} of {parameter.dtype}, expected a "
                f"plain tensor of float32, bfloat16 or float16. {_ADVICE}"
            )
    kind, alpha, beta, limit = _recognise_activation(module)
    order = "plain" if not module.has_gate else "gate_up" if module.is_concatenated else "interleaved"
    layer = _Layer(
        owner, module.has_gate, module.has_bias, module.is_transposed, kind, order, alpha, beta, limit
    )
    _layers[module] = (act_fn, dtype, layer)
    return layer


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _describe_fp8(module: Any) -> _Layer:
    """The same for FP8Experts."""
    act_fn = getattr(module, "act_fn", None)
    known = _layers.get(module)
    if known is not None and known[0] is act_fn:
        return known[2]
    owner = type(module).__name__
    expected = {
        "block_size": (module.block_size and tuple(module.block_size), (128, 128)),
        "activation_scheme": (module.activation_scheme, "dynamic"),
        "has_gate": (module.has_gate, True),
        "down_proj.dtype": (module.down_proj.dtype, torch.float8_e4m3fn),
        "down_proj_scale_inv.dtype": (module.down_proj_scale_inv.dtype, torch.float32),
    }
    for name, (actual, wanted) in expected.items():
        if actual != wanted:
            raise NotImplementedError(f"moecore: {owner}.{name} is {actual}, expected {wanted}. {_ADVICE}")
    kind, alpha, beta, limit = _recognise_activation(module)
    order = "gate_up" if module.is_concatenated else "interleaved"
    layer = _Layer(owner, True, False, False, kind, order, alpha, beta, limit)
    _layers[module] = (act_fn, module.down_proj.dtype, layer)
    return layer


_ADVICE = "Use model.set_experts_implementation('grouped_mm') or 'eager' for this model"


# --- What an activation computes ----------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def _numbers(module: Any) -> tuple[tuple[str, float], ...]:
    """The module's scalars that may be constants of its activation, by name."""
    words = ("limit", "clamp", "alpha", "beta")
    return tuple(
        (name, float(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float)) and not isinstance(value, bool) and any(w in name for w in words)
    )


def _candidates(module: Any) -> Iterator[tuple[str, float, float, float]]:
    """Every (kind, alpha, beta, limit) that the module's constants allow, the plain ones first."""
    if not module.has_gate:
        yield from ((kind, 1.0, 0.0, math.inf) for kind in _FUNCTIONS)
        return
    numbers = _numbers(module)
    limits = [math.inf, *(v for name, v in numbers if ("limit" in name or "clamp" in name) and v > 0)]
    alphas = [v for name, v in numbers if "alpha" in name]
    betas = [0.0, 1.0, *(v for name, v in numbers if "beta" in name)]
    for limit, beta in itertools.product(limits, betas):
        yield from (("swiglu_oai", alpha, beta, limit) for alpha in alphas)
        yield from ((kind, 1.0, beta, limit) for kind in _FUNCTIONS)


def _recognise_activation(module: Any) -> tuple[str, float, float, float]:
    """The (kind, alpha, beta, limit) that agrees with the module's own function on a float64 probe.

    The probe is a grid of gate and up values: dense around zero, where gelu and gelu_tanh differ by 5e-4, and
    reaching beyond every limit that a module may clamp to.
    """
    act_fn = getattr(module, "act_fn", None)
    name = getattr(act_fn, "__name__", type(act_fn).__name__)
    if isinstance(act_fn, torch.nn.Module) and next(act_fn.parameters(), None) is not None:
        raise NotImplementedError(f"moecore: {type(module).__name__}.act_fn {name} has parameters. {_ADVICE}")
    largest = max((v for _, v in _numbers(module) if math.isfinite(v)), default=0.0)
    reach = 1.5 * max(largest, 16.0)
    line = torch.cat(
        [torch.linspace(-6, 6, 97, dtype=torch.float64), torch.linspace(-reach, reach, 33).double()]
    )
    gate, up = (g.reshape(1, -1) for g in torch.meshgrid(line, line.flip(0), indexing="ij"))
    with torch.no_grad():
        if not module.has_gate:
            actual = module.act_fn(gate)
        elif module.is_concatenated:
            actual = module._apply_gate(torch.cat([gate, up], dim=-1))
        else:
            actual = module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
        for kind, alpha, beta, limit in _candidates(module):
            g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
            f = g * torch.sigmoid(alpha * g) if kind == "swiglu_oai" else _FUNCTIONS[kind](g)
            expected = f * (u + beta) if module.has_gate else f
            if actual.shape == expected.shape and torch.allclose(
                actual.double(), expected, rtol=1e-5, atol=1e-6
            ):
                return kind, alpha, beta, limit
    default = type(module)._apply_gate.__name__ == "_default_apply_gate"
    gate_name = "the default gate" if default else "its own _apply_gate"
    raise NotImplementedError(
        f"moecore: {type(module).__name__} computes none of moecore's activations: act_fn {name} with "
        f"{gate_name} and constants {dict(_numbers(module))}. {_ADVICE}"
    )


# --- The torch op -------------------------------------------------------------------------------------------

_library = torch.library.Library("moecore_transformers", "DEF")
_library.define(
    "experts(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, bool transposed, str kind, str order, float alpha, float beta, float limit) -> Tensor"
)


def _experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    kind: str,
    order: str,
    alpha: float,
    beta: float,
    limit: float,
) -> torch.Tensor:
    gate_up, down = (w.transpose(1, 2) if transposed else w for w in (gate_up, down))
    experts = moecore.Experts(
        _dense(gate_up),
        _dense(down),
        activation=kind,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        w13_bias=gate_up_bias,
        w2_bias=down_bias,
    )
    x, weights, ids = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weights, ids))
    return moecore.fused_experts(x, weights, ids, experts)


_library.impl("experts", _experts, "CPU")
_library.impl("experts", _experts, "CUDA")
torch.library.register_fake(
    "moecore_transformers::experts", lambda x, *rest: torch.empty_like(x), lib=_library
)


_library.define(
    "fp8_experts(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down, Tensor gate_up_scales, "
    "Tensor down_scales, str kind, str order, float alpha, float beta, float limit) -> Tensor"
)


def _fp8_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_scales: torch.Tensor,
    kind: str,
    order: str,
    alpha: float,
    beta: float,
    limit: float,
) -> torch.Tensor:
    experts = moecore.Experts(
        gate_up,
        down,
        activation=kind,
        order=order,
        alpha=alpha,
        beta=beta,
        limit=limit,
        weight_format="fp8_block128",
        w13_scales=gate_up_scales,
        w2_scales=down_scales,
    )
    x, weights, ids = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weights, ids))
    return moecore.fused_experts(x, weights, ids, experts, x_format="fp8_block128")


_library.impl("fp8_experts", _fp8_experts, "CPU")
_library.impl("fp8_experts", _fp8_experts, "CUDA")
torch.library.register_fake(
    "moecore_transformers::fp8_experts", lambda x, *rest: torch.empty_like(x), lib=_library
)


# --- Transposed weights -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Packed:
    """A dense copy of weights, valid while their storage lives and no write to it is counted."""

    storage: StorageWeakRef
    version: int
    tensor: torch.Tensor


_packed: dict[tuple[object, ...], _Packed] = {}


def repack() -> None:
    """Forgets the copies of transposed weights; the next call makes them anew.

    For writes that torch does not count: through ``parameter.data``, and to tensors made in inference mode.
    """
    _packed.clear()


def _dense(weights: torch.Tensor) -> torch.Tensor:
    """The weights [E, N, K], dense along K: themselves, or a copy made once per storage and version of it."""
    if weights.stride(-1) == 1:
        return weights
    key = (weights.data_ptr(), tuple(weights.shape), weights.stride(), weights.dtype, weights.device)
    version = 0 if weights.is_inference() else weights._version
    known = _packed.get(key)
    if known is not None and known.version == version and not known.storage.expired():
        return known.tensor
    for stale in [k for k, p in _packed.items() if p.storage.expired()]:
        del _packed[stale]
    stored = weights.transpose(1, 2)
    tensor = moecore.transpose_experts(stored) if stored.stride(-1) == 1 else weights.contiguous()
    _packed[key] = _Packed(StorageWeakRef(weights.untyped_storage()), version, tensor)
    return tensor


register()
