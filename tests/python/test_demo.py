"""The demo: its float64 reference and error bound first, then the command on shrunk models."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import types

import moecore
import numpy as np
import pytest
from moecore import cli, demo, reference
from moecore.models import MODELS, MoeLayer

TINY = MoeLayer("tiny", num_experts=4, top_k=2, hidden=6, inter=5)
TINY_OSS = dataclasses.replace(
    TINY,
    activation="swiglu_oai",
    order="interleaved",
    alpha=1.702,
    beta=1.0,
    limit=0.7,
    expert_bias=True,
)


# --- The reference ---


def naive_layer(x, ids, weights, experts, layer):
    """The layer as scalar loops."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            w = experts[ids[t, j]]
            a = []
            for i in range(layer.inter):
                rows = (2 * i, 2 * i + 1) if layer.order == "interleaved" else (i, layer.inter + i)
                gate, up = (
                    sum(x[t, k] * w.w13[n, k] for k in range(layer.hidden)) + w.w13_bias[n] for n in rows
                )
                gate, up = min(gate, layer.limit), max(-layer.limit, min(up, layer.limit))
                alpha = layer.alpha if layer.activation == "swiglu_oai" else 1.0
                a.append(gate / (1 + math.exp(-alpha * gate)) * (up + layer.beta))
            for h in range(layer.hidden):
                o = sum(a[i] * w.w2[h, i] for i in range(layer.inter)) + w.w2_bias[h]
                y[t, h] += weights[t, j] * o
    return y


def tiny_problem(layer, seed=0):
    rng = np.random.default_rng(seed)
    e, h, i = layer.num_experts, layer.hidden, layer.inter
    experts = [
        reference.ExpertWeights(
            rng.standard_normal((2 * i, h)),
            rng.standard_normal((h, i)),
            rng.standard_normal(2 * i),
            rng.standard_normal(h),
        )
        for _ in range(e)
    ]
    ids = np.stack([rng.permutation(e)[: layer.top_k] for _ in range(7)])
    return rng.standard_normal((7, h)), ids, rng.random(ids.shape), experts


@pytest.mark.parametrize("layer", [TINY, TINY_OSS], ids=["silu", "swiglu_oai"])
def test_reference_is_the_layer(layer):
    x, ids, weights, experts = tiny_problem(layer)
    y, separate, fused = reference.experts_layer(x, ids, weights, experts.__getitem__, layer, "bf16")
    np.testing.assert_allclose(y, naive_layer(x, ids, weights, experts, layer), rtol=1e-12, atol=1e-12)
    assert (separate >= fused).all()
    assert (fused > 0).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_to_float64_is_exact(dtype):
    values = np.array([0.0, -0.0, 1.0, -1.5, 2.0**-20, 65280.0])
    single = values.astype(np.float32)
    bits = {
        "f32": single,
        "f16": single.astype(np.float16),
        "bf16": (single.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    expected = values if dtype != "f16" else values.astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(reference.to_float64(bits), expected)


def choose(logits, layer, bias=None):
    """The ids of a plain top-k, without groups."""
    key = logits if bias is None else 1 / (1 + np.exp(-logits)) + bias
    return np.argsort(-key, axis=1, kind="stable")[:, : layer.top_k]


def test_route_accepts_the_right_experts_and_weighs_them():
    logits = np.array([[0.0, 1.0, 2.0, -1.0]])
    weights, right = reference.route(logits, None, np.array([[2, 1]]), TINY)
    assert right
    np.testing.assert_allclose(weights, [[math.e / (1 + math.e), 1 / (1 + math.e)]])


@pytest.mark.parametrize("ids", [[2, 0], [2, 2], [3, 1]])
def test_route_refuses_wrong_experts(ids):
    logits = np.array([[0.0, 1.0, 2.0, -1.0]])
    assert not reference.route(logits, None, np.array([ids]), TINY)[1]


def test_route_with_groups_and_bias():
    layer = dataclasses.replace(
        TINY, num_experts=8, scoring="sigmoid", num_groups=4, topk_groups=2, scale=2.5, selection_bias=True
    )
    logits = np.zeros((1, 8))
    bias = np.array([0.9, 0.0, 0.5, 0.5, 0.3, 0.3, 0.8, 0.0])  # groups: .9 1.0 .6 .8
    weights, right = reference.route(logits, bias, np.array([[0, 2]]), layer)
    assert right
    np.testing.assert_allclose(weights, [[1.25, 1.25]])
    assert not reference.route(logits, bias, np.array([[0, 6]]), layer)[1]  # 6 is in a group that lost
    assert reference.route(logits, bias, np.array([[0, 3]]), layer)[1]  # ties with 2


# --- The bound ---


def quantised(values, dtype):
    """Values rounded to the dtype, to nearest with ties to even."""
    if dtype == "bf16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return values.astype({"f16": np.float16, "f32": np.float32}[dtype]).astype(np.float64)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rounded_gate_up", [False, True])
def test_the_bound_holds_for_an_engine_that_rounds_and_is_not_loose(dtype, rounded_gate_up):
    """A NumPy engine that rounds where moecore may: its errors reach a tenth of the bound, never all."""
    layer = dataclasses.replace(TINY, num_experts=4, top_k=2, hidden=256, inter=192)
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(32)])
    weights = quantised(rng.random(ids.shape), "f32")
    x = quantised(rng.standard_normal((32, 256)), dtype)
    experts = [
        reference.ExpertWeights(
            quantised(rng.standard_normal((384, 256)) / 16, dtype),
            quantised(rng.standard_normal((256, 192)) / 14, dtype),
        )
        for _ in range(4)
    ]
    expected, *bounds = reference.experts_layer(x, ids, weights, experts.__getitem__, layer, dtype)
    y = np.zeros_like(x, np.float32)
    for j in range(2):
        for t in range(32):
            w = experts[ids[t, j]]
            gate_up = w.w13.astype(np.float32) @ x[t].astype(np.float32)
            if rounded_gate_up:
                gate_up = quantised(gate_up, dtype).astype(np.float32)
            gate, up = gate_up[:192], gate_up[192:]
            a = quantised(gate / (1 + np.exp(-gate)) * up, dtype).astype(np.float32)
            o = quantised(w.w2.astype(np.float32) @ a, dtype).astype(np.float32)
            y[t] += np.float32(weights[t, j]) * o
    used = np.abs(quantised(y, dtype) - expected) / bounds[0 if rounded_gate_up else 1]
    assert used.max() <= 1
    if dtype != "f32":  # in f32 the bound allows for accumulators that truncate
        assert used.max() >= 0.1


