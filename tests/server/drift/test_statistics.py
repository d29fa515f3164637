"""Distances between histograms against worked examples and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift import statistics

PAIRS = (statistics.psi, statistics.hellinger, statistics.direction)
tables = st.integers(2, 12).flatmap(
    lambda bins: st.tuples(*[st.lists(st.integers(0, 5000), min_size=bins, max_size=bins)] * 3)
)
# (expected, observed, statistic, freedom, p-value); the third has its last three bins joined
CHI_SQUARE = [
    ([90, 110, 100], [40, 70, 90], 9.006222822012296, 2, 0.011074485600842534),
    ([500, 480, 40, 60], [30, 60, 20, 8], 48.98791930753279, 3, 1.3122047695091177e-10),
    ([1000, 900, 800, 700, 3, 2], [50, 40, 45, 42, 0, 0], 2.017038565708413, 3, 0.5688778287693157),
    ([10, 20, 30, 40], [10, 20, 30, 40], 0.0, 3, 1.0),
    ([5000, 5000], [120, 80], 7.843257874015755, 1, 0.0051010592762903645),
]
SCIPY_JS = 0.3616794657443756
exact = settings(deadline=None, max_examples=100)


def jensen_shannon(p: object, q: object) -> float:
    """Return the divergence of two histograms, bits."""
    return float(statistics.distances(p, q).jensen_shannon)  # type: ignore[arg-type]


def test_worked_examples() -> None:
    """Shares are (1/4, 3/4) of 100 and (3/4, 1/4) of 200, with half a count in each bin."""
    p, q = (24.5, 74.5), (149.5, 49.5)  # + 0.5 each = 25, 75 of 100 and 150, 50 of 200
    assert statistics.psi(p, q) == pytest.approx(math.log(3) - (1 / 99 + 1 / 199))
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert float(statistics.distances(p, q).jensen_shannon) == pytest.approx(1 - entropy)
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
    for distance in (jensen_shannon, statistics.hellinger):
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


def test_many_streams_are_what_each_is_alone() -> None:
    """One reference against a (2, 3) table of devices."""
    rng = np.random.default_rng(2)
    reference = rng.multinomial(900, np.full(7, 1 / 7))
    devices = rng.multinomial(60, [0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0], (2, 3))
    together = statistics.distances(reference, devices)
    chi = statistics.chi_square(reference, devices)
    for at in np.ndindex(2, 3):
        for name, alone in (
            ("psi", statistics.psi), ("hellinger", statistics.hellinger),
            ("direction", statistics.direction),
        ):  # fmt: skip
            expected = alone(reference, devices[at])
            assert getattr(together, name)[at] == pytest.approx(expected, rel=1e-12)
        pair = statistics.distances(reference, devices[at])
        for name in ("psi_p_value", "jensen_shannon", "jensen_shannon_debiased"):
            expected = float(getattr(pair, name))
            assert getattr(together, name)[at] == pytest.approx(expected, rel=1e-12)
        one = statistics.chi_square(reference, devices[at])
        for name in ("statistic", "freedom", "p_value", "effect"):
            assert getattr(chi, name)[at] == pytest.approx(float(getattr(one, name)), rel=1e-12)


def test_jensen_shannon_in_all_its_forms() -> None:
    """Shares (1/4, 3/4) of 100 and (3/4, 1/4) of 200, half a count in each bin.

    The natural-log distance is scipy 1.17.1's spatial.distance.jensenshannon([.25, .75],
    [.75, .25]), which Evidently's rule compares with 0.1.
    """
    found = statistics.distances((24.5, 74.5), (149.5, 49.5))
    noise = (1 / 99 + 1 / 199) / (8 * math.log(2))
    bits = float(found.jensen_shannon)
    assert float(found.jensen_shannon_debiased) == pytest.approx(bits - noise)
    assert float(found.jensen_shannon_distance) ** 2 == pytest.approx(bits)
    natural = float(found.jensen_shannon_distance) * math.sqrt(math.log(2))
    assert natural == pytest.approx(SCIPY_JS, rel=1e-12)


@pytest.mark.parametrize(
    ("expected", "observed", "statistic", "freedom", "p_value"),
    CHI_SQUARE,
)
def test_chi_square_against_stored_values(
    expected: list[int], observed: list[int], statistic: float, freedom: int, p_value: float
) -> None:
    """Values of scipy 1.17.1, stats.chi2_contingency(correction=False), bins joined by hand."""
    found = statistics.chi_square(expected, observed)
    assert float(found.statistic) == pytest.approx(statistic, rel=1e-11)
    assert float(found.freedom) == freedom
    assert float(found.p_value) == pytest.approx(p_value, rel=1e-11)


def test_sparse_bins_are_joined_by_the_rule() -> None:
    """Neighbours until both rows expect 5; the remainder joins the last; sums decide alone."""
    # Equal totals: a bin is full from a + b = 10 on. 4+4 | 9+2 -> joined 19; 6+6 full; 1+1 remains.
    joint = statistics.chi_square([4, 9, 6, 1], [4, 2, 6, 8])
    by_hand = statistics.chi_square([13, 7], [6, 14])
    assert float(joint.statistic) == pytest.approx(float(by_hand.statistic))
    assert float(joint.freedom) == float(by_hand.freedom) == 1
    empty = statistics.chi_square([50, 0, 50, 0], [50, 0, 50, 0])
    assert (float(empty.freedom), float(empty.p_value)) == (1, 1)


@pytest.mark.parametrize(
    ("expected", "observed"), [([0, 0], [5, 5]), ([5, 5], [0, 0]), ([0, 0], [0, 0]), ([900], [9]),
                               ([3, 3], [3, 2])],
)  # fmt: skip
def test_what_cannot_be_tested_has_no_evidence(expected: list[int], observed: list[int]) -> None:
    """Empty, one bin, too few values."""
    found = statistics.chi_square(expected, observed)
    values = (found.statistic, found.freedom, found.p_value, found.effect)
    assert [float(each) for each in values] == [0, 0, 1, 0]
    if min(sum(expected), sum(observed)) == 0 or len(expected) == 1:
        assert float(statistics.distances(expected, observed).psi_p_value) == 1


@pytest.mark.parametrize(
    ("bins", "n", "m"), [(16, 10_000, 500), (16, 1000, 50), (32, 100, 100), (64, 10_000, 200)]
)
def test_sizes_are_at_most_what_they_say(bins: int, n: int, m: int) -> None:
    """20,000 pairs without a change: rejections at a, plus three standard errors of counting."""
    rng = np.random.default_rng(bins + n)
    for share in (np.full(bins, 1 / bins), rng.dirichlet(np.ones(bins))):
        a, b = rng.multinomial(n, share, 20_000), rng.multinomial(m, share, 20_000)
        chi, psi = statistics.chi_square(a, b).p_value, statistics.distances(a, b).psi_p_value
        for level in (0.05, 0.01):
            most = level * 1.1 + 3 * math.sqrt(level / 20_000)
            assert (chi <= level).mean() <= most
            assert (psi <= level).mean() <= most
        # Not by being deaf: chi-squared keeps its size where bins are joined.
        assert (chi <= 0.05).mean() >= 0.04


def test_a_shift_is_found_and_its_size_does_not_depend_on_the_reference() -> None:
    """A third of a bin's mass moves; the reference is 1 to 100 times as long."""
    rng = np.random.default_rng(9)
    p = np.full(8, 1 / 8)
    q = p + np.array([1, -1, 1, -1, 1, -1, 1, -1]) / 24
    effects = []
    for n in (1000, 100_000):
        found = statistics.chi_square(rng.multinomial(n, p, 500), rng.multinomial(1000, q, 500))
        assert (found.p_value < 1e-3).mean() > 0.95
        effects.append(found.effect.mean())
    exact = math.sqrt(((p - q) ** 2 / (p + q)).sum() / 2)
    assert effects == pytest.approx([exact, exact], rel=0.1)


@exact
@given(tables)
def test_chi_square_has_its_laws(three: tuple[list[int], list[int], list[int]]) -> None:
    """Symmetric, silent about equal shares, within its bounds."""
    a, b, _ = three
    one, two = statistics.chi_square(a, b), statistics.chi_square(b, a)
    assert float(one.statistic) == pytest.approx(float(two.statistic), rel=1e-9, abs=1e-9)
    assert 0 <= float(one.p_value) <= 1 and 0 <= float(one.effect) <= 1
    assert float(one.statistic) <= sum(a) + sum(b) + 1e-6
    same = statistics.chi_square(a, [3 * each for each in a])
    assert float(same.statistic) == pytest.approx(0, abs=1e-9)
    assert float(same.p_value) == pytest.approx(1)


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
