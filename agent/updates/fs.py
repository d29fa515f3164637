"""Everything that updates and identity do to a disk, so that a simulated disk can stand in.

    save = write <name>.tmp, fsync it, rename over <name>, fsync the directory

Nothing else in the agent's state directory of keys and slots is written in another way, except
the part file of a download, which proves itself by its hash. ``tests/sims/disk.py`` implements
the same protocol in memory, dies at a chosen operation and forgets what was not fsynced.

A saved document is a line with the SHA-256 of the rest, then JSON: rot and torn writes show.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from .errors import DamagedStateError

DOCUMENT_BYTES_MAX: Final = 64 << 10
HASH_CHUNK: Final = 1 << 20
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h: reserve, do not grow


class FileSystem(Protocol):
    """The operations that matter under a power cut. Paths are absolute."""

    def make_dir(self, path: Path) -> bool:
        """Make a directory with mode 0700; return False if it was there."""

    def create(self, path: Path, data: bytes) -> None:
        """Make or truncate a file with mode 0600 and write it; durable only after sync."""

    def append(self, path: Path, data: bytes) -> None:
        """Write at the end of a file, made if need be; durable only after sync."""

    def reserve(self, path: Path, size: int) -> None:
        """Take disk space for a file of ``size`` bytes without growing it.

        Raises:
            OSError: ENOSPC, there is no such space.
        """

    def read(self, path: Path, *, bytes_max: int) -> bytes:
        """Return a regular file's bytes, refusing links and more than ``bytes_max``."""

    def size(self, path: Path) -> int | None:
        """Return the size of a file in bytes; None if there is none."""

    def sha256(self, path: Path) -> str | None:
        """Return the hex digest of a regular file with one link; None if there is none."""

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory; none if it does not exist."""

    def sync(self, path: Path) -> None:
        """Make a file's content durable."""

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in the same directory, replacing what has it."""

    def remove(self, path: Path) -> None:
        """Remove a file, or an empty directory, if it is there."""


class Disk:
    """The real file system."""

    def make_dir(self, path: Path) -> bool:
        """Make a directory with mode 0700; return False if it was there."""
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def create(self, path: Path, data: bytes) -> None:
        """Make or truncate a file with mode 0600 and write it."""
        self._write(path, data, os.O_TRUNC)

    def append(self, path: Path, data: bytes) -> None:
        """Write at the end of a file, made if need be."""
        self._write(path, data, os.O_APPEND)

    def reserve(self, path: Path, size: int) -> None:
        """Take disk space for a file of ``size`` bytes without growing it."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _fallocate_keep_size(fd, size)
        finally:
            os.close(fd)

    def read(self, path: Path, *, bytes_max: int) -> bytes:
        """Return a regular file's bytes, refusing links and more than ``bytes_max``."""
        with open(_open_regular(path), "rb") as file:
            data = file.read(bytes_max + 1)
        if len(data) > bytes_max:
            raise OSError(errno.EFBIG, f"{path.name} is larger than {bytes_max} bytes")
        return data

    def size(self, path: Path) -> int | None:
        """Return the size of a file in bytes; None if there is none."""
        try:
            return os.stat(path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def sha256(self, path: Path) -> str | None:
        """Return the hex digest of a regular file with one link; None if there is none."""
        try:
            with open(_open_regular(path), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory; none if it does not exist."""
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sync(self, path: Path) -> None:
        """Make a file's content durable."""
        _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in the same directory."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or an empty directory, if it is there."""
        with suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except (IsADirectoryError, PermissionError):
                os.rmdir(path)

    def _write(self, path: Path, data: bytes, flag: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag
        with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]


def _open_regular(path: Path) -> int:
    """Open for reading, if it is a regular file that has no second name (fault 18)."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file with one link")
    return fd


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fallocate_keep_size(fd: int, size: int) -> None:
    # os.posix_fallocate grows the file, and its size is how far a download has come.
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has no 64
    code = 0
    if call(fd, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS):  # e.g. NFS: at least look
        facts = os.fstatvfs(fd)
        missing = size - os.fstat(fd).st_size
        code = errno.ENOSPC if facts.f_bavail * facts.f_frsize < missing else 0
    if code:
        raise OSError(code, os.strerror(code))


def save(fs: FileSystem, path: Path, data: bytes) -> None:
    """Replace a file so that a power cut leaves the old or the new one, and return when durable."""
    temporary = path.with_name(path.name + ".tmp")
    fs.create(temporary, data)
    fs.sync(temporary)
    fs.rename(temporary, path)
    fs.sync_dir(path.parent)


def save_document(fs: FileSystem, path: Path, document: dict[str, Any]) -> None:
    """Save a JSON document with its checksum."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    save(fs, path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def parse_document(data: bytes) -> dict[str, Any] | None:
    """Return the document in the bytes of a file; None if it does not match its checksum."""
    digest, _, text = data.partition(b"\n")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if hashlib.sha256(text).hexdigest().encode() != digest or not isinstance(document, dict):
        return None
    return document


def load_document(fs: FileSystem, path: Path) -> dict[str, Any] | None:
    """Return a saved document; None if there is none.

    The directory is synced first: after a killed process the names it left are visible but may
    not be durable, and what is read here is acted on.

    Raises:
        DamagedStateError: It does not match its checksum; it now ends in ``.damaged``.
    """
    if fs.size(path) is None:
        return None
    fs.sync_dir(path.parent)
    try:
        document = parse_document(fs.read(path, bytes_max=DOCUMENT_BYTES_MAX))
    except OSError:
        document = None
    if document is not None:
        return document
    fs.rename(path, path.with_name(path.name + ".damaged"))
    raise DamagedStateError(
        f"{path.name} does not match its checksum; it was kept as {path.name}.damaged",
        hint="the disk or a person changed it; check the storage of this device",
    )
