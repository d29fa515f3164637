"""HllSketch: vectors, the library in both directions, properties, hostile bytes.

The invariant: a sketch is a function of the set of its values. So order, repetition, threads and
merges change nothing, its registers and bytes are those of the library for the same set, and
bytes that no set gives are refused.

Vectors: made with datasketches 5.2.0 (C++), lg_k and values as named; never edited.
"""

from __future__ import annotations

import hashlib
import math
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasketches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.ext import _hll
from shoal.ext.hll import HllSketch, SketchRecordError

FUZZ = Path(__file__).parents[1] / "fuzz" / "distinct.py"
TYPES = {"hll4": datasketches.HLL_4, "hll8": datasketches.HLL_8}
LIST = bytes.fromhex("0201070803080300cbd7c2042bf2fb06862ff90d")  # lg_k 8, 0 1 2, in this order
SET = bytes.fromhex(  # lg_k 8, 0 to 9, in the order of its table
    "03010708050800010a00000081bc5d06862ff90dcbd7c204c1e91705d216730734a2610e75816607fc2d420a7b65e608"
    "2bf2fb06"
)

relaxed = settings(deadline=None, max_examples=60)


def made(values: NDArray[Any], lg_k: int = 12) -> HllSketch:
    """Return a sketch of values."""
    sketch = HllSketch(lg_k)
    sketch.update(values)
    return sketch


def library(values: NDArray[Any], lg_k: int, kind: str) -> Any:
    """Return the library's sketch of values, one by one."""
    sketch = datasketches.hll_sketch(lg_k, TYPES[kind])
    for value in values.tolist():
        sketch.update(value)
    return sketch


def united(sketch: Any, kind: str) -> Any:
    """What the library makes of the registers alone: the second time it drops its HIP estimate."""
    union = datasketches.hll_union(sketch.lg_config_k)
    union.update(sketch)
    union.update(sketch)
    return union.get_result(TYPES[kind])


def coupons(data: bytes) -> list[int]:
    """Return the coupons of a list or set, in ascending order."""
    head = 8 if data[7] & 3 == 0 else 12
    return sorted(struct.unpack(f"<{(len(data) - head) // 4}I", data[head:]))


def numbers(n: int, seed: int = 0) -> NDArray[np.int64]:
    """Return n values that are distinct but for luck nobody has."""
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, size=n)


# ---- vectors -----------------------------------------------------------------------------------


def test_few_values_have_the_coupons_of_the_library() -> None:
    """A list, and a set: the order is free, the rest is not."""
    ours = made(np.arange(3), 8).to_bytes()
    assert ours[:8] == LIST[:8] and coupons(ours) == coupons(LIST)
    ours = made(np.arange(10), 8).to_bytes()
    assert ours[:12] == SET[:12] and coupons(ours) == coupons(SET)


def test_an_empty_sketch_is_eight_bytes() -> None:
    """It still tells lg_k and kind."""
    assert HllSketch(8).to_bytes().hex() == "02010708030c0000"
    assert HllSketch(4).to_bytes("hll8").hex() == "02010704030c0008"


def test_bytes_of_many_values_are_pinned() -> None:
    """Compared with a union of the library below; pinned so that no version drifts."""
    data = made(np.arange(100_000), 10).to_bytes()
    assert data[:40].hex() == (
        "0a01070a0018040200000000000000000000000065aa1c4000000000000000000100000000000000"
    )
    assert hashlib.sha256(data).hexdigest() == (
        "2a8558ec769fc7b9518211455db8f61984e23b3517c982d051f7cb88838d1c16"
    )


