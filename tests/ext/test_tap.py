"""The tap's quality counters against a reference that looks at one value after another."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shoal.ext.projection import RandomFeatures
from shoal.ext.sketch import SketchBank
from shoal.ext.tap import Journal, WindowTap

SCORES = np.array([0.4, 0.6], np.float32)
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 1.0, 2.0, -3.0, np.nan, np.inf, -np.inf])


def tap_for(
    channels: int,
    samples: int,
    *,
    stuck_min: int = 3,
    cpu_share_max: float = 1,
    features: RandomFeatures | None = None,
    stride: int = 1,
) -> tuple[WindowTap, Journal, SketchBank]:
    """Return a tap of two classes whose channels range from -2 to 1."""
    bank = SketchBank(channels + 1, edges=[np.zeros(1, np.float32)] * (channels + 1))
    journal = Journal(100, cpu_share_max=cpu_share_max)

    def none(*_: Any) -> Any:
        raise AssertionError("nothing calls it here")

    tap = WindowTap(
        bank,
        journal,
        input=0,
        output=0,
        samples=samples,
        classes=2,
        values=1,
        low__c=np.full(channels, -2, np.float32),
        high__c=np.full(channels, 1, np.float32),
        deciles__9=np.linspace(0.1, 0.9, 9, dtype=np.float32),
        stuck_min=stuck_min,
        limit=0,
        projector=features,
        row_stride=stride,
        ready=none,
        tick=none,
        sliced=none,
    )
    return tap, journal, bank


def stuck(series: NDArray[np.float32], least: int) -> int:
    """Return the values of a series in runs of at least so many equal values."""
    total = run = 0
    before = np.float32(np.nan)
    for value in series:
        run = run + 1 if value == before else 1
        total += least if run == least else int(run > least)
        before = value
    return total


@given(
    st.sampled_from([(1, 1), (3, 1), (2, 5), (1, 300), (2, 600)]),
    st.integers(2, 9),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_quality_counts_as_one_value_after_another(
    shape: tuple[int, int], least: int, sizes: list[int], data: Any
) -> None:
    """Whatever the windows and however they are cut: their counts add up to the series'."""
    channels, samples = shape
    tap, journal, _ = tap_for(channels, samples, stuck_min=least)
    whole = data.draw(hnp.arrays(np.float32, (sum(sizes), channels, samples), elements=VALUES))
    found: dict[str, NDArray[np.int64]] = {
        name: np.zeros(channels, np.int64) for name in ("below", "above", "stuck")
    }
    at = 0
    for size in sizes:
        for window in whole[at : at + size]:
            tap.put(window.reshape(-1), SCORES, 1000)
        at += size
        with journal:
            counters = tap.read()
            tap.begin(0)
        for name, counts in found.items():
            counts += counters[name]
    series = whole.transpose(1, 0, 2).reshape(channels, -1)
    with np.errstate(invalid="ignore"):
        assert found["below"].tolist() == (series < -2).sum(axis=1).tolist()
        assert found["above"].tolist() == (series > 1).sum(axis=1).tolist()
    assert found["stuck"].tolist() == [stuck(each, least) for each in series]


def test_a_long_run_counts_whole_and_goes_on_in_the_next_window() -> None:
    """A sensor that hangs for 1,000 values counts 1,000, in windows of 100."""
    tap, journal, _ = tap_for(1, 100, stuck_min=250)
    counts = []
    for _ in range(10):
        tap.put(np.full(100, 0.5, np.float32), SCORES, 1000)
        with journal:
            counts.append(tap.read()["stuck"][0])
            tap.begin(0)
    assert counts == [0, 0, 300, 100, 100, 100, 100, 100, 100, 100]


