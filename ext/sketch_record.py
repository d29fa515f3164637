"""Write a bank's counters as bytes, and read bytes that may be anything.

    offset          size  what (little-endian, no padding)
    0               4     magic "SKBK"
    4               1     version, 1
    5               1     flags: bit 0, the edges travel; else their digest alone does
    6               1     w, bytes per counter: the smallest of 1, 2, 4, 8 that holds all
    7               1     zero
    8               4     D, number of features, 1 to 65,536
    12              16    first half of the SHA-256 of (sizes, edges) as they stand below
    28              2 D   sizes: number of edges of each feature
    28 + 2 D        32 D  mean, sum of squares around it (both of the finite values), minimum,
                          maximum (of all values), float64 each, feature by feature
    28 + 34 D       4 E   edges, float32, feature by feature, if they travel; E = sum of sizes
    …               w K   counters: nulls, -inf, +inf, bins…, feature by feature; K = E + 4 D
    …               4     CRC-32 of all before

Rule 1: whatever bytes come, ``decode`` returns a record that keeps every rule of ``_check``, or
raises SketchRecordError. Rule 2: it allocates in proportion to the bytes it got, never to a
number in them. Rule 3: a state has one encoding, so ``encode(decode(b)) == b``.

Axes: D features, E edges of all of them, K counters of all of them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ._sketch import VALUES_MAX
from .errors import SketchRecordError

FEATURES_MAX: Final = 1 << 16
"""Features of a bank: a row of them is 256 KiB, more is no sensor."""
EDGES_MAX: Final = (1 << 16) - 1
"""Edges of one feature: what 2 bytes hold."""

_HEAD: Final = struct.Struct("<4sBBBBI16s")
_TAIL: Final = struct.Struct("<I")
_MAGIC: Final = b"SKBK"
_VERSION: Final = 1
_EDGES_TRAVEL: Final = 1
_WIDTHS: Final = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRecord:
    """All that a bank counted."""

    sizes__d: NDArray[np.int64]
    """Number of edges of each feature, 0 to EDGES_MAX."""
    digest: bytes
    """``edges_digest`` of the edges, 16 bytes."""
    edges__e: NDArray[np.float32] | None
    """The edges, strictly ascending within a feature, no NaN, no -0.0; None: the digest alone."""
    counters__k: NDArray[np.int64]
    """nulls, -inf, +inf, bins… of each feature, each 0 to VALUES_MAX."""
    reals__d4: NDArray[np.float64]
    """Mean, sum of squares, minimum, maximum of each feature."""


def edges_digest(sizes__d: NDArray[np.int64], edges__e: NDArray[np.float32]) -> bytes:
    """Return 16 bytes that stand for the edges: banks with the same may be merged."""
    digest = hashlib.sha256(sizes__d.astype("<u2").tobytes())
    digest.update(edges__e.astype("<f4").tobytes())
    return digest.digest()[:16]


def encode(record: SketchRecord) -> bytes:
    """Return the bytes of a record."""
    width = _width(int(record.counters__k.max()))
    parts = [
        _HEAD.pack(
            _MAGIC,
            _VERSION,
            0 if record.edges__e is None else _EDGES_TRAVEL,
            width,
            0,
            len(record.sizes__d),
            record.digest,
        ),
        record.sizes__d.astype("<u2").tobytes(),
        record.reals__d4.astype("<f8").tobytes(),
        b"" if record.edges__e is None else record.edges__e.astype("<f4").tobytes(),
        record.counters__k.astype(f"<u{width}").tobytes(),
    ]
    body = b"".join(parts)
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
    magic, version, flags, width, zero, features, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        _refuse("it does not begin as one")
    if version != _VERSION:
        _refuse(f"version {version} is not {_VERSION}", hint="update this side of the link")
    if _TAIL.unpack_from(data, len(data) - _TAIL.size)[0] != zlib.crc32(data[: -_TAIL.size]):
        _refuse("the checksum is wrong", hint="bytes were damaged on the way or on disk")
    if flags & ~_EDGES_TRAVEL or width not in _WIDTHS or zero:
        _refuse(f"flags {flags}, width {width}, zero byte {zero} are not of this version")
    if not 1 <= features <= FEATURES_MAX:
        _refuse(f"{features} features are not 1 to {FEATURES_MAX}")
    at = _HEAD.size
    if len(data) < at + 34 * features + _TAIL.size:
        _refuse(f"{len(data)} bytes are too short for {features} features")
    sizes__d = np.frombuffer(data, "<u2", features, at).astype(np.int64)
    edges_n = int(sizes__d.sum())
    counters_n = edges_n + 4 * features
    travel = bool(flags & _EDGES_TRAVEL)
    want = at + 34 * features + (4 * edges_n if travel else 0) + width * counters_n + _TAIL.size
    if len(data) != want:
        _refuse(f"{len(data)} bytes are not the {want} that its sizes make")
    at += 2 * features
    reals__d4 = np.frombuffer(data, "<f8", 4 * features, at).astype(np.float64).reshape(-1, 4)
    at += 32 * features
    edges__e = None
    if travel:
        edges__e = np.frombuffer(data, "<f4", edges_n, at).astype(np.float32)
        at += 4 * edges_n
    raw__k = np.frombuffer(data, f"<u{width}", counters_n, at)
    most = int(raw__k.max())
    if most > VALUES_MAX or _width(most) != width:
        _refuse(f"a counter of {most} does not belong in {width} bytes")
    record = SketchRecord(
        sizes__d=sizes__d,
        digest=digest,
        edges__e=edges__e,
        counters__k=raw__k.astype(np.int64),
        reals__d4=reals__d4,
    )
    _check(record)
    return record


def _check(record: SketchRecord) -> None:
    """Refuse counters that no stream of values can have made."""
    edges__e, counters__k = record.edges__e, record.counters__k
    if edges__e is not None:
        rises = edges__e[1:] > edges__e[:-1]
        begins = np.cumsum(record.sizes__d)[:-1]  # where the next feature's edges begin
        rises[begins[(begins > 0) & (begins < len(edges__e))] - 1] = True
        negative_zero = (edges__e == 0) & np.signbit(edges__e)
        if not rises.all() or np.isnan(edges__e).any() or negative_zero.any():
            _refuse("its edges do not ascend, or hold a NaN or -0.0")
        if edges_digest(record.sizes__d, edges__e) != record.digest:
            _refuse("its edges do not have their digest")
    starts__d = np.cumsum(record.sizes__d + 4) - record.sizes__d - 4
    nulls, lows, highs = (counters__k[starts__d + i] for i in range(3))
    # Float first: 65,536 counters of 2^53 overflow int64.
    rough__d = np.add.reduceat(counters__k.astype(np.float64), starts__d)
    if (rough__d > 8.0 * VALUES_MAX).any():
        _refuse("it counts more values than a bank can hold")
    values__d = np.add.reduceat(counters__k, starts__d) - nulls - lows - highs
    finite__d = values__d - lows - highs
    if (values__d > VALUES_MAX).any() or (finite__d < 0).any():
        _refuse("its bins do not add up")
    mean, square, minimum, maximum = record.reals__d4.T
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


def _width(most: int) -> int:
    """Return the bytes that a counter of ``most`` needs."""
    return next(width for width in _WIDTHS if most < 1 << 8 * width)


def _refuse(reason: str, *, hint: str = "") -> NoReturn:
    raise SketchRecordError(f"not a sketch record: {reason}; nothing was taken", hint=hint)
