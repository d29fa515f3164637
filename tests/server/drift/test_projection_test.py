"""Differences of mean random features: golden values, size, power, bad input. Seeded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.server.drift.projection_test import groups_test, mean_test, means
from shoal.server.drift.special import chi_square_above, fisher_above

Array = NDArray[np.float64]
INPUTS, FEATURES = 6, 64
SETUP = np.random.default_rng(1)
WEIGHTS = SETUP.normal(size=(INPUTS, FEATURES)) / math.sqrt(INPUTS)
PHASE = SETUP.uniform(0, 2 * math.pi, FEATURES)
ROOT: Array = np.linalg.cholesky(0.3 * np.eye(INPUTS) + 0.7).astype(np.float64)


def features(rng: np.random.Generator, *size: int, root: Array = ROOT, shift: float = 0) -> Array:
    """Return cosines of correlated normal rows, (..., F)."""
    return np.asarray(np.cos((rng.normal(size=(*size, INPUTS)) @ root.T + shift) @ WEIGHTS + PHASE))


def test_by_hand() -> None:
    """Two features of equal variance 0.1: without correlation it is chi-squared (2), scaled."""
    reference, window = [0.1, 0.2], [[0.2, 0.0], [math.nan, math.nan]]
    found = mean_test(reference, window, spread=np.eye(2) * 0.1, n=100, m=[25, 0])
    scale = 1 / 100 + 1 / 25
    assert found.discrepancy == pytest.approx([0.05 - 0.2 * scale, 0])
    assert found.p_value == pytest.approx([float(chi_square_above(0.05 / scale / 0.1, 2)), 1])
    narrow = mean_test(reference, window, spread=[0.1, 0.1], n=100, m=[25, 0])
    assert narrow.p_value == pytest.approx([float(chi_square_above(0.05 / scale / 0.2, 1)), 1])
    known = mean_test(reference, window, spread=[0.1, 0.1], n=100, m=[25, 0], square=0.02)
    assert known.p_value == pytest.approx(found.p_value)
    near = mean_test(reference, [0.1, 0.25], spread=[0.1, 0.1], n=100, m=25)
    assert float(near.p_value) == 1


def test_groups_by_hand() -> None:
    """Groups on a line have one effective dimension: the test is Fisher's with (1, G - 1)."""
    groups = np.outer([-2.0, -1.0, 0.0, 1.0, 2.0], [0.1, 0.0])
    found = groups_test(groups, [[0.3, 0.4], [0.0, 0.0], [math.nan, 0]])
    usual = 0.1**2 * 10 / 4 * 1.2
    expected = float(fisher_above(0.25 / usual, 1, 4))
    assert found.discrepancy == pytest.approx([0.25 - usual, -usual, 0])
    assert found.p_value == pytest.approx([expected, 1, 1])


def test_means_of_windows() -> None:
    """Sums over rows; NaN without rows, which every test calls no evidence."""
    found = means([[2.0, -1.0], [0.0, 0.0]], [4, 0])
    assert found[0].tolist() == [0.5, -0.25] and np.isnan(found[1]).all()


@pytest.mark.parametrize(("n", "m"), [(2000, 300), (300, 300)])
def test_sizes_without_a_change(n: int, m: int) -> None:
    """200 references with a window each; the discrepancy is unbiased; variances are careful."""
    rng = np.random.default_rng(n)
    whole, narrow, apart, two = [], [], [], []
    for _ in range(200):
        reference = features(rng, n)
        window = features(rng, m).mean(0)
        covariance = np.cov(reference.T)
        base = reference.mean(0)
        found = mean_test(base, window, spread=covariance, n=n, m=m)
        whole.append(float(found.p_value))
        apart.append(float(found.discrepancy))
        spread = np.diag(covariance)
        narrow.append(float(mean_test(base, window, spread=spread, n=n, m=m).p_value))
        square = float((covariance**2).sum())
        two.append(float(mean_test(base, window, spread=spread, n=n, m=m, square=square).p_value))
    for level in (0.01, 0.05, 0.2):
        most = level + 2.6 * math.sqrt(level * (1 - level) / len(whole))
        assert np.mean(np.array(whole) <= level) <= most
        assert np.mean(np.array(narrow) <= level) <= most
        # two cumulants have the heavier error far out, as the docstring says
        assert np.mean(np.array(two) <= level) <= most + 0.008
    assert np.mean(np.array(two) <= 0.2) > 0.1
    assert np.mean(np.array(whole) <= 0.2) > 0.1
    assert abs(np.mean(apart)) <= 4 * np.std(apart) / math.sqrt(len(apart))


