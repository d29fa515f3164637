"""The spool: produced = acknowledged + spooled + lost, after every crash at every disk operation.

A model of the server stores what it is sent, exactly as ingest does: unique by (stream, seq),
acknowledging up to the first number that is neither stored nor told as lost. A number is never
both: what arrived before it was told as lost counts as stored, what arrives later as lost.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shoal.agent.spool.spool as module
from shoal.agent.spool import Spool, SpoolConfig, SpoolError, SpoolFullError, ledger, read_totals
from shoal.proto.records import Kind, decode_record

SMALL = SpoolConfig(bytes_max=32768, segment_bytes_max=4096, flush_records=5, reserve_bytes=4096)
EVENT: dict[str, Any] = {"name": "n", "severity": "info", "text": "t" * 300, "data": {}}
LABELS: dict[str, Any] = {
    "model": "a" * 64, "index": 1, "split": 0, "labelled": 1, "correct": 1, "confusion": [1] * 400,
}  # fmt: skip
UPDATE: dict[str, Any] = {
    "rollout": "r", "counter": 1, "model": "a" * 64, "state": "trial", "reason": "",
}  # fmt: skip
BODIES = {Kind.EVENT: EVENT, Kind.LABELS: LABELS, Kind.UPDATE: UPDATE}


def opened(root: Path, config: SpoolConfig = SMALL) -> Spool:
    """Return an open spool."""
    spool = Spool(root, config=config, clock=lambda: 1_700_000_000_000)
    spool.open()
    return spool


class Server:
    """What ingest does, in memory."""

    def __init__(self) -> None:
        self.stored: dict[tuple[bytes, int], Kind] = {}
        self.gone: dict[tuple[bytes, int], str] = {}
        """Numbers that gap records gave up, with the reason."""

    def take(self, stream: bytes, payloads: list[bytes]) -> None:
        """Store a batch."""
        for payload in payloads:
            record = decode_record(payload)
            if (stream, record.seq) in self.stored or (stream, record.seq) in self.gone:
                continue
            self.stored[stream, record.seq] = record.kind
            if record.kind is Kind.GAP:
                flat = record.body["runs"]
                runs = list(zip(flat[::2], flat[1::2], strict=True))
                assert sum(b - a + 1 for a, b in runs) == record.body["count"]
                for key in ((record.body["stream"], n) for a, b in runs for n in range(a, b + 1)):
                    assert key not in self.gone, "no number is given up twice"
                    # Only what is accepted is sent, and that a power cut cannot tear.
                    assert key not in self.stored or record.body["reason"] != "power cut"
                    if key not in self.stored:
                        self.gone[key] = record.body["reason"]

    def upto(self, stream: bytes) -> int:
        """Return the last number without a hole before it."""
        seq = 0
        while True:
            after = seq + 1
            if (stream, after) not in self.stored and (stream, after) not in self.gone:
                return seq
            seq = after

    @property
    def lost(self) -> int:
        """Records that gap records gave up."""
        return len(self.gone)


def deliver(spool: Spool, server: Server, *, batches: int = 1000, ack: bool = True) -> None:
    """Send what waits, vital records first."""
    cursors: dict[tuple[bytes, bool], int] = {}
    for _ in range(batches):
        waiting = spool.streams()
        for vital, stream in [(True, each) for each in waiting] + [
            (False, each) for each in waiting
        ]:
            after = cursors.get((stream, vital), 0)
            got, last = spool.batch(stream, vital=vital, after=after, records_max=7, bytes_max=4000)
            if got:
                server.take(stream, got)
                cursors[stream, vital] = last
                break
        else:
            return
        if ack:
            # Gaps speak of other streams too: the server acknowledges all that moved.
            for each in waiting:
                spool.acknowledge(each, server.upto(each))


def check(root: Path, server: Server) -> None:
    """Both sides counted the same."""
    totals, _ = read_totals(root)
    assert totals.produced == totals.acknowledged + totals.spooled + totals.lost
    assert totals.spooled == 0
    assert totals.lost >= server.lost  # what was acknowledged too late to be known counts as lost
    assert totals.produced == len(server.stored) + server.lost


def test_records_come_back_in_order_over_classes(tmp_path: Path) -> None:
    """One sequence over all classes; only what was flushed may be sent."""
    spool = opened(tmp_path)
    for kind in (Kind.EVENT, Kind.LABELS, Kind.EVENT):
        spool.append(kind, BODIES[kind])
    assert spool.streams() == []
    spool.flush()
    got, last = spool.batch(spool.stream, vital=False, after=0, records_max=10, bytes_max=60_000)
    assert [decode_record(each).seq for each in got] == [1, 2, 3] and last == 3
    got, last = spool.batch(spool.stream, vital=False, after=1, records_max=1, bytes_max=60_000)
    assert [decode_record(each).seq for each in got] == [2] and last == 2
    got, _ = spool.batch(spool.stream, vital=False, after=0, records_max=10, bytes_max=1)
    assert len(got) == 1, "one record is sent even if it is larger than the batch"
    spool.close()


def test_vital_records_do_not_wait(tmp_path: Path) -> None:
    """An update's result is durable at once."""
    spool = opened(tmp_path)
    spool.append(Kind.UPDATE, UPDATE)
    assert spool.totals().spooled == 1
    spool.close()


