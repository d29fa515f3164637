"""The record of a bank: vectors, properties and faults.

The invariant: whatever bytes come, ``from_bytes`` yields a bank whose record is those bytes, or
raises SketchRecordError; and a bank that was written comes back to the bit.
"""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ext.errors import KernelError
from shoal.ext.sketch import SketchBank, SketchMismatchError, SketchRecordError

F32 = np.float32
relaxed = settings(deadline=None, max_examples=200)


def seal(body: bytes) -> bytes:
    """Append the checksum that makes a body whole."""
    return body + struct.pack("<I", zlib.crc32(body))


def example(features: int = 3, rows: int = 500, seed: int = 0) -> SketchBank:
    """Return a bank with nulls and infinities, a feature without edges and one without values."""
    rng = np.random.default_rng(seed)
    bank = SketchBank(
        features, edges=[np.linspace(-2, 2, 5 * i, dtype=F32) for i in range(features)]
    )
    if rows:
        x = rng.standard_normal((rows, features))
        x[::11, 0] = np.nan
        x[3::17, features // 2] = np.inf
        x[:, -1] = np.nan if features > 2 else 1.0
        bank.update(x)
    return bank


# ---- vectors -------------------------------------------------------------------------------------

# Made by version 1 on x86-64. Never edit: devices in the field write these bytes.
GOLDEN = bytes.fromhex(
    "534b424b010101000200000002e835e519f97dda24ae63a4216447e802000000"
    "000000000000f03f0000000000000040000000000000f0ff0000000000000040"
    "0000000000001c4000000000000000000000000000001c400000000000001c40"
    "0000003f0000004000010002000102000001be02b496"
)


def golden_bank() -> SketchBank:
    """Return the bank that the golden bytes are of."""
    bank = SketchBank(2, edges=[np.array([0.5, 2.0], F32), np.array([], F32)])
    bank.update(np.array([[0.0, 7.0], [2.0, np.nan], [-np.inf, np.nan]]))
    return bank


def test_golden() -> None:
    """The bytes never change."""
    assert golden_bank().to_bytes(edges=True) == GOLDEN
    assert SketchBank.from_bytes(GOLDEN).to_bytes(edges=True) == GOLDEN


def test_every_field_is_where_the_format_says() -> None:
    """Read with struct alone, by the table in the module's head; little-endian everywhere."""
    data = golden_bank().to_bytes(edges=True)
    assert data[:12] == b"SKBK" + bytes([1, 1, 1, 0]) + (2).to_bytes(4, "little")
    sizes = struct.pack("<HH", 2, 0)
    edges = struct.pack("<ff", 0.5, 2.0)
    assert data[12:28] == hashlib.sha256(sizes + edges).digest()[:16]
    assert data[28:32] == sizes
    assert struct.unpack_from("<8d", data, 32) == (1, 2, -np.inf, 2, 7, 0, 7, 7)
    assert data[96:104] == edges
    assert list(data[104:-4]) == [0, 1, 0, 2, 0, 1, 2, 0, 0, 1]
    assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 100, 70_000])
def test_all_comes_back(rows: int, edges: bool) -> None:
    """Counts, moments and nulls are exact, in every width of counters."""
    bank = example(4, rows)
    back = SketchBank.from_bytes(bank.to_bytes(edges=edges))
    assert back.to_bytes(edges=edges) == bank.to_bytes(edges=edges)
    for i in range(4):
        assert back.counts(i).tolist() == bank.counts(i).tolist()
        assert back.nulls(i) == bank.nulls(i)
        assert np.array_equal([*back.moments(i)], [*bank.moments(i)], equal_nan=True)


def test_a_restored_bank_goes_on() -> None:
    """With its edges it counts as if it had never been away; without it only merges."""
    more = np.random.default_rng(9).standard_normal((50, 3))
    bank, whole, bare = example(), example(), example()
    bank.update(more)
    whole = SketchBank.from_bytes(whole.to_bytes(edges=True))
    whole.update(more)
    assert whole.to_bytes() == bank.to_bytes()
    bare = SketchBank.from_bytes(bare.to_bytes())
    before = bare.to_bytes()
    with pytest.raises(ValueError, match="restored without its edges"):
        bare.update(more)
    with pytest.raises(ValueError, match="restored without its edges"):
        bare.to_bytes(edges=True)
    assert bare.to_bytes() == before
    bare.reset()
    assert bare.to_bytes() == example(rows=0).to_bytes()


