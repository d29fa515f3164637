"""Stories and faults C: a device joins, over real TLS on 127.0.0.1, and stays itself."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from shoal.agent.errors import StateError
from shoal.agent.identity import (
    EnrolmentRefusedError,
    EnrolmentToken,
    EnrolmentUnavailableError,
    Identity,
    IdentityError,
    PinError,
    TokenError,
    enroll,
    renew,
)
from shoal.agent.updates import Updater
from shoal.agent.updates.config import UpdateConfig
from shoal.agent.updates.fs import Disk
from shoal.agent.updates.metadata import Approvals
from shoal.agent.updates.remote import GrpcRemote
from shoal.proto import twin_pb2, twin_pb2_grpc
from shoal.proto.bundle import Manifest, pack, unpack
from shoal.server.store.tables import Alert, Certificate, Device, Model
from shoal.server.trust.approval import target_path
from tests.sims.trust_server import TrustServer


def now_ms() -> int:
    """Return Unix ms: TLS itself looks at the real clock."""
    return time.time_ns() // 1_000_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrustServer]:
    """A fleet server with open ports."""
    root = tmp_path / "server"
    root.mkdir()
    with TrustServer(root, clock=now_ms) as server:
        yield server


def ask(identity: Identity) -> twin_pb2.GetDesiredResponse:
    """Call the server as this device."""
    with identity.channel() as channel:
        stub = twin_pb2_grpc.TwinServiceStub(channel)
        reply: twin_pb2.GetDesiredResponse = stub.GetDesired(
            twin_pb2.GetDesiredRequest(), timeout=20
        )
        return reply


def test_a_device_joins_and_speaks(server: TrustServer, tmp_path: Path) -> None:
    """Token in, identity out; the server knows who calls; the files are for the owner alone."""
    state = tmp_path / "device"
    identity = enroll(server.token(), state)
    assert (identity.device, identity.fleet) == ("wrist-01", "demo")
    assert identity.tuf_root == server.approval.root_bytes
    assert identity.director_key == server.director.public_key
    assert Identity.load(state) == identity
    ask(identity)
    assert server.callers == ["wrist-01"]
    modes = {path: path.stat().st_mode & 0o777 for path in state.rglob("*")}
    assert all(mode in (0o600, 0o700) for mode in modes.values()), modes
    assert not (state / "identity" / "pending.pem").exists()


def test_a_lost_reply_is_made_up_for(server: TrustServer, tmp_path: Path) -> None:
    """Fault 30: the token was used up and nothing came back; the same command works again."""
    server.drop_replies = 1
    token = server.token()
    with pytest.raises(EnrolmentUnavailableError) as caught:
        enroll(token, tmp_path / "device")
    assert caught.value.retry
    ask(enroll(token, tmp_path / "device"))
    with server.store.read() as session:
        assert len(session.scalars(select(Certificate)).all()) == 1


def test_a_second_device_with_the_token_is_refused(server: TrustServer, tmp_path: Path) -> None:
    """Fault 29: and somebody is told."""
    token = server.token()
    ask(enroll(token, tmp_path / "device"))
    with pytest.raises(EnrolmentRefusedError):
        enroll(token, tmp_path / "thief")
    with pytest.raises(IdentityError, match="not enrolled"):
        Identity.load(tmp_path / "thief")
    with server.store.read() as session:
        assert session.scalars(select(Alert.kind)).all() == ["key_conflict"]


def test_a_server_of_another_fleet_hears_nothing(server: TrustServer, tmp_path: Path) -> None:
    """Fault 13: the hash in the token decides, before a byte of the secret is sent."""
    parts = server.token().split(".")
    parts[3] = "ab" * 32
    with pytest.raises(PinError):
        enroll(".".join(parts), tmp_path / "device")
    assert not (tmp_path / "device").exists()


def test_the_shown_ca_alone_is_not_enough(server: TrustServer, tmp_path: Path) -> None:
    """Somebody in between shows the true CA behind a leaf of its own: TLS refuses the leaf."""
    other_root = tmp_path / "other"
    other_root.mkdir()
    with TrustServer(other_root, clock=now_ms) as other:
        key, chain = other.ca.server_identity()
        leaf = chain.split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
        forged = grpc.ssl_server_credentials([(key, leaf + server.ca.certificate_pem)])
        with ThreadPoolExecutor(1) as pool:
            between = grpc.server(pool)
            port = between.add_secure_port("127.0.0.1:0", forged)
            between.start()
            parts = server.token().split(".")
            parts[4] = str(port)
            with pytest.raises(EnrolmentUnavailableError):
                enroll(".".join(parts), tmp_path / "device", timeout_s=5)
            between.stop(0).wait()


def test_nobody_there_is_a_clear_error(tmp_path: Path) -> None:
    """Nothing listens; or what listens speaks no TLS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        token = f"shoal1.wrist-01.{'a' * 26}.{'ab' * 32}.{port}.127.0.0.1"
        with pytest.raises(EnrolmentUnavailableError, match="no TLS server"):
            enroll(token, tmp_path / "device", timeout_s=2)
        free.listen()

        def answer() -> None:
            peer, _ = free.accept()
            with peer:
                peer.recv(100)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EnrolmentUnavailableError, match="no TLS server"):
            enroll(token, tmp_path / "device", timeout_s=10)
        thread.join()