def test_a_lost_correlation_is_found_that_no_histogram_sees() -> None:
    """Every input stays standard normal; only their dependence is gone."""
    rng = np.random.default_rng(3)
    reference = features(rng, 2000)
    windows = np.stack([features(rng, 300, root=np.eye(INPUTS)).mean(0) for _ in range(20)])
    found = mean_test(reference.mean(0), windows, spread=np.cov(reference.T), n=2000, m=300)
    assert (found.p_value < 1e-6).all() and (found.discrepancy > 0).all()
    shifted = features(rng, 300, shift=0.4).mean(0)
    for spread in (np.cov(reference.T), reference.var(0)):
        found = mean_test(reference.mean(0), shifted, spread=spread, n=2000, m=300)
        assert float(found.p_value) < 1e-3


def test_other_groups_are_no_drift_and_strangers_are() -> None:
    """Groups differ by half a deviation: an independent-rows test rejects, this one does not."""
    rng = np.random.default_rng(4)
    p_values: list[float] = []
    far: list[float] = []
    for _ in range(100):
        at = rng.normal(size=(16, 1, INPUTS)) * 0.5
        rows = rng.normal(size=(16, 60, INPUTS)) @ ROOT.T + at
        table = np.cos(rows @ WEIGHTS + PHASE).mean(1)
        p_values.extend(groups_test(table[:12], table[12:]).p_value.tolist())
        far.append(float(groups_test(table[:12], features(rng, 60, shift=3.0).mean(0)).p_value))
    for level in (0.01, 0.05, 0.2):
        most = level * 1.3 + 2.6 * math.sqrt(level / len(p_values))
        assert np.mean(np.array(p_values) <= level) <= most
    assert np.mean(np.array(far) < 0.05) > 0.8


def test_without_scatter_any_difference_counts() -> None:
    """Constant features."""
    same = mean_test([0.5, 0.5], [[0.5, 0.5], [0.6, 0.5]], spread=[0.0, 0.0], n=9, m=9)
    assert same.p_value.tolist() == [1, 0]
    assert groups_test(np.full((5, 2), 0.5), [[0.5, 0.5], [0.6, 0.5]]).p_value.tolist() == [1, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: means([[1.0]], [1, 2]), lambda: means([[2.0]], [1]), lambda: means([[0.1]], [-1]),
        lambda: means([[math.nan]], [1]), lambda: means(1.0, 1), lambda: means([1.0], [1]),
        lambda: mean_test([0.1], [0.1, 0.2], spread=[1], n=1, m=1),
        lambda: mean_test([0.1], [0.1], spread=[1, 2], n=1, m=1),
        lambda: mean_test([0.1], [0.1], spread=[-1], n=1, m=1),
        lambda: mean_test([0.1], [0.1], spread=[math.nan], n=1, m=1),
        lambda: mean_test([0.1], [0.1], spread=[1], n=0, m=1),
        lambda: mean_test([0.1], [0.1], spread=[1], n=1, m=1, square=0.9),
        lambda: mean_test([0.1], [0.1], spread=[[1]], n=1, m=1, square=1.0),
        lambda: mean_test([0.1], [0.1], spread=[1], n=1, m=1, square=math.nan),
        lambda: mean_test([0.1], [0.1], spread=[1], n=1, m=-1),
        lambda: mean_test([0.1], [[0.1], [0.2]], spread=[1], n=1, m=[1, 2, 3]),
        lambda: mean_test([0.1], [math.inf], spread=[1], n=1, m=1),
        lambda: mean_test([math.nan], [0.1], spread=[1], n=1, m=1),
        lambda: groups_test(np.zeros((4, 2)), [0.1, 0.2]),
        lambda: groups_test(np.full((6, 2), math.nan), [0.1, 0.2]),
        lambda: groups_test(np.zeros((6, 2)), [0.1]),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Callable[[], object]) -> None:
    """Shapes, signs, NaN, no rows, too few groups."""
    with pytest.raises(ValueError, match=r"fit|finite|rows|variances|larger"):
        call()