def test_restored_banks_merge() -> None:
    """Records with edges, records without and live banks, in any direction."""
    bank = example(seed=1)
    bare = SketchBank.from_bytes(example(seed=2).to_bytes())
    whole = SketchBank.from_bytes(example(seed=3).to_bytes(edges=True))
    bank.merge(bare)
    bank.merge(whole)
    bare.merge(whole)
    bare.merge(SketchBank.from_bytes(example(seed=1).to_bytes()))
    for i in range(3):
        assert bank.counts(i).tolist() == bare.counts(i).tolist()
        assert bank.moments(i).count == bare.moments(i).count
    with pytest.raises(SketchMismatchError):
        bare.merge(example(2))


def test_a_forged_digest_is_no_way_into_other_sizes() -> None:
    """A record may claim any digest; banks of other sizes still do not merge."""
    bank = SketchBank(1, edges=[np.array([0, 1], F32)])
    data = bytearray(SketchBank(1, edges=[np.arange(50, dtype=F32)]).to_bytes())
    data[12:28] = bank.to_bytes()[12:28]
    forged = SketchBank.from_bytes(seal(bytes(data[:-4])))
    for one, two in ((bank, forged), (forged, bank)):
        with pytest.raises(SketchMismatchError):
            one.merge(two)


def test_a_window_is_small() -> None:
    """Seven features of 32 bins over 10,000 values: what the demo's devices send each minute."""
    bank = SketchBank(7, edges=[np.linspace(-2, 2, 31, dtype=F32)] * 7)
    bank.update(np.random.default_rng(0).standard_normal((10_000, 7)))
    assert len(bank.to_bytes()) <= 7 * 110


def test_takes_any_bytes_like() -> None:
    """What sockets and files give."""
    data = example().to_bytes()
    for form in (bytearray(data), memoryview(data), memoryview(b"x" + data)[1:]):
        assert SketchBank.from_bytes(form).to_bytes() == data
    with pytest.raises(TypeError, match="got str"):
        SketchBank.from_bytes("SKBK")  # type: ignore[arg-type]


# ---- faults --------------------------------------------------------------------------------------


def refused(data: bytes) -> str:
    """Return why a record is refused."""
    with pytest.raises(SketchRecordError) as caught:
        SketchBank.from_bytes(data)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KernelError)
    return str(caught.value)


def test_every_cut_and_every_flipped_bit_is_refused() -> None:
    """A CRC-32 finds every single error; the length every cut."""
    data = example(2, 20).to_bytes(edges=True)
    for size in range(len(data)):
        refused(data[:size])
    refused(data + b"\0")
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(bytes(damaged))


