"""Every op against the oracle, for every framework and dtype."""

from __future__ import annotations

from typing import Any

import moecore
import numpy as np
import oracle
import pytest
from conftest import Frame

DTYPES = ["f32", "f16", "bf16"]
SHAPES = [(0, 16, 2, 8), (1, 7, 1, 1), (5, 33, 3, 4), (17, 64, 8, 8), (40, 129, 2, 300)]  # T, H, K, E


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    return oracle.round_to(rng.standard_normal(shape) * scale, dtype)


def random_ids(rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int) -> np.ndarray:
    """Ids with dropped routes and repeats."""
    ids = rng.integers(-1, num_experts + 1, (num_tokens, top_k))
    if num_tokens > 3:
        ids[3] = num_experts - 1  # a hot expert
    return ids.astype(np.int32)


def check(actual: np.ndarray, expected: oracle.Bounded) -> None:
    assert actual.shape == expected.value.shape
    assert np.isfinite(actual).all()
    excess = np.abs(actual.astype(np.float64) - expected.value) - expected.bound
    assert excess.size == 0 or excess.max() <= 0, f"off by {excess.max()} more than the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_route(frame: Frame, rng: np.random.Generator, dtype: str, scoring: str) -> None:
    for num_tokens, _, top_k, num_experts in SHAPES:
        # Distinct logits: no ties, so the ids are the oracle's.
        logits = np.stack(
            [rng.permutation(num_experts) for _ in range(num_tokens)] or [np.zeros(num_experts)]
        )
        logits = oracle.round_to(logits[:num_tokens] / 32 - 2, dtype)
        expected = oracle.route(logits, top_k, scoring, renormalize=True, scale=2.5)
        weights, ids = moecore.route(
            frame.make(logits, dtype), top_k, scoring=scoring, renormalize=True, scale=2.5
        )
        np.testing.assert_array_equal(frame.read(ids), expected.ids)
        np.testing.assert_allclose(frame.read(weights), expected.weights, rtol=64 * oracle.EPS32, atol=0)


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_route_grouped(frame: Frame, rng: np.random.Generator, group_score: str) -> None:
    logits, bias = values(rng, (23, 32), "f32"), values(rng, (32,), "f32", 0.2)
    padding = rng.random(23) < 0.2
    expected = oracle.route(logits, 4, "sigmoid", bias, 8, 3, group_score, True, 1.5, padding)
    weights, ids = moecore.route(
        frame.make(logits, "f32"),
        4,
        scoring="sigmoid",
        bias=frame.make(bias, "f32"),
        num_groups=8,
        topk_groups=3,
        group_score=group_score,
        renormalize=True,
        scale=1.5,
        is_padding=frame.make(padding, "bool"),
    )
    np.testing.assert_array_equal(frame.read(ids), expected.ids)
    np.testing.assert_allclose(frame.read(weights), expected.weights, rtol=64 * oracle.EPS32, atol=0)


def test_route_not_finite_and_ties(frame: Frame) -> None:
    logits = np.array(
        [[1, 1, 1, 1], [np.nan, np.inf, -np.inf, 0], [np.nan] * 4, [2, np.nan, 2, 5]], np.float32
    )
    weights, ids = moecore.route(frame.make(logits, "f32"), 2)
    np.testing.assert_array_equal(frame.read(ids), [[0, 1], [3, -1], [-1, -1], [3, 0]])
    assert np.isfinite(frame.read(weights)).all()
    assert (frame.read(weights)[frame.read(ids) < 0] == 0).all()


@pytest.mark.parametrize("id_dtype", ["i32", "i64"])
def test_plan(frame: Frame, rng: np.random.Generator, id_dtype: str) -> None:
    for num_tokens, _, top_k, num_experts in SHAPES:
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        expected = oracle.plan(ids, num_experts)
        plan = moecore.plan(frame.make(ids, id_dtype), num_experts, problem_sizes=(96, 40))
        for name, tensor in expected._asdict().items():
            np.testing.assert_array_equal(frame.read(getattr(plan, name)), tensor, err_msg=name)
        counts = np.diff(expected.expert_offsets)
        first, second = frame.read(plan.problem_sizes1), frame.read(plan.problem_sizes2)
        np.testing.assert_array_equal(first, [[c, 80, 96] for c in counts])
        np.testing.assert_array_equal(second, [[c, 96, 40] for c in counts])
        assert (plan.num_tokens, plan.top_k, plan.num_experts) == (num_tokens, top_k, num_experts)


