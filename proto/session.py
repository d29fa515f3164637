"""One MQTT 5 connection, from CONNECT to its end. Both sides of the road use it.

    async with Session(...) as session:      # connected, subscribed
        session.publish(topic, payload)
        await session.closed                 # why it ended

There is no reconnecting in here: who owns the session decides when to try again. MQTT 5 is
required: on 3.1.1 a broker answers Success to a publish that it throws away (fault 36).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from .. import ShoalError

PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
QUEUED_MAX: Final = 1000  # paho stops near 65,000; whoever sends has a window far below this


class SessionError(ShoalError):
    """The broker cannot be reached or refused; nothing was sent."""

    code = "mqtt.session"
    retry = True


@dataclass(frozen=True, slots=True)
class Broker:
    """Where a broker listens."""

    host: str
    port: int
    tls: bool


def parse_url(url: str) -> Broker:
    """Return the parts of ``mqtt://host[:port]`` or ``mqtts://host[:port]``.

    Raises:
        SessionError: It is neither.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or PORTS[parts.scheme]
        if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
            raise ValueError
    except (KeyError, ValueError) as exc:
        raise SessionError(
            f"broker address {url!r:.80} is not mqtt://host:port or mqtts://host:port"
        ) from exc
    return Broker(parts.hostname, port, parts.scheme == "mqtts")


@dataclass(frozen=True, slots=True)
class Message:
    """One received message; ``token`` acknowledges it."""

    topic: str
    payload: bytes
    token: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for mutual TLS."""

    ca: Path
    certificate: Path
    key: Path


class _TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails; paho would leave it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Session:
    """One connection; used from one event loop, except ``publish`` and ``acknowledge``."""

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        subscriptions: Sequence[str],
        on_message: Callable[[Message], None],
        will: tuple[str, bytes] | None = None,
        tls: Tls | None = None,
        manual_ack: bool = False,
        receive_max: int = 100,
        keepalive_s: int = 30,
        connect_s: float = 10.0,
        on_denied: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Take all of it; nothing happens before ``async with``.

        Args:
            url: The broker.
            client_id: Client id; a broker that checks identities maps it itself.
            subscriptions: Topic filters, QoS 1.
            on_message: Called in the event loop for each message.
            will: Topic and payload that the broker publishes, retained, when the session dies.
            tls: Needed for ``mqtts``.
            manual_ack: The owner calls :meth:`acknowledge`; otherwise done on receipt.
            receive_max: Messages that the broker may have sent without an acknowledgement.
            keepalive_s: Seconds between signs of life.
            connect_s: Seconds to wait for CONNACK and SUBACK.
            on_denied: Called in the event loop with the reason when the broker refuses a publish.
        """
        self._broker = parse_url(url)
        self._subscriptions, self._on_message = list(subscriptions), on_message
        self._receive_max, self._keepalive_s = receive_max, keepalive_s
        self._connect_s, self._on_denied = connect_s, on_denied
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[str] | None = None
        """Resolves to the reason when the connection has ended."""
        self.packet_bytes_max = 256 << 10
        """Largest packet the broker takes, bytes."""
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        client.max_queued_messages_set(QUEUED_MAX)
        client.on_connect = self._connected
        client.on_connect_fail = self._refused
        client.on_disconnect = self._disconnected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        client.on_publish = self._published
        if will is not None:
            client.will_set(will[0], will[1], qos=1, retain=True)
        if self._broker.tls:
            if tls is None:
                raise SessionError("mqtts needs a certificate", hint="enroll the device first")
            context = ssl.create_default_context(cafile=str(tls.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(str(tls.certificate), str(tls.key))
            context.sslsocket_class = _TidySocket
            client.tls_set_context(context)
        self._client = client

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self.closed = self._loop.create_future()
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = self._receive_max
        where = f"{self._broker.host}:{self._broker.port}"
        try:
            async with asyncio.timeout(self._connect_s):
                await self._loop.run_in_executor(
                    None,
                    lambda: self._client.connect(
                        self._broker.host,
                        self._broker.port,
                        self._keepalive_s,
                        clean_start=True,
                        properties=properties,
                    ),
                )
            self._client.loop_start()
            async with asyncio.timeout(self._connect_s):
                await self._ready
        except (OSError, TimeoutError, ValueError) as exc:
            await self._end()
            raise SessionError(f"broker {where} cannot be reached: {exc or 'timeout'}") from exc
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._end()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Queue a QoS 1 message; False when the connection is gone. Thread-safe."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        return info.rc in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN) and (
            self._client.is_connected()
        )

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message is safe (manual_ack). Thread-safe."""
        self._client.ack(*message.token)

    async def flush(self, wait_s: float) -> None:
        """Wait until what was published has left, at most ``wait_s`` seconds."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while self._client._out_messages and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    async def _end(self) -> None:
        with contextlib.suppress(Exception):
            self._client.disconnect()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._client.loop_stop)
        for future in (self._ready, self.closed):
            if future is not None and not future.done():
                future.cancel()

    # --- callbacks, in paho's thread -------------------------------------------------------

    def _call(self, run: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(run, *args)

    def _connected(
        self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if reason.is_failure:
            self._call(self._fail, f"refused: {reason}")
            return
        limit = getattr(properties, "MaximumPacketSize", None)
        if limit:
            self.packet_bytes_max = int(limit)
        if self._subscriptions:
            options = SubscribeOptions(qos=1)
            client.subscribe([(each, options) for each in self._subscriptions])
        else:
            self._call(self._settle)

    def _subscribed(
        self, client: mqtt.Client, userdata: Any, mid: int, reasons: Any, properties: Any
    ) -> None:
        bad = [str(each) for each in reasons if each.is_failure]
        if bad:
            self._call(self._fail, f"subscription refused: {', '.join(bad)}")
        else:
            self._call(self._settle)

    def _refused(self, client: mqtt.Client, userdata: Any) -> None:
        self._call(self._fail, "connection failed")

    def _disconnected(
        self, client: mqtt.Client, userdata: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        self._call(self._fail, f"disconnected: {reason}")

    def _received(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""  # no broker should let it pass; an error here would end paho's thread
        found = Message(topic, bytes(message.payload), (message.mid, message.qos))
        self._call(self._on_message, found)

    def _published(
        self, client: mqtt.Client, userdata: Any, mid: int, reason: Any, properties: Any
    ) -> None:
        if reason.is_failure:
            self._call(self._on_denied, str(reason))

    # --- in the event loop -----------------------------------------------------------------

    def _settle(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _fail(self, why: str) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(SessionError(f"the broker {why}"))
        if self.closed is not None and not self.closed.done():
            self.closed.set_result(why)


def reconnect_delay_s(attempt: int, *, most_s: float, draw: float) -> float:
    """Return how long to wait before trying again: full jitter.

    Args:
        attempt: Failures in a row, from 0.
        most_s: Upper bound, s.
        draw: A uniform random number, 0 to 1.

    Source: Brooker, "Exponential Backoff and Jitter" (2015): U(0, min(most, 2^n)) spreads a herd
    better than any fixed schedule.
    """
    return draw * min(most_s, 2.0 ** min(attempt, 30))
