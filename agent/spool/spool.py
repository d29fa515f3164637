"""A segment log with classes, a byte budget and exact accounts.

    append --> segment of (stream, class) --fdatasync--> accepted --link--> server
                                                             ^                 |
                    unlink <-- ledger <-- acknowledge <------+-----------------+

Invariants, after every crash:

1. Every accepted record is on disk, or the server holds it, or a gap record covers it.
2. produced = acknowledged + spooled + lost, each counted from what is on disk.
3. A record is sent only once it is accepted.

A stream is one boot; ``seq`` counts from 1 over all classes of a stream. Classes live in files of
their own, so that a full spool can give up the oldest records of the least class by unlinking
whole files. What is given up, or torn out of the sequence by a power cut, is covered by a gap
record in the class that is never given up.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...proto import records
from ...proto.records import PRIORITY, Kind, Priority, Record
from ..errors import AgentError
from . import segments
from .ledger import Ledger, StreamEntry, load, save, sync_folder
from .segments import Segment

LEDGER = "ledger"
RESERVE = "reserve"


class SpoolError(AgentError):
    """The disk failed; records since the last flush are not accepted."""

    code = "agent.spool"
    retry = True


class SpoolFullError(SpoolError):
    """Nothing more may be given up to make room; the record was not accepted."""

    code = "agent.spool.full"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolConfig:
    """How much may wait on disk, and how often it is made durable."""

    bytes_max: int = 64 << 20
    """Size of all segments, bytes."""
    segment_bytes_max: int = 256 << 10
    """Size of one segment, bytes: what is given up at once."""
    flush_records: int = 100
    """Records that may wait for one fdatasync …"""
    flush_s: float = 1.0
    """… and seconds. Records of the class that is never given up do not wait."""
    reserve_bytes: int = 64 << 10
    """Space kept for gap records on a full disk, bytes."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 4096 <= self.segment_bytes_max <= self.bytes_max // 4:
            raise ValueError("segment_bytes_max must be 4096 to a quarter of bytes_max")
        if self.flush_records < 1 or not 0 < self.flush_s <= 3600 or self.reserve_bytes < 4096:
            raise ValueError("flush_records >= 1, 0 < flush_s <= 3600, reserve_bytes >= 4096")


@dataclass(frozen=True, slots=True)
class Totals:
    """The accounts; ``produced`` is the sum of the other three."""

    produced: int
    acknowledged: int
    spooled: int
    lost: int


@dataclass(slots=True)
class _Writer:
    """The open segment of one class."""

    segment: Segment
    file: BinaryIO
    synced: int
    waiting: list[tuple[int, bytes]] = field(default_factory=list)
    """Records since the last fdatasync, to be written again if it fails."""