def test_a_renewed_pair_takes_over_when_it_was_accepted(
    server: TrustServer, tmp_path: Path
) -> None:
    """New key, new certificate, one switch; the old pair stays on disk until the next."""
    state = tmp_path / "device"
    old = enroll(server.token(), state)
    new = renew(state)
    assert new.folder != old.folder and Identity.load(state) == new
    assert new.key_path.read_bytes() != old.key_path.read_bytes()
    ask(new)
    third = renew(state)
    assert not old.folder.exists() and new.folder.exists()
    assert Identity.load(state) == third


def test_a_pair_that_is_not_accepted_does_not_take_over(
    server: TrustServer, tmp_path: Path
) -> None:
    """Fault 34: the old pair counts until the new one has authenticated."""
    state = tmp_path / "device"
    old = enroll(server.token(), state)

    def refuses(identity: Identity) -> None:
        raise EnrolmentUnavailableError("not accepted")

    with pytest.raises(EnrolmentUnavailableError):
        renew(state, probe=refuses)
    assert Identity.load(state) == old
    ask(renew(state))


class PowerCutError(BaseException):
    """The process is gone."""


class DyingDisk(Disk):
    """A real disk under a process that is killed at its operation number ``left``."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise PowerCutError

    def make_dir(self, path: Path) -> bool:
        """Count, then do it."""
        self._count()
        return super().make_dir(path)

    def create(self, path: Path, data: bytes) -> None:
        """Count, then do it."""
        self._count()
        super().create(path, data)

    def rename(self, source: Path, target: Path) -> None:
        """Count, then do it."""
        self._count()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        """Count, then do it."""
        self._count()
        super().remove(path)


def test_a_kill_at_every_step_leaves_an_identity(server: TrustServer, tmp_path: Path) -> None:
    """Fault 34: killed at each step of enrolment and of a renewal, the next try completes it."""
    token, state = server.token(), tmp_path / "device"
    kills = 0
    for step in range(1, 60):
        try:
            enroll(token, state, fs=DyingDisk(step))
            break
        except PowerCutError:
            kills += 1
    assert kills >= 8
    for step in range(1, 60):
        before = Identity.load(state)
        try:
            renew(state, fs=DyingDisk(step))
            break
        except PowerCutError:
            assert Identity.load(state).device == before.device
    ask(Identity.load(state))
    with server.store.read() as session:
        assert len(session.scalars(select(Device)).all()) == 1


def test_a_revoked_device_is_refused(server: TrustServer, tmp_path: Path) -> None:
    """At its next call, on whatever certificate it holds."""
    state = tmp_path / "device"
    identity = enroll(server.token(), state)
    server.enrolment.revoke("wrist-01")
    with pytest.raises(grpc.RpcError) as caught:
        ask(identity)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(EnrolmentRefusedError):
        renew(state)
    ask(enroll(server.token(), state))


def test_without_a_certificate_there_is_no_connection(server: TrustServer, tmp_path: Path) -> None:
    """The device port speaks mutual TLS only."""
    identity = enroll(server.token(), tmp_path / "device")
    credentials = grpc.ssl_channel_credentials(identity.ca_path.read_bytes())
    with (
        grpc.secure_channel(identity.server_address, credentials) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        stub = twin_pb2_grpc.TwinServiceStub(channel)
        stub.GetDesired(twin_pb2.GetDesiredRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_damaged_identity_is_refused(server: TrustServer, tmp_path: Path) -> None:
    """Modes, missing and mixed parts: a typed error that says what to do."""
    state = tmp_path / "device"
    identity = enroll(server.token(), state)
    os.chmod(identity.key_path, 0o640)
    with pytest.raises(StateError, match="read by others"):
        Identity.load(state)
    os.chmod(identity.key_path, 0o600)
    other = enroll(server.token("wrist-02"), tmp_path / "device-2")
    saved = identity.certificate_path.read_bytes()
    identity.certificate_path.write_bytes(other.certificate_path.read_bytes())
    with pytest.raises(IdentityError, match="belong together"):
        Identity.load(state)
    identity.certificate_path.write_bytes(saved)
    assert Identity.load(state) == identity
    (identity.folder / "fleet").unlink()
    with pytest.raises(IdentityError) as caught:
        Identity.load(state)
    assert "enrol" in caught.value.hint


def test_renewal_is_due_at_two_thirds(server: TrustServer, tmp_path: Path) -> None:
    """Of the certificate's life."""
    identity = enroll(server.token(), tmp_path / "device")
    identity = dataclasses.replace(identity, issued_ms=0, expires_ms=90)
    assert not identity.is_renewal_due(59)
    assert identity.is_renewal_due(60)


