"""The file of a shared-memory ring: make it, find it, tell who is alive.

    create: unnamed file -> filled -> linked to NAME        attach: NAME -> checked -> mapped

Rule 1: a name never shows a half-made ring: the file gets its name last.
Rule 2: whoever serves a ring holds its file's lock, which the kernel lets go when it dies; so one
        name has one server, and what a dead one left is replaced.
Rule 3: a process is named by its id and its start time, because ids are used again.

What goes through a ring is in ``_ring``; the layout is docs/shared-memory-ring.md. Only the same
user may open the file (mode 0600): whoever may, could cut it short and so end the server, which
is no more than a signal from the same user could do.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ._ring import (
    MAGIC,
    PAGE_BYTES,
    REQUEST_BYTES_MIN,
    SLOT_BYTES,
    VERSION,
    AnswerError,
    Plan,
    Port,
    Request,
    RequestError,
    Server,
    process_id,
)
from .errors import KernelError

__all__ = [
    "SHM",
    "AnswerError",
    "Kind",
    "Plan",
    "Port",
    "Request",
    "RequestError",
    "RingFile",
    "RingFormatError",
    "RingMissingError",
    "RingNameError",
    "RingSizes",
    "RingTakenError",
    "Server",
    "Status",
    "alive",
    "attach",
    "create",
    "me",
    "process_id",
]

SHM: Final = Path("/dev/shm")
ALIGN: Final = 64
SERVING: Final = 1
_HEAD: Final = struct.Struct("<QIIQQQQQII")  # as RingPage in _ring.h
_STATE_AT: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Kind(IntEnum):
    """What a request asks."""

    INFER = 1
    MODELS = 2
    METADATA = 3


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    BAD_REQUEST = 1
    UNKNOWN_MODEL = 2
    OVERLOADED = 3
    DEADLINE = 4
    INTERNAL = 5
    TOO_LARGE = 6


class RingNameError(KernelError, ValueError):
    """A name is none for a ring, or its file is something else; nothing was changed."""

    code = "ext.ring.name"


class RingTakenError(KernelError):
    """Another process serves a ring of that name; nothing was changed."""

    code = "ext.ring.taken"


class RingMissingError(KernelError):
    """No server offers a ring of that name now."""

    code = "ext.ring.missing"
    retry = True


class RingFormatError(KernelError):
    """The file is no ring of a version that is known here."""

    code = "ext.ring.format"


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSizes:
    """How much of memory a ring takes: clients_max * (request + response + 256) + 4096 bytes."""

    clients_max: int = 32
    """Clients at a time, 1 to 1024; each has a slot of its own."""

    request_bytes: int = 768 << 10
    """For the inputs of one call; 224 x 224 x 3 float32 fit. A multiple of 64."""

    response_bytes: int = 256 << 10
    """For the outputs of one call. A multiple of 64."""

    def __post_init__(self) -> None:
        """Refuse what no ring can have."""
        if not 1 <= self.clients_max <= 1024:
            raise ValueError(f"clients_max must be 1 to 1024, not {self.clients_max}")
        for name in ("request_bytes", "response_bytes"):
            size = getattr(self, name)
            if size % ALIGN or not max(REQUEST_BYTES_MIN, 4096) <= size <= 1 << 32:
                raise ValueError(f"{name} must be a multiple of 64, 4 KiB to 4 GiB, not {size}")

    @property
    def stride(self) -> int:
        """Bytes from slot to slot."""
        return SLOT_BYTES + self.request_bytes + self.response_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return PAGE_BYTES + self.clients_max * self.stride


class RingFile:
    """A ring's file, open and mapped; made by ``create`` and ``attach``.

    Attributes:
        path: Its name in the file system.
        memory: The mapping, writable.
        sizes: What it has room for.
        generation: Differs from each server of that name to the next.
        server: The server's process, start << 32 | pid.
    """

    def __init__(
        self, path: Path, fd: int, memory: mmap.mmap, sizes: RingSizes, generation: int, server: int
    ) -> None:
        self.path = path
        self.memory = memory
        self.sizes = sizes
        self.generation = generation
        self.server = server
        self._fd = fd

    @property
    def arguments(self) -> tuple[mmap.mmap, int, int, int, int, int]:
        """What ``Server`` and ``Port`` are made of."""
        return (
            self.memory,
            self.sizes.clients_max,
            PAGE_BYTES,
            self.sizes.stride,
            self.sizes.request_bytes,
            self.sizes.response_bytes,
        )

    def close(self, *, remove: bool = False) -> None:
        """Unmap and close; the server also removes the name, if it is still its own."""
        if self._fd < 0:
            return
        if remove:
            self.unlink()
        # A view that somebody kept holds the mapping until it goes.
        with contextlib.suppress(BufferError):
            self.memory.close()
        os.close(self._fd)
        self._fd = -1

    def unlink(self) -> None:
        """Remove the name, if it is still this file's; who mapped it keeps the memory."""
        with contextlib.suppress(OSError):
            if _same(self._fd, self.path):
                self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def create(name: str, sizes: RingSizes, *, folder: Path = SHM) -> RingFile:
    """Make a ring and give it its name; all its memory is taken here, or it fails here.

    Args:
        name: 1 to 200 of A-Z a-z 0-9 . _ -, not starting with . or -.
        sizes: What it has room for.
        folder: A tmpfs.

    Raises:
        RingNameError: No such name, or the name is of a file that is no ring of this user.
        RingTakenError: A living server has that name.
        OSError: The file cannot be made; ENOSPC: the tmpfs is too small.
    """
    path = _path(name, folder)
    generation = int.from_bytes(os.urandom(8), "little") | 1
    server = me()
    # Without a name nothing is left behind by a crash in here.
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    memory = None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Pages that do not exist yet would be refused later, by a SIGBUS.
        os.posix_fallocate(fd, 0, sizes.total_bytes)
        memory = mmap.mmap(fd, sizes.total_bytes)
        _HEAD.pack_into(
            memory,
            0,
            MAGIC,
            VERSION,
            sizes.clients_max,
            PAGE_BYTES,
            sizes.stride,
            sizes.request_bytes,
            sizes.response_bytes,
            generation,
            server & 0xFFFFFFFF,
            server >> 32,
        )
        struct.pack_into("<I", memory, _STATE_AT, SERVING)
        _link(fd, path)
    except BaseException:
        if memory is not None:
            memory.close()
        os.close(fd)
        raise
    return RingFile(path, fd, memory, sizes, generation, server)