# ---- the library, both ways --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hll4", "hll8"])
@pytest.mark.parametrize("lg_k", [4, 5, 7, 8, 10, 12, 14])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 24, 25, 96, 97, 384, 385, 20_000])
def test_bytes_are_those_of_the_library(lg_k: int, n: int, kind: Any) -> None:
    """Both modes' ends are among the n; 20,000 values at lg_k 4 have exceptions."""
    values = numbers(n, seed=n + lg_k)
    ours, theirs = made(values, lg_k), library(values, lg_k, kind)
    data, alone = ours.to_bytes(kind), united(theirs, kind).serialize_compact()
    if data[7] & 3 == 2:
        assert data == alone  # sums, counts, exceptions and all
    else:
        assert data[:8] == theirs.serialize_compact()[:8]
        assert coupons(data) == coupons(theirs.serialize_compact())
    for theirs_data in (
        theirs.serialize_compact(),
        theirs.serialize_updatable(),
        alone,
        united(theirs, kind).serialize_updatable(),
    ):
        back = HllSketch.from_bytes(theirs_data)
        assert back.to_bytes(kind) == data and back.estimate() == ours.estimate()
    read = datasketches.hll_sketch.deserialize(data)
    assert read.lg_config_k == lg_k and read.tgt_type == TYPES[kind]
    assert read.get_estimate() == pytest.approx(united(theirs, kind).get_estimate(), rel=1e-12)
    # two estimators of the same registers are apart by less than a standard error
    apart = 1e-6 if ours.read()[2] >= 0 else ours.error_rel
    assert read.get_estimate() == pytest.approx(ours.estimate(), rel=apart)


@pytest.mark.parametrize("n", [1, 7, 8, 1000, 20_000])
def test_six_bit_sketches_are_read(n: int) -> None:
    """What foreign writers may choose, we do not."""
    values = numbers(n)
    for lg_k in (4, 7, 12):
        theirs = datasketches.hll_sketch(lg_k, datasketches.HLL_6)
        for value in values.tolist():
            theirs.update(value)
        for data in (theirs.serialize_compact(), theirs.serialize_updatable()):
            assert HllSketch.from_bytes(data).to_bytes() == made(values, lg_k).to_bytes()


def test_a_library_sketch_that_started_full_is_read() -> None:
    """Registers, all 0, and the flags of an empty sketch."""
    for kind in (datasketches.HLL_4, datasketches.HLL_6, datasketches.HLL_8):
        theirs = datasketches.hll_sketch(10, kind, True)
        for n in range(3):
            for data in (theirs.serialize_compact(), theirs.serialize_updatable()):
                ours = HllSketch.from_bytes(data)
                assert ours.estimate() == pytest.approx(n, rel=0.01)
            theirs.update(n)


@pytest.mark.parametrize("high", [62, 63])
def test_exceptions_of_four_bits_survive_the_library(high: int) -> None:
    """Registers that no test could wait for: coupons with values of 40 and more."""
    crafted = [value << 26 | slot for slot, value in enumerate([40, 41, high, 15, 16, 17] * 20)]
    head = struct.pack("<BBBBBBBBI", 3, 1, 7, 10, 8, 8, 0, 1, 96)
    sketch = HllSketch.from_bytes(head + struct.pack("<96I", *crafted[:96]))
    sketch.update(np.arange(3000))
    data = sketch.to_bytes("hll4")
    assert struct.unpack("<I", data[36:40])[0] >= 48
    theirs = datasketches.hll_sketch.deserialize(data)
    for written in (data, theirs.serialize_compact(), theirs.serialize_updatable()):
        assert HllSketch.from_bytes(written).registers() == sketch.registers()
    assert theirs.serialize_compact()[:40] == data[:40]
    assert coupons(theirs.serialize_compact()[540:]) == coupons(data[540:])


def test_hashes_of_texts_are_those_of_the_library() -> None:
    """All lengths of a block's tail, twice, in one to four bytes a character."""
    for text in ["é", "日本", "🐟" * 5, "é" * 40]:
        check_text(text)
    for size in range(1, 50):
        check_text(("abcdefghijklmnopq" * 3)[:size])


