"""The bank against NumPy and exact arithmetic; faces, merges, threads. Properties and faults.

The invariant: bins, nulls and extremes are those of NumPy over all values that came, whatever
the order, dtype, layout, vector variant and thread they came by; moments are those of exact
arithmetic within the stated error; a refused call changes nothing.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _sketch
from shoal.ext.errors import KernelError
from shoal.ext.sketch import Moments, SketchBank, SketchMismatchError

Floats = NDArray[Any]  # float32 or float64
F32 = np.float32
SPECIALS = [
    np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1e-45,  # the smallest float32
    -1e-45,
    float(np.finfo(F32).max),
    float(np.finfo(F32).tiny),
    16777217.0,  # 2^24 + 1: not a float32
    16777218.0,
    33554433.0,
]
WIDE = [5e-324, -5e-324, 1e-320, 3.5e38, -3.5e38, 1e300, -1e300, 1e308]

relaxed = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=_sketch.variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every vector variant that this machine can run."""
    _sketch.use_variant(request.param)
    yield request.param
    _sketch.use_variant(_sketch.variants()[-1])


def edges_lists() -> st.SearchStrategy[NDArray[np.float32]]:
    """Ascending float32 edges, from none to more than the vector loops and the scan take."""
    value = st.floats(width=32, allow_nan=False) | st.sampled_from(
        [0.0, 1.0, 16777216.0, float(np.finfo(F32).max), 1.401298464324817e-45]
    )
    small = st.lists(value, max_size=40, unique_by=lambda v: v + 0.0).map(
        lambda found: np.array(sorted(found), F32)
    )
    large = st.sampled_from([64, 65, 255, 256, 257, 1000]).map(
        lambda n: np.linspace(-3, 3, n, dtype=F32)
    )
    return small | large


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[NDArray[np.float32]], Floats]:
    """Edges of some features and a matrix whose values lie on, beside and far from them."""
    dtype = draw(st.sampled_from([F32, np.float64]))
    features = draw(st.integers(1, 5))
    edges = [draw(edges_lists()) for _ in range(features)]
    rows = draw(st.sampled_from([1, 2, 3, 8, 9, 17, 511, 512, 513, 1100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((rows, features)) * 10.0 ** draw(st.integers(-3, 3))
    for i, each in enumerate(edges):
        pool = np.concatenate([SPECIALS, WIDE if dtype is np.float64 else [], each])
        beside = np.nextafter(pool, np.where(pool > 0, 0.0, 1.0))  # one float64 step inwards
        pool = np.concatenate([pool, beside])
        picked = rng.random(rows) < draw(st.sampled_from([0.0, 0.1, 1.0]))
        x[picked, i] = rng.choice(pool, picked.sum())
    with np.errstate(over="ignore"):
        return edges, x.astype(dtype)


def want_counts(x__n: Floats, edges__e: NDArray[np.float32]) -> list[int]:
    """Return the definition of ``counts``."""
    bins = np.array([-np.inf, *edges__e, np.inf])
    return [int(n) for n in np.histogram(x__n[~np.isnan(x__n)], bins)[0]]


def exact(values: Floats) -> tuple[Fraction, Fraction]:
    """Return mean and variance without rounding."""
    exactly = [Fraction(float(value)) for value in values]
    mean = sum(exactly, Fraction()) / len(exactly)
    return mean, sum(((value - mean) ** 2 for value in exactly), Fraction()) / len(exactly)


def check(bank: SketchBank, i: int, x__n: Floats, edges__e: NDArray[np.float32]) -> None:
    """Assert that feature ``i`` holds these values and no others."""
    got = bank.moments(i)
    some = x__n[~np.isnan(x__n)]
    assert bank.counts(i).dtype == np.int64
    assert bank.counts(i).tolist() == want_counts(x__n, edges__e)
    assert bank.nulls(i) == np.isnan(x__n).sum()
    assert got.count == len(some)
    if not len(some):
        assert np.isnan(got[1:]).all()
        return
    assert (got.minimum, got.maximum) == (some.min(), some.max())
    if np.isinf(some).any():
        with np.errstate(invalid="ignore", over="ignore"):
            # The infinities alone decide, as in NumPy; a finite sum that overflows does not.
            assert np.array_equal(got.mean, some[np.isinf(some)].mean(), equal_nan=True)
        assert np.isnan(got.variance)
        return
    assert got.minimum <= got.mean <= got.maximum
    mean, variance = exact(some)
    scale = Fraction(float(np.abs(some).max()))
    assert abs(Fraction(got.mean) - mean) <= scale * Fraction(1, 10**14) + Fraction(5e-324)
    if scale > 10**150:
        assert got.variance >= 0  # it may be infinite
    else:
        # A mean that is off by its own rounding, d, moves the variance by 2 * sigma * d + d^2;
        # float64's smallest square is 1e-308: below, a variance may be lost.
        d = scale * Fraction(1, 10**15)
        slack = variance * Fraction(1, 10**10) + 2 * Fraction(math.sqrt(variance)) * d + d**2
        assert abs(Fraction(got.variance) - variance) <= slack + Fraction(1, 10**300)


# ---- the counts ----------------------------------------------------------------------------------


@relaxed
@given(case=cases())
def test_counts_as_numpy_does(case: tuple[list[NDArray[np.float32]], Floats], variant: str) -> None:
    """One update of any matrix equals the reference, in every variant."""
    edges, x = case
    bank = SketchBank(len(edges), edges=edges)
    bank.update(x)
    for i, each in enumerate(edges):
        check(bank, i, x[:, i], each)


@relaxed
@given(case=cases(), data=st.data())
def test_any_cut_counts_the_same(
    case: tuple[list[NDArray[np.float32]], Floats], data: st.DataObject
) -> None:
    """Rows, matrices, windows and merged banks, in any mixture, are the same values."""
    edges, x = case
    features = len(edges)
    banks = [SketchBank(features, edges=edges) for _ in range(2)]
    at = 0
    while at < len(x):
        size = data.draw(st.sampled_from([1, 5, 9, 100, 600]))
        bank = banks[data.draw(st.integers(0, 1))]
        part = x[at : at + size]
        match data.draw(st.sampled_from(["rows", "matrix", "window", "channels"])):
            case "rows":
                for row in part[:9]:
                    bank.update_row(row)
                size = min(size, 9)
            case "matrix":
                bank.update(part)
            case "window":
                bank.update_channels(np.ascontiguousarray(part.T[None]))
            case "channels":
                for i in range(features):
                    bank.update_channels(np.ascontiguousarray(part[:, i])[None, None], first=i)
        at += size
    banks[0].merge(banks[1])
    for i, each in enumerate(edges):
        check(banks[0], i, x[:, i], each)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (1, 6, 100), (40, 3, 33), (2, 2, 1500)])
@pytest.mark.parametrize("dtype", [F32, np.float64])
def test_windows_are_not_transposed_wrongly(
    shape: tuple[int, int, int], dtype: type[Any], variant: str
) -> None:
    """Channel c of every window, whatever the sizes, goes to feature first + c and to no other."""
    rng = np.random.default_rng(1)
    x: Floats = rng.standard_normal(shape).astype(dtype)
    edges = [np.sort(rng.standard_normal(31, F32)) for _ in range(shape[1] + 2)]
    bank = SketchBank(shape[1] + 2, edges=edges)
    bank.update_channels(x, first=1)
    nothing: Floats = np.empty(0, dtype)
    for i, each in enumerate(edges):
        inside = 1 <= i <= shape[1]
        check(bank, i, x[:, i - 1].reshape(-1) if inside else nothing, each)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("edge", [-np.inf, np.inf])
def test_an_edge_may_be_infinite(edge: float, first: int) -> None:
    """The outer bin is then empty, or holds the infinities alone, as in NumPy."""
    edges = np.array(sorted({edge, 0.0, 1.0}), F32)
    x = np.array([-np.inf, np.inf, 0.0, 5.0, np.nan] * 4, F32)[first:]
    bank = SketchBank(1, edges=[edges])
    bank.update(x[:, None])
    check(bank, 0, x, edges)


def test_doubles_are_binned_as_doubles() -> None:
    """A double just below a float32 edge is below it, though it rounds onto the edge."""
    edge = np.array([0.1], F32)
    below = np.nextafter(float(edge[0]), -1)
    assert F32(below) == edge[0]
    bank = SketchBank(1, edges=[edge])
    bank.update(np.array([[below], [float(edge[0])]]))
    assert bank.counts(0).tolist() == [1, 1]


def test_without_edges_there_is_one_bin() -> None:
    """Moments and nulls need no edges."""
    bank = SketchBank(2)
    bank.update(np.array([[1.0, np.nan], [3.0, np.nan]]))
    assert bank.features == 2
    assert bank.counts(0).tolist() == [2]
    assert bank.counts(1).tolist() == [0]
    assert bank.moments(0) == Moments(2, 2.0, 1.0, 1.0, 3.0)
    assert bank.nulls(1) == 2


# ---- the moments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, 16777217.0, 1e-310, 1.7e308, -3e38])
@pytest.mark.parametrize("rows", [1, 7, 100, 3000])
def test_a_constant_has_no_variance(value: float, rows: int, variant: str) -> None:
    """A stuck sensor is seen exactly, at any magnitude, in blocks, rows and merges."""
    bank = SketchBank(1)
    bank.update(np.full((rows, 1), value))
    bank.update_row(np.array([value]))
    bank.merge(bank)
    assert bank.moments(0) == Moments(2 * rows + 2, value, 0.0, value, value)


@pytest.mark.parametrize("by", ["matrix", "rows"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e7])
def test_variance_far_from_zero(offset: float, by: str, variant: str) -> None:
    """Squares of the offset do not drown the variance: naive sums lose all at 1e8."""
    x = np.random.default_rng(2).standard_normal((4000, 1)) + offset
    bank = SketchBank(1)
    if by == "matrix":
        bank.update(x)
    else:
        for row in x:
            bank.update_row(row)
    mean, variance = exact(x[:, 0])
    got = bank.moments(0)
    assert abs(Fraction(got.mean) - mean) <= Fraction(1, 10**13) * Fraction(offset + 4)
    assert abs(Fraction(got.variance) / variance - 1) < Fraction(1, 10**9)


def test_an_outlier_first_does_not_spoil_the_block() -> None:
    """The block's shift is its first value, also where that is the worst choice."""
    x = np.concatenate([[1e9], np.random.default_rng(3).standard_normal(511)])
    bank = SketchBank(1)
    bank.update(x[:, None])
    mean, variance = exact(x)
    assert abs(Fraction(bank.moments(0).mean) / mean - 1) < Fraction(1, 10**12)
    assert abs(Fraction(bank.moments(0).variance) / variance - 1) < Fraction(1, 10**12)


@pytest.mark.parametrize("rows", [2, 1000])
def test_values_at_the_end_of_float64(rows: int) -> None:
    """The mean stays right where a difference overflows; the variance says that it does not fit."""
    x = np.tile(np.array([[-1.7e308], [1.7e308]]), (rows // 2, 1))
    bank = SketchBank(1)
    bank.update(x)
    other = SketchBank(1)
    other.update(x + 1e307 * (x < 0))
    bank.merge(other)
    got = bank.moments(0)
    assert abs(got.mean) < 1e307
    assert got.variance == np.inf
    assert SketchBank.from_bytes(bank.to_bytes()).moments(0) == got


def test_a_merge_across_float64() -> None:
    """Means further apart than float64 reaches are weighted, not lost."""
    low, high = SketchBank(1), SketchBank(1)
    low.update(np.full((3, 1), -1.6e308))
    high.update(np.full((1, 1), 1.6e308))
    low.merge(high)
    assert low.moments(0).mean == pytest.approx(-0.8e308)
    assert low.moments(0).variance == np.inf


def test_variants_agree_to_the_bit() -> None:
    """A fleet of mixed machines reports the same numbers."""
    x = np.random.default_rng(4).standard_normal((1300, 3))
    x[::7, 1] = np.nan
    x[5, 2] = np.inf
    records = set()
    for name in _sketch.variants():
        _sketch.use_variant(name)
        edges = [np.linspace(-2, 2, n, dtype=F32) for n in (0, 9, 80)]
        bank = SketchBank(3, edges=edges, seed=7)
        for part in (x[:1000], x[1000:1004], x[1004:]):
            bank.update(part)
        records.add(bank.to_bytes())
    assert len(records) == 1


@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("features", [1, 7, 16, 20, 37])
@pytest.mark.parametrize("rows", [15, 16, 100, 512, 5000])
def test_bins_of_many_features(variant: str, features: int, rows: int, dtype: Any) -> None:
    """Every lane of a tile has edges of its own, from none to 31, and a thinned tile is binned."""
    rng = np.random.default_rng(rows * 100 + features)
    edges = [
        np.unique(rng.choice([*rng.standard_normal(60), -np.inf, np.inf, 0.0], i % 32)).astype(F32)
        for i in range(31, 31 + features)
    ]
    bank = SketchBank(features, edges=edges)
    for seen in range(12):  # the last ones are thinned, if nothing is missing
        x = rng.standard_normal((rows, features)).astype(dtype)
        for i, each in enumerate(edges):
            hit = rng.random(rows) < 0.2
            pool = np.array([*each, -0.0, np.inf, -np.inf, 1e-45], dtype)
            # A double just below an edge is the edge as a float.
            x[hit, i] = np.nextafter(rng.choice(pool, hit.sum()), dtype(rng.choice([-9, 0, 9])))
        if seen < 6:
            x[rng.random(x.shape) < 0.05] = np.nan
        elif seen > 8:
            x[np.isinf(x)] = 0.5
        before = [bank.counts(i) for i in range(features)]
        bank.update(x)
        for i, each in enumerate(edges):
            assert (bank.counts(i) - before[i]).tolist() == want_counts(x[:, i], each)


@pytest.mark.parametrize("rows", [1, 17, 300, 4000])
def test_doubles_are_counted_as_they_are(variant: str, rows: int) -> None:
    """Moments and extremes are those of the doubles, quantiles those of the floats near them."""
    rng = np.random.default_rng(rows)
    x = 1e9 + rng.standard_normal((rows, 19))
    x[:, 1] = np.where(rng.random(rows) < 0.3, np.nan, x[:, 1])
    x[0, 2], x[-1, 3] = np.inf, -np.inf
    x[:, 4] *= 1e150
    x[:, 5] = rng.choice([1e300, -1e300, -1e-320, -0.0], rows)
    bank = SketchBank(19, edges=[np.array([1e9], F32)] * 19)
    bank.update(x)
    for i in range(19):
        check(bank, i, x[:, i], np.array([1e9], F32))
        if rows == 17:  # the last one is the maximum, as a double
            with np.errstate(over="ignore"):
                near = np.sort(x[:, i][~np.isnan(x[:, i])].astype(F32))
            shares = np.arange(1, len(near)) / len(near)
            assert bank.quantiles(i, shares).tolist() == near[:-1].tolist()


# ---- the face ------------------------------------------------------------------------------------

GOOD = np.zeros((4, 3), F32)


@pytest.mark.parametrize(
    ("call", "argument", "error", "said"),
    [
        ("update", np.zeros((4, 2), F32), ValueError, r"\(n >= 1, 3\); got float32.*\(4, 2\)"),
        ("update", np.zeros((0, 3), F32), ValueError, r"shape \(0, 3\)"),
        ("update", np.zeros(3, F32), ValueError, r"shape \(3,\)"),
        ("update", np.zeros((1, 4, 3), F32), ValueError, r"shape \(1, 4, 3\)"),
        ("update", np.zeros((3, 4), F32).T, ValueError, "strides"),
        ("update", np.zeros((8, 3), F32)[::2], ValueError, "strides"),
        ("update", np.zeros((4, 6), F32)[:, ::2], ValueError, "strides"),
        ("update", np.zeros((4, 3), np.int32), TypeError, "format 'i'"),
        ("update", np.zeros((4, 3), np.float16), TypeError, "format 'e'"),
        ("update", np.zeros((4, 3), np.longdouble), TypeError, "format 'g'"),
        ("update", np.zeros((4, 3), bool), TypeError, "expected"),
        ("update", np.zeros((4, 3), object), TypeError, "format 'O'"),
        ("update", np.zeros((4, 3), ">f4"), TypeError, "format '>f'"),
        ("update", np.zeros((4, 3), "M8[s]"), TypeError, "expected"),
        ("update", np.frombuffer(b"\0" * 49, F32, 12, 1).reshape(4, 3), TypeError, "unaligned f"),
        ("update", [[0.0, 0.0, 0.0]], TypeError, "got list"),
        ("update", None, TypeError, "got NoneType"),
        ("update", b"\0" * 12, TypeError, "format 'B'"),
        ("update_row", np.zeros(2, F32), ValueError, r"\(3,\); got float32.*\(2,\)"),
        ("update_row", np.zeros((1, 3), F32), ValueError, r"shape \(1, 3\)"),
        ("update_row", np.zeros(6)[::2], ValueError, "strides"),
        ("update_channels", np.zeros((1, 4, 2), F32), ValueError, "1 to 3 channels"),
        ("update_channels", np.zeros((1, 3, 0), F32), ValueError, r"\(1, 3, 0\)"),
        ("update_channels", np.zeros((0, 3, 1), F32), ValueError, r"\(0, 3, 1\)"),
        ("update_channels", np.zeros((1, 0, 1), F32), ValueError, r"\(1, 0, 1\)"),
        ("update_channels", np.zeros((4, 3), F32), ValueError, r"\(4, 3\)"),
        ("update_channels", np.zeros((2, 5, 3), F32).swapaxes(1, 2), ValueError, "strides"),
    ],
)
def test_refuses_other_arrays_and_changes_nothing(
    call: str, argument: Any, error: type[Exception], said: str
) -> None:
    """The text names what was wanted and what came."""
    bank = SketchBank(3, edges=[np.array([0, 1], F32)] * 3)
    bank.update(GOOD)
    before = bank.to_bytes()
    with pytest.raises(error, match=said):
        getattr(bank, call)(argument)
    assert bank.to_bytes() == before


@pytest.mark.parametrize("first", [-1, 2, 3, 2**62, -(2**63)])
def test_refuses_channels_beyond_the_features(first: int) -> None:
    """A window that does not fit behind ``first`` counts nowhere."""
    bank = SketchBank(3)
    with pytest.raises(ValueError, match=f"first={first}"):
        bank.update_channels(np.zeros((1, 2, 4), F32), first=first)
    for far in (2**70, -(2**70)):
        with pytest.raises(ValueError, match="first="):
            bank.update_channels(np.zeros((1, 2, 4), F32), first=far)
    assert [bank.moments(i).count for i in range(3)] == [0, 0, 0]


def test_takes_what_is_contiguous_by_any_name() -> None:
    """Read-only arrays, views of one row and axes of length one are fine."""
    x = np.arange(6, dtype=F32).reshape(2, 3)
    x.flags.writeable = False
    bank = SketchBank(3)
    bank.update(x)
    bank.update(x[1:])
    bank.update(np.asfortranarray(x[:1]))
    bank.update_row(x[0])
    got = bank.moments(2)
    assert (got.count, got.minimum, got.maximum) == (5, 2.0, 5.0)
    assert (got.mean, got.variance) == pytest.approx((3.2, 2.16))


@pytest.mark.parametrize("i", [-1, 3, 1000, 1 << 70, -1 << 70])
@pytest.mark.parametrize(
    "call", ["counts", "moments", "nulls", "kll_bytes", "variance_certificate", "hll_bytes"]
)
def test_refuses_an_index_outside(call: str, i: int) -> None:
    """Negative indices do not wrap: feature -1 is a mistake."""
    with pytest.raises(IndexError, match="0 to 2"):
        getattr(SketchBank(3), call)(i)


@pytest.mark.parametrize("i", [True, np.True_, 1.0, np.float64(1.0), "1", None])
def test_an_index_is_a_whole_number(i: Any) -> None:
    """Of Python or NumPy; a bool is a mistake, though it counts as 0 or 1 elsewhere."""
    one: Any = np.int64(1)
    three: Any = np.int64(3)
    bank = SketchBank(three)
    for call in (bank.counts, bank.moments, bank.nulls, bank.kll_bytes, bank.hll_bytes):
        with pytest.raises(TypeError, match="integer"):
            call(i)
    with pytest.raises(TypeError, match="integer"):
        bank.update_channels(np.zeros((1, 2, 4), F32), first=i)
    with pytest.raises(TypeError, match="integer"):
        SketchBank(i)
    bank.update_channels(np.zeros((1, 2, 4), F32), first=one)
    assert [bank.moments(at).count for at in (0, one, 2)] == [0, 4, 4]


@pytest.mark.parametrize(
    ("features", "edges", "said"),
    [
        (0, None, "1 to 65536"),
        (-1, None, "1 to 65536"),
        (65_537, None, "1 to 65536"),
        (2, [np.zeros(1, F32)], "list of 2"),
        (1, [np.zeros(1, F32)] * 2, "list of 1"),
        (1, np.zeros((1, 1), F32), "list of 1"),
        (1, [np.zeros(1)], r"edges\[0\] must be a float32"),
        (1, [[0.0, 1.0]], r"edges\[0\] must be a float32"),
        (1, [np.zeros((1, 1), F32)], r"edges\[0\]"),
        (2, [np.zeros(1, F32), np.array([1, 0], F32)], r"edges\[1\] must be strictly"),
        (1, [np.array([1, 1], F32)], "strictly ascending"),
        (1, [np.array([-0.0, 0.0], F32)], "strictly ascending"),
        (1, [np.array([np.nan], F32)], "NaN"),
        (1, [np.array([0, np.nan], F32)], "NaN"),
        (1, [np.arange(65_536, dtype=F32)], "65535 at most"),
        (1, "x", "float32"),
    ],
)
def test_refuses_other_edges(features: int, edges: Any, said: str) -> None:
    """Edges that do not ascend would bin wrongly without a sign."""
    with pytest.raises(ValueError, match=said):
        SketchBank(features, edges=edges)


def test_features_is_an_int() -> None:
    """Not a float that happens to be whole."""
    with pytest.raises(TypeError):
        SketchBank(3.0)  # type: ignore[arg-type]


def test_edges_are_copied() -> None:
    """The caller may reuse the arrays."""
    edges = np.array([1.0, 2.0], F32)
    bank = SketchBank(1, edges=[edges])
    edges[:] = 0
    bank.update(np.array([[1.5]]))
    assert bank.counts(0).tolist() == [0, 1, 0]


def test_the_largest_bank() -> None:
    """The bounds themselves work."""
    most = SketchBank(65_536)
    most.update(np.zeros((1, 65_536), F32))
    assert most.counts(65_535).tolist() == [1]
    fine = SketchBank(1, edges=[np.arange(65_535, dtype=F32)])
    fine.update(np.array([[-1.0], [65_534.0], [100.5]]))
    assert np.flatnonzero(fine.counts(0)).tolist() == [0, 101, 65_535]


def test_reset_forgets_all_but_the_edges() -> None:
    """A window begins as a new bank does."""
    edges = [np.array([0.0], F32), np.array([], F32)]
    bank = SketchBank(2, edges=edges)
    fresh = bank.to_bytes()
    bank.update(np.array([[1.0, np.nan], [-np.inf, np.inf]]))
    assert bank.to_bytes() != fresh
    bank.reset()
    assert bank.to_bytes() == fresh
    bank.update(np.array([[1.0, 2.0]]))
    assert bank.counts(0).tolist() == [0, 1]


# ---- merges and life -----------------------------------------------------------------------------


def test_merge_leaves_the_other_alone() -> None:
    """Only the receiver grows; merging a bank with itself doubles it."""
    edges = [np.array([0.0], F32)]
    one, two = SketchBank(1, edges=edges), SketchBank(1, edges=edges)
    one.update(np.array([[1.0], [np.nan]]))
    two.update(np.array([[-3.0]]))
    before = two.to_bytes()
    one.merge(two)
    assert two.to_bytes() == before
    one.merge(one)
    assert one.counts(0).tolist() == [2, 2]
    assert one.nulls(0) == 2
    assert one.moments(0) == Moments(4, -1.0, 4.0, -3.0, 1.0)


@pytest.mark.parametrize(
    "other",
    [
        SketchBank(2),
        SketchBank(1),
        SketchBank(1, edges=[np.array([0.5], F32)]),
        SketchBank(1, edges=[np.array([0.0, 1.0], F32)]),
    ],
)
def test_refuses_to_merge_what_counts_otherwise(other: SketchBank) -> None:
    """Other features or edges: an error of ours that is a ValueError, and no change."""
    bank = SketchBank(1, edges=[np.array([0.0], F32)])
    bank.update(np.array([[1.0]]))
    before = bank.to_bytes(), other.to_bytes()
    with pytest.raises(SketchMismatchError, match="neither was changed") as caught:
        bank.merge(other)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KernelError)
    assert (bank.to_bytes(), other.to_bytes()) == before
    with pytest.raises(TypeError, match="got int"):
        bank.merge(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.0, np.inf, np.nan])
def test_counts_never_overflow(value: float) -> None:
    """Banks that were merged up to 2**53 values or nulls refuse more, whole, and stay readable."""
    bank = SketchBank(2)
    bank.update_row(np.array([0.0, value]))
    bank.update_row(np.array([np.nan, value]))
    for _ in range(52):
        bank.merge(bank)
    full = 2**53
    assert (bank.counts(1).tolist(), bank.nulls(1)) == (
        ([0], full) if value != value else ([full], 0)
    )
    before = bank.to_bytes()
    with pytest.raises(SketchMismatchError, match=str(full)):
        bank.merge(bank)
    assert bank.to_bytes() == before
    assert SketchBank.from_bytes(before).to_bytes() == before


def test_negative_zero_edges_are_the_same_edges() -> None:
    """They bin the same, so they merge."""
    one = SketchBank(1, edges=[np.array([-0.0], F32)])
    two = SketchBank(1, edges=[np.array([0.0], F32)])
    one.update(np.array([[0.0], [-0.0], [-1e-45]]))
    two.merge(one)
    assert two.counts(0).tolist() == [1, 2]


def test_a_bank_is_made_once_and_not_copied() -> None:
    """It owns memory: a second __init__ or a shallow copy would free it twice."""
    bank = SketchBank(1)
    with pytest.raises(RuntimeError, match="once"):
        bank.__init__(2)  # type: ignore[misc]
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            way(bank)


def test_a_bank_without_init_is_empty_not_wild() -> None:
    """``__new__`` alone gives a bank of no features, which refuses everything."""
    bare = SketchBank.__new__(SketchBank)
    bare.reset()
    with pytest.raises(IndexError):
        bare.nulls(0)
    with pytest.raises(ValueError, match="nothing was counted"):
        bare.update(GOOD)
    assert SketchBank(1).add(bare) == "sizes"


# ---- threads -------------------------------------------------------------------------------------


def run(*deeds: Callable[[], None]) -> None:
    """Run deeds at the same time; fail if one failed or hangs."""
    failed: list[BaseException] = []

    def guard(deed: Callable[[], None]) -> None:
        try:
            deed()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guard, args=(deed,), daemon=True) for deed in deeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not failed, failed


