"""The three gRPC servers: who may come in by which door.

    enrolment   TLS, no client certificate: EnrolmentService alone
    devices     mutual TLS: twin, models, federated exchange, renewal, health
    operator    Unix socket of mode 0600: OperatorService; who may open the file is an operator

Each refuses an address that is taken (SO_REUSEPORT would silently share it with the other
program), and bounds messages, calls, streams, pings and the age of connections (faults 73, 74).
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from ..errors import ConfigError, PortInUseError
from .config import ApiConfig
from .errors import ErrorInterceptor

SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path of unix(7), less its final NUL

Register = Callable[[grpc.aio.Server], None]
"""Registers a service, e.g. ``partial(add_TwinServiceServicer_to_server, servicer)``."""


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What the server shows in TLS, and whom it believes; all PEM."""

    key: bytes
    """Private key."""
    chain: bytes
    """Leaf, then the fleet's CA: a device pins the CA at its first connection."""
    ca: bytes
    """CA of the device certificates."""


class Listener:
    """One gRPC server. Made cheap; :meth:`run` serves until cancelled."""

    def __init__(
        self,
        address: str,
        register: Sequence[Register],
        *,
        options: Sequence[tuple[str, Any]],
        calls_max: int,
        credentials: grpc.ServerCredentials | None,
        config: ApiConfig,
    ) -> None:
        """Prepare; nothing listens yet. The functions below know what each server needs."""
        self._address, self._register, self._options = address, register, options
        self._calls_max, self._credentials, self._config = calls_max, credentials, config
        self.port = 0
        """TCP port that it listens on, once :attr:`started` is set."""
        self.started = asyncio.Event()

    async def run(self) -> None:
        """Listen and serve until cancelled; then let calls end.

        Raises:
            PortInUseError: The address is taken.
        """
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(retry_after_ms=self._config.retry_after_ms)],
            options=self._options,
            maximum_concurrent_rpcs=self._calls_max,
        )
        for register in self._register:
            register(server)
        path = _socket_path(self._address)
        try:
            if path is not None:
                _clear(path)
            self.port = self._bind(server)
            if path is not None:
                path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            await server.start()
            self.started.set()
            await server.wait_for_termination()
        finally:
            self.started.clear()
            await server.stop(self._config.stop_s)

    def _bind(self, server: grpc.aio.Server) -> int:
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._address)
            else:
                port = server.add_secure_port(self._address, self._credentials)
        except RuntimeError as exc:
            raise _taken(self._address) from exc
        if not port:
            raise _taken(self._address)
        return int(port)


def enrolment(
    address: str, identity: ServerIdentity, register: Sequence[Register], *, config: ApiConfig
) -> Listener:
    """Return the server of the enrolment port.

    Args:
        address: host:port; port 0 lets the system choose.
        identity: What it shows in TLS.
        register: The services.
        config: The bounds.
    """
    credentials = grpc.ssl_server_credentials([(identity.key, identity.chain)])
    return Listener(
        address,
        register,
        options=_options(config, bytes_max=config.message_bytes_max),
        calls_max=config.enrolment_calls_max,
        credentials=credentials,
        config=config,
    )


def devices(
    address: str, identity: ServerIdentity, register: Sequence[Register], *, config: ApiConfig
) -> Listener:
    """Return the server of the device port; args as for :func:`enrolment`."""
    credentials = grpc.ssl_server_credentials(
        [(identity.key, identity.chain)],
        root_certificates=identity.ca,
        require_client_auth=True,
    )
    return Listener(
        address,
        register,
        options=_options(config, bytes_max=config.message_bytes_max),
        calls_max=config.calls_max,
        credentials=credentials,
        config=config,
    )


def operator(path: Path, register: Sequence[Register], *, config: ApiConfig) -> Listener:
    """Return the server of the operator's socket.

    Args:
        path: Of the socket, in a folder that only its owner may enter.
        register: The services.
        config: The bounds.

    Raises:
        ConfigError: The path is too long for a socket.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"the socket path {path} is longer than {SOCKET_PATH_BYTES_MAX} bytes",
            hint="choose a state folder with a shorter path",
        )
    return Listener(
        f"unix:{path}",
        register,
        options=_options(config, bytes_max=config.document_bytes_max),
        calls_max=config.operator_calls_max,
        credentials=None,
        config=config,
    )


def _options(config: ApiConfig, *, bytes_max: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", bytes_max),
        ("grpc.max_send_message_length", bytes_max),
        ("grpc.max_metadata_size", config.metadata_bytes_max),
        ("grpc.max_concurrent_streams", config.streams_max),
        ("grpc.max_connection_age_ms", 1000 * config.connection_age_s),
        ("grpc.max_connection_age_grace_ms", 1000 * config.connection_grace_s),
        ("grpc.keepalive_time_ms", 1000 * config.keepalive_s),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000 * config.ping_s_min),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000 * config.ping_s_min),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _socket_path(address: str) -> Path | None:
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def _clear(path: Path) -> None:
    """Remove the socket of a server that died; one that lives keeps it."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise _taken(str(path))


def _taken(address: str) -> PortInUseError:
    return PortInUseError(
        f"the address {address} is taken or cannot be bound",
        hint="stop the program that has it, or choose another one in the server's configuration",
    )