class Spool:
    """The spool of one agent. Thread-safe. Made cheap; ``open`` reads the disk."""

    def __init__(self, root: Path, *, config: SpoolConfig, clock: Callable[[], int]) -> None:
        """Take the folder (made if missing), sizes, and a clock of Unix ms."""
        self._root, self._config, self._clock = root, config, clock
        self._lock = threading.RLock()
        self._ledger = Ledger()
        self._segments: dict[bytes, list[Segment]] = {}
        self._writers: dict[Priority, _Writer] = {}
        self._seq = 0
        self._accepted = 0
        self._waiting = 0
        self._dirty = False
        self.stream = b""
        """Id of this boot's stream; set by open."""
        self.refused = 0
        """Records that were not accepted because the spool was full."""

    # --- life ------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the disk, mend what a crash tore, and start a new stream.

        Raises:
            SpoolError: The folder cannot be used.
        """
        with self._lock, _disk():
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ledger, self._segments = _scan(self._root)
            for found in self._segments.values():
                for segment in found:
                    segments.cut(segment)
            known = {each.path for found in self._segments.values() for each in found}
            for path in self._root.glob("*/*.seg"):
                if path not in known:
                    path.unlink()  # holds no whole frame: nothing in it was accepted
            self._drop_covered()
            self.stream = os.urandom(records.STREAM_SIZE)
            self._ledger.boots += 1
            self._ledger.streams[self.stream] = StreamEntry(self._ledger.boots)
            self._segments[self.stream] = []
            (self._root / self.stream.hex()).mkdir(mode=0o700)
            sync_folder(self._root)
            save(self._root / LEDGER, self._ledger)
            self._keep_reserve()
            self._mend_holes()
            self._settle()

    def close(self) -> None:
        """Make everything durable and close the files."""
        with self._lock:
            if not self.stream:
                return
            self.flush()
            for writer in self._writers.values():
                writer.file.close()
            self._writers.clear()
            with _disk():
                save(self._root / LEDGER, self._ledger)
            self.stream = b""

    # --- writing ---------------------------------------------------------------------------

    def append(self, kind: Kind, body: dict[str, Any]) -> int:
        """Write one record and return its seq; it is accepted after the next flush.

        Raises:
            SpoolFullError: There is no room, and nothing of a lower class to give up.
            SpoolError: The disk failed.
            RecordError: The body breaks its schema.
        """
        with self._lock:
            priority = PRIORITY[kind]
            record = Record(self._seq + 1, kind, self._clock(), body)
            payload = records.encode_record(record)
            self._make_room(len(payload), priority)
            # Making room may have written gap records: the number may have moved.
            if record.seq != self._seq + 1:
                record = Record(self._seq + 1, kind, record.time_ms, body)
                payload = records.encode_record(record)
            self._write(priority, record.seq, payload)
            if priority is Priority.VITAL or self._waiting >= self._config.flush_records:
                self.flush()
            return record.seq

    def flush(self) -> None:
        """Make every record durable: now they are accepted, and may be sent.

        Raises:
            SpoolError: The disk failed twice; records since the last flush are not accepted.
        """
        with self._lock:
            for priority in list(self._writers):
                self._sync(priority)
            self._accepted = self._seq
            self._waiting = 0
            if self._dirty:
                with _disk():
                    save(self._root / LEDGER, self._ledger)
                self._dirty = False

    def count(self, name: str, amount: int) -> None:
        """Add to a counter that survives restarts, such as bytes sent."""
        with self._lock:
            counters = self._ledger.counters
            counters[name] = counters.get(name, 0) + amount
            self._dirty = True

    # --- reading ---------------------------------------------------------------------------

    def streams(self) -> list[bytes]:
        """Return the streams that have accepted records the server may lack, oldest first."""
        with self._lock:
            entries = self._ledger.streams
            ordered = sorted(entries, key=lambda stream: entries[stream].order)
            return [stream for stream in ordered if self._end(stream) > entries[stream].upto]

    def batch(
        self, stream: bytes, *, vital: bool, after: int, records_max: int, bytes_max: int
    ) -> tuple[list[bytes], int]:
        """Return accepted records of a stream that follow ``after``, and the last one's seq.

        The class that is never given up is read apart and should be sent first: a gap record
        far up in the sequence lets the server's acknowledgement pass over what is lost.

        Args:
            stream: One of :meth:`streams`.
            vital: Read the class that is never given up, or all others.
            after: Seq behind which to start; 0 = at the start.
            records_max: Most records, at least 1.
            bytes_max: Most bytes of all together; one record is returned even if it is larger.
        """
        with self._lock:
            entry = self._ledger.streams.get(stream)
            if entry is None:
                return [], after
            start, end = max(after, entry.upto), self._end(stream)
            found: list[bytes] = []
            size = 0
            for seq, payload in self._read(stream, start, lambda p: (p is Priority.VITAL) is vital):
                if seq > end or (found and size + len(payload) > bytes_max):
                    break
                found.append(payload)
                size, after = size + len(payload), seq
                if len(found) >= records_max:
                    break
            return found, after

    def acknowledge(self, stream: bytes, upto: int) -> None:
        """Forget the records of a stream up to ``upto``: the server holds them."""
        with self._lock:
            entry = self._ledger.streams.get(stream)
            if entry is None or upto <= entry.upto or upto > self._end(stream):
                return  # repeated, late, or about records that were never sent
            entry.upto = upto
            entry.last = max(entry.last, upto)
            entry.lost = [each for each in entry.lost if each[1] > upto]
            self._dirty = True
            held = {id(writer.segment) for writer in self._writers.values()}
            done = [s for s in self._segments[stream] if s.last <= upto and id(s) not in held]
            settled = stream != self.stream and self._end(stream) <= upto
            if not done and not settled:
                return
            with _disk():
                save(self._root / LEDGER, self._ledger)
                self._dirty = False
                for segment in done:
                    segment.path.unlink(missing_ok=True)
                    self._segments[stream].remove(segment)
            self._settle()

    def totals(self) -> Totals:
        """Return the accounts as of the last flush."""
        with self._lock:
            return _totals(self._ledger, self._segments, {self.stream: self._accepted})

    def counters(self) -> dict[str, int]:
        """Return the counters that survive restarts."""
        with self._lock:
            return dict(self._ledger.counters)

    # --- inside ----------------------------------------------------------------------------

    def _end(self, stream: bytes) -> int:
        """Return the last accepted seq of a stream."""
        return (
            self._accepted if stream == self.stream else _last(self._ledger, self._segments, stream)
        )

    def _read(
        self, stream: bytes, after: int, wanted: Callable[[Priority], bool]
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (seq, payload) of a stream over the wanted classes, ascending."""
        chains: dict[Priority, list[Segment]] = {}
        for segment in self._segments.get(stream, []):
            if segment.last > after and wanted(segment.priority):
                chains.setdefault(segment.priority, []).append(segment)

        def chain(found: list[Segment]) -> Iterator[tuple[int, bytes]]:
            for segment in sorted(found, key=lambda each: each.first):
                for frame in segments.frames(segment.path):
                    if frame.seq > after:
                        yield frame.seq, frame.payload

        return heapq.merge(*[chain(found) for found in chains.values()])

    def _write(self, priority: Priority, seq: int, payload: bytes) -> None:
        data = segments.frame(seq, payload)
        writer = self._writer(priority, seq)
        segment = writer.segment
        try:
            _write_all(writer.file, data)
        except OSError as exc:
            with contextlib.suppress(OSError):
                writer.file.truncate(segment.size)  # a torn frame would end the file for readers
                writer.file.seek(segment.size)
            raise SpoolError(f"the spool could not be written: {exc.strerror}") from exc
        segment.size += len(data)
        segment.last, segment.count = seq, segment.count + 1
        writer.waiting.append((seq, payload))
        self._seq = seq
        self._waiting += 1

    def _writer(self, priority: Priority, seq: int) -> _Writer:
        writer = self._writers.get(priority)
        if writer is not None and writer.segment.size >= self._config.segment_bytes_max:
            self._sync(priority)
            self._writers.pop(priority).file.close()
            writer = None
        if writer is None:
            with _disk():
                writer = self._create(priority, seq)
            self._writers[priority] = writer
        return writer

    def _create(self, priority: Priority, first: int) -> _Writer:
        folder = self._root / self.stream.hex()
        path = folder / segments.name(priority, first)
        file = path.open("wb", buffering=0)
        head = segments.header(self.stream, priority)
        _write_all(file, head)
        sync_folder(folder)
        segment = Segment(path, self.stream, priority, first, first - 1, 0, len(head))
        self._segments[self.stream].append(segment)
        return _Writer(segment, file, len(head))

    def _sync(self, priority: Priority) -> None:
        writer = self._writers[priority]
        if not writer.waiting:
            return
        try:
            os.fdatasync(writer.file.fileno())
        except OSError:
            # After a failed fsync the kernel may have thrown the pages away: what was written
            # since the last good one is written again elsewhere, never just synced again.
            writer = self._rewrite(priority)
        writer.synced = writer.segment.size
        writer.waiting.clear()

    def _rewrite(self, priority: Priority) -> _Writer:
        old = self._writers.pop(priority)
        again = list(old.waiting)
        with _disk():
            with contextlib.suppress(OSError):
                old.file.truncate(old.synced)
            old.file.close()
            kept = segments.scan(old.segment.path)
            self._segments[self.stream].remove(old.segment)
            if kept is not None:
                self._segments[self.stream].append(kept)
            else:
                old.segment.path.unlink(missing_ok=True)
            writer = self._create(priority, again[0][0])
            for seq, payload in again:
                data = segments.frame(seq, payload)
                _write_all(writer.file, data)
                writer.segment.size += len(data)
                writer.segment.last, writer.segment.count = seq, writer.segment.count + 1
            os.fdatasync(writer.file.fileno())
        self._writers[priority] = writer
        return writer

    # --- giving up -------------------------------------------------------------------------

    def _make_room(self, size: int, priority: Priority) -> None:
        """Give up old records of the least classes until ``size`` more bytes fit."""
        while self._size() + size + 64 > self._config.bytes_max:
            victim = self._victim(priority)
            if victim is None:
                self.refused += 1
                raise SpoolFullError(
                    f"the spool holds {self._config.bytes_max} bytes and nothing may be given up",
                    hint="let the device reach its broker, or raise spool.bytes_max",
                )
            self._give_up(victim)

    def _size(self) -> int:
        return sum(each.size for found in self._segments.values() for each in found)

    def _victim(self, priority: Priority) -> Segment | None:
        """Return the oldest segment of the least class, not above ``priority``, never VITAL."""
        entries = self._ledger.streams
        for candidate in segments.CLASSES[: segments.CLASSES.index(priority) + 1]:
            found = [
                (entries[stream].order, each.first, each)
                for stream, chain in self._segments.items()
                for each in chain
                if each.priority is candidate and candidate is not Priority.VITAL and each.count
            ]
            if found:
                return min(found, key=lambda item: item[:2])[2]
        return None

    def _give_up(self, victim: Segment) -> None:
        """Cover a segment by a gap record, durably, then unlink it."""
        writer = self._writers.get(victim.priority)
        if writer is not None and writer.segment is victim:
            self._sync(victim.priority)
            self._writers.pop(victim.priority).file.close()
        entry = self._ledger.streams[victim.stream]
        gone = [each.seq for each in segments.frames(victim.path) if each.seq > entry.upto]
        if gone:
            self._cover(victim.stream, str(victim.priority), gone, "spool full")
        with _disk():
            victim.path.unlink(missing_ok=True)
            self._segments[victim.stream].remove(victim)
        self._keep_reserve()

    def _cover(self, stream: bytes, label: str, gone: list[int], reason: str) -> None:
        """Write a gap record about some numbers of a stream and enter the loss into the ledger."""
        runs = _runs(gone)
        flat = [end for run in runs for end in run]
        body = {
            "stream": stream, "class": label, "runs": flat, "count": len(gone), "reason": reason,
        }  # fmt: skip
        seq = self._seq + 1
        payload = records.encode_record(Record(seq, Kind.GAP, self._clock(), body))
        try:
            self._write(Priority.VITAL, seq, payload)
        except SpoolError:
            (self._root / RESERVE).unlink(missing_ok=True)  # the room that was kept for this
            self._write(Priority.VITAL, seq, payload)
        self._sync(Priority.VITAL)
        entry = self._ledger.streams[stream]
        entry.last = max(entry.last, gone[-1])
        entry.lost += runs
        self._ledger.lost += len(gone)
        with _disk():
            save(self._root / LEDGER, self._ledger)

    def _drop_covered(self) -> None:
        """Finish what a crash interrupted between a gap record and the unlink that follows it."""
        for found in list(self._segments.values()):
            for segment in found:
                if segment.priority is Priority.VITAL:
                    for frame in segments.frames(segment.path):
                        self._drop_one(frame.payload)

    def _drop_one(self, payload: bytes) -> None:
        record = records.decode_record(payload)
        if record.kind is not Kind.GAP:
            return
        body = record.body
        stream, flat = body["stream"], body["runs"]
        runs = list(zip(flat[::2], flat[1::2], strict=True))
        chain = self._segments.get(stream, [])
        for segment in list(chain):
            if str(segment.priority) == body["class"] and runs[0][0] <= segment.last <= runs[-1][1]:
                segment.path.unlink(missing_ok=True)
                chain.remove(segment)
        entry = self._ledger.streams.get(stream)
        if entry is not None and runs[-1][1] > entry.upto and runs[-1] not in entry.lost:
            entry.lost += runs
            entry.last = max(entry.last, runs[-1][1])
            self._ledger.lost += body["count"]

    def _mend_holes(self) -> None:
        """Cover numbers that a power cut took out of the middle of a stream.

        Classes are synced one after the other; a cut between two leaves a later number durable
        and an earlier one not. It was never accepted, but the sequence must have no hole.
        """
        for stream, entry in list(self._ledger.streams.items()):
            if stream == self.stream:
                continue
            known = {seq for seq, _ in self._read(stream, entry.upto, lambda _: True)}
            end = _last(self._ledger, self._segments, stream)
            gone = [
                seq
                for seq in range(entry.upto + 1, end + 1)
                if seq not in known and not any(a <= seq <= b for a, b in entry.lost)
            ]
            if gone:
                self._cover(stream, "none", gone, "power cut")
        if self._seq:
            self._accepted = self._seq

    def _settle(self) -> None:
        """Fold streams of earlier boots that the server holds in full into the totals."""
        for stream, entry in list(self._ledger.streams.items()):
            end = _last(self._ledger, self._segments, stream)
            if stream == self.stream or end > entry.upto:
                continue
            self._ledger.produced += end
            del self._ledger.streams[stream]
            left = self._segments.pop(stream, [])
            with _disk():
                save(self._root / LEDGER, self._ledger)
                for segment in left:
                    segment.path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    (self._root / stream.hex()).rmdir()

    def _keep_reserve(self) -> None:
        path = self._root / RESERVE
        if not path.exists():
            with contextlib.suppress(OSError), path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._config.reserve_bytes)


