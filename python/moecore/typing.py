"""Types of moecore's arguments."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class DLPackTensor(Protocol):
    """Any tensor that speaks DLPack: torch, NumPy (also with ml_dtypes), CuPy, JAX, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def shape(self) -> Any:
        """The extents, in the framework's own type."""
        ...


@runtime_checkable
class CudaStream(Protocol):
    """A stream object such as `torch.cuda.Stream` or `cupy.cuda.Stream`."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """(version, pointer)."""
        ...


TensorT = TypeVar("TensorT", bound=DLPackTensor)
StreamLike = int | CudaStream | None
