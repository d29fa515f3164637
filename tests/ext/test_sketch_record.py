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

from shoal.ext import sketch_record
from shoal.ext.errors import KernelError
from shoal.ext.kll import BulkMerger, read_kll
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

# Made by version 2 on x86-64. Never edit: devices in the field write these bytes.
GOLDEN = bytes.fromhex(
    "534b424b0201c8000200000002e835e519f97dda24ae63a4216447e802000000"
    "0000000000000000f03f0000000000000040000000000000f0ff000000000000"
    "00400000000000001c4000000000000000000000000000001c40000000000000"
    "1c4000000000000000000000000000000000c800c80000000000003f00000040"
    "00010002000102000001000080ff00000000000000400000e040f12f3558"
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
    assert data[:12] == b"SKBK" + bytes([2, 1, 200, 0]) + (2).to_bytes(4, "little")
    sizes = struct.pack("<HH", 2, 0)
    edges = struct.pack("<ff", 0.5, 2.0)
    assert data[12:28] == hashlib.sha256(sizes + edges).digest()[:16]
    assert data[28:34] == sizes + bytes([0, 0])
    assert struct.unpack_from("<8d", data, 34) == (1, 2, -np.inf, 2, 7, 0, 7, 7)
    assert struct.unpack_from("<2d2H2B", data, 98) == (0, 0, 200, 200, 0, 0)
    assert data[120:128] == edges
    assert list(data[128:138]) == [0, 1, 0, 2, 0, 1, 2, 0, 0, 1]
    assert struct.unpack_from("<4f", data, 138) == (-np.inf, 0, 2, 7)
    assert data[154:] == zlib.crc32(data[:-4]).to_bytes(4, "little")


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 100, 70_000])
def test_all_comes_back(rows: int, edges: bool) -> None:
    """Counts, moments and nulls are exact, in every width of counters; and so it does again."""
    bank = example(4, rows)
    data = bank.to_bytes(edges=edges)
    back = SketchBank.from_bytes(data)
    assert back.to_bytes(edges=edges) == data
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
    for i in range(3):
        assert whole.counts(i).tolist() == bank.counts(i).tolist()
        assert repr(whole.moments(i)) == repr(bank.moments(i))
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


@pytest.mark.parametrize("kind", ["float", "double", "integer"])
@pytest.mark.parametrize("edges", [3, 40])
def test_a_double_that_is_no_float_comes_back(kind: str, edges: int) -> None:
    """Below the smallest float, above the largest one: the record of such a bank is read."""
    bank = SketchBank(1, edges=[np.arange(edges, dtype=F32)], kinds=[kind])
    x = np.array([-1e-60, 1e-60, -0.0, 1e300, -1e300, np.inf]).reshape(-1, 1)
    bank.update(x)
    back = SketchBank.from_bytes(bank.to_bytes())
    assert back.counts(0).tolist() == bank.counts(0).tolist()
    assert back.moments(0) == bank.moments(0) or np.isnan(back.moments(0).variance)


def test_a_variance_is_at_most_the_square_of_the_values() -> None:
    """A larger one says nothing more, and sums of such would overflow."""
    bank = SketchBank(1)
    bank.update(np.zeros((10, 1), F32))
    data = bytearray(bank.to_bytes())
    at = data.index(struct.pack("<d", 0.0), 28 + 3 + 32)
    for variance, taken in ((100.0, True), (100.1, False), (1.7e308, False)):
        data[at : at + 8] = struct.pack("<d", variance)
        forged = seal(bytes(data[:-4]))
        if taken:
            assert SketchBank.from_bytes(forged).variance_certificate(0) == variance
        else:
            with pytest.raises(SketchRecordError, match="variance"):
                SketchBank.from_bytes(forged)
    merger = BulkMerger()
    for _ in range(3):
        merger.add(bank.kll_bytes(0), 1.7e308)
    assert merger.variance == 300.0


