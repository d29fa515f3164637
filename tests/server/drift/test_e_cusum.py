"""The e-CUSUM: an e-value under each null that it states, silent without drift, soon with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.drift import e_cusum
from shoal.server.drift.e_cusum import ECusum, ECusumConfig, project, threshold
from shoal.server.drift.e_cusum_null import NullConfig, StreamNulls, fit
from shoal.server.drift.log_gamma import log_gamma, log_rising

from ._streams import (
    BASELINE,
    BINS,
    FLAT,
    ROWS,
    Array,
    autoregressive,
    daily,
    kl,
    nulls_of,
    psi,
    shifted,
)

CONFIG = ECusumConfig()
FLEET = 20_000


def e_of_each(counts: Array, learned: Array, nulls: StreamNulls) -> Array:
    """Return the e-value of each window, every stream having learned the same."""
    state = ECusum.new(len(counts), counts.shape[1], config=CONFIG)
    state.learned__sb[:] = learned
    state.fold(counts, nulls, now_ms=0, config=CONFIG)
    return np.asarray(np.exp(state.recent__sl[:, -1]))


def outcomes(rows: int, bins: int) -> Array:
    """Return every count vector of so many rows, (X, B)."""
    every = itertools.product(range(rows + 1), repeat=bins)
    return np.array([each for each in every if sum(each) == rows], np.float64)


def log_ways(counts: Array) -> Array:
    """Return ln of the multinomial coefficient of each."""
    return np.asarray(log_gamma(counts.sum(1) + 1) - log_gamma(counts + 1).sum(1))


def run(draw: Callable[[int], Any], nulls: StreamNulls, windows: int) -> tuple[int, float, ECusum]:
    """Fold windows and reset alarms; return (alarms, highest score, state)."""
    state = ECusum.new(len(nulls), nulls.centre__sb.shape[1], config=CONFIG)
    alarms, highest = 0, -math.inf
    for window in range(windows):
        state.fold(draw(window), nulls, now_ms=window, config=CONFIG)
        found = state.alarms(config=CONFIG, streams=FLEET)
        alarms, highest = alarms + int(found.sum()), max(highest, float(state.score__s.max()))
        state.reset(found)
    return alarms, highest, state


# --- e-values: exact ----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [(20, 2, 2), (3, 30, 0), (0, 0, 400), (9, 9, 9)])
@pytest.mark.parametrize("radius", [0.0, 0.001, 0.05])
def test_e_value_of_independent_rows_for_every_p_in_the_ball(
    learned: tuple[int, ...], radius: float
) -> None:
    """All 36 outcomes of 7 rows in 3 bins; p anywhere within the radius, its surface included."""
    centre = np.array([0.5, 0.3, 0.2])
    x = outcomes(7, 3)
    # with K = 1e6 the rows are independent but for 7 * 6 / 2 in a million
    e = e_of_each(x, np.array(learned, np.float64), nulls_of(centre, len(x), radius=radius))
    for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
        way = np.array([math.cos(angle), -math.cos(angle) - math.sin(angle), math.sin(angle)])
        reach = 0.0 if radius == 0 else 1e-9
        while radius and kl(centre, centre + way * reach * 1.01) <= radius:
            reach *= 1.01
        for part in (0.0, 0.5, 1.0):
            p = centre + way * reach * part
            mean = float((np.exp(log_ways(x) + (x * np.log(p)).sum(1)) * e).sum())
            assert mean <= 1 + 1e-4


def test_e_value_grows_outside_the_ball() -> None:
    """The bound above is kept by the null, not by e-values that are never large."""
    centre, p = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    x = outcomes(7, 3)
    e = e_of_each(x, 900 * p, nulls_of(centre, len(x), radius=0.01))
    assert float((np.exp(log_ways(x) + (x * np.log(p)).sum(1)) * e).sum()) > 2


@pytest.mark.parametrize("k", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("learned", [(20, 2, 2), (0, 40, 0)])
def test_e_value_of_dirichlet_multinomial_rows_is_exactly_one_on_average(
    learned: tuple[int, ...], k: float
) -> None:
    """Any over-dispersion, radius 0: a likelihood ratio."""
    centre, rows = np.array([0.5, 0.3, 0.2]), 7
    x = outcomes(rows, 3)
    chance = log_ways(x) + log_rising(k * centre, x).sum(1) - log_rising(k, float(rows))
    assert float(np.exp(chance).sum()) == pytest.approx(1, abs=1e-12)
    nulls = nulls_of(centre, len(x), inflation=(rows + k) / (1 + k), k=k)
    e = e_of_each(x, np.array(learned, np.float64), nulls)
    assert e.max() > 1.01
    assert float((np.exp(chance) * e).sum()) == pytest.approx(1, abs=1e-9)


def test_e_value_of_over_dispersed_rows_off_the_centre() -> None:
    """Both at once is proven to the second order only: measured at the worst p of the ball."""
    rng = np.random.default_rng(2)
    tries = 20_000
    for k, shift in ((20.0, 0.1), (50.0, 0.1), (50.0, -0.3), (400.0, 0.05)):
        radius = float(kl(FLAT, shifted(shift)))
        inflation = (ROWS + k) / (1 + k)
        nulls = nulls_of(FLAT, tries, radius=radius, inflation=inflation, k=k)
        p = rng.dirichlet(k * shifted(shift), tries)
        # taught by windows that lay further off in the same way
        learned = 3 * ROWS / inflation * shifted(3 * shift)
        e = e_of_each(rng.multinomial(ROWS, p).astype(np.float64), learned, nulls)
        error = e.std() / math.sqrt(tries)
        assert e.mean() <= 1 + 3 * error
        assert error < 0.02  # else the line above says nothing


def test_e_values_of_the_look_back_stay_e_values() -> None:
    """Their mean at a fixed window, over the whole product of what was learned on the way."""
    rng = np.random.default_rng(4)
    nulls = nulls_of(FLAT, 5000)
    state = run(lambda _: rng.multinomial(ROWS, FLAT, 5000), nulls, 17)[2]
    e = state.e_values()
    assert e.mean() <= 1 + 3 * e.std() / math.sqrt(len(e))
    assert e.max() > 3


# --- projection and tolerance -------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


@given(WEIGHTS, WEIGHTS, WEIGHTS, st.floats(0, 0.3))
def test_projection_is_on_or_beyond_the_ball_and_supports_it(
    centre: list[float], q: list[float], other: list[float], radius: float
) -> None:
    """For every p in the ball sum p q / p* <= 1: the inequality that makes the e-value one."""
    c, alternative, way = (np.array(each) / sum(each) for each in (centre, q, other))
    t = float(project(c[None], np.array([radius]), alternative[None])[0])
    star = (1 - t) * c + t * alternative
    outside = kl(c, alternative) > radius
    assert t == 1 or kl(c, star) >= radius - 1e-12
    if outside and radius > 1e-6:
        assert kl(c, star) <= radius * (1.01 if radius < 0.01 else 1.3) + 1e-9
    for part in np.linspace(0, 1, 11):
        p = (1 - part) * c + part * way
        if kl(c, p) <= radius and (outside or t == 1):
            assert float((p * alternative / star).sum()) <= 1 + 1e-9


# --- silence and power --------------------------------------------------------------------------


def test_no_alarm_in_a_fleet_without_drift_and_soon_with_it() -> None:
    """A smaller fleet at the threshold of 20,000 streams: 0.2 sigma in 5 % of the streams."""
    rng = np.random.default_rng(10)
    streams, moved = 2000, np.arange(2000) < 100
    reference = rng.multinomial(10_000, FLAT)
    nulls = fit(reference, rng.multinomial(ROWS, FLAT, (streams, BASELINE)))
    alarms, highest, state = run(lambda _: rng.multinomial(ROWS, FLAT, streams), nulls, 40)
    assert alarms == 0 and highest < threshold(FLEET, config=CONFIG) / 2
    first = np.full(streams, 99)
    p = np.where(moved[:, None], shifted(0.2), FLAT)
    for window in range(1, 9):
        state.fold(rng.multinomial(ROWS, p), nulls, now_ms=window, config=CONFIG)
        found = state.alarms(config=CONFIG, streams=FLEET)
        first[found & (first == 99)] = window
    assert (first[~moved] == 99).all()
    assert np.median(first[moved]) <= 6 and (first[moved] <= 8).mean() > 0.95
    assert first[moved].min() <= 4


def test_the_change_is_dated() -> None:
    """The excursion began where the change did, give or take two windows."""
    rng = np.random.default_rng(11)
    nulls = nulls_of(FLAT, 200, radius=0.001)

    def draw(window: int) -> NDArray[np.int64]:
        return rng.multinomial(ROWS, shifted(0.4) if window >= 30 else FLAT, 200)

    state = ECusum.new(200, BINS, config=CONFIG)
    for window in range(36):
        state.fold(draw(window), nulls, now_ms=1000 * window, config=CONFIG)
    assert state.alarms(config=CONFIG, streams=FLEET).all()
    assert (np.abs(state.began__s - 31) <= 2).mean() > 0.95  # windows are numbered from 1
    assert (state.began_ms__s == 1000 * (state.began__s - 1)).all()


def test_what_is_tolerated_raises_no_alarm_in_a_long_run() -> None:
    """PSI at 0.9 of the tolerance for 400 windows is silent; at 6 times it every stream is not."""
    rng = np.random.default_rng(12)
    streams, config = 200, NullConfig(tolerance_psi=0.01)
    nulls = fit(
        rng.multinomial(10_000, FLAT),
        rng.multinomial(ROWS, FLAT, (streams, BASELINE)),
        config=config,
    )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if psi(shifted(middle), FLAT) <= 0.009 else (low, middle)
    alarms, highest, _ = run(lambda _: rng.multinomial(ROWS, shifted(low), streams), nulls, 400)
    assert alarms == 0 and highest < threshold(FLEET, config=CONFIG) / 2
    strict = nulls_of(FLAT, streams)  # equality: the same streams alarm over and over
    assert run(lambda _: rng.multinomial(ROWS, shifted(low), streams), strict, 100)[0] > streams
    far = low * math.sqrt(6 / 0.9)
    assert run(lambda _: rng.multinomial(ROWS, shifted(far), streams), nulls, 30)[0] >= streams


@pytest.mark.parametrize("kind", ["autoregressive", "daily", "scattered"])
def test_streams_as_sensors_make_them_are_silent_under_their_fitted_null(kind: str) -> None:
    """Under the multinomial null, and under equality, the same streams alarm."""
    rng = np.random.default_rng(13)
    streams = 100
    draws: dict[str, Callable[[int], NDArray[np.int64]]] = {
        "autoregressive": autoregressive(rng, streams, 0.9),
        "daily": daily(rng, streams, 0.3),
        "scattered": lambda _: rng.multinomial(ROWS, rng.dirichlet(50 * FLAT, streams)),
    }
    draw = draws[kind]
    base = np.stack([draw(w) for w in range(BASELINE)], 1)
    nulls = fit(10_000 * FLAT, base)
    windows = [draw(BASELINE + w) for w in range(72)]
    assert run(windows.__getitem__, nulls, 72)[0] == 0
    plain = nulls_of(FLAT, streams)
    assert run(windows.__getitem__, plain, 72)[0] > 50


def test_a_short_window_of_alike_rows_is_no_better_evidence() -> None:
    """The inflation of neighbours holds for half a window too, where a Dirichlet's would not."""
    short, whole = np.full(BINS, 10.0), np.full(BINS, 31.0)
    nulls = nulls_of(FLAT, 2, inflation=19.0, k=26.0)
    state = ECusum.new(2, BINS, config=CONFIG)
    state.fold(np.stack([short, whole]), nulls, now_ms=0, config=CONFIG)
    assert state.learned__sb[0].sum() == pytest.approx(160 / 19)
    assert state.learned__sb[1].sum() == pytest.approx(496 * 27 / (496 + 26), rel=0.02)


