"""Segment files: append-only frames of one stream and one class, with a checksum each.

    file  = header frame*
    header= "SHSG" | version u8 | class u8 | stream 16 bytes | CRC-32 of these u32
    frame = length u32 | CRC-32 of (seq, payload) u32 | seq u64 | payload

Little-endian. A file is read up to the first frame that is not whole: what follows it was never
accepted. CRC-32 is zlib's: it finds what this is for, torn and rotten sectors, and needs no
package.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ...proto.records import RECORD_BYTES_MAX, STREAM_SIZE, Priority

MAGIC: Final = b"SHSG"
VERSION: Final = 1
CLASSES: Final = tuple(Priority)  # in the order of eviction; the index is the byte on disk
_HEADER: Final = struct.Struct("<4sBB16sI")
_FRAME: Final = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class Frame:
    """One record on disk."""

    seq: int
    payload: bytes
    end: int
    """Offset behind it."""


@dataclass(slots=True)
class Segment:
    """One file: what is in it, as far as this process knows."""

    path: Path
    stream: bytes
    priority: Priority
    first: int
    last: int
    count: int
    size: int


def header(stream: bytes, priority: Priority) -> bytes:
    """Return the first bytes of a file."""
    head = _HEADER.pack(MAGIC, VERSION, CLASSES.index(priority), stream, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def frame(seq: int, payload: bytes) -> bytes:
    """Return the bytes of one record."""
    number = seq.to_bytes(8, "little")
    return _FRAME.pack(len(payload), zlib.crc32(payload, zlib.crc32(number)), seq) + payload


def name(priority: Priority, first: int) -> str:
    """Return the file name of a segment that starts at ``first``."""
    return f"{CLASSES.index(priority)}-{first:016x}.seg"


def frames(path: Path) -> Iterator[Frame]:
    """Yield the whole frames of a file, in order; stop at the first that is not."""
    with path.open("rb") as file:
        if _read_header(file) is None:
            return
        offset = _HEADER.size
        while True:
            head = file.read(_FRAME.size)
            if len(head) < _FRAME.size:
                return
            length, check, seq = _FRAME.unpack(head)
            if not 0 < length <= RECORD_BYTES_MAX:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload, zlib.crc32(head[8:])) != check:
                return
            offset += _FRAME.size + length
            yield Frame(seq, payload, offset)


def scan(path: Path) -> Segment | None:
    """Return what a file holds, None when it holds no whole frame."""
    with path.open("rb") as file:
        found = _read_header(file)
    if found is None:
        return None
    stream, priority = found
    first = last = count = size = 0
    for each in frames(path):
        if each.seq <= last:  # a seq that does not ascend was not written by this code
            break
        first = first or each.seq
        last, count, size = each.seq, count + 1, each.end
    return Segment(path, stream, priority, first, last, count, size) if count else None


def cut(segment: Segment) -> None:
    """Cut a file back to its last whole frame, durably."""
    if segment.path.stat().st_size > segment.size:
        with segment.path.open("r+b") as file:
            file.truncate(segment.size)
            os.fsync(file.fileno())


def _read_header(file: BinaryIO) -> tuple[bytes, Priority] | None:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    magic, version, number, stream, check = _HEADER.unpack(head)
    good = magic == MAGIC and version == VERSION and zlib.crc32(head[:-4]) == check
    if not good or number >= len(CLASSES) or len(stream) != STREAM_SIZE:
        return None
    return stream, CLASSES[number]