def check_text(text: str) -> None:
    """Compare the coupon of one text with the library's."""
    theirs, ours = datasketches.hll_sketch(12, datasketches.HLL_4), HllSketch(12)
    theirs.update(text)
    ours.update_texts([text])
    assert ours.to_bytes() == theirs.serialize_compact()


# ---- values ------------------------------------------------------------------------------------


def test_floats_count_by_their_float64_and_nan_not_at_all() -> None:
    """The two zeros are one value; 1 and 1.0 are two."""
    specials = np.array([0.0, -0.0, np.inf, -np.inf, 5e-324, 1e300, np.nan, -np.nan])
    assert made(specials).estimate() == pytest.approx(5.0, abs=1e-5)
    assert made(specials).to_bytes() == made(np.delete(specials, [1, 6, 7])).to_bytes()
    low = np.array([0.1, 0.5, -0.0, np.nan, 1e-45], np.float32)
    assert made(low).to_bytes() == made(low.astype(np.float64)).to_bytes()
    assert made(np.array([1])).to_bytes() != made(np.array([1.0])).to_bytes()
    theirs = library(np.array([0.0, -0.0, np.inf, 0.5]), 12, "hll4")
    assert coupons(made(np.array([0.0, np.inf, 0.5])).to_bytes()) == coupons(
        theirs.serialize_compact()
    )


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float32])
def test_layout_and_batches_do_not_matter(dtype: type) -> None:
    """Blocks of 512 keys, with nulls between, cut anywhere."""
    rng = np.random.default_rng(1)
    grid: NDArray[Any] = (rng.integers(0, 3000, size=(90, 40)) - 1500).astype(dtype)
    if dtype is not np.int64:
        grid[rng.random(grid.shape) < 0.2] = np.nan
    whole = made(grid, 9)
    pieces = HllSketch(9)
    flat, at = grid.ravel()[::-1], 0
    for size in [0, 1, 511, 512, 513, 1024, 1]:
        pieces.update(flat[at : at + size])
        at += size
    pieces.update(flat[at:])
    assert made(grid.T, 9).to_bytes() == pieces.to_bytes() == whole.to_bytes()
    assert made(grid[:0], 9).to_bytes() == HllSketch(9).to_bytes()


def test_texts_empty_ones_are_skipped() -> None:
    """Any iterable will do."""
    sketch = HllSketch()
    sketch.update_texts(text for text in ["a", "", "b", "a"])
    assert sketch.bounds() == (2.0, 2.0)


def test_what_cannot_be_counted_is_refused_and_changes_nothing() -> None:
    """Every argument, wrong in each way."""
    sketch = made(np.arange(5))
    before = sketch.to_bytes()
    values: list[Any] = [[1, 2], np.arange(3, dtype=np.int32), np.array(["a"]), np.array([None])]
    values += [np.array([True]), np.array([1.0], ">f8"), np.array([1j]), 3]
    for each in values:
        with pytest.raises(TypeError):
            sketch.update(each)
    texts: list[Any] = ["one", b"one", ["a", 3], ["a", None], 7]
    for each in texts:
        with pytest.raises(TypeError):
            sketch.update_texts(each)
    with pytest.raises(ValueError, match="surrogates"):
        sketch.update_texts(["a", "\ud800"])
    with pytest.raises(TypeError):
        sketch.merge(b"")  # type: ignore[arg-type]
    for lg_k in (3, 22, -1, 2**70):
        with pytest.raises(ValueError, match="4 to 21"):
            HllSketch(lg_k)
    with pytest.raises(TypeError):
        HllSketch(8.0)  # type: ignore[arg-type]
    for confidence in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            sketch.bounds(confidence)
    with pytest.raises(ValueError, match="hll6"):
        sketch.to_bytes("hll6")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        HllSketch.from_bytes("0201")  # type: ignore[arg-type]
    assert sketch.to_bytes() == before