def test_survives_a_restart(tmp_path: Path) -> None:
    """What an earlier boot could not send is sent under its own stream, and settled."""
    spool, server = opened(tmp_path), Server()
    first = spool.stream
    for _ in range(20):
        spool.append(Kind.EVENT, EVENT)
    spool.close()
    spool = opened(tmp_path)
    spool.append(Kind.EVENT, EVENT)
    spool.flush()
    assert spool.streams() == [first, spool.stream]
    deliver(spool, server)
    assert spool.totals() == module.Totals(21, 21, 0, 0)
    spool.close()
    check(tmp_path, server)
    assert not (tmp_path / first.hex()).exists()


def test_a_full_spool_gives_up_the_least_class_first(tmp_path: Path) -> None:
    """Windows go before results, results before nothing; each loss is covered and counted."""
    spool, server = opened(tmp_path), Server()
    for _ in range(12):
        spool.append(Kind.EVENT, EVENT)
    for _ in range(100):
        spool.append(Kind.LABELS, LABELS)
    spool.flush()
    assert spool.totals().lost > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.seg")) <= SMALL.bytes_max
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    kinds = list(server.stored.values())
    assert kinds.count(Kind.EVENT) == 12
    assert 0 < kinds.count(Kind.LABELS) < 100


def test_when_only_vital_records_are_left_it_says_full(tmp_path: Path) -> None:
    """Not accepted means not promised: the record is refused and counted."""
    spool = opened(tmp_path)
    with pytest.raises(SpoolFullError, match="nothing may be given up"):
        for _ in range(1000):
            spool.append(Kind.UPDATE, UPDATE)
    before = spool.totals()
    with pytest.raises(SpoolFullError):
        spool.append(Kind.EVENT, EVENT)
    assert spool.totals() == before and spool.refused == 2
    spool.close()


@pytest.mark.parametrize("damage", ["cut", "flip", "zeros", "garbage"])
def test_a_torn_tail_is_cut_back(tmp_path: Path, damage: str) -> None:
    """What stands behind the last whole frame was never accepted: as if it had not been."""
    spool, server = opened(tmp_path), Server()
    for _ in range(4):
        spool.append(Kind.EVENT, EVENT)
    spool.flush()
    spool.append(Kind.EVENT, EVENT)  # written, not accepted
    (path,) = tmp_path.glob("*/*.seg")
    data = path.read_bytes()
    tail = {
        "cut": data[:-5],
        "flip": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "zeros": data[:-300] + bytes(300),
        "garbage": data + os.urandom(100),
    }
    path.write_bytes(tail[damage])
    killed(spool)
    spool = opened(tmp_path)
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert len(server.stored) == (5 if damage == "garbage" else 4)
    assert server.lost == 0


def test_a_rotten_record_is_reported_lost(tmp_path: Path) -> None:
    """Unlike a torn tail it had been accepted: the loss is told and counted, never silent."""
    spool, server = opened(tmp_path), Server()
    for _ in range(4):
        spool.append(Kind.EVENT, EVENT)
    spool.close()
    (path,) = tmp_path.glob("*/*.seg")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    spool = opened(tmp_path)
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert server.lost == 1


