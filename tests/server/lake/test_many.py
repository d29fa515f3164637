"""Answers of very many rows take another way through the kernels: they say the same.

Also: every tier says the same of what it counted, a file is read without a filter only when the
whole of it is asked for, and bins between other edges never count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasketches import kll_doubles_sketch, kll_floats_sketch
from numpy.typing import NDArray
from sqlalchemy import update

from shoal.ext.frequent import FrequentItems
from shoal.ext.kll import BulkMerger
from shoal.ext.sketch import SketchBank
from shoal.server.drift.frequent_tests import FrequentCounts, homogeneity
from shoal.server.lake import Query, comparison, manifest
from shoal.server.lake.rules import DAY_MS, HOUR_MS, STEP_MS, Tier
from shoal.server.store.tables import Labels, Window

from .conftest import FEATURES, MIDNIGHT, MODEL, World, make_profile
from .test_history import NOW_MS, check, column, truth

EXACT = (
    "group", "feature", "windows", "clock_off", "n", "nulls", "below", "above", "minimum",
    "maximum", "exact", "psi", "jensen_shannon", "hellinger", "null_share", "out_of_range_share",
)  # fmt: skip


@pytest.mark.parametrize("group_by", ["site", "device"])
def test_many_rows_say_what_few_rows_say(
    busy: World, monkeypatch: pytest.MonkeyPatch, group_by: str
) -> None:
    """Exact columns are equal; quantiles of both are within their bounds of the truth."""
    busy.settle()
    ask = (MODEL, group_by, MIDNIGHT, NOW_MS, busy.profile)
    few = busy.lake.history.drift_table(*ask)
    monkeypatch.setattr(comparison, "ROWS_WIDE", 0)
    many = busy.lake.history.drift_table(*ask)
    assert len(few) == len(many) > 5
    want = truth(busy.told, group_by, MIDNIGHT, NOW_MS)
    missed = 0
    for one, other in zip(few, many, strict=True):
        assert one.keys() == other.keys()
        assert {name: one[name] for name in EXACT} == {name: other[name] for name in EXACT}
        assert other["rank_error"] >= 0
        values = column(want[one["group"]], FEATURES.index(one["feature"]))
        for row in (one, other):
            for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
                estimate, low, high = row[name]
                assert low <= estimate <= high
                at = np.quantile(values, share, method="inverted_cdf")
                missed += not low <= at <= high
    assert missed <= 6 * len(few) // 10  # at 99 % each


def test_many_rows_against_other_edges(busy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins are computed anew from ranks, whether rows are few or many."""
    other = make_profile(2, bins=5)
    few = busy.lake.history.drift_table(MODEL, "device", MIDNIGHT, NOW_MS, other)
    monkeypatch.setattr(comparison, "ROWS_WIDE", 0)
    many = busy.lake.history.drift_table(MODEL, "device", MIDNIGHT, NOW_MS, other)
    for one, row in zip(few, many, strict=True):
        assert row["exact"] is False
        assert row["hellinger"] == pytest.approx(one["hellinger"], abs=2 * row["rank_error"] + 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("edges", [[1.0, 2.0, 3.0], [0.1, 0.3], [-2.5, 0.0, 1e-40, 1e30]])
def test_values_on_an_edge_are_in_the_bin_above_it(dtype: type, edges: list[float]) -> None:
    """As exact bins have them: counts and codes lie on edges as a rule."""
    kept: NDArray[Any] = np.array(edges, np.float32).astype(dtype)
    values = np.concatenate([kept, np.nextafter(kept, dtype(-np.inf)), kept, [dtype(-9)]])
    sketch = (kll_floats_sketch if dtype is np.float32 else kll_doubles_sketch)(64)
    sketch.update(values)
    merger = BulkMerger()
    merger.add(sketch.serialize())
    want = np.histogram(values, [-np.inf, *kept, np.inf])[0]
    assert comparison.counts_between(merger, kept.tolist()) == pytest.approx(want)


@pytest.mark.parametrize("group_by", ["fleet", "site", "device"])
def test_tiers_say_what_windows_say(make_world: Callable[..., World], group_by: str) -> None:
    """The same day from windows, from hours and from days: counts exactly, ranks within V."""
    world = make_world(fold_s=(3_600, 7_200))
    world.now_ms = MIDNIGHT + DAY_MS
    for hour in range(24):
        for device in ("dev-0", "dev-1", "dev-2"):
            world.window(
                device, MIDNIGHT + hour * HOUR_MS + STEP_MS, rows=300, latency_us=[0, 40, 2]
            )
    query = Query(model=MODEL, group_by=group_by, since_ms=MIDNIGHT, until_ms=MIDNIGHT + DAY_MS)
    want = truth(world.told, group_by, MIDNIGHT, MIDNIGHT + DAY_MS)
    sketched = 0
    for age_h in (24, 26, 30):
        world.now_ms = MIDNIGHT + age_h * HOUR_MS
        world.settle()
        check(world, query)
        answer = world.lake.history.features(query)
        assert answer.sketches is not None
        for i, row in enumerate(answer.table.to_pylist()):
            merger = answer.sketches.of(i)
            assert merger is not None
            values = np.sort(column(want[row["group"]], row["position"]))
            assert merger.n == len(values)
            at = np.quantile(values, [0.1, 0.5, 0.9], method="inverted_cdf")
            found = merger.ranks(at, 1 - 1e-6)
            ranks = np.searchsorted(values, at, side="right") / len(values)
            assert (found.low <= ranks).all()
            assert (ranks <= found.high).all()
            sketched += merger.variance > 0
    assert sketched > 0


def test_parts_of_files_are_asked_for(busy: World) -> None:
    """Ranges that cut files, and ranges that hold them whole, side by side."""
    busy.settle()
    for since_ms, until_ms in (
        (MIDNIGHT, MIDNIGHT + DAY_MS),
        (MIDNIGHT - DAY_MS, NOW_MS),
        (MIDNIGHT + 7 * STEP_MS, MIDNIGHT + DAY_MS + 5 * HOUR_MS),
        (MIDNIGHT + 5 * HOUR_MS + STEP_MS, MIDNIGHT + 6 * HOUR_MS),
    ):
        for group_by in ("site", "device"):
            check(
                busy,
                Query(model=MODEL, group_by=group_by, since_ms=since_ms, until_ms=until_ms),
            )


def test_bins_between_other_edges_never_count(world: World) -> None:
    """As many bins, other edges: the window counts, is told as refused, and has no features."""
    world.now_ms = MIDNIGHT + HOUR_MS
    world.window("dev-0", MIDNIGHT, rows=50)
    told = world.window("dev-0", MIDNIGHT + STEP_MS, rows=50)
    moved = [np.array(f.edges, np.float32) + np.float32(0.25) for f in world.profile.features]
    bank = SketchBank(len(moved), k=64, edges=moved)
    bank.update(told.x__nd)
    with world.store.begin() as session:
        session.execute(update(Window).where(Window.number == 1).values(sketch=bank.to_bytes()))
    for _ in range(2):  # from the database, then from files
        query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + HOUR_MS)
        (row,) = world.lake.history.windows(query).table.to_pylist()
        assert (row["windows"], row["refused"]) == (2, 1)
        rows = world.lake.history.features(query).table.to_pylist()
        assert [row["windows"] for row in rows] == [1, 1, 1]
        (shown,) = world.lake.history.model_table(
            MODEL, "fleet", MIDNIGHT, MIDNIGHT + HOUR_MS, world.profile
        )
        assert shown["refused"] == 1
        world.settle()


