"""Change detectors: golden runs, measured false alarms and delays (seeded), states, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from shoal.server.drift.changes import (
    Adwin,
    AdwinConfig,
    PageHinkley,
    PageHinkleyConfig,
)


def known(mean: ArrayLike, deviation: ArrayLike) -> PageHinkley:
    """Return new tests against a known mean and deviation of one value, (S,) each."""
    centre, spread = np.asarray(mean, np.float64), np.asarray(deviation, np.float64)
    return PageHinkley(centre, spread, *np.zeros((3, len(centre))))


# --- Page–Hinkley -----------------------------------------------------------------------------


def test_a_run_by_hand() -> None:
    """Two streams: z = 1 and -2 each window, tolerance 0.5; the second has a window of nothing."""
    config = PageHinkleyConfig(tolerance=0.5, alarm_windows=1000)
    test = known([0.5, 0.5], [0.2, 0.4])
    # Window means 0.5 + 0.2 / 10 and 0.5 - 2 * 0.4 / 10 of 100 values.
    for step in range(1, 5):
        alarms = test.fold([52.0, 42.0], [100, 100], config=config)
        assert test.up == pytest.approx([0.5 * step, 0])
        assert test.down == pytest.approx([0, 1.5 * step])
    assert 5.7 < config.threshold < 6 and alarms.tolist() == [0, -1]
    before = test.to_dict()
    assert test.fold([0.0, 0.0], [0, 0], config=config).tolist() == [0, -1]
    assert test.to_dict() == before
    for _ in range(20):
        test.fold([52.0, 42.0], [100, 100], config=config)
    assert test.down[1] == 2 * config.threshold
    windows = 0
    while test.fold([50.0, 50.0], [100, 100], config=config)[1]:
        windows += 1
    assert windows <= config.threshold / config.tolerance


@pytest.mark.parametrize(
    ("tolerance", "alarm_windows", "windows"), [(0.25, 400, 800), (0.5, 600, 1200), (1.0, 300, 600)]
)
def test_mean_run_to_a_false_alarm_is_as_stated(
    tolerance: float, alarm_windows: float, windows: int
) -> None:
    """2,000 streams of a known null: the exponential rate of first alarms, within 10 %."""
    config = PageHinkleyConfig(tolerance=tolerance, alarm_windows=alarm_windows)
    rng, size = np.random.default_rng(1), 2000
    test, waited = known(np.full(size, 0.8), np.full(size, 0.4)), 0
    silent = np.ones(size, bool)
    for _ in range(windows):
        waited += int(silent.sum())
        sums = 100 * rng.normal(0.8, 0.04, size)
        silent &= test.fold(sums, np.full(size, 100.0), config=config) == 0
    assert waited / (size - silent.sum()) == pytest.approx(alarm_windows, rel=0.1)


@pytest.mark.parametrize("windows", [5, 30, 100])
def test_a_short_baseline_makes_no_more_false_alarms(windows: int) -> None:
    """3,000 fitted streams, sizes of windows vary, means over-dispersed: at most 1 - exp(-.3)."""
    config = PageHinkleyConfig(alarm_windows=1000)
    rng, size = np.random.default_rng(windows), 3000

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.integers(60, 140, (size, count)).astype(float)
        return sizes * rng.normal(0.7, 0.5 / np.sqrt(sizes)), sizes

    test = PageHinkley.baseline(*draw(windows))
    alarmed = np.zeros(size, bool)
    for _ in range(300):
        sums, sizes = draw(1)
        alarmed |= test.fold(sums[:, 0], sizes[:, 0], config=config) != 0
    assert 0.02 < alarmed.mean() < 1 - math.exp(-0.3)


def test_shifts_are_found_in_their_direction() -> None:
    """Half the streams fall, half rise by 1.5 deviations of a window: all within 60 windows."""
    rng, size = np.random.default_rng(2), 200
    config = PageHinkleyConfig()
    counts = np.full((size, 50), 100.0)
    test = PageHinkley.baseline(100 * rng.normal(0.6, 0.04, (size, 50)), counts)
    way = np.where(np.arange(size) % 2, 1.0, -1.0)
    first = np.zeros(size)
    for step in range(1, 61):
        sums = 100 * rng.normal(0.6 + 1.5 * 0.04 * way, 0.04)
        alarms = test.fold(sums, counts[:, 0], config=config)
        assert not (alarms * way < 0).any()
        first[(alarms != 0) & (first == 0)] = step
    assert (first > 0).all() and np.median(first) <= 25


def test_a_constant_score_has_a_least_deviation() -> None:
    """Rounding is no drift; a real step is."""
    config = PageHinkleyConfig()
    test = PageHinkley.baseline([[50.0] * 10], [[50] * 10])
    assert test.deviation.tolist() == [0.0]
    for _ in range(100):
        assert test.fold([50 - 1e-3], [50], config=config).tolist() == [0]
    steps = 0
    while test.fold([49.0], [50], config=config)[0] == 0:
        steps += 1
    assert steps <= 2


def test_page_hinkley_survives_json() -> None:
    """The state goes on where it was."""
    config, rng = PageHinkleyConfig(), np.random.default_rng(3)
    test = PageHinkley.baseline(rng.random((4, 9)) * 10, np.full((4, 9), 10))
    for _ in range(5):
        copy = PageHinkley.from_dict(json.loads(json.dumps(test.to_dict())))
        sums = rng.random(4) * 10
        one, two = (each.fold(sums, [10] * 4, config=config) for each in (test, copy))
        assert one.tolist() == two.tolist() and test.to_dict() == copy.to_dict()


# --- ADWIN ------------------------------------------------------------------------------------


def test_cut_where_the_step_is() -> None:
    """20 windows of 0.9, then 0.5, without noise: the bound by hand says after how many."""
    config = AdwinConfig()
    test = Adwin()
    for _ in range(20):
        assert test.add(45.0, 50, config=config) is None
    since = 0
    while (cut := test.add(25.0, 50, config=config)) is None:
        since += 1
    since += 1
    assert cut == pytest.approx((0.9, 0.5)) and test.windows == since
    assert test.mean == pytest.approx(0.5)

    def excess(new: int) -> float:
        scatter = 50 * 20 * new / (20 + new) * 0.4**2
        share, cuts = 1 / 1000 + 1 / (50 * new), 12  # about as many cuts as buckets
        log = math.log(2 * cuts / config.false_max)
        return 0.4 - math.sqrt(2 * scatter / (19 + new) * share * log) - 2 / 3 * share * log

    assert since >= config.side_min and excess(since) > 0
    assert since == config.side_min or excess(since - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("right answers", lambda rng: (rng.binomial(50, 0.9), 50)),
        ("few answers", lambda rng: (rng.binomial(4, 0.95), 4)),
        ("over-dispersed", lambda rng: (rng.binomial(50, rng.beta(9, 1)), 50)),
        ("confidence", lambda rng: (80 * rng.normal(0.8, 0.01), 80)),
    ],
)
def test_false_cuts_are_rarer_than_stated(
    name: str, draw: Callable[[np.random.Generator], tuple[float, float]]
) -> None:
    """20 streams of 250 windows: at most 10 of 5,000 are cut, by the configured 0.002."""
    rng, config = np.random.default_rng(len(name)), AdwinConfig()
    cuts = 0
    for _ in range(20):
        test = Adwin()
        cuts += sum(test.add(*draw(rng), config=config) is not None for _ in range(250))
    assert cuts <= 10


def test_a_fall_is_dated() -> None:
    """Accuracy .9 to .75 after 100 windows of 50 labels: found within 20, dated within 4."""
    rng, config = np.random.default_rng(5), AdwinConfig()
    for _ in range(20):
        test = Adwin()
        for _ in range(100):
            test.add(rng.binomial(50, 0.9), 50, config=config)
        cut, since = None, 0
        while cut is None and since < 20:
            cut, since = test.add(rng.binomial(50, 0.75), 50, config=config), since + 1
        assert cut is not None and cut[0] == pytest.approx(0.9, abs=0.03)
        assert abs(test.windows - since) <= 4 and cut[1] < 0.83


def test_memory_is_logarithmic_and_nothing_is_lost() -> None:
    """3,000 windows in at most 5 buckets a row; sums and scatter are those of all windows."""
    rng, config = np.random.default_rng(6), AdwinConfig(windows_min=1 << 20)
    test, means, counts = Adwin(), [], []
    for _ in range(3000):
        count = int(rng.integers(1, 40))
        means.append(float(rng.random()))
        counts.append(count)
        test.add(means[-1] * count, count, config=config)
    assert max(len(row) for row in test.rows) <= 5
    assert len(test.rows) <= math.log2(3000 / 5) + 2
    assert test.windows == 3000
    assert test.mean == pytest.approx(np.average(means, weights=counts))
    newest = [means[-1 - i] * counts[-1 - i] for i in range(len(test.rows[0]))][::-1]
    assert [bucket[2] for bucket in test.rows[0]] == pytest.approx(newest)
    oldest = test.rows[-1][0]
    first = slice(0, oldest[0])
    centre = np.average(means[first], weights=counts[first])
    scatter = (np.array(counts[first]) * (np.array(means[first]) - centre) ** 2).sum()
    assert oldest[1:] == pytest.approx((sum(counts[first]), centre * sum(counts[first]), scatter))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_adwin_survives_json_and_keeps_its_counts(windows: list[tuple[int, int]]) -> None:
    """The copy goes on alike; without a cut, every window is in it."""
    test, config, kept = Adwin(), AdwinConfig(windows_min=8), 0
    for right, wrong in windows:
        copy = Adwin.from_dict(json.loads(json.dumps(test.to_dict())))
        one = test.add(right, right + wrong, config=config)
        assert one == copy.add(right, right + wrong, config=config)
        assert test.to_dict() == copy.to_dict()
        kept += right + wrong > 0
        if one is not None:
            assert one[0] != one[1]
            kept = test.windows
        assert test.windows == kept


# --- bad input --------------------------------------------------------------------------------


def test_nothing_is_added_of_a_bad_window() -> None:
    """Shapes, signs, NaN, values out of range."""
    config, test = PageHinkleyConfig(), known([0.5], [0.1])
    before = test.to_dict()
    for sums, counts in (
        ([1.0, 2.0], [1, 2]), ([math.nan], [1]), ([1.0], [-1]), ([1.0], [math.inf]), (1.0, 1),
        ([1.0], [1, 2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"windows|sums"):
            test.fold(sums, counts, config=config)
    assert test.to_dict() == before
    adwin = Adwin()
    for total, count in ((2.0, 1.0), (-1.0, 5), (math.nan, 1), (1, math.inf), (0, -1), (1, 0)):
        with pytest.raises(ValueError, match=r"values|sums"):
            adwin.add(total, count, config=AdwinConfig())
    assert adwin.windows == 0 and math.isnan(adwin.mean)
    assert adwin.add(0, 0, config=AdwinConfig()) is None and adwin.windows == 0


def test_bad_baselines_states_and_configs_are_refused() -> None:
    """Each with ValueError."""
    calls: list[Callable[[], object]] = [
        lambda: PageHinkley.baseline([[1.0, 2.0]], [[1, 1]]),
        lambda: PageHinkley.baseline([[1.0, 2.0, 3.0]], [[1, 0, 1]]),
        lambda: PageHinkley.baseline([1.0, 2.0, 3.0], [1, 1, 1]),
        lambda: PageHinkley.from_dict({}),
        lambda: PageHinkley.from_dict(known([1], [1]).to_dict() | {"up": [1, 2]}),
        lambda: PageHinkley.from_dict(known([1], [1]).to_dict() | {"up": [math.nan]}),
        lambda: PageHinkley.from_dict(known([1], [1]).to_dict() | {"up": ["x"]}),
        lambda: Adwin.from_dict({"rows": [[[1, 2.0]]]}),
        lambda: Adwin.from_dict({"rows": 3}),
        lambda: Adwin.from_dict({"rows": [[[2, 1.0, 1.0, 0.0]]]}),
        lambda: Adwin.from_dict({"rows": [[[1, 0.0, 0.0, 0.0]]]}),
        lambda: Adwin.from_dict({"rows": [[[1, 1.0, math.nan, 0.0]]]}),
        lambda: Adwin.from_dict({"rows": [[[1, 1.0, 1.0, 0.0]] * 6]}),
        lambda: Adwin.from_dict({"rows": [[]] * 41}),
        lambda: PageHinkleyConfig(tolerance=0.0),
        lambda: PageHinkleyConfig(alarm_windows=1),
        lambda: PageHinkleyConfig(deviation_min=0),
        lambda: AdwinConfig(false_max=0),
        lambda: AdwinConfig(windows_min=6),
        lambda: AdwinConfig(side_min=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"[a-z]"):
            call()
