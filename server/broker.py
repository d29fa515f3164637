"""The embedded MQTT 5 broker of the demo and of tests: iotcore (rumqttd) in its own process.

    python -m shoal.server.broker --port 1883

It has no access lists: whoever reaches the port may publish and read everything. It listens on
loopback only, and is no broker for production; docs/mosquitto.md says how to set up one.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path

from iotcore import IotCoreBroker

from .. import ShoalError
from .errors import PortInUseError

PAYLOAD_BYTES_MAX = 256 << 10

_CONFIG = """
id = 0
[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 16777216
max_segment_count = 4
[v5.1]
name = "v5-1"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload}
max_inflight_count = 500
"""


_SPAN = re.compile(r"[^;]{1,40}; \w+=")  # "publish; topic=…", "[>] incoming; connection_id=…"


def _tells(record: logging.LogRecord) -> bool:
    """Whether a record is an event: rumqttd logs its tracing spans, of every packet, as errors."""
    return _SPAN.match(record.getMessage()) is None


def check_port(host: str, port: int) -> None:
    """Raise PortInUseError when another program listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise PortInUseError(
                f"{host}:{port} is in use by another program; no broker was started",
                hint="choose another port, or use that program by --broker if it is a broker",
            ) from exc


def serve(port: int, *, host: str = "127.0.0.1") -> None:
    """Run the broker in this process until it is killed.

    Args:
        port: TCP port, 1 to 65535.
        host: Address to listen on.

    Raises:
        PortInUseError: The port is taken.
    """
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="shoal-broker-") as folder:
        path = Path(folder) / "broker.toml"
        path.write_text(_CONFIG.format(host=host, port=port, payload=PAYLOAD_BYTES_MAX))
        broker = IotCoreBroker(config_path=str(path))
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.root.handlers[0].addFilter(_tells)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the broker's loop never comes back to Python
    broker.run_forever()


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="shoal.server.broker", description=__doc__)
    parser.add_argument("--port", type=int, default=1883, help="TCP port on 127.0.0.1")
    parser.add_argument(
        "--with-parent", action="store_true", help="end when the process that started it ends"
    )
    arguments = parser.parse_args()
    if arguments.with_parent:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    print("embedded broker: no access lists, for demo and tests only", file=sys.stderr)
    try:
        serve(arguments.port)
    except ShoalError as exc:
        print(f"error: {exc}\nhint: {exc.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
