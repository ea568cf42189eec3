"""``moecore bench``, ``bench compare``, ``tune`` and bench/report.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moecore import _core, cli
from moecore.bench import cases, checks, harness, tune, workloads
from moecore.bench.spaces import Space
from moecore.models import MODELS, MoeLayer

ROOT = Path(__file__).resolve().parents[2]
TINY = MoeLayer("tiny", num_experts=6, top_k=3, hidden=256, inter=128)
ODD = MoeLayer(
    "odd",
    num_experts=5,
    top_k=2,
    hidden=320,
    inter=96,
    scoring="sigmoid",
    selection_bias=True,
    activation="swiglu_oai",
    order="interleaved",
    alpha=1.702,
    beta=1.0,
    limit=7.0,
    expert_bias=True,
)
RUN_FIELDS = {
    "record", "schema", "date", "command", "commit", "hardware", "versions", "roof", "roof_unit", "peers",
    "missing_peers", "timing",
}  # fmt: skip
TIME_FIELDS = {
    "record", "case", "op", "part", "model", "tokens", "dtype", "routing", "by", "shape", "us", "spread",
    "samples", "sets", "bytes", "flops", "gb_per_s", "tflop_per_s", "roof_us", "of_roof", "clock_mhz",
    "power_w", "max_rel_error", "check", "kernel",
}  # fmt: skip


@pytest.fixture
def small_models(monkeypatch):
    """Two layers that take no time, in place of the published ones."""
    for layer in (TINY, ODD):
        monkeypatch.setitem(MODELS, layer.name, layer)
    monkeypatch.setattr(Space, "cold_bytes", 1 << 16)


@pytest.fixture
def roof(monkeypatch):
    """A made-up roof, since measuring one takes a second."""
    found = harness.roof.Roof(1e10, 1e10, 1e10, 1e11, 1e11, 0.0)
    monkeypatch.setattr(harness.roof, "measure", lambda space: found)
    return found


def run(capsys, *args):
    status = cli.main(list(args))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def bench(capsys, path, *args):
    common = ("bench", "--device", "cpu", "--quick", "--seconds", "0.001", "--out", str(path))
    status, out, err = run(capsys, *common, *args)
    assert status == 0, out + err
    return [json.loads(line) for line in path.read_text().splitlines()], out


def test_records_have_the_schema(capsys, tmp_path, small_models):
    records, out = bench(
        capsys, tmp_path / "a.jsonl", "--model", "tiny", "--op", "route,finalize,grouped_gemm"
    )
    first, times = records[0], records[1:]
    assert first["record"] == "run"
    assert set(first) == RUN_FIELDS
    assert first["schema"] == harness.SCHEMA
    assert first["hardware"]["isa"] == _core.cpu_isa()
    assert {"read", "write", "copy", "f32", "bf16", "fp8"} == set(first["roof"])
    assert all(first["roof"][k] > 0 for k in ("read", "write", "copy", "f32"))
    ours = [t for t in times if t["by"] == "moecore" and "skipped" not in t]
    assert len(ours) >= 6
    for t in ours:
        assert set(t) == TIME_FIELDS
        assert t["us"] > 0
        share, thousandth = t["roof_us"] / t["us"], 5e-4 / t["us"]  # both times are rounded to one
        assert abs(t["of_roof"] - share) <= thousandth * (1 + share) * 1.01 + 5e-5
        assert t["case"] in out
    assert len({(t["case"], t["by"]) for t in times}) == len(times)


@pytest.mark.parametrize("model", ["tiny", "odd"])
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_every_case_passes_its_check(capsys, tmp_path, small_models, roof, model, routing):
    arguments = ["--model", model, "--tokens", "1,7,70", "--peers", "none", "--routing", routing]
    if routing == "uniform":
        arguments += ["--dtype", ",".join(cases.all_dtypes())]
    records, _ = bench(capsys, tmp_path / "a.jsonl", *arguments, "--op", ",".join(cases.OPS))
    times = records[1:]
    assert {t["op"] for t in times} == set(cases.OPS)
    assert [t["case"] for t in times if "skipped" in t] == []
    assert {t["check"] for t in times} == {"pass"}


def test_peers_compute_the_same(capsys, tmp_path, small_models, roof):
    pytest.importorskip("torch")
    records, out = bench(capsys, tmp_path / "a.jsonl", "--model", "tiny", "--tokens", "9", "--peers", "auto")
    assert "torch" in records[0]["peers"]
    for peer in ("vllm", "sgl_kernel", "deep_gemm", "flashinfer"):
        assert peer in records[0]["missing_peers"]
        assert f"peer {peer} is missing" in out
    theirs = [t for t in records[1:] if t["by"] != "moecore"]
    assert {"route", "plan", "permute", "activate", "finalize", "fused_experts"} <= {t["op"] for t in theirs}
    assert [t for t in theirs if "skipped" in t or t.get("check", "pass") != "pass"] == []


@pytest.mark.parametrize("op", cases.OPS)
def test_a_check_sees_one_wrong_element(small_models, op):
    """Of the rows that are sampled: in a small batch these are all."""
    dtype = cases.select(cases.Selection(ops=[op], models=["tiny"], tokens=[4]))[0].dtype
    part = "up" if op == "grouped_gemm" else ""
    lab = workloads.Lab(Space())
    work = workloads.prepare(lab, cases.Case(op, TINY, 4, dtype, part))
    work.run(work.sets[0])
    output = work.output(work.sets[0])
    assert work.check(output).passed
    target = output[0] if isinstance(output, tuple) and op != "plan" else output
    target = output.slot_row if op == "plan" else target
    host = np.asarray(getattr(target, "base", None) if isinstance(target, _core.Retagged) else target)
    spot = host[1] if op == "transpose_experts" else host
    spot = spot.reshape(-1)[3:4]
    before = spot.copy()
    spot[...] = np.nan if spot.dtype.kind == "f" else before ^ 0x44
    assert not work.check(output).passed
    spot[...] = before
    assert work.check(output).passed


@pytest.mark.parametrize("dtype", ["bf16", "f32", "fp8_block128", "mxfp4", "nvfp4"])
def test_float64_on_the_device_is_that_of_the_host(dtype):
    torch = pytest.importorskip("torch")
    from moecore.bench import device_float64

    space, rng = Space(), np.random.default_rng(3)
    weights = workloads.Weights(space, ODD, dtype)
    host = weights.rows(weights.w13, 2)
    if weights.quantized:
        codes, scales = (space.matrix(part, 2) for part in (weights.w13.tensor, weights.w13.scales))
        if dtype == "fp8_block128":
            scales = scales.repeat(128, axis=0)[: len(codes)]
        factor = 1.0 if weights.w13.global_scale is None else float(weights.w13.global_scale[0])
        device = device_float64.dequantize_rows(
            torch.from_numpy(codes), torch.from_numpy(scales), dtype, factor
        )
        np.testing.assert_array_equal(device.numpy(), host)
    else:
        device = space.torch(weights.w13.tensor)[2]
    rows, variance = rng.normal(size=(3, ODD.hidden)), rng.uniform(size=(3, ODD.hidden))
    for ours, theirs in zip(
        device_float64.product(rows, device, [variance]), space.product(rows, host, [variance]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_bound_of_cut_sums_holds_for_sums_that_are_cut():
    rng = np.random.default_rng(1)
    codes = checks.code_values(fp4=False)[:, 0]
    products = rng.choice(codes[np.abs(codes) <= 2], (500, 768)) * rng.standard_normal((500, 768))
    total = np.zeros(500)
    for block in np.split(products, 768 // 128, axis=1):
        so_far = np.zeros(500)
        for step in np.split(block, 4, axis=1):
            terms = np.column_stack([step, so_far])
            last_bit = 2.0 ** (np.floor(np.log2(np.abs(terms).max(axis=1, keepdims=True))) - 13)
            so_far = (np.trunc(terms / last_bit) * last_bit).sum(axis=1)
        total += so_far
    error = np.abs(total - products.sum(axis=1))
    bound = checks.cut_sums((products**2).sum(axis=1))
    assert (error < bound).all()
    assert (error > bound / 20).any()


def test_a_wrong_result_fails_the_run(capsys, tmp_path, small_models, roof, monkeypatch):
    monkeypatch.setattr(checks, "exact", lambda actual, expected: checks.Check(np.inf, False))
    status, out, _ = run(
        capsys, "bench", "--device", "cpu", "--model", "tiny", "--tokens", "3", "--op", "permute",
        "--seconds", "0.001", "--peers", "none",
    )  # fmt: skip
    assert status == 1
    assert "!none" in out


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_routings(routing):
    ids = workloads.routed_ids(64, 4, 2000, routing, 1)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    counts = np.sort(np.bincount(ids.reshape(-1), minlength=64))[::-1]
    if routing == "one_hot":
        assert (counts[:4] == 2000).all()
    elif routing == "zipf":
        assert counts[0] > 5 * counts[32]
    else:
        assert counts[0] < 2 * counts[-1]


def test_the_checked_tokens_are_the_same_in_every_batch():
    one, many = (workloads.routed_ids(64, 4, t, "uniform", 0) for t in (1, 999))
    assert one[0].tolist() == many[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "permuet"), "--op: permuet is unknown"),
        (("--model", "gpt"), "--model: gpt is unknown"),
        (("--dtype", "fp9"), "--dtype: fp9 is unknown"),
        (("--tokens", "-1"), "-1 is negative"),
        (("--peers", "numpy"), "--peers: numpy is unknown"),
        (("compare", "nowhere.jsonl", "neither.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_requests(capsys, arguments, message):
    status, _, err = run(capsys, "bench", "--device", "cpu", *arguments)
    assert status == 2
    assert message in err


def write(path, us, spread=0.01, **more):
    rows = [
        {"record": "time", "case": f"c{i}", "by": "moecore", "us": t, "spread": spread}
        for i, t in enumerate(us)
    ]
    path.write_text("\n".join(json.dumps(row | more) for row in rows) + "\n")
    return str(path)


def test_compare(capsys, tmp_path):
    before = write(tmp_path / "a", [10.0, 20.0])
    assert run(capsys, "bench", "compare", before, write(tmp_path / "b", [10.2, 20.0]))[0] == 0
    status, out, _ = run(capsys, "bench", "compare", before, write(tmp_path / "c", [11.0, 15.0]))
    assert status == 1
    assert "1 slower by more than 5%: c0" in out
    assert "faster" in out
    assert run(capsys, "bench", "compare", "--threshold", "0.2", before, str(tmp_path / "c"))[0] == 0
    noisy = write(tmp_path / "d", [11.0, 20.0], spread=0.3)
    assert run(capsys, "bench", "compare", before, noisy)[0] == 0
    peer = write(tmp_path / "e", [99.0, 99.0], by="vllm")
    status, _, err = run(capsys, "bench", "compare", before, peer)
    assert status == 2
    assert "no case in common" in err
    (tmp_path / "f").write_text("{}\n")
    status, _, err = run(capsys, "bench", "compare", before, str(tmp_path / "f"))
    assert status == 2
    assert "f:1: not a record" in err


# --- tuning -------------------------------------------------------------------------------------------------

GOOD = """# by hand
finalize rows>=65 rows<=256 width=4096 sms=132 : slots=4 threads=64

