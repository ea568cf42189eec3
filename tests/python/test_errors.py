"""Bad calls: the type of the exception, a message that names op, argument, expected and actual, outputs
untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moecore
import numpy as np
import pytest
from moecore import _core

F32, I32 = np.float32, np.int32


def good() -> dict[str, dict[str, Any]]:
    """Arguments of one valid call per op: T=4, K=2, E=3, H=8, I=5."""
    f, i = (lambda *s: np.ones(s, F32)), (lambda *s: np.zeros(s, I32))
    offsets = np.array([0, 3, 6, 8], I32)
    return {
        "route": {"logits": f(4, 3), "weights": f(4, 2), "ids": i(4, 2)},
        "plan": {
            "ids": i(4, 2), "expert_offsets": i(4), "scale_offsets": i(4), "row_token": i(8), "slot_row": i(4, 2),
            "row_route": i(8), "problem_sizes1": i(3, 3), "problem_sizes2": i(3, 3), "num_experts": 3,
        },
        "permute": {
            "x": f(4, 8), "row_token": i(8), "slot_row": i(4, 2), "expert_offsets": offsets, "rows": f(8, 8),
        },
        "shuffle_rows": {"x": f(4, 8), "map": i(5), "out": f(5, 8)},
        "activate": {"x": f(8, 10), "out": f(8, 5), "kind": "silu", "order": "gate_up"},
        "grouped_gemm": {"x": f(8, 8), "weights": f(3, 5, 8), "expert_offsets": offsets, "out": f(8, 5)},
        "finalize": {"rows": f(8, 8), "slot_row": i(4, 2), "out": f(4, 8)},
        "fused_experts": {
            "x": f(4, 8), "weights": f(4, 2), "ids": i(4, 2), "w13": f(3, 10, 8), "w2": f(3, 8, 5), "out": f(4, 8),
            "activation": "silu", "order": "gate_up",
        },
        "transpose_experts": {"src": f(3, 8, 5), "dst": f(3, 5, 8)},
    }  # fmt: skip


OUTPUTS = {
    "route": ("weights", "ids"),
    "plan": ("expert_offsets", "scale_offsets", "row_token", "slot_row", "row_route", "problem_sizes1"),
    "permute": ("rows",),
    "transpose_experts": ("dst",),
}

# op, changed arguments, exception, message
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("route", {"logits": np.ones((4, 3))}, TypeError, "route: logits is f64[4,3] cpu, expected dtype f32|f16|bf16"),
    ("route", {"weights": np.ones((4, 2), np.float16)}, TypeError, "route: weights is f16[4,2] cpu, expected dtype f32"),
    ("route", {"ids": np.zeros((4, 2), np.int64)}, TypeError, "route: ids is i64[4,2] cpu, expected dtype i32"),
    ("route", {"logits": np.ones(3, F32)}, ValueError, "route: logits is f32[3] cpu, expected 2 dimensions"),
    ("route", {"ids": np.zeros((5, 2), I32)}, ValueError, "shape[0] = num_tokens = 4"),
    ("route", {"weights": np.ones((4, 4), F32), "ids": np.zeros((4, 4), I32)}, ValueError,
     "route: top_k is 4, expected 1 to num_experts = 3"),
    ("route", {"scoring": "tanh"}, ValueError, 'route: scoring is "tanh", expected one of "softmax", "sigmoid"'),
    ("route", {"num_groups": 2}, ValueError, "route: num_groups is 2, expected a divisor of num_experts = 3"),
    ("route", {"bias": np.ones(4, F32)}, ValueError, "route: bias is f32[4] cpu, expected shape[0] = num_experts = 3"),
    ("plan", {"ids": np.zeros((4, 2), F32)}, TypeError, "plan: ids is f32[4,2] cpu, expected dtype i32|i64"),
    ("plan", {"num_experts": 0}, ValueError, "plan: num_experts is 0, expected 1 to 2048"),
    ("plan", {"num_experts": -5}, ValueError, "plan: num_experts is -5, expected 1 to 2048"),
    ("plan", {"expert_offsets": np.zeros(3, I32)}, ValueError,
     "plan: expert_offsets is i32[3] cpu, expected shape[0] = num_experts + 1 = 4"),
    ("plan", {"workspace": [1]}, TypeError, "plan: workspace is a list, expected a tensor"),
    ("permute", {"rows": np.ones((8, 9), F32)}, ValueError, "permute: rows is f32[8,9] cpu, expected shape[1] = hidden = 8"),
    ("permute", {"slot_row": np.zeros((3, 2), I32)}, ValueError, "permute: slot_row is i32[3,2]"),
    ("shuffle_rows", {"x": [[1.0]]}, TypeError, "shuffle_rows: x is a list, expected a tensor"),
    ("shuffle_rows", {"map": None}, TypeError, "shuffle_rows"),
    ("shuffle_rows", {"map": np.zeros(5, F32)}, TypeError, "shuffle_rows: map is f32[5] cpu, expected dtype i32|i64"),
    ("shuffle_rows", {"out": np.ones((5, 8), np.float16)}, TypeError, "the dtype of x, f32"),
    ("shuffle_rows", {"out": np.broadcast_to(np.ones(8, F32), (5, 8))}, ValueError, "expected a writable tensor"),
    ("activate", {"kind": "swish"}, ValueError, 'activate: kind is "swish", expected one of "silu"'),
    ("activate", {"order": "auto"}, ValueError, 'activate: order is "auto", expected one of "gate_up"'),
    ("activate", {"x": np.ones((8, 9), F32)}, ValueError, "2 * inter, an even number"),
    ("activate", {"limit": -1.0}, ValueError, "activate: limit is -1.0"),
    ("grouped_gemm", {"weights": np.ones((3, 5, 8), np.float16)}, TypeError, "the dtype of x, f32"),
    ("grouped_gemm", {"expert_offsets": np.zeros(3, I32)}, ValueError,
     "grouped_gemm: expert_offsets is i32[3] cpu, expected shape[0] = num_experts + 1 = 4"),
    ("grouped_gemm", {"x": np.ones((8, 7), F32)}, ValueError, "grouped_gemm: x is f32[8,7] cpu"),
    ("finalize", {"out": np.ones((4, 9), F32)}, ValueError, "at most rows.shape[1] = 8"),
    ("finalize", {"weights": np.ones((4, 3), F32)}, ValueError, "finalize: weights is f32[4,3] cpu"),
    ("finalize", {"slot_row": np.zeros((4, 2), np.uint8)}, TypeError, "finalize: slot_row is u8[4,2] cpu"),
    ("fused_experts", {"w2": np.ones((3, 8, 6), F32)}, ValueError, "fused_experts: w13 is f32[3,10,8] cpu"),
    ("fused_experts", {"workspace": np.zeros(16, np.uint8)}, ValueError, "fused_experts: workspace is"),
    ("fused_experts", {"x": object()}, TypeError, "fused_experts: x is a object, expected a tensor"),
    ("fused_experts", {"w13_bias": np.ones((3, 9), F32)}, ValueError, "fused_experts: w13_bias is f32[3,9] cpu"),
    ("transpose_experts", {"dst": np.ones((3, 8, 5), F32)}, ValueError, "transpose_experts: dst is f32[3,8,5] cpu"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "error", "message"), BAD, ids=[f"{b[0]}-{'-'.join(b[1])}" for b in BAD]
)
def test_bad_argument(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**good()[op], **change}
    outputs = [arguments[name] for name in OUTPUTS.get(op, ("out",)) if name not in change]
    for tensor in outputs:
        tensor.view(np.uint8)[:] = 0xA5
    with pytest.raises(error) as caught:
        getattr(_core, op)(**arguments)
    assert caught.type is error
    assert message in str(caught.value)
    for tensor in outputs:
        assert (tensor.view(np.uint8) == 0xA5).all(), "an output was written before the error"


@pytest.mark.parametrize("op", list(good()))
def test_the_good_calls_are_good(op: str) -> None:
    getattr(_core, op)(**good()[op])


@pytest.mark.parametrize("op", list(good()))
def test_every_tensor_argument_must_be_a_tensor(op: str) -> None:
    arguments = good()[op]
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            with pytest.raises(TypeError, match=rf"^{op}: {name} is a str, expected a tensor"):
                getattr(_core, op)(**{**arguments, name: "tensor"})


PUBLIC: dict[str, Callable[[Any], Any]] = {
    "route": lambda x: moecore.route(x, 2),
    "plan": lambda x: moecore.plan(x, 2),
    "permute": lambda x: moecore.permute(x, moecore.plan(np.zeros((2, 1), I32), 2)),
    "shuffle_rows": lambda x: moecore.shuffle_rows(x, np.zeros(2, I32)),
    "activate": lambda x: moecore.activate(x),
    "grouped_gemm": lambda x: moecore.grouped_gemm(x, np.zeros((1, 2, 2), F32), np.zeros(2, I32)),
    "finalize": lambda x: moecore.finalize(x, np.zeros((2, 2), I32)),
    "transpose_experts": lambda x: moecore.transpose_experts(x),
}


@pytest.mark.parametrize("op", list(PUBLIC))
@pytest.mark.parametrize("bad", [[1, 2], None, 3.0, np.float32(3), "x"], ids=repr)
def test_public_functions_name_what_is_no_tensor(op: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: \w+ is a [\w.]+, expected a tensor"):
        PUBLIC[op](bad)


@pytest.mark.parametrize("op", list(PUBLIC))
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 1)])
def test_public_functions_name_the_rank(op: str, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, I32 if op == "plan" else F32)
    with pytest.raises(ValueError, match=rf"^{op}: \w+ is \w+\[[\d,]*\] cpu, expected (2|3) dimensions"):
        PUBLIC[op](x)


def test_missing_backend_says_so(torch: Any) -> None:
    if moecore.is_available("cuda"):
        pytest.skip("this machine has a CUDA device")
    assert issubclass(moecore.BackendError, RuntimeError)
    assert moecore.BackendError.__module__ == "moecore"
    with pytest.raises(moecore.BackendError, match=r"the CPU engine|there is no device"):
        moecore.measure_roof("cuda")


def test_configuration() -> None:
    config = moecore.show_config("dicts")
    assert config["version"] == moecore.__version__
    assert set(config["ops"]) == set(moecore.OPS)
    assert config["cpu"]["isa"] in config["cpu"]["isas"]
    assert moecore.is_available("cpu")
    with pytest.raises(ValueError, match='op is "matmul"'):
        moecore.supported("matmul")
    with pytest.raises(ValueError, match='device is "tpu"'):
        moecore.is_available("tpu")
    with pytest.raises(ValueError, match="expected 0"):
        moecore.set_num_threads(-1)


def test_explain_runs_nothing() -> None:
    out = np.full((5, 8), 7, F32)
    text = moecore.explain("shuffle_rows", np.zeros((4, 8), F32), np.zeros(5, I32), out=out)
    assert "shuffle_rows" in text or "permute" in text
    assert (out == 7).all()
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        moecore.explain("shuffle_rows", np.zeros(4, F32), np.zeros(5, I32))
    moecore.shuffle_rows(np.zeros((4, 8), F32), np.zeros(5, I32), out=out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    "stray", [{"order": "interleaved"}, {"alpha": 1.5}, {"beta": 1.0}, {"limit": 7.0}], ids=str
)
def test_parameters_of_no_activation(stray: dict[str, Any]) -> None:
    arguments = good()["grouped_gemm"]
    (name,) = stray
    with pytest.raises(
        ValueError, match=f"grouped_gemm: {name} is given, expected none: there is no activation"
    ):
        moecore.grouped_gemm(**(arguments | stray))
    moecore.grouped_gemm(**(arguments | {"weights": np.ones((3, 10, 8), F32), "activation": "silu"} | stray))
