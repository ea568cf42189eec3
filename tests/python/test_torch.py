"""torch: dispatcher ops, torch.compile, gradients, inference mode."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import moecore
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

T, K, E, H, I = 6, 2, 8, 16, 12  # noqa: E741


@pytest.fixture
def layer() -> dict[str, Any]:
    importlib.import_module("moecore.torch")  # registers torch.ops.moecore
    torch.manual_seed(0)
    logits = torch.randn(T, E)
    weights, ids = moecore.route(logits, K)
    plan = moecore.plan(ids, E)
    return {
        "logits": logits, "weights": weights, "ids": ids, "plan": plan, "x": torch.randn(T, H),
        "rows": torch.randn(T * K, H), "w13": torch.randn(E, 2 * I, H), "w2": torch.randn(E, H, I),
        "b13": torch.randn(E, 2 * I), "b2": torch.randn(E, H), "wide": torch.randn(T * K, 2 * I),
    }  # fmt: skip


def cases(d: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    plan = d["plan"]
    return {
        "route": (d["logits"], K, "sigmoid", torch.randn(E), 4, 2, "max", True, 2.0, torch.zeros(T, dtype=torch.bool)),
        "plan": (d["ids"], E, None, 0, 128, H, I, True, False),
        "route_plan": (
            d["logits"], K, E, "softmax", None, 1, 1, "max", True, 2.0, None, None, 0, H, I, 128, True, False,
        ),
        "permute": (d["x"], plan.row_token, plan.slot_row, plan.expert_offsets),
        "permute_scales": (d["x"], d["logits"], plan.row_token, plan.slot_row, plan.expert_offsets),
        "shuffle_rows": (d["x"], torch.tensor([3, -1, 0])),
        "shuffle_rows_scales": (d["x"], d["logits"], torch.tensor([3, -1, 0])),
        "transpose_experts": (d["w2"],),
        "activate": (d["wide"], "swiglu_oai", "interleaved", None, None, None, None),
        "grouped_gemm": (
            d["x"], d["w13"], plan.expert_offsets, d["b13"], plan.row_token, "silu", "gate_up", None, None, None, None,
            *[None] * 7,
        ),
        "finalize": (
            d["rows"], plan.slot_row, d["weights"], H - 3, False, d["x"][:, : H - 3].clone(), None, "linear", None,
        ),
        "finalize_quantize": (
            d["rows"].to(torch.float8_e4m3fn), plan.slot_row, d["weights"], None, None, torch.ones(T * K, 1),
            "linear",
        ),
        "fused_experts": (
            d["x"], d["weights"], d["ids"], d["w13"], d["w2"], d["b13"], d["b2"], "silu", "gate_up", None, None, None,
            None, 0, False, d["x"], *[None] * 8,
        ),
        "quantize": (
            d["wide"], "mxfp4", None, None, plan.expert_offsets, None, None, None, None, "silu", "gate_up", None, None,
            None, 64,
        ),
        "dequantize": (
            *moecore.quantize(d["x"], "fp8_block128"), "fp8_block128", "bf16", H - 3, None, None, None, None,
        ),
        "global_scale": (d["rows"], plan.expert_offsets, None, True),
    }  # fmt: skip


OPS = [
    "route", "plan", "route_plan", "permute", "permute_scales", "shuffle_rows", "shuffle_rows_scales",
    "transpose_experts", "activate", "grouped_gemm", "finalize", "finalize_quantize", "fused_experts", "quantize",
    "dequantize", "global_scale",
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_opcheck(layer: dict[str, Any], op: str) -> None:

    args = cases(layer)[op]
    # torch's own schema test has no arithmetic for fp8.
    fp8 = (
        {"test_utils": ("test_autograd_registration", "test_faketensor")} if op == "finalize_quantize" else {}
    )
    torch.library.opcheck(getattr(torch.ops.moecore, op).default, args, **fp8)
    outputs = getattr(torch.ops.moecore, op)(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    fresh = tuple(torch.full(o.shape, 7).to(o.dtype) for o in outputs)
    torch.library.opcheck(getattr(torch.ops.moecore, f"{op}_out").default, (*args, *fresh), **fp8)
    getattr(torch.ops.moecore, f"{op}_out")(*args, *fresh)
    for a, b in zip(outputs, fresh, strict=True):
        assert torch.equal(a.double(), b.double())


def forward(logits: Any, x: Any, experts: Any) -> Any:
    """The layer, through every public function."""
    weights, ids = moecore.route(logits, K, renormalize=True)
    plan = moecore.plan(ids, E, problem_sizes=(H, I))
    rows = moecore.permute(x, plan)
    wide = moecore.grouped_gemm(rows, experts.w13, plan.expert_offsets, bias=experts.w13_bias)
    narrow = moecore.activate(wide, order="gate_up", expert_offsets=plan.expert_offsets)
    w2 = moecore.transpose_experts(moecore.transpose_experts(experts.w2))
    out = moecore.grouped_gemm(narrow, w2, plan.expert_offsets, bias=experts.w2_bias)
    layered = moecore.finalize(out, plan, weights, residual=x)
    return (
        layered
        + moecore.fused_experts(x, weights, ids, experts)
        + moecore.shuffle_rows(x, ids[:, 0].contiguous())
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compile_whole_layer(layer: dict[str, Any], dtype: str, dynamic: bool) -> None:
    cast = {name: layer[name].to(getattr(torch, dtype)) for name in ("x", "w13", "w2", "b13", "b2")}
    experts = moecore.Experts(
        cast["w13"], cast["w2"], order="gate_up", w13_bias=cast["b13"], w2_bias=cast["b2"]
    )
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for tokens in (T, T - 1, 1):
            args = (layer["logits"][:tokens], cast["x"][:tokens], experts)
            assert torch.equal(compiled(*args), forward(*args))


def test_compile_with_inductor(layer: dict[str, Any]) -> None:
    experts = moecore.Experts(
        layer["w13"], layer["w2"], order="gate_up", w13_bias=layer["b13"], w2_bias=layer["b2"]
    )
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    with torch.no_grad():
        args = (layer["logits"], layer["x"], experts)
        torch.testing.assert_close(compiled(*args), forward(*args))


def test_compile_writes_out_arguments(layer: dict[str, Any]) -> None:
    def f(x: Any, plan: Any, out: Any) -> Any:
        moecore.permute(x, plan, out=out)
        return out * 2

    torch._dynamo.reset()
    out = torch.zeros(T * K, H)
    result = torch.compile(f, fullgraph=True, backend="aot_eager")(layer["x"], layer["plan"], out)
    assert torch.equal(out, moecore.permute(layer["x"], layer["plan"]))
    assert torch.equal(result, out * 2)


def test_compile_without_importing_torch_ops_first() -> None:
    code = (
        "import moecore, torch\n"
        "f = torch.compile(lambda x, m: moecore.shuffle_rows(x, m), fullgraph=True, backend='eager')\n"
        "print(f(torch.arange(6.).reshape(3, 2), torch.tensor([2, -1])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[4.0, 5.0], [0.0, 0.0]]"


def test_gradients_are_refused(layer: dict[str, Any]) -> None:
    x = layer["x"].clone().requires_grad_()
    experts = moecore.Experts(layer["w13"].requires_grad_(), layer["w2"], order="gate_up")
    with pytest.raises(RuntimeError, match=r"^permute: an input requires grad.*torch\.no_grad\(\)"):
        moecore.permute(x, layer["plan"])
    with pytest.raises(RuntimeError, match=r"^fused_experts: an input requires grad"):
        moecore.fused_experts(layer["x"], layer["weights"], layer["ids"], experts)
    with pytest.raises(RuntimeError, match=r"^shuffle_rows: an input requires grad"):
        torch.ops.moecore.shuffle_rows(x, layer["ids"][:, 0].contiguous())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="an input requires grad"):
        torch.compile(lambda y: moecore.permute(y, layer["plan"]), fullgraph=True)(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            moecore.permute(x, layer["plan"])
            torch.ops.moecore.shuffle_rows(x, layer["ids"][:, 0].contiguous())


def test_parameters_and_subclasses_are_tensors(layer: dict[str, Any]) -> None:
    class Mine(torch.Tensor):
        pass

    with torch.no_grad():
        expected = moecore.permute(layer["x"], layer["plan"])
        assert torch.equal(moecore.permute(torch.nn.Parameter(layer["x"]), layer["plan"]), expected)
        assert torch.equal(moecore.permute(layer["x"].as_subclass(Mine), layer["plan"]), expected)


def test_workspace_of_the_caller(layer: dict[str, Any]) -> None:
    experts = moecore.Experts(layer["w13"], layer["w2"], order="gate_up")
    size = experts.workspace_bytes(T, K)
    args = (layer["x"], layer["weights"], layer["ids"], experts)
    expected = moecore.fused_experts(*args)
    for skip in (0, 1, 77):  # at any alignment, and nothing outside it is touched
        memory = torch.full((size + skip + 64,), 0x5A, dtype=torch.uint8)
        out = moecore.fused_experts(*args, workspace=memory[skip : skip + size])
        assert torch.equal(out, expected)
        assert (memory[:skip] == 0x5A).all()
        assert (memory[skip + size :] == 0x5A).all()


def test_threads_run_side_by_side(layer: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    experts = moecore.Experts(layer["w13"], layer["w2"], order="gate_up")
    inputs = [torch.randn(T, H) for _ in range(16)]
    expected = [moecore.fused_experts(x, layer["weights"], layer["ids"], experts) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = pool.map(
                lambda x: moecore.fused_experts(x, layer["weights"], layer["ids"], experts), inputs
            )
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_conjugate_and_numpy_agree(layer: dict[str, Any]) -> None:
    plan = moecore.plan(layer["ids"].numpy(), E)
    assert isinstance(plan.row_token, np.ndarray)
    np.testing.assert_array_equal(plan.row_token, layer["plan"].row_token.numpy())


FORMATS = [
    "fp8_tensor",
    "fp8_token",
    "fp8_block128",
    "nvfp4",
    "mxfp8",
    moecore.QuantFormat("nvfp4", layout="swizzled_128x4"),
    moecore.QuantFormat("mxfp4", layout="swizzled_8x4", rounding="floor"),
    moecore.QuantFormat("fp8_block128", layout="column_major"),
    moecore.QuantFormat("fp8_block128", layout="column_major", e8m0_scales=True),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("index", range(len(FORMATS)))
def test_compile_quantize(layer: dict[str, Any], index: int, dynamic: bool) -> None:
    """Dense, fused with activate, per expert through a plan, and back; the shapes are those of eager calls."""
    fmt = FORMATS[index]

    def dense(x: Any, wide: Any) -> Any:
        data, scales = moecore.quantize(x, fmt, multiple=64)
        fused = moecore.quantize(wide, fmt, activation="silu", order="gate_up")
        return data, scales, *fused, moecore.dequantize(data, scales, fmt, dtype="bf16", hidden=H)

    torch._dynamo.reset()
    compiled = torch.compile(dense, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for tokens in (T, T - 1):
            args = (layer["x"][:tokens], layer["wide"][:tokens])
            for a, b in zip(compiled(*args), dense(*args), strict=True):
                assert a.shape == b.shape
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["fp8_token", "nvfp4", "mxfp8"])
def test_compile_quantize_per_expert(layer: dict[str, Any], kind: str) -> None:
    fmt = moecore.QuantFormat(kind, layout="linear" if kind == "fp8_token" else "swizzled_128x4")

    def routed(x: Any, rows: Any, ids: Any) -> Any:
        plan = moecore.plan(ids, E)
        scale = moecore.global_scale(rows, expert_offsets=plan.expert_offsets)
        at = None if kind == "fp8_token" else plan.scale_offsets
        apart = moecore.quantize(
            rows,
            fmt,
            expert_offsets=plan.expert_offsets,
            scale_offsets=at,
            global_scale=scale if kind == "nvfp4" else None,
        )
        together = moecore.quantize(x, fmt, plan=plan)
        return apart.data, apart.scales, together.data, together.scales, plan.scale_offsets

    torch._dynamo.reset()
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        args = (layer["x"], layer["rows"], layer["ids"])
        results = list(zip(compiled(*args), routed(*args), strict=True))
    end = int(results[-1][0][-1])
    for a, b in results:
        assert a.shape == b.shape
        # Scales behind the last expert's are nobody's.
        assert torch.equal(a, b) if a.ndim == 1 or kind == "fp8_token" else torch.equal(a[:end], b[:end])


def test_compile_quantize_static_scale_and_out(layer: dict[str, Any]) -> None:
    x, scale = layer["x"], torch.tensor([[0.25]])

    def f(x: Any, data: Any, scales: Any) -> Any:
        moecore.quantize(x, "fp8_token", out=(data, scales))
        return moecore.quantize(x, "fp8_tensor_static", scale=scale)

    torch._dynamo.reset()
    data, scales = torch.zeros(T, H, dtype=torch.uint8), torch.zeros(T, 1)
    static = torch.compile(f, fullgraph=True, backend="aot_eager")(x, data, scales)
    for a, b in zip((data, scales), moecore.quantize(x, "fp8_token"), strict=True):
        assert torch.equal(a, b)
    expected = moecore.quantize(x, "fp8_tensor_static", scale=scale.clone())
    assert torch.equal(static.data, expected.data)
    assert torch.equal(static.scales, scale)


def test_compile_checks_the_arguments_of_quantize(layer: dict[str, Any]) -> None:
    x, plan, scale = layer["x"], layer["plan"], torch.tensor([[0.5]])
    out = (torch.zeros(T, H, dtype=torch.uint8), torch.ones(1, 1))
    calls = {
        "scale is None": lambda: moecore.quantize(x, "fp8_tensor_static"),
        "scale is given, expected None with out": lambda: moecore.quantize(
            x, "fp8_tensor_static", scale=scale, out=out
        ),
        "scale is given, expected None with .fp8_token": lambda: moecore.quantize(
            x, "fp8_token", scale=scale
        ),
        "activation is given": lambda: moecore.quantize(x, "mxfp8", plan=plan, activation="silu"),
    }
    for message, call in calls.items():
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=rf"^quantize: {message}"):
            torch.compile(call, backend="eager")()
    arguments = (None, None, None, None, None, None, None, "gate_up", None, None, None, 1)
    with pytest.raises(ValueError, match=r"^quantize: scale is None"):
        torch.ops.moecore.quantize(x, "fp8_tensor_static", None, *arguments)
    with pytest.raises(ValueError, match=r"^quantize: scale is given"):
        torch.ops.moecore.quantize(x, "fp8_token", None, scale, *arguments[1:])


def test_compile_takes_outputs_in_a_list(layer: dict[str, Any]) -> None:
    def f(logits: Any, weights: Any, ids: Any) -> Any:
        return moecore.route(logits, K, out=[weights, ids])

    torch._dynamo.reset()
    memory = torch.zeros(T, K), torch.zeros(T, K, dtype=torch.int32)
    result = torch.compile(f, fullgraph=True, backend="aot_eager")(layer["logits"], *memory)
    for given, returned, expected in zip(memory, result, (layer["weights"], layer["ids"]), strict=True):
        assert torch.equal(given, expected)
        assert torch.equal(returned, expected)


def test_compile_checks_what_is_said_of_out(layer: dict[str, Any]) -> None:
    plan, out = layer["plan"], torch.zeros(T, H)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"^finalize: hidden is 3, expected None or the 16 columns of out"):
        torch.compile(lambda rows: moecore.finalize(rows, plan, hidden=3, out=out), backend="eager")(
            layer["rows"]
        )


def test_exported_formats_run_in_another_process(layer: dict[str, Any], tmp_path: Any) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            fmt = moecore.QuantFormat("mxfp4", layout="swizzled_8x4", rounding="floor")
            return tuple(moecore.quantize(x, fmt))

    torch.export.save(torch.export.export(Layer(), (layer["x"],)), tmp_path / "layer.pt2")
    torch.save(layer["x"], tmp_path / "x.pt")
    code = (
        "import sys, torch, moecore, moecore.torch\n"
        "x = torch.load(sys.argv[2])\n"
        "fmt = moecore.QuantFormat('mxfp4', layout='swizzled_8x4', rounding='floor')\n"
        "got, expected = torch.export.load(sys.argv[1]).module()(x), moecore.quantize(x, fmt)\n"
        "print(all(torch.equal(a, b) for a, b in zip(got, expected)))"
    )
    command = [sys.executable, "-c", code, tmp_path / "layer.pt2", tmp_path / "x.pt"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_symbolic_scale_shapes_are_the_formats() -> None:
    from moecore.torch_ops.definitions import _scale_shape

    for fmt in (moecore.QuantFormat(f) if isinstance(f, str) else f for f in FORMATS):
        for rows in (1, 7, 8, 127, 128, 300):
            for cols in (16, 64, 100, 2880):
                assert _scale_shape(fmt, rows, cols, None, None) == tuple(fmt.scale_shape(rows, cols))
                if fmt.layout == "swizzled_128x4":
                    most = moecore.expert_scale_rows(rows, E)
                    assert _scale_shape(fmt, rows, cols, E, None)[0] == most