def test_bins_alone_and_whole_windows_of_one_model_merge(make_world: Callable[..., World]) -> None:
    """Bins are of all values; moments, extremes and sketches of those whose windows told them."""
    world = make_world(fold_s=(3_600, 7_200))
    world.now_ms = MIDNIGHT + HOUR_MS
    told = [world.window("dev-0", MIDNIGHT + slot * STEP_MS, rows=50) for slot in range(4)]
    edges = [np.array(f.edges, np.float32) for f in world.profile.features]
    for number in (0, 2):
        bank = SketchBank(len(edges), k=64, edges=edges)
        bank.update(told[number].x__nd)
        alone = {"sketch": bank.to_bytes(bins_only=True), "extra": {"bins_only": True}}
        with world.store.begin() as session:
            session.execute(update(Window).where(Window.number == number).values(**alone))
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + DAY_MS)
    for _ in range(3):  # from the database, from files, from days
        answer = world.lake.history.features(query)
        assert answer.sketches is not None
        rows = answer.table.to_pylist()
        assert [row["feature"] for row in rows] == list(FEATURES)
        for place, row in enumerate(rows):
            values, known = column(told, place), column([told[1], told[3]], place)
            want = np.histogram(values, [-np.inf, *edges[place], np.inf])[0]
            assert (row["n"], row["sketched"]) == (len(values), len(known))
            assert row["bins"] == want.tolist()
            assert row["mean"] == pytest.approx(known.mean(dtype=np.float64), abs=1e-12)
            assert row["variance"] == pytest.approx(known.var(dtype=np.float64), rel=1e-9)
            assert (row["minimum"], row["maximum"]) == (known.min(), known.max())
            merger = answer.sketches.of(place)
            assert merger is not None and merger.n == len(known)
        shown = world.lake.history.drift_table(
            MODEL, "fleet", MIDNIGHT, MIDNIGHT + DAY_MS, world.profile
        )
        assert all(each["exact"] and each["p50"] and each["mean"] is not None for each in shown)
        world.settle()
        world.now_ms += 2 * DAY_MS
    with world.store.read() as session:
        assert Tier.DAY in {each.tier for each in manifest.live(session, dataset="features")}