def test_plan_of_local_experts(frame: Frame, rng: np.random.Generator) -> None:
    ids = random_ids(rng, 29, 4, 16)
    expert_map = np.full(16, -1, np.int32)
    expert_map[[3, 15, 7]] = [0, 1, 2]
    expected = oracle.plan(ids, 3, expert_map)
    plan = moecore.plan(frame.make(ids, "i32"), 3, expert_map=frame.make(expert_map, "i32"))
    np.testing.assert_array_equal(frame.read(plan.slot_row), expected.slot_row)
    expected = oracle.plan(ids, 5, first_expert=8)
    plan = moecore.plan(frame.make(ids, "i32"), 5, first_expert=8)
    np.testing.assert_array_equal(frame.read(plan.row_route), expected.row_route)


@pytest.mark.parametrize("num_tokens", [0, 1, 30, 200])
def test_route_plan_is_route_and_plan(frame: Frame, rng: np.random.Generator, num_tokens: int) -> None:
    logits = frame.make(values(rng, (num_tokens, 24), "f32"), "f32")
    options: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 4, "topk_groups": 2, "renormalize": True}
    local: dict[str, Any] = {"first_expert": 6, "problem_sizes": (96, 40)}
    weights, ids, plan = moecore.route_plan(logits, 5, 12, **options, **local)
    expected = moecore.route(logits, 5, **options)
    np.testing.assert_array_equal(frame.read(weights), frame.read(expected[0]))
    np.testing.assert_array_equal(frame.read(ids), frame.read(expected[1]))
    for tensor, other in zip(plan, moecore.plan(expected[1], 12, **local), strict=True):
        np.testing.assert_array_equal(frame.read(tensor), frame.read(other))
    everyone = moecore.route_plan(logits, 5)[2]
    assert everyone.num_experts == 24
    assert everyone.problem_sizes1 is None


def test_scales_move_beside_their_rows(frame: Frame, rng: np.random.Generator) -> None:
    for num_tokens, hidden, top_k, num_experts in SHAPES:
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        row_token = oracle.plan(ids, num_experts).row_token
        x = rng.integers(0, 200, (num_tokens, hidden))
        scales = values(rng, (num_tokens, 3), "f32")
        plan = moecore.plan(frame.make(ids, "i32"), num_experts)
        rows, row_scales = moecore.permute(frame.make(x, "u8"), plan, scales=frame.make(scales, "f32"))
        np.testing.assert_array_equal(frame.read(rows), oracle.shuffle_rows(x, row_token))
        np.testing.assert_array_equal(frame.read(row_scales), oracle.shuffle_rows(scales, row_token))
        rows, row_scales = moecore.shuffle_rows(
            frame.make(x, "u8"), plan.row_token, scales=frame.make(scales, "f32")
        )
        np.testing.assert_array_equal(frame.read(rows), oracle.shuffle_rows(x, row_token))
        np.testing.assert_array_equal(frame.read(row_scales), oracle.shuffle_rows(scales, row_token))


@pytest.mark.parametrize("layout", ["linear", "column_major"])
def test_finalize_of_codes(torch: Any, rng: np.random.Generator, layout: str) -> None:
    """e4m3 rows with block scales: to bf16 as the chain says, to codes as quantize() does."""
    num_tokens, top_k, hidden = 13, 3, 300
    codes = torch.from_numpy(values(rng, (40, hidden), "f32")).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(np.abs(values(rng, (40, 3), "f32")))
    weights = values(rng, (num_tokens, top_k), "f32")
    slots = rng.integers(-1, 40, (num_tokens, top_k)).astype(np.int32)
    given: Any = scales if layout == "linear" else scales.T.contiguous()
    arguments: Any = (codes, torch.from_numpy(slots), torch.from_numpy(weights))
    options: Any = {"row_scales": given, "scale_layout": layout}

    expected = np.zeros((num_tokens, hidden), np.float32)
    wide = np.repeat(scales.numpy(), 128, axis=1)[:, :hidden]
    for t, j in np.ndindex(*slots.shape):
        if (r := slots[t, j]) >= 0:
            expected[t] = oracle.fma32(weights[t, j] * wide[r], codes[r].float().numpy(), expected[t])
    out = moecore.finalize(*arguments, dtype="f32", **options)
    np.testing.assert_array_equal(out.numpy(), expected)
    narrow = moecore.finalize(*arguments, dtype="bf16", **options)
    np.testing.assert_array_equal(narrow.float().numpy(), oracle.round_to(expected, "bf16"))

    out_codes, out_scales = moecore.finalize_quantize(*arguments, **options)
    again = moecore.quantize(out, moecore.QuantFormat("fp8_block128", layout=layout))
    assert out_codes.dtype == torch.float8_e4m3fn
    assert torch.equal(out_codes.view(torch.uint8), again.data.view(torch.uint8))
    assert torch.equal(out_scales, again.scales)
    dead: Any = moecore.finalize_quantize(codes, torch.full((4, 2), -1, dtype=torch.int32))
    assert (dead[0].view(torch.uint8) == 0).all()
    assert torch.isfinite(dead[1]).all()
    assert (dead[1] > 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, "u8", "i64"])
