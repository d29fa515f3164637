"""The KLL reader against golden bytes, the datasketches library and hostile bytes.

The invariant: whatever bytes come, ``read_kll`` yields a sketch whose weights sum to n and whose
values ascend within its extremes, or it raises SketchRecordError. Vectors, properties, faults.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from typing import Any

import numpy as np
import pytest
from datasketches import kll_doubles_sketch, kll_floats_sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _kll
from shoal.ext.errors import KernelError
from shoal.ext.kll import KllSketch, SketchRecordError, read_kll

EMPTY = bytes.fromhex("02010f01c8000800")
SINGLE = bytes.fromhex("02020f04c80008000000c03f")
PAIR = bytes.fromhex(
    "05010f00c80008000200000000000000c8000100c60000000000c03f00002040000020400000c03f"
)


def write(levels: list[list[float]], *, k: int = 200, wide: bool = False, flags: int = 2) -> bytes:
    """Write a sketch of 2 or more values as the format says, whatever its items are."""
    code = "d" if wide else "f"
    start = sum(_kll.capacity(k, depth) for depth in range(len(levels)))
    start -= sum(len(level) for level in levels)
    starts = [start + sum(len(level) for level in levels[:h]) for h in range(len(levels))]
    items = [item for level in levels for item in level]
    n = sum(len(level) << h for h, level in enumerate(levels))
    return (
        bytes([5, 1, 15, flags])
        + struct.pack("<HBBQHBB", k, 8, 0, n, k, len(levels), 0)
        + struct.pack(f"<{len(levels)}I", *starts)
        + struct.pack(f"<{2 + len(items)}{code}", min(items), max(items), *items)
    )


def library(values: NDArray[Any], k: int) -> Any:
    """Return the library's sketch of the values, in their dtype."""
    sketch = (kll_doubles_sketch if values.dtype == np.float64 else kll_floats_sketch)(k)
    sketch.update(values)
    return sketch


def check(sketch: KllSketch) -> None:
    """Assert the invariant."""
    assert sketch.weights.sum() == sketch.n
    assert len(sketch.values) == len(sketch.weights)
    if sketch.n:
        assert sketch.values[0] >= sketch.minimum
        assert sketch.values[-1] <= sketch.maximum
    assert (sketch.values[:-1] <= sketch.values[1:]).all()
    assert 8 <= sketch.min_k <= sketch.k <= 65535
    assert sketch.variance_bound >= 0.0


def survives(data: bytes) -> bool:
    """Read bytes; assert the invariant, and that the reader alone says the same."""
    try:
        check(read_kll(data))
    except SketchRecordError:
        assert not _kll.parses(data)
        return False
    assert _kll.parses(data)
    return True


# ---- vectors: from the format's description, read back by the library when they were written ----


def test_golden_empty() -> None:
    """An empty sketch knows its k and nothing else."""
    sketch = read_kll(EMPTY)
    assert (sketch.k, sketch.min_k, sketch.n) == (200, 200, 0)
    assert sketch.values.shape == sketch.weights.shape == (0,)
    assert math.isnan(sketch.minimum) and math.isnan(sketch.maximum)
    assert np.isnan(sketch.quantiles([0.0, 0.5, 1.0])).all()
    assert np.isnan(sketch.ranks([[0.0], [1.0]])).all()
    assert sketch.variance_bound == 0.0


def test_golden_single() -> None:
    """One value has a form of its own; its length says the type."""
    sketch = read_kll(SINGLE)
    assert (sketch.n, sketch.minimum, sketch.maximum) == (1, 1.5, 1.5)
    assert sketch.values.dtype == np.float32 and sketch.values.tolist() == [1.5]
    wide = read_kll(SINGLE[:8] + struct.pack("<d", 1.5))
    assert wide.values.dtype == np.float64 and wide.values.tolist() == [1.5]


def test_golden_pair() -> None:
    """C++ leaves level 0 in the order of arrival, backwards."""
    sketch = read_kll(PAIR)
    assert (sketch.k, sketch.n, sketch.minimum, sketch.maximum) == (200, 2, 1.5, 2.5)
    assert sketch.values.tolist() == [1.5, 2.5] and sketch.weights.tolist() == [1, 1]
    assert sketch.quantiles([0.0, 0.5, 0.51, 1.0]).tolist() == [1.5, 1.5, 2.5, 2.5]
    assert sketch.ranks([1.0, 1.5, 2.0, 2.5, 3.0]).tolist() == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert write([[2.5, 1.5]], flags=0) == PAIR


