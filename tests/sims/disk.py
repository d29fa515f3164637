"""A disk in memory that dies at a chosen operation and forgets what was not fsynced.

It implements the ``FileSystem`` of shoal.agent.updates.fs. The model is the one POSIX allows:

- a file's content is durable after ``sync`` of the file; until then a crash may leave the old
  content, the new one, nothing, half of it, or zeros of its length;
- a name (made, renamed, removed) is durable after ``sync_dir`` of its directory; until then each
  name operation of a directory survives or not, independently of the others;
- a killed process, unlike a power cut, loses nothing.

``omit`` names lines of code (file, line) whose fsync does nothing: a mutation of the code under
test. ``sites`` collects every such line that was seen.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Site = tuple[str, int]


class PowerCutError(BaseException):
    """The machine lost power in the middle of an operation."""


@dataclass(slots=True)
class _File:
    durable: bytes | None
    volatile: bytes


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of names that is not durable yet: ``name`` gets ``node``, or loses it (None)."""

    parent: Path
    sets: tuple[tuple[Path, int | None], ...]


DIR = -1  # the node of a directory


@dataclass
class SimDisk:
    """See the module. ``dies_at`` counts operations from 1; 0 = never."""

    dies_at: int = 0
    omit: frozenset[Site] = frozenset()
    operations: int = 0
    sites: set[Site] = field(default_factory=set)
    full: bool = False
    """No room for one byte more."""
    _nodes: dict[int, _File] = field(default_factory=dict)
    _names: dict[Path, int] = field(default_factory=dict)
    _durable: dict[Path, int] = field(default_factory=dict)
    _pending: list[_Change] = field(default_factory=list)
    _next: int = 0

    # --- FileSystem ------------------------------------------------------------------------------

    def make_dir(self, path: Path) -> bool:
        """Make a directory."""
        self._tick()
        if path in self._names:
            return False
        self._change(path.parent, (path, DIR))
        return True

    def create(self, path: Path, data: bytes) -> None:
        """Make or truncate a file."""
        self._tick()
        if path in self._names:
            self._nodes[self._names[path]].volatile = data
        else:
            self._new(path, data)

    def append(self, path: Path, data: bytes) -> None:
        """Write at the end of a file."""
        self._tick()
        self._room()
        if path in self._names:
            self._nodes[self._names[path]].volatile += data
        else:
            self._new(path, data)

    def reserve(self, path: Path, size: int) -> None:
        """Take space."""
        self._tick()
        self._room()
        if path not in self._names:
            self._new(path, b"")

    def read(self, path: Path, *, bytes_max: int) -> bytes:
        """Return a file's bytes."""
        data = self._file(path).volatile
        if len(data) > bytes_max:
            raise OSError(27, "too large")
        return data

    def size(self, path: Path) -> int | None:
        """Return a file's size."""
        return len(self._file(path).volatile) if path in self._names else None

    def sha256(self, path: Path) -> str | None:
        """Return a file's digest."""
        if path not in self._names:
            return None
        return hashlib.sha256(self._file(path).volatile).hexdigest()

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory."""
        return sorted(name.name for name in self._names if name.parent == path)

    def sync(self, path: Path) -> None:
        """Make content durable."""
        self._tick()
        if self._works():
            node = self._file(path)
            node.durable = node.volatile

    def sync_dir(self, path: Path) -> None:
        """Make names durable."""
        self._tick()
        if self._works():
            for change in self._pending:
                if change.parent == path:
                    _apply(self._durable, change)
            self._pending = [change for change in self._pending if change.parent != path]

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file."""
        self._tick()
        if source.parent != target.parent:
            raise AssertionError("a rename across directories needs two fsyncs")
        self._change(source.parent, (source, None), (target, self._names[source]))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        self._tick()
        if path in self._names:
            self._change(path.parent, (path, None))

    # --- the machine -----------------------------------------------------------------------------

    def boot(self) -> None:
        """Start again after a kill or a power cut."""
        self.dies_at = self.operations = 0

    def rot(self, path: Path) -> None:
        """Flip a bit of a durable file."""
        node = self._file(path)
        data = bytearray(node.volatile)
        data[len(data) // 2] ^= 1
        node.durable = node.volatile = bytes(data)

    def power_cut(self, rng: random.Random) -> None:
        """Become one of the disks that a power cut may leave."""
        chosen = [change for change in self._pending if rng.random() < 0.5]
        if rng.random() < 0.5:  # as often: a prefix, as a journal leaves
            chosen = self._pending[: rng.randint(0, len(self._pending))]
        names = self._left(chosen)
        contents = {node: rng.choice(self._remains(node)) for node in names.values() if node != DIR}
        self._become(names, contents)

    def power_cuts(self) -> Iterator[SimDisk]:
        """Yield every disk that a power cut may leave now."""
        for mask in itertools.product((False, True), repeat=len(self._pending)):
            names = self._left(list(itertools.compress(self._pending, mask)))
            nodes = sorted({node for node in names.values() if node != DIR})
            for contents in itertools.product(*(self._remains(node) for node in nodes)):
                disk = SimDisk(omit=self.omit, sites=self.sites, _next=self._next)
                disk._become(names, dict(zip(nodes, contents, strict=True)))
                yield disk

    def _become(self, names: dict[Path, int], contents: dict[int, bytes]) -> None:
        self._nodes = {node: _File(data, data) for node, data in contents.items()}
        self._names, self._durable, self._pending = dict(names), dict(names), []
        self.boot()

    def _left(self, chosen: list[_Change]) -> dict[Path, int]:
        names = dict(self._durable)
        for change in chosen:
            _apply(names, change)
        # What hangs below a directory whose own name was lost is lost too.
        return {
            path: node
            for path, node in names.items()
            if all(names.get(above, DIR) == DIR for above in path.parents)
            and all(above in names for above in path.parents if above in self._names)
        }

    def _remains(self, node: int) -> list[bytes]:
        file = self._nodes[node]
        if file.durable == file.volatile:
            return [file.volatile]
        new, old = file.volatile, file.durable or b""
        return list(dict.fromkeys((old, new, b"", new[: len(new) // 2], bytes(len(new)))))

    def _tick(self) -> None:
        self.operations += 1
        if self.operations == self.dies_at:
            raise PowerCutError

    def _room(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device")

    def _works(self) -> bool:
        frame = sys._getframe(2)
        site = (Path(frame.f_code.co_filename).name, frame.f_lineno)
        self.sites.add(site)
        return site not in self.omit

    def _new(self, path: Path, data: bytes) -> None:
        if path.parent not in self._names:
            raise FileNotFoundError(path)
        self._next += 1
        self._nodes[self._next] = _File(None, data)
        self._change(path.parent, (path, self._next))

    def _file(self, path: Path) -> _File:
        node = self._names.get(path, DIR)
        if node == DIR:
            raise FileNotFoundError(path)
        return self._nodes[node]

    def _change(self, parent: Path, *sets: tuple[Path, int | None]) -> None:
        change = _Change(parent, sets)
        _apply(self._names, change)
        self._pending.append(change)


def _apply(names: dict[Path, int], change: _Change) -> None:
    for path, node in change.sets:
        if node is None:
            names.pop(path, None)
        else:
            names[path] = node


def formatted(root: Path) -> SimDisk:
    """Return a disk that has one durable folder."""
    disk = SimDisk()
    disk._names = {root: DIR}
    disk._durable = {root: DIR}
    return disk