@pytest.mark.parametrize(
    ("at", "patch", "said"),
    [
        (0, b"X", "does not begin"),
        (4, b"\x02", "version 2"),
        (5, b"\x03", "flags 3"),
        (5, b"\x00", "that its sizes make"),  # edges would not travel
        (6, b"\x03", "width 3"),
        (6, b"\x00", "width 0"),
        (6, b"\x02", "that its sizes make"),
        (7, b"\x01", "zero byte 1"),
        (8, bytes(4), "0 features"),
        (8, b"\x01\x00\x01\x00", "65537 features"),
        (8, b"\xff\xff\xff\xff", "4294967295 features"),
        (8, b"\xff\xff\x00\x00", "too short for 65535 features"),
        (12, b"\x00", "digest"),
        (28, b"\xff\xff", "that its sizes make"),
        (32, struct.pack("<d", 3.0), "feature 0 are impossible"),  # mean beyond maximum
        (32, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (40, struct.pack("<d", -1.0), "feature 0 are impossible"),  # negative squares
        (40, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (48, struct.pack("<d", -5.0), "feature 0 are impossible"),  # finite, but -inf was seen
        (56, struct.pack("<d", np.inf), "feature 0 are impossible"),  # +inf was never seen
        (56, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (64, struct.pack("<d", 7.5), "feature 1 are impossible"),
        (72, struct.pack("<d", 1.0), "feature 1 are impossible"),  # one value has no variance
        (80, struct.pack("<d", 8.0), "feature 1 are impossible"),  # minimum beyond maximum
        (96, struct.pack("<f", 2.0), "edges do not ascend"),
        (96, struct.pack("<f", np.nan), "edges do not ascend"),
        (96, struct.pack("<f", -0.0), "-0.0"),
        (100, struct.pack("<f", np.nan), "edges do not ascend"),
        (96, struct.pack("<f", 0.25), "digest"),
        (105, b"\x04", "bins do not add up"),  # more infinities than values
        (113, b"\x00", "feature 1 are impossible"),  # counts of a feature without moments
    ],
)
def test_refuses_a_whole_record_that_breaks_a_rule(at: int, patch: bytes, said: str) -> None:
    """The checksum is right, the content cannot be: a faulty or hostile writer."""
    data = bytearray(GOLDEN[:-4])
    data[at : at + len(patch)] = patch
    assert said in refused(seal(bytes(data)))


@pytest.mark.parametrize(
    ("counters", "width", "said"),
    [
        ([0, 0, 0, 2**53 + 1], 8, "does not belong"),
        ([2**64 - 1, 0, 0, 1], 8, "does not belong"),
        ([0, 0, 0, 2**53, 1], 8, "bins do not add up"),
        ([0, 0, 0, *[2**53] * 2000], 8, "more values than a bank"),
        ([0, 0, 0, 200], 2, "does not belong"),
        ([0, 0, 0, 200], 8, "does not belong"),
    ],
)
def test_refuses_counters_beyond_their_bounds(counters: list[int], width: int, said: str) -> None:
    """Sums that would overflow 64 bits, and numbers written longer than they are."""
    edges_n = len(counters) - 4
    head = struct.pack("<4sBBBBI16sH", b"SKBK", 1, 0, width, 0, 1, bytes(16), edges_n)
    reals = struct.pack("<4d", 1.0, 0.0, 1.0, 1.0)
    body = b"".join(count.to_bytes(width, "little") for count in counters)
    assert said in refused(seal(head + reals + body))


def test_allocates_nothing_on_a_claimed_size() -> None:
    """A record of 100 bytes that claims 65,536 features of 65,535 edges takes no memory."""
    head = struct.pack("<4sBBBBI16s", b"SKBK", 1, 1, 8, 0, 65_536, bytes(16))
    claim = seal(head + b"\xff" * 72)
    many = seal(head[:8] + struct.pack("<I", 2) + bytes(16) + b"\xff" * 4 + bytes(64))
    refused(claim)  # imports and caches are paid before measuring
    tracemalloc.start()
    refused(claim)
    refused(many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


SEEDS = [
    GOLDEN,
    example().to_bytes(),
    example(4, 300).to_bytes(edges=True),
    SketchBank(1).to_bytes(),
]


def survives(data: bytes) -> None:
    """Assert the invariant: a bank of these bytes, usable in all ways, or SketchRecordError."""
    try:
        bank = SketchBank.from_bytes(data)
    except SketchRecordError:
        return
    assert bank.to_bytes(edges=bool(data[5])) == data
    for i in range(bank.features):
        moments = bank.moments(i)
        assert bank.counts(i).sum() == moments.count
        assert not moments.variance < 0
    try:
        bank.merge(bank)
    except SketchMismatchError as error:
        assert "values together" in str(error)
    if data[5]:
        bank.update(np.array([[0.5] * bank.features] * 20))
    bank.reset()


@relaxed
@given(data=st.binary(max_size=200), whole=st.booleans())
def test_any_bytes(data: bytes, whole: bool) -> None:
    """Bytes from nowhere, with and without a right checksum."""
    survives(seal(data) if whole else data)


@relaxed
@given(
    seed=st.sampled_from(SEEDS),
    patches=st.lists(
        st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=4
    ),
    whole=st.booleans(),
)
def test_mutated_records(seed: bytes, patches: list[tuple[int, bytes]], whole: bool) -> None:
    """Records with bytes overwritten; most with the checksum made right again."""
    data = bytearray(seed[:-4] if whole else seed)
    for at, patch in patches:
        at %= len(data)
        data[at : at + len(patch)] = patch
    survives(seal(bytes(data)) if whole else bytes(data))


def test_many_single_byte_mutations() -> None:
    """Every byte of every seed replaced by telling values, checksum right: quick and complete."""
    rng = random.Random(0)
    for seed in SEEDS:
        for at in range(len(seed) - 4):
            for value in {0, 1, 2, 8, 0x7F, 0x80, 0xF0, 0xFF, rng.randrange(256)}:
                survives(seal(seed[:at] + bytes([value]) + seed[at + 1 : -4]))
