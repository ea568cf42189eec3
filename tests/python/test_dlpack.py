"""The boundary: element types, strides, offsets, read-only memory, devices, lifetime."""

from __future__ import annotations

import gc
import sys
from typing import Any

import moecore
import numpy as np
import pytest
from moecore import _core

MAP = np.array([2, -1, 0], np.int32)


def moved(x: Any, map: Any = MAP) -> Any:
    return moecore.shuffle_rows(x, map)


TORCH_DTYPES = [
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_torch_dtype_is_moved(torch: Any, name: str) -> None:
    dtype = getattr(torch, name)
    size = dtype.itemsize
    raw = torch.arange(3 * 6 * size, dtype=torch.uint8).reshape(3, -1)
    if name == "bool":
        raw %= 2
    out = moved(raw.view(dtype), torch.from_numpy(MAP))
    assert out.dtype == dtype
    out_bytes = out.view(torch.uint8)
    assert torch.equal(out_bytes[0], raw[2])
    assert torch.equal(out_bytes[2], raw[0])
    assert not out_bytes[1].any()


@pytest.mark.parametrize("name", ["complex32", "float8_e4m3fnuz", "bits8"])
def test_torch_dtypes_without_a_meaning_are_refused(torch: Any, name: str) -> None:
    x = torch.zeros(3, 8, dtype=torch.uint8).view(getattr(torch, name))
    out = torch.zeros(3, 4)
    with pytest.raises(TypeError, match=r"^shuffle_rows: x is a torch\.Tensor"):
        _core.shuffle_rows(x, torch.from_numpy(MAP), out)


def test_sparse_and_meta_tensors_are_refused(torch: Any) -> None:
    map, out = torch.from_numpy(MAP), torch.zeros(3, 4)
    with pytest.raises(TypeError, match=r"^shuffle_rows: x is a torch\.Tensor that cannot be exported"):
        _core.shuffle_rows(torch.zeros(3, 4).to_sparse(), map, out)
    with pytest.raises((TypeError, ValueError), match=r"^shuffle_rows: x is "):
        _core.shuffle_rows(torch.zeros(3, 4, device="meta"), map, out)


def test_fake_tensors_are_refused(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="fake or meta"):
        _core.shuffle_rows(fake, torch.from_numpy(MAP), torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dtype = np.dtype(getattr(ml_dtypes, name))
    raw = np.arange(3 * 4 * dtype.itemsize, dtype=np.uint8).reshape(3, -1)
    out = moved(raw.view(dtype))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.view(np.uint8)[[0, 2]], raw[[2, 0]])
    # Strided rows and read-only memory take the same way.
    strided = np.concatenate([raw, raw], axis=1).view(dtype)[:, : raw.shape[1] // dtype.itemsize]
    strided.flags.writeable = False
    np.testing.assert_array_equal(moved(strided).view(np.uint8), out.view(np.uint8))


def test_unpacked_float4_is_refused_with_advice() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    with pytest.raises(
        TypeError, match=r"x is a numpy.ndarray of dtype float4_e2m1fn .*view_as\(x, \"e2m1\"\)"
    ):
        moved(np.zeros((3, 4), ml_dtypes.float4_e2m1fn))


def test_three_spellings_of_fp4_are_one(torch: Any) -> None:
    packed = np.arange(12, dtype=np.uint8).reshape(3, 4)
    tagged = moecore.view_as(packed, "e2m1")
    assert tagged.shape == (3, 8)
    assert tagged.dtype == "e2m1"
    assert "e2m1[3,8] cpu" in repr(tagged)
    out = moved(tagged)
    np.testing.assert_array_equal(out.base, [packed[2], [0] * 4, packed[0]])
    assert (out.dtype, out.shape) == ("e2m1", (3, 8))
    native = torch.from_numpy(packed).view(torch.float4_e2m1fn_x2)
    _core.shuffle_rows(native, torch.from_numpy(MAP), moecore.view_as(out.base, "e2m1"))
    with pytest.raises(TypeError, match=r"out is u8\[3,4\] cpu, expected the dtype of x, e2m1"):
        _core.shuffle_rows(native, torch.from_numpy(MAP), np.zeros((3, 4), np.uint8))


def test_view_as(torch: Any) -> None:
    raw = np.zeros((2, 4), np.uint8)
    assert moecore.view_as(raw, "e4m3").shape == (2, 4)
    assert moecore.view_as(torch.from_numpy(raw), "e4m3").dtype == torch.float8_e4m3fn
    assert moecore.view_as(torch.from_numpy(raw), "e2m1").dtype == torch.float4_e2m1fn_x2
    with pytest.raises(ValueError, match='view_as: dtype is "fp8", expected a moecore dtype'):
        moecore.view_as(raw, "fp8")
    with pytest.raises(
        TypeError, match=r"view_as: x is u8\[2,4\] cpu, expected elements of 16 bits for bf16"
    ):
        moecore.view_as(raw, "bf16")
    with pytest.raises(TypeError, match="view_as: x is a str, expected a tensor"):
        moecore.view_as("x", "bf16")


def test_strides(torch: Any) -> None:
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    views = {
        "rows apart": base[:, :7],
        "every other row": base[::2],
        "offset": base[1:4, 3:],
        "rows reversed": base[::-1],
        "one row repeated": np.broadcast_to(base[0], (6, 10)),
    }
    for name, view in views.items():
        expected = view[np.array([2, 0])]
        np.testing.assert_array_equal(moved(view, np.array([2, 0])), expected, err_msg=name)
        if "reversed" not in name:
            out = moved(torch.from_numpy(base)[1:4, 3:], torch.tensor([2, 0]))
            np.testing.assert_array_equal(out, base[1:4, 3:][[2, 0]], err_msg=name)
    with pytest.raises(
        ValueError, match=r"x is f32\[10,6\] cpu strides \[1,10\], expected a dense last dimension"
    ):
        moved(base.T)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_unaligned_memory(offset: int) -> None:
    raw = np.zeros(4 * 33 * 2 + 64, np.uint8)
    x = raw[offset : offset + 4 * 33 * 2].view(np.float16).reshape(4, 33)
    x[:] = np.arange(4 * 33).reshape(4, 33)
    np.testing.assert_array_equal(moved(x), x[[2, 0, 0]] * np.array([[1], [0], [1]]))


def test_read_only_inputs_are_read_and_outputs_refused() -> None:
    x = np.ones((3, 4), np.float32)
    x.flags.writeable = False
    np.testing.assert_array_equal(moved(x)[:, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"out is f32\[3,4\] cpu \(read-only\), expected a writable tensor"):
        moecore.shuffle_rows(np.zeros((3, 4), np.float32), MAP, out=x)
    np.testing.assert_array_equal(x, 1)


def test_jax_arrays_are_inputs_only() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    cpu = jax.devices("cpu")[0]
    x = jax.device_put(np.arange(12.0, dtype=np.float32).reshape(3, 4), cpu)
    out = moecore.shuffle_rows(x, jax.device_put(MAP, cpu))
    assert isinstance(out, jax.Array)
    assert out.devices() == {cpu}
    np.testing.assert_array_equal(out, moved(np.asarray(x)))
    with pytest.raises(ValueError, match="read-only"):
        moecore.shuffle_rows(x, MAP, out=jax.device_put(np.zeros((3, 4), np.float32), cpu))
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(lambda y: moecore.shuffle_rows(y, MAP))(x)


def test_frameworks_mix_on_one_device(torch: Any) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(moved(x), x[[2, 0, 0]] * torch.tensor([[1.0], [0], [1]]))
    out = np.zeros((3, 4), np.float32)
    assert moecore.shuffle_rows(x, MAP, out=out) is out
    np.testing.assert_array_equal(out, moved(x).numpy())


def test_nothing_is_kept_alive(torch: Any) -> None:
    x, map = np.zeros((64, 64), np.float32), np.arange(64)
    y = torch.zeros(64, 64)
    tagged = moecore.view_as(x, "f32")
    counts = [sys.getrefcount(o) for o in (x, map, y, tagged)]
    for _ in range(100):
        moecore.shuffle_rows(x, map)
        moecore.shuffle_rows(y, map)
        moecore.shuffle_rows(tagged, map)
        with pytest.raises(TypeError):
            moecore.shuffle_rows(x, x)
    gc.collect()
    assert [sys.getrefcount(o) for o in (x, map, y, tagged)] == counts


class Foreign:
    """A producer that moecore knows nothing about, of DLPack 0 (no max_version) or 1."""

    def __init__(self, array: np.ndarray, versioned: bool) -> None:
        self.array, self.versioned, self.calls = array, versioned, []
        self.shape = array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        if not self.versioned and "max_version" in kwargs:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**kwargs)


@pytest.mark.parametrize("versioned", [False, True])
def test_any_producer_is_read(versioned: bool) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    x, out = Foreign(array, versioned), np.zeros((3, 4), np.float32)
    moecore.shuffle_rows(x, MAP, out=out)
    np.testing.assert_array_equal(out, moved(array))
    assert all("stream" not in kwargs for kwargs in x.calls)  # host memory has no stream
    with pytest.raises(TypeError, match="cannot allocate tensors of"):
        moecore.shuffle_rows(x, MAP)


def test_five_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="x is a tensor of 5 dimensions, expected at most 4"):
        moved(np.zeros((1, 1, 1, 1, 1), np.float32))


def test_no_copies_of_inputs_by_conversion() -> None:
    """An f64 tensor is not converted to what an op takes: it is refused."""
    with pytest.raises(TypeError, match=r"x is f64\[3,4\] cpu, expected dtype f32\|f16\|bf16"):
        moecore.activate(np.zeros((3, 4)), order="gate_up")