def test_a_failed_fsync_is_written_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After EIO the pages may be gone: the records go to a new segment, and none is lost."""
    spool, server = opened(tmp_path), Server()
    spool.append(Kind.EVENT, EVENT)
    spool.flush()
    spool.append(Kind.EVENT, EVENT)
    real, calls = os.fdatasync, []

    def once(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fdatasync", once)
    spool.flush()
    assert len(calls) == 2
    spool.append(Kind.EVENT, EVENT)
    deliver_after = Server()
    spool.flush()
    deliver(spool, deliver_after)
    assert [seq for _, seq in deliver_after.stored] == [1, 2, 3]
    spool.close()
    check(tmp_path, deliver_after)
    assert not server.stored


def test_after_two_failed_fsyncs_the_next_flush_saves_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk refuses, nothing is accepted and nothing new is taken; then all is there."""
    spool, server = opened(tmp_path), Server()
    spool.append(Kind.EVENT, EVENT)
    spool.flush()
    spool.append(Kind.EVENT, EVENT)
    spool.append(Kind.LABELS, LABELS)
    real = os.fdatasync

    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(SpoolError, match="Input/output"):
        spool.flush()
    with pytest.raises(SpoolError, match="Input/output"):
        spool.append(Kind.EVENT, EVENT)
    assert spool.totals().produced == 1
    monkeypatch.setattr(os, "fdatasync", real)
    assert spool.append(Kind.EVENT, EVENT) == 4
    spool.flush()
    deliver(spool, server)
    assert [seq for _, seq in server.stored] == [1, 2, 3, 4]
    spool.close()
    check(tmp_path, server)
    assert server.lost == 0


def test_a_record_that_is_written_is_not_refused_for_the_flush_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hears of an error counts the record as lost, and this one is sent: never both."""
    spool, server = opened(tmp_path), Server()
    real, refused = os.fdatasync, 0

    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    for _ in range(2 * SMALL.flush_records):
        try:
            spool.append(Kind.EVENT, EVENT)
        except SpoolError:
            refused += 1
    assert refused == SMALL.flush_records
    with pytest.raises(SpoolError, match="Input/output"):
        spool.flush()
    monkeypatch.setattr(os, "fdatasync", real)
    spool.flush()
    deliver(spool, server)
    assert len(server.stored) == SMALL.flush_records
    spool.close()
    check(tmp_path, server)


class SmallDisk:
    """A disk of ``room`` bytes for the spool in ``root``, by counting what is there."""

    def __init__(self, root: Path, room: int, patch: pytest.MonkeyPatch) -> None:
        self._root, self.room = root, room
        self._write, self._save = module._write_all, ledger.save
        patch.setattr(module, "_write_all", self.write)
        patch.setattr(module, "save", self.save)
        patch.setattr(os, "posix_fallocate", self.allocate)

    def _check(self, size: int) -> None:
        used = sum(each.stat().st_size for each in self._root.rglob("*") if each.is_file())
        if used + size > self.room:
            raise OSError(28, "No space left on device")

    def write(self, file: Any, data: bytes) -> None:
        """Append; on a full disk half of the bytes still land, as they may."""
        try:
            self._check(len(data))
        except OSError:
            self._write(file, data[: len(data) // 2])
            raise
        self._write(file, data)

    def save(self, path: Path, content: ledger.Ledger) -> None:
        """Replace the ledger."""
        self._check(len(content.encode()))
        self._save(path, content)

    def allocate(self, handle: int, start: int, size: int) -> None:
        """Reserve."""
        self._check(size)
        os.truncate(handle, start + size)


def test_a_full_disk_gives_up_the_least_class_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may fill the disk below the spool's own bound: windows still go before updates."""
    SmallDisk(tmp_path, 20_000, monkeypatch)
    spool, server = opened(tmp_path), Server()
    for _ in range(40):
        spool.append(Kind.LABELS, LABELS)
    for _ in range(20):
        spool.append(Kind.UPDATE, UPDATE)
    spool.flush()
    assert spool.totals().lost > 0
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert list(server.stored.values()).count(Kind.UPDATE) == 20


