"""Write groups of messages to the database, each group in one transaction.

Rule 1: a record is one row, named (device, stream, seq); what comes again changes nothing.
Rule 2: parsed rows are written in the same transaction, and only for records that are new.
Rule 3: a message that breaks the contract is quarantined and acknowledged: it never comes back.
So is one that the server itself cannot digest; its neighbours are stored.
Rule 4: an acknowledgement is returned only after the commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import Session

from ... import ShoalError
from ...proto import records, topics
from ...proto.errors import ContractError
from ...proto.records import Ack, Batch, Kind, Presence, Record
from ...proto.session import Message
from ..store import Store
from ..store.tables import Device, Event, Gap, Labels, Quarantine, RecordRow, Stream, Window
from .rules import advance, untold

log = logging.getLogger(__name__)

Hook = Callable[[Session, Device, Mapping[str, Any]], None]
ROWS_PER_INSERT = 500  # 8 columns each: far below SQLite's 32,766 variables


@dataclass(frozen=True, slots=True)
class Written:
    """What to say after the commit."""

    acks: tuple[tuple[str, Ack], ...]
    """(device, acknowledgement)."""
    stored: int
    quarantined: int


class Writer:
    """Turns groups of messages into rows. Used from one thread at a time."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], int],
        on_update: Hook,
        on_reported: Hook,
        quarantine_rows_max: int,
    ) -> None:
        self._store, self._clock = store, clock
        self._on_update, self._on_reported = on_update, on_reported
        self._quarantine_rows_max = quarantine_rows_max

    def write(self, messages: Sequence[Message]) -> Written:
        """Store a group of messages.

        Raises:
            ShoalError: The database refused, and a later try may work (``retry``); nothing may be
                acknowledged. What is stored already changes nothing when it comes again.
        """
        try:
            return self._write(messages)
        except Exception as exc:
            if _is_worth_a_retry(exc):
                raise
        # One of them cannot be digested: find out which, each in a transaction of its own.
        return _joined([self._write_alone(message) for message in messages])

    def _write(self, messages: Sequence[Message], *, reason: str = "") -> Written:
        with self._store.begin() as session:
            group = _Group(session, self, self._clock())
            for message in messages:
                group.take(message, reason)
            return group.finish()

    def _write_alone(self, message: Message) -> Written:
        try:
            return self._write([message])
        except Exception as exc:
            if _is_worth_a_retry(exc):
                raise
            log.exception("a message on %r could not be stored", message.topic[:120])
            return self._write([message], reason=f"{type(exc).__name__}: {exc}")

    def reported(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Call the owner's hook for a new reported state."""
        self._on_reported(session, device, body)

    def updated(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Call the owner's hook for a step of an update."""
        self._on_update(session, device, body)

    @property
    def quarantine_rows_max(self) -> int:
        """Bound of the quarantine."""
        return self._quarantine_rows_max


class _Group:
    """One transaction."""

    def __init__(self, session: Session, writer: Writer, now_ms: int) -> None:
        self._session, self._writer, self._now_ms = session, writer, now_ms
        self._devices: dict[str, Device | None] = {}
        self._streams: dict[tuple[int, bytes], Stream] = {}
        self._touched: dict[int, tuple[Device, Stream]] = {}
        self._stored = self._quarantined = 0

    def take(self, message: Message, reason: str = "") -> None:
        """Store one message; put it into quarantine if it is bad, or ``reason`` says so."""
        try:
            if reason:
                raise ContractError(reason)
            topic = topics.parse(message.topic)
            device = self._device(topic.device)
            if device is None:
                raise ContractError(f"device {topic.device} is not enrolled, or revoked")
            if topic.leaf is topics.Leaf.TELEMETRY:
                self._batch(device, records.decode_batch(message.payload))
            elif topic.leaf is topics.Leaf.PRESENCE:
                self._presence(device, Presence.decode(message.payload))
            else:
                raise ContractError(f"nothing is read from {topic.leaf}")
        except ContractError as exc:
            self._quarantine(message, str(exc))

    def finish(self) -> Written:
        """Advance the streams that moved and say what to acknowledge."""
        acks = []
        for device, stream in self._touched.values():
            seqs = self._session.scalars(
                select(RecordRow.seq)
                .where(RecordRow.stream_id == stream.id, RecordRow.seq > stream.upto)
                .order_by(RecordRow.seq)
            )
            runs = self._session.execute(
                select(Gap.first, Gap.last).where(
                    Gap.device_id == device.id,
                    Gap.stream == stream.stream,
                    Gap.last > stream.upto,
                )
            )
            stream.upto = advance(stream.upto, seqs, [(a, b) for a, b in runs])
            acks.append((device.name, Ack(stream.stream, stream.upto)))
        if self._quarantined:
            self._trim()
        return Written(tuple(acks), self._stored, self._quarantined)

    def _device(self, name: str) -> Device | None:
        if name not in self._devices:
            found = self._session.scalars(select(Device).where(Device.name == name)).first()
            self._devices[name] = found if found is not None and not found.revoked_ms else None
        return self._devices[name]

    def _stream(self, device: Device, stream: bytes) -> Stream:
        key = (device.id, stream)
        if key not in self._streams:
            found = self._session.scalars(
                select(Stream).where(Stream.device_id == device.id, Stream.stream == stream)
            ).first()
            if found is None:
                found = Stream(device_id=device.id, stream=stream, first_ms=self._now_ms, upto=0)
                self._session.add(found)
                self._session.flush()
            self._streams[key] = found
        return self._streams[key]

    def _presence(self, device: Device, presence: Presence) -> None:
        if presence.online or device.boot in (None, presence.boot):
            device.online, device.boot = presence.online, presence.boot
        if presence.online:
            device.seen_ms = self._now_ms

    def _batch(self, device: Device, batch: Batch) -> None:
        stream = self._stream(device, batch.stream)
        device.seen_ms = self._now_ms
        self._touched[stream.id] = (device, stream)
        seqs = [record.seq for record in batch.records]
        told = self._told(device, stream.stream, min(seqs), max(seqs))
        news = [each for each in batch.records if not any(a <= each.seq <= b for a, b in told)]
        for start in range(0, len(news), ROWS_PER_INSERT):
            part = news[start : start + ROWS_PER_INSERT]
            fresh = self._insert(stream, part)
            self._stored += len(fresh)
            for record in part:
                if record.seq in fresh:
                    fresh.discard(record.seq)  # a batch may name a record twice
                    self._parse(device, stream, record)

    def _insert(self, stream: Stream, part: Sequence[Record]) -> set[int]:
        """Insert records that are not there yet and return their numbers."""
        rows = [
            {
                "stream_id": stream.id,
                "seq": record.seq,
                "kind": str(record.kind),
                "device_time_ms": record.time_ms,
                "received_ms": self._now_ms,
                "body": msgpack.packb(dict(record.body)),
            }
            for record in part
        ]
        dialect = self._session.get_bind().dialect.name
        insert = sqlite.insert if dialect == "sqlite" else postgresql.insert
        statement = (
            insert(RecordRow)
            .values(rows)
            .on_conflict_do_nothing(index_elements=["stream_id", "seq"])
            .returning(RecordRow.seq)
        )
        return set(self._session.scalars(statement))

    def _parse(self, device: Device, stream: Stream, record: Record) -> None:
        body = record.body
        base = {"device_id": device.id, "stream_id": stream.id, "received_ms": self._now_ms}
        if record.kind is Kind.WINDOW:
            known = self._session.scalars(
                select(Window.id).where(
                    Window.stream_id == stream.id,
                    Window.model_sha256 == body["model"],
                    Window.slice == body.get("slice", ""),
                    Window.number == body["index"],
                )
            ).first()
            if known is None:  # a device that repeats a window's number is not counted twice
                self._session.add(
                    Window(
                        **base,
                        model_sha256=body["model"],
                        slice=body.get("slice", ""),
                        number=body["index"],
                        device_start_ms=body["start_ms"],
                        device_end_ms=body["end_ms"],
                        predictions=body["predictions"],
                        errors=body["errors"],
                        classes=body["classes"],
                        latency_us=body["latency_us"],
                        sketch=body["sketch"],
                        extra=_extra(record),
                        projection=body.get("projection", b""),
                    )
                )
        elif record.kind is Kind.LABELS:
            self._session.add(
                Labels(
                    **base,
                    seq=record.seq,
                    model_sha256=body["model"],
                    slice=body.get("slice", ""),
                    number=body["index"],
                    split=body["split"],
                    labelled=body["labelled"],
                    correct=body["correct"],
                    confusion=body["confusion"],
                    extra=_extra(record),
                )
            )
        elif record.kind is Kind.EVENT:
            self._session.add(
                Event(
                    **base,
                    seq=record.seq,
                    name=body["name"],
                    severity=body["severity"],
                    text=body["text"],
                    data=_plain(body["data"]),
                    device_time_ms=record.time_ms,
                )
            )
        elif record.kind is Kind.GAP:
            self._gap(device, body)
        elif record.kind is Kind.REPORTED:
            self._reported(device, stream, record)
        elif record.kind is Kind.UPDATE:
            self._writer.updated(self._session, device, body)

    def _gap(self, device: Device, body: Mapping[str, Any]) -> None:
        flat = body["runs"]
        about = self._stream(device, body["stream"])
        held = self._session.scalars(
            select(RecordRow.seq).where(
                RecordRow.stream_id == about.id, RecordRow.seq.between(flat[0], flat[-1])
            )
        )
        told = self._told(device, about.stream, flat[0], flat[-1])
        for first, last in untold(list(zip(flat[::2], flat[1::2], strict=True)), held, told):
            self._session.add(
                Gap(
                    device_id=device.id,
                    stream=body["stream"],
                    spool_class=body["class"],
                    first=first,
                    last=last,
                    count=last - first + 1,
                    reason=body["reason"],
                    received_ms=self._now_ms,
                )
            )
        self._session.flush()
        self._touched[about.id] = (device, about)

    def _told(self, device: Device, stream: bytes, first: int, last: int) -> list[tuple[int, int]]:
        """Return the runs of a stream that were told as lost, as far as they reach into a range."""
        rows = self._session.execute(
            select(Gap.first, Gap.last).where(
                Gap.device_id == device.id,
                Gap.stream == stream,
                Gap.last >= first,
                Gap.first <= last,
            )
        )
        return [(a, b) for a, b in rows]

    def _reported(self, device: Device, stream: Stream, record: Record) -> None:
        """Keep the newest state: the present boot wins, then later boots, then later numbers.

        The present boot is known by presence. Boots are ordered by when they were first heard,
        which is not always the order in which they happened: vital records overtake.
        """
        held = device.reported_stream
        if held == stream.stream:
            newer = record.seq > device.reported_seq
        elif held is None or device.boot in (held, stream.stream):
            newer = held is None or held != device.boot
        else:
            newer = stream.id > self._stream(device, held).id
        if newer:
            device.reported = _plain(record.body)
            device.reported_ms = self._now_ms
            device.reported_stream, device.reported_seq = stream.stream, record.seq
            state = record.body["state"]
            device.site, device.hardware = state.get("site", ""), state.get("hardware", "")
            self._writer.reported(self._session, device, record.body)

    def _quarantine(self, message: Message, reason: str) -> None:
        self._quarantined += 1
        parts = message.topic.split("/")
        self._session.add(
            Quarantine(
                device_name=parts[2][:80] if len(parts) > 2 else "",
                topic=message.topic[:200],
                reason=reason[:500],
                size=len(message.payload),
                head=message.payload[:1024],
                received_ms=self._now_ms,
            )
        )

    def _trim(self) -> None:
        self._session.flush()
        newest = self._session.scalar(select(func.max(Quarantine.id))) or 0
        limit = newest - self._writer.quarantine_rows_max
        self._session.execute(delete(Quarantine).where(Quarantine.id <= limit))


def _is_worth_a_retry(exc: Exception) -> bool:
    """Tell a database in trouble from a message that no try will bring in."""
    cause = exc.__cause__
    if isinstance(cause, IntegrityError | DataError):
        return False
    if isinstance(cause, StatementError) and not isinstance(cause, DBAPIError):
        return False  # a value that could not be turned into a column
    return isinstance(exc, ShoalError) and exc.retry


def _extra(record: Record) -> dict[str, Any]:
    """Return the optional fields of a record that have no column of their own."""
    known = records.OPTIONAL[record.kind].keys() - {"slice", "projection"}
    return {name: value for name, value in record.body.items() if name in known}


def _joined(parts: Iterable[Written]) -> Written:
    acks: dict[tuple[str, bytes], Ack] = {}
    stored = quarantined = 0
    for part in parts:
        acks.update({(device, ack.stream): ack for device, ack in part.acks})
        stored, quarantined = stored + part.stored, quarantined + part.quarantined
    return Written(tuple((device, ack) for (device, _), ack in acks.items()), stored, quarantined)


def _plain(value: Any) -> Any:
    """Return a document that JSON can hold: bytes become hex."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value


def all_offline(session: Session) -> None:
    """Forget who was online, as at the start of the server: retained presence says it anew."""
    session.execute(update(Device).values(online=False))