def test_threads_on_one_bank_lose_nothing() -> None:
    """Large and small updates, reads and merges at once: every value is counted, once."""
    edges = [np.linspace(-2, 2, 31, dtype=F32)] * 3
    bank, total = SketchBank(3, edges=edges), SketchBank(3, edges=edges)
    large = np.random.default_rng(5).standard_normal((3000, 3), F32)

    def feed() -> None:
        for _ in range(40):
            bank.update(large)
            bank.update_row(large[0])

    def watch() -> None:
        for _ in range(200):
            seen = SketchBank.from_bytes(bank.to_bytes())  # a torn state breaks a rule
            assert len({seen.moments(i).count for i in range(3)}) == 1
            total.merge(seen)

    run(feed, feed, feed, watch)
    x = np.concatenate([np.tile(large, (120, 1)), np.tile(large[:1], (120, 1))])
    for i in range(3):
        assert bank.counts(i).tolist() == want_counts(x[:, i], edges[i])
        assert bank.moments(i).count == len(x)
        assert bank.moments(i).variance == pytest.approx(x[:, i].astype(float).var(), rel=1e-9)


def test_banks_that_merge_into_each_other_do_not_deadlock() -> None:
    """Both locks are taken in one order."""
    one, two = SketchBank(4), SketchBank(4)

    def into(bank: SketchBank, other: SketchBank) -> Callable[[], None]:
        def deed() -> None:
            for _ in range(300):
                bank.merge(other)
                bank.reset()
                bank.update(np.ones((600, 4), F32))

        return deed

    run(into(one, two), into(two, one))
    assert one.moments(0).count >= 600


def test_a_large_update_lets_other_threads_run() -> None:
    """Without forced switches, another thread gets on only if the kernel lets the GIL go."""
    bank = SketchBank(20)
    x = np.ones((1000, 20), F32)
    go, ran = threading.Event(), threading.Event()

    def wait() -> None:
        go.wait()
        ran.set()

    thread = threading.Thread(target=wait)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        for _ in range(50_000):  # a second, if the machine is slow to wake the thread
            bank.update(x)
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
