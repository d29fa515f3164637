"""The null of a stream: its radius holds what it must, its over-dispersion is found again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.drift.e_cusum_null import (
    NullConfig,
    StreamNulls,
    chi_square_quantile,
    fit,
    tolerance_radius,
)

from ._streams import BASELINE, FLAT, ROWS, Array, autoregressive, daily, kl, psi, shifted

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


@given(WEIGHTS, WEIGHTS, st.floats(1e-4, 1))
def test_tolerance_in_psi_lies_within_the_radius(
    centre: list[float], other: list[float], part: float
) -> None:
    """PSI(p, centre) <= tau implies KL(centre || p) <= radius, which is at most tau."""
    c, way = (np.array(each) / sum(each) for each in (centre, other))
    p = (1 - part) * c + part * way
    tau = psi(p, c)
    radius = float(tolerance_radius(c[None], tau)[0])
    assert kl(c, p) <= radius + 1e-12
    assert tau / 2 <= radius <= tau


@pytest.mark.parametrize("k", [20.0, 100.0, 1000.0])
def test_fit_recovers_the_scatter_of_windows(k: float) -> None:
    """The bound lies above the truth, hardly more than it with many streams."""
    rng = np.random.default_rng(5)
    base = np.array([rng.multinomial(ROWS, rng.dirichlet(k * FLAT, BASELINE)) for _ in range(300)])
    nulls = fit(rng.multinomial(10_000, FLAT), base)
    truth = (ROWS + k) / (1 + k)
    assert np.median(nulls.inflation__s) == pytest.approx(truth, rel=0.08)
    assert (nulls.inflation__s >= 0.97 * truth).mean() > 0.95
    assert np.median(nulls.concentration__s) == pytest.approx(k, rel=0.12)


def test_fit_of_one_stream_alone_is_careful() -> None:
    """One stream has no others to lend it certainty: its bound is above the truth in 95 %."""
    rng = np.random.default_rng(6)
    base = rng.multinomial(ROWS, FLAT, (200, BASELINE))
    alone = [fit(10_000 * FLAT, each[None]).inflation__s[0] for each in base]
    assert np.mean(np.array(alone) >= 1) == 1
    assert 1.2 < np.mean(alone) < 2
    assert fit(10_000 * FLAT, base).inflation__s.max() < 1.15


def test_fit_of_rows_like_their_neighbours_takes_the_worst_direction() -> None:
    """AR(1) inflates the mean by (1 + r) / (1 - r) = 19, all bins together by far less."""
    draw = autoregressive(np.random.default_rng(7), 100, 0.9)
    base = np.stack([draw(w) for w in range(BASELINE)], 1)
    inflation = fit(10_000 * FLAT, base).inflation__s
    assert 14 < np.median(inflation) < 24  # of the rank, hardly less than of the value


def test_fit_finds_the_daily_cycle() -> None:
    """The radius holds its peak, and no more than a few times that."""
    draw = daily(np.random.default_rng(8), 200, 0.3)
    base = np.stack([draw(w) for w in range(BASELINE)], 1)
    nulls = fit(10_000 * FLAT, base)
    assert (nulls.radius__s >= kl(nulls.centre__sb, shifted(0.3))).mean() > 0.95
    assert np.median(nulls.radius__s) < 3 * kl(FLAT, shifted(0.3))


def test_a_missing_baseline_window_changes_little() -> None:
    """A device was off for an hour."""
    rng = np.random.default_rng(9)
    base = rng.multinomial(ROWS, FLAT, (30, BASELINE))
    whole = fit(10_000 * FLAT, base)
    base[:, 10] = 0
    less = fit(10_000 * FLAT, base)
    assert np.allclose(less.inflation__s, whole.inflation__s, rtol=0.1)
    assert np.allclose(less.radius__s, whole.radius__s, rtol=0.1)


@pytest.mark.parametrize(
    ("reference", "baseline"),
    [
        (np.ones(3), np.ones((2, 30))),
        (np.ones(4), np.ones((2, 30, 3))),
        (np.zeros(3), np.ones((2, 30, 3))),
        (np.ones(3), -np.ones((2, 30, 3))),
        (np.ones(3), np.full((2, 30, 3), math.nan)),
        (np.ones(3), np.ones((2, 19, 3))),
        (np.ones(1), np.ones((2, 30, 1))),
    ],
)
def test_fit_refuses_what_it_cannot_be_made_of(reference: Array, baseline: Array) -> None:
    """Wrong shapes, no rows, negative, NaN, too few windows, one bin."""
    with pytest.raises(ValueError, match=r"\w"):
        fit(reference, baseline)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("centre", [[0.5, 0.6], [0.5, 0.5]]),
        ("centre", [[1.0, 0.0], [0.5, 0.5]]),
        ("radius", [-1.0, 0.0]),
        ("inflation", [0.5, 1.0]),
        ("concentration", [0.0, 1.0]),
        ("concentration", [math.inf, 1.0]),
        ("radius", [0.0]),
    ],
)
def test_nulls_are_checked(name: str, value: object) -> None:
    """What the database gives back is not trusted."""
    whole: dict[str, Any] = {
        "centre": [[0.5, 0.5]] * 2,
        "radius": [0.0] * 2,
        "inflation": [1.0] * 2,
        "concentration": [1e6] * 2,
    }
    StreamNulls(*map(np.array, whole.values()))
    with pytest.raises(ValueError, match=r"\w"):
        StreamNulls(*map(np.array, (whole | {name: value}).values()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance_psi": -1},
        {"tolerance_psi": math.nan},
        {"reference_confidence": 1},
        {"inflation_confidence": 0.4},
        {"slow_margin": 0.5},
        {"baseline_windows_min": 2},
    ],
)
def test_a_null_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """As above."""
    with pytest.raises(ValueError, match=r"\w"):
        NullConfig(**wrong)


def test_quantiles_of_chi_squared() -> None:
    """Tables: 0.99 at 15 degrees is 30.578, 0.05 at 48 is 33.098."""
    assert float(chi_square_quantile(0.99, 15)) == pytest.approx(30.578, rel=0.002)
    assert float(chi_square_quantile(0.05, 48)) == pytest.approx(33.098, rel=0.002)