def _link(fd: int, path: Path) -> None:
    """Give a file its name, in place of what a dead server left."""
    with contextlib.ExitStack() as stack:
        links = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, links)
        while True:
            with contextlib.suppress(FileExistsError):
                # With a folder given, this is linkat and follows the link to the unnamed file.
                os.link(str(fd), path, src_dir_fd=links, follow_symlinks=True)
                return
            _remove_stale(path)


def _remove_stale(path: Path) -> None:
    try:
        old = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise RingNameError(
            f"{path} is no ring of this user: {exc.strerror}", hint="choose another name"
        ) from exc
    try:
        facts = os.fstat(old)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise RingNameError(f"{path} is no ring of this user", hint="choose another name")
        if os.pread(old, 8, 0) != MAGIC.to_bytes(8, "little"):
            raise RingNameError(f"{path} is no ring", hint="choose another name, or remove it")
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RingTakenError(
                f"another process serves the ring {path.name!r}",
                hint="stop it and what it forked, or choose another name",
            ) from None
        if _same(old, path):  # else somebody replaced it meanwhile
            path.unlink()
    finally:
        os.close(old)


def attach(name: str, *, folder: Path = SHM) -> RingFile:
    """Map the ring of a server.

    Raises:
        RingNameError: No such name, or its file is another user's.
        RingMissingError: No living server offers it.
        RingFormatError: The file is no ring, or of another version.
    """
    path = _path(name, folder)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise RingMissingError(
            f"no server offers the ring {name!r}", hint=f"shoal-agent serve --shm {name} ..."
        ) from None
    except OSError as exc:
        raise RingNameError(
            f"cannot open {path}: {exc.strerror}", hint="run as the user of the server"
        ) from exc
    memory = None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise RingNameError(f"{path} is another user's", hint="run as the user of the server")
        if facts.st_size < PAGE_BYTES:
            raise RingFormatError(f"{path} is no ring: it has {facts.st_size} bytes")
        memory = mmap.mmap(fd, facts.st_size)
        magic, version, slots, first, stride, request, response, generation, pid, start = (
            _HEAD.unpack_from(memory)
        )
        if magic != MAGIC or version != VERSION:
            raise RingFormatError(
                f"{path} is no ring of version {VERSION}",
                hint="client and server must be of one version of shoal",
            )
        try:
            sizes = RingSizes(clients_max=slots, request_bytes=request, response_bytes=response)
        except ValueError as exc:
            raise RingFormatError(f"{path} is no ring: {exc}") from exc
        if (first, stride) != (PAGE_BYTES, sizes.stride) or facts.st_size < sizes.total_bytes:
            raise RingFormatError(f"{path} is no ring: its sizes contradict each other")
        server = start << 32 | pid
        if struct.unpack_from("<I", memory, _STATE_AT)[0] != SERVING or not alive(server):
            raise RingMissingError(
                f"the server of the ring {name!r} is gone", hint="start it again"
            )
    except BaseException:
        if memory is not None:
            memory.close()
        os.close(fd)
        raise
    return RingFile(path, fd, memory, sizes, generation, server)


def _path(name: str, folder: Path) -> Path:
    if not _NAME.fullmatch(name):
        raise RingNameError(
            f"{name!r} is no name of a ring",
            hint="1 to 200 of A-Z a-z 0-9 . _ -, not starting with . or -",
        )
    return folder / name


def _same(fd: int, path: Path) -> bool:
    """Return whether a name leads to an open file."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def me() -> int:
    """Return this process as rings name it: start << 32 | pid.

    Raises:
        OSError: /proc is not there.
    """
    pid = process_id()
    return _start(pid) << 32 | pid


def alive(process: int) -> bool:
    """Return whether a process, named as ``me`` does, still runs."""
    try:
        return _start(process & 0xFFFFFFFF) == process >> 32
    except (FileNotFoundError, ProcessLookupError):
        return False


def _start(pid: int) -> int:
    """Return when a process started, clock ticks since boot, 32 bits; field 22 of its stat."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):  # dead, though its parent has not asked yet
        raise ProcessLookupError(pid)
    return int(fields[19]) & 0xFFFFFFFF
