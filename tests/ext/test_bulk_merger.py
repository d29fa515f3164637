"""The merger against known truth. Properties, statistics with fixed seeds, faults.

The invariant: n, minimum and maximum are exact whatever was merged, weights sum to n, a rank errs
within its bounds with the confidence asked for and by 0 in the mean, and a refused sketch changes
nothing.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasketches import kll_doubles_sketch, kll_floats_sketch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _kll
from shoal.ext.kll import BulkMerger, SketchMismatchError, SketchRecordError, read_kll
from shoal.ext.sketch import SketchBank

SINGLE = bytes.fromhex("02020f04c80008000000c03f")
EMPTY = bytes.fromhex("02010f01c8000800")
# k=8, 54 levels, one item 1.0 of weight 2^53: all starts are C(8, 54) - 1 = 431.
HEAVIEST = bytes.fromhex(
    "05010f0208000800" + "0000000000002000" + "08003600" + "af010000" * 54 + "0000803f" * 3
)


@pytest.fixture(params=_kll.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every vector variant that this machine can run."""
    _kll.use_variant(request.param)
    yield request.param
    _kll.use_variant(_kll.variants()[-1])


def blob(values: NDArray[Any], k: int = 200) -> bytes:
    """Return the library's sketch of the values, in their dtype."""
    sketch = (kll_doubles_sketch if values.dtype == np.float64 else kll_floats_sketch)(k)
    sketch.update(values)
    return bytes(sketch.serialize())