# ---- error -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lg_k", "n", "trials"), [(4, 400, 3000), (8, 120, 2000), (8, 6000, 1500), (11, 60_000, 400)]
)
def test_standard_error_and_bounds_are_as_stated(lg_k: int, n: int, trials: int) -> None:
    """Known seeds; the room is 4 standard deviations of the measured share."""
    errors, inside = [], 0
    for seed in range(trials):
        sketch = made(numbers(n, seed), lg_k)
        low, high = sketch.bounds(0.95)
        inside += low <= n <= high
        errors.append(sketch.estimate() / n - 1.0)
    spread = math.sqrt(sum(error**2 for error in errors) / trials) / sketch.error_rel
    assert 0.6 < spread < (1.2 if lg_k == 4 else 1.0 + 4 / math.sqrt(2 * trials))
    assert abs(sum(errors) / trials) < (0.35 if lg_k == 4 else 0.2) * sketch.error_rel
    assert inside / trials > 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)


def test_bounds_hold_what_is_certain_and_widen_with_confidence() -> None:
    """Non-empty registers and coupons are proof."""
    sketch = made(numbers(5000), 8)
    before = sketch.bounds(0.5)
    for confidence in (0.8, 0.95, 0.999, 1 - 1e-9):
        low, high = sketch.bounds(confidence)
        assert sketch.read()[1] <= low < before[0] < before[1] < high
        before = low, high
    assert HllSketch(8).bounds() == (0.0, 0.0)
    assert made(numbers(100), 12).bounds(0.9999) == (100.0, 100.0)
    low, high = made(numbers(190_000), 21).bounds(0.99)
    assert low <= 190_000 <= high < low + 250  # coupons shared by two values: about 90


def test_estimates_end_where_hashes_do() -> None:
    """All registers full is beyond every stream; the answer stays finite."""
    data = bytearray(made(np.arange(1000), 4).to_bytes("hll8"))
    data[40:] = b"\x3f" * 16
    sketch = HllSketch.from_bytes(data)
    assert sketch.estimate() == 2.0**88 and sketch.bounds()[1] < math.inf


# ---- merges ------------------------------------------------------------------------------------


