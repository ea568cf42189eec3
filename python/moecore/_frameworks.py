"""What moecore knows of tensor frameworks: how to allocate like a tensor, and where its work runs.

The only module that does. A framework is looked up in `sys.modules` when one of its tensors arrives and is
never imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from moecore._core import Retagged

# moecore dtype -> name of the same type in NumPy, JAX, CuPy and (mostly) torch.
_NAMES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e8m0": "float8_e8m0fnu",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "bool": "bool",
}
_SHORT = {long: short for short, long in _NAMES.items()}


class Framework:
    """One framework's manners. `like` is always a tensor of that framework."""

    name: str

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        """Uninitialised memory beside `like`, of its dtype or of a moecore dtype."""
        raise NotImplementedError

    def on_host(self, x: Any) -> bool:
        """Whether `x` lives in host memory."""
        return True

    def device(self, x: Any) -> str:
        """The moecore name of the device of `x`."""
        return "cpu"

    def dtype_name(self, x: Any) -> str:
        """The moecore name of the dtype of `x`."""
        name = str(x.dtype).rpartition(".")[2]
        return _SHORT.get(name, name)

    def finish(self, out: Any) -> Any:
        """Turns what `empty` gave into what the caller gets."""
        return out

    def admit(self, op: str, *tensors: Any) -> None:
        """Raises for inputs that the framework would not want moecore to read."""

    def compiling(self) -> bool:
        """Whether the call is being traced by torch.compile."""
        return False

    def view(self, x: Any, dtype: str) -> Any:
        """The memory of `x` under another dtype."""
        return Retagged(x, dtype)

    def current_stream(self, x: Any) -> int:
        """The CUDA stream that the framework would use next on the device of `x`; 0 is the default stream."""
        return 0


class _Torch(Framework):
    name = "torch"

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        self._torch = torch
        self._grad_enabled = torch.is_grad_enabled
        self.compiling = torch.compiler.is_compiling  # type: ignore[method-assign]
        self._dtypes = {short: getattr(torch, name) for short, name in _NAMES.items() if hasattr(torch, name)}
        if hasattr(torch, "float4_e2m1fn_x2"):
            self._dtypes["e2m1"] = torch.float4_e2m1fn_x2

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        return like.new_empty(shape, dtype=self._dtypes[dtype]) if dtype else like.new_empty(shape)

    def on_host(self, x: Any) -> bool:
        return not x.is_cuda

    def device(self, x: Any) -> str:
        return str(x.device)

    def admit(self, op: str, *tensors: Any) -> None:
        if not self._grad_enabled():
            return
        for tensor in tensors:
            if getattr(tensor, "requires_grad", False):
                raise RuntimeError(
                    f"{op}: an input requires grad, and moecore ops have no gradient. Call them under "
                    "torch.no_grad() or torch.inference_mode(), or detach() the input."
                )

    def view(self, x: Any, dtype: str) -> Any:
        native = self._dtypes.get(dtype)
        if native is not None and native.itemsize == x.dtype.itemsize:
            return x.view(native)
        return Retagged(x, dtype)

    def current_stream(self, x: Any) -> int:
        stream: int = self._torch.cuda.current_stream(x.device).cuda_stream
        return stream


class _NumPy(Framework):
    name = "numpy"

    def __init__(self) -> None:
        self._numpy = sys.modules["numpy"]

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        return self._numpy.empty(shape, dtype=_NAMES[dtype] if dtype else like.dtype)


class _CuPy(Framework):
    name = "cupy"

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        with like.device:
            return self._cupy.empty(shape, dtype=_NAMES[dtype] if dtype else like.dtype)

    def on_host(self, x: Any) -> bool:
        return False

    def device(self, x: Any) -> str:
        return f"cuda:{x.device.id}"

    def current_stream(self, x: Any) -> int:
        with x.device:
            stream: int = self._cupy.cuda.get_current_stream().ptr
        return stream


