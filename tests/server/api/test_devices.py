"""The device port, over real mutual TLS: who may call, and what each may have."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select, update

from shoal.proto import assignment as contract
from shoal.proto import model_pb2, model_pb2_grpc, twin_pb2, twin_pb2_grpc
from shoal.server.api.config import ApiConfig
from shoal.server.store.tables import Certificate, Device, Evaluation, Task
from tests.sims.server import FleetServer


class Clock:
    """A clock that a test can put forward."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        """Return Unix ms."""
        return int(time.time() * 1000) + self.ahead_ms


@pytest.fixture
def clock() -> Clock:
    """Return the server's clock."""
    return Clock()


@pytest.fixture
def server(tmp_path: Path, clock: Clock) -> Iterator[FleetServer]:
    """Return a running server that streams two artefacts at once, at most."""
    config = ApiConfig(stop_s=0.0, downloads_max=2, retry_after_ms=1234, chunk_s=0.5)
    with FleetServer(tmp_path, api=config, clock=clock) as found:
        yield found


def desired(channel: grpc.Channel) -> twin_pb2.GetDesiredResponse:
    """Ask for the desired state."""
    stub = twin_pb2_grpc.TwinServiceStub(channel)
    found: twin_pb2.GetDesiredResponse = stub.GetDesired(twin_pb2.GetDesiredRequest(), timeout=20)
    return found


def fetch(channel: grpc.Channel, sha256: str, offset: int = 0) -> bytes:
    """Fetch an artefact from an offset on, checking what each chunk says."""
    stub = model_pb2_grpc.ModelServiceStub(channel)
    data = b""
    request = model_pb2.FetchArtefactRequest(sha256=sha256, offset=offset)
    for chunk in stub.FetchArtefact(request, timeout=20):
        assert chunk.offset == offset + len(data)
        assert 0 < len(chunk.data) <= 256 << 10
        data += chunk.data
        assert offset + len(data) <= chunk.length
    return data


