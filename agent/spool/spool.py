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
SEGMENT_BYTES_MAX = 256 << 10  # its gap record names at most 4,000 runs: 40 KB, one record
RUNS_MAX = 4000
FRAME_BYTES = 16
READ_TRIES = 5  # an agent saves its ledger about once a second; a scan takes milliseconds
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
        if not 4096 <= self.segment_bytes_max <= min(self.bytes_max // 4, SEGMENT_BYTES_MAX):
            raise ValueError(
                f"segment_bytes_max must be 4096 to {SEGMENT_BYTES_MAX} and at most a quarter of "
                "bytes_max"
            )
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
    """Bytes that are durable …"""
    synced_last: int
    """… and the last seq in them."""
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
        # Records whose segment the disk refused: the next flush writes them to another one, and
        # until that works nothing new is taken. A class in here has no writer.
        self._unsaved: dict[Priority, list[tuple[int, bytes]]] = {}
        self._bytes = 0
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
            self._save()
            self._keep_reserve()
            self._mend_holes()
            self._settle()
            self._recount()

    def close(self) -> None:
        """Make everything durable and close the files."""
        with self._lock:
            if not self.stream:
                return
            try:
                self.flush()
                self._save()
            finally:
                for writer in self._writers.values():
                    writer.file.close()
                self._writers.clear()
                self.stream = b""

    # --- writing ---------------------------------------------------------------------------

    def append(self, kind: Kind, body: dict[str, Any]) -> int:
        """Write one record and return its seq; it is accepted after the next flush.

        Raises:
            SpoolFullError: There is no room, and nothing of a lower class to give up.
            SpoolError: The disk failed. The record is not in the spool, unless its class is the
                one that is never given up: such a record may be there, not durable yet.
            RecordError: The body breaks its schema.
        """
        with self._lock:
            if self._unsaved:
                self._sync_all()
            priority, time_ms = PRIORITY[kind], self._clock()
            while True:
                # Giving up writes a gap record, so the number may have moved.
                seq = self._seq + 1
                payload = records.encode_record(Record(seq, kind, time_ms, body))
                if self._bytes + len(payload) + FRAME_BYTES <= self._config.bytes_max:
                    try:
                        self._write(priority, seq, payload)
                        break
                    except SpoolError as exc:
                        if not _is_no_space(exc):
                            raise
                self._make_room(priority)
            if priority is Priority.VITAL:
                self.flush()
            elif self._waiting >= self._config.flush_records:
                # The record is written and stays. Whoever flushes next hears of the disk; to raise
                # here would have its owner count as lost what is sent later.
                with contextlib.suppress(SpoolError):
                    self.flush()
            return seq

    def flush(self) -> None:
        """Make every record durable: now they are accepted, and may be sent.

        Raises:
            SpoolError: The disk failed twice. Records since the last flush are not accepted yet;
                they are kept in memory, and the next flush tries again.
        """
        with self._lock:
            self._sync_all()
            if self._dirty:
                self._save()

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

        Raises:
            SpoolError: The disk failed.
        """
        with self._lock, _disk():
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
        """Forget the records of a stream up to ``upto``: the server holds them.

        Raises:
            SpoolError: The disk failed; the files are unlinked at a later acknowledgement.
        """
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
            self._save()
            with _disk():
                for segment in done:
                    segment.path.unlink(missing_ok=True)
                    self._segments[stream].remove(segment)
            self._settle()
            self._recount()

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
            try:  # a torn frame would end the file for readers
                writer.file.truncate(segment.size)
                writer.file.seek(segment.size)
            except OSError:
                self._abandon(priority)
            raise SpoolError(f"the spool could not be written: {exc.strerror}") from exc
        segment.size += len(data)
        self._bytes += len(data)
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
        head = segments.header(self.stream, priority)
        file = path.open("wb", buffering=0)
        try:
            _write_all(file, head)
            sync_folder(folder)
        except BaseException:
            file.close()
            raise
        segment = Segment(path, self.stream, priority, first, first - 1, 0, len(head))
        self._segments[self.stream].append(segment)
        self._recount()
        return _Writer(segment, file, len(head), first - 1)

    def _sync_all(self) -> None:
        for priority in list(self._unsaved):
            self._save_again(priority)
        for priority in list(self._writers):
            self._sync(priority)
        self._accepted, self._waiting = self._seq, 0

    def _sync(self, priority: Priority) -> None:
        writer = self._writers[priority]
        if not writer.waiting:
            return
        try:
            os.fdatasync(writer.file.fileno())
        except OSError:
            # After a failed fsync the kernel may have thrown the pages away: what was written
            # since the last good one is written again elsewhere, never just synced again.
            self._abandon(priority)
            self._save_again(priority)
            return
        writer.synced, writer.synced_last = writer.segment.size, writer.segment.last
        writer.waiting.clear()

    def _abandon(self, priority: Priority) -> None:
        """Close a segment that the disk refused; what it did not sync must go elsewhere."""
        old = self._writers.pop(priority)
        segment = old.segment
        if old.waiting:
            self._unsaved[priority] = old.waiting
        with contextlib.suppress(OSError):
            old.file.truncate(old.synced)
        with contextlib.suppress(OSError):
            old.file.close()
        segment.count -= len(old.waiting)
        segment.size, segment.last = old.synced, old.synced_last
        if not segment.count:
            self._segments[self.stream].remove(segment)
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)
        self._recount()

    def _save_again(self, priority: Priority) -> None:
        """Write records that a segment lost to a new one, durably."""
        again = self._unsaved[priority]
        with _disk():
            writer = self._create(priority, again[0][0])
            segment = writer.segment
            try:
                for seq, payload in again:
                    data = segments.frame(seq, payload)
                    _write_all(writer.file, data)
                    segment.size += len(data)
                    segment.last, segment.count = seq, segment.count + 1
                os.fdatasync(writer.file.fileno())
            except OSError:
                writer.file.close()
                self._segments[self.stream].remove(segment)
                with contextlib.suppress(OSError):
                    segment.path.unlink(missing_ok=True)
                raise
        writer.synced, writer.synced_last = segment.size, segment.last
        self._writers[priority] = writer
        self._recount()
        del self._unsaved[priority]

    def _save(self) -> None:
        """Replace the ledger; on a full disk in the room that is kept for it."""
        entry = self._ledger.streams[self.stream]
        entry.last = max(entry.last, self._accepted)
        with _disk():
            try:
                save(self._root / LEDGER, self._ledger)
            except OSError as exc:
                if exc.errno not in NO_SPACE:
                    raise
                (self._root / RESERVE).unlink(missing_ok=True)
                save(self._root / LEDGER, self._ledger)
        self._dirty = False

    # --- giving up -------------------------------------------------------------------------

    def _make_room(self, priority: Priority) -> None:
        """Give up the oldest segment of the least class."""
        victim = self._victim(priority)
        if victim is None:
            self.refused += 1
            raise SpoolFullError(
                f"the spool has no room in {self._config.bytes_max} bytes, or on its disk, and "
                "nothing may be given up",
                hint="let the device reach its broker, free disk space, or raise spool.bytes_max",
            )
        self._give_up(victim)

    def _recount(self) -> None:
        """Add up the segments' sizes; whoever adds or removes a segment calls this."""
        self._bytes = sum(each.size for found in self._segments.values() for each in found)

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
        """Cover a segment by a gap record, durably, then unlink it.

        The ledger is saved before and after: before, because a start after a crash unlinks what a
        gap record covers, and must know by then which of it the server already held; after, so
        that who reads the accounts from disk sees the loss.
        """
        self.flush()
        writer = self._writers.get(victim.priority)
        if writer is not None and writer.segment is victim:
            self._writers.pop(victim.priority).file.close()
        entry = self._ledger.streams[victim.stream]
        gone = [
            each.seq
            for each in segments.frames(victim.path)
            if each.seq > entry.upto and not _covered(entry, each.seq)
        ]
        if gone:
            self._cover(victim.stream, str(victim.priority), _runs(gone), "spool full")
        self._segments[victim.stream].remove(victim)  # what is covered must never be sent
        self._recount()
        self._save()
        with _disk():
            victim.path.unlink(missing_ok=True)
        self._keep_reserve()

    def _cover(self, stream: bytes, label: str, runs: list[tuple[int, int]], reason: str) -> None:
        """Make a gap record about some numbers of a stream durable, and enter the loss."""
        count = sum(last - first + 1 for first, last in runs)
        flat = [end for run in runs for end in run]
        body = {"stream": stream, "class": label, "runs": flat, "count": count, "reason": reason}
        seq = self._seq + 1
        payload = records.encode_record(Record(seq, Kind.GAP, self._clock(), body))
        try:
            self._write(Priority.VITAL, seq, payload)
        except SpoolError as exc:
            if not _is_no_space(exc):
                raise
            (self._root / RESERVE).unlink(missing_ok=True)  # the room that was kept for this
            self._write(Priority.VITAL, seq, payload)
        self._sync_all()
        entry = self._ledger.streams[stream]
        entry.last = max(entry.last, runs[-1][1])
        entry.lost += runs
        self._ledger.lost += count
        self._dirty = True

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
        """Cover numbers that a power cut or a rotten sector took out of a stream.

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
                if seq not in known and not _covered(entry, seq)
            ]
            runs = _runs(gone)
            for start in range(0, len(runs), RUNS_MAX):
                self._cover(stream, "none", runs[start : start + RUNS_MAX], "power cut")
        if self._dirty:
            self._save()

    def _settle(self) -> None:
        """Fold streams of earlier boots that the server holds in full into the totals."""
        for stream, entry in list(self._ledger.streams.items()):
            end = _last(self._ledger, self._segments, stream)
            if stream == self.stream or end > entry.upto:
                continue
            self._ledger.produced += end
            del self._ledger.streams[stream]
            left = self._segments.pop(stream, [])
            self._save()
            with _disk():
                for segment in left:
                    segment.path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    (self._root / stream.hex()).rmdir()

    def _keep_reserve(self) -> None:
        path = self._root / RESERVE
        if not path.exists():
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._config.reserve_bytes)
            except OSError:  # no room now; the next segment that goes makes some
                path.unlink(missing_ok=True)


def read_totals(root: Path) -> tuple[Totals, dict[str, int]]:
    """Return the accounts and counters on disk, without touching anything.

    Works beside a running agent and after one: what it wrote and did not flush yet may or may
    not be counted.

    Raises:
        SpoolError: The folder cannot be read, or its ledger is damaged.
    """
    path = root / LEDGER
    with _disk():
        for _ in range(READ_TRIES):
            before = path.read_bytes() if path.exists() else b""
            ledger, found = _scan(root)
            if not path.exists() or path.read_bytes() == before:
                break  # no segment was unlinked while they were counted
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


def _covered(entry: StreamEntry, seq: int) -> bool:
    return any(first <= seq <= last for first, last in entry.lost)


def _is_no_space(exc: SpoolError) -> bool:
    return isinstance(exc.__cause__, OSError) and exc.__cause__.errno in NO_SPACE


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
