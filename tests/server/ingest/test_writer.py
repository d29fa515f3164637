"""Groups of messages become rows exactly once; what breaks the contract is set aside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shoal.proto import records, topics
from shoal.proto.records import Kind, Record, encode_batch, encode_record
from shoal.proto.session import Message
from shoal.server.errors import ConflictError, StoreError
from shoal.server.ingest.writer import Writer
from shoal.server.store import Store
from shoal.server.store.tables import (
    Device,
    Event,
    Gap,
    Labels,
    Quarantine,
    RecordRow,
    Stream,
    Window,
)
from tests.sims.stores import fresh_store

STREAM = bytes(range(16))
MODEL = "a" * 64
BODIES: dict[Kind, dict[str, Any]] = {
    Kind.WINDOW: {
        "model": MODEL, "index": 0, "start_ms": 1, "end_ms": 2, "predictions": 60, "errors": 0,
        "classes": [30, 30], "sketch": b"sketch", "latency_us": [60],
    },
    Kind.LABELS: {
        "model": MODEL, "index": 0, "split": 2, "labelled": 10, "correct": 9,
        "confusion": [5, 1, 0, 4],
    },
    Kind.EVENT: {"name": "n", "severity": "info", "text": "t", "data": {"id": b"\x01"}},
    Kind.REPORTED: {
        "version": 1, "model": MODEL, "desired": 1, "agent": "0.1.0", "rss_bytes": 5, "state": {},
    },
    Kind.UPDATE: {
        "rollout": "r", "counter": 1, "model": MODEL, "state": "trial", "reason": "",
    },
    Kind.GAP: {
        "stream": STREAM, "class": "window", "runs": [2, 3], "count": 2, "reason": "spool full",
    },
    Kind.CAPTURE: {
        "model": MODEL, "slice": "", "prediction": 3, "reason": "random", "shape": [1, 1],
        "data": bytes(4),
    },
}  # fmt: skip


class Hooks:
    """Remembers what the hooks heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def update(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Hear a step of an update."""
        self.heard.append((device.name, body["state"]))

    def reported(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Hear a reported state."""
        self.heard.append((device.name, f"v{body['version']}"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with one enrolled and one revoked device."""
    found = fresh_store(tmp_path / "fleet.db")
    with found.begin() as session:
        session.add(Device(name="d-1", created_ms=1))
        session.add(Device(name="d-2", created_ms=1, revoked_ms=2))
    yield found
    found.close()


def writer(store: Store, hooks: Hooks | None = None, **kw: Any) -> Writer:
    """Return a writer with a fixed clock."""
    hooks = hooks or Hooks()
    settings_ = {"quarantine_rows_max": 100} | kw
    return Writer(
        store, clock=lambda: 7, on_update=hooks.update, on_reported=hooks.reported, **settings_
    )


def batch(*seqs: int, kind: Kind = Kind.EVENT, stream: bytes = STREAM, **body: Any) -> Message:
    """Return the message of a batch of records of one kind."""
    found = [encode_record(Record(seq, kind, 5, BODIES[kind] | body)) for seq in seqs]
    topic = topics.topic("d-1", topics.Leaf.TELEMETRY)
    return Message(topic, encode_batch(stream, found), (1, 1))


def count(store: Store, table: Any) -> int:
    """Return the number of rows."""
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_every_kind_finds_its_table(store: Store) -> None:
    """Records are kept whole, and parsed into the tables that are asked."""
    hooks = Hooks()
    messages = [batch(i + 1, kind=kind) for i, kind in enumerate(BODIES) if kind != Kind.GAP]
    messages += [batch(8, kind=Kind.GAP, runs=[20, 21])]
    written = writer(store, hooks).write(messages)
    assert written.stored == len(BODIES) and written.quarantined == 0
    assert [count(store, table) for table in (RecordRow, Window, Labels, Event, Gap)] == [
        7, 1, 1, 1, 1,
    ]  # fmt: skip
    assert sorted(hooks.heard) == [("d-1", "trial"), ("d-1", "v1")]
    with store.read() as session:
        device = session.scalars(select(Device).where(Device.name == "d-1")).one()
        assert device.reported["model"] == MODEL and device.seen_ms == 7
        assert session.scalars(select(Event)).one().data == {"id": "01"}


def test_what_comes_again_changes_nothing(store: Store) -> None:
    """Redelivery is acknowledged again, and counted once."""
    subject = writer(store)
    first = subject.write([batch(1, 2, 3)])
    again = subject.write([batch(1, 2, 3), batch(3, 3, 2)])
    assert first.acks == again.acks and first.acks[0][1].upto == 3
    assert (first.stored, again.stored) == (3, 0)
    assert count(store, RecordRow) == count(store, Event) == 3


def test_a_hole_holds_the_acknowledgement_back(store: Store) -> None:
    """Until the missing record, or a gap record that covers it, is stored."""
    subject = writer(store)
    assert subject.write([batch(1, 4)]).acks[0][1].upto == 1
    assert subject.write([batch(5, kind=Kind.GAP)]).acks[0][1].upto == 5


def test_a_gap_about_an_earlier_boot_moves_that_stream(store: Store) -> None:
    """The acknowledgements name every stream that moved."""
    subject = writer(store)
    subject.write([batch(1, 4)])
    written = subject.write([batch(1, kind=Kind.GAP, stream=bytes(16))])
    assert {(ack.stream, ack.upto) for _, ack in written.acks} == {(bytes(16), 1), (STREAM, 4)}


def test_what_is_stored_is_not_lost_and_what_is_lost_is_not_stored(store: Store) -> None:
    """A record may be given up after it arrived, or arrive after it was given up: counted once."""
    subject = writer(store)
    subject.write([batch(1, 3)])
    told = subject.write([batch(6, kind=Kind.GAP, runs=[2, 5], count=4)])
    assert told.acks[0][1].upto == 6
    late = subject.write([batch(2, 4)])
    assert late.stored == 0 and late.acks[0][1].upto == 6
    with store.read() as session:
        lost = session.execute(select(Gap.first, Gap.last, Gap.count).order_by(Gap.first)).all()
        assert [tuple(row) for row in lost] == [(2, 2, 1), (4, 5, 2)]
        assert list(session.scalars(select(RecordRow.seq).order_by(RecordRow.seq))) == [1, 3, 6]


def test_a_loss_that_is_told_twice_counts_once(store: Store) -> None:
    """By another record and with other bounds: a faulty device must not stop ingest."""
    subject = writer(store)
    subject.write([batch(10, kind=Kind.GAP, runs=[2, 5], count=4)])
    written = subject.write(
        [batch(11, kind=Kind.GAP, runs=[2, 5], count=4), batch(12, kind=Kind.GAP, runs=[4, 7])]
    )
    assert (written.stored, written.quarantined) == (2, 0)
    with store.read() as session:
        assert session.scalar(select(func.sum(Gap.count))) == 6


def test_the_present_boot_tells_the_newest_state(store: Store) -> None:
    """Even when its records were heard before those of an earlier boot."""
    subject = writer(store)
    old, new = bytes(16), bytes([1] * 16)
    presence = records.Presence(True, new).encode()
    subject.write([Message(topics.topic("d-1", topics.Leaf.PRESENCE), presence, (1, 1))])
    subject.write([batch(1, kind=Kind.UPDATE, stream=new)])
    subject.write([batch(1, kind=Kind.REPORTED, stream=old, version=1)])
    subject.write([batch(2, kind=Kind.REPORTED, stream=new, version=1, agent="new")])
    subject.write([batch(2, kind=Kind.REPORTED, stream=old, version=2)])
    with store.read() as session:
        found = session.scalars(select(Device).where(Device.name == "d-1")).one()
        assert found.reported["agent"] == "new"


def nested(depth: int) -> dict[str, Any]:
    """Return a document of some depth."""
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"d": found}
    return found


def test_a_message_that_cannot_be_digested_is_set_aside(store: Store) -> None:
    """Not a crash, not an endless retry: its neighbours are stored and acknowledged."""
    found = records.Record(2, Kind.EVENT, 5, BODIES[Kind.EVENT] | {"data": nested(480)})
    deep = Message(
        topics.topic("d-1", topics.Leaf.TELEMETRY),
        encode_batch(STREAM, [encode_record(found)]),
        (1, 1),
    )
    written = writer(store).write([batch(1), deep, batch(3)])
    assert (written.stored, written.quarantined) == (2, 1)
    assert written.acks[-1][1].upto == 1
    with store.read() as session:
        assert "RecursionError" in session.scalars(select(Quarantine)).one().reason
        assert session.scalar(select(func.count()).select_from(Event)) == 2


def test_a_hook_that_refuses_sets_its_message_aside(store: Store) -> None:
    """What an owner's rule cannot take must not come back for ever."""
    subject = writer(store)

    def refuse(*_: Any) -> None:
        raise ConflictError("that rollout is over")

    subject._on_update = refuse
    written = subject.write([batch(1), batch(2, kind=Kind.UPDATE)])
    assert (written.stored, written.quarantined) == (1, 1)
    with store.read() as session:
        assert "ConflictError: that rollout is over" in session.scalars(select(Quarantine.reason))


def test_a_database_in_trouble_is_tried_again(store: Store) -> None:
    """Nothing is stored, acknowledged or set aside: the message is not to blame."""
    subject = writer(store)

    def trouble(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk I/O error"))

    subject._on_update = trouble
    with pytest.raises(StoreError, match="disk I/O error"):
        subject.write([batch(1), batch(2, kind=Kind.UPDATE)])
    assert count(store, RecordRow) == count(store, Quarantine) == 0


def test_an_older_state_never_overwrites_a_newer_one(store: Store) -> None:
    """Order is by boot, then by number; not by arrival."""
    subject = writer(store)
    old, new = bytes(16), bytes([1] * 16)
    subject.write([batch(1, kind=Kind.REPORTED, stream=old, version=1)])
    subject.write([batch(2, kind=Kind.REPORTED, stream=new, version=9)])
    subject.write([batch(2, kind=Kind.REPORTED, stream=old, version=2)])
    subject.write([batch(1, kind=Kind.REPORTED, stream=new, version=8)])
    with store.read() as session:
        found = session.scalars(select(Device).where(Device.name == "d-1")).one()
        assert found.reported["version"] == 9


@pytest.mark.parametrize(
    ("topic", "payload", "said"),
    [
        ("shoal/v1/d-1/up/t", b"", "acceptable MessagePack"),
        ("shoal/v1/d-1/up/t", b"\xc1" * 10, "acceptable MessagePack"),
        ("shoal/v1/d-1/up/t", b"\x90", "not [version"),
        ("shoal/v1/d-1/up/t", b"\x93\x02\xc4\x00\x90", "version 2"),
        ("shoal/v1/d-1/up/t", b"\xdd\xff\xff\xff\xff", "acceptable MessagePack"),
        ("shoal/v1/d-1/up/t", b"\x91" * 60_000, "acceptable MessagePack"),
        ("shoal/v1/d-1/up/t", bytes(70_000), "exceeds"),
        ("shoal/v1/d-1/up/e", b"\x80", "not a map"),
        ("shoal/v1/d-1/up/x", b"", "not in the grammar"),
        ("shoal/v1/D 1/up/t", b"", "not in the grammar"),
        ("shoal/v1/d-2/up/t", b"", "not enrolled, or revoked"),
        ("shoal/v1/d-9/up/t", b"", "not enrolled, or revoked"),
    ],
)
def test_what_breaks_the_contract_is_set_aside(
    store: Store, topic: str, payload: bytes, said: str
) -> None:
    """It is quarantined with its reason, and the good message beside it is stored."""
    written = writer(store).write([Message(topic, payload, (1, 1)), batch(1)])
    assert (written.stored, written.quarantined) == (1, 1)
    with store.read() as session:
        found = session.scalars(select(Quarantine)).one()
        assert said in found.reason
        assert found.size == len(payload) and found.head == payload[:1024]


def test_one_bad_record_sets_its_batch_aside(store: Store) -> None:
    """A batch is taken whole or not at all: its device sends it again when it is mended."""
    good = batch(1, 2)
    bad = good.payload.replace(b"\xa4info", b"\xa4evil")
    written = writer(store).write([Message(good.topic, bad, (1, 1))])
    assert (written.stored, written.quarantined, written.acks) == (0, 1, ())


def test_the_quarantine_is_bounded(store: Store) -> None:
    """A device that sends nonsense for ever does not fill the disk."""
    subject = writer(store, quarantine_rows_max=5)
    for _ in range(4):
        subject.write([Message("shoal/v1/d-1/up/t", b"", (1, 1))] * 3)
    assert count(store, Quarantine) == 5


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_delivery_stores_each_record_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Duplicated, reordered, in any groups: one row each, and the acknowledgement is exact."""
    store = fresh_store(tmp_path_factory.mktemp("db") / "fleet.db")
    with store.begin() as session:
        session.add(Device(name="d-1", created_ms=1))
    chosen = data.draw(st.sets(st.integers(1, 30), min_size=1))
    seqs = sorted(chosen) * data.draw(st.integers(1, 3))
    random.Random(data.draw(st.integers(0, 999))).shuffle(seqs)
    size = data.draw(st.integers(1, 5))
    subject = writer(store)
    upto = 0
    for start in range(0, len(seqs), size):
        written = subject.write([batch(*seqs[start : start + size])])
        upto = written.acks[0][1].upto
    expected = 0
    while expected + 1 in chosen:
        expected += 1
    with store.read() as session:
        held = session.scalars(select(RecordRow.seq).order_by(RecordRow.seq)).all()
        assert list(held) == sorted(chosen)
        assert upto == session.scalars(select(Stream)).one().upto == expected
    store.close()


def test_presence_of_an_earlier_boot_does_not_take_a_device_offline(store: Store) -> None:
    """The will of a dead session may come after the new session's greeting."""
    subject = writer(store)
    topic = topics.topic("d-1", topics.Leaf.PRESENCE)

    def say(online: bool, boot: bytes) -> None:
        payload = records.Presence(online, boot).encode()
        subject.write([Message(topic, payload, (1, 1))])

    say(True, bytes(16))
    say(True, bytes([1] * 16))
    say(False, bytes(16))
    with store.read() as session:
        assert session.scalars(select(Device).where(Device.name == "d-1")).one().online
    say(False, bytes([1] * 16))
    with store.read() as session:
        assert not session.scalars(select(Device).where(Device.name == "d-1")).one().online


def test_optional_fields_find_their_columns(store: Store) -> None:
    """Slice and projection have their own, the rest is kept together; unknown ones are dropped."""
    more: dict[str, Any] = {
        "slice": "night", "aligned_ms": 60_000, "projection": bytes(8), "projected": 7, "shed": 2,
        "quality": {"below": [1], "schema": [0]}, "scores": [1] * 20, "bins_only": True,
        "carried": 1,
    }  # fmt: skip
    subject = writer(store)
    subject.write([batch(1, kind=Kind.WINDOW, **more, novelty=1)])
    subject.write([batch(2, kind=Kind.LABELS, slice="night", calibration=[1] * 20)])
    subject.write([batch(3, kind=Kind.WINDOW), batch(4, kind=Kind.LABELS)])
    with store.read() as session:
        new, old = session.scalars(select(Window).order_by(Window.id))
        assert (new.slice, new.projection, new.number) == ("night", bytes(8), 0)
        assert new.extra == {k: v for k, v in more.items() if k not in ("slice", "projection")}
        assert (old.slice, old.projection, old.extra) == ("", b"", {})
        told, bare = session.scalars(select(Labels).order_by(Labels.id))
        assert (told.slice, told.extra) == ("night", {"calibration": [1] * 20})
        assert (bare.slice, bare.extra) == ("", {})


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "a", "b"])), max_size=30),
    st.randoms(),
)
def test_a_window_counts_once_however_often_and_late_it_comes(
    tmp_path_factory: pytest.TempPathFactory, windows: list[tuple[int, str]], rng: random.Random
) -> None:
    """A device that repeats a window under a new sequence number, in any order, adds nothing."""
    found = fresh_store(tmp_path_factory.mktemp("windows") / "fleet.db")
    with found.begin() as session:
        session.add(Device(name="d-1", created_ms=1))
    messages = [
        batch(seq, kind=Kind.WINDOW, index=index, slice=tag, predictions=index)
        for seq, (index, tag) in enumerate(windows, 1)
    ]
    messages += rng.sample(messages, len(messages) // 2)
    rng.shuffle(messages)
    for message in messages:
        writer(found).write([message])
    with found.read() as session:
        rows = [(each.number, each.slice) for each in session.scalars(select(Window))]
    assert sorted(rows) == sorted(set(windows))
    found.close()


def test_a_device_says_where_and_what_it_is(store: Store) -> None:
    """From its newest state; a device that no longer says so is of no site."""
    subject = writer(store)
    places = []
    for seq, state in enumerate(
        ({}, {"site": "plant 2", "hardware": "Raspberry Pi 5"}, {"site": "plant 3"}), 1
    ):
        subject.write([batch(seq, kind=Kind.REPORTED, state=state)])
        with store.read() as session:
            device = session.scalars(select(Device).where(Device.name == "d-1")).one()
            places.append((device.site, device.hardware))
    assert places == [("", ""), ("plant 2", "Raspberry Pi 5"), ("plant 3", "")]
