"""What docs/mosquitto.md promises, held against a real mosquitto with the guide's own files.

The configuration and the access list are read out of the guide: a guide that drifts fails here.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shoal.proto import records, topics
from shoal.proto.records import Kind
from shoal.proto.session import Message, Session, SessionError, Tls
from shoal.proto.topics import Leaf
from shoal.server.ingest import Ingest, IngestConfig
from shoal.server.store.tables import Device
from tests.sims.brokers import MOSQUITTO, free_port
from tests.sims.stores import fresh_store

pytestmark = pytest.mark.story

GUIDE = Path(__file__).parents[2] / "docs" / "mosquitto.md"


class Authority:
    """A certificate authority that writes its files into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        authority = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self._write(self.path, authority)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def _write(self, path: Path, builder: x509.CertificateBuilder) -> None:
        certificate = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, file: str = "") -> Tls:
        """Write a certificate with this CN for 127.0.0.1, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        found = Tls(
            self.path, self._folder / f"{file or name}.pem", self._folder / f"{file or name}.key"
        )
        self._write(
            found.certificate,
            self._builder(subject, key).add_extension(
                x509.SubjectAlternativeName([address]), critical=False
            ),
        )
        found.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return found


class Broker:
    """A running mosquitto, and certificates for it."""

    def __init__(self, folder: Path, authority: Authority, port: int) -> None:
        self.folder, self.authority = folder, authority
        self.url = f"mqtts://127.0.0.1:{port}"
        self.server = authority.issue("shoal-server", file="server")
        self._tls = {name: authority.issue(name) for name in ("d-1", "d-2")}

    def client(self, name: str, *subscriptions: str, client_id: str = "") -> Client:
        """Return a device's connection, to be entered."""
        return Client(self.url, self._tls[name], client_id or name, subscriptions)


