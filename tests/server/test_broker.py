"""The embedded broker: says when its port is taken, takes large packets, dies with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.proto.session import Message, Session
from shoal.server.broker import PAYLOAD_BYTES_MAX, check_port
from shoal.server.errors import PortInUseError
from tests.sims.brokers import BrokerProcess, free_port

pytestmark = pytest.mark.story


def is_open(port: int) -> bool:
    """Say whether something listens."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_taken_port_is_said_clearly() -> None:
    """Exit status 1, one sentence, a hint; no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match="in use by another program"):
            check_port("127.0.0.1", port)
        done = subprocess.run(
            [sys.executable, "-m", "shoal.server.broker", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"127.0.0.1:{port} is in use" in done.stderr and "hint:" in done.stderr
    assert "no access lists" in done.stderr and "Traceback" not in done.stderr


def test_a_large_message_comes_through_and_a_retained_one_stays(tmp_path: Path) -> None:
    """Batches are 64 KiB at most; the broker takes four times as much, and is silent about it."""
    broker = BrokerProcess("iotcore", tmp_path)
    broker.start()
    heard: list[Message] = []

    def session(name: str) -> Session:
        return Session(broker.url, client_id=name, subscriptions=["a/#"], on_message=heard.append)

    async def until(count: int) -> None:
        for _ in range(200):
            if len(heard) >= count:
                return
            await asyncio.sleep(0.05)
        pytest.fail("nothing came")

    async def story() -> None:
        large = os.urandom(PAYLOAD_BYTES_MAX - 1000)
        async with session("one") as first:
            first.publish("a/large", large)
            first.publish("a/kept", b"kept", retain=True)
            await until(2)
        assert {each.payload for each in heard} == {large, b"kept"}
        heard.clear()
        async with session("two"):
            await until(1)
        assert [each.payload for each in heard] == [b"kept"]

    try:
        asyncio.run(story())
    finally:
        broker.kill()
    assert "publish" not in broker.log.read_text()


def test_dies_with_its_parent() -> None:
    """A demo that is killed leaves nothing behind."""
    port = free_port()
    command = [sys.executable, "-m", "shoal.server.broker", "--port", str(port), "--with-parent"]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run({command!r})"],
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(400):
            if is_open(port):
                break
            time.sleep(0.05)
        assert is_open(port)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(200):
        if not is_open(port):
            return
        time.sleep(0.05)
    pytest.fail("the broker outlived its parent")
