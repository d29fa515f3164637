"""Answers are the sums of what the devices counted: at any granularity, over any range.

Properties. The truth is computed from the raw values, which no server ever sees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.errors import BusyError, InvalidError
from shoal.server.lake import Query
from shoal.server.lake.rules import DAY_MS, HOUR_MS, STEP_MS, floor

from .conftest import FEATURES, MIDNIGHT, MODEL, Told, World, make_profile

NOW_MS = MIDNIGHT + 3 * DAY_MS
KEYS: dict[str, Callable[[Told], str]] = {
    "fleet": lambda told: "",
    "device": lambda told: told.device,
    "site": lambda told: told.site,
    "hardware": lambda told: told.hardware,
    "slice": lambda told: told.slice,
}


def truth(told: list[Told], group_by: str, since_ms: int, until_ms: int) -> dict[str, list[Told]]:
    """Return the windows of each group that begin within a range."""
    found: dict[str, list[Told]] = {}
    for each in told:
        if since_ms <= each.start_ms < until_ms:
            found.setdefault(KEYS[group_by](each), []).append(each)
    return found


def column(windows: list[Told], i: int) -> NDArray[np.float32]:
    """Return all values of a feature, nulls left out."""
    values: NDArray[np.float32] = np.concatenate([each.x__nd[:, i] for each in windows])
    found: NDArray[np.float32] = values[~np.isnan(values)]
    return found


def added(lists: list[tuple[int, ...]]) -> list[int]:
    """Return lists added place by place."""
    total = [0] * max(map(len, lists))
    for each in lists:
        for i, count in enumerate(each):
            total[i] += count
    return total


def check(world: World, query: Query) -> None:
    """Compare every exact counter of an answer with the truth."""
    answer = world.lake.history.features(query)
    assert answer.since_ms <= query.since_ms
    assert answer.until_ms >= query.until_ms
    want = truth(world.told, query.group_by, answer.since_ms, answer.until_ms)
    rows = {(row["group"], row["feature"]): row for row in answer.table.to_pylist()}
    assert set(rows) == {(group, name) for group in want for name in FEATURES}
    for (group, name), row in rows.items():
        windows, i = want[group], FEATURES.index(name)
        values = column(windows, i)
        edges = np.array(world.profile.features[i].edges, np.float32)
        assert row["position"] == i
        assert row["windows"] == len(windows)
        assert row["n"] == len(values)
        assert row["nulls"] == sum(len(each.x__nd) for each in windows) - len(values)
        bins = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        assert row["bins"] == bins.tolist()
        assert row["mean"] == pytest.approx(values.mean(dtype=np.float64), abs=1e-12)
        assert row["variance"] == pytest.approx(values.var(dtype=np.float64), rel=1e-9)
        assert (row["minimum"], row["maximum"]) == (values.min(), values.max())
    counted = world.lake.history.windows(query).table.to_pylist()
    assert {row["group"] for row in counted} == set(want)
    for row in counted:
        windows = want[row["group"]]
        assert row["windows"] == row["errors"] == len(windows)
        assert row["classes"] == added([each.classes for each in windows])
        assert row["predictions"] == sum(sum(each.classes) for each in windows)
        assert row["latency_us"] == added([(0, 40, 2)] * len(windows))
        assert row["device_start_ms"] == min(each.start_ms for each in windows)
    labels = {row["group"]: row for row in world.lake.history.labels(query).table.to_pylist()}
    for group, windows in want.items():
        some = [each.confusion for each in windows if each.confusion]
        assert (group in labels) == bool(some)
        if some:
            assert labels[group]["confusion"] == added(some)
            assert labels[group]["labelled"] == sum(map(sum, some))


@pytest.mark.parametrize("group_by", sorted(KEYS))
def test_every_window_counts_once_in_every_group(busy: World, group_by: str) -> None:
    """Files of three tiers, files that wait to be folded and rows of the database: no overlap."""
    query = Query(model=MODEL, group_by=group_by, since_ms=0, until_ms=NOW_MS)
    check(busy, query)
    busy.settle()
    check(busy, query)
    busy.now_ms += DAY_MS
    busy.settle()
    check(busy, query)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    since=st.integers(MIDNIGHT - DAY_MS, NOW_MS - 1),
    length=st.integers(1, 4 * DAY_MS),
    group_by=st.sampled_from(sorted(KEYS)),
)
def test_any_range_is_answered_from_any_mix_of_tiers(
    busy: World, since: int, length: int, group_by: str
) -> None:
    """Days within, hours and windows at the edges: the sum is the one over all windows."""
    query = Query(model=MODEL, group_by=group_by, since_ms=since, until_ms=since + length)
    answer = busy.lake.history.features(query)
    assert answer.since_ms == floor(since, STEP_MS)
    assert answer.until_ms - (since + length) < STEP_MS
    check(busy, query)


@pytest.mark.parametrize("every", ["hour", "day"])
def test_buckets_add_up_to_the_whole(busy: World, every: str) -> None:
    """A series has each window in its own bucket."""
    query = Query(model=MODEL, group_by="site", since_ms=MIDNIGHT, until_ms=NOW_MS, every=every)
    width = {"hour": HOUR_MS, "day": DAY_MS}[every]
    want: dict[tuple[str, int], int] = {}
    for each in busy.told:
        if MIDNIGHT <= each.start_ms < NOW_MS:
            key = (each.site, floor(each.start_ms, width))
            want[key] = want.get(key, 0) + sum(each.classes)
    rows = busy.lake.history.windows(query).table.to_pylist()
    assert {(row["group"], row["bucket_ms"]): row["predictions"] for row in rows} == want


def test_quantiles_are_within_their_bounds(busy: World) -> None:
    """Sketches that were merged twice still hold what their certificate says."""
    busy.settle()
    for group_by in ("fleet", "device"):
        query = Query(model=MODEL, group_by=group_by, since_ms=MIDNIGHT, until_ms=NOW_MS)
        answer = busy.lake.history.features(query)
        want = truth(busy.told, group_by, MIDNIGHT, NOW_MS)
        assert answer.sketches is not None
        for i, row in enumerate(answer.table.to_pylist()):
            values = np.sort(column(want[row["group"]], row["position"]))
            merger = answer.sketches.of(i)
            assert merger is not None
            assert merger.n == len(values)
            # A chance of 1e-6 each: some hundred of them never fail by accident.
            found = merger.ranks([-1.0, 0.0, 0.7], 1 - 1e-6)
            ranks = np.searchsorted(values, [-1.0, 0.0, 0.7], side="right") / len(values)
            assert (found.low <= ranks + 1e-12).all()
            assert (ranks <= found.high + 1e-12).all()
            assert merger.minimum == values[0]
            assert merger.maximum == values[-1]


def test_a_single_window_can_be_looked_at_later(busy: World) -> None:
    """Time travel: what a device sent at that time, number and all, waiting or folded."""
    one = busy.told[7]
    query = Query(
        model=MODEL,
        since_ms=one.start_ms,
        until_ms=one.start_ms + 1,
        where={"device": one.device},
    )
    (row,) = busy.lake.history.single(query)
    assert (row["number"], row["slice"], row["classes"]) == (
        one.number, one.slice, list(one.classes),
    )  # fmt: skip
    rows = busy.lake.history.single(query, dataset="features")
    assert [each["feature"] for each in sorted(rows, key=lambda r: r["position"])] == [*FEATURES]
    assert rows[0]["stream"] == one.device.encode().ljust(16).hex()


def test_features_and_members_can_be_chosen(busy: World) -> None:
    """A filter leaves the rest alone."""
    query = Query(
        model=MODEL,
        group_by="hardware",
        since_ms=MIDNIGHT,
        until_ms=NOW_MS,
        features=("heat",),
        where={"site": "south"},
    )
    (row,) = busy.lake.history.features(query).table.to_pylist()
    members = [t for t in busy.told if t.site == "south" and MIDNIGHT <= t.start_ms < NOW_MS]
    assert (row["group"], row["feature"], row["n"]) == ("pi4", "heat", len(column(members, 1)))


def test_the_drift_table_is_exact_where_edges_are_the_models(busy: World) -> None:
    """With the model's own profile the bins are compared; with another one, ranks of sketches."""
    other = make_profile(2, bins=5)
    history = busy.lake.history
    own_rows = history.drift_table(MODEL, "site", MIDNIGHT, NOW_MS, busy.profile)
    new_rows = history.drift_table(MODEL, "site", MIDNIGHT, NOW_MS, other)
    assert len(own_rows) == len(new_rows) == 2 * len(FEATURES)
    want = truth(busy.told, "site", MIDNIGHT, NOW_MS)
    for mine, new in zip(own_rows, new_rows, strict=True):
        assert mine["exact"]
        assert not new["exact"]
        values = column(want[mine["group"]], FEATURES.index(mine["feature"]))
        low, high = mine["p50"][1:]
        assert low <= np.quantile(values, 0.5, method="inverted_cdf") <= high
        assert mine["n"] == new["n"] == len(values)
        feature = next(each for each in other.features if each.name == new["feature"])
        where = np.searchsorted(np.array(feature.edges, np.float32), values, side="right")
        p = np.array(feature.counts) + 0.5
        q = np.bincount(where, minlength=len(p)) + 0.5
        hellinger = np.sqrt(1 - np.sqrt(p / p.sum() * (q / q.sum())).sum())
        assert new["hellinger"] == pytest.approx(hellinger, abs=2 * new["rank_error"] + 0.02)
    # Confidences of the profile are uniform, the devices' are normal: that must be seen.
    far = {row["feature"]: row["psi"] for row in own_rows}
    assert far["confidence"] > 0.5 > far["speed"]