class Client:
    """One connection; remembers what it heard and what it was refused."""

    def __init__(self, url: str, tls: Tls, name: str, subscriptions: tuple[str, ...]) -> None:
        self.heard: list[Message] = []
        self.denied: list[str] = []
        self.session = Session(
            url,
            client_id=name,
            subscriptions=subscriptions,
            on_message=self.heard.append,
            on_denied=self.denied.append,
            tls=tls,
        )


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A mosquitto that runs with the guide's files."""
    if not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed: the guide is not tested")
    folder, port = tmp_path_factory.mktemp("mosquitto"), free_port()
    authority = Authority(folder)
    authority.issue("broker")
    config, access = re.findall(r"```\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    config = config.replace("listener 8883", f"listener {port} 127.0.0.1")
    config = config.replace("/etc/shoal/", f"{folder}/") + "user root\n"
    (folder / "mosquitto.conf").write_text(config)
    (folder / "acl").write_text(access)
    (folder / "acl").chmod(0o600)
    process = subprocess.Popen(
        [MOSQUITTO, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                break
            time.sleep(0.05)
        yield Broker(folder, authority, port)
    finally:
        process.kill()
        process.wait()


def batch(seq: int) -> bytes:
    """Return a batch of one event."""
    body = {"name": "n", "severity": "info", "text": "", "data": {}}
    record = records.Record(seq, Kind.EVENT, 1, body)
    return records.encode_batch(bytes(16), [records.encode_record(record)])


async def until(list_: list[object] | list[Message] | list[str]) -> None:
    """Wait for something in a list."""
    for _ in range(200):
        if list_:
            return
        await asyncio.sleep(0.05)
    pytest.fail("nothing came")


def test_the_road_works_with_it(broker: Broker, tmp_path: Path) -> None:
    """Shared subscription, acknowledgement, nudge: the access list lets all of it through."""
    store = fresh_store(tmp_path / "fleet.db")
    with store.begin() as session:
        session.add(Device(name="d-1", created_ms=1))
    ingest = Ingest(
        store,
        url=broker.url,
        config=IngestConfig(),
        clock=lambda: 1,
        on_update=lambda *_: None,
        on_reported=lambda *_: None,
        tls=broker.server,
    )

    async def story() -> None:
        running = asyncio.create_task(ingest.run())
        device = broker.client("d-1", topics.subscription(Leaf.ACK, device="d-1"))
        device.session.packet_bytes_max = 0
        async with device.session:
            assert device.session.packet_bytes_max == 256 << 10, "the broker says its limit"
            for _ in range(100):  # until ingest has subscribed
                if device.heard:
                    break
                device.session.publish(topics.topic("d-1", Leaf.TELEMETRY), batch(1))
                await asyncio.sleep(0.2)
            assert records.Ack.decode(device.heard[0].payload) == records.Ack(bytes(16), 1)
            assert not device.denied
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())
    store.close()


def test_a_device_cannot_speak_for_another(broker: Broker) -> None:
    """The publish is answered 0x87 and reaches nobody (fault 36)."""

    async def story() -> None:
        server = Client(broker.url, broker.server, "s", (topics.subscription(Leaf.TELEMETRY),))
        thief = broker.client("d-1")
        async with server.session, thief.session:
            thief.session.publish(topics.topic("d-2", Leaf.TELEMETRY), b"forged")
            await until(thief.denied)
            assert thief.denied == ["Not authorized"]
            thief.session.publish(topics.topic("d-1", Leaf.TELEMETRY), b"own")
            await until(server.heard)
            assert [each.payload for each in server.heard] == [b"own"]

    asyncio.run(story())


def test_a_device_cannot_command_even_itself(broker: Broker) -> None:
    """Acknowledgements and desired versions come from the server alone."""

    async def story() -> None:
        device = broker.client("d-1")
        async with device.session:
            device.session.publish(topics.topic("d-1", Leaf.DESIRED), b"", retain=True)
            await until(device.denied)

    asyncio.run(story())


def test_a_device_hears_nothing_of_another(broker: Broker) -> None:
    """The subscription may be granted; what counts is delivery (fault 37)."""

    async def story() -> None:
        server = Client(broker.url, broker.server, "s", ())
        spy = broker.client("d-1", topics.subscription(Leaf.ACK), "#")
        victim = broker.client("d-2", topics.subscription(Leaf.ACK, device="d-2"))
        async with server.session, spy.session, victim.session:
            server.session.publish(topics.topic("d-2", Leaf.ACK), b"for d-2")
            await until(victim.heard)
            server.session.publish(topics.topic("d-1", Leaf.ACK), b"for d-1")
            await until(spy.heard)
            assert {each.payload for each in spy.heard} == {b"for d-1"}

    asyncio.run(story())


def test_a_client_id_cannot_be_taken_over(broker: Broker) -> None:
    """Another valid device that uses the victim's client id gets its own (fault 38)."""

    async def story() -> None:
        server = Client(broker.url, broker.server, "s", ())
        victim = broker.client("d-2", topics.subscription(Leaf.ACK, device="d-2"))
        async with server.session, victim.session:
            thief = broker.client("d-1", client_id="d-2")
            async with thief.session:
                server.session.publish(topics.topic("d-2", Leaf.ACK), b"still here")
                await until(victim.heard)
                assert victim.session.closed is not None and not victim.session.closed.done()

    asyncio.run(story())


def test_a_stranger_is_not_let_in(broker: Broker, tmp_path: Path) -> None:
    """Neither with a certificate of another authority, nor to a broker of another one."""
    foreign = Authority(tmp_path, "foreign").issue("d-1")
    as_client = Tls(broker.authority.path, foreign.certificate, foreign.key)
    to_impostor = Tls(foreign.ca, broker.server.certificate, broker.server.key)

    async def story(tls: Tls) -> None:
        with pytest.raises(SessionError, match=r"cannot be reached|disconnected"):
            async with Client(broker.url, tls, "d-1", ()).session:
                pass

    asyncio.run(story(as_client))
    asyncio.run(story(to_impostor))