grouped_gemm experts=128 : stream_k=1   # only there
route : threads=32
"""


def test_a_tuning_file_is_read(capsys, tmp_path):
    path = tmp_path / "tuning.txt"
    path.write_text(GOOD)
    assert run(capsys, "tune", "--check", str(path)) == (0, f"{path}: 3 policies\n", "")
    path.write_text("")
    assert _core.check_tuning(str(path)) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finalize slots=4", 'no ":"'),
        (": slots=4", "no op"),
        ("finalise : slots=4", 'op is "finalise", expected one of route, plan'),
        ("finalize rows<9 : slots=4", 'condition is "rows<9"'),
        ("finalize cols=9 : slots=4", 'condition is "cols=9", expected one of rows, width'),
        ("finalize rows=9x : slots=4", 'condition is "rows=9x"'),
        ("finalize rows=9 :", "no policy"),
        ("finalize : slots", 'policy is "slots"'),
        ("finalize : slots=four", 'policy is "slots=four"'),
    ],
)
def test_a_bad_line_is_named(capsys, tmp_path, line, message):
    path = tmp_path / "tuning.txt"
    path.write_text(f"{GOOD}{line}\n")
    status, _, err = run(capsys, "tune", "--check", str(path))
    assert status == 2
    assert f"{path}:6: " in err
    assert message in err


def test_a_missing_tuning_file_is_named(capsys):
    status, _, err = run(capsys, "tune", "--check", "/nowhere/tuning.txt")
    assert status == 2
    assert "/nowhere/tuning.txt" in err


def test_tune_says_what_it_lacks(capsys):
    status, _, err = run(capsys, "tune")
    assert status == 2
    assert "finalize" in err
    if _core.cuda_device_count()[0] == 0:
        assert run(capsys, "tune", "finalize")[0] == 2


def test_knobs_are_read_from_a_refusal():
    refusal = 'finalize: policy is "?=0", expected one of vectors=0|1 slots=1|2|4|8 threads=32'
    assert tune.knobs_in(refusal) == {"vectors": [0, 1], "slots": [1, 2, 4, 8], "threads": [32]}


def test_a_written_line_is_read_back(tmp_path):
    for op, dtype in tune.OPS.items():
        name, _, part = op.partition(".")
        case = cases.Case(name, TINY, 8, dtype, part)
        line = f"{name} {tune.condition(tune.sizes(case), 8, 64, {'sms': 132})} : threads=64"
        path = tmp_path / "tuning.txt"
        path.write_text(line)
        assert _core.check_tuning(str(path)) == 1, line


@pytest.mark.skipif(_core.cuda_device_count()[0] == 0, reason="no GPU")
def test_a_tuning_file_changes_the_policy(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "tuning.txt"
    path.write_text("finalize rows<=8 : slots=1 threads=96\nfinalize rows=5 : slots=3\n")
    script = """