def test_a_forged_digest_is_no_way_into_other_sizes() -> None:
    """A record may claim any digest; banks of other sizes still do not merge."""
    bank = SketchBank(1, edges=[np.array([0, 1], F32)])
    data = bytearray(SketchBank(1, edges=[np.arange(50, dtype=F32)]).to_bytes())
    data[12:28] = bank.to_bytes()[12:28]
    forged = SketchBank.from_bytes(seal(bytes(data[:-4])))
    for one, two in ((bank, forged), (forged, bank)):
        with pytest.raises(SketchMismatchError):
            one.merge(two)


@pytest.mark.parametrize("k", [8, 64, 200, 4000])
@pytest.mark.parametrize("edges", [0, 15, 31])
def test_a_record_keeps_its_budget(k: int, edges: int) -> None:
    """350 bytes a feature, for any k and n; a smaller budget too, while the counters fit."""
    rng = np.random.default_rng(k + edges)
    for features, kinds in ((1, None), (7, None), (4, ["float", "double", "integer", "category"])):
        bank = SketchBank(
            features, k=k, edges=[np.linspace(-2, 2, edges, dtype=F32)] * features, kinds=kinds
        )
        for rows in (1, 3, 60, 5_000, 60_000):
            bank.update(rng.standard_normal((rows, features)).round(3))
            assert len(bank.to_bytes()) <= 350 * features
            assert len(bank.to_bytes(bytes_max=250)) <= 250 * features


@pytest.mark.parametrize("edges", [49, 63, 100, 127])
def test_many_edges_leave_room_for_few_picks(edges: int) -> None:
    """The budget is kept as long as the exact counters leave room for two picks."""
    bank = SketchBank(1, edges=[np.linspace(-2, 2, edges, dtype=F32)])
    rng = np.random.default_rng(edges)
    for rows in (1, 8, 90, 900, 1_620, 9_000, 90_000):
        bank.update(rng.standard_normal((rows, 1), F32))
        assert len(bank.to_bytes()) <= 350
        assert len(SketchBank.from_bytes(bank.to_bytes()).quantiles(0, [0.5])) == 1


def test_the_certificate_covers_the_shrink() -> None:
    """Rank errors of what comes back stay within its V; shrinking does not bend ranks."""
    at = np.linspace(-2, 2, 9)
    errors, beyond, trials = [], 0, 300
    for seed in range(trials):
        x = np.random.default_rng(seed).standard_normal((3000, 1), F32)
        bank = SketchBank(1, seed=seed)
        bank.update(x)
        back = SketchBank.from_bytes(bank.to_bytes())
        assert back.variance_certificate(0) > bank.variance_certificate(0)
        error = (back.ranks(0, at) - np.searchsorted(np.sort(x[:, 0]), at, "right") / 3000) * 3000
        errors.append(error)
        limit = np.sqrt(2 * back.variance_certificate(0) * np.log(2 / 0.01))
        beyond += int((np.abs(error) > limit).sum())
    assert beyond <= 0.01 * trials * len(at)
    spread = np.std(errors, axis=0) / np.sqrt(trials)
    assert (np.abs(np.mean(errors, axis=0)) < 5 * spread).all()