def test_a_full_disk_without_anything_to_give_up_says_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it takes records again once there is room."""
    disk = SmallDisk(tmp_path, 12_000, monkeypatch)
    spool, server = opened(tmp_path), Server()
    with pytest.raises(SpoolFullError):
        for _ in range(1000):
            spool.append(Kind.UPDATE, UPDATE)
    disk.room = 20_000
    spool.append(Kind.UPDATE, UPDATE)
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert server.lost == 0


@pytest.mark.parametrize("truncates", [True, False])
def test_a_failed_write_is_a_typed_error_and_leaves_whole_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncates: bool
) -> None:
    """A torn frame is cut back at once, or its file left: what follows it would be unreadable."""
    spool, server = opened(tmp_path), Server()
    spool.append(Kind.EVENT, EVENT)
    real = module._write_all

    def torn(file: Any, data: bytes) -> None:
        real(file, data[:10])
        raise OSError(5, "Input/output error")

    class Stubborn(io.FileIO):
        def truncate(self, size: int | None = None) -> int:
            raise OSError(5, "Input/output error")

    spool.flush()
    if not truncates:
        (writer,) = spool._writers.values()
        writer.file.close()
        writer.file = Stubborn(writer.segment.path, "ab")
    spool.append(Kind.EVENT, EVENT)
    monkeypatch.setattr(module, "_write_all", torn)
    with pytest.raises(SpoolError, match="Input/output"):
        spool.append(Kind.EVENT, EVENT)
    monkeypatch.setattr(module, "_write_all", real)
    spool.append(Kind.EVENT, EVENT)
    spool.flush()
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert len(server.stored) == 3


def test_a_damaged_ledger_says_so(tmp_path: Path) -> None:
    """Accounts that cannot be trusted are not guessed."""
    opened(tmp_path).close()
    (tmp_path / "ledger").write_bytes(b"00000000\n{}")
    with pytest.raises(SpoolError, match=r"ledger .* damaged"):
        opened(tmp_path)


class CrashError(BaseException):
    """The power is gone."""


class DyingDisk:
    """Lets the ``at``-th disk operation of the spool be the last; remembers what is durable."""

    def __init__(self, at: int, patch: pytest.MonkeyPatch) -> None:
        self._at, self._calls = at, 0
        self._synced: dict[str, int] = {}
        for name in ("_write_all", "save", "sync_folder"):
            patch.setattr(module, name, self._step(getattr(module, name)))
        patch.setattr(os, "fdatasync", self._step(self._sync))
        patch.setattr(os, "fsync", lambda handle: None)  # this disk says itself what is durable
        patch.setattr(Path, "unlink", self._step(Path.unlink))

    def _step(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            if self._calls == self._at:
                raise CrashError
            return real(*args, **kwargs)

        return run

    def _sync(self, handle: int) -> None:
        self._synced[os.readlink(f"/proc/self/fd/{handle}")] = os.fstat(handle).st_size

    def forget(self, root: Path) -> None:
        """Lose what was not synced, as a power cut may."""
        for path in root.glob("*/*.seg"):
            os.truncate(path, self._synced.get(str(path), 0))


def killed(spool: Spool) -> None:
    """Leave a spool as kill -9 does: the files are as they are, nothing is flushed."""
    for writer in spool._writers.values():
        with contextlib.suppress(OSError):
            writer.file.close()


# A flush is rare, so that acknowledgements, losses and crashes fall between two of them.
TINY = SpoolConfig(bytes_max=16384, segment_bytes_max=4096, flush_records=50, reserve_bytes=4096)


def story(root: Path, server: Server, promised: dict[bytes, int]) -> None:
    """Write, overflow, send and acknowledge; enough to touch every path."""
    spool = Spool(root, config=TINY, clock=lambda: 1_700_000_000_000)
    try:
        spool.open()
        for i in range(60):
            kind = (Kind.LABELS, Kind.EVENT, Kind.LABELS, Kind.LABELS)[i % 4]
            if i % 20 == 11:
                kind = Kind.UPDATE
            spool.append(kind, BODIES[kind])
            promised[spool.stream] = spool._accepted
            if i % 20 in (12, 17):
                deliver(spool, server, batches=4)
        spool.flush()
        promised[spool.stream] = spool._accepted
        spool.close()
    except CrashError:
        killed(spool)
        raise


@pytest.mark.parametrize("crash", ["kill", "power cut"])
def test_a_crash_at_every_disk_operation_loses_and_doubles_nothing(
    tmp_path: Path, crash: str
) -> None:
    """Die at operation k, for every k; start again, send all: both sides count the same.

    What was accepted is stored or given up for room; only what was not may be told as torn.
    """
    at, crashed = 0, True
    while crashed:
        at, crashed = at + 1, False
        root, server = tmp_path / str(at), Server()
        promised: dict[bytes, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            disk = DyingDisk(at, patch)
            try:
                story(root, server, promised)
            except CrashError:
                crashed = True
                patch.undo()
                if crash == "power cut":
                    disk.forget(root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            spool = opened(root, TINY)
            spool.append(Kind.EVENT, EVENT)
            spool.flush()
            deliver(spool, server)
            spool.close()
        check(root, server)
        for stream, accepted in promised.items():
            assert server.upto(stream) >= accepted
            reasons = {server.gone.get((stream, seq)) for seq in range(1, accepted + 1)}
            assert reasons <= {None, "spool full"}
        shutil.rmtree(root)
    assert at > 60, "the story touches the disk often enough to mean something"


TALKER = """
import itertools, sys
from pathlib import Path
from shoal.agent.spool import Spool, SpoolConfig
from shoal.proto.records import Kind
config = SpoolConfig(bytes_max=1 << 20, segment_bytes_max=4096, flush_records=1000)
spool = Spool(Path(sys.argv[1]), config=config, clock=lambda: 1)
spool.open()
body = {"name": "n", "severity": "info", "text": "t" * 100, "data": {}}
for i in itertools.count(1):
    spool.append(Kind.EVENT, body)
    if i % 7 == 0:
        spool.flush()
        print(spool.stream.hex(), spool.totals().produced, flush=True)
