"""What the spool must remember when its segments are gone: one small checksummed file.

It is replaced as a whole (temporary file, fsync, rename, fsync of the folder), and always before
the segments that it speaks of are unlinked.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class StreamEntry:
    """One stream that is not settled yet."""

    order: int
    """Streams are sent in this order: the oldest boot first."""
    upto: int = 0
    """The server holds everything up to here."""
    last: int = 0
    """Highest seq that is known to have been accepted, even if its segment is gone."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Runs (first, last) that were given up and end above ``upto``."""


@dataclass(slots=True)
class Ledger:
    """Totals of settled streams, and the entries of the others."""

    produced: int = 0
    """Records of settled streams."""
    lost: int = 0
    """Records of all streams that were given up and are covered by a gap record."""
    boots: int = 0
    streams: dict[bytes, StreamEntry] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    """Counters of other components that must survive, e.g. bytes sent."""

    def encode(self) -> bytes:
        """Return the file's bytes."""
        body = json.dumps(
            {
                "version": 1,
                "produced": self.produced,
                "lost": self.lost,
                "boots": self.boots,
                "counters": self.counters,
                "streams": {
                    stream.hex(): [entry.order, entry.upto, entry.last, entry.lost]
                    for stream, entry in self.streams.items()
                },
            },
            separators=(",", ":"),
        ).encode()
        return b"%08x\n" % zlib.crc32(body) + body

    @classmethod
    def decode(cls, data: bytes) -> Ledger:
        """Return the ledger of a file's bytes.

        Raises:
            ValueError: They are damaged.
        """
        check, _, body = data.partition(b"\n")
        if int(check, 16) != zlib.crc32(body):
            raise ValueError("checksum")
        raw: dict[str, Any] = json.loads(body)
        streams = {
            bytes.fromhex(name): StreamEntry(order, upto, last, [(int(a), int(b)) for a, b in lost])
            for name, (order, upto, last, lost) in raw["streams"].items()
        }
        return cls(raw["produced"], raw["lost"], raw["boots"], streams, raw["counters"])


def load(path: Path) -> Ledger:
    """Return the ledger in a file, a new one when there is none.

    Raises:
        ValueError: The file is damaged.
    """
    return Ledger.decode(path.read_bytes()) if path.exists() else Ledger()


def save(path: Path, ledger: Ledger) -> None:
    """Replace the file durably.

    Raises:
        OSError: The disk refused; the old file is untouched.
    """
    spare = path.with_suffix(".tmp")
    with spare.open("wb") as file:
        file.write(ledger.encode())
        file.flush()
        os.fsync(file.fileno())
    spare.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
