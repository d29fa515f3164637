"""Read /proc, /sys and /dev below a root folder, whatever is in them.

A sysfs file may be missing, unreadable, endless, binary or a pipe that never answers. Whatever it
is, a read here ends, is bounded, and yields a value or None. Absent is normal and leaves no trace;
anything else that stood in the way becomes an :class:`Unknown` with its reason.

A root that holds ``recording.json`` is a recorded board (``recording.py``): who may open a device
node, and what the interpreter knew of itself, come from there and not from this machine.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_BYTES_MAX = 64 << 10  # a sysfs attribute is one page; cgroup and group files may be longer
NAMES_MAX = 1024  # entries looked at in one folder: /dev of a big gateway has some 400
UNKNOWN_MAX = 64  # reasons kept; a broken driver repeats itself
RECORDING = "recording.json"  # at the root of a recorded board, beside its files
_FACT_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Unknown:
    """A fact that is there and could not be had."""

    path: str
    """The file below the root, with a leading slash."""
    reason: str
    """Why, in a few words: "permission denied", "not a number: 'N/A'"."""


@dataclass(frozen=True, slots=True)
class Node:
    """A device node."""

    path: str
    """Below the root, with a leading slash: "/dev/apex_0"."""
    may_open: bool
    """This user may open it for reading and writing."""
    group: str
    """The group that owns it, empty if that group has no name here."""


class Tree:
    """A root folder, read-only. Not thread-safe: one per reading."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[str, str] = {}
        """Every text that was read, by path: what a recording of this board must hold."""
        self.nodes_seen: dict[str, Node] = {}
        self.found: set[str] = set()
        """Every path that was found to exist, read or not."""
        self._unknown: dict[str, str] = {}
        self._recorded = self._recording()

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """What could not be had so far, sorted by path."""
        return tuple(Unknown(path, reason) for path, reason in sorted(self._unknown.items()))

    @property
    def live(self) -> bool:
        """Whether this is the machine we run on."""
        return self._recorded is None and self.root == Path("/")

    def fact(self, name: str) -> Any:
        """Return what the interpreter knew of itself on the recorded board, or None."""
        facts = (self._recorded or {}).get("process")
        return facts.get(name) if isinstance(facts, Mapping) else None

    def broken(self, path: str, reason: str) -> None:
        """Note that a file's content makes no sense."""
        if len(self._unknown) < UNKNOWN_MAX:
            self._unknown.setdefault(path, reason)

    def text(self, path: str, *, bytes_max: int = TEXT_BYTES_MAX) -> str | None:
        """Return a file's text without the white space and NULs at its end, or None."""
        recorded = self._reason_recorded(path)
        if recorded is not None:
            self.broken(path, recorded)
            return None
        try:
            raw = self._read(path, bytes_max)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            self.broken(path, _reason(exc))
            return None
        if len(raw) > bytes_max:
            self.broken(path, f"longer than {bytes_max} bytes")
            return None
        text = raw.decode(errors="replace")
        self.seen[path] = text
        return text.rstrip("\0 \t\r\n")

    def integer(self, path: str, *, base: int = 10) -> int | None:
        """Return a file that holds one integer, or None."""
        text = self.text(path)
        if text is None:
            return None
        # int() takes "1_0", " 1" and other scripts' digits, and none of them is a reading.
        if not re.fullmatch(r"[+-]?[0-9a-fA-F]{1,20}", text.removeprefix("0x") or "-"):
            self.broken(path, f"not a number: {text[:20]!r}")
            return None
        try:
            return int(text, base)
        except ValueError:
            self.broken(path, f"not a number: {text[:20]!r}")
            return None

    def paths(self, pattern: str) -> list[str]:
        """Return what matches a shell pattern, each part of the path on its own, sorted.

        Numbers inside names sort as numbers: cpu2 comes before cpu10.
        """
        found = [""]
        for part in pattern.strip("/").split("/"):
            if not any(letter in part for letter in "*?["):
                found = [f"{folder}/{part}" for folder in found]
                continue
            found = [
                f"{folder}/{name}"
                for folder in found
                for name in self._names(folder)
                if fnmatch.fnmatchcase(name, part)
            ][:NAMES_MAX]
        return [path for path in found if self.exists(path)]

    def exists(self, path: str) -> bool:
        """Whether there is anything at a path."""
        if os.path.lexists(self._at(path)) or self._reason_recorded(path) is not None:
            self.found.add(path)
            return True
        return False

    def node(self, path: str) -> Node | None:
        """Return a device node, or None if there is none."""
        if self._recorded is not None:
            nodes = self._recorded.get("nodes")
            entry = nodes.get(path) if isinstance(nodes, Mapping) else None
            if not isinstance(entry, Mapping):
                return None
            node = Node(path, entry.get("open") is True, str(entry.get("group", "")))
            self.nodes_seen[path] = node
            return node
        try:
            found = os.stat(self._at(path))
        except (OSError, ValueError):
            return None
        if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            return None
        node = Node(
            path,
            os.access(self._at(path), os.R_OK | os.W_OK),
            self._group(found.st_gid),
        )
        self.nodes_seen[path] = node
        return node

    def _group(self, number: int) -> str:
        # Not the `grp` module: it may ask a directory server, and asks this machine, not the root.
        try:
            lines = self._read("/etc/group", _FACT_BYTES_MAX).decode(errors="replace").splitlines()
        except OSError:
            return ""
        for line in lines:
            fields = line.split(":")
            if len(fields) >= 3 and fields[2] == str(number):
                return fields[0]
        return ""

    def _names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._at(folder)) as entries:
                names = [entry.name for entry, _ in zip(entries, range(NAMES_MAX), strict=False)]
        except (OSError, ValueError):
            return []
        return sorted(names, key=_numbers)

    def _read(self, path: str, bytes_max: int) -> bytes:
        # Looked at before it is opened: opening a pipe waits for its writer, and opening a device
        # may do something, a watchdog's start among them.
        if not stat.S_ISREG(os.stat(self._at(path)).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        handle = os.open(self._at(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            raw = b""
            while len(raw) <= bytes_max and (piece := os.read(handle, bytes_max + 1 - len(raw))):
                raw += piece
            return raw
        finally:
            os.close(handle)

    def _at(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def _recording(self) -> Mapping[str, Any] | None:
        if self.root == Path("/"):
            return None
        try:
            found = json.loads(self._read("/" + RECORDING, _FACT_BYTES_MAX))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _reason_recorded(self, path: str) -> str | None:
        errors = (self._recorded or {}).get("errors")
        reason = errors.get(path) if isinstance(errors, Mapping) else None
        return None if reason is None else str(reason)


def _reason(exc: OSError) -> str:
    return (exc.strerror or type(exc).__name__).lower()


def _numbers(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