def test_permute(frame: Frame, rng: np.random.Generator, dtype: str) -> None:
    for num_tokens, hidden, top_k, num_experts in SHAPES:
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        if dtype in DTYPES:
            x = values(rng, (num_tokens, hidden), dtype)
        else:
            x = rng.integers(0, 200, (num_tokens, hidden))
        plan = moecore.plan(frame.make(ids, "i32"), num_experts)
        rows = frame.read(moecore.permute(frame.make(x, dtype), plan))
        np.testing.assert_array_equal(rows, oracle.shuffle_rows(x, oracle.plan(ids, num_experts).row_token))


@pytest.mark.parametrize("dtype", [*DTYPES, "u8", "bool"])
def test_shuffle_rows(frame: Frame, rng: np.random.Generator, dtype: str) -> None:
    for rows, width in [(0, 4), (3, 0), (9, 1), (9, 127), (64, 512)]:
        x = values(rng, (rows, width), dtype) if dtype in DTYPES else rng.integers(0, 2, (rows, width))
        map = rng.integers(-2, rows + 2, 21).astype(np.int32)
        out = frame.read(moecore.shuffle_rows(frame.make(x, dtype), frame.make(map, "i32")))
        np.testing.assert_array_equal(out, oracle.shuffle_rows(x, map))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved", "plain"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swiglu_oai"])