# --- The command ---


@pytest.fixture(autouse=True)
def known_roof(monkeypatch, request):
    """Measuring takes a second or more, and what is measured matters to one test alone."""
    if "measured_roof" not in request.fixturenames:
        roof = types.SimpleNamespace(read_bytes_per_s=1e10, f32_flop_per_s=1e11, bf16_flop_per_s=2e11)
        monkeypatch.setattr(moecore, "measure_roof", lambda device: roof)


@pytest.fixture
def measured_roof():
    """Asks for the measurement itself."""


def test_the_roof_is_measured(capsys, measured_roof):
    status, out, _ = run(capsys, "--scale", "0.002", "--tokens", "2")
    assert status == 0
    bandwidth, flops = re.search(r"measured roof: ([0-9.]+) GB/s read, ([0-9]+) GFLOP/s bf16", out).groups()
    assert float(bandwidth) > 0.1
    assert float(flops) > 1


def run(capsys, *args):
    status = cli.main(["demo", "--device", "cpu", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


STAGES = (
    "route",
    "plan",
    "permute",
    "grouped_gemm 1",
    "activate",
    "grouped_gemm 2",
    "finalize",
    "together",
    "fused_experts",
)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_passes(capsys, model):
    status, out, _ = run(capsys, "--model", model, "--scale", "0.002", "--tokens", "16")
    assert status == 0, out
    assert out.rstrip().endswith("PASS")
    for stage in STAGES:
        assert f"\n{stage} " in out
    assert "of 16 tokens against float64" in out


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_every_dtype_passes(capsys, dtype, tokens):
    status, out, _ = run(
        capsys, "--model", "gpt-oss-20b", "--scale", "0.01", "--dtype", dtype, "--tokens", str(tokens)
    )
    assert status == 0, out


def test_threads(capsys):
    before = moecore.get_num_threads()
    try:
        status, out, _ = run(capsys, "--scale", "0.002", "--tokens", "3", "--threads", "1")
        assert status == 0
        assert ", 1 threads)" in out
    finally:
        moecore.set_num_threads(before)


@pytest.mark.parametrize("broken", ["fused_experts", "finalize", "grouped_gemm"])
def test_a_wrong_result_fails(capsys, monkeypatch, broken):
    """One row of one result is four times what it should be, or a quarter."""
    correct = getattr(moecore, broken)

    def wrong(*args, out, **options):
        correct(*args, out=out, **options)
        bits = out.base if hasattr(out, "base") else out
        bits[-1] ^= 0x100  # the second bit of a bf16's exponent
        return out

    monkeypatch.setattr(moecore, broken, wrong)
    status, out, _ = run(capsys, "--scale", "0.01", "--tokens", "8")
    assert status == 1
    assert "OUT OF BOUND" in out
    assert out.rstrip().endswith("FAIL")


def test_wrong_routing_fails(capsys, monkeypatch):
    correct = moecore.route

    def wrong(*args, out, **options):
        correct(*args, out=out, **options)
        ids = out[1]
        ids[0, 0] = (ids[0].max() + 1) % 16

    monkeypatch.setattr(moecore, "route", wrong)
    status, out, _ = run(capsys, "--scale", "0.01", "--tokens", "8")
    assert status == 1
    assert "WRONG EXPERTS" in out


def test_too_little_memory_is_told_with_a_scale_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(demo, "_available_bytes", lambda: 2e9)
    status, _, err = run(capsys, "--model", "mixtral-8x7b")
    assert status == 2
    assert "needs" in err
    scale = float(err.split("--scale ")[1])
    demo._require_memory(MODELS["mixtral-8x7b"].scaled(scale), 64, "bf16", scale)


def test_a_gpu_that_is_not_there(capsys):
    if moecore.is_available("cuda"):
        pytest.skip("there is a GPU")
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "--device cuda:" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "-1", "1.5", "nan"])
def test_bad_scales_are_refused(capsys, scale):
    status, _, err = run(capsys, "--scale", scale)
    assert status == 2
    assert "scale" in err


def test_only_numpy_is_needed():
    program = (
        "import sys\n"
        "for name in ('torch', 'ml_dtypes', 'jax', 'cupy'): sys.modules[name] = None\n"
        "from moecore.cli import main\n"
        "sys.exit(main(['demo', '--scale', '0.002', '--tokens', '2']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- Shapes ---


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.01, 0.001])
def test_scaled_layers_are_valid_and_near_their_share(model, scale):
    full, layer = MODELS[model], MODELS[model].scaled(scale)
    assert 0.4 * scale <= layer.weight_bytes(2) / full.weight_bytes(2) <= scale
    assert layer.num_experts % layer.num_groups == 0
    assert layer.top_k <= layer.num_experts // layer.num_groups * layer.topk_groups
    assert layer.num_experts <= full.num_experts
    if layer.hidden < full.hidden:
        assert layer.num_experts == 2 * layer.top_k or full.num_experts < 4 * layer.top_k
