"""Write a bank's state as bytes, and read bytes that may be anything.

    offset   size   what (little-endian, no padding)
    0        4      magic "SKBK"
    4        1      version, 2
    5        1      flags: bit 0, the edges travel, else their digest alone does; bit 1, bins only
    6        2      k, 8 to 65,535
    8        4      D, number of features, 1 to 65,536
    12       16     first half of the SHA-256 of (sizes, edges) as they stand below
    28       2 D    sizes: number of edges of each feature
    …        D      kinds, one byte each: 0 float, 1 double, 2 integer, 3 category
    …        32 D   mean, sum of squares around it (both of the finite values), minimum, maximum
                    (of all values), float64 each, feature by feature         (not if bins only)
    …        8 D    variance of the rank error, squared counts, up to the square
                    of the values, float64                                    (not if bins only)
    …        2 D    smallest k that took part in the sketch                   (not if bins only)
    …        D      s: a pick stands for 2^s values                           (not if bins only)
    …        4 E    edges, float32, feature by feature, if they travel; E = sum of sizes
    …        L      counters: nulls, -inf, +inf, bins…, feature by feature; K = E + 4 D of them,
                    unsigned LEB128 in its shortest form
    …        P      picks, ascending within a feature, float32 or float64 by kind: (n >> s) that
                    stand for 2^s values each and, if n is no multiple of it, one more that stands
                    for the rest; n = values of the feature; none of a category. Behind those of
                    an integer or category: 2 bytes of length and its distinct values as Apache
                    DataSketches' HLL; its frequent items as LEB128: how many, total, the most that
                    a count may be too low, then count and item (zigzag) of each, the most
                    frequent first, equal ones by item                        (not if bins only)
    …        4      CRC-32 of all before

Rule 1: whatever bytes come, ``decode`` returns a record that keeps every rule of ``_check``, or
raises SketchRecordError. Rule 2: it allocates in proportion to the bytes it got, never to a
number in them. Rule 3: a state has one encoding, so ``encode(decode(b)) == b``.

Axes: D features, E edges of all of them, K counters of all of them, P picks of all of them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ._sketch import VALUES_MAX, capacity
from .errors import SketchRecordError
from .frequent import FrequentItems
from .hll import HllSketch

FEATURES_MAX: Final = 1 << 16
"""Features of a bank: a row of them is 256 KiB, more is no sensor."""
EDGES_MAX: Final = (1 << 16) - 1
"""Edges of one feature: what 2 bytes hold."""
K_MIN: Final = 8
K_MAX: Final = (1 << 16) - 1
SHIFT_MAX: Final = 53
DISTINCT_LG_K: Final = 8
"""Of a feature's distinct values, in memory."""
FREQUENT_LG: Final = 5
"""Of a feature's frequent items: 24 of them."""
KINDS: Final = ("float", "double", "integer", "category")
"""What a feature's sketch keeps, by the number in a record."""

_HEAD: Final = struct.Struct("<4sBBHI16s")
_TAIL: Final = struct.Struct("<I")
_MAGIC: Final = b"SKBK"
_VERSION: Final = 2
_FREQUENT_HEAD: Final = struct.Struct("<BBBBBBH")
_FREQUENT_FULL: Final = struct.Struct("<IIQQ")
_FREQUENT_ITEMS: Final = 3 << FREQUENT_LG - 2
_EDGES_TRAVEL: Final = 1
_BINS_ONLY: Final = 2
_COUNTER_BYTES: Final = 8  # LEB128 of 2^53: 54 bits in groups of 7
_PER_FEATURE: Final = 32 + 8 + 2 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRecord:
    """All that a bank counted."""

    k: int
    """Size parameter of the sketches, 8 to 65535."""
    sizes__d: NDArray[np.int64]
    """Number of edges of each feature, 0 to EDGES_MAX."""
    kinds__d: NDArray[np.uint8]
    """Index in KINDS of each feature."""
    digest: bytes
    """``edges_digest`` of the edges, 16 bytes."""
    edges__e: NDArray[np.float32] | None
    """The edges, strictly ascending within a feature, no NaN, no -0.0; None: the digest alone."""
    counters__k: NDArray[np.int64]
    """nulls, -inf, +inf, bins… of each feature, each 0 to VALUES_MAX."""
    picks: tuple[Picks, ...] | None
    """Moments and sketch of each feature; None: bins only."""


