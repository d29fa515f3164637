"""The link: what waits in the spool goes to the broker, and leaves the spool when the server says.

    spool --batch--> up/t --> broker --> server --commit--> down/ack --> spool forgets

Rule 1: PUBACK frees nothing but a place in the window; only the application's acknowledgement
frees the spool.
Rule 2: a batch without an acknowledgement for ``ack_timeout_s`` is sent again, as is everything
after a new connection.
Rule 3: vital records (updates, gaps) go first: an acknowledgement passes over lost records only
when the server holds their gap record.

``Outbox`` holds the rules and knows no socket; ``Link`` does I/O.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..proto import records, topics
from ..proto.errors import ContractError
from ..proto.session import Message, Session, SessionError, Tls, reconnect_delay_s
from .health import Health
from .spool import Spool, SpoolError

log = logging.getLogger(__name__)

PACKET_OVERHEAD_BYTES = 200  # topic, properties and headers of one PUBLISH


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """How the link sends and how it comes back."""

    batches_in_flight_max: int = 8
    """Batches without an acknowledgement; as many again of vital records."""
    batch_bytes_max: int = 32 << 10
    """Bytes of records in one batch."""
    batch_records_max: int = 200
    """Records in one batch."""
    ack_timeout_s: float = 15.0
    """After this long a batch is sent again."""
    poll_s: float = 0.2
    """The spool is looked at this often."""
    keepalive_s: int = 30
    """Seconds between signs of life."""
    reconnect_s_max: float = 300.0
    """Longest wait before another attempt to connect."""
    stable_s: float = 60.0
    """A connection that lasted this long starts the waits anew."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.batches_in_flight_max <= 200 or not 1 <= self.batch_records_max <= 4096:
            raise ValueError("batches_in_flight_max must be 1..200, batch_records_max 1..4096")
        if not 1024 <= self.batch_bytes_max <= records.BATCH_BYTES_MAX - 1024:
            raise ValueError("batch_bytes_max must be 1024 to 64512")
        if min(self.ack_timeout_s, self.poll_s, self.reconnect_s_max, self.stable_s) <= 0:
            raise ValueError("times must be above 0 s")


@dataclass(frozen=True, slots=True)
class Want:
    """The batch that should be sent next."""

    stream: bytes
    vital: bool
    after: int


@dataclass(frozen=True, slots=True)
class _Flight:
    stream: bytes
    vital: bool
    last: int
    sent_s: float


class Outbox:
    """What to send next. Pure: time and acknowledgements are arguments."""

    def __init__(self, config: LinkConfig) -> None:
        self._config = config
        self._cursors: dict[tuple[bytes, bool], int] = {}
        self._flights: list[_Flight] = []

    def wants(self, streams: Sequence[bytes]) -> list[Want]:
        """Return what may be sent now, in the order of preference.

        Args:
            streams: Streams with records that the server may lack, oldest first.
        """
        found = []
        for vital in (True, False):
            used = sum(1 for each in self._flights if each.vital is vital)
            if used < self._config.batches_in_flight_max:
                found += [
                    Want(stream, vital, self._cursors.get((stream, vital), 0)) for stream in streams
                ]
        return found

    def sent(self, want: Want, last: int, *, now_s: float) -> None:
        """Note that the batch after ``want.after`` up to ``last`` was published."""
        self._cursors[want.stream, want.vital] = last
        self._flights.append(_Flight(want.stream, want.vital, last, now_s))

    def acknowledged(self, stream: bytes, upto: int) -> None:
        """Note that the server holds a stream up to ``upto``."""
        self._flights = [
            each for each in self._flights if each.stream != stream or each.last > upto
        ]

    def expire(self, *, now_s: float) -> bool:
        """Go back to the start of streams whose batches got no answer; say whether any did."""
        limit_s = now_s - self._config.ack_timeout_s
        late = {(each.stream, each.vital) for each in self._flights if each.sent_s <= limit_s}
        for key in late:
            self._cursors.pop(key, None)
        self._flights = [each for each in self._flights if (each.stream, each.vital) not in late]
        return bool(late)

    def reset(self) -> None:
        """Forget what was sent: the connection is a new one."""
        self._cursors.clear()
        self._flights.clear()


