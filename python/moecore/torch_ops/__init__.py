"""moecore in torch's dispatcher: `torch.ops.moecore.*`, for torch.compile and torch.export.

Importing this module registers the ops; the public functions of moecore do it by themselves when
torch.compile traces them. Every op exists as `name`, which allocates its results, and as `name_out`, which
writes into tensors it declares as mutated. Inputs that require grad are refused in grad mode: the ops have no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moecore.torch_ops.definitions import OPS, Op

_LIBRARY = torch.library.Library("moecore", "DEF")


def _refuse_grad(name: str, below: Callable[..., Any]) -> Callable[..., Any]:
    """The Autograd kernel of an op: raises where a gradient would silently vanish."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{name}: an input requires grad, and moecore ops have no gradient. Call them under "
                "torch.no_grad() or torch.inference_mode(), or detach() the input."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return below(*args)

    return kernel


def _register(op: Op) -> None:
    letters = "abcdefghi"[: op.num_outputs]
    returns = "Tensor" if op.num_outputs == 1 else f"({', '.join(['Tensor'] * op.num_outputs)})"
    mutated = ", ".join(f"Tensor({letter}!) out{i}" for i, letter in enumerate(letters))
    _LIBRARY.define(f"{op.name}({op.parameters}) -> {returns}")
    _LIBRARY.define(f"{op.name}_out({op.parameters}, {mutated}) -> ()")

    def functional(*args: Any) -> Any:
        outputs = op.outputs(*args)
        op.run(outputs, *args)
        return outputs[0] if op.num_outputs == 1 else outputs

    def fake(*args: Any) -> Any:
        outputs = op.outputs(*args)
        return outputs[0] if op.num_outputs == 1 else outputs

    def in_place(*args: Any) -> None:
        op.run(args[-op.num_outputs :], *args[: -op.num_outputs])

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(op.name, functional, key)
        _LIBRARY.impl(f"{op.name}_out", in_place, key)
    namespace = torch.ops.moecore
    for name in (op.name, f"{op.name}_out"):
        _LIBRARY.impl(name, _refuse_grad(op.name, getattr(namespace, name).default), "Autograd")
    torch.library.register_fake(f"moecore::{op.name}", fake, lib=_LIBRARY)
    torch.library.register_fake(f"moecore::{op.name}_out", lambda *args: None, lib=_LIBRARY)


for _op in OPS:
    _register(_op)