def test_bins_only_holds_no_value() -> None:
    """For privacy: no extremes, no moments, no sketch; what it touches has none either."""
    bank = example()
    data = bank.to_bytes(bins_only=True)
    back = SketchBank.from_bytes(data)
    assert back.bins_only and back.to_bytes() == data
    assert len(data) < 200
    for i in range(3):
        assert back.counts(i).tolist() == bank.counts(i).tolist()
        assert back.moments(i).count == bank.moments(i).count
        assert np.isnan(back.moments(i)[1:]).all()
    with pytest.raises(ValueError, match="bins alone"):
        back.quantiles(0, 0.5)
    with pytest.raises(ValueError, match="bins alone"):
        back.ranks(0, 0.5)
    with pytest.raises(ValueError, match="bins alone"):
        back.kll_bytes(0)
    bank.merge(back)
    assert bank.bins_only and np.isnan(bank.moments(0).mean)
    bank.reset()
    assert not bank.bins_only


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
        (4, b"\x01", "version 1"),
        (5, b"\x07", "flags 7"),
        (5, b"\x00", "bins do not add up"),  # edges would not travel
        (5, b"\x03", "digest"),  # bins only: then the edges lie elsewhere
        (6, b"\x07", "k 7"),
        (8, bytes(4), "0 features"),
        (8, b"\x01\x00\x01\x00", "65537 features"),
        (8, b"\xff\xff\xff\xff", "4294967295 features"),
        (8, b"\xff\xff\x00\x00", "bytes are left where"),
        (12, b"\x00", "digest"),
        (28, b"\xff\xff", "bytes are left where"),
        (32, b"\x04", "kind 4"),
        (32, b"\x01", "bytes are left where"),  # doubles
        (34, struct.pack("<d", 3.0), "feature 0 are impossible"),  # mean beyond maximum
        (34, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (42, struct.pack("<d", -1.0), "feature 0 are impossible"),  # negative squares
        (42, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (50, struct.pack("<d", -5.0), "feature 0 are impossible"),  # finite, but -inf was seen
        (58, struct.pack("<d", np.inf), "feature 0 are impossible"),  # +inf was never seen
        (58, struct.pack("<d", np.nan), "feature 0 are impossible"),
        (66, struct.pack("<d", 7.5), "feature 1 are impossible"),
        (74, struct.pack("<d", 1.0), "feature 1 are impossible"),  # one value has no variance
        (82, struct.pack("<d", 8.0), "feature 1 are impossible"),  # minimum beyond maximum
        (98, struct.pack("<d", -1.0), "variance"),
        (98, struct.pack("<d", np.nan), "variance"),
        (98, struct.pack("<d", np.inf), "variance"),
        (114, b"\x07\x00", "smallest k of 7"),
        (114, b"\xc9\x00", "smallest k of 201"),
        (118, b"\x02", "picks of 2^2"),
        (118, b"\xff", "picks of 2^255"),
        (118, b"\x01", "outside its extremes"),
        (120, struct.pack("<f", 2.0), "edges do not ascend"),
        (120, struct.pack("<f", np.nan), "edges do not ascend"),
        (120, struct.pack("<f", -0.0), "-0.0"),
        (124, struct.pack("<f", np.nan), "edges do not ascend"),
        (120, struct.pack("<f", 0.25), "digest"),
        (129, b"\x04", "bins do not add up"),  # more infinities than values
        (
            137,
            b"\x00",
            "feature 1 are impossible",
        ),  # no values, but moments
        (137, b"\x80", "shortest form"),
        (138, struct.pack("<f", 1.0), "do not ascend"),
        (142, struct.pack("<f", np.nan), "do not ascend"),
        (142, struct.pack("<f", -0.0), "-0.0"),
        (146, struct.pack("<f", 3.0), "outside its extremes"),
    ],
)
def test_refuses_a_whole_record_that_breaks_a_rule(at: int, patch: bytes, said: str) -> None:
    """The checksum is right, the content cannot be: a faulty or hostile writer."""
    data = bytearray(GOLDEN[:-4])
    data[at : at + len(patch)] = patch
    assert said in refused(seal(bytes(data)))


def varint(value: int) -> bytes:
    """Return unsigned LEB128."""
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        ([0, 0, 0, 2**53 + 1], "more than a bank can hold"),
        ([2**56 - 1, 0, 0, 1], "more than a bank can hold"),
        ([2**63 - 1, 0, 0, 1], "shortest form"),
        ([0, 0, 0, 2**53, 1], "bins do not add up"),
        ([0, 0, 0, *[2**53] * 2000], "more values than a bank"),
    ],
)
def test_refuses_counters_beyond_their_bounds(counters: list[int], said: str) -> None:
    """Sums that would overflow 64 bits, and numbers that no bank writes."""
    head = struct.pack("<4sBBHI16sHB", b"SKBK", 2, 2, 200, 1, bytes(16), len(counters) - 4, 0)
    assert said in refused(seal(head + b"".join(map(varint, counters))))