# --- state --------------------------------------------------------------------------------------


def arrays(state: ECusum) -> dict[str, NDArray[Any]]:
    """Return a copy of all that is kept."""
    return {name: getattr(state, name).copy() for name in ECusum.__slots__}


def taken(nulls: StreamNulls, streams: list[int]) -> StreamNulls:
    """Return the nulls of some streams."""
    return StreamNulls(
        nulls.centre__sb[streams], nulls.radius__s[streams], nulls.inflation__s[streams],
        nulls.concentration__s[streams],
    )  # fmt: skip


def small(seed: int, streams: int, windows: int) -> tuple[StreamNulls, NDArray[np.int64]]:
    """Return nulls of unlike streams, and windows (T, S, 5) in which a few are missing."""
    rng = np.random.default_rng(seed)
    centre = rng.dirichlet(np.full(5, 3.0), streams)
    rows = (rng.uniform(*ends, streams) for ends in ((0.0, 0.01), (1.0, 5.0), (20.0, 1e5)))
    counts = rng.multinomial(rng.integers(0, 200, (windows, streams)), centre[None, ::-1])
    return StreamNulls(centre, *rows), counts


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.permutations(range(6)))
def test_streams_do_not_touch_each_other(seed: int, order: list[int]) -> None:
    """In another order, or folded one by one and joined, each fares the same."""
    nulls, windows = small(seed, 6, 4)
    together = ECusum.new(6, 5, config=CONFIG)
    mixed = ECusum.new(6, 5, config=CONFIG)
    alone = [ECusum.new(1, 5, config=CONFIG) for _ in range(6)]
    for window, counts in enumerate(windows):
        together.fold(counts, nulls, now_ms=window, config=CONFIG)
        mixed.fold(counts[order], taken(nulls, order), now_ms=window, config=CONFIG)
        for i, each in enumerate(alone):
            each.fold(counts[[i]], taken(nulls, [i]), now_ms=window, config=CONFIG)
    for name, values in arrays(together).items():
        joined = np.concatenate([arrays(each)[name] for each in alone])
        assert np.allclose(values[order], arrays(mixed)[name], atol=1e-9)
        assert np.allclose(values, joined, atol=1e-9)