class Link:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        spool: Spool,
        *,
        url: str,
        device: str,
        boot: bytes,
        config: LinkConfig,
        health: Health,
        on_nudge: Callable[[str], None],
        on_desired: Callable[[int], None],
        tls: Tls | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Take a spool, a broker and who listens.

        Args:
            spool: What to send.
            url: The broker, ``mqtt://`` or ``mqtts://``.
            device: Id of this device.
            boot: Id of this boot, 16 bytes.
            config: How to send.
            health: Hears ``link.down``, ``link.denied``, ``link.packet`` and ``link.spool``.
            on_nudge: Hears what to look at: ``tasks`` or ``desired``.
            on_desired: Hears the version of the desired state.
            tls: Files for ``mqtts``.
            monotonic: Clock, s.
            draw: Uniform random numbers.
        """
        self._spool, self._url, self._device, self._boot = spool, url, device, boot
        self._config, self._health, self._tls = config, health, tls
        self._on_nudge, self._on_desired = on_nudge, on_desired
        self._monotonic, self._draw = monotonic, draw
        self._outbox = Outbox(config)
        self._fresh = asyncio.Event()
        self.connected = False

    def wake(self) -> None:
        """Say that there are new records; the link would find them by itself, a little later."""
        self._fresh.set()

    async def run(self) -> None:
        """Connect, send, connect again; until cancelled."""
        attempt = 0
        while True:
            start_s = self._monotonic()
            try:
                await self._session()
            except SessionError as exc:
                self._health.warn("link.down", str(exc))
                log.info("%s", exc)
            self.connected = False
            attempt = 0 if self._monotonic() - start_s >= self._config.stable_s else attempt + 1
            await asyncio.sleep(
                reconnect_delay_s(
                    attempt - 1 if attempt else 0,
                    most_s=self._config.reconnect_s_max,
                    draw=self._draw(),
                )
            )

    async def drain(self, wait_s: float) -> bool:
        """Wait until the spool is empty, at most ``wait_s`` seconds; say whether it is."""
        deadline_s = self._monotonic() + wait_s
        while self._spool.streams():
            if self._monotonic() >= deadline_s:
                return False
            self.wake()
            await asyncio.sleep(0.05)
        return True

    async def _session(self) -> None:
        presence = topics.topic(self._device, topics.Leaf.PRESENCE)
        self._outbox.reset()
        session = Session(
            self._url,
            client_id=self._device,
            subscriptions=[
                topics.subscription(leaf, device=self._device)
                for leaf in (topics.Leaf.ACK, topics.Leaf.COMMAND, topics.Leaf.DESIRED)
            ],
            on_message=self._received,
            will=(presence, records.Presence(False, self._boot).encode()),
            tls=self._tls,
            keepalive_s=self._config.keepalive_s,
            on_denied=self._denied,
        )
        async with session:
            self.connected = True
            self._health.clear("link.down")
            self._health.clear("link.packet")
            session.publish(presence, records.Presence(True, self._boot).encode(), retain=True)
            assert session.closed is not None
            try:
                while not session.closed.done():
                    try:
                        self._send(session)
                        self._health.clear("link.spool")
                    except SpoolError as exc:
                        self._health.warn("link.spool", str(exc), severity="error")
                    with contextlib.suppress(TimeoutError):
                        # not wait_for: before Python 3.12 it may swallow a cancellation
                        async with asyncio.timeout(self._config.poll_s):
                            await self._fresh.wait()
                    self._fresh.clear()
                raise SessionError(f"the broker {session.closed.result()}")
            finally:
                # A planned end says so itself; after a crash the broker says it for us.
                session.publish(presence, records.Presence(False, self._boot).encode(), retain=True)
                if self.connected and not session.closed.done():
                    await session.flush(1.0)

    def _send(self, session: Session) -> None:
        now_s = self._monotonic()
        if self._outbox.expire(now_s=now_s):
            log.info("no acknowledgement for %s s: sending again", self._config.ack_timeout_s)
        room = min(self._config.batch_bytes_max, session.packet_bytes_max - PACKET_OVERHEAD_BYTES)
        more = True
        while more:
            more = False
            for want in self._outbox.wants(self._spool.streams()):
                payloads, last = self._spool.batch(
                    want.stream,
                    vital=want.vital,
                    after=want.after,
                    records_max=self._config.batch_records_max,
                    bytes_max=room,
                )
                if not payloads:
                    continue
                batch = records.encode_batch(want.stream, payloads)
                if len(batch) + PACKET_OVERHEAD_BYTES > session.packet_bytes_max:
                    # paho would try for ever (fault 39); the broker must be set right.
                    self._health.warn(
                        "link.packet",
                        f"the broker takes packets of {session.packet_bytes_max} bytes, a record "
                        f"needs {len(batch)}; nothing is sent until its limit is raised",
                        severity="error",
                    )
                    return
                topic = topics.topic(self._device, topics.Leaf.TELEMETRY)
                if not session.publish(topic, batch):
                    return
                self._spool.count("bytes_up", len(batch) + len(topic) + 7)
                self._outbox.sent(want, last, now_s=now_s)
                more = True
                break

    def _denied(self, reason: str) -> None:
        self._health.warn(
            "link.denied",
            f"the broker refused a publish of {self._device}: {reason}; the records stay here",
            severity="error",
        )

    def _received(self, message: Message) -> None:
        try:
            leaf = topics.parse(message.topic).leaf
            if leaf is topics.Leaf.ACK:
                ack = records.Ack.decode(message.payload)
                self._spool.acknowledge(ack.stream, ack.upto)
                self._outbox.acknowledged(ack.stream, ack.upto)
                self._health.clear("link.denied")
                self.wake()
            elif leaf is topics.Leaf.COMMAND:
                self._on_nudge(records.Nudge.decode(message.payload).look)
            elif leaf is topics.Leaf.DESIRED:
                self._on_desired(records.DesiredVersion.decode(message.payload).version)
        except SpoolError as exc:
            self._health.warn("link.spool", str(exc), severity="error")
        except ContractError as exc:
            log.warning("a message on %s was ignored: %s", message.topic, exc)