def test_activate(frame: Frame, rng: np.random.Generator, kind: str, order: str, dtype: str) -> None:
    for rows, width in [(0, 8), (1, 2), (13, 46), (3, 258)]:
        x = values(rng, (rows, width), dtype, 4.0)
        expected = oracle.activate(x, kind, order)
        # gelu's 1 + erf and 1 + tanh cancel for negative x: an absolute error of x eps times the other factor.
        slack = 64 * oracle.EPS32 * (np.abs(expected) + 64 * oracle.EPS32)
        if kind.startswith("gelu"):
            gate = {"plain": x, "gate_up": x[:, : width // 2], "up_gate": x[:, width // 2 :]}
            up = {"plain": 1.0, "gate_up": x[:, width // 2 :], "up_gate": x[:, : width // 2]}
            g = gate.get(order, x[:, 0::2]).astype(np.float64)
            slack = slack + 4 * oracle.EPS32 * np.abs(g * up.get(order, x[:, 1::2]))
        out = frame.read(moecore.activate(frame.make(x, dtype), kind, order=order))
        check(out, oracle.rounded(expected, slack, dtype))


def test_activate_parameters_and_nan(frame: Frame) -> None:
    x = np.array([[9, -9, 9, np.nan], [1, np.nan, 2, 3]], np.float32)
    out = frame.read(
        moecore.activate(frame.make(x, "f32"), "swiglu_oai", order="gate_up", alpha=1.0, limit=2.0)
    )
    expected = oracle.activate(x, "swiglu_oai", alpha=1.0, limit=2.0)
    np.testing.assert_array_equal(np.isnan(out), [[False, True], [False, True]])
    np.testing.assert_allclose(out, expected, rtol=64 * oracle.EPS32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm(frame: Frame, rng: np.random.Generator, dtype: str) -> None:
    for num_tokens, hidden, top_k, num_experts in SHAPES[:-1]:
        n = 46
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        x, w = values(rng, (num_tokens, hidden), dtype), values(rng, (num_experts, n, hidden), dtype)
        bias = values(rng, (num_experts, n), dtype)
        planned = oracle.plan(ids, num_experts)
        plan = moecore.plan(frame.make(ids, "i32"), num_experts)
        out = moecore.grouped_gemm(
            frame.make(x, dtype),
            frame.make(w, dtype),
            plan.expert_offsets,
            bias=frame.make(bias, dtype),
            row_token=plan.row_token,
        )
        expected = oracle.grouped_gemm(x, w, planned.expert_offsets, dtype, bias, planned.row_token)
        check(frame.read(out)[: planned.expert_offsets[-1]], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_finalize_is_exact(frame: Frame, rng: np.random.Generator, dtype: str, weight_dtype: str) -> None:
    for num_tokens, hidden, top_k, num_experts in SHAPES:
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        slot_row = oracle.plan(ids, num_experts).slot_row
        rows = values(rng, (num_tokens * top_k, hidden), dtype)
        weights = values(rng, (num_tokens, top_k), weight_dtype)
        residual = values(rng, (num_tokens, hidden - 1), dtype)
        for cast in (False, True):
            out = moecore.finalize(
                frame.make(rows, dtype),
                frame.make(slot_row, "i32"),
                frame.make(weights, weight_dtype),
                hidden=hidden - 1,
                cast_weights=cast,
                residual=frame.make(residual, dtype),
            )
            expected = oracle.finalize(rows, slot_row, dtype, weights, hidden - 1, cast, residual)
            np.testing.assert_array_equal(frame.read(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "order"), [("silu", "gate_up"), ("swiglu_oai", "interleaved"), ("relu2", "plain")]
)
def test_fused_experts(frame: Frame, rng: np.random.Generator, dtype: str, kind: str, order: str) -> None:
    for num_tokens, hidden, top_k, num_experts in SHAPES[:-1]:
        inter = 24
        width = inter if order == "plain" else 2 * inter
        ids = random_ids(rng, num_tokens, top_k, num_experts)
        x = values(rng, (num_tokens, hidden), dtype)
        weights = values(rng, (num_tokens, top_k), "f32")
        w13 = values(rng, (num_experts, width, hidden), dtype, hidden**-0.5)
        w2 = values(rng, (num_experts, hidden, inter), dtype, inter**-0.5)
        b13, b2 = values(rng, (num_experts, width), dtype), values(rng, (num_experts, hidden), dtype)
        experts = moecore.Experts(
            frame.make(w13, dtype),
            frame.make(w2, dtype),
            order=order,
            activation=kind,
            w13_bias=frame.make(b13, dtype),
            w2_bias=frame.make(b2, dtype),
        )
        for on_input in (False, True):
            out = moecore.fused_experts(
                frame.make(x, dtype),
                frame.make(weights, "f32"),
                frame.make(ids, "i32"),
                experts,
                apply_router_weight_on_input=on_input,
            )
            expected = oracle.fused_experts(x, weights, ids, w13, w2, dtype, kind, order, b13, b2, on_input)
            check(frame.read(out), expected)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "u8"])
def test_transposed_experts(frame: Frame, rng: np.random.Generator, dtype: str) -> None:
    src = rng.integers(0, 100, (3, 37, 70)).astype(np.float32 if dtype != "u8" else np.uint8)
    out = moecore.transpose_experts(frame.make(src, dtype))
    np.testing.assert_array_equal(frame.read(out), src.transpose(0, 2, 1))
    experts = moecore.Experts(
        frame.make(src, dtype), frame.make(src, dtype), order="gate_up", transposed=True
    )
    assert (experts.num_experts, experts.hidden, experts.inter) == (3, 37, 37)


def test_out_arguments_are_written_and_returned(frame: Frame, rng: np.random.Generator) -> None:
    if not frame.writable:
        pytest.skip("immutable arrays")
    logits = values(rng, (6, 8), "f32")
    out = (frame.make(np.full((6, 2), 9), "f32"), frame.make(np.full((6, 2), 9), "i32"))
    weights, ids = moecore.route(frame.make(logits, "f32"), 2, out=out)
    assert weights is out[0]
    assert ids is out[1]
    np.testing.assert_array_equal(frame.read(ids), oracle.route(logits, 2).ids)


def test_repeated_calls_give_the_same_bits(frame: Frame, rng: np.random.Generator) -> None:
    x, weights = values(rng, (64, 96), "bf16"), values(rng, (64, 4), "f32")
    ids = random_ids(rng, 64, 4, 8)
    experts = moecore.Experts(
        frame.make(values(rng, (8, 64, 96), "bf16"), "bf16"),
        frame.make(values(rng, (8, 96, 32), "bf16"), "bf16"),
        order="gate_up",
    )
    args: Any = (frame.make(x, "bf16"), frame.make(weights, "f32"), frame.make(ids, "i32"), experts)
    first = frame.read(moecore.fused_experts(*args))
    for _ in range(3):
        np.testing.assert_array_equal(frame.read(moecore.fused_experts(*args)), first)