def test_many_streams_are_folded_in_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is for speed alone."""
    nulls, windows = small(1, 23, 5)
    whole = ECusum.new(23, 5, config=CONFIG)
    parts = ECusum.new(23, 5, config=CONFIG)
    for counts in windows:
        whole.fold(counts, nulls, now_ms=0, config=CONFIG)
        with monkeypatch.context() as patch:
            patch.setattr(e_cusum, "BLOCK", 4)
            parts.fold(counts, nulls, now_ms=0, config=CONFIG)
    assert np.allclose(whole.score__s, parts.score__s, atol=1e-12)


def test_a_stream_without_a_window_waits() -> None:
    """A device that was off is neither better nor worse for it."""
    nulls, windows = small(2, 4, 3)
    state = ECusum.new(4, 5, config=CONFIG)
    state.fold(windows[0] + 1, nulls, now_ms=0, config=CONFIG)
    before = {name: each[1:3].tolist() for name, each in arrays(state).items()}
    counts = windows[1] + 1
    counts[1:3] = 0
    state.fold(counts, nulls, now_ms=1, config=CONFIG)
    assert {name: each[1:3].tolist() for name, each in arrays(state).items()} == before
    assert state.windows__s.tolist() == [2, 1, 1, 2]


def test_reset_forgets_one_stream_and_no_other() -> None:
    """After its alarm was dealt with."""
    nulls = nulls_of(FLAT, 3)
    state = ECusum.new(3, BINS, config=CONFIG)
    for window in range(8):
        state.fold(np.tile(500 * shifted(1.0), (3, 1)).round(), nulls, now_ms=window, config=CONFIG)
    assert state.alarms(config=CONFIG).all() and (state.e_values() > 1e6).all()
    state.reset(np.array([False, True, False]))
    assert state.alarms(config=CONFIG).tolist() == [True, False, True]
    assert state.e_values()[1] == 1 and state.began__s.tolist() == [1, 8, 1]


def test_extreme_counts_stay_finite() -> None:
    """All in one bin that the centre hardly knows, a million rows, one row."""
    centre = np.array([1 - 3e-7, 1e-7, 1e-7, 1e-7])
    for inflation, k in ((1.0, 1e6), (50.0, 0.01)):
        nulls = nulls_of(centre, 3, radius=1e-4, inflation=inflation, k=k)
        state = ECusum.new(3, 4, config=CONFIG)
        for window in range(5):
            x = np.array([[0, 0, 0, 10**6], [0, 1, 0, 0], [10**6, 0, 0, 0]])
            state.fold(x, nulls, now_ms=window, config=CONFIG)
        assert np.isfinite(state.score__s).all() and np.isfinite(state.e_values()).all()
        assert state.score__s[2] <= 1


@pytest.mark.parametrize(
    "bad",
    [
        np.full((3, 5), -1),
        np.full((3, 5), math.nan),
        np.full((3, 5), math.inf),
        np.full((3, 5), 0.5),
        np.ones((3, 4), np.int64),
        np.ones((2, 5), np.int64),
        np.ones(5, np.int64),
        np.full((3, 5), "1"),
        np.full((3, 5), True),
    ],
)
def test_bad_counts_are_refused_and_nothing_is_folded(bad: NDArray[Any]) -> None:
    """Also where only one stream of a fleet is wrong."""
    nulls, windows = small(3, 3, 2)
    state = ECusum.new(3, 5, config=CONFIG)
    state.fold(windows[0], nulls, now_ms=0, config=CONFIG)
    before = {name: each.tolist() for name, each in arrays(state).items()}
    with pytest.raises(ValueError, match=r"counts|streams"):
        state.fold(bad, nulls, now_ms=1, config=CONFIG)
    if bad.shape == (3, 5) and bad.dtype.kind == "f":
        one = windows[1].astype(np.float64)
        one[1, 2] = bad[0, 0]
        with pytest.raises(ValueError, match="counts"):
            state.fold(one, nulls, now_ms=1, config=CONFIG)
    assert {name: each.tolist() for name, each in arrays(state).items()} == before


def test_a_state_of_another_shape_is_refused() -> None:
    """Other bins, or a configuration that was changed since."""
    nulls, windows = small(4, 3, 1)
    with pytest.raises(ValueError, match="state"):
        ECusum.new(3, 6, config=CONFIG).fold(windows[0], nulls, now_ms=0, config=CONFIG)
    other = ECusumConfig(look_back=4)
    with pytest.raises(ValueError, match="look_back"):
        ECusum.new(3, 5, config=other).fold(windows[0], nulls, now_ms=0, config=CONFIG)


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows_per_false_alarm": 0},
        {"look_back": 0},
        {"strengths_smooth": (), "strengths_bins": ()},
        {"strengths_bins": (0.0,)},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """Before anything is folded."""
    with pytest.raises(ValueError, match=r"\w"):
        ECusumConfig(**wrong)


def test_a_change_beyond_the_ball_is_learned_however_short_the_windows() -> None:
    """A window of few rows teaches an alternative within the ball, which says nothing: a gain of 0.

    Were it forgotten with each, no later window would ever know more.
    """
    streams = 50
    nulls = nulls_of(FLAT, streams, radius=0.01)
    rng = np.random.default_rng(4)
    state = ECusum.new(streams, BINS, config=CONFIG)
    for window in range(200):  # nothing changes: what is remembered of it must not blind later
        state.fold(rng.multinomial(5, FLAT, streams), nulls, now_ms=window, config=CONFIG)
    assert not state.alarms(config=CONFIG, streams=FLEET).any()
    quiet = state.score__s == 0
    assert quiet.any() and state.learned__sb[quiet].sum(1).max() <= CONFIG.memory_rows + 1e-6
    for window in range(200, 400):
        drawn = rng.multinomial(5, shifted(0.5), streams)
        state.fold(drawn, nulls, now_ms=window, config=CONFIG)
    assert state.alarms(config=CONFIG, streams=FLEET).mean() > 0.9