def held(merger: BulkMerger) -> int:
    """Return the sum of all weights, counted in the tiles themselves."""
    _, is_double, _, _, _, _, tiles = merger.dump()
    return sum(len(items) // (8 if is_double else 4) << level for level, items in tiles)


def test_few_sketches_merge_exactly(variant: str) -> None:
    """Until a tile is full nothing is sampled: ranks are those of all items together."""
    rng = np.random.default_rng(0)
    blobs = [blob(rng.standard_normal(n).astype(np.float32), 64) for n in (10_000, 500, 1, 0, 63)]
    merger = BulkMerger(seed=0)
    merger.add_many(blobs)
    sketches = [read_kll(data) for data in blobs]
    assert merger.n == sum(sketch.n for sketch in sketches) == held(merger)
    assert merger.variance == pytest.approx(sum(sketch.variance_bound for sketch in sketches))
    at = np.linspace(-2, 2, 50)
    want = sum(sketch.n * sketch.ranks(at) for sketch in sketches if sketch.n) / merger.n
    assert merger.ranks(at).estimate == pytest.approx(want)


def test_empty_merger() -> None:
    """Nothing is known of nothing."""
    merger = BulkMerger()
    merger.add(EMPTY)
    assert (merger.n, merger.variance) == (0, 0.0)
    assert math.isnan(merger.minimum) and math.isnan(merger.maximum)
    for found in (*merger.ranks([1.0, 2.0]), *merger.quantiles([0.0, 1.0])):
        assert found.shape == (2,) and np.isnan(found).all()


def test_exact_values_have_no_error() -> None:
    """Sketches that kept every value have V = 0, and bounds without width."""
    merger = BulkMerger()
    for value in (3.0, 1.0, 2.0, 2.0):
        merger.add(blob(np.array([value], np.float32)))
    assert merger.variance == 0.0
    ranks = merger.ranks([0.0, 1.0, 1.5, 2.0, 3.0, 4.0])
    assert ranks.estimate.tolist() == [0.0, 0.25, 0.25, 0.75, 1.0, 1.0]
    assert ranks.low.tolist() == ranks.high.tolist() == ranks.estimate.tolist()
    quantiles = merger.quantiles([0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0])
    assert quantiles.estimate.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert quantiles.estimate.dtype == np.float32
    assert quantiles.low.tolist() == quantiles.high.tolist() == quantiles.estimate.tolist()


def test_bounds_are_those_of_the_certificate() -> None:
    """The width follows V and the confidence, and never passes what is exact."""
    merger = BulkMerger()
    merger.add(blob(np.arange(100, dtype=np.float32)), variance=25.0)
    assert merger.variance == 25.0
    for confidence in (0.5, 0.9, 0.99):
        error = math.sqrt(2 * 25.0 * math.log(2 / (1 - confidence))) / 100
        ranks = merger.ranks([-1.0, 0.0, 49.0, 98.0, 99.0], confidence)
        assert ranks.estimate == pytest.approx([0.0, 0.01, 0.5, 0.99, 1.0])
        assert ranks.low == pytest.approx([0.0, 0.01, 0.5 - error, 0.99 - error, 1.0])
        assert ranks.high == pytest.approx([0.0, 0.01 + error, 0.5 + error, 0.99, 1.0])
        quantiles = merger.quantiles([0.0, 0.01, 0.5, 1.0], confidence)
        half = math.ceil(100 * error - 1e-9)
        assert quantiles.estimate.tolist() == [0.0, 0.0, 49.0, 99.0]
        assert quantiles.low.tolist() == [0.0, 0.0, 49.0 - half + 1 - (half == 100 * error), 99.0]
        assert quantiles.high.tolist() == [0.0, half, 49.0 + half, 99.0]
    for confidence in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            merger.ranks([0.5], confidence)
        with pytest.raises(ValueError, match="confidence"):
            merger.quantiles([0.5], confidence)
    with pytest.raises(ValueError, match="share"):
        merger.quantiles([1.5])
    with pytest.raises(ValueError, match="NaN"):
        merger.ranks([math.nan])


relaxed = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@relaxed
@given(
    st.lists(st.tuples(st.integers(8, 300), st.integers(0, 2000)), max_size=20),
    st.booleans(),
    st.sampled_from([64, 128, 1024]),
    st.integers(0, 2**32),
)
def test_count_and_extremes_are_exact(
    variant: str, parts: list[tuple[int, int]], wide: bool, k_wide: int, seed: int
) -> None:
    """Whatever k and n come together, n, the extremes and the sum of weights are exact."""
    rng = np.random.default_rng(seed)
    dtype = np.float64 if wide else np.float32
    drawn = [rng.standard_normal(n).astype(dtype) for _, n in parts]
    blobs = [blob(values, k) for values, (k, _) in zip(drawn, parts, strict=True)]
    merger = BulkMerger(k_wide, seed=seed)
    merger.add_many(blobs * 5)
    for data in blobs:
        merger.add(data)
    values = np.concatenate([np.zeros(0, dtype), *drawn])
    assert merger.n == 6 * len(values) == held(merger)
    if len(values):
        assert (merger.minimum, merger.maximum) == (values.min(), values.max())
        found = merger.quantiles([0.0, 0.5, 1.0])
        assert found.estimate.dtype == dtype
        assert found.estimate[0] == values.min() and found.estimate[2] == values.max()
        assert np.isin(found.estimate, values).all()


def rank_trials(
    trials: int, *, wide: bool, count: int, size: int, k: int, came: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Merge the same sketches many times; return errors and bounds at 99 %, in shares.

    The truth is what the sketches say, and only the V that merging added is in the bounds: all
    error is the merger's own. V that came lets the merger spend more.
    """
    rng = np.random.default_rng(0)
    blobs = []
    for _ in range(count):
        drawn = rng.standard_normal(size) + 0.5 * rng.standard_normal()
        blobs.append(blob(drawn.astype(np.float64 if wide else np.float32), k))
    sketches = [read_kll(data) for data in blobs]
    # Thresholds are float32, so that they are the same for both types.
    at = np.linspace(-2.5, 2.5, 21, dtype=np.float32)
    truth = np.mean([sketch.ranks(at) for sketch in sketches], axis=0)
    errors, bounds = [], []
    for seed in range(trials):
        merger = BulkMerger(64, seed=seed)
        merger.add_many(blobs, np.full(count, came))
        assert merger.n == count * size == held(merger)
        errors.append(merger.ranks(at).estimate - truth)
        added = merger.variance - count * came
        bounds.append(math.sqrt(2 * added * math.log(2 / 0.01)) / merger.n)
    return np.array(errors), np.array(bounds)


@pytest.mark.parametrize(
    ("wide", "count", "size", "k", "came"),
    [
        (False, 6000, 1, 8, 0.0),  # single values
        (False, 400, 120, 200, 0.0),  # one level, every value kept
        (True, 400, 120, 200, 0.0),
        (False, 500, 2000, 16, 0.0),  # levels that are thinned on their way in
        (True, 500, 2000, 16, 0.0),
    ],
)
def test_certificate_and_no_bias(
    variant: str, wide: bool, count: int, size: int, k: int, came: float
) -> None:
    """A narrow merger errs, within its bounds at 99 % or better, and by 0 in the mean."""
    trials = 200
    errors__tq, bounds__t = rank_trials(trials, wide=wide, count=count, size=size, k=k, came=came)
    spread__q = errors__tq.std(axis=0)
    assert spread__q.max() > 1e-4  # it does sample
    assert (np.abs(errors__tq) <= bounds__t[:, None]).mean() >= 0.99
    # sqrt(2 ln 200) = 3.3 standard deviations, if V were the variance; it must not be below it.
    assert (spread__q < bounds__t.mean() / 3.0).all()
    score__q = errors__tq.mean(axis=0) / (spread__q / math.sqrt(trials) + 1e-12)
    assert np.abs(score__q).max() < 4.5  # 21 thresholds: 1 in 7,000 for coins that are fair


def test_runs_thinned_on_their_way_in(variant: str) -> None:
    """What thinning adds to the error of a rank is within the V it adds, without any tile full."""
    rng = np.random.default_rng(7)
    # Below every threshold, so of no error themselves: many values, and a tile of single ones.
    heavy, below = (blob(np.full(n, -100.0, np.float32)) for n in (200_000, 1))
    blobs = [blob(rng.standard_normal(20_000).astype(np.float32), 64) for _ in range(12)]
    at = np.linspace(-2, 2, 9, dtype=np.float32)
    truth = sum(20_000 * read_kll(data).ranks(at) for data in blobs)
    errors, added = [], []
    for seed in range(200):
        merger = BulkMerger(seed=seed)
        # V that came makes the merger spend: the tile that fills is thinned at once.
        merger.add_many([heavy, *[below] * 20_000], [2e9, *[0.0] * 20_000])
        before = merger.variance
        merger.add_many(blobs, np.zeros(len(blobs)))
        added.append(merger.variance - before)
        errors.append(merger.ranks(at).estimate * merger.n - 220_000 - truth)
    spread__q = np.std(errors, axis=0)
    assert min(added) > 0.0
    assert (spread__q > 0.1 * np.sqrt(np.mean(added))).all()  # V is no wild overstatement
    assert (spread__q < np.sqrt(np.mean(added))).all()
    assert np.abs(np.mean(errors, axis=0) / (spread__q / math.sqrt(200))).max() < 4.5


def test_fleet_of_devices(variant: str) -> None:
    """The merger adds about as much to V as sketches of k=64 bring; ranks are within bounds."""
    rng = np.random.default_rng(2)
    values = [
        (rng.standard_normal(2000) + 0.3 * rng.standard_normal()).astype(np.float32)
        for _ in range(1500)
    ]
    blobs = [blob(drawn, 64) for drawn in values]
    came = sum(read_kll(data).variance_bound for data in blobs)
    whole = np.sort(np.concatenate(values))
    at = whole[:: len(whole) // 200]
    truth = np.searchsorted(whole, at, side="right") / len(whole)
    for seed in range(3):
        merger = BulkMerger(seed=seed)
        merger.add_many(blobs)
        assert came < merger.variance < 3 * came
        ranks = merger.ranks(at)
        assert ((ranks.low <= truth) & (truth <= ranks.high)).mean() >= 0.99
        assert np.abs(ranks.estimate - truth).max() < 0.002
        found = merger.quantiles([0.1, 0.5, 0.9])
        exact = np.quantile(whole, [0.1, 0.5, 0.9], method="inverted_cdf")
        assert ((found.low <= exact) & (exact <= found.high)).all()


def test_add_and_add_many_are_the_same() -> None:
    """The same sketches in the same order give the same merger, to the bit, at the same seed."""
    rng = np.random.default_rng(3)
    blobs = [blob(rng.standard_normal(700).astype(np.float32), 32) for _ in range(300)]
    variances = rng.uniform(0, 1e4, len(blobs))
    variances[::3] = np.nan
    whole, single = BulkMerger(128, seed=9), BulkMerger(128, seed=9)
    whole.add_many(iter(blobs), variances.tolist())
    for data, variance in zip(blobs, variances, strict=True):
        single.add(data, None if np.isnan(variance) else float(variance))
    assert whole.dump()[1:] == single.dump()[1:]
    other = BulkMerger(128, seed=10)
    other.add_many(blobs, variances)
    assert whole.dump()[6] != other.dump()[6]
    assert BulkMerger().k_wide == 4096


@pytest.mark.parametrize("wide", [False, True])
def test_merge_of_mergers(wide: bool) -> None:
    """What two mergers hold comes together; the other one stays; one may merge itself."""
    rng = np.random.default_rng(4)
    dtype = np.float64 if wide else np.float32
    parts = [rng.standard_normal(40_000).astype(dtype), rng.uniform(2, 3, 9_000).astype(dtype)]
    mergers = [BulkMerger(64, seed=0), BulkMerger(128, seed=1)]
    for merger, values in zip(mergers, parts, strict=True):
        merger.add_many([blob(values[i : i + 500], 64) for i in range(0, len(values), 500)])
    before = mergers[1].dump()
    variance = mergers[0].variance + mergers[1].variance
    mergers[0].merge(mergers[1])
    assert mergers[1].dump() == before
    assert mergers[0].n == 49_000 == held(mergers[0])
    assert mergers[0].variance >= variance
    values = np.concatenate(parts)
    assert (mergers[0].minimum, mergers[0].maximum) == (values.min(), values.max())
    truth = np.less_equal(values, 1.0).mean()
    found = mergers[0].ranks([1.0])
    assert found.low[0] <= truth <= found.high[0]
    mergers[0].merge(mergers[0])
    assert mergers[0].n == 98_000 == held(mergers[0])
    mergers[0].merge(BulkMerger())
    assert mergers[0].n == 98_000
    fresh = BulkMerger()
    fresh.merge(mergers[1])
    assert fresh.dump()[1:6] == before[1:6]


def refused_calls() -> dict[str, tuple[type[Exception], str, list[Any], Any]]:
    """Name what a merger of floats refuses: error, text, sketches and variances."""
    double = blob(np.array([1.0]))
    return {
        "no sketch": (SketchRecordError, "no KLL sketch", [b"abc"], None),
        "cut": (SketchRecordError, "length", [SINGLE[:-1]], None),
        "type": (SketchMismatchError, "floats and doubles", [double], None),
        "too many": (SketchMismatchError, "2\\^53", [HEAVIEST], None),
        "variance below 0": (ValueError, "variance", [SINGLE], [-1.0]),
        "variance infinite": (ValueError, "variance", [SINGLE], [math.inf]),
        "text": (TypeError, "bytes", ["abc"], None),
        "none": (TypeError, "bytes", [None], None),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_refused_changes_nothing(name: str) -> None:
    """A refused sketch raises, alone or among good ones, and the merger is as before."""
    error, text, blobs, variances = refused_calls()[name]
    merger = BulkMerger(seed=0)
    merger.add_many([SINGLE, EMPTY])
    before = merger.dump()
    with pytest.raises(error, match=text):
        merger.add(blobs[0], None if variances is None else variances[0])
    for at in (0, 1, 2):
        among: list[Any] = [SINGLE, SINGLE]
        among[at:at] = blobs
        given_v = None
        if variances is not None:
            given_v = [0.0, 0.0]
            given_v[at:at] = variances
        with pytest.raises(error, match=text) as caught:
            merger.add_many(among, given_v)
        assert f"{at} of 3" in str(caught.value) and "nothing was changed" in str(caught.value)
    assert merger.dump() == before
    if error is not TypeError:
        assert issubclass(error, ValueError)


@pytest.mark.parametrize("n", [10, 38, 97, 200])
def test_a_rank_that_a_value_has_gives_that_value(n: int) -> None:
    """A share times n may round to just above a whole number: 21 / 38 * 38 does."""
    values = np.arange(n, dtype=np.float32)
    bank = SketchBank(1)
    bank.update(values.reshape(-1, 1))
    merger = BulkMerger()
    merger.add(bank.kll_bytes(0), 0.0)
    for shares in (np.arange(1, n + 1) / n, merger.ranks(values).estimate):
        assert bank.quantiles(0, shares).tolist() == values.tolist()
        assert read_kll(bank.kll_bytes(0)).quantiles(shares).tolist() == values.tolist()
        for found in merger.quantiles(shares):
            assert found.tolist() == values.tolist()


@pytest.mark.parametrize(("first", "then"), [(0, 300), (2, 300), (300, 40), (300, 300), (300, 2)])
def test_a_refused_call_is_undone(first: int, then: int) -> None:
    """Tiles that were thinned and filled again are as before, whatever was read once or twice."""
    rng = np.random.default_rng(first)
    blobs = [blob(rng.standard_normal(3_000).astype(np.float32), 64) for _ in range(first + then)]
    mergers = [BulkMerger(64, seed=5), BulkMerger(64, seed=5)]
    for merger in mergers:
        merger.add_many(blobs[:first])
    for wrong in (b"abc", blob(np.array([1.0])), HEAVIEST, blobs[0][:-4]):
        with pytest.raises(ValueError, match=f"sketch {then - 1} of {then}, nothing was changed"):
            mergers[0].add_many([*blobs[first : first + then - 1], wrong])
        assert mergers[0].dump() == mergers[1].dump()
    for merger in mergers:  # the same coins come next, too
        merger.add_many(blobs[first:])
    assert mergers[0].dump()[1:] == mergers[1].dump()[1:]


def test_types_decide_within_one_call() -> None:
    """The first sketch that is not empty chooses the type, also inside of add_many."""
    double, single = blob(np.array([1.0])), blob(np.array([1.0], np.float32))
    merger = BulkMerger()
    with pytest.raises(SketchMismatchError, match="sketch 2 of 3"):
        merger.add_many([EMPTY, double, single])
    assert merger.n == 0
    merger.add_many([EMPTY, single, EMPTY])
    other = BulkMerger()
    other.add_many([double, EMPTY])
    with pytest.raises(SketchMismatchError, match="floats and doubles"):
        merger.merge(other)
    assert merger.n == other.n == 1


def test_variances_of_another_number() -> None:
    """Each sketch has its variance, or none has."""
    merger = BulkMerger()
    with pytest.raises(ValueError, match="1 sketches have 2"):
        merger.add_many([SINGLE], [0.0, 0.0])
    merger.add_many([], [])
    with pytest.raises((TypeError, ValueError)):
        merger.add_many([SINGLE], [[0.0]])
    with pytest.raises(TypeError):
        merger.add(SINGLE, "much")  # type: ignore[arg-type]
    assert merger.n == 0


def test_n_up_to_2_to_53() -> None:
    """Counts stay exact to the last value that float64 counts."""
    merger = BulkMerger()
    merger.add(HEAVIEST)
    assert merger.n == 2**53 == held(merger)
    for refused in (SINGLE, HEAVIEST):
        with pytest.raises(SketchMismatchError, match="2\\^53"):
            merger.add(refused)
    with pytest.raises(SketchMismatchError, match="2\\^53"):
        merger.merge(merger)
    merger.add(EMPTY)
    assert merger.n == 2**53
    assert merger.ranks([0.9, 1.0]).estimate.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("k_wide", [0, 63, 65, 96, 131072, -64, 1 << 70, True])
def test_k_wide_is_a_power_of_two(k_wide: int) -> None:
    """A merger's width is checked before anything is reserved."""
    with pytest.raises(ValueError, match="k_wide"):
        BulkMerger(k_wide)


def test_k_wide_is_a_whole_number() -> None:
    """Of Python or NumPy."""
    assert BulkMerger(np.int64(64)).k_wide == 64
    with pytest.raises(TypeError, match="integer"):
        BulkMerger(64.0)  # type: ignore[arg-type]


def test_bytes_like_sketches() -> None:
    """``add`` takes bytearray and memoryview too; a copy is merged."""
    merger = BulkMerger()
    merger.add(bytearray(SINGLE))
    merger.add(memoryview(b"x" + SINGLE)[1:])
    assert merger.ranks([1.5]).estimate.tolist() == [1.0] and merger.n == 2


def test_answers_follow_changes() -> None:
    """The sorted view that queries keep is made anew after each change."""
    merger = BulkMerger()
    for count in itertools.count(1):
        merger.add(blob(np.array([float(count)], np.float32)))
        assert merger.maximum == count
        assert merger.ranks([1.0]).estimate[0] == pytest.approx(1 / count)
        if count == 5:
            break


def test_threads_lose_nothing() -> None:
    """Threads that add, merge and ask at the same time lose no value."""
    rng = np.random.default_rng(6)
    blobs = [blob(rng.standard_normal(300).astype(np.float32), 32) for _ in range(200)]
    merger = BulkMerger(64)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                merger.add_many(blobs)
                merger.add(blobs[0])
                curve = merger.ranks([-1.0, 0.0, 1.0]).estimate
                assert (np.diff(curve) > 0).all()
        except BaseException as error:  # the main thread reports it
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert merger.n == 40 * (200 + 1) * 300 == held(merger)
