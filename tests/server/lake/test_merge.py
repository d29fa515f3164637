"""Merging merges is merging all at once: every exact counter, for any grouping. Properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ext.frequent import FrequentItems
from shoal.ext.hll import HllSketch
from shoal.ext.sketch import SketchBank
from shoal.server.lake import merge
from shoal.server.lake.kll import Sketches
from shoal.server.lake.schema import COUNT_MAX, FEATURES, WINDOWS, Dataset

COUNTS = st.integers(0, COUNT_MAX)
LISTS = st.lists(COUNTS, max_size=4)


def row(dataset: Dataset, **values: Any) -> dict[str, Any]:
    """Return a row with empty names."""
    names = dict.fromkeys(dataset.keys, "") | {"time_ms": 0, "windows": 1, "clock_off": 0}
    if "position" in names:
        names["position"] = 0
    return names | values


def combined(rows: list[dict[str, Any]], dataset: Dataset, parts: list[int]) -> list[Any]:
    """Merge rows into parts, and the parts into one row."""
    table = pa.Table.from_pylist(rows, dataset.schema)
    zeros = np.zeros(len(rows), np.int64)
    groups = merge.group(table, (), [np.array(parts, np.int64)])
    some = merge.merged(table, dataset, groups, time__r=zeros, k=100)
    whole = merge.group(some, ())
    found: list[Any] = merge.merged(
        some, dataset, whole, time__r=np.zeros(some.num_rows, np.int64), k=100
    ).to_pylist()
    assert len(found) == 1
    return found


@settings(deadline=None)
@given(
    windows=st.lists(
        st.tuples(COUNTS, LISTS, st.integers(0, 2**53), st.integers(0, 3)), min_size=1, max_size=12
    )
)
def test_counters_add_in_any_grouping(windows: list[tuple[int, list[int], int, int]]) -> None:
    """Sums, lists of any length and extremes are those of all windows."""
    rows = [
        row(WINDOWS, predictions=n, classes=c, device_start_ms=at, device_end_ms=at, latency_us=[])
        for n, c, at, _ in windows
    ]
    (found,) = combined(rows, WINDOWS, [part for *_, part in windows])
    assert found["windows"] == len(windows)
    assert found["predictions"] == sum(n for n, *_ in windows)
    size = max(len(c) for _, c, *_ in windows)
    assert found["classes"] == [
        sum(c[i] for _, c, *_ in windows if i < len(c)) for i in range(size)
    ]
    assert found["device_start_ms"] == min(at for _, _, at, _ in windows)
    assert found["device_end_ms"] == max(at for _, _, at, _ in windows)
    assert found["number"] is None


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1 << 20),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    shift=st.sampled_from([0.0, 1e6]),
)
def test_moments_and_sketches_are_those_of_all_values(
    seed: int, sizes: list[int], shift: float
) -> None:
    """Chan's merge in two steps equals one pass; a sketch has seen every value."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(shift, 2, size).astype(np.float32) for size in sizes]
    rows = []
    for values in parts:
        bank = SketchBank(1, k=16, seed=seed)
        if len(values):
            bank.update(values[:, None])
        moments, some = bank.moments(0), len(values) > 0
        rows.append(
            row(
                FEATURES,
                n=moments.count,
                nulls=0,
                mean=moments.mean if some else None,
                variance=moments.variance if some else None,
                minimum=moments.minimum if some else None,
                maximum=moments.maximum if some else None,
                bins=bank.counts(0).tolist(),
                kll=bank.kll_bytes(0) if some else None,
                kll_variance=bank.variance_certificate(0) if some else None,
            )
        )
    (found,) = combined(rows, FEATURES, [int(i) for i in rng.integers(0, 3, len(rows))])
    values = np.concatenate(parts).astype(np.float64)
    assert found["n"] == found["bins"][0] == len(values)
    if not len(values):
        assert found["mean"] is found["variance"] is found["kll"] is found["minimum"] is None
        return
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
    assert found["variance"] == pytest.approx(values.var(), rel=1e-7, abs=1e-9)
    assert (found["minimum"], found["maximum"]) == (values.min(), values.max())
    table = pa.table({"kll": [found["kll"]]})
    merger = Sketches(table["kll"], np.array([found["kll_variance"]]), np.zeros(1, np.int64)).of(0)
    assert merger is not None
    assert merger.n == len(values)
    middle = float(np.float32(values[0]))
    rank = (values <= middle).mean()
    _, low, high = merger.ranks([middle], 1 - 1e-9)
    assert low[0] - 1e-12 <= rank <= high[0] + 1e-12