import moecore, torch
for t in (4, 5, 9):
    rows = torch.ones(2 * t, 512, device="cuda").bfloat16()
    print(moecore.explain("finalize", rows, torch.zeros(t, 2, dtype=torch.int32, device="cuda")).strip())
"""
    env = {**os.environ, "MOECORE_TUNING": str(path)}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    tuned, refused, larger = out.stdout.splitlines()
    assert "slots=1 threads=96" in tuned
    assert "threads=96" not in refused  # its line has a value that no kernel has
    assert "threads=96" not in larger
    path.write_text("finalize rows : slots=1\n")
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert out.returncode != 0
    assert f"{path}:1:" in out.stderr


# --- pictures and tables ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib")
    path = ROOT / "bench" / "report.py"
    if not path.exists():
        pytest.skip("not a checkout")
    spec = importlib.util.spec_from_file_location("moecore_bench_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(report):
    return report.build(report.RESULTS, ROOT)


def test_the_committed_tables_are_those_of_the_results(built):
    for path, contents in built.items():
        if path.suffix == ".md":
            assert path.read_bytes() == contents, f"run bench/report.py: {path.name} is stale"


def test_the_committed_pictures_are_those_of_the_results(report, built):
    import matplotlib

    if matplotlib.__version__ != "3.11.2":
        pytest.skip("another matplotlib draws other bytes")
    for path, contents in built.items():
        if path.suffix == ".svg":
            assert report.same(path.read_bytes(), contents), f"run bench/report.py: {path.name} is stale"


def test_pictures_are_the_same_but_for_the_last_digit(report):
    assert report.same(b"M 1.25 -3 L", b"M 1.26 -3 L")
    assert not report.same(b"M 1.25 -3 L", b"M 1.27 -3 L")
    assert not report.same(b"M 1.25 -3 L", b"M 1.25 -3 H")
    assert not report.same(b"M 1.25 -3 L", b"M 1.25 L")


def test_the_same_results_give_the_same_bytes(report, built):
    machine = next(iter(report.load(report.RESULTS)), None)
    if machine is None:
        pytest.skip("no results")
    tag = "gpu" if machine.is_gpu else "cpu"
    for name in ("time", "roofline-layer"):
        assert report.PICTURES[name](machine) == built[ROOT / "docs" / f"{name}-{tag}.svg"]
