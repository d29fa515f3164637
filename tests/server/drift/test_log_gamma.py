"""ln Γ and its neighbours on arrays. Properties, against Python's own and known constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.drift import log_gamma as gamma


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_is_what_python_computes_one_by_one(values: list[float]) -> None:
    """Below, at and beyond the shift."""
    want = np.array([math.lgamma(each) for each in values])
    assert (np.abs(gamma.log_gamma(values) - want) <= 1e-12 * np.maximum(1, np.abs(want))).all()


@given(st.floats(1e-9, 1e6), st.integers(0, 60))
def test_rising_factorial_is_its_product(a: float, count: int) -> None:
    """Also where two ln Γ would cancel."""
    want = math.fsum(math.log(a + i) for i in range(count))
    found = float(gamma.log_rising(a, count))
    assert abs(found - want) <= 1e-12 * max(1.0, abs(want))


@given(st.floats(1e-6, 1e3), st.integers(0, 10**6))
def test_large_counts_rise_as_the_difference(a: float, count: int) -> None:
    """Windows may be long."""
    want = math.lgamma(a + count) - math.lgamma(a)
    assert abs(float(gamma.log_rising(a, count)) - want) <= 1e-11 * max(1.0, abs(want))


def test_rising_broadcasts() -> None:
    """One concentration, many counts."""
    assert gamma.log_rising([[2.0], [30.0]], [[0, 3]]).round(9).tolist() == [
        [0.0, round(math.log(2 * 3 * 4), 9)],
        [0.0, round(math.log(30 * 31 * 32), 9)],
    ]


def test_derivatives_at_known_points() -> None:
    """Euler's constant and the Basel problem (DLMF 5.4.12, 5.4.13, 5.15.3)."""
    euler = 0.57721566490153286
    assert gamma.digamma(1) == pytest.approx(-euler, abs=1e-12)
    assert gamma.digamma(0.5) == pytest.approx(-euler - 2 * math.log(2), abs=1e-12)
    assert gamma.trigamma(1) == pytest.approx(math.pi**2 / 6, abs=1e-12)
    assert gamma.trigamma(0.5) == pytest.approx(math.pi**2 / 2, abs=1e-12)


@given(st.floats(1e-3, 1e5))
def test_trigamma_is_inverted(z: float) -> None:
    """By bisection, to rounding."""
    assert gamma.trigamma_inverse(gamma.trigamma(z)) == pytest.approx(z, rel=1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_refuses_what_has_no_logarithm(bad: float) -> None:
    """Rather than NaN that spreads."""
    with pytest.raises(ValueError, match="positive"):
        gamma.log_gamma([1.0, bad])
    with pytest.raises(ValueError, match="positive"):
        gamma.log_rising([1.0, bad], 1)
    if bad:
        with pytest.raises(ValueError, match="counts"):
            gamma.log_rising(1.0, [bad])
