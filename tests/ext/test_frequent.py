"""FrequentItems and FrequentTexts: vectors, the library both ways, properties, hostile bytes.

The invariant: an item's weight lies within its bounds, whatever the stream, the order, the
merges and the trips through bytes; the error stays within its share of the total.

Vectors: made with datasketches 5.2.0 (C++), as named; never edited.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasketches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext.frequent import (
    TOTAL_MAX,
    FrequentItems,
    FrequentTexts,
    SketchMismatchError,
    SketchRecordError,
)

FUZZ = Path(__file__).parents[1] / "fuzz" / "frequent.py"
LONGS = datasketches.PyLongsSerDe()
ERRORS = datasketches.frequent_items_error_type
# strings, lg_max 3: "a" with weight 5 after seven others of weight 1 were purged
PURGED = bytes.fromhex(
    "04010a030300000001000000000000000c00000000000000010000000000000005000000000000000100000061"
)
EMPTY = bytes.fromhex("01010a0303050000")  # lg_max 3

relaxed = settings(deadline=None, max_examples=100)
streams = st.lists(
    st.tuples(st.integers(-3, 30) | st.sampled_from([2**63 - 1, -(2**63)]), st.integers(0, 9)),
    max_size=300,
)


def made(values: NDArray[np.int64], lg_max: int = 6) -> FrequentItems:
    """Return a sketch of items."""
    sketch = FrequentItems(lg_max)
    sketch.update(values)
    return sketch


def skewed(n: int, seed: int = 0) -> NDArray[np.int64]:
    """Return n items of which few come often."""
    return (np.random.default_rng(seed).zipf(1.2, size=n) % 5000).astype(np.int64) - 3


def halves(stream: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return items and weights."""
    rows = np.array(stream, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def weigh(stream: list[tuple[int, int]]) -> Counter[int]:
    """Return the true weights."""
    weights: Counter[int] = Counter()
    for item, weight in stream:
        weights[item] += weight
    return weights


def check(sketch: FrequentItems | FrequentTexts, weights: Counter[int], lg_max: int) -> None:
    """Hold a sketch against the true weights."""
    texts = isinstance(sketch, FrequentTexts)
    assert sketch.total == weights.total()
    assert sketch.error_max * 3 * 2**lg_max <= 8 * sketch.total
    for item, weight in weights.items():
        low, high = sketch.estimate(str(item) if texts else item)  # type: ignore[arg-type]
        assert low <= weight <= high and high - low == sketch.error_max
    rows: list[Any] = list(sketch.items(threshold=0))
    assert rows == sorted(rows, key=lambda row: (-row[1], row[0]))
    assert len(rows) <= 0.75 * 2**sketch.lg_max
    assert sum(low for _, low, _ in rows) + sketch.error_max <= sketch.total
    assert bool(rows) == bool(sketch.total)  # a purge empties no sketch
    if len(+weights) <= 0.75 * 2**lg_max:
        assert sketch.error_max == 0


# ---- vectors -----------------------------------------------------------------------------------


def test_bytes_are_those_that_are_pinned() -> None:
    """A purged sketch of strings, an empty one, and int64 items by hand."""
    texts = FrequentTexts(3)
    for text in [*"0123456", "a"]:
        texts.update([text], [5 if text == "a" else 1])
    # The library dropped all seven; we keep one, so that the total survives.
    assert texts.items(threshold=0) == [("a", 5, 6), ("0", 1, 2)]
    assert FrequentTexts.from_bytes(PURGED).items(threshold=0) == [("a", 5, 6)]
    assert FrequentTexts.from_bytes(PURGED).to_bytes() == PURGED
    assert FrequentTexts(3).to_bytes() == FrequentItems(3).to_bytes() == EMPTY
    by_hand = bytes.fromhex("04010a0403000000") + struct.pack(
        "<IIqqqqqq", 2, 0, 7, 0, 5, 2, -2, 2**40
    )
    assert made(np.array([2**40, -2, -2, -2, -2, 2**40, -2]), 4).to_bytes() == by_hand


# ---- the library, both ways --------------------------------------------------------------------


@pytest.mark.parametrize("lg_max", [3, 4, 6, 8, 11])
@pytest.mark.parametrize("n", [0, 1, 6, 50, 1000, 8000])
def test_items_are_those_of_the_library(lg_max: int, n: int) -> None:
    """Read here and there with equal answers; the same counters where no purge emptied it."""
    values = skewed(n, seed=n)
    theirs = datasketches.frequent_items_sketch(lg_max)
    for value in values.tolist():
        theirs.update(value)
    ours = made(values, lg_max)
    data = theirs.serialize(LONGS)
    if lg_max >= 4:
        assert FrequentItems.from_bytes(data).to_bytes() == ours.to_bytes()
    for sketch, read in (
        (ours, datasketches.frequent_items_sketch.deserialize(ours.to_bytes(), LONGS)),
        (FrequentItems.from_bytes(data), theirs),
    ):
        assert (read.total_weight, read.is_empty()) == (sketch.total, n == 0)
        for item in np.unique(values)[:300].tolist():
            bounds = read.get_lower_bound(item), read.get_upper_bound(item)
            assert bounds == sketch.estimate(item)
        for sure, kind in ((True, "NO_FALSE_POSITIVES"), (False, "NO_FALSE_NEGATIVES")):
            rows = read.get_frequent_items(getattr(ERRORS, kind))
            expected = sorted((item, low, high) for item, _, low, high in rows)
            assert sorted(sketch.items(no_false_positives=sure)) == expected


@pytest.mark.parametrize("n", [0, 1, 7, 50, 3000])
def test_texts_are_those_of_the_library(n: int) -> None:
    """Empty, long and non-ASCII strings among them."""
    texts = ["é" * (value % 7) + "🐟" * (value % 3) + str(value) * 9 for value in skewed(n)]
    texts += [""] * (n // 9)
    theirs, ours = datasketches.frequent_strings_sketch(5), FrequentTexts(5)
    for text in texts:
        theirs.update(text)
        ours.update([text])
    back = FrequentTexts.from_bytes(theirs.serialize())
    assert back.to_bytes() == ours.to_bytes()
    read = datasketches.frequent_strings_sketch.deserialize(ours.to_bytes())
    assert read.total_weight == ours.total == len(texts)
    for text in set(texts):
        assert (read.get_lower_bound(text), read.get_upper_bound(text)) == ours.estimate(text)


def test_a_purge_that_would_empty_it_keeps_the_total() -> None:
    """Distinct items, stopped right after a purge: the library's own bytes lose all."""
    theirs = datasketches.frequent_items_sketch(3)
    for value in range(7):
        theirs.update(value)
    assert theirs.serialize(LONGS) == EMPTY
    ours = made(np.arange(7), 3)
    read = datasketches.frequent_items_sketch.deserialize(ours.to_bytes(), LONGS)
    assert read.total_weight == 7 and read.get_upper_bound(3) == 1 and not read.is_empty()
    assert ours.items(threshold=0) == [(0, 1, 2)]
    gone = EMPTY[:1].replace(b"\1", b"\4") + EMPTY[1:5] + bytes(3)
    gone += struct.pack("<IIqq", 0, 0, 7, 1)  # such a sketch, could it be written
    back = FrequentItems.from_bytes(gone)
    assert (back.total, back.estimate(5), back.to_bytes()) == (7, (0, 1), gone)


# ---- bounds ------------------------------------------------------------------------------------


@relaxed
@given(streams, streams, st.integers(3, 5), st.integers(3, 6))
def test_bounds_hold_for_every_stream_and_union(
    one: list[tuple[int, int]], two: list[tuple[int, int]], lg_one: int, lg_two: int
) -> None:
    """Items: all at once, and merged with another of any size."""
    a, b = FrequentItems(lg_one), FrequentItems(lg_two)
    a.update(*halves(one))
    b.update(*halves(two))
    check(a, weigh(one), lg_one)
    check(b, weigh(two), lg_two)
    before = b.to_bytes()
    a.merge(FrequentItems.from_bytes(before))
    check(a, weigh(one + two), min(lg_one, lg_two))
    check(FrequentItems.from_bytes(a.to_bytes()), weigh(one + two), min(lg_one, lg_two))
    assert b.to_bytes() == before


@relaxed
@given(streams, streams, st.integers(3, 5), st.integers(3, 6), st.integers(1, 300))
def test_bounds_hold_for_every_stream_of_texts(
    one: list[tuple[int, int]],
    two: list[tuple[int, int]],
    lg_one: int,
    lg_two: int,
    batch: int,
) -> None:
    """Texts: in batches of any size, which are purged once each."""
    a, b = FrequentTexts(lg_one), FrequentTexts(lg_two)
    for at in range(0, len(one), batch):
        part = one[at : at + batch]
        a.update([str(item) for item, _ in part], [weight for _, weight in part])
    b.update(str(item) for item, weight in two for _ in range(weight))
    check(a, weigh(one), lg_one)
    check(b, weigh(two), lg_two)
    a.merge(FrequentTexts.from_bytes(b.to_bytes()))
    check(a, weigh(one + two), min(lg_one, lg_two))
    check(FrequentTexts.from_bytes(a.to_bytes()), weigh(one + two), min(lg_one, lg_two))


@pytest.mark.parametrize("lg_max", [3, 6, 10])
def test_bounds_hold_for_long_streams(lg_max: int) -> None:
    """Skewed, distinct, equal, and crowded at one home of the table."""
    odd = 0x9E3779B97F4A7C15
    crowded = np.array([i * pow(odd, -1, 2**64) % 2**31 for i in range(20_000)], np.int64)
    for values in (skewed(60_000), np.arange(60_000), np.full(60_000, 7), crowded):
        check(made(values, lg_max), Counter(values.tolist()), lg_max)


def test_exact_until_full() -> None:
    """Three quarters of the table: one more is one too many."""
    sketch = made(np.repeat(np.arange(48), 3), 6)
    assert sketch.items() == [(i, 3, 3) for i in range(48)]
    sketch.update(np.array([48]))
    assert (sketch.error_max, sketch.items(threshold=0)) == (3, [(0, 1, 4)])


def test_thresholds_choose_items() -> None:
    """Above, not at; low for what is sure, high for what may be."""
    sketch = FrequentItems.from_bytes(PURGED[:36] + struct.pack("<I", 0) + struct.pack("<q", -9))
    assert sketch.items() == [(-9, 5, 6)]
    assert sketch.items(threshold=4) == sketch.items(threshold=5, no_false_positives=False)
    assert sketch.items(threshold=5) == sketch.items(threshold=6, no_false_positives=False) == []


def test_a_sketch_merged_with_itself_counts_twice() -> None:
    """The same memory on both sides."""
    sketch, texts = made(np.array([1, 1, 2]), 3), FrequentTexts(3)
    texts.update("aab"[i] for i in range(3))
    sketch.merge(sketch)
    texts.merge(texts)
    assert sketch.items() == [(1, 4, 4), (2, 2, 2)] and sketch.total == 6
    assert texts.items() == [("a", 4, 4), ("b", 2, 2)] and texts.total == 6


def test_reset_forgets_all_but_sizes() -> None:
    """As new."""
    sketch, texts = made(np.arange(1000), 4), FrequentTexts(4, text_bytes_max=9)
    texts.update(map(str, range(1000)))
    sketch.reset()
    texts.reset()
    assert sketch.to_bytes() == FrequentItems(4).to_bytes() == texts.to_bytes()
    sketch.update(np.arange(9))
    assert sketch.to_bytes() == made(np.arange(9), 4).to_bytes()


@pytest.mark.parametrize("kind", [FrequentItems, FrequentTexts])
def test_threads_lose_nothing(kind: type[FrequentItems] | type[FrequentTexts]) -> None:
    """Four threads on one sketch, purges included."""
    shared: Any = kind(3)

    def feed(part: int) -> None:
        for i in range(300):
            row = np.arange(part * i, part * i + 20)
            shared.update(row if kind is FrequentItems else map(str, row.tolist()))

    threads = [threading.Thread(target=feed, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights = Counter(
        i for part in range(4) for n in range(300) for i in range(n * part, n * part + 20)
    )
    check(shared, weights, 3)


# ---- refusals ----------------------------------------------------------------------------------


def test_what_cannot_be_counted_is_refused_and_changes_nothing() -> None:
    """Every argument, wrong in each way."""
    sketch = made(np.arange(5))
    before = sketch.to_bytes()
    ones = np.ones(3, np.int64)
    wrong: list[tuple[Any, Any]] = [
        ([1, 2], None), (np.ones(3), None), (np.ones(3, np.int32), None), (ones, [1, 1, 1]),
        (ones, np.ones(3)), (ones.astype(">i8"), None), (7, None),
    ]  # fmt: skip
    for items, weights in wrong:
        with pytest.raises(TypeError):
            sketch.update(items, weights)
    poor: list[tuple[Any, Any]] = [
        (np.ones((2, 2), np.int64), None), (ones, ones[:2]), (ones, -ones),
        (ones, np.array([1, 2**62, 1])), (ones, np.full(3, 2**63 - 1)),
    ]  # fmt: skip
    for items, weights in poor:
        with pytest.raises(ValueError):
            sketch.update(items, weights)
    with pytest.raises(TypeError):
        sketch.merge(FrequentTexts())  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        sketch.estimate(2**63)
    with pytest.raises(TypeError):
        sketch.estimate(1.5)  # type: ignore[arg-type]
    assert sketch.estimate(np.int64(3)) == (1, 1)  # type: ignore[arg-type]
    for lg_max in (2, 17, 2**70):
        with pytest.raises(ValueError, match="3 to 16"):
            FrequentItems(lg_max)
    with pytest.raises(TypeError):
        FrequentItems(8.0)  # type: ignore[arg-type]
    assert sketch.to_bytes() == before


def test_what_texts_cannot_be_counted_is_refused_and_changes_nothing() -> None:
    """Also in the middle of a batch, and from a generator."""
    sketch = FrequentTexts(text_bytes_max=4)
    sketch.update(["a", "éé"])
    before = sketch.to_bytes()
    wrong: list[tuple[Any, Any]] = [
        ("ab", None), (b"ab", None), (["a", 1], None), ([["a"]], None), (7, None), (["a"], ["b"]),
        (["a"], [1.0]),
    ]  # fmt: skip
    for items, weights in wrong:
        with pytest.raises(TypeError):
            sketch.update(items, weights)
    poor: list[tuple[list[str], list[int] | None]] = [
        (["a", "ééa"], None), (["a", "\ud800"], None), (["a"], [-1]), (["a"], []), (["a"], [1, 1]),
        (["a", "b"], [1, TOTAL_MAX]),
    ]  # fmt: skip
    for texts, counts in poor:
        with pytest.raises(ValueError):
            sketch.update(iter(texts), counts)
    with pytest.raises(TypeError):
        sketch.merge(FrequentItems())  # type: ignore[arg-type]
    for lg_max, size in ((2, 9), (17, 9), (6, 0), (6, 65536)):
        with pytest.raises(ValueError):
            FrequentTexts(lg_max, text_bytes_max=size)
    for other in (True, 9.0):
        with pytest.raises(TypeError):
            FrequentTexts(text_bytes_max=other)  # type: ignore[arg-type]
    assert sketch.to_bytes() == before


def test_totals_end_where_they_no_longer_add() -> None:
    """Two sums stay within int64; neither sketch changes."""
    item, most = np.array([1]), np.array([TOTAL_MAX])
    a, b, c, d = FrequentItems(), made(item), FrequentTexts(), FrequentTexts()
    a.update(item, most)
    c.update(["a"], [TOTAL_MAX])
    d.update(["b"])
    before = [a.to_bytes(), b.to_bytes(), c.to_bytes(), d.to_bytes()]
    with pytest.raises(SketchMismatchError):
        a.merge(b)
    with pytest.raises(SketchMismatchError):
        b.merge(a)
    with pytest.raises(SketchMismatchError):
        c.merge(d)
    assert [a.to_bytes(), b.to_bytes(), c.to_bytes(), d.to_bytes()] == before
    assert FrequentItems.from_bytes(before[0]).estimate(1) == (TOTAL_MAX, TOTAL_MAX)


def changed(data: bytes, *edits: tuple[int, int]) -> bytes:
    """Return bytes with some replaced."""
    out = bytearray(data)
    for at, value in edits:
        out[at] = value
    return bytes(out)


ITEMS = made(np.array([7, 7, 7, 7, 9, 9]), 4).to_bytes()
HEADS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("fewer than 8", lambda data: data[:7]),
    ("not a sketch of frequent", lambda data: changed(data, (2, 7))),
    ("version", lambda data: changed(data, (1, 2))),
    ("lg_max out", lambda data: changed(data, (3, 2))),
    ("lg_max out", lambda data: changed(data, (3, 17))),
    ("larger than its largest", lambda data: changed(data, (4, 5))),
    ("larger than its largest", lambda data: changed(data, (4, 2))),
    ("neither empty nor full", lambda data: changed(data, (0, 1))),
    ("neither empty nor full", lambda data: changed(data, (5, 4))),
    ("neither empty nor full", lambda data: changed(data, (5, 2))),
    ("more than a head", lambda data: changed(data, (0, 1), (5, 5))),
    ("cut off", lambda data: data[:31]),
    ("more counters", lambda data: changed(data, (8, 7))),
    ("more counters", lambda data: changed(data, (11, 255))),
    ("total", lambda data: changed(data, (16, 0), (17, 0))),
    ("total", lambda data: changed(data, (23, 128))),
    ("total", lambda data: changed(data, (23, 64), (22, 1))),
    ("total", lambda data: changed(data, (31, 64))),
    ("counts", lambda data: changed(data, (32, 0))),
    ("counts", lambda data: changed(data, (32, 200))),
    ("counts", lambda data: changed(data, (24, 3))),
    ("counts", lambda data: changed(data, (39, 255))),
]


@pytest.mark.parametrize(("reason", "edit"), HEADS)
def test_what_no_stream_gives_is_refused(reason: str, edit: Callable[[bytes], bytes]) -> None:
    """Each check that both readers make, by its reason."""
    texts = FrequentTexts(4)
    texts.update(["a", "bc"], [4, 2])
    with pytest.raises(SketchRecordError, match=reason):
        FrequentItems.from_bytes(edit(ITEMS))
    with pytest.raises(SketchRecordError, match=reason):
        FrequentTexts.from_bytes(edit(texts.to_bytes()))


def test_items_that_no_stream_gives_are_refused() -> None:
    """What only the reader of int64 checks."""
    for reason, data in (
        ("length", ITEMS[:-1]), ("length", ITEMS + bytes(16)), ("length", changed(ITEMS, (8, 1))),
        ("twice", ITEMS[:-8] + ITEMS[-16:-8]),
    ):  # fmt: skip
        with pytest.raises(SketchRecordError, match=reason):
            FrequentItems.from_bytes(data)
    with pytest.raises(TypeError):
        FrequentItems.from_bytes("x")  # type: ignore[arg-type]
    assert FrequentItems.from_bytes(memoryview(ITEMS)).to_bytes() == ITEMS


def test_texts_that_no_stream_gives_are_refused() -> None:
    """What only the reader of strings checks."""
    texts = FrequentTexts(4)
    texts.update(["ab", "cd"], [2, 1])
    data = texts.to_bytes()  # 32 head, 16 counts, 4 + 2, 4 + 2
    for reason, wrong in (
        ("cut off", data[:50]), ("cut off", data[:55]), ("too long", data[:-1]),
        ("cut off", data[:54] + data[54:57]), ("too long", data[:48] + b"\7\0\0\0" + data[52:57]),
        ("more than", data + b"\0"), ("too long", changed(data, (51, 255))),
        ("UTF-8", changed(data, (52, 255))), ("twice", data[:58] + b"ab"),
    ):  # fmt: skip
        with pytest.raises(SketchRecordError, match=reason):
            FrequentTexts.from_bytes(wrong)
    with pytest.raises(SketchRecordError, match="too long"):
        FrequentTexts.from_bytes(data, text_bytes_max=1)
    with pytest.raises(TypeError):
        FrequentTexts.from_bytes([1])  # type: ignore[arg-type]
    assert FrequentTexts.from_bytes(bytearray(data)).to_bytes() == data


def test_a_sketch_is_filled_once() -> None:
    """Loading is for a new one; a used one stays as it is."""
    sketch = made(np.arange(3), 4)
    before = sketch.to_bytes()
    assert sketch.load(ITEMS) == FrequentItems(5).load(ITEMS) == "for another sketch"
    assert sketch.to_bytes() == before


def test_mutations_give_a_sketch_or_are_refused() -> None:
    """In a process of its own: a crash must be seen as one."""
    done = subprocess.run(
        [sys.executable, FUZZ, "--mutations", "15000", "--seed", "7"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15000 mutations" in done.stdout
