"""Files named by their SHA-256: bundles, data sets, parameters, deltas, sources.

    <root>/ab/abcdef…        the file, mode 0600
    <root>/incoming/…        what is being written; emptied by :meth:`Artefacts.sweep`

A row in the database says that a file is whole; the row is written after the file and its
folders are on disk. So a crash leaves at worst a file without a row, which the next put of the
same bytes takes over. The bytes are hashed while they are written, the size is checked at every
opening, and whoever loads a bundle hashes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Final

from sqlalchemy import func, select

from ...proto.names import check_digest
from ..errors import BusyError, InvalidError, NotFoundError, StoreError
from ..store import Store
from ..store.tables import Artefact
from .config import ArtefactConfig

KINDS: Final = frozenset({"bundle", "dataset", "parameters", "source", "delta"})


class Artefacts:
    """The artefact store. Synchronous and thread-safe.

    Call :meth:`put` and :meth:`delete` outside of transactions: they make their own.
    """

    def __init__(
        self, root: Path, store: Store, *, clock: Callable[[], int], config: ArtefactConfig
    ) -> None:
        """Take a folder of its own; it is made on first use.

        Args:
            root: Folder for the files.
            store: The database.
            clock: Unix ms.
            config: The bounds.
        """
        self._root, self._store, self._clock, self._config = root, store, clock, config
        self._incoming = root / "incoming"
        self._lock = threading.Lock()
        self._used: int | None = None  # bytes stored and bytes of puts in progress

    def put(self, data: bytes | Iterable[bytes], kind: str) -> str:
        """Store bytes and return their SHA-256; the same bytes are stored once.

        Args:
            data: The bytes, or an iterable of chunks, read once.
            kind: bundle, dataset, parameters, source or delta.

        Raises:
            InvalidError: The kind is unknown, or there are no bytes or too many.
            BusyError: The store is full.
            StoreError: The disk or the database failed; nothing is stored.
        """
        if kind not in KINDS:
            raise InvalidError(
                f"artefact kind {kind!r:.40} is unknown", hint=f"use one of {sorted(KINDS)}"
            )
        chunks = (data,) if isinstance(data, bytes) else data
        try:
            self._incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
        except OSError as exc:
            raise StoreError(f"the artefact store cannot be written: {exc.strerror}") from exc
        part, taken, kept = Path(name), 0, False
        try:
            digest = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    self._reserve(len(chunk), taken)
                    taken += len(chunk)
                    digest.update(chunk)
                    file.write(chunk)
                if not taken:
                    raise InvalidError("an artefact has at least one byte")
                file.flush()
                os.fsync(file.fileno())
            sha256 = digest.hexdigest()
            kept = self._settle(part, sha256, taken, kind)
        except OSError as exc:
            raise StoreError(f"the artefact could not be written: {exc.strerror}") from exc
        finally:
            part.unlink(missing_ok=True)
            if not kept:
                self._use(-taken)
        return sha256

    def open(self, sha256: str) -> BinaryIO:
        """Return an open file of the artefact; the caller closes it.

        Raises:
            NotFoundError: There is none.
            StoreError: The file is not as long as it was.
        """
        size = self.size(sha256)
        try:
            file = self.path(sha256).open("rb")
        except OSError as exc:
            raise StoreError(
                f"artefact {sha256[:12]} cannot be read: {exc.strerror}",
                hint="restore the artefact folder from a backup",
            ) from exc
        found = os.fstat(file.fileno()).st_size
        if found != size:
            file.close()
            raise StoreError(
                f"artefact {sha256[:12]} has {found} bytes on disk, not {size}",
                hint="restore the artefact folder from a backup",
            )
        return file

    def read(self, sha256: str, *, bytes_max: int) -> bytes:
        """Return the bytes of an artefact after checking their hash.

        Raises:
            NotFoundError: There is none.
            InvalidError: It has more than ``bytes_max`` bytes.
            StoreError: The bytes on disk are not those that were stored.
        """
        if (size := self.size(sha256)) > bytes_max:
            raise InvalidError(f"artefact {sha256[:12]} has {size} bytes, more than {bytes_max}")
        with self.open(sha256) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(
                f"artefact {sha256[:12]} is damaged on disk",
                hint="restore the artefact folder from a backup",
            )
        return data

    def size(self, sha256: str) -> int:
        """Return the length of an artefact in bytes; raise NotFoundError if there is none."""
        check_digest(sha256, what="artefact")
        with self._store.read() as session:
            size = session.scalar(select(Artefact.size).where(Artefact.sha256 == sha256))
        if size is None:
            raise NotFoundError(f"there is no artefact {sha256[:12]}")
        return size

    def path(self, sha256: str) -> Path:
        """Return where the file of an artefact is, or would be."""
        check_digest(sha256, what="artefact")
        return self._root / sha256[:2] / sha256

    def delete(self, sha256: str) -> None:
        """Forget an artefact; one that does not exist is no error."""
        path = self.path(sha256)
        with self._lock:
            with self._store.begin() as session:
                row = session.get(Artefact, sha256)
                if row is not None:
                    session.delete(row)
            if row is not None and self._used is not None:
                self._used -= row.size
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def sweep(self) -> int:
        """Remove what a crash left half-written, and return how many files that were.

        Call it once at the start, before the first put.
        """
        count = 0
        if self._incoming.is_dir():
            for part in self._incoming.iterdir():
                part.unlink()
                count += 1
        return count

    def _reserve(self, more: int, taken: int) -> None:
        if taken + more > self._config.bytes_max:
            raise InvalidError(
                f"the artefact exceeds {self._config.bytes_max} bytes",
                hint="raise artefacts.bytes_max in the server's configuration",
            )
        self._use(more)

    def _use(self, more: int) -> None:
        with self._lock:
            if self._used is None:
                with self._store.read() as session:
                    self._used = int(session.scalar(select(func.sum(Artefact.size))) or 0)
            if more > 0 and self._used + more > self._config.total_bytes_max:
                raise BusyError(
                    f"the artefact store is full: {self._config.total_bytes_max} bytes",
                    hint="delete old models, or raise artefacts.total_bytes_max",
                )
            self._used += more

    def _settle(self, part: Path, sha256: str, size: int, kind: str) -> bool:
        """Move a finished file to its place, then tell the database; return whether it is new."""
        path = self.path(sha256)
        with self._lock:  # against a delete of the same bytes
            path.parent.mkdir(exist_ok=True, mode=0o700)
            part.rename(path)
            for folder in (path.parent, self._root):
                _sync_folder(folder)
            with self._store.begin() as session:
                if session.get(Artefact, sha256) is not None:
                    return False
                session.add(Artefact(sha256=sha256, size=size, created_ms=self._clock(), kind=kind))
                return True


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