@relaxed
@given(
    lgs=st.tuples(st.integers(4, 13), st.integers(4, 13)),
    sizes=st.tuples(st.integers(0, 900), st.integers(0, 900)),
    seed=st.integers(0, 99),
)
def test_a_merge_is_the_sketch_of_the_union(
    lgs: tuple[int, int], sizes: tuple[int, int], seed: int
) -> None:
    """Registers of the smaller lg_k among those that have any."""
    values = numbers(sum(sizes), seed)
    parts = values[: sizes[0] + sizes[1] // 3], values[sizes[0] :]  # some in both
    a, b = (made(part, lg_k) for part, lg_k in zip(parts, lgs, strict=True))
    before = b.to_bytes()
    dense = [sketch.lg_k for sketch in (a, b) if sketch.read()[2] < 0]
    expected = made(values, min([lgs[0], *dense]))
    a.merge(b)
    assert a.lg_k == expected.lg_k and a.registers() == expected.registers()
    assert b.to_bytes() == before
    if a.read()[2] >= 0 or len(dense) == 0:
        assert a.to_bytes() == expected.to_bytes()
    a.update(numbers(50, 1000))  # a folded sketch counts on
    expected.update(numbers(50, 1000))
    assert a.registers() == expected.registers()


def test_a_merge_is_that_of_the_library() -> None:
    """The bytes of its union, folded or not."""
    values = numbers(30_000)
    for lgs in ((12, 10), (10, 12), (11, 11)):
        a, b = made(values[:20_000], lgs[0]), made(values[10_000:], lgs[1])
        union = datasketches.hll_union(max(lgs))
        union.update(datasketches.hll_sketch.deserialize(a.to_bytes()))
        union.update(datasketches.hll_sketch.deserialize(b.to_bytes()))
        a.merge(b)
        assert a.to_bytes() == union.get_result(datasketches.HLL_4).serialize_compact()


def test_a_sketch_merged_with_itself_stays() -> None:
    """The same memory on both sides."""
    for n in (0, 5, 300, 9000):
        sketch = made(numbers(n), 10)
        before = sketch.to_bytes()
        sketch.merge(sketch)
        assert sketch.to_bytes() == before


def test_reset_forgets_all_but_lg_k() -> None:
    """In every mode."""
    for n in (3, 100, 5000):
        sketch = made(numbers(n), 9)
        sketch.reset()
        assert sketch.to_bytes() == HllSketch(9).to_bytes()
        sketch.update(numbers(n))
        assert sketch.to_bytes() == made(numbers(n), 9).to_bytes()


def test_threads_lose_nothing() -> None:
    """Four threads on one sketch, through the change to registers."""
    values = numbers(40_000)
    shared = HllSketch(13)

    def feed(part: NDArray[np.int64]) -> None:
        for row in part:
            shared.update(row)

    threads = [threading.Thread(target=feed, args=(part,)) for part in values.reshape(4, 100, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.to_bytes() == made(values, 13).to_bytes()


# ---- coupons that become registers -------------------------------------------------------------


def as_set(lg_k: int, rows: list[int]) -> bytes:
    """Return the bytes of a set of coupons."""
    return struct.pack(f"<BBBBBBBBI{len(rows)}I", 3, 1, 7, lg_k, 5, 8, 0, 1, len(rows), *rows)


@relaxed
@given(st.data())
def test_coupons_become_registers_wherever_their_slots_lie(data: st.DataObject) -> None:
    """Crowds at the end of the table go on at its start, and must not be overwritten."""
    lg_k = data.draw(st.sampled_from([8, 9, 10]))
    k = 1 << lg_k
    slot = st.sampled_from([0, 1, 2, k - 1, k - 2, k - 5]) | st.integers(0, k - 1)
    row = st.builds(
        lambda value, slot, high: value << 26 | high << lg_k | slot,
        st.integers(1, 63), slot, st.integers(0, 9),
    )  # fmt: skip
    rows = data.draw(st.lists(row, unique=True, max_size=3 * k // 32))
    sketch = HllSketch.from_bytes(as_set(lg_k, rows))
    assert coupons(HllSketch.from_bytes(sketch.to_bytes()).to_bytes()) == sorted(rows)
    expected = np.zeros(k, np.uint8)
    for each in rows:
        expected[each & (k - 1)] = max(expected[each & (k - 1)], each >> 26)
    assert sketch.registers() == expected.tobytes()
    more = numbers(2000)
    sketch.update(more)
    again = made(more, lg_k).registers()
    assert sketch.registers() == np.maximum(expected, np.frombuffer(again, np.uint8)).tobytes()


def test_crowded_coupons_become_registers_early() -> None:
    """Crafted coupons with one home would each cost a walk past all the others."""
    rows = [value << 26 | high << 21 for value in range(1, 64) for high in range(32)]
    sketch = HllSketch.from_bytes(as_set(21, rows))
    assert sketch.read()[1:] == (1, -1)
    assert sketch.registers()[:2] == b"\x3f\0"


# ---- bytes that are none -----------------------------------------------------------------------


def changed(data: bytes, *edits: tuple[int, int]) -> bytes:
    """Return bytes with some replaced."""
    out = bytearray(data)
    for at, value in edits:
        out[at] = value
    return bytes(out)


FOUR = made(np.arange(1000), 8).to_bytes("hll4")
EIGHT = made(np.arange(1000), 8).to_bytes("hll8")
HIGH = HllSketch.from_bytes(changed(EIGHT, (40, 63))).to_bytes("hll4")
REFUSED: list[tuple[str, bytes]] = [
    ("fewer than 8", b""),
    ("fewer than 8", LIST[:7]),
    ("not an HLL", changed(LIST, (2, 15))),
    ("version", changed(LIST, (1, 2))),
    ("flags", changed(LIST, (5, 9))),  # big-endian
    ("mode", changed(LIST, (7, 3))),
    ("mode", changed(LIST, (7, 12))),
    ("mode", changed(LIST, (7, 16))),
    ("head whose length", changed(LIST, (0, 3))),
    ("lg_k out", changed(LIST, (3, 3))),
    ("lg_k out", changed(LIST, (3, 22))),
    ("more coupons than the mode", changed(LIST, (6, 8))),
    ("length", LIST[:-1]),
    ("length", LIST[:-4]),
    ("length", LIST + bytes(4)),
    ("without a value", changed(LIST, (11, 0))),
    ("without a value", LIST[:8] + bytes(4) + LIST[12:]),
    ("twice", LIST[:12] + LIST[8:12] + LIST[16:]),
    ("empty sketch", changed(LIST, (5, 12))),
    ("cut off", SET[:11]),
    ("more coupons than the mode", changed(SET, (8, 25))),
    ("more coupons than the mode", changed(SET, (11, 255))),
    ("fewer coupons", changed(SET, (5, 0), (8, 11))),
    ("more coupons than said", changed(SET, (5, 0), (8, 9))),
    ("length", FOUR[:39]),
    ("length", FOUR[:-1]),
    ("length", FOUR + b"\0"),
    ("length", FOUR + bytes(4)),
    ("length", EIGHT[:-1]),
    ("length", EIGHT + b"\0"),
    ("where none can", changed(EIGHT, (36, 1))),
    ("above 63", changed(EIGHT, (40, 64))),
    ("above 63", changed(FOUR, (6, 63))),
    ("exceptions that are not", changed(HIGH, (36, 2))),
    ("exceptions that are not", changed(HIGH, (36, 0))),
    ("of a register that has none", changed(HIGH, (-4, 1))),
    ("of a register that has none", changed(HIGH, (-3, 1))),
    ("too low", changed(HIGH, (-1, 12))),
    ("without its exception", changed(HIGH, (5, 0), *((i, 0) for i in (-1, -2, -3, -4)))),
    ("empty sketch", changed(EIGHT, (5, 28))),
]


@pytest.mark.parametrize(("reason", "data"), REFUSED)
def test_what_no_stream_gives_is_refused(reason: str, data: bytes) -> None:
    """Each check of the reader, by its reason."""
    with pytest.raises(SketchRecordError, match=reason):
        HllSketch.from_bytes(data)


def test_a_larger_sketch_than_wanted_is_refused() -> None:
    """Its memory is bounded by the caller."""
    with pytest.raises(SketchRecordError, match="lg_k 8 is above 7"):
        HllSketch.from_bytes(LIST, lg_k_max=7)
    wide: list[Callable[[bytes], Any]] = [bytearray, memoryview, bytes]
    for form in wide:
        assert HllSketch.from_bytes(form(LIST), lg_k_max=8).estimate() == pytest.approx(3)


def test_a_sketch_is_filled_once() -> None:
    """Loading is for a new one; a used one stays as it is."""
    sketch = made(np.arange(3), 9)
    assert sketch.load(LIST) == "for another sketch"
    assert sketch.to_bytes() == made(np.arange(3), 9).to_bytes()


def test_mutations_give_a_sketch_or_are_refused() -> None:
    """In a process of its own: a crash must be seen as one."""
    done = subprocess.run(
        [sys.executable, FUZZ, "--mutations", "15000", "--seed", "7"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15000 mutations" in done.stdout


def test_the_hash_is_that_of_its_key() -> None:
    """The short way for 8 bytes and the general one agree."""
    for value in (0, 1, -1, 2**62):
        data = struct.pack("<q", value)
        assert coupons(made(np.array([value])).to_bytes()) == [_hll.coupon(data)]
