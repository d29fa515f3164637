"""Tests between sketches: golden values, the promised bounds, size and power. Seeded."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import datasketches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext.kll import BulkMerger, read_kll
from shoal.server.drift.quantile_tests import Quantiles, ks, ks_binned, wasserstein

Array = NDArray[np.float64]
KS_D, KS_P, W1 = 4 / 15, 0.5901913321863029, 1.8824561403508775
values = st.lists(st.integers(-50, 50), min_size=1, max_size=40)


def sketch(x: Array, k: int) -> Quantiles:
    """Return the library's KLL sketch of values, with the V that its bytes bound.

    Events at level h: the weight above it, in groups of 2^(h + 1), at least half a capacity each;
    every one adds 4^h (the pairs' G^2 / 4).
    """
    kll = datasketches.kll_floats_sketch(k)
    x = x.astype(np.float32)
    kll.update(x)
    data = kll.serialize()
    depth = data[18]
    room = [max(8, ((2 * k * 2**d) // 3**d + 1) // 2) for d in range(depth)][::-1]
    starts = [*struct.unpack_from(f"<{depth}I", data, 20), sum(room)]
    items = np.frombuffer(data, "<f4", starts[-1] - starts[0], 28 + 4 * depth)
    held = np.diff(starts)
    weights = np.repeat(2.0 ** np.arange(depth), held)
    assert weights.sum() == len(x) == kll.n
    variance = 0.0
    for h in range(depth - 1):
        above = sum(int(held[j]) << j for j in range(h + 1, depth))
        variance += 4.0**h * math.ceil(above / (2 << h) / (room[h] // 2))
    return exactly(
        items, weights, variance=variance, minimum=float(x.min()), maximum=float(x.max())
    )


def exactly(values: object, weights: object = None, **known: float) -> Quantiles:
    """Return the distribution of values in any order, each as often as its weight says."""
    found = np.asarray(values, np.float64)
    counted = np.ones(found.shape) if weights is None else np.asarray(weights, np.float64)
    if found.ndim == 1 and found.shape == counted.shape:
        order = np.argsort(found, kind="stable")
        found, counted = found[order], counted[order]
    bounds = {"minimum": found.min(initial=np.inf), "maximum": found.max(initial=-np.inf)} | known
    return Quantiles(found, counted, bounds.pop("variance", 0.0), **bounds)


def error_of(found: Quantiles) -> float:
    """Return its uniform error at 99 %."""
    return float(found.errors(np.array([1 - 0.99]))[0])


def bins(x: Array, edges: Array) -> NDArray[np.int64]:
    """Return the counts between edges."""
    return np.histogram(x, np.concatenate([[-np.inf], edges, [np.inf]]))[0]


# --- vectors ----------------------------------------------------------------------------------


def test_golden_values() -> None:
    """Weighted and tied values; scipy 1.17.1: ks_2samp, kstwobign.sf, wasserstein_distance."""
    a = exactly([0.5, 1.0, 1.0, 2.5, 4.0, 7.25, -3.0], [1, 2, 4, 1, 8, 2, 1])
    b = exactly([1.0, 1.5, 2.5, 2.5, 9.0], [3, 1, 2, 5, 4])
    found = ks(a, b)
    assert (a.n, b.n) == (19, 15)
    assert found.statistic == found.low == found.high == pytest.approx(KS_D, rel=1e-12)
    assert found.p_value == pytest.approx(KS_P, rel=1e-12)
    moved = wasserstein(a, b)
    assert moved.estimate == moved.low == moved.high == pytest.approx(W1, rel=1e-12)
    # Quartiles of a are 1 and 4: the 5th and the 15th of 19 values.
    assert moved.scale == 3
    expected = math.sqrt(2 / math.pi * (1 / 19 + 1 / 15))
    area = 0.0
    at = [-3.0, 0.5, 1.0, 1.5, 2.5, 4.0, 7.25, 9.0]
    for (left, right), rank in zip(pairwise(at), [1, 2, 8, 8, 9, 17, 19], strict=True):
        area += math.sqrt(rank / 19 * (1 - rank / 19)) * (right - left)
    assert moved.usual == pytest.approx(expected * area, rel=1e-12)
    assert moved.effect == pytest.approx(max(0.0, W1 - expected * area) / 3, rel=1e-12)


def test_uniform_error_is_the_formula() -> None:
    """V = 400 of n = 10,000 at 99 %: the best of all M, by brute force over the powers of two."""
    found = exactly(np.arange(100.0), np.full(100, 100.0), variance=400.0)
    best = min(
        math.sqrt(2 * 400 * math.log(4 * (m - 1) / 0.01)) / 10_000 + 1 / m
        for m in (2**i for i in range(1, 20))
    )
    assert error_of(found) == pytest.approx(best, rel=1e-12)
    assert best < 400 / 10_000
    few = exactly(np.arange(50.0), np.full(50, 2.0), variance=1.0)
    assert error_of(few) == 1 / 100  # certain: one compaction of pairs moves one rank
    assert error_of(exactly([1.0, 2.0])) == 0


def test_bins_are_the_values_where_edges_are_the_values() -> None:
    """On integers nothing is lost; (..., B) are many tests."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 8, 500).astype(float), rng.integers(0, 9, (3, 70)).astype(float)
    edges = np.arange(0.5, 9)
    statistic, p_value = ks_binned(bins(a, edges), np.stack([bins(each, edges) for each in b]))
    for i in range(3):
        alone = ks(exactly(a), exactly(b[i]))
        assert statistic[i] == pytest.approx(alone.statistic, rel=1e-12)
        assert p_value[i] >= alone.p_value * (1 - 1e-9)
    assert [float(each) for each in ks_binned([0, 0], [3, 4])] == [0, 1]


# --- the promised bounds ----------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "m"), [(64, 4000, 900), (200, 20_000, 60)])
def test_bounds_hold_for_the_values_themselves(k: int, n: int, m: int) -> None:
    """In 99 % of sketches at least; smooth, tied and heavy-tailed values."""
    rng = np.random.default_rng(k)
    misses = trials = 0
    for draw in (rng.standard_normal, rng.standard_cauchy, lambda s: rng.integers(0, 5, s) * 1.0):
        for _ in range(40):
            a = draw(n).astype(np.float32).astype(float)
            b = draw(m).astype(np.float32).astype(float)
            one, two = sketch(a, k), sketch(b, k)
            real = exactly(a)
            at = np.sort(a)
            misses += bool(abs(one.shares(at) - real.shares(at)).max() > error_of(one))
            exact = ks(real, exactly(b))
            found = ks(one, two)
            misses += not found.low <= exact.statistic <= found.high
            way = wasserstein(real, exactly(b)).estimate
            bound = wasserstein(one, two)
            assert bound.low <= bound.estimate <= bound.high
            misses += not bound.low * (1 - 1e-9) <= way <= bound.high * (1 + 1e-9)
            trials += 3
    assert misses <= trials * 0.01


def test_a_grid_of_quantiles_is_off_by_its_slack_at_most() -> None:
    """As a merged sketch answers them."""
    rng = np.random.default_rng(4)
    a = rng.exponential(size=5000)
    grid = np.quantile(a, (np.arange(64) + 0.5) / 64, method="inverted_cdf")
    found = Quantiles.of_grid(grid, n=5000, variance=0, minimum=a.min(), maximum=a.max())
    at = np.sort(a)
    apart = abs(found.shares(at) - exactly(a).shares(at)).max()
    assert 0 < apart <= error_of(found) == 1 / 128
    same = ks(exactly(a), found)
    assert same.low == 0 and same.p_value == 1


def test_our_readers_results_fit() -> None:
    """A sketch that read_kll read, and the quantiles of a merger, as the fleet query has them."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal(3000).astype(np.float32)
    merger = BulkMerger(seed=1)
    for part in np.split(x, 10):
        kll = datasketches.kll_floats_sketch(64)
        kll.update(part)
        merger.add(kll.serialize())
    kll = datasketches.kll_floats_sketch(200)
    kll.update(x)
    read = read_kll(kll.serialize())
    one = exactly(
        read.values, read.weights, variance=read.variance_bound,
        minimum=read.minimum, maximum=read.maximum,
    )  # fmt: skip
    two = Quantiles.of_grid(
        merger.quantiles((np.arange(256) + 0.5) / 256).estimate, n=merger.n,
        variance=merger.variance, minimum=merger.minimum, maximum=merger.maximum,
    )  # fmt: skip
    real = exactly(x)
    for each in (one, two):
        assert each.n == pytest.approx(3000)
        found = ks(real, each)
        assert found.low == 0 and found.statistic <= error_of(each) and found.p_value > 0.5


# --- size and power ---------------------------------------------------------------------------


def test_identical_data_is_never_drift_however_small_the_sketch() -> None:
    """Sketches of k = 8 of the same 100,000 values: ignoring their error rejects nearly always."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal(100_000).astype(np.float32).astype(float)
    naive = 0
    for _ in range(20):
        one, two = sketch(x, 8), sketch(x, 8)
        found = ks(one, two)
        assert found.p_value > 0.2 and found.low == 0
        naive += (
            ks(exactly(one.values, one.weights), exactly(two.values, two.weights)).p_value < 0.01
        )
    assert naive >= 18


def test_p_values_are_sub_uniform_without_a_change() -> None:
    """With sketches, on bins, and exact."""
    rng = np.random.default_rng(8)
    trials, found = 300, []
    for _ in range(trials):
        a, b = rng.standard_normal(3000), rng.standard_normal(400)
        edges = np.quantile(a, np.arange(1, 16) / 16)
        found.append(
            (
                ks(sketch(a, 200), sketch(b, 200)).p_value,
                ks(exactly(a), exactly(b)).p_value,
                float(ks_binned(bins(a, edges), bins(b, edges))[1]),
            )
        )
    for level in (0.02, 0.1, 0.3):
        most = level + 2.6 * math.sqrt(level * (1 - level) / trials)
        assert ((np.array(found) <= level).mean(0) <= most).all()
    assert (np.array(found)[:, 1] <= 0.3).mean() > 0.2  # the classical test is not deaf


def test_shifts_are_found_through_sketches() -> None:
    """0.3 sigma, 20,000 reference values, 2,000 seen; the effect is near W1 / IQR = 0.3 / 1.349."""
    rng = np.random.default_rng(9)
    effects = []
    for _ in range(20):
        a, b = rng.standard_normal(20_000), rng.standard_normal(2000) + 0.3
        one, two = sketch(a, 200), sketch(b, 200)
        assert ks(one, two).p_value < 1e-3
        edges = np.quantile(a, np.arange(1, 16) / 16)
        assert ks_binned(bins(a, edges), bins(b, edges))[1] < 1e-6
        effects.append(wasserstein(one, two).effect)
    assert np.mean(effects) == pytest.approx(0.3 / 1.349, abs=0.04)


# --- properties and bad input -----------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(values, values, st.floats(0, 30))
def test_laws(a: list[int], b: list[int], variance: float) -> None:
    """Symmetric, within bounds, silent about one and the same, V only ever hides."""
    one, two = exactly(a, variance=variance), exactly(b, variance=variance)
    there, back = ks(one, two), ks(two, one)
    assert there == back
    assert 0 <= there.low <= there.statistic <= there.high <= 1 and 0 < there.p_value <= 1
    assert ks(exactly(a), exactly(b)).p_value <= there.p_value + 1e-12
    assert ks(one, one).p_value == 1
    way, home = wasserstein(one, two), wasserstein(two, one)
    assert way.estimate == pytest.approx(home.estimate, abs=1e-9)
    assert way.low - 1e-9 <= way.estimate <= way.high + 1e-9
    assert way.high <= max(*a, *b) - min(*a, *b) + 1e-9
    assert wasserstein(one, one).estimate == wasserstein(one, one).effect == 0


def test_infinity_is_a_value() -> None:
    """The same mass there is no way to go; other mass is infinitely far."""
    a = exactly([-math.inf, 0.0, 1.0, 2.0, math.inf])
    same = wasserstein(a, a)
    assert (same.estimate, same.effect) == (0, 0) and math.isfinite(same.usual)
    other = wasserstein(a, exactly([0.0, 1.0, 2.0, math.inf, math.inf]))
    assert other.estimate == other.effect == math.inf
    assert ks(a, exactly([0.0, 1.0, math.inf])).statistic == pytest.approx(0.2)


def test_a_constant_reference_has_no_scale() -> None:
    """Anything else is infinitely many of its scales away."""
    flat = exactly(np.zeros(50))
    assert wasserstein(flat, flat).effect == 0
    found = wasserstein(flat, exactly(np.ones(50)))
    assert (found.estimate, found.scale, found.effect) == (1, 0, math.inf)
    spike = exactly([*np.zeros(90), *np.ones(10)])  # no interquartile range: its deviation
    assert wasserstein(spike, flat).scale == pytest.approx(0.3)
    ends = exactly([-math.inf, math.inf])
    assert wasserstein(ends, ends).scale == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"values": []}, {"values": [math.nan]}, {"values": [[1.0]]},
        {"values": [1.0], "weights": [1.0, 2.0]}, {"values": [1.0], "weights": [0.0]},
        {"values": [1.0], "weights": [math.inf]}, {"values": [1.0], "variance": -1.0},
        {"values": [1.0], "variance": math.nan}, {"values": [1.0], "minimum": 2.0},
        {"values": [1.0], "maximum": 0.0}, {"values": [1.0], "minimum": math.nan},
    ],
)  # fmt: skip
def test_what_is_no_distribution_is_refused(kwargs: dict[str, object]) -> None:
    """Empty, unequal, NaN, out of range."""
    with pytest.raises(ValueError, match=r"distribution|NaN|weights|variance|enclose"):
        exactly(**kwargs)  # type: ignore[arg-type]


def test_other_bad_input_is_refused() -> None:
    """Descending grids, confidences, bins."""
    one = exactly([1.0, 2.0])
    with pytest.raises(ValueError, match="ascend"):
        Quantiles.of_grid([2.0, 1.0], n=9, variance=0, minimum=0, maximum=3)
    with pytest.raises(ValueError, match="distribution"):
        Quantiles.of_grid([], n=9, variance=0, minimum=0, maximum=3)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            ks(one, one, confidence_sketch=confidence)
        with pytest.raises(ValueError, match="confidence"):
            wasserstein(one, one, confidence_sketch=confidence)
    for a, b in (([1, 2], [1]), ([], []), ([1, -1], [1, 1]), ([1, math.nan], [1, 1]), (1, 1)):
        with pytest.raises(ValueError, match=r"bins|counts"):
            ks_binned(a, b)