def test_windows_of_bins_alone_have_no_moments(world: World) -> None:
    """Null, not a number that is none: other readers of the files would take it for one."""
    world.now_ms = MIDNIGHT + HOUR_MS
    told = world.window("dev-0", MIDNIGHT, rows=50)
    edges = [np.array(f.edges, np.float32) for f in world.profile.features]
    bank = SketchBank(len(edges), k=64, edges=edges)
    bank.update(told.x__nd)
    with world.store.begin() as session:
        session.execute(update(Window).values(sketch=bank.to_bytes(bins_only=True)))
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + HOUR_MS)
    for _ in range(2):
        rows = [
            *world.lake.history.features(query).table.to_pylist(),
            *world.lake.history.single(query, dataset="features"),
        ]
        assert len(rows) == 6 and all(row["n"] > 40 and row["sketched"] == 0 for row in rows)
        for name in ("mean", "variance", "minimum", "maximum"):
            assert [row[name] for row in rows] == [None] * 6
        world.settle()


def test_features_of_a_server_before_bins_alone_were_counted_merge(
    make_world: Callable[..., World],
) -> None:
    """They lack the column: their moments are of all their values."""
    world = make_world(fold_s=(3_600, 7_200))
    world.now_ms = MIDNIGHT + HOUR_MS
    world.window("dev-0", MIDNIGHT)
    world.settle()
    for path in (world.folder / "features").rglob("*.parquet"):
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["sketched"]), path)
    world.window("dev-0", MIDNIGHT + STEP_MS)
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + DAY_MS)
    for _ in range(2):  # as they are beside the database, then folded with newer ones
        check(world, query)
        rows = world.lake.history.features(query).table.to_pylist()
        assert all(row["sketched"] == row["n"] for row in rows)
        world.now_ms = MIDNIGHT + 3 * DAY_MS
        world.settle()


def test_windows_in_the_lake_are_not_kept_in_memory(busy: World) -> None:
    """Tens of kilobytes each, which nobody would ask for again."""
    busy.lake.history.drift_table(MODEL, "site", MIDNIGHT, NOW_MS, busy.profile)
    assert busy.lake._memo._found
    busy.settle()
    assert not busy.lake._memo._found


def test_files_of_a_server_before_the_refused_are_read_and_folded(
    make_world: Callable[..., World],
) -> None:
    """They lack the column: none of their windows was refused, and later ones still count."""
    world = make_world(fold_s=(3_600, 7_200))
    world.now_ms = MIDNIGHT + HOUR_MS
    for slot in range(3):
        world.window("dev-0", MIDNIGHT + slot * STEP_MS, rows=50)
    world.settle()
    old = list((world.folder / "windows").rglob("*.parquet"))
    for path in old:
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["refused"]), path)
    assert old
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + DAY_MS)
    for _ in range(2):  # as they are, then folded with newer ones
        (row,) = world.lake.history.windows(query).table.to_pylist()
        assert (row["windows"], row["refused"]) == (3, 0)
        world.now_ms = MIDNIGHT + 3 * DAY_MS
        world.settle()
    with world.store.read() as session:
        tiers = {each.tier for each in manifest.live(session, dataset="windows")}
    assert tiers > {Tier.FINE}


def test_one_record_does_not_end_the_lake(make_world: Callable[..., World]) -> None:
    """Labels of a split that no column holds, and doubles where the others send floats."""
    world = make_world()
    world.now_ms = MIDNIGHT + HOUR_MS
    for device in ("dev-0", "dev-1"):
        world.window(device, MIDNIGHT, labelled=True)
    edges = [np.array(f.edges, np.float32) for f in world.profile.features]
    bank = SketchBank(len(edges), k=64, edges=edges, kinds=["double", "float", "float"])
    bank.update(np.random.default_rng(1).normal(size=(400, len(edges))))
    with world.store.begin() as session:
        session.execute(update(Labels).where(Labels.device_id == 1).values(split=1 << 31))
        session.execute(update(Window).where(Window.device_id == 1).values(sketch=bank.to_bytes()))
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + HOUR_MS)
    for _ in range(2):  # from the database, then from files
        (row,) = world.lake.history.windows(query).table.to_pylist()
        assert (row["windows"], row["refused"]) == (2, 1)
        assert {row["windows"] for row in world.lake.history.features(query).table.to_pylist()} == {
            1
        }
        assert (
            sum(row["windows"] for row in world.lake.history.labels(query).table.to_pylist()) == 1
        )
        world.settle()


def test_windows_of_bins_alone_do_not_change_a_mix() -> None:
    """Their items are not known, which is no news of the others."""
    known = {code: 320 for code in range(5)}
    sketch = FrequentItems()
    for code in range(5):
        sketch.update(np.full(600, code))
    assert comparison._frequent(None) is None
    counted = comparison._frequent(sketch.to_bytes())
    assert counted is not None and counted.total == 3000
    reference = FrequentCounts(known, dict(known), 1600, 0)
    assert homogeneity(reference, counted).p_value > 0.5


def test_a_range_of_another_profile_was_not_counted(busy: World) -> None:
    """What lies outside of the model's own range says nothing about another one's."""
    other = make_profile(2)
    for profile, known in ((busy.profile, True), (other, False)):
        rows = busy.lake.history.drift_table(MODEL, "fleet", MIDNIGHT, NOW_MS, profile)
        shares = [row["out_of_range_share"] for row in rows if row["feature"] != "confidence"]
        assert all((share is not None) == known for share in shares)