@pytest.mark.parametrize(("samples", "stride"), [(1, 1), (10, 3), (700, 50)])
def test_random_features_are_those_of_the_rows(samples: int, stride: int) -> None:
    """The step projects what ``RandomFeatures`` does, and forgets it with the window."""
    rng = np.random.default_rng(3)
    arrays = (
        rng.normal(size=(8, 2)).astype(np.float32),
        rng.uniform(0, 6, 8).astype(np.float32),
        np.zeros(2, np.float32),
        np.ones(2, np.float32),
    )
    tap, journal, _ = tap_for(2, samples, features=RandomFeatures(*arrays), stride=stride)
    for size in (70, 3):
        alone = RandomFeatures(*arrays)
        windows = rng.normal(size=(size, 2, samples)).astype(np.float32)
        windows[0, 0, 0] = np.nan  # a row that is skipped
        alone.add_channels(windows, stride=stride)
        for window in windows:
            tap.put(window.reshape(-1), SCORES, 1000)
        with journal:
            found = tap.read()
            tap.begin(0)
        sums__f, rows = alone.read()
        assert found["projected"] == rows == size * -(-samples // stride) - 1
        np.testing.assert_allclose(found["projection"], sums__f, rtol=1e-12)


def test_a_sketch_that_costs_too_much_is_shed_and_counted() -> None:
    """A megabyte a prediction against 5 % of 100 us; what is not sketched is told."""
    tap, journal, bank = tap_for(1, 1 << 18, cpu_share_max=0.05)
    window = np.random.default_rng(1).normal(size=1 << 18).astype(np.float32)
    for _ in range(60):
        tap.put(window, SCORES, 1000)
    with journal:
        found = tap.read()
    assert found["predictions"] == sum(found["classes"]) == sum(found["latency_us"]) == 60
    assert 0 < found["shed"] < 60 and journal.stride > 1
    assert bank.moments(1).count == 60 - found["shed"]
    assert bank.moments(0).count == (60 - found["shed"]) << 18


def test_a_fast_model_that_is_seldom_asked_is_not_shed() -> None:
    """0.5 % of the time that passes is nobody's loss; without a pause the same is too much."""
    shed = []
    for pause_s in (0.2, 0.0):
        tap, journal, _ = tap_for(1, 1 << 15, cpu_share_max=0.001)
        window = np.random.default_rng(1).normal(size=1 << 15).astype(np.float32)
        for _ in range(5):
            tap.put(window, SCORES, 1000)
            time.sleep(pause_s)
        with journal:
            shed.append(tap.read()["shed"])
    assert shed[0] == 0 < shed[1]


def test_without_a_bound_nothing_is_shed() -> None:
    """Share 1 means: count all, whatever it costs."""
    tap, journal, _ = tap_for(1, 1 << 18)
    window = np.zeros(1 << 18, np.float32)
    for _ in range(10):
        tap.put(window, SCORES, 1)
    with journal:
        assert tap.read()["shed"] == 0 and journal.stride == 1


def test_a_place_for_captures_holds_one_at_a_time() -> None:
    """What is wanted meanwhile is counted as missed; chance waits for the place."""
    tap, journal, _ = tap_for(1, 2)
    called = []
    tap.limit = 0
    journal.watch(values=2, random_in=2, margin_below=0.0, outside_above=1.0)
    with pytest.raises(AssertionError):  # `ready` is called for the second
        for value in range(5):
            called.append(value)
            tap.put(np.full(2, value, np.float32), SCORES, 1000)
    assert called == [0, 1]
    tap.put(np.full(2, 7, np.float32), SCORES, 1000)
    assert journal.captures_missed == 1
    prediction, reason, window, data = journal.captured(-1) or (0, "", 0, b"")
    assert (prediction, reason, window) == (1, "random", 0)
    assert np.frombuffer(data, np.float32).tolist() == [1, 1]
    assert journal.captured(-1) is None


def test_construction_is_checked() -> None:
    """Sizes that do not fit each other would read past an array."""
    with pytest.raises(ValueError, match="pending_max"):
        Journal(0, cpu_share_max=0.5)
    with pytest.raises(ValueError, match="cpu_share_max"):
        Journal(1, cpu_share_max=0)
    with pytest.raises(ValueError, match="stuck_min"):
        tap_for(1, 1, stuck_min=1)
    with pytest.raises(ValueError, match="another number of channels"):
        one = np.ones(1, np.float32)
        tap_for(2, 1, features=RandomFeatures(one[:, None], one, one, one))
    tap, _, _ = tap_for(2, 3)
    with pytest.raises(ValueError, match="expected 6 values and 2 outputs"):
        tap.put(np.zeros(5, np.float32), np.zeros(2, np.float32), 1)