def status(exc: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    """Return code and details of an error."""
    return exc.value.code(), exc.value.details()


def assign(server: FleetServer, name: str, sha256: str) -> None:
    """Assign a model as a rollout would."""
    with server.store.begin() as session:
        device = session.scalars(select(Device).where(Device.name == name)).one()
        server.director.assign(session, device, server.models.get(sha256), "ro-1")


def test_a_device_gets_its_own_assignment(server: FleetServer) -> None:
    """Identity is the certificate's: there is nothing in the request to lie with."""
    one, other = server.enrol("wrist-01"), server.enrol("wrist-02")
    with server.channel(one) as channel:
        empty = desired(channel)
        assert empty.version == 0
        assert not empty.HasField("assignment")
    assign(server, "wrist-01", server.approved_model())
    with server.channel(one) as channel, server.channel(other) as second:
        found = desired(channel)
        signed = contract.verify(
            found.assignment.payload,
            found.assignment.signature,
            Ed25519PublicKey.from_public_bytes(server.director.public_key),
        )
        assert (signed.device, signed.counter) == ("wrist-01", 1)
        assert not desired(second).HasField("assignment")


def test_without_a_certificate_nobody_comes_in(server: FleetServer) -> None:
    """Mutual TLS refuses the connection itself."""
    with server.channel(None) as channel, pytest.raises(grpc.RpcError) as exc:
        desired(channel)
    assert status(exc)[0] == grpc.StatusCode.UNAVAILABLE


def test_a_revoked_device_is_out_at_its_next_call(server: FleetServer) -> None:
    """Its connection stays open; its calls do not go through any more."""
    with server.channel(server.enrol("wrist-01")) as channel:
        desired(channel)
        server.enrolment.revoke("wrist-01")
        with pytest.raises(grpc.RpcError) as exc:
            desired(channel)
    assert status(exc)[0] == grpc.StatusCode.PERMISSION_DENIED
    assert dict(exc.value.trailing_metadata())["shoal-hint-bin"] == b"enrol the device again"


def test_a_certificate_that_expired_on_an_open_connection(
    server: FleetServer, clock: Clock
) -> None:
    """Fault 33: TLS alone would let it go on."""
    with server.channel(server.enrol("wrist-01")) as channel:
        desired(channel)
        clock.ahead_ms = 91 * 86_400_000
        with pytest.raises(grpc.RpcError, match="has expired") as exc:
            desired(channel)
    assert status(exc)[0] == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("what", ["revoked", "unknown", "another device's"])
def test_only_certificates_of_the_table_count(server: FleetServer, what: str) -> None:
    """A leaf that the CA's key signed, and that this server did not issue, is worth nothing."""
    identity = server.enrol("wrist-01")
    server.enrol("wrist-02")
    with server.store.begin() as session:
        first, second = session.scalars(select(Device).order_by(Device.id)).all()
        mine = update(Certificate).where(Certificate.device_id == first.id)
        if what == "revoked":
            session.execute(mine.values(revoked_ms=1))
        elif what == "unknown":
            session.execute(mine.values(serial="abc"))
        else:
            session.execute(mine.values(device_id=second.id))
    with server.channel(identity) as channel, pytest.raises(grpc.RpcError) as exc:
        desired(channel)
    assert status(exc)[0] == grpc.StatusCode.PERMISSION_DENIED


def test_a_download_resumes_where_it_broke_off(server: FleetServer) -> None:
    """Any offset yields the rest; that of the end yields nothing; one beyond is refused."""
    sha256 = server.approved_model()
    data = server.artefacts.read(sha256, bytes_max=1 << 20)
    identity = server.enrol("wrist-01")
    assign(server, "wrist-01", sha256)
    with server.channel(identity) as channel:
        for offset in (0, 1, len(data) - 1, len(data)):
            assert fetch(channel, sha256, offset) == data[offset:]
        with pytest.raises(grpc.RpcError) as exc:
            fetch(channel, sha256, len(data) + 1)
    assert status(exc)[0] == grpc.StatusCode.OUT_OF_RANGE


def test_a_large_artefact_comes_in_chunks(server: FleetServer) -> None:
    """What comes is what was stored."""
    data = bytes(range(256)) * 4096
    sha256 = server.artefacts.put(data, "parameters")
    identity = server.enrol("wrist-01")
    give_task(server, "wrist-01", sha256)
    with server.channel(identity) as channel:
        assert hashlib.sha256(fetch(channel, sha256)).hexdigest() == sha256


def give_task(server: FleetServer, name: str, sha256: str, *, deadline_ms: int = 1 << 50) -> None:
    """Give a device an open evaluation task over a bundle."""
    with server.store.begin() as session:
        device = session.scalars(select(Device).where(Device.name == name)).one()
        session.add(
            Evaluation(
                id="e1", state="running", bundles=[sha256], split="test", devices=[name],
                created_ms=0, deadline_ms=deadline_ms,
            )
        )  # fmt: skip
        session.flush()
        session.add(
            Task(
                id="t1", owner_id="e1", kind="evaluate", round=0, device_id=device.id,
                state="offered", result={}, created_ms=0, deadline_ms=deadline_ms, changed_ms=0,
            )
        )  # fmt: skip


def test_a_device_has_no_right_to_the_rest(server: FleetServer) -> None:
    """What another device is assigned, or a data set, does not exist for it."""
    mine, foreign = server.approved_model(salt=1), server.approved_model(salt=2)
    secret = server.artefacts.put(b"other people's data", "dataset")
    identity = server.enrol("wrist-01")
    server.enrol("wrist-02")
    assign(server, "wrist-01", mine)
    assign(server, "wrist-02", foreign)
    with server.channel(identity) as channel:
        assert fetch(channel, mine)
        for sha256 in (foreign, secret, "f" * 64):
            with pytest.raises(grpc.RpcError) as exc:
                fetch(channel, sha256)
            assert status(exc)[0] == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as exc:
            fetch(channel, "../../keys/director.pem")
        assert status(exc)[0] == grpc.StatusCode.INVALID_ARGUMENT
        give_task(server, "wrist-01", foreign)
        assert fetch(channel, foreign)


def test_a_closed_task_entitles_to_nothing(server: FleetServer) -> None:
    """The right ends with the task's deadline."""
    sha256 = server.approved_model()
    identity = server.enrol("wrist-01")
    give_task(server, "wrist-01", sha256, deadline_ms=1)
    with server.channel(identity) as channel, pytest.raises(grpc.RpcError) as exc:
        fetch(channel, sha256)
    assert status(exc)[0] == grpc.StatusCode.NOT_FOUND


def test_slow_readers_take_a_slot_each_and_lose_it(server: FleetServer) -> None:
    """Fault 73: a third reader is told when to come again, and two idle ones are dropped."""
    data = b"0123456789abcdef" * (3 << 19)  # more than the buffers between take
    sha256 = server.artefacts.put(data, "parameters")
    identity = server.enrol("wrist-01")
    give_task(server, "wrist-01", sha256)
    with server.channel(identity) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.FetchArtefactRequest(sha256=sha256)
        slow = [stub.FetchArtefact(request, timeout=30) for _ in range(2)]
        for call in slow:
            next(call)
        with pytest.raises(grpc.RpcError) as exc:
            fetch(channel, sha256)
        assert status(exc)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(exc.value.trailing_metadata())["retry-after-ms"] == "1234"
        # The readers wake up after their time: each gets what is under way, then the refusal.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                assert fetch(channel, sha256) == data
                break
            except grpc.RpcError:
                time.sleep(0.1)
        else:
            pytest.fail("the slots of the idle readers were never given back")
        for call in slow:
            with pytest.raises(grpc.RpcError) as exc:
                for _ in call:
                    pass
            assert status(exc)[0] == grpc.StatusCode.DEADLINE_EXCEEDED


def test_metadata_by_name_and_no_path(server: FleetServer) -> None:
    """Devices read the approval repository through one door."""
    with server.channel(server.enrol("wrist-01")) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)

        def get(name: str) -> bytes:
            request = model_pb2.FetchMetadataRequest(name=name)
            return bytes(stub.FetchMetadata(request, timeout=20).data)

        assert get("1.root.json") == server.approval.root_bytes
        with pytest.raises(grpc.RpcError) as exc:
            get("9.root.json")
        assert status(exc)[0] == grpc.StatusCode.NOT_FOUND
        for name in ("../keys/director.pem", "timestamp.pem", ""):
            with pytest.raises(grpc.RpcError) as exc:
                get(name)
            assert status(exc)[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_the_operators_service_is_not_on_the_device_port(server: FleetServer) -> None:
    """A device's certificate opens no operator's door."""
    from shoal.proto import operator_pb2, operator_pb2_grpc

    with server.channel(server.enrol("wrist-01")) as channel, pytest.raises(grpc.RpcError) as exc:
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        stub.GetSummary(operator_pb2.GetSummaryRequest(), timeout=20)
    assert status(exc)[0] == grpc.StatusCode.UNIMPLEMENTED


def test_an_oversize_message_is_refused(server: FleetServer) -> None:
    """Fault 53: the server lives, and the next call goes through."""
    with server.channel(server.enrol("wrist-01")) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as exc:
            stub.FetchMetadata(model_pb2.FetchMetadataRequest(name="x" * (2 << 20)), timeout=20)
        assert status(exc)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        desired(channel)
