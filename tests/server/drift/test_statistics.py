"""Distances between histograms against worked examples and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift import statistics

PAIRS = (statistics.psi, statistics.jensen_shannon, statistics.hellinger, statistics.direction)
tables = st.integers(2, 12).flatmap(
    lambda bins: st.tuples(*[st.lists(st.integers(0, 5000), min_size=bins, max_size=bins)] * 3)
)
exact = settings(deadline=None, max_examples=100)


def test_worked_examples() -> None:
    """Shares are (1/4, 3/4) of 100 and (3/4, 1/4) of 200, with half a count in each bin."""
    p, q = (24.5, 74.5), (149.5, 49.5)  # + 0.5 each = 25, 75 of 100 and 150, 50 of 200
    assert statistics.psi(p, q) == pytest.approx(math.log(3) - (1 / 99 + 1 / 199))
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert statistics.jensen_shannon(p, q) == pytest.approx(1 - entropy)
    assert statistics.hellinger(p, q) == pytest.approx(math.sqrt(1 - math.sqrt(3) / 2))
    # P(observed > expected) - P(observed < expected) = 1/16 - 9/16
    assert statistics.direction(p, q) == pytest.approx(-0.5)


def test_psi_has_mean_zero_under_equality() -> None:
    """Debiased: the mean of many is near 0, their spread is that of chi-squared."""
    rng = np.random.default_rng(5)
    share = np.full(10, 0.1)
    found = [
        statistics.psi(rng.multinomial(2000, share), rng.multinomial(500, share))
        for _ in range(2000)
    ]
    raw = 9 * (1 / 2000 + 1 / 500)  # what it would be without debiasing
    assert abs(np.mean(found)) < raw / 20
    # chi2 with 9 degrees of freedom, scaled: standard deviation raw * sqrt(2 / 9)
    assert np.std(found) == pytest.approx(raw * math.sqrt(2 / 9), rel=0.1)


def test_psi_of_nothing_is_no_drift() -> None:
    """An empty histogram tells nothing."""
    assert statistics.psi([5, 5], [0, 0]) == statistics.psi([0, 0], [5, 5]) == 0


@exact
@given(tables)
def test_laws(three: tuple[list[int], list[int], list[int]]) -> None:
    """Symmetry, range, identity, the triangle inequality."""
    a, b, c = three
    for distance in (statistics.jensen_shannon, statistics.hellinger):
        assert distance(a, a) == pytest.approx(0, abs=1e-7)
        assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-12)
        assert 0 <= distance(a, b) <= 1
    assert statistics.psi(a, b) == pytest.approx(statistics.psi(b, a), rel=1e-9, abs=1e-9)
    together = statistics.hellinger(a, b) + statistics.hellinger(b, c)
    assert statistics.hellinger(a, c) <= together + 1e-7
    assert statistics.direction(a, b) == pytest.approx(-statistics.direction(b, a), abs=1e-9)
    assert statistics.direction(a[::-1], b[::-1]) == pytest.approx(
        -statistics.direction(a, b), abs=1e-9
    )
    assert -1 <= statistics.direction(a, b) <= 1


@pytest.mark.parametrize("distance", PAIRS)
@pytest.mark.parametrize(
    ("p", "q"), [([1, 2], [1, 2, 3]), ([-1, 2], [1, 2]), ([1, math.nan], [1, 2]), ([], []),
                 ([[1, 2]], [[1, 2]]), ([1, math.inf], [1, 2])],
)  # fmt: skip
def test_what_is_no_pair_of_histograms_is_refused(
    distance: Callable[[object, object], float], p: object, q: object
) -> None:
    """Shapes, signs and finiteness."""
    with pytest.raises(ValueError, match=r"bins|counts"):
        distance(p, q)


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    [  # Abramowitz, Stegun, table 26.10
        (1.0, 1, 0.25), (12.706, 1, 0.025), (2.920, 2, 0.05), (3.182, 3, 0.025),
        (1.943, 6, 0.05), (2.447, 6, 0.025), (3.707, 6, 0.005), (2.262, 9, 0.025),
        (1.697, 30, 0.05), (0.0, 4, 0.5), (-2.447, 6, 0.975),
    ],
)  # fmt: skip
def test_student_against_the_table(t: float, freedom: int, tail: float) -> None:
    """Printed values."""
    assert statistics.student_above(t, freedom) == pytest.approx(tail, abs=3e-5)


@exact
@given(st.floats(-50, 50), st.floats(-50, 50), st.integers(1, 60))
def test_student_is_a_symmetric_tail(s: float, t: float, freedom: int) -> None:
    """Falls with t, and P(T > t) + P(T > -t) = 1."""
    low, high = sorted((s, t))
    above = statistics.student_above
    assert 0 <= above(high, freedom) <= above(low, freedom) + 1e-12 <= 1 + 1e-12
    assert above(t, freedom) + above(-t, freedom) == pytest.approx(1, abs=1e-12)