@pytest.mark.parametrize(
    ("k", "totals"),
    [
        (200, [200, 333, 422, 481, 521, 547, 565, 577, 585, 593, 601, 609]),
        (64, [64, 107, 135, 154, 167, 175, 183, 191, 199, 207, 215, 223]),
        (100, [100, 167, 211, 241, 261, 274, 283, 291, 299, 307, 315, 323]),
    ],
)
def test_golden_capacities(k: int, totals: list[int]) -> None:
    """Level starts count from these totals."""
    assert list(itertools.accumulate(_kll.capacity(k, depth) for depth in range(12))) == totals


def test_capacity_is_that_of_integers() -> None:
    """The float64 product never differs from the format's integers."""
    for k in [*range(8, 2000), *range(2000, 65536, 997), 59049, 65534, 65535]:
        for depth in range(31):
            exact = (2 * k * 2**depth // 3**depth + 1) // 2
            assert _kll.capacity(k, depth) == max(8, exact), (k, depth)
        assert all(_kll.capacity(k, depth) == 8 for depth in range(31, 61))
    with pytest.raises(ValueError, match="k is 8"):
        _kll.capacity(7, 0)


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [8, 9, 64, 100, 200, 777, 4096, 65535])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_library_says_the_same(k: int, dtype: type[np.floating[Any]]) -> None:
    """What the library writes is read, and ranks and quantiles are the library's."""
    rng = np.random.default_rng(k)
    for n in [0, 1, 2, 7, 8, 9, 100, 1000, 30_000]:
        values = rng.standard_normal(n).round(2).astype(dtype)
        peer = library(values, k)
        sketch = read_kll(peer.serialize())
        check(sketch)
        assert (sketch.k, sketch.n, len(sketch.values)) == (k, n, peer.num_retained)
        if n == 0:
            continue
        assert sketch.values.dtype == dtype
        assert (sketch.minimum, sketch.maximum) == (peer.get_min_value(), peer.get_max_value())
        q = [0.001, 0.01, 0.25, 0.5, 0.77, 0.99]
        assert sketch.quantiles(q).tolist() == peer.get_quantiles(q, True)
        at = [-9.0, *sketch.values[:: max(1, len(sketch.values) // 20)].tolist(), 9.0]
        assert sketch.ranks(at) == pytest.approx([peer.get_rank(v, True) for v in at])
        assert sketch.quantiles(0.0) == sketch.minimum and sketch.quantiles(1.0) == sketch.maximum


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(8, 300), st.integers(0, 3000)), min_size=1, max_size=6))
def test_merged_by_the_library(parts: list[tuple[int, int]]) -> None:
    """Merges of other k, with levels that are empty or above their capacity, are read too."""
    rng = np.random.default_rng(0)
    whole = kll_floats_sketch(parts[0][0])
    for k, n in parts:
        whole.merge(library(rng.standard_normal(n).astype(np.float32), k))
    sketch = read_kll(whole.serialize())
    check(sketch)
    assert sketch.n == sum(n for _, n in parts)


def test_infinities_and_zeros_are_values() -> None:
    """Infinities, denormals and both zeros are kept."""
    values = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45], np.float32)
    sketch = read_kll(library(values, 200).serialize())
    assert (sketch.n, sketch.minimum, sketch.maximum) == (6, -np.inf, np.inf)
    assert sketch.ranks([-np.inf, 0.0, 3.0, np.inf]).tolist() == [1 / 6, 4 / 6, 5 / 6, 1.0]


def test_variance_bound_holds() -> None:
    """P(|error| > t) <= 2 exp(-t^2 / 2V), with V from the bytes alone, at 90 %."""
    rng = np.random.default_rng(1)
    misses, trials = 0, 300
    for _ in range(trials):
        values = rng.standard_normal(3000).astype(np.float32)
        sketch = read_kll(library(values, 16).serialize())
        error = abs(sketch.ranks(0.3) - (values <= np.float32(0.3)).mean()) * len(values)
        assert sketch.variance_bound > 0.0
        misses += bool(error > math.sqrt(2 * sketch.variance_bound * math.log(2 / 0.1)))
    assert misses <= trials * 0.1