@given(st.text(max_size=200))
def test_whatever_is_pasted(text: str) -> None:
    """A token, or TokenError, which never repeats what may be a secret."""
    with pytest.raises(TokenError) as caught:
        EnrolmentToken.parse("shoal1." + text)
    assert len(text) < 12 or text not in str(caught.value)


def test_an_update_over_the_real_wire(server: TrustServer, tmp_path: Path) -> None:
    """Enrol, approve, assign, fetch over mutual TLS, confirm: both sides of trust, together."""
    identity = enroll(server.token(), tmp_path / "device")
    manifest = Manifest(
        name="demo", model="model.onnx", input="x", output="p", channels=("c",),
        classes=("a", "b"), samples=4,
    )  # fmt: skip
    parts = {"model.onnx": os.urandom(50_000), "golden.npz": b"g", "profile.json": b"{}"}
    data = pack(manifest, parts)
    sha256 = unpack(data).sha256
    server.artefacts[sha256] = data
    server.approval.approve(target_path("demo", sha256), sha256, len(data), {})
    with server.store.begin() as session:
        model = Model(
            name="demo", version=1, sha256=sha256, size=len(data), created_ms=0, manifest={},
            profile={}, approved_ms=1,
        )  # fmt: skip
        session.add(model)
        device = session.scalars(select(Device)).one()
        server.director.assign(session, device, model, "rollout-1")
    told: list[str] = []
    root, config = tmp_path / "device" / "updates", UpdateConfig()
    root.mkdir()
    with identity.channel() as channel:
        remote = GrpcRemote(channel)
        approvals = Approvals(
            root / "metadata", tuf_root=identity.tuf_root, remote=remote, fs=Disk(),
            config=config, clock=now_ms, monotonic=time.monotonic,
        )  # fmt: skip
        updater = Updater(
            root, device=identity.device, director_key=identity.director_key,
            approvals=approvals, remote=remote, self_test=lambda path: None,
            emit=lambda kind, body: told.append(body["state"]), clock=now_ms,
        )  # fmt: skip
        assert updater.boot() is None
        path = updater.apply_here(ask(identity).assignment)
        assert path is not None and path.read_bytes() == data
        updater.trial_passed()
        assert updater.apply_here(ask(identity).assignment) is None
    assert told == ["offered", "downloading", "verified", "trial", "confirmed"]


def test_certificates_name_the_device_alone(server: TrustServer, tmp_path: Path) -> None:
    """What the device holds is what the CA decided: not the request's empty subject."""
    identity = enroll(server.token(), tmp_path / "device")
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    assert "CN=wrist-01" in certificate.subject.rfc4514_string()
