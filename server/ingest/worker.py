"""Read what devices publish, store it, acknowledge it; send nudges down.

    broker --QoS 1, manual ack--> queue --group--> one transaction --> MQTT ack --> down/ack

The subscription is shared, so that several servers may read side by side. A message is
acknowledged to the broker after the commit; a crash in between brings it again, and again it
changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ... import ShoalError
from ...proto import records, topics
from ...proto.session import Message, Session, SessionError, Tls, reconnect_delay_s
from ..store import Store
from .writer import Hook, Writer, Written, all_offline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """Bounds of ingest."""

    group_max: int = 100
    """Messages in one transaction."""
    receive_max: int = 400
    """Messages that the broker may have sent without an acknowledgement."""
    quarantine_rows_max: int = 10_000
    """Messages kept for people to look at; the oldest go first."""
    reconnect_s_max: float = 5.0
    """Longest wait before another attempt to connect; the broker is near."""
    stable_s: float = 10.0
    """A connection that lasted this long starts the waits anew."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.group_max <= self.receive_max <= 65_535:
            raise ValueError("1 <= group_max <= receive_max <= 65535 must hold")
        if self.quarantine_rows_max < 1 or min(self.reconnect_s_max, self.stable_s) <= 0:
            raise ValueError("quarantine_rows_max must be at least 1, times above 0 s")


class Ingest:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        *,
        url: str,
        config: IngestConfig,
        clock: Callable[[], int],
        on_update: Hook,
        on_reported: Hook,
        on_stored: Callable[[], None] = lambda: None,
        tls: Tls | None = None,
        name: str = "shoal-server",
    ) -> None:
        """Take a store, a broker and hooks that run inside the transaction."""
        self._store, self._url, self._config, self._tls = store, url, config, tls
        self._name = f"{name}-{os.urandom(4).hex()}"
        self._writer = Writer(
            store,
            clock=clock,
            on_update=on_update,
            on_reported=on_reported,
            quarantine_rows_max=config.quarantine_rows_max,
        )
        self._on_stored = on_stored
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._versions: dict[str, int] = {}
        self.connected = False

    async def run(self) -> None:
        """Connect, store, connect again; until cancelled."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._forget_presence)
        attempt = 0
        while True:
            start_s = time.monotonic()
            try:
                await self._serve()
            except SessionError as exc:
                log.warning("%s", exc)
            finally:
                self._session, self.connected = None, False
            attempt = 0 if time.monotonic() - start_s >= self._config.stable_s else attempt + 1
            delay_s = reconnect_delay_s(
                max(0, attempt - 1), most_s=self._config.reconnect_s_max, draw=random.random()
            )
            await asyncio.sleep(delay_s)

    def nudge(self, device: str, look: str) -> None:
        """Tell a device to look at ``tasks`` or ``desired``. Thread-safe; lost when offline."""
        self._publish(topics.topic(device, topics.Leaf.COMMAND), records.Nudge(look).encode())

    def publish_desired(self, device: str, version: int) -> None:
        """Publish the retained version of a device's desired state. Thread-safe.

        A broker that restarts forgets it, so it is published again at each connection.
        """
        self._versions[device] = version
        payload = records.DesiredVersion(version).encode()
        self._publish(topics.topic(device, topics.Leaf.DESIRED), payload, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        session = self._session
        if session is not None:
            session.publish(topic, payload, retain=retain)

    def _forget_presence(self) -> None:
        with self._store.begin() as session:
            all_offline(session)

    async def _serve(self) -> None:
        self._queue = asyncio.Queue()  # what an ended session left comes again
        session = Session(
            self._url,
            client_id=self._name,
            subscriptions=[
                topics.subscription(topics.Leaf.TELEMETRY, share=topics.SHARE_GROUP),
                topics.subscription(topics.Leaf.PRESENCE),
            ],
            on_message=self._queue.put_nowait,  # bounded by receive_max
            tls=self._tls,
            manual_ack=True,
            receive_max=self._config.receive_max,
        )
        async with session:
            self._session, self.connected = session, True
            log.info("reading from the broker")
            for device, version in list(self._versions.items()):
                self.publish_desired(device, version)
            assert session.closed is not None
            while not session.closed.done():
                group = await self._group(session.closed)
                if group:
                    await self._store_group(session, group)
            raise SessionError(f"the broker {session.closed.result()}")

    async def _group(self, closed: asyncio.Future[str]) -> list[Message]:
        """Wait for a message, then take what else is there."""
        waiting = asyncio.ensure_future(self._queue.get())
        try:
            both: set[asyncio.Future[Any]] = {waiting, closed}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if not waiting.done() or waiting.cancelled():
            return []
        group = [waiting.result()]
        while len(group) < self._config.group_max and not self._queue.empty():
            group.append(self._queue.get_nowait())
        return group

    async def _store_group(self, session: Session, group: list[Message]) -> None:
        written: Written | None = None
        pause_s = 0.1
        while written is None:
            try:
                written = await asyncio.to_thread(self._writer.write, group)
            except ShoalError as exc:
                # Nothing is acknowledged: devices keep it, and it waits here for a better disk.
                log.error("%s; trying again in %.1f s", exc, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(10.0, pause_s * 2)
        for message in group:
            session.acknowledge(message)
        for device, ack in written.acks:
            session.publish(topics.topic(device, topics.Leaf.ACK), ack.encode())
        if written.quarantined:
            log.warning("%d messages broke the contract: see quarantine", written.quarantined)
        if written.stored:
            self._on_stored()