class _Jax(Framework):
    """JAX arrays are immutable: ops write NumPy arrays, which become JAX arrays on return."""

    name = "jax"

    def __init__(self) -> None:
        import numpy

        self._numpy = numpy
        self._jax = sys.modules["jax"]

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        return self._numpy.empty(shape, dtype=_NAMES[dtype] if dtype else like.dtype)

    def finish(self, out: Any) -> Any:
        if not isinstance(out, self._numpy.ndarray):
            return out
        # Where JAX has a GPU too, that would be its default device.
        return self._jax.device_put(out, self._jax.devices("cpu")[0])

    def admit(self, op: str, *tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, self._jax.core.Tracer):
                raise TypeError(f"{op}: an input is a JAX tracer; moecore ops cannot be traced by jax.jit")
            if isinstance(tensor, self._jax.Array):
                if any(device.platform != "cpu" for device in tensor.devices()):
                    raise NotImplementedError(
                        f"{op}: JAX arrays are taken on cpu only; bring it to torch or CuPy with DLPack"
                    )
                tensor.block_until_ready()


class _Tagged(Framework):
    """Retagged tensors: the manners of the tensor underneath."""

    name = "retagged"

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        base = like.base
        under = framework_of("view_as", "x", base)
        if dtype is not None:
            return under.empty(base, shape, dtype)
        if like.shape != tuple(base.shape):  # two e2m1 elements to the byte
            shape = (*shape[:-1], shape[-1] // 2)
        return Retagged(under.empty(base, shape), like.dtype)

    def on_host(self, x: Any) -> bool:
        return framework_of("view_as", "x", x.base).on_host(x.base)

    def device(self, x: Any) -> str:
        return framework_of("view_as", "x", x.base).device(x.base)

    def dtype_name(self, x: Any) -> str:
        return str(x.dtype)

    def admit(self, op: str, *tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Retagged):
                framework_of(op, "x", tensor.base).admit(op, tensor.base)

    def current_stream(self, x: Any) -> int:
        return framework_of("view_as", "x", x.base).current_stream(x.base)


class _Other(Framework):
    """A tensor with `__dlpack__` of a framework that moecore cannot allocate for."""

    name = "other"

    def __init__(self, package: str) -> None:
        self._package = package

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        raise TypeError(
            f"moecore cannot allocate tensors of {self._package}; pass out= (and workspace= on cuda)"
        )

    def on_host(self, x: Any) -> bool:
        return bool(x.__dlpack_device__()[0] in (1, 3))

    def device(self, x: Any) -> str:
        kind, index = x.__dlpack_device__()
        return "cpu" if kind in (1, 3) else f"cuda:{index}"


_KNOWN: dict[str, Callable[[], Framework]] = {
    "torch": _Torch,
    "numpy": _NumPy,
    "cupy": _CuPy,
    "jax": _Jax,
    "jaxlib": _Jax,
}
_BY_TYPE: dict[type, Framework] = {Retagged: _Tagged()}


def framework_of(op: str, argument: str, x: Any) -> Framework:
    """The framework of a tensor. Raises TypeError naming `op` and `argument` for anything else."""
    found = _BY_TYPE.get(type(x))
    return found if found is not None else _recognise(op, argument, x)


def _recognise(op: str, argument: str, x: Any) -> Framework:
    kind = type(x)
    for base in kind.__mro__:
        make = _KNOWN.get(base.__module__.partition(".")[0])
        if make is not None and hasattr(kind, "__dlpack__"):
            break
    else:
        if not hasattr(kind, "__dlpack__"):
            name = (
                kind.__qualname__
                if kind.__module__ == "builtins"
                else f"{kind.__module__}.{kind.__qualname__}"
            )
            raise TypeError(
                f"{op}: {argument} is a {name}, expected a tensor: an object of a type with __dlpack__ "
                "(torch, NumPy, CuPy, JAX, ...)"
            )
        make = partial(_Other, kind.__module__.partition(".")[0])
    _BY_TYPE[kind] = framework = make()
    return framework


def current_stream(x: Any) -> int:
    """The current CUDA stream of the framework of `x`, for producers without the DLPack exchange API."""
    return framework_of("stream", "x", x).current_stream(x)
