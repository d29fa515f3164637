"""Keep what trials chose, one small JSON file for each model on each board with each runtime.

    (model digest, board digest, versions) --key--> <folder>/<key>.json

A file is a hint and no more: one that is missing, broken, foreign or hostile is ignored with a
warning, and the model is tried again. The least recently used files go first.
Not here: where the folder is (the agent's business), what is chosen (``choice``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .choice import Choice

FORMAT: Final = 1
FILE_BYTES_MAX: Final = 64 << 10  # a choice is about 500 bytes
ENTRIES_MAX: Final = 256  # models ever tried on one device; 1 MiB of 4 KiB blocks
DISTRIBUTIONS: Final = (
    "ai-edge-litert",
    "ethos-u-vela",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "openvino",
    "shoal",
    "tflite-runtime",
)
"""Packages whose version decides how fast, and how right, a backend is."""

_log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return the versions of the runtimes installed here, by package."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Cache:
    """A folder of choices. Cheap to make; any number of processes may share the folder.

    Args:
        folder: Made, for the owner alone, when the first choice is kept.
        entries_max: Files kept; the oldest beyond it are removed.
    """

    def __init__(self, folder: Path, *, entries_max: int = ENTRIES_MAX) -> None:
        if entries_max < 1:
            raise ValueError("entries_max must be at least 1")
        self.folder = folder
        self._entries_max = entries_max

    def lookup(self, digest: str, board_digest: str, versions: Mapping[str, str]) -> Choice | None:
        """Return what was chosen for a model on this board with these runtimes, if anything.

        Args:
            digest: SHA-256 of the model's bytes, in hex.
            board_digest: Of the board, ``Board.digest``.
            versions: Of the runtimes, by package; see :func:`versions`.
        """
        asked = _asked(digest, board_digest, versions)
        path = self._path(asked)
        try:
            found = json.loads(_read(path))
            if not isinstance(found, dict) or found.get("asked") != asked:
                raise ValueError("it answers another question")
            choice = Choice.from_json(found.get("choice"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as exc:
            _log.warning("the choice kept in %s is ignored: %s", path, exc)
            return None
        with contextlib.suppress(OSError):  # a folder of someone else's is fine to read from
            os.utime(path, follow_symlinks=False)
        return choice

    def keep(
        self, digest: str, board_digest: str, versions: Mapping[str, str], choice: Choice
    ) -> Path:
        """Keep a choice, instead of what was kept for the same question; return its file.

        Raises:
            OSError: The folder cannot be made or written; what was kept before still is.
        """
        asked = _asked(digest, board_digest, versions)
        text = json.dumps({"asked": asked, "choice": choice.to_json()}, indent=1, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            path = self._path(asked)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._bound()
        return path

    def forget(self, digest: str, board_digest: str, versions: Mapping[str, str]) -> bool:
        """Remove what was chosen for a model here; return whether there was anything."""
        try:
            self._path(_asked(digest, board_digest, versions)).unlink()
        except OSError:
            return False
        return True

    def _bound(self) -> None:
        """Remove the oldest files beyond the bound, and what a crash left half-written."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (".json", ".tmp"):
                with contextlib.suppress(OSError):
                    files.append((path.lstat().st_mtime, path))
        files.sort(reverse=True)
        for _, path in files[self._entries_max :]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, asked: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{asked['model'][:16]}-{key[:16]}.json"


def _asked(digest: str, board_digest: str, versions: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": digest,
        "board": board_digest,
        "versions": dict(sorted(versions.items())),
    }


def _read(path: Path) -> bytes:
    # A fifo would make the open wait, a link would lead elsewhere.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("not a regular file")
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    return data
