"""What the ops do with their arguments before they call _core."""

from __future__ import annotations

import sys
from typing import Any

from moecore._core import QuantFormat
from moecore._frameworks import Framework

# An allocation of this many bytes more than an op asks for can be aligned to what ops expect.
_ALIGNMENT_SLACK = 255

FLOATS = ("f32", "f16", "bf16")


def traced_ops() -> Any:
    """moecore.torch_ops.traced while torch.compile traces the call, else None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling():
        return None
    from moecore.torch_ops import traced

    return traced


def as_format(format: QuantFormat | str | None) -> QuantFormat | None:
    """The format that a kind stands for."""
    return QuantFormat(format) if isinstance(format, str) else format


def need_format(op: str, format: QuantFormat | str) -> QuantFormat:
    """as_format(), or TypeError for what is no format."""
    found = as_format(format)
    if not isinstance(found, QuantFormat):
        raise TypeError(f"{op}: format is {format!r}, expected a QuantFormat or the name of a kind")
    return found


def check_dtype(op: str, argument: str, dtype: str | None, known: tuple[str, ...]) -> None:
    """ValueError for a dtype that is neither None nor one of `known`."""
    if dtype is not None and dtype not in known:
        raise ValueError(f"{op}: {argument} is {dtype!r}, expected one of {', '.join(known)}")


def check_least(op: str, least: int, **sizes: int | None) -> None:
    """ValueError for a size below `least`; None is none."""
    for name, size in sizes.items():
        if size is not None and size < least:
            raise ValueError(f"{op}: {name} is {size}, expected at least {least}")


def check_out(
    fw: Framework, op: str, out: Any, *, hidden: int | None = None, dtype: str | None = None
) -> None:
    """ValueError for an `out` that contradicts what else is said of it."""
    if hidden is not None and dim(out, 1) != hidden:
        raise ValueError(f"{op}: hidden is {hidden}, expected None or the {dim(out, 1)} columns of out")
    if dtype is not None and fw.dtype_name(out) != dtype:
        raise ValueError(f"{op}: dtype is {dtype!r}, expected None or the dtype of out, {fw.dtype_name(out)}")


def dim(x: Any, axis: int) -> int:
    """x.shape[axis], or 0 where there is none: the op then refuses `x` itself."""
    try:
        return x.shape[axis]  # type: ignore[no-any-return]
    except (AttributeError, IndexError):
        return 0


def padded(size: int) -> int:
    """Bytes that hold `size` of them at an aligned place."""
    return size + _ALIGNMENT_SLACK if size else 0
