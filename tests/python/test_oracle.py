"""The oracle's own arithmetic, against exact rationals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle


def _nearest_f32(value: Fraction) -> np.float32:
    """Rounds an exact value by comparing the neighbours of its f64 approximation."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    best = min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))
    return best


def test_fma_is_rounded_once(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 2000)).astype(np.float32)
    # Close to -a*b, where a product rounded first would show, and far below it, where a double rounding would.
    near = -(a * b) * np.float32(1 + 2.0**-20)
    tiny = (a * b * np.float32(2.0**-26)).astype(np.float32)
    for c in (near.astype(np.float32), tiny, np.zeros_like(a)):
        got = oracle.fma32(a, b, c)
        for i in range(0, 2000, 7):
            exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
            assert got[i] == _nearest_f32(exact)


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    cases = [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7), (-0.0, -0.0)]
    for value, expected in cases:
        assert oracle.round_to(value, "bf16") == np.float32(expected)
    assert np.isinf(oracle.round_to(3.4e38, "bf16"))
    assert np.isnan(oracle.round_to(np.nan, "bf16"))


def test_bounds_reject_what_is_wrong(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((4, 32)).astype(np.float32), rng.standard_normal((2, 8, 32)).astype(np.float32)
    value, bound = oracle.grouped_gemm(x, w, np.array([0, 2, 4]), "f32")
    assert (bound < 1e-3).all()
    wrong = oracle.grouped_gemm(x, w[::-1], np.array([0, 2, 4]), "f32").value
    assert (np.abs(wrong - value) > bound).mean() > 0.9