def read_totals(root: Path) -> tuple[Totals, dict[str, int]]:
    """Return the accounts and counters on disk, without touching anything.

    Works beside a running agent and after one: what it wrote and did not flush yet may or may
    not be counted.

    Raises:
        SpoolError: The folder cannot be read, or its ledger is damaged.
    """
    with _disk():
        ledger, found = _scan(root)
        return _totals(ledger, found, {}), dict(ledger.counters)


def _scan(root: Path) -> tuple[Ledger, dict[bytes, list[Segment]]]:
    try:
        ledger = load(root / LEDGER)
    except ValueError as exc:
        raise SpoolError(
            f"the spool's ledger in {root} is damaged",
            hint="move the folder away and start again; what it held cannot be counted",
        ) from exc
    found: dict[bytes, list[Segment]] = {stream: [] for stream in ledger.streams}
    for folder in sorted(root.glob("*/")):
        for path in sorted(folder.glob("*.seg")):
            try:
                segment = segments.scan(path)
            except FileNotFoundError:
                continue  # a running agent unlinked it
            if segment is not None and segment.stream in found:
                found[segment.stream].append(segment)
    return ledger, found


def _last(ledger: Ledger, found: dict[bytes, list[Segment]], stream: bytes) -> int:
    entry = ledger.streams[stream]
    ends = [each.last for each in found.get(stream, []) if each.count]
    return max(entry.upto, entry.last, *ends) if ends else max(entry.upto, entry.last)


def _totals(ledger: Ledger, found: dict[bytes, list[Segment]], ends: dict[bytes, int]) -> Totals:
    produced, spooled = ledger.produced, 0
    for stream, entry in ledger.streams.items():
        end = ends.get(stream, _last(ledger, found, stream))
        produced += end
        spooled += max(0, end - entry.upto) - sum(
            last - max(first, entry.upto + 1) + 1 for first, last in entry.lost if last > entry.upto
        )
    return Totals(produced, produced - spooled - ledger.lost, spooled, ledger.lost)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as runs (first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = file.write(view)
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[done:]


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise SpoolError(
            f"the spool's disk failed: {exc.strerror or exc}", hint="check space and permissions"
        ) from exc
