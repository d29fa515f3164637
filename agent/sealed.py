"""Read a file once, if it is a plain one, into memory that nobody can change any more.

    path --open, look, read--> memory file --seal--> descriptor for children, SHA-256 of the bytes

A path can be swapped between two looks; these bytes cannot. Links are refused: who owns another
name of the file could change it while it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import AgentError

PIECE_BYTES: Final = 1 << 20
SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class FileError(AgentError):
    """A file is not a plain one that may be read; nothing was made of it."""

    code = "agent.trial.file"


@dataclass(frozen=True, slots=True)
class Sealed:
    """Bytes in memory that nobody can change any more."""

    fd: int
    sha256: str
    size: int


@contextmanager
def memory() -> Iterator[int]:
    """Yield the descriptor of an empty file in memory that can be sealed."""
    fd = os.memfd_create("shoal-trial", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield fd
    finally:
        os.close(fd)


def seal(fd: int) -> int:
    """Let nobody change a file of :func:`memory` any more; return its size in bytes."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return os.fstat(fd).st_size


@contextmanager
def sealed(path: Path, bytes_max: int, *, deadline: float) -> Iterator[Sealed]:
    """Read a file once into sealed memory.

    Args:
        path: A regular file with one link; nothing else is opened for longer than to see that.
        bytes_max: It may have.
        deadline: Of ``time.monotonic()``; a file on a slow disk is given up then.

    Raises:
        FileError: It is something else, is larger, or cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with memory() as fd:
        try:
            _check(path, os.lstat(path), bytes_max)  # opening a device can be a deed in itself
            # O_NONBLOCK: without it the open of a pipe waits for its writer, for ever.
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(source, "rb", buffering=0) as file:
                _check(path, os.fstat(source), bytes_max)
                while piece := file.read(min(PIECE_BYTES, bytes_max + 1 - size)):
                    digest.update(piece)
                    size += len(piece)
                    if os.write(fd, piece) != len(piece):
                        raise FileError(f"{path} does not fit into memory")
                    if size > bytes_max:
                        raise FileError(f"{path} grew beyond {bytes_max} bytes")
                    if time.monotonic() > deadline:
                        raise FileError(f"{path} could not be read in time")
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)
            raise FileError(f"cannot read {path}: {reason}") from exc
        yield Sealed(fd, digest.hexdigest(), seal(fd))


def _check(path: Path, found: os.stat_result, bytes_max: int) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise FileError(f"{path} is a symbolic link", hint="give the path of the file itself")
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is not a regular file")
    if found.st_nlink != 1:
        raise FileError(
            f"{path} has {found.st_nlink} links, so another name can change it",
            hint="copy it to a file of its own",
        )
    if not found.st_size:
        raise FileError(f"{path} is empty")
    if found.st_size > bytes_max:
        raise FileError(
            f"{path} has {found.st_size} bytes; at most {bytes_max} fit in this trial",
            hint="allow more memory with --memory-bytes",
        )