def test_what_is_not_kept_is_refused(busy: World) -> None:
    """A question that hours cannot answer any more is an error, not a wrong sum."""
    busy.now_ms += 20 * DAY_MS
    busy.settle()
    history = busy.lake.history
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=NOW_MS)
    with pytest.raises(InvalidError, match="single windows are kept since"):
        history.single(query)
    answer = history.features(
        Query(model=MODEL, since_ms=MIDNIGHT + 1, until_ms=MIDNIGHT + HOUR_MS + 1)
    )
    assert (answer.since_ms, answer.until_ms) == (MIDNIGHT, MIDNIGHT + 2 * HOUR_MS)
    busy.now_ms += 100 * DAY_MS
    busy.settle()
    with pytest.raises(InvalidError, match="single hours are kept since"):
        history.windows(Query(model=MODEL, since_ms=MIDNIGHT, until_ms=NOW_MS, every="hour"))
    check(busy, Query(model=MODEL, since_ms=MIDNIGHT + 1, until_ms=NOW_MS - 1))


def test_questions_that_make_no_sense_are_refused(world: World) -> None:
    """An unknown group, an empty range, a range before time began."""
    with pytest.raises(InvalidError, match="not grouped by"):
        Query(model=MODEL, since_ms=0, until_ms=1, group_by="colour")
    with pytest.raises(InvalidError, match="have no"):
        Query(model=MODEL, since_ms=0, until_ms=1, where={"colour": "red"})
    with pytest.raises(InvalidError, match="empty"):
        world.lake.history.features(Query(model=MODEL, since_ms=5, until_ms=5))


def test_nothing_is_an_answer(world: World) -> None:
    """A lake without a file answers with no row."""
    query = Query(model=MODEL, group_by="site", since_ms=MIDNIGHT, until_ms=NOW_MS)
    assert world.lake.history.features(query).table.num_rows == 0
    assert world.lake.history.drift_table(MODEL, "site", MIDNIGHT, NOW_MS, world.profile) == []


def test_a_lake_that_is_behind_says_so(make_world: Callable[..., World]) -> None:
    """An answer that would lack windows is refused, and works later."""
    world = make_world(export_rows_max=1)
    for i in range(5):
        world.window("dev-0", MIDNIGHT - (i + 1) * STEP_MS)
    query = Query(model=MODEL, since_ms=MIDNIGHT - DAY_MS, until_ms=NOW_MS)
    with pytest.raises(BusyError, match="wait for the lake"):
        world.lake.history.features(query)
    world.settle()
    check(world, query)