def test_any_bytes_like() -> None:
    """A bytearray and a memoryview are read like bytes."""
    for data in (bytearray(PAIR), memoryview(PAIR), memoryview(b"x" + PAIR)[1:]):
        assert read_kll(data).values.tolist() == [1.5, 2.5]
    with pytest.raises(TypeError):
        read_kll("text")  # type: ignore[arg-type]


def test_nothing_can_be_changed() -> None:
    """A sketch is a fact: neither its fields nor its arrays change."""
    sketch = read_kll(PAIR)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sketch.n = 3  # type: ignore[misc]
    for array in (sketch.values, sketch.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_queries_out_of_range() -> None:
    """A share outside [0, 1] and NaN are mistakes."""
    sketch = read_kll(PAIR)
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            sketch.quantiles([0.5, q])
    with pytest.raises(ValueError, match="NaN"):
        sketch.ranks([math.nan])


# ---- faults -------------------------------------------------------------------------------------


def put(data: bytes, at: int, code: str, value: float) -> bytes:
    """Overwrite a field."""
    changed = bytearray(data)
    struct.pack_into("<" + code, changed, at, value)
    return bytes(changed)


TALL = write([[1.0, 2.0], [0.5, 3.0, 4.0], [2.5]])  # n=12; starts at 20, minimum at 32, items at 40
WIDE = write([[1.0, 2.0], [0.5, 3.0, 4.0], [2.5]], wide=True)
REFUSED = {
    "nothing": (b"", "shorter"),
    "head cut": (EMPTY[:7], "shorter"),
    "family": (put(TALL, 2, "B", 14), "family"),
    "m": (put(TALL, 6, "B", 7), "m or a reserved"),
    "reserved 7": (put(TALL, 7, "B", 1), "reserved"),
    "reserved 19": (put(TALL, 19, "B", 1), "reserved"),
    "k": (put(TALL, 4, "H", 7), "k, min_k"),
    "min_k above k": (put(TALL, 16, "H", 201), "k, min_k"),
    "min_k": (put(TALL, 16, "H", 7), "k, min_k"),
    "updatable": (put(TALL, 1, "B", 3), "updatable"),
    "version": (put(TALL, 1, "B", 2), "preamble, version and flags"),
    "preamble": (put(TALL, 0, "B", 2), "preamble, version and flags"),
    "flag empty": (put(TALL, 3, "B", 3), "preamble, version and flags"),
    "flag single": (put(TALL, 3, "B", 6), "preamble, version and flags"),
    "flag unknown": (put(TALL, 3, "B", 10), "preamble, version and flags"),
    "empty with bytes behind": (EMPTY + b"\0", "length"),
    "empty without flag": (put(EMPTY, 3, "B", 0), "preamble, version and flags"),
    "single cut": (SINGLE[:11], "length"),
    "single long": (SINGLE + b"\0", "length"),
    "single NaN": (put(SINGLE, 8, "f", math.nan), "NaN"),
    "n of 1": (put(write([[1.0, 2.0]]), 8, "Q", 1), "number of values"),
    "n above 2^53": (put(TALL, 8, "Q", 2**53 + 12), "number of values"),
    "n of 2^64": (put(TALL, 8, "Q", 2**64 - 1), "number of values"),
    "n wrong": (put(TALL, 8, "Q", 13), "weights"),
    "weight above n": (put(TALL, 8, "Q", 4), "weights"),
    "no level": (put(TALL, 18, "B", 0), "levels"),
    "62 levels": (put(TALL, 18, "B", 62), "levels"),
    "more levels than n fills": (put(TALL, 18, "B", 5), "levels"),
    "full head cut": (TALL[:19], "shorter"),
    "starts cut": (TALL[:30], "shorter"),
    "start above total": (put(TALL, 20, "I", 2**32 - 1), "follow each other"),
    "starts fall": (put(TALL, 28, "I", 0), "follow each other"),
    "start too low": (put(TALL, 20, "I", 0), "weights"),
    "item missing": (TALL[:-4], "length"),
    "item more": (TALL + bytes(4), "length"),
    "byte more": (TALL + b"\0", "length"),
    "double missing": (WIDE[:-8], "length"),
    "level unsorted": (put(TALL, 48, "f", 3.5), "sorted"),
    "level 0 unsorted": (put(TALL, 40, "f", 2.2), "sorted"),
    "NaN in a level": (put(TALL, 52, "f", math.nan), "sorted"),
    "NaN alone in a level": (put(TALL, 60, "f", math.nan), "NaN"),
    "NaN in level 0": (put(put(TALL, 3, "B", 0), 44, "f", math.nan), "NaN"),
    "double NaN": (put(WIDE, len(WIDE) - 8, "d", math.nan), "NaN"),
    "minimum NaN": (put(TALL, 32, "f", math.nan), "minimum"),
    "maximum NaN": (put(TALL, 36, "f", math.nan), "minimum"),
    "below minimum": (put(TALL, 32, "f", 0.6), "minimum"),
    "above maximum": (put(TALL, 36, "f", 3.9), "maximum"),
    "minimum above maximum": (put(TALL, 32, "f", 5.0), "minimum"),
    "below minimum in level 0": (put(put(PAIR, 24, "f", 2.0), 3, "B", 0), "minimum"),
    "big-endian k": (put(put(TALL, 4, "H", 0xC800), 16, "H", 0xC800), "length|weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Each rule of the format is checked, and the refusal says which one."""
    assert read_kll(TALL).n == read_kll(WIDE).n == 12
    data, reason = REFUSED[name]
    with pytest.raises(SketchRecordError, match=reason) as caught:
        read_kll(data)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, KernelError)
    assert not survives(data)


def test_limits_of_the_caller() -> None:
    """A topic may bound k and the length."""
    assert read_kll(TALL, k_max=200, bytes_max=len(TALL)).k == 200
    with pytest.raises(SketchRecordError, match="k=200: at most 199"):
        read_kll(TALL, k_max=199)
    with pytest.raises(SketchRecordError, match=f"may have {len(TALL) - 1}"):
        read_kll(TALL, bytes_max=len(TALL) - 1)


def test_heaviest_sketch() -> None:
    """54 levels reach 2^53 values; the weights stay exact."""
    full = read_kll(write([[float(h)] for h in range(53)], k=8))
    assert full.n == 2**53 - 1 and full.weights.tolist() == [1 << h for h in range(53)]
    assert full.quantiles([0.5, 0.75]).tolist() == [52.0, 52.0]
    top = read_kll(write([[]] * 53 + [[1.0]], k=8))
    assert top.n == 2**53 and top.weights.tolist() == [2**53]


def test_every_bit_flipped() -> None:
    """No single bit crashes the reader or breaks the invariant; most are refused."""
    rng = np.random.default_rng(5)
    for dtype, k, n in [(np.float32, 8, 500), (np.float64, 16, 200), (np.float32, 200, 2)]:
        data = library(rng.standard_normal(n).astype(dtype), k).serialize()
        read = 0
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            read += survives(bytes(changed))
        assert 0 < read < 8 * len(data)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes that nobody wrote are refused, or are a sketch."""
    survives(data)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([EMPTY, SINGLE, PAIR, TALL, WIDE]),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
    st.integers(-16, 16),
)
def test_mutated_bytes(data: bytes, edits: list[tuple[int, int]], grown: int) -> None:
    """Bytes near a sketch are refused, or are a sketch."""
    changed = bytearray(data[:grown] if grown < 0 else data + bytes(grown))
    for at, value in edits:
        if at < len(changed):
            changed[at] = value
    survives(bytes(changed))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=8), min_size=1, max_size=9),
    st.sampled_from([8, 64, 512, 513, 65535]),
    st.booleans(),
)
def test_any_legal_sketch_is_read(levels: list[list[float]], k: int, wide: bool) -> None:
    """Every multiset of weighted items that keeps the rules is a sketch."""
    levels = [sorted(level) for level in levels]
    while levels and not levels[-1]:
        levels.pop()
    if sum(len(level) << h for h, level in enumerate(levels)) < 2:
        return
    sketch = read_kll(write(levels, k=k, wide=wide))
    check(sketch)
    want = sorted((item, 1 << h) for h, level in enumerate(levels) for item in level)
    assert sketch.values.tolist() == [item for item, _ in want]
    assert sorted(zip(sketch.values.tolist(), sketch.weights.tolist(), strict=True)) == want