def test_refuses_items_that_are_none() -> None:
    """The sketches of an integer are checked as their own readers check them."""
    bank = SketchBank(1, kinds=["category"])
    bank.update(np.arange(60.0).reshape(-1, 1) % 20)
    data = bank.to_bytes()
    assert SketchBank.from_bytes(data).frequent(0) == bank.frequent(0)
    items = sketch_record.pack_items(bank.frequent_bytes(0))
    at = data.index(items)
    for patch, said in (
        (b"\x19" + items[1:], "25 frequent items"),
        (items[:1] + b"\x3d" + items[2:], "places and 61"),
        (b"\x00" + items[1:3], "none that a sketch writes"),
        (items[:3] + items[5:7] + items[3:5] + items[7:], "not in their order"),
        (items[:3] + b"\x83\x00" + items[4:], "shortest form"),
        (items[:3] + b"\xff" * 9 + b"\x02" + items[4:], "shortest form"),
        (items[:3] + b"\xff" * 9 + b"\x01" + items[4:], "beyond 64 bits"),
    ):
        assert said in refused(seal(data[:at] + patch + data[at + len(items) : -4]))
    hll = data.index(b"\x03\x01\x07")
    refused(seal(data[:hll] + b"\x04" + data[hll + 1 : -4]))


def test_allocates_nothing_on_a_claimed_size() -> None:
    """A record of 100 bytes that claims 65,536 features of 65,535 edges takes no memory."""
    head = struct.pack("<4sBBHI16s", b"SKBK", 2, 1, 65_535, 65_536, bytes(16))
    claim = seal(head + b"\xff" * 72)
    many = seal(head[:8] + struct.pack("<I", 2) + bytes(16) + b"\xff" * 4 + bytes(64))
    refused(claim)  # imports and caches are paid before measuring
    tracemalloc.start()
    refused(claim)
    refused(many)
    small = SketchBank(1, k=65_535)
    small.update(np.ones((1, 1)))
    SketchBank.from_bytes(small.to_bytes())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def kinds() -> SketchBank:
    """Return a bank with a feature of each kind."""
    bank = SketchBank(4, k=8, kinds=["float", "double", "integer", "category"])
    bank.update(np.random.default_rng(5).geometric(0.1, (700, 4)).astype(F32))
    return bank


SEEDS = [
    GOLDEN,
    example().to_bytes(),
    example(4, 300).to_bytes(edges=True),
    SketchBank(1).to_bytes(),
    example(3, 90).to_bytes(bins_only=True),
    kinds().to_bytes(),
]


def survives(data: bytes) -> None:
    """Assert the invariant: a bank of these bytes, usable in all ways, or SketchRecordError."""
    try:
        bank = SketchBank.from_bytes(data)
    except SketchRecordError:
        return
    assert sketch_record.encode(sketch_record.decode(data)) == data
    for i in range(bank.features):
        moments = bank.moments(i)
        assert bank.counts(i).sum() == moments.count
        assert not moments.variance < 0
        if not bank.bins_only and bank.kinds[i] != "category":
            assert read_kll(bank.kll_bytes(i)).n == moments.count
        if not bank.bins_only and bank.kinds[i] in ("integer", "category"):
            assert bank.distinct(i)[0] >= 0 <= len(bank.frequent(i))
    bank.to_bytes()
    try:
        bank.merge(bank)
    except SketchMismatchError as error:
        assert "values together" in str(error)
    if data[5] & 1:
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
    """Bytes of every seed replaced by telling values, checksum right; `make fuzz` does them all."""
    rng = random.Random(0)
    for seed in SEEDS:
        for at in rng.sample(range(len(seed) - 4), min(len(seed) - 4, 120)):
            value = rng.choice([0, 1, 2, 8, 0x7F, 0x80, 0xF0, 0xFF, rng.randrange(256)])
            survives(seal(seed[:at] + bytes([value]) + seed[at + 1 : -4]))


@pytest.mark.parametrize("kind", ["integer", "category"])
@pytest.mark.parametrize("distinct", [1, 6, 7, 12, 13, 23, 24, 25, 48])
def test_any_number_of_items_travels(kind: str, distinct: int) -> None:
    """Tables that are full to the last place too."""
    bank = SketchBank(1, kinds=[kind])
    bank.update(np.arange(float(distinct)).repeat(40).reshape(-1, 1))
    back = SketchBank.from_bytes(bank.to_bytes(bytes_max=10_000))
    assert back.frequent(0) == bank.frequent(0)
    assert SketchBank.from_bytes(bank.to_bytes()).nulls(0) == 0
