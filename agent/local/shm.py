"""Let clients on this device pass tensors through system shared memory, as Triton does.

A client names a file of /dev/shm once; then its requests say region, offset and size. Bytes are
read and written with pread and pwrite and the file is never mapped: a client that truncates it
would otherwise kill the server with SIGBUS. One copy is the price.

A region is checked against the file's size when it is registered and again at each use.

Source: Triton's system shared memory extension.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .errors import RequestError
from .oip import Region

NAME_BYTES_MAX: Final = 255  # of a file, and as good a bound for a region's name
RING_MAGIC: Final = b"SHOALRNG"  # what a ring of ext/ring.py begins with


@dataclass(slots=True, eq=False)
class _Registered:
    key: str
    fd: int
    offset: int
    byte_size: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the file is used, so that no other file can get its number meanwhile."""


class SharedMemory:
    """The registered regions. Thread-safe. Holds one open file for each until ``close``."""

    def __init__(self, folder: Path, *, regions_max: int) -> None:
        self._folder, self._regions_max = folder, regions_max
        self._regions: dict[str, _Registered] = {}
        self._lock = threading.Lock()

    def status(self, name: str) -> dict[str, Mapping[str, Any]]:
        """Return the facts of a region, or of all where the name is empty.

        Raises:
            RequestError: There is no such region.
        """
        with self._lock:
            found = dict(self._regions)
        if name:
            found = {name: self._find(name)}
        return {
            each: {
                "name": each,
                "key": region.key,
                "offset": region.offset,
                "byte_size": region.byte_size,
            }
            for each, region in found.items()
        }

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a file of shared memory and keep a part of it under a name.

        Args:
            name: How requests call the region.
            key: What the client gave to ``shm_open``, with or without the slash before it.
            offset: Where the region starts in the file, in bytes.
            byte_size: Its size; all of it must be in the file.

        Raises:
            RequestError: The name is taken, there is no such file or it is none of shared memory,
                or it is too small; nothing changed.
        """
        file = key.removeprefix("/")
        if not 0 < len(name.encode("utf-8", "replace")) <= NAME_BYTES_MAX:
            raise RequestError(f"a region's name must have 1 to {NAME_BYTES_MAX} bytes")
        if not file or file in (".", "..") or "/" in file or "\0" in file:
            raise RequestError(
                f"Unable to open shared memory region: '{key:.300}' is not a name for shm_open",
                hint="a key is a file's name in shared memory, with at most one slash, before it",
            )
        if offset < 0 or byte_size < 1:
            raise RequestError(
                f"shared memory region '{name}' must have an offset of at least 0 and a size of "
                f"at least 1, not {offset} and {byte_size}"
            )
        fd = self._open(file, key)
        try:
            size = os.fstat(fd).st_size
            if offset + byte_size > size:
                raise RequestError(
                    f"failed to register shared memory region '{name}': it ends at byte "
                    f"{offset + byte_size}, and '{key}' has {size}"
                )
            if os.pread(fd, len(RING_MAGIC), 0) == RING_MAGIC:
                raise RequestError(f"'{key}' is a ring of this server, not memory of a client")
            with self._lock:
                if name in self._regions:
                    raise RequestError(f"shared memory region '{name}' already in manager")
                if len(self._regions) >= self._regions_max:
                    raise RequestError(
                        f"{self._regions_max} shared memory regions are registered, the most "
                        "there may be",
                        hint="unregister what is not used any more, or raise shm_regions_max",
                    )
                self._regions[name] = _Registered(key, fd, offset, byte_size)
                fd = -1
        finally:
            if fd >= 0:
                os.close(fd)

    def unregister(self, name: str) -> None:
        """Close a region, or all where the name is empty; an unknown one is no error."""
        with self._lock:
            if name:
                one = self._regions.pop(name, None)
                gone = [] if one is None else [one]
            else:
                gone = list(self._regions.values())
                self._regions.clear()
        for region in gone:
            with region.lock:
                os.close(region.fd)
                region.fd = -1

    def close(self) -> None:
        """Close all regions."""
        self.unregister("")

    def check(self, part: Region) -> None:
        """See that a part lies in its region.

        Raises:
            RequestError: There is no such region, or the part is not inside it.
        """
        self._inside(part, self._find(part.name))

    def read(self, part: Region) -> bytes:
        """Return a copy of the bytes of a part.

        Raises:
            RequestError: As ``check``, or the file has become too small.
        """
        region = self._find(part.name)
        self._inside(part, region)
        with region.lock:
            self._alive(part, region)
            got = self._pread(region, part)
        return got

    def write(self, part: Region, data: bytes | memoryview) -> None:
        """Write bytes to the start of a part.

        Raises:
            RequestError: As ``read``, or the part is smaller than the data; nothing was written.
        """
        region = self._find(part.name)
        self._inside(part, region)
        view = memoryview(data).cast("B")
        if len(view) > part.byte_size:
            raise RequestError(
                f"shared memory size specified with the request for output in '{part.name}' "
                f"({part.byte_size} bytes) should be at least {len(view)} bytes to hold the results"
            )
        at = region.offset + part.offset
        with region.lock:
            self._alive(part, region)
            while view:
                wrote = os.pwrite(region.fd, view, at)
                at, view = at + wrote, view[wrote:]

    def _pread(self, region: _Registered, part: Region) -> bytes:
        at, left, pieces = region.offset + part.offset, part.byte_size, []
        while left:  # one read gives at most 2 GiB
            piece = os.pread(region.fd, left, at)
            if not piece:
                raise self._shrunk(part, region)
            pieces.append(piece)
            at, left = at + len(piece), left - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _find(self, name: str) -> _Registered:
        with self._lock:
            region = self._regions.get(name)
        if region is None:
            raise RequestError(f"Unable to find shared memory region: '{name}'")
        return region

    def _inside(self, part: Region, region: _Registered) -> None:
        if part.offset < 0 or part.byte_size < 0:
            raise RequestError(f"offset and size in region '{part.name}' must not be negative")
        if part.offset + part.byte_size > region.byte_size:
            raise RequestError(
                f"Invalid offset + byte size for shared memory region: '{part.name}' has "
                f"{region.byte_size} bytes, the request goes to {part.offset + part.byte_size}"
            )

    def _alive(self, part: Region, region: _Registered) -> None:
        if region.fd < 0:
            raise RequestError(f"Unable to find shared memory region: '{part.name}'")
        end = region.offset + part.offset + part.byte_size
        if os.fstat(region.fd).st_size < end:
            raise self._shrunk(part, region)

    def _shrunk(self, part: Region, region: _Registered) -> RequestError:
        return RequestError(
            f"shared memory region '{part.name}' is not there any more: '{region.key}' was made "
            "smaller after it was registered"
        )

    def _open(self, file: str, key: str) -> int:
        # NOFOLLOW: no link to a file elsewhere; NONBLOCK: a pipe would block the server.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._folder / file, flags)
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise RequestError(f"Unable to open shared memory region: '{key}': {reason}") from exc
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RequestError(f"Unable to open shared memory region: '{key}' is no regular file")
        return fd
