"""The road from a device's spool to the server's rows: real broker, real processes, kill -9."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from shoal.agent.spool import read_totals
from shoal.server.ingest import Ingest, IngestConfig
from shoal.server.store import Store
from shoal.server.store.tables import Device, Quarantine, RecordRow
from tests.sims.brokers import BrokerProcess
from tests.sims.stores import fresh_store

pytestmark = pytest.mark.story

SENDER = Path(__file__).parents[2] / "sims" / "sender.py"


def stored(store: Store) -> int:
    """Return how many records the server holds."""
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(RecordRow)) or 0


def online(store: Store) -> bool:
    """Say whether the device holds a connection."""
    with store.read() as session:
        return session.scalars(select(Device)).one().online


async def until(true: Callable[[], Any], what: str) -> None:
    """Wait for a condition, a minute at most."""
    for _ in range(600):
        if true():
            return
        await asyncio.sleep(0.1)
    pytest.fail(f"gave up waiting for {what}")


@pytest.mark.parametrize("kind", ["iotcore", "mosquitto"])
def test_nothing_is_lost_or_counted_twice(kind: str, tmp_path: Path) -> None:
    """The sender and the broker die in the middle; both sides count the same at the end."""
    broker = BrokerProcess(kind, tmp_path)
    store = fresh_store(tmp_path / "fleet.db")
    with store.begin() as session:
        session.add(Device(name="d-1", created_ms=1))

    def start(*extra: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(SENDER), broker.url, str(tmp_path), *extra])

    async def story() -> None:
        ingest = Ingest(
            store,
            url=broker.url,
            config=IngestConfig(reconnect_s_max=0.5),
            clock=lambda: 1,
            on_update=lambda *_: None,
            on_reported=lambda *_: None,
        )
        running = asyncio.create_task(ingest.run())
        sender = start()
        try:
            await until(lambda: stored(store) > 200, "the first records")
            sender.kill()
            sender.wait()
            sender = start()
            await until(lambda: stored(store) > 600, "records of a second boot")
            broker.kill()
            before = stored(store)
            await asyncio.sleep(0.5)
            broker.start()
            await until(lambda: stored(store) > before + 200, "records after the broker's death")
            sender.kill()
            sender.wait()
            sender = start("--finish")
            await until(lambda: sender.poll() is not None, "the last sender")
            assert sender.returncode == 0, "the last sender drained its spool"
            await until(lambda: not online(store), "the planned end of the device")
        finally:
            sender.kill()
            sender.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    broker.start()
    try:
        asyncio.run(story())
    finally:
        broker.kill()
    totals, counters = read_totals(tmp_path / "spool")
    assert (totals.spooled, totals.lost) == (0, 0)
    assert totals.produced == totals.acknowledged == stored(store) > 800
    assert counters["bytes_up"] > 0
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Quarantine)) == 0
    store.close()
