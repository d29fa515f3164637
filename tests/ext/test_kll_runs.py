"""Sketches in the memory of others, and quantiles of many groups at once, against one merger each.

The invariants: a group's answer is that of a merger of its sketches; memory is never read outside
of the parts that were given; what is refused leaves mergers as they were.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from datasketches import kll_doubles_sketch, kll_floats_sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _kll
from shoal.ext.kll import (
    Blobs,
    BulkMerger,
    SketchMismatchError,
    SketchRecordError,
    quantiles_of_runs,
)

from .test_kll import write

SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)


def sketch(values: NDArray[Any], k: int = 64) -> bytes:
    """Return the library's sketch of values."""
    kind = kll_doubles_sketch if values.dtype == np.float64 else kll_floats_sketch
    made = kind(k)
    made.update(values)
    found: bytes = made.serialize()
    return found


def offsets_of(ends: list[int]) -> NDArray[np.int32]:
    """Return offsets as parts have them."""
    return np.array(ends, np.int32)


def listed(blobs: list[bytes], *, parts: int = 1) -> Blobs:
    """List sketches that stand in so many parts."""
    found = []
    for some in np.array_split(np.arange(len(blobs)), parts):
        chosen = [blobs[i] for i in some]
        offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int32)
        found.append((b"".join(chosen), offsets))
    return Blobs(found, np.arange(len(blobs)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    double=st.booleans(),
    parts=st.integers(1, 4),
)
def test_each_run_says_what_a_merger_says(
    seed: int, sizes: list[int], double: bool, parts: int
) -> None:
    """Few sketches merge without a coin: both ways agree in every digit, bounds and V too."""
    rng = np.random.default_rng(seed)
    dtype = np.float64 if double else np.float32
    blobs = [
        sketch(rng.normal(0, 10.0 ** rng.integers(-3, 30), int(rng.integers(0, 900))).astype(dtype))
        for _ in range(sum(sizes))
    ]
    variances = rng.uniform(0, 50, len(blobs))
    variances[rng.random(len(blobs)) < 0.3] = np.nan
    starts = np.cumsum([0, *sizes])
    found = quantiles_of_runs(listed(blobs, parts=parts), starts, variances, SHARES)
    for g, (begin, end) in enumerate(itertools.pairwise(starts)):
        merger = BulkMerger()
        merger.add_many(blobs[begin:end], variances[begin:end])
        assert (found.n[g], found.variance[g]) == (merger.n, merger.variance)
        for one, all_groups in zip(merger.quantiles(SHARES), found[2:], strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float64), all_groups[g])


def test_runs_that_are_sampled_are_within_their_bounds() -> None:
    """Each bound by itself holds with 99 %: of 400 some fail, 40 do not."""
    rng = np.random.default_rng(7)
    runs, each = 8, 120
    values = rng.normal(0, 1, (runs, each, 3_000)).astype(np.float32)
    values += rng.normal(0, 1, (runs, each, 1)).astype(np.float32)
    blobs = [sketch(values[g, i]) for g in range(runs) for i in range(each)]
    shares = np.linspace(0.01, 0.99, 50)
    found = quantiles_of_runs(
        listed(blobs), np.arange(runs + 1) * each, np.full(len(blobs), np.nan), shares,
        k_wide=64, seed=1,
    )  # fmt: skip
    assert (found.n == each * 3_000).all()
    missed = 0
    for g in range(runs):
        truth = np.quantile(values[g], shares, method="inverted_cdf")
        missed += int(((truth < found.low[g]) | (truth > found.high[g])).sum())
        assert (np.diff(found.estimate[g]) >= 0).all()
    assert missed < 0.1 * runs * len(shares)
    error = np.sqrt(2 * found.variance * np.log(200)) / found.n
    assert ((error > 0.001) & (error < 0.03)).all()  # it did sample, and its bounds say something


def test_rows_are_listed_in_any_order_of_any_part() -> None:
    """Empty parts, rows twice, rows left out."""
    parts = [
        (b"abc", offsets_of([0, 1, 3])),
        (b"", offsets_of([0])),
        (b"__xyz", offsets_of([2, 2, 5])),
    ]
    blobs = Blobs(parts, np.array([3, 0, 1, 1, 2]))
    assert [blobs[i] for i in range(len(blobs))] == [b"xyz", b"a", b"bc", b"bc", b""]
    with pytest.raises(IndexError):
        blobs[5]
    with pytest.raises(IndexError):
        blobs[-1]


@pytest.mark.parametrize(
    ("offsets", "order", "error"),
    [
        ([0, 4], [0], ValueError),
        ([-1, 2], [0], ValueError),
        ([0, 3, 2], [0], ValueError),
        ([], [], ValueError),
        ([0, 3], [1], IndexError),
        ([0, 3], [-1], IndexError),
    ],
)
def test_parts_that_lie_are_refused(
    offsets: list[int], order: list[int], error: type[Exception]
) -> None:
    """No offset leads out of the bytes, no row out of the offsets."""
    with pytest.raises(error):
        Blobs([(b"abc", np.array(offsets, np.int32))], np.array(order, np.int64))


def test_memory_is_held() -> None:
    """The parts may be forgotten by everyone else."""
    data = bytearray(sketch(np.arange(100, dtype=np.float32)))
    blobs = Blobs([(data, offsets_of([0, len(data)]))], np.array([0]))
    with pytest.raises(BufferError):
        data.clear()
    del data
    assert quantiles_of_runs(blobs, [0, 1], [0.0], [1.0]).estimate.tolist() == [[99.0]]