@dataclass(frozen=True, slots=True)
class Picks:
    """Moments and sketch of one feature."""

    reals: tuple[float, float, float, float]
    """Mean, sum of squares around it, minimum, maximum."""
    variance: float
    """Of the rank error, squared counts, 0 to n^2: no rank errs by more than n."""
    k_min: int
    """Smallest k that took part."""
    shift: int
    """A pick stands for ``2**shift`` values, the last for what is left over."""
    values: NDArray[Any]
    """Ascending, float32 or float64 by kind, no NaN."""
    distinct: bytes = b""
    """HLL bytes of an integer's or category's values."""
    frequent: bytes = b""
    """Frequent-items bytes of them."""


def edges_digest(sizes__d: NDArray[np.int64], edges__e: NDArray[np.float32]) -> bytes:
    """Return 16 bytes that stand for the edges: banks with the same may be merged."""
    digest = hashlib.sha256(sizes__d.astype("<u2").tobytes())
    digest.update(edges__e.astype("<f4").tobytes())
    return digest.digest()[:16]


def frequent_bytes(rows: Sequence[tuple[int, int]], total: int, offset: int) -> bytes:
    """Return frequent items, (count, item) in order, as Apache DataSketches writes longs."""
    if not rows:
        return _FREQUENT_HEAD.pack(1, 1, 10, FREQUENT_LG, 3, 5, 0)
    lg = max(3, (-(-len(rows) * 4 // 3) - 1).bit_length())  # at most three quarters are in use
    return b"".join(
        [
            _FREQUENT_HEAD.pack(4, 1, 10, FREQUENT_LG, lg, 0, 0),
            _FREQUENT_FULL.pack(len(rows), 0, total, offset),
            struct.pack(f"<{len(rows)}q", *(count for count, _ in rows)),
            struct.pack(f"<{len(rows)}q", *(item for _, item in rows)),
        ]
    )


def pack_items(frequent: bytes) -> bytes:
    """Return frequent items as a record carries them."""
    sketch = FrequentItems.from_bytes(frequent)
    items = sketch.items(threshold=0, no_false_positives=False)
    numbers = [len(items), sketch.total, sketch.error_max]
    for item, low, _ in items:
        numbers += [low, item << 1 ^ item >> 63]
    return b"".join(map(_varint, (number & (1 << 64) - 1 for number in numbers)))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def fixed_bytes(features: int) -> int:
    """Return what a feature takes in a record without edges, counters and picks.

    The head and the checksum are shared out, rounded up.
    """
    return 3 + _PER_FEATURE + -(-(_HEAD.size + _TAIL.size) // features)


def encode(record: SketchRecord) -> bytes:
    """Return the bytes of a record."""
    flags = 0 if record.edges__e is None else _EDGES_TRAVEL
    parts = [record.sizes__d.astype("<u2").tobytes(), record.kinds__d.tobytes()]
    if record.picks is None:
        flags |= _BINS_ONLY
    else:
        parts += [
            np.array([each.reals for each in record.picks], "<f8").tobytes(),
            np.array([each.variance for each in record.picks], "<f8").tobytes(),
            np.array([each.k_min for each in record.picks], "<u2").tobytes(),
            bytes(each.shift for each in record.picks),
        ]
    if record.edges__e is not None:
        parts.append(record.edges__e.astype("<f4").tobytes())
    parts.append(_varints(record.counters__k))
    for each in record.picks or ():
        parts.append(each.values.astype(each.values.dtype.newbyteorder("<")).tobytes())
        if each.distinct:
            parts += [struct.pack("<H", len(each.distinct)), each.distinct]
            parts.append(pack_items(each.frequent))
    head = _HEAD.pack(_MAGIC, _VERSION, flags, record.k, len(record.sizes__d), record.digest)
    body = b"".join([head, *parts])
    return body + _TAIL.pack(zlib.crc32(body))


def decode(data: bytes) -> SketchRecord:
    """Return the record that the bytes are.

    Args:
        data: What came, of any length and content.

    Returns:
        A record that keeps every rule.

    Raises:
        SketchRecordError: The bytes are no record, or break a rule; the text says which.
    """
    if len(data) < _HEAD.size + _TAIL.size:
        _refuse(f"{len(data)} bytes are too short")
    magic, version, flags, k, features, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        _refuse("it does not begin as one")
    if version != _VERSION:
        _refuse(f"version {version} is not {_VERSION}", hint="update this side of the link")
    if _TAIL.unpack_from(data, len(data) - _TAIL.size)[0] != zlib.crc32(data[: -_TAIL.size]):
        _refuse("the checksum is wrong", hint="bytes were damaged on the way or on disk")
    if flags & ~(_EDGES_TRAVEL | _BINS_ONLY) or not K_MIN <= k <= K_MAX:
        _refuse(f"flags {flags} or k {k} are not of this version")
    if not 1 <= features <= FEATURES_MAX:
        _refuse(f"{features} features are not 1 to {FEATURES_MAX}")
    reader = _Reader(data[: -_TAIL.size], _HEAD.size)
    sizes__d = reader.take("<u2", features).astype(np.int64)
    kinds__d = reader.take("<u1", features)
    if kinds__d.max() >= len(KINDS):
        _refuse(f"kind {kinds__d.max()} is unknown")
    heads = None
    if not flags & _BINS_ONLY:
        heads = (
            reader.take("<f8", 4 * features).reshape(-1, 4),
            reader.take("<f8", features),
            reader.take("<u2", features),
            reader.take("<u1", features),
        )
    edges__e = None
    if flags & _EDGES_TRAVEL:
        edges__e = reader.take("<f4", int(sizes__d.sum())).astype(np.float32)
    counters__k = reader.varints(int(sizes__d.sum()) + 4 * features)
    _check_edges(sizes__d, edges__e, digest)
    values__d = _check_counters(sizes__d, counters__k)
    picks = None
    if heads is not None:
        picks = _picks(reader, heads, kinds__d, values__d, k)
        _check_moments(sizes__d, counters__k, heads[0], picks)
    if reader.left:
        _refuse(f"{reader.left} bytes are left over")
    return SketchRecord(
        k=k,
        sizes__d=sizes__d,
        kinds__d=kinds__d,
        digest=digest,
        edges__e=edges__e,
        counters__k=counters__k,
        picks=picks,
    )


class _Reader:
    """Takes arrays off the front of bytes; what is not there is refused before it is allocated."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        size = np.dtype(dtype).itemsize * count
        if size > self.left:
            _refuse(f"{self.left} bytes are left where {size} should follow")
        found = np.frombuffer(self._data, dtype, count, self._at)
        self._at += size
        return found.astype(np.dtype(dtype).newbyteorder("="))

    def text(self) -> bytes:
        """Take bytes behind their length of 2 bytes."""
        return self.take("<u1", int(self.take("<u2", 1)[0])).tobytes()

    def items(self) -> bytes:
        """Take frequent items; return Apache DataSketches' bytes of them."""
        begin = self._at
        active, total, offset = (int(each) for each in self.varints(3))
        if active > _FREQUENT_ITEMS:
            _refuse(f"it has {active} frequent items, {_FREQUENT_ITEMS} at most")
        pairs = [(self._number(), self._number()) for _ in range(active)]
        rows = [(count, (item >> 1) ^ -(item & 1)) for count, item in pairs]
        if any(not -(1 << 63) <= item < 1 << 63 or count >= 1 << 62 for count, item in rows):
            _refuse("a frequent item is beyond 64 bits")
        if rows != sorted(rows, key=lambda row: (-row[0], row[1])):
            _refuse("its frequent items are not in their order")
        found = frequent_bytes(rows, total, offset)
        if pack_items(found) != self._data[begin : self._at]:
            _refuse("its frequent items are none that a sketch writes")
        return found

    def _number(self) -> int:
        """Take one unsigned LEB128 number of at most 64 bits in its shortest form."""
        found = shift = 0
        while True:
            byte = int(self.take("<u1", 1)[0])
            found |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if (shift and byte == 0) or found >= 1 << 64:
            _refuse("a number is not in its shortest form")
        return found

    def varints(self, count: int) -> NDArray[np.int64]:
        """Take unsigned LEB128 numbers in their shortest form, each up to VALUES_MAX."""
        most = min(self.left, count * _COUNTER_BYTES)
        raw = np.frombuffer(self._data, np.uint8, most, self._at)
        ends = np.flatnonzero(raw < 128)[:count]
        if len(ends) < count:
            _refuse(f"it has {len(ends)} counters of {count}")
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts + 1
        if lengths.max() > _COUNTER_BYTES or ((raw[ends] == 0) & (lengths > 1)).any():
            _refuse("a counter is not in its shortest form")
        found = np.zeros(count, np.int64)
        for place in range(int(lengths.max())):
            here = lengths > place
            found[here] |= (raw[starts[here] + place] & 127).astype(np.int64) << 7 * place
        if found.max() > VALUES_MAX:
            _refuse(f"a counter of {found.max()} is more than a bank can hold")
        self._at += int(ends[-1]) + 1
        return found


def _picks(
    reader: _Reader,
    heads: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]],
    kinds__d: NDArray[np.uint8],
    values__d: NDArray[np.int64],
    k: int,
) -> tuple[Picks, ...]:
    """Take the picks of each feature and check them."""
    found = []
    for i, (reals, variance, k_min, shift) in enumerate(zip(*heads, strict=True)):
        kind = KINDS[kinds__d[i]]
        n, shift = 0 if kind == "category" else int(values__d[i]), int(shift)
        if shift > SHIFT_MAX or (n == 0 and shift) or (n and not n >> shift):
            _refuse(f"feature {i} has picks of 2^{shift} values, of {n} values")
        if not K_MIN <= k_min <= k or not 0 <= variance <= float(n) ** 2:
            _refuse(f"feature {i} has a variance of {variance} and a smallest k of {k_min}")
        rest = n & (1 << shift) - 1
        if n and (n >> shift) + rest.bit_count() > capacity(k, n.bit_length()):
            _refuse(f"feature {i} has more picks than a sketch of k {k} holds")
        values = reader.take("<f8" if kind == "double" else "<f4", (n >> shift) + (rest > 0))
        items = (b"", b"")
        if kind in ("integer", "category"):
            items = (reader.text(), reader.items())
            _check_items(i, *items, int(values__d[i]))
        ends = (float(reals[0]), float(reals[1]), float(reals[2]), float(reals[3]))
        found.append(Picks(ends, float(variance), int(k_min), shift, values, *items))
    _check_order(found)
    return tuple(found)


def _check_order(picks: list[Picks]) -> None:
    """Refuse picks that do not ascend, or hold a NaN or -0.0."""
    sizes = np.array([len(each.values) for each in picks])
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        values = np.concatenate([each.values for each in picks])  # exact in float64
    if not len(values):
        return
    good = ~np.isnan(values) & ~((values == 0) & np.signbit(values))
    rises = values[1:] >= values[:-1]
    begins = np.cumsum(sizes)[:-1]
    rises[begins[(begins > 0) & (begins < len(values))] - 1] = True
    good[1:] &= rises
    if not good.all():
        at = int(np.searchsorted(np.cumsum(sizes), np.argmin(good), side="right"))
        _refuse(f"the picks of feature {at} do not ascend, or hold a NaN or -0.0")


def _check_items(i: int, distinct: bytes, frequent: bytes, n: int) -> None:
    """Refuse distinct values and frequent items that ``n`` values cannot have made."""
    HllSketch.from_bytes(distinct, lg_k_max=DISTINCT_LG_K)
    items = FrequentItems.from_bytes(frequent)
    if items.lg_max != FREQUENT_LG or items.total > n:
        _refuse(f"feature {i} has frequent items of 2^{items.lg_max} places and {items.total} of")


def _check_edges(
    sizes__d: NDArray[np.int64], edges__e: NDArray[np.float32] | None, digest: bytes
) -> None:
    if edges__e is None:
        return
    rises = edges__e[1:] > edges__e[:-1]
    begins = np.cumsum(sizes__d)[:-1]  # where the next feature's edges begin
    rises[begins[(begins > 0) & (begins < len(edges__e))] - 1] = True
    negative_zero = (edges__e == 0) & np.signbit(edges__e)
    if not rises.all() or np.isnan(edges__e).any() or negative_zero.any():
        _refuse("its edges do not ascend, or hold a NaN or -0.0")
    if edges_digest(sizes__d, edges__e) != digest:
        _refuse("its edges do not have their digest")


def _check_counters(
    sizes__d: NDArray[np.int64], counters__k: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of values of each feature; refuse counters that do not add up."""
    starts__d = np.cumsum(sizes__d + 4) - sizes__d - 4
    nulls, lows, highs = (counters__k[starts__d + i] for i in range(3))
    # Float first: 65,536 counters of 2^53 overflow int64.
    rough__d = np.add.reduceat(counters__k.astype(np.float64), starts__d)
    if (rough__d > 8.0 * VALUES_MAX).any():
        _refuse("it counts more values than a bank can hold")
    values__d: NDArray[np.int64] = np.add.reduceat(counters__k, starts__d) - nulls - lows - highs
    if (values__d > VALUES_MAX).any() or (values__d < lows + highs).any():
        _refuse("its bins do not add up")
    return values__d


def _check_moments(
    sizes__d: NDArray[np.int64],
    counters__k: NDArray[np.int64],
    reals__d4: NDArray[np.float64],
    picks: tuple[Picks, ...],
) -> None:
    """Refuse moments and picks that no stream of values can have made."""
    starts__d = np.cumsum(sizes__d + 4) - sizes__d - 4
    lows, highs = counters__k[starts__d + 1], counters__k[starts__d + 2]
    values__d = np.add.reduceat(counters__k, starts__d) - counters__k[starts__d] - lows - highs
    finite__d = values__d - lows - highs
    mean, square, minimum, maximum = reals__d4.T
    some = finite__d > 0
    # NaN fails every comparison, so each rule is stated as what must hold.
    ends = (
        np.where(lows > 0, minimum == -np.inf, minimum > -np.inf)
        & np.where(highs > 0, maximum == np.inf, maximum < np.inf)
        & np.where(some, minimum <= maximum, True)
        & np.where(some | (lows > 0), True, minimum == np.inf)
        & np.where(some | (highs > 0), True, maximum == -np.inf)
    )
    middles = (
        np.isfinite(mean)
        & (square >= 0)
        & np.where(some, (minimum <= mean) & (mean <= maximum), mean == 0)
        & np.where(finite__d > 1, True, square == 0)
    )
    if not (ends & middles).all():
        _refuse(f"the moments of feature {int(np.argmin(ends & middles))} are impossible")
    held = np.array([len(each.values) > 0 for each in picks])
    first, last = (
        np.array([float(each.values[end]) if len(each.values) else 0.0 for each in picks])
        for end in (0, -1)
    )
    narrow = np.array([each.values.dtype == np.float32 for each in picks])
    with np.errstate(over="ignore"):
        low, high = (np.where(narrow, each.astype(np.float32), each) for each in (minimum, maximum))
    within = ~held | ((low <= first) & (last <= high))
    if not within.all():
        _refuse(f"the picks of feature {int(np.argmin(within))} lie outside its extremes")


def _varint_sizes(counters__k: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that each counter takes, int64 (K,)."""
    sizes = np.ones(len(counters__k), np.int64)
    for place in range(1, _COUNTER_BYTES):
        sizes += counters__k >= 1 << 7 * place
    return sizes


def _varints(counters__k: NDArray[np.int64]) -> bytes:
    """Return the counters as unsigned LEB128."""
    sizes = _varint_sizes(counters__k)
    ends = np.cumsum(sizes)
    out = np.zeros(int(ends[-1]), np.uint8)
    starts = ends - sizes
    for place in range(int(sizes.max())):
        here = sizes > place
        group = counters__k[here] >> 7 * place & 127
        out[starts[here] + place] = group + 128 * (sizes[here] > place + 1)
    return out.tobytes()


def _refuse(reason: str, *, hint: str = "") -> NoReturn:
    raise SketchRecordError(f"not a sketch record: {reason}; nothing was taken", hint=hint)
