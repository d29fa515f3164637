"""Real brokers for tests: the embedded one, and mosquitto where it is installed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


# Below the ports that Linux gives to outgoing connections (32768 on), so that none of them takes
# a port between the probe and its use; another process of the tests begins elsewhere.
_PORTS = itertools.cycle(range(20_000, 32_000))
for _ in range(997 * os.getpid() % 12_000):
    next(_PORTS)


def free_port() -> int:
    """Return a TCP port that nothing listens on, another one each time."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


class BrokerProcess:
    """A broker that can be killed and started again on the same port."""

    def __init__(self, kind: str, folder: Path) -> None:
        if kind == "mosquitto" and not Path(MOSQUITTO).exists():
            pytest.skip("mosquitto is not installed: this test needs a real mosquitto")
        self.kind, self.port = kind, free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._folder, self.log = folder, folder / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        if self.kind == "mosquitto":
            config = self._folder / "mosquitto.conf"
            config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n")
            command = [MOSQUITTO, "-c", str(config)]
        else:
            command = [sys.executable, "-m", "shoal.server.broker", "--port", str(self.port)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1),
            ):
                return
            time.sleep(0.05)
        raise AssertionError("the broker did not come up")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