def test_what_is_refused_changes_nothing() -> None:
    """Damaged bytes, mixed types, impossible variances; the merger goes on as if unasked."""
    good, wide = sketch(np.arange(90, dtype=np.float32)), sketch(np.arange(90, dtype=np.float64))
    blobs = listed([good, good[:-1], wide])
    merger = BulkMerger()
    merger.add_blobs(blobs, 0, 1, np.zeros(1))
    before = merger.dump()
    for begin, end, variances, error in (
        (0, 2, np.zeros(2), SketchRecordError),
        (2, 3, np.zeros(1), SketchMismatchError),
        (0, 1, np.full(1, -1.0), ValueError),
        (0, 1, np.zeros(2), ValueError),
        (0, 4, None, IndexError),
        (-1, 1, None, IndexError),
    ):
        with pytest.raises(error):
            merger.add_blobs(blobs, begin, end, variances)
        assert merger.dump() == before
    with pytest.raises(SketchRecordError, match="sketch 1 of 3"):
        quantiles_of_runs(blobs, [0, 1, 2], np.zeros(3), SHARES)
    mixed = listed([good, wide])
    with pytest.raises(SketchMismatchError):
        quantiles_of_runs(mixed, [0, 2], np.zeros(2), SHARES)
    # Each group by itself may be of either.
    assert quantiles_of_runs(mixed, [0, 1, 2], np.zeros(2), [0.5]).estimate.shape == (2, 1)


def test_questions_that_do_not_fit_are_refused() -> None:
    """Starts, shapes, shares and confidences are checked before anything is read."""
    blobs = listed([sketch(np.arange(90, dtype=np.float32))])
    for starts, variances, shares in (
        ([1, 0], [0.0], [0.5]),
        ([], [0.0], [0.5]),
        ([0, 1], [0.0, 0.0], [0.5]),
        ([0, 1], [0.0], [1.5]),
        ([0, 1], [0.0], [np.nan]),
    ):
        with pytest.raises(ValueError, match=r"share|starts|shapes"):
            quantiles_of_runs(blobs, starts, variances, shares)
    with pytest.raises(IndexError):
        quantiles_of_runs(blobs, [0, 2], [0.0], [0.5])
    with pytest.raises(ValueError, match="confidence"):
        quantiles_of_runs(blobs, [0, 1], [0.0], [0.5], confidence=1.0)
    with pytest.raises(ValueError, match="power of 2"):
        quantiles_of_runs(blobs, [0, 1], [0.0], [0.5], k_wide=100)
    full = _kll.Merger(64, 1)
    full.add(blobs[0])
    held = full.dump()
    with pytest.raises(ValueError, match="cannot be asked"):
        full.ask_runs(
            blobs, np.array([0, 1]), np.zeros(1), np.array([0.5]), 1.0,
            np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 3, 1)),
        )  # fmt: skip
    assert full.dump() == held


def test_no_run_and_no_sketch() -> None:
    """Nothing is an answer."""
    empty = Blobs([], np.zeros(0, np.int64))
    assert len(empty) == 0
    assert quantiles_of_runs(empty, [0], [], SHARES).estimate.shape == (0, 5)
    found = quantiles_of_runs(empty, [0, 0], [], SHARES)
    assert found.n.tolist() == [0]
    assert np.isnan(found.estimate).all()


@pytest.mark.parametrize("double", [False, True])
def test_weights_of_the_heaviest_levels(double: bool) -> None:
    """One item on each of 53 levels: each weighs 2^level in the curve, beyond 32 bits too."""
    data = write([[float(h)] for h in range(53)], k=8, wide=double)
    merger = BulkMerger()
    merger.add(data)
    _, is_double, n, _, _, _, values, below = merger.curve()
    assert is_double == double and n == 2**53 - 1
    dtype = np.float64 if double else np.float32
    assert np.frombuffer(values, dtype).tolist() == [float(h) for h in range(53)]
    assert np.frombuffer(below, np.int64).tolist() == [2 ** (h + 1) - 1 for h in range(53)]
    found = quantiles_of_runs(listed([data]), [0, 1], [np.nan], [0.25, 0.5, 0.75])
    assert found.estimate.tolist() == [[51.0, 52.0, 52.0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_curve_orders_all_reals(dtype: type[np.floating[Any]]) -> None:
    """Infinities, denormals, both zeros and neighbours: the radix order is that of the values."""
    tiny = np.finfo(dtype).smallest_subnormal
    big = np.finfo(dtype).max
    reals = np.array([-np.inf, -big, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, big, np.inf], dtype)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 4_000, np.uint64) << np.uint64(32)
    random |= rng.integers(0, 1 << 32, 4_000, np.uint64)
    wide = random.view(dtype)[:4_000]
    values = np.concatenate([reals, wide[np.isfinite(wide)]])
    merger = BulkMerger()
    merger.add_many([sketch(values[i : i + 1]) for i in rng.permutation(len(values))])
    _, _, n, _, low, high, found, below = merger.curve()
    np.testing.assert_array_equal(np.frombuffer(found, dtype), np.sort(values))
    assert np.frombuffer(below, np.int64).tolist() == list(range(1, n + 1))
    assert (low, high) == (-np.inf, np.inf)
