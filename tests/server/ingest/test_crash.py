"""Faults of ingest: it dies before and after a commit, the disk refuses, the broker goes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from shoal.agent.spool import read_totals
from shoal.proto import records, topics
from shoal.proto.session import Message, Session
from shoal.server.errors import StoreError
from shoal.server.ingest import Ingest, IngestConfig
from shoal.server.ingest.writer import Written
from shoal.server.store import Store
from shoal.server.store.tables import Quarantine, RecordRow
from tests.sims.brokers import BrokerProcess
from tests.sims.stores import enrolled_store

pytestmark = pytest.mark.story

SIMS = Path(__file__).parents[2] / "sims"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with one enrolled device."""
    found = enrolled_store(tmp_path / "fleet.db")
    yield found
    found.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """The embedded broker."""
    found = BrokerProcess("iotcore", tmp_path)
    found.start()
    yield found
    found.kill()


def ingest_of(store: Store, broker: BrokerProcess) -> Ingest:
    """Return ingest without owners' hooks."""
    return Ingest(
        store,
        url=broker.url,
        config=IngestConfig(reconnect_s_max=0.2),
        clock=lambda: 1,
        on_update=lambda *_: None,
        on_reported=lambda *_: None,
    )


def count(store: Store, table: Any) -> int:
    """Return the number of rows."""
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.mark.parametrize("point", ["before-commit", "after-commit"])
def test_a_crash_neither_loses_nor_doubles(
    point: str, tmp_path: Path, store: Store, broker: BrokerProcess
) -> None:
    """What was not acknowledged comes again: to nothing new if it had been committed."""
    command = [sys.executable, str(SIMS / "ingester.py"), broker.url, store.url, point]
    dying = subprocess.Popen(command)
    sender = subprocess.Popen(
        [sys.executable, str(SIMS / "sender.py"), broker.url, str(tmp_path), "--finish"]
    )
    try:
        assert dying.wait(60) == 9
        held = count(store, RecordRow)
        assert held == 0 if point == "before-commit" else held > 0

        async def story() -> int:
            running = asyncio.create_task(ingest_of(store, broker).run())
            status = await asyncio.to_thread(sender.wait, 60)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return status

        assert asyncio.run(story()) == 0, "the sender drained its spool"
    finally:
        for process in (dying, sender):
            process.kill()
            process.wait()
    totals, _ = read_totals(tmp_path / "spool")
    assert (totals.produced, totals.acknowledged) == (100, 100)
    assert count(store, RecordRow) == 100
    assert count(store, Quarantine) == 0


class Peer:
    """Another client of the broker: says what a test wants, hears what comes down."""

    def __init__(self, broker: BrokerProcess, device: str) -> None:
        self.heard: list[Message] = []
        self._device = device
        self.session = Session(
            broker.url,
            client_id=f"peer-{device}",
            subscriptions=[
                topics.subscription(leaf, device=device)
                for leaf in (topics.Leaf.ACK, topics.Leaf.COMMAND, topics.Leaf.DESIRED)
            ],
            on_message=self.heard.append,
        )

    def say(self, payload: bytes) -> None:
        """Publish telemetry."""
        self.session.publish(topics.topic(self._device, topics.Leaf.TELEMETRY), payload)

    async def hear(self, leaf: topics.Leaf) -> bytes:
        """Wait for a message on a leaf and take it."""
        for _ in range(600):
            for message in self.heard:
                if message.topic == topics.topic(self._device, leaf):
                    self.heard.remove(message)
                    return message.payload
            await asyncio.sleep(0.05)
        pytest.fail(f"nothing came on {leaf}")


def batch(seq: int) -> bytes:
    """Return a batch of one event."""
    body = {"name": "n", "severity": "info", "text": "", "data": {}}
    record = records.Record(seq, records.Kind.EVENT, 1, body)
    return records.encode_batch(bytes(16), [records.encode_record(record)])


def test_a_bad_message_does_not_come_back(store: Store, broker: BrokerProcess) -> None:
    """It is set aside once, acknowledged to the broker, and what follows is stored."""

    async def story() -> None:
        running = asyncio.create_task(ingest_of(store, broker).run())
        peer = Peer(broker, "d-1")
        async with peer.session:
            while not count(store, RecordRow):  # until ingest has subscribed
                peer.say(batch(1))
                await asyncio.sleep(0.1)
            peer.heard.clear()
            peer.say(b"\xc1 not a batch")
            peer.say(batch(2))
            ack = records.Ack.decode(await peer.hear(topics.Leaf.ACK))
            while ack.upto < 2:
                ack = records.Ack.decode(await peer.hear(topics.Leaf.ACK))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # A second reader gets nothing that the first one has acknowledged.
        again = asyncio.create_task(ingest_of(store, broker).run())
        await asyncio.sleep(0.5)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)

    asyncio.run(story())
    assert (count(store, RecordRow), count(store, Quarantine)) == (2, 1)


def test_nothing_is_acknowledged_while_the_database_refuses(
    store: Store, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk of the server costs patience, not records."""

    async def story() -> None:
        ingest = ingest_of(store, broker)
        real = ingest._writer.write
        heard: list[int] = []

        def write(group: list[Message]) -> Written:
            heard.append(len(peer.heard))
            if len(heard) < 3:
                raise StoreError("disk full")
            return real(group)

        monkeypatch.setattr(ingest._writer, "write", write)
        peer = Peer(broker, "d-1")
        running = asyncio.create_task(ingest.run())
        async with peer.session:
            while not heard:
                peer.say(batch(1))
                await asyncio.sleep(0.1)
            assert records.Ack.decode(await peer.hear(topics.Leaf.ACK)).upto == 1
        assert heard[:3] == [0, 0, 0]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())
    assert count(store, RecordRow) == 1


def test_what_goes_down_and_stays_after_the_brokers_death(
    store: Store, broker: BrokerProcess
) -> None:
    """A nudge is a moment; the desired version is retained, and told again to a new broker."""

    async def story() -> None:
        ingest = ingest_of(store, broker)
        ingest.nudge("d-1", "tasks")  # nobody is connected: lost, and no error
        running = asyncio.create_task(ingest.run())
        peer = Peer(broker, "d-1")
        async with peer.session:
            while not ingest.connected:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(ingest.nudge, "d-1", "desired")
            await asyncio.to_thread(ingest.publish_desired, "d-1", 7)
            nudge = await peer.hear(topics.Leaf.COMMAND)
            assert records.Nudge.decode(nudge).look == "desired"
            found = records.DesiredVersion.decode(await peer.hear(topics.Leaf.DESIRED))
            assert found.version == 7
        broker.kill()
        while ingest.connected:
            await asyncio.sleep(0.05)
        broker.start()
        late = Peer(broker, "d-1")
        async with late.session:
            found = records.DesiredVersion.decode(await late.hear(topics.Leaf.DESIRED))
            assert found.version == 7
            assert not [each for each in late.heard if each.topic.endswith("cmd")]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())
