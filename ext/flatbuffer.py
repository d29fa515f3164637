"""Read a flatbuffer whose every offset is distrusted; what the fields mean is the caller's.

Rule: no offset is followed before it is checked, and no more than ``tables_max`` tables are.

A flatbuffer starts with an offset to its root. A table starts with its distance back to a vtable:
two sizes, then for each field its place in the table, 0 if absent. Offsets count forward from
where they stand. All is little-endian. Source: FlatBuffers, "Internals".
"""

from __future__ import annotations

import struct
from typing import Any

from .errors import KernelError


class FlatbufferError(KernelError, ValueError):
    """Bytes are not a flatbuffer that can be read: cut off, or an offset leads outside."""

    code = "ext.flatbuffer"


class Reader:
    """The bytes, and how many tables may still be visited.

    Args:
        data: The whole file.
        tables_max: Tables that may be visited; offsets may share, so the size bounds none.
    """

    __slots__ = ("data", "tables_left", "tables_max")

    def __init__(self, data: bytes, *, tables_max: int) -> None:
        self.data = data
        self.tables_left = self.tables_max = tables_max

    def root(self) -> Table:
        """Return the root table."""
        return Table(self, self.unpack("<I", 0))

    def unpack(self, form: str, at: int) -> Any:
        """Return the one value at a byte, in the notation of ``struct``."""
        if at < 0 or at + struct.calcsize(form) > len(self.data):
            raise FlatbufferError(f"broken file: byte {at} is outside of its {len(self.data)}")
        return struct.unpack_from(form, self.data, at)[0]

    def vector(self, at: int, item_size: int) -> tuple[int, int]:
        """Return where the items of the vector at `at` start, and how many they are."""
        count = self.unpack("<I", at)
        if at + 4 + count * item_size > len(self.data):
            raise FlatbufferError(f"broken file: the vector at byte {at} ends outside of it")
        return at + 4, count


class Table:
    """One table; fields are numbered as in the schema, an absent one has its default."""

    __slots__ = ("at", "fields", "reader", "size")

    def __init__(self, reader: Reader, at: int) -> None:
        reader.tables_left -= 1
        if reader.tables_left < 0:
            raise FlatbufferError(
                f"the file has more than {reader.tables_max} parts",
                hint="raise tables_max if it comes from a source you trust",
            )
        vtable = at - reader.unpack("<i", at)
        fields_size, self.size = reader.unpack("<H", vtable), reader.unpack("<H", vtable + 2)
        if fields_size < 4 or fields_size % 2 or self.size < 4:
            raise FlatbufferError(f"broken file: no table at byte {at}")
        if vtable + fields_size > len(reader.data) or at + self.size > len(reader.data):
            raise FlatbufferError(f"broken file: the table at byte {at} ends outside of it")
        self.reader = reader
        self.at = at
        self.fields = struct.unpack_from(f"<{fields_size // 2 - 2}H", reader.data, vtable + 4)

    def scalar(self, field: int, form: str, absent: int = 0) -> Any:
        """Return a number, in the notation of ``struct``."""
        place = self.fields[field] if field < len(self.fields) else 0
        if not place:
            return absent
        if place + struct.calcsize(form) > self.size:
            raise FlatbufferError(f"broken file: a field of the table at byte {self.at} is outside")
        return self.reader.unpack(form, self.at + place)

    def target(self, field: int) -> int:
        """Return where a reference points; 0 if it is absent."""
        away = self.scalar(field, "<I")
        return self.at + self.fields[field] + away if away else 0

    def table(self, field: int) -> Table | None:
        """Return the table that a field refers to."""
        at = self.target(field)
        return Table(self.reader, at) if at else None

    def tables(self, field: int) -> list[Table]:
        """Return the tables of a vector."""
        at = self.target(field)
        if not at:
            return []
        first, count = self.reader.vector(at, 4)
        places = range(first, first + 4 * count, 4)
        return [Table(self.reader, p + self.reader.unpack("<I", p)) for p in places]

    def numbers(self, field: int, form: str) -> tuple[Any, ...]:
        """Return the numbers of a vector."""
        at = self.target(field)
        if not at:
            return ()
        first, count = self.reader.vector(at, struct.calcsize("<" + form))
        return struct.unpack_from(f"<{count}{form}", self.reader.data, first)

    def text(self, field: int) -> str:
        """Return a string; empty if absent."""
        at = self.target(field)
        if not at:
            return ""
        first, count = self.reader.vector(at, 1)
        raw = self.reader.data[first : first + count]
        if self.reader.unpack("<B", first + count) or 0 in raw:
            raise FlatbufferError(f"broken file: the text at byte {at} has no end")
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise FlatbufferError(f"broken file: the text at byte {at} is not UTF-8") from exc
