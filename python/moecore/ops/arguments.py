"""What the ops do with their arguments before they call _core."""

from __future__ import annotations

import sys
from typing import Any

from moecore._core import QuantFormat

# An allocation of this many bytes more than an op asks for can be aligned to what ops expect.
_ALIGNMENT_SLACK = 255


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


def dim(x: Any, axis: int) -> int:
    """x.shape[axis], or 0 where there is none: the op then refuses `x` itself."""
    try:
        return x.shape[axis]  # type: ignore[no-any-return]
    except (AttributeError, IndexError):
        return 0


def padded(size: int) -> int:
    """Bytes that hold `size` of them at an aligned place."""
    return size + _ALIGNMENT_SLACK if size else 0