"""


def test_what_a_killed_process_had_accepted_is_there(tmp_path: Path) -> None:
    """A real process, a real kill -9, three times over: every promise is kept."""
    least = 0
    for _ in range(3):
        talker = subprocess.Popen(
            [sys.executable, "-c", TALKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert talker.stdout is not None
        with talker, talker.stdout:
            for _ in range(20):
                line = talker.stdout.readline()
            talker.send_signal(signal.SIGKILL)
            rest = talker.stdout.read().splitlines()
        last = rest[-1] if rest and len(rest[-1]) > 34 else line
        produced = int(last.split()[1])
        assert produced >= least + 7 * 20
        totals, _ = read_totals(tmp_path)
        assert totals.spooled == totals.produced >= produced
        least = totals.produced
    spool, server = opened(tmp_path), Server()
    deliver(spool, server)
    spool.close()
    check(tmp_path, server)
    assert len(server.stored) == least and server.lost == 0


OPERATIONS = st.lists(
    st.sampled_from(["event", "labels", "update", "flush", "send", "mute", "boot", "kill"]),
    max_size=120,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS)
def test_any_history_balances(
    operations: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever happens in whatever order, the accounts balance on both sides."""
    root, server = tmp_path_factory.mktemp("spool"), Server()
    spool = opened(root)
    for each in operations:
        if each in ("event", "labels", "update"):
            kind = Kind(each)
            try:
                for _ in range(8):
                    spool.append(kind, BODIES[kind])
            except SpoolFullError:
                pass
        elif each == "flush":
            spool.flush()
        elif each == "send":
            deliver(spool, server, batches=3)
        elif each == "mute":
            deliver(spool, server, batches=1, ack=False)
        elif each == "boot":
            spool.close()
            spool = opened(root)
        else:
            killed(spool)
            spool = opened(root)
    spool.flush()
    deliver(spool, server)
    spool.close()
    check(root, server)