@settings(deadline=None)
@given(
    windows=st.lists(
        st.tuples(st.integers(0, 50), st.floats(-1e3, 1e3), st.booleans(), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    )
)
def test_moments_of_some_windows_merge_in_any_grouping(
    windows: list[tuple[int, float, bool, int]],
) -> None:
    """Windows of bins alone count their values and leave the mean of the others as it is."""
    rows = [
        row(
            FEATURES,
            n=n,
            sketched=n if told else 0,
            mean=mean if told and n else None,
            variance=1.0 if told and n else None,
            bins=[n],
        )
        for n, mean, told, _ in windows
    ]
    (found,) = combined(rows, FEATURES, [part for *_, part in windows])
    known = np.repeat([mean for _, mean, told, _ in windows if told],
                      [n for n, _, told, _ in windows if told])  # fmt: skip
    assert found["n"] == found["bins"][0] == sum(n for n, *_ in windows)
    assert found["sketched"] == len(known)
    if not len(known):
        assert found["mean"] is found["variance"] is None
        return
    assert found["mean"] == pytest.approx(known.mean(), rel=1e-9, abs=1e-9)
    assert found["variance"] == pytest.approx(1 + known.var(), rel=1e-9)


def test_infinities_merge_as_numpy_has_them() -> None:
    """An infinite value makes the mean infinite, both signs make it no number; nothing warns."""
    for means, want in (([1.0, np.inf], np.inf), ([-np.inf, np.inf], np.nan)):
        rows = [row(FEATURES, n=2, mean=m, variance=np.nan, bins=[2]) for m in means]
        (found,) = combined(rows, FEATURES, [0, 1])
        assert found["mean"] == want or (np.isnan(want) and np.isnan(found["mean"]))
        assert np.isnan(found["variance"])


def test_categories_merge_their_sets() -> None:
    """Distinct counts of a union are not the sum, and frequent items are."""
    rows = []
    for begin in (0, 5):
        bank = SketchBank(1, kinds=["category"])
        bank.update(np.arange(begin, begin + 10, dtype=np.float32)[:, None])
        rows.append(
            row(FEATURES, n=10, bins=[10], hll=bank.hll_bytes(0), frequent=bank.frequent_bytes(0))
        )
    (found,) = combined(rows, FEATURES, [0, 1])
    assert HllSketch.from_bytes(found["hll"]).estimate() == pytest.approx(15, abs=0.01)
    assert FrequentItems.from_bytes(found["frequent"]).estimate(7) == (2, 2)
    assert FrequentItems.from_bytes(found["frequent"]).estimate(2) == (1, 1)
    assert found["kll"] is None


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2))),
    order=st.randoms(),
)
def test_groups_are_those_of_equal_keys(rows: list[tuple[str, int, int]], order: Any) -> None:
    """Numbered in the order of the keys, wherever a row stands, dictionaries in any order."""
    names = ["c", "b", "a", "unused"]
    order.shuffle(names)
    indices = pa.array([names.index(name) for name, *_ in rows], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(names))
    table = pa.table({"name": column, "number": pa.array([n for _, n, _ in rows], pa.int64())})
    extra = np.array([e for *_, e in rows], np.int64)
    groups = merge.group(table, ("name", "number"), [extra])
    want = sorted(set(rows))
    assert len(groups) == len(want)
    assert [want[g] for g in groups.group__r.tolist()] == rows
    assert [rows[i] for i in groups.first__g.tolist()] == want
