"""The operator's socket: every call, its document, and how it refuses."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import select

from shoal.proto import operator_pb2 as pb
from shoal.proto.operator_pb2_grpc import OperatorServiceStub
from shoal.server.api import servers
from shoal.server.api.config import ApiConfig
from shoal.server.api.selector import choose
from shoal.server.errors import ConfigError, InvalidError, PortInUseError
from shoal.server.store.tables import (
    Alert,
    Audit,
    Device,
    DriftState,
    Gap,
    Labels,
    Quarantine,
    RecordRow,
    Stream,
)
from tests.sims.server import FleetServer, make_bundle

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FleetServer]:
    """Return a running server."""
    with FleetServer(tmp_path) as found:
        yield found


@pytest.fixture
def stub(server: FleetServer) -> Iterator[OperatorServiceStub]:
    """Return the operator's side of it."""
    with server.operator() as channel:
        yield OperatorServiceStub(channel)


def shape(value: Any) -> Any:
    """Return a document with each value replaced by its type; a list by its first item's shape."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def check_golden(name: str, document: Any) -> None:
    """Compare a document's shape with the golden file: scripts of users read these."""
    want = json.loads((GOLDEN / f"{name}.json").read_text())
    assert shape(document) == want


STATE = {
    "monitor": {
        "withheld": 3200, "bins_alone": 1, "curtailed": 0, "sketch_stride": 4,
        "labels_missed": 5, "slices_over": 6, "captures_refused": 7,
        "sketch_hindrance": "bins alone: 600 features x 31 edges do not fit a record",
    },
    "warnings": [
        {"code": "monitor.sketch", "severity": "warning", "text": "bins alone: 600 features"},
    ],
}  # fmt: skip


def seed(server: FleetServer) -> str:
    """Enrol a device that runs a model, drifts, and has sent a little of everything."""
    server.enrol("wrist-01")
    sha256 = server.approved_model()
    now_ms = server.clock()
    with server.store.begin() as session:
        device = session.scalars(select(Device)).one()
        device.online, device.seen_ms, device.reported_ms = True, now_ms, now_ms
        device.reported = {"model": sha256, "state": STATE}
        stream = Stream(device_id=device.id, stream=b"s" * 16, first_ms=now_ms)
        session.add(stream)
        session.flush()
        for seq in range(1, 4):
            session.add(
                RecordRow(
                    stream_id=stream.id, seq=seq, kind="labels", device_time_ms=0,
                    received_ms=now_ms, body=b"",
                )
            )  # fmt: skip
            session.add(
                Labels(
                    device_id=device.id, stream_id=stream.id, seq=seq, model_sha256=sha256,
                    number=seq, split=2 if seq > 1 else 0, received_ms=now_ms,
                    labelled=10, correct=10 - seq, confusion=[],
                )
            )  # fmt: skip
        session.add(
            Gap(
                device_id=device.id, stream=b"s" * 16, spool_class="window", first=1, last=9,
                count=5, reason="full", received_ms=now_ms,
            )
        )  # fmt: skip
        session.add(
            Quarantine(device_name="x", topic="t", reason="r", size=1, head=b"", received_ms=now_ms)
        )
        verdict = {"drifting": True, "features": ["ax"], "text": "it drifts"}
        session.add(
            DriftState(
                device_id=device.id, model_sha256=sha256, windows=7, state={}, verdict=verdict,
                changed_ms=now_ms,
            )
        )  # fmt: skip
        session.add(
            Alert(
                device_id=device.id, model_sha256=sha256, kind="local_shift", state="open",
                text="it drifts", evidence={"p": 0.5}, windows=7, opened_ms=now_ms,
            )
        )  # fmt: skip
    return sha256


def until_offered(stub: OperatorServiceStub, rollout_id: str) -> None:
    """Wait for the worker to offer a rollout to its devices: until then no time is known."""
    asked, deadline_s = pb.GetRolloutRequest(rollout_id=rollout_id), time.monotonic() + 30
    while time.monotonic() < deadline_s:
        devices = json.loads(stub.GetRollout(asked).json)["devices"]
        if all(each["offered_ms"] is not None for each in devices):
            return
        time.sleep(0.02)
    pytest.fail("the rollout was offered to nobody")


def test_the_documents_keep_their_shapes(server: FleetServer, stub: OperatorServiceStub) -> None:
    """A field that vanishes or changes its type breaks somebody's script."""
    sha256 = seed(server)
    rollout_id = stub.CreateRollout(pb.CreateRolloutRequest(sha256=sha256)).rollout_id
    until_offered(stub, rollout_id)
    documents = {
        "devices": stub.ListDevices(pb.ListDevicesRequest()),
        "models": stub.ListModels(pb.ListModelsRequest()),
        "rollouts": stub.ListRollouts(pb.ListRolloutsRequest()),
        "rollout": stub.GetRollout(pb.GetRolloutRequest(rollout_id=rollout_id)),
        "summary": stub.GetSummary(pb.GetSummaryRequest()),
        "alerts": stub.ListAlerts(pb.ListAlertsRequest()),
    }
    for name, response in documents.items():
        check_golden(name, json.loads(response.json))


def test_the_fleets_table_says_what_is_known(
    server: FleetServer, stub: OperatorServiceStub
) -> None:
    """Accuracy is by split, with its counts; what is not known is null."""
    sha256 = seed(server)
    server.enrol("wrist-02")
    found = json.loads(stub.ListDevices(pb.ListDevicesRequest()).json)["devices"]
    assert found[0]["model"] == {
        "sha256": sha256, "digest": sha256[:12], "name": "wearable", "version": 1,
    }  # fmt: skip
    assert found[0]["accuracy"] == {
        "train": {"labelled": 10, "correct": 9, "share": 0.9},
        "test": {"labelled": 20, "correct": 15, "share": 0.75},
    }
    assert found[0]["drift"]["windows"] == 7
    assert found[0]["alerts_open"] == 1
    assert found[1]["id"] == "wrist-02"
    assert (found[1]["model"], found[1]["drift"], found[1]["rollout"]) == (None, None, None)
    totals = json.loads(stub.GetSummary(pb.GetSummaryRequest()).json)["totals"]
    assert totals == {"devices": 2, "online": 1, "stored": 3, "lost": 5, "quarantined": 1}
    chosen = stub.ListDevices(pb.ListDevicesRequest(selector="wrist drift:yes"))
    assert [row["id"] for row in json.loads(chosen.json)["devices"]] == ["wrist-01"]


def test_what_a_device_does_not_tell_is_told(
    server: FleetServer, stub: OperatorServiceStub
) -> None:
    """In its row, and beside the verdicts: also of a device that has none for want of windows."""
    sha256 = seed(server)
    (row,) = json.loads(stub.ListDevices(pb.ListDevicesRequest()).json)["devices"]
    (warning,) = row["warnings"]
    assert warning["code"] == "monitor.sketch" and "fewer bins" in warning["fix"]
    assert row["untold"]["withheld"] == 3200
    for asked in ("", sha256):
        found = json.loads(stub.ShowDrift(pb.ShowDriftRequest(model_sha256=asked)).json)
        assert found["devices"] == []
        (silent,) = found["untold"]
        assert (silent["device"], silent["model_sha256"]) == ("wrist-01", sha256)
        assert silent["text"].startswith("3,200 predictions withheld, 1 of 4 predictions sketched")
    other = json.loads(stub.ShowDrift(pb.ShowDriftRequest(model_sha256="f" * 64)).json)
    assert other["untold"] == []
    server.enrol("wrist-02")  # it has said nothing yet
    server.enrolment.revoke("wrist-01")
    assert json.loads(stub.ShowDrift(pb.ShowDriftRequest()).json)["untold"] == []


def test_a_bundle_goes_from_a_file_to_a_rollout(
    server: FleetServer, stub: OperatorServiceStub
) -> None:
    """Upload, register, approve, roll out: each its own call, each on record."""
    data = make_bundle()
    chunks = [pb.UploadArtefactRequest(chunk=data[i : i + 100]) for i in range(0, len(data), 100)]
    uploaded = stub.UploadArtefact(iter(chunks))
    assert uploaded.size == len(data)
    made = stub.RegisterModel(
        pb.RegisterModelRequest(name="wearable", sha256=uploaded.sha256, note="first")
    )
    assert (made.version, made.sha256) == (1, uploaded.sha256)
    server.enrol("wrist-01")
    with pytest.raises(grpc.RpcError) as exc:
        stub.CreateRollout(pb.CreateRolloutRequest(sha256=uploaded.sha256))
    assert exc.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert dict(exc.value.trailing_metadata())["shoal-code"] == "server.rollouts.not_approved"
    approve = pb.ApproveModelRequest(sha256=uploaded.sha256, evidence_json=b'{"accuracy": 0.9}')
    version = stub.ApproveModel(approve).targets_version
    assert stub.ApproveModel(approve).targets_version == version
    rollout = stub.CreateRollout(pb.CreateRolloutRequest(sha256=uploaded.sha256)).rollout_id
    for command, state in (("PAUSE", "paused"), ("RESUME", "running"), ("ABORT", "aborted")):
        request = pb.ControlRolloutRequest(rollout_id=rollout, command=f"ROLLOUT_COMMAND_{command}")
        assert stub.ControlRollout(request).state == state
    verified = stub.VerifyAudit(pb.VerifyAuditRequest())
    assert verified.entries >= 8
    with server.store.begin() as session:
        session.scalars(select(Audit).where(Audit.id == 3)).one().subject = "somebody else"
    with pytest.raises(grpc.RpcError, match="broken at entry 3"):
        stub.VerifyAudit(pb.VerifyAuditRequest())


def test_tokens_and_revocation(server: FleetServer, stub: OperatorServiceStub) -> None:
    """A token is a secret for one device; a revoked device is out."""
    made = stub.CreateToken(pb.CreateTokenRequest(device_id="wrist-01", ttl_s=60))
    assert made.token.startswith("shoal1.wrist-01.")
    assert 0 < made.expires_unix_ms - server.clock() <= 60_000
    server.enrol("wrist-01")
    stub.RevokeDevice(pb.RevokeDeviceRequest(device_id="wrist-01", reason="lost"))
    found = json.loads(stub.ListDevices(pb.ListDevicesRequest(selector="status:revoked")).json)
    assert len(found["devices"]) == 1


def test_jobs_are_started_with_what_was_set(server: FleetServer, stub: OperatorServiceStub) -> None:
    """A field that was left out takes the component's default, not zero."""
    request = pb.StartRoundsRequest(bundle_sha256="a" * 64, rounds=3, learning_rate=0.5)
    assert stub.StartRounds(request).run_id == "rounds-1"
    assert server.rounds.asked == [{"bundle_sha256": "a" * 64, "rounds": 3, "learning_rate": 0.5}]
    stub.StartTraining(pb.StartTrainingRequest(name="m", dataset_sha256="b" * 64, seed=4))
    assert server.training.asked == [{"name": "m", "dataset_sha256": "b" * 64, "seed": 4}]
    evaluate = pb.StartEvaluationRequest(bundle_sha256=["a", "b"], split="test", device_ids=["d"])
    assert stub.StartEvaluation(evaluate).evaluation_id == "evaluation-1"
    assert server.evaluations.asked == [
        {"bundle_sha256": ["a", "b"], "split": "test", "device_ids": ["d"]}
    ]
    server.rounds.answers = [{"state": "done"}]
    assert json.loads(stub.GetRounds(pb.GetRoundsRequest(run_id="x")).json) == {"state": "done"}
    with pytest.raises(grpc.RpcError) as exc:
        stub.GetTraining(pb.GetTrainingRequest(run_id="x"))
    assert exc.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("CreateToken", pb.CreateTokenRequest(device_id="../x"), "INVALID_ARGUMENT"),
        ("RevokeDevice", pb.RevokeDeviceRequest(device_id="nobody"), "NOT_FOUND"),
        ("ListDevices", pb.ListDevicesRequest(selector="colour:red"), "INVALID_ARGUMENT"),
        ("RegisterModel", pb.RegisterModelRequest(name="m", sha256="f" * 64), "NOT_FOUND"),
        ("ApproveModel", pb.ApproveModelRequest(sha256="f" * 64), "NOT_FOUND"),
        (
            "ApproveModel",
            pb.ApproveModelRequest(sha256="f" * 64, evidence_json=b"[NaN"),
            "INVALID_ARGUMENT",
        ),
        ("CreateRollout", pb.CreateRolloutRequest(sha256="f" * 64), "NOT_FOUND"),
        ("GetRollout", pb.GetRolloutRequest(rollout_id="ro-1"), "NOT_FOUND"),
        ("ControlRollout", pb.ControlRolloutRequest(rollout_id="ro-1"), "INVALID_ARGUMENT"),
        ("ShowDrift", pb.ShowDriftRequest(model_sha256="x"), "INVALID_ARGUMENT"),
    ],
)
def test_bad_requests_are_refused(
    stub: OperatorServiceStub, method: str, request_: Any, code: str
) -> None:
    """Each with the status that its contract names, and a stable code."""
    with pytest.raises(grpc.RpcError) as exc:
        getattr(stub, method)(request_)
    assert exc.value.code().name == code
    assert "shoal-code" in dict(exc.value.trailing_metadata())


def test_bad_uploads_are_refused(server: FleetServer, stub: OperatorServiceStub) -> None:
    """An oversize chunk, nothing at all, more than the bound: nothing is stored."""
    for chunks in ([b"x" * (257 << 10)], [b""], [], [b"x" * (256 << 10)] * 129):
        with pytest.raises(grpc.RpcError) as exc:
            stub.UploadArtefact(pb.UploadArtefactRequest(chunk=chunk) for chunk in chunks)
        assert exc.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    left = [path for path in (server.state / "artefacts").rglob("*") if path.is_file()]
    assert left == []


def test_an_unexpected_failure_tells_no_details(
    server: FleetServer, stub: OperatorServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback is for the log: it may hold what the peer must not see."""
    server.drift = None  # type: ignore[assignment]
    with pytest.raises(grpc.RpcError) as exc:
        stub.ShowDrift(pb.ShowDriftRequest())
    assert exc.value.code() == grpc.StatusCode.INTERNAL
    assert exc.value.details() == "the server failed at this call; its log says why"
    assert "TypeError" in caplog.text


def test_the_socket_is_its_owners_alone(server: FleetServer) -> None:
    """Who may open the file is an operator."""
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600


async def run(listener: servers.Listener) -> None:
    """Run a listener that is expected to fail at once."""
    import asyncio

    async with asyncio.timeout(20):
        await listener.run()


def test_a_taken_address_is_refused(server: FleetServer) -> None:
    """Sharing a port with another program would lose half of the calls."""
    import asyncio

    config = ApiConfig(stop_s=0.0)
    key, chain = server.ca.server_identity()
    shown = servers.ServerIdentity(key=key, chain=chain, ca=server.ca.certificate_pem)

    async def second(make: Any) -> None:
        await run(make())

    for make in (
        lambda: servers.devices(server.device_address, shown, [], config=config),
        lambda: servers.enrolment(server.enrolment_address, shown, [], config=config),
        lambda: servers.operator(server.socket, [], config=config),
    ):
        with pytest.raises(PortInUseError, match="taken"):
            asyncio.run(second(make))
    # The one that was there first goes on.
    with server.operator() as channel:
        OperatorServiceStub(channel).GetSummary(pb.GetSummaryRequest(), timeout=20)


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    """Kill -9 leaves the file behind; a file that is no socket is left alone."""
    import asyncio
    import socket

    path = tmp_path / "operator.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()

    async def once() -> None:
        listener = servers.operator(path, [], config=ApiConfig(stop_s=0.0))
        task = asyncio.create_task(listener.run())
        await asyncio.wait_for(listener.started.wait(), 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(once())
    other = tmp_path / "file.sock"
    other.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        asyncio.run(run(servers.operator(other, [], config=ApiConfig(stop_s=0.0))))
    assert other.read_text() == "precious"
    with pytest.raises(ConfigError, match="longer than 107"):
        servers.operator(tmp_path / ("x" * 108), [], config=ApiConfig())


ROW = {
    "id": "wrist-01", "revoked": False, "online": True, "agent": "0.1.0", "alerts_open": 0,
    "site": "north", "hardware": "arm", "warnings": [],
    "model": {"name": "m", "version": 3, "sha256": "abcdef" + "0" * 58},
    "drift": {"drifting": False}, "rollout": {"state": "trial"},
}  # fmt: skip
BARE = {
    **ROW, "id": "pump-1", "online": False, "model": None, "drift": None, "rollout": None,
    "warnings": [{"code": "monitor.sketch"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("selector", "want"),
    [
        ("", "wrist-01 pump-1"),
        ("wrist", "wrist-01"),
        ("status:online", "wrist-01"),
        ("status:offline", "pump-1"),
        ("model:m version:3", "wrist-01"),
        ("model:abcdef", "wrist-01"),
        ("model:abc", ""),
        ("drift:unknown", "pump-1"),
        ("drift:no rollout:trial agent:0.1", "wrist-01"),
        ("alerts:no", "wrist-01 pump-1"),
        ("warnings:yes", "pump-1"),
        ("warnings:no", "wrist-01"),
        ("site:north hardware:arm", "wrist-01 pump-1"),
        ("site:south", ""),
        ("wrist status:offline", ""),
    ],
)
def test_selectors(selector: str, want: str) -> None:
    """Every term must hold."""
    assert [row["id"] for row in choose([ROW, BARE], selector)] == want.split()


def test_selectors_that_mean_nothing_are_refused() -> None:
    """A typing error must not select the whole fleet."""
    with pytest.raises(InvalidError, match="unknown key 'stauts'"):
        choose([ROW], "stauts:online")
    with pytest.raises(InvalidError, match="exceeds"):
        choose([ROW], "x" * 1001)


# --- alerts and history -----------------------------------------------------------------------


def test_an_alert_is_acknowledged_silenced_and_resolved(
    server: FleetServer, stub: OperatorServiceStub
) -> None:
    """Each step is in the audit log with who, what and why; what is over is not listed."""
    sha256 = seed(server)

    def listed(**wanted: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            stub.ListAlerts(pb.ListAlertsRequest(**wanted)).json
        )["alerts"]
        return found

    (alert,) = listed()
    assert (alert["kind"], alert["state"], alert["subject"]) == ("local_shift", "open", "wrist-01")
    number = alert["id"]
    made = stub.ControlAlert(
        pb.ControlAlertRequest(alert_id=number, command="ALERT_COMMAND_ACKNOWLEDGE", note="mine")
    )
    assert (made.state, made.silenced_until_unix_ms) == ("acknowledged", 0)
    before_ms = server.clock()
    made = stub.ControlAlert(
        pb.ControlAlertRequest(alert_id=number, command="ALERT_COMMAND_SILENCE", silence_s=3600)
    )
    assert made.state == "silenced"
    assert made.silenced_until_unix_ms >= before_ms + 3_600_000
    devices = json.loads(stub.ListDevices(pb.ListDevicesRequest()).json)["devices"]
    assert devices[0]["alerts_open"] == 0 and len(listed()) == 1
    stub.ControlAlert(pb.ControlAlertRequest(alert_id=number, command="ALERT_COMMAND_RESOLVE"))
    assert listed() == [] and listed(model_sha256="f" * 64, all=True) == []
    (over,) = listed(all=True, model_sha256=sha256)
    assert over == listed(alert_id=number)[0]
    assert (over["state"], over["actor"]) == ("resolved", "operator")
    with server.store.read() as session:
        entries = session.scalars(select(Audit).where(Audit.action.like("alert.%"))).all()
        assert [entry.action for entry in entries] == [
            "alert.acknowledged", "alert.silenced", "alert.resolved",
        ]  # fmt: skip
        assert all(entry.actor == "operator" for entry in entries)
        assert entries[0].detail["note"] == "mine" and entries[1].detail["until_ms"]
    assert stub.VerifyAudit(pb.VerifyAuditRequest()).entries >= 3


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ({"alert_id": 1}, grpc.StatusCode.INVALID_ARGUMENT, "not acknowledge, silence or resolve"),
        ({"alert_id": 99, "command": 1}, grpc.StatusCode.NOT_FOUND, "no alert 99"),
        ({"alert_id": 2**64 - 1, "command": 1}, grpc.StatusCode.NOT_FOUND, "no alert"),
        ({"alert_id": 1, "command": 2}, grpc.StatusCode.INVALID_ARGUMENT, "lasts 1 to"),
        ({"alert_id": 1, "command": 2, "silence_s": 2**32 - 1},
         grpc.StatusCode.INVALID_ARGUMENT, "lasts 1 to"),
        ({"alert_id": 1, "command": 1, "note": "x" * 501},
         grpc.StatusCode.INVALID_ARGUMENT, "note exceeds"),
    ],
)  # fmt: skip
def test_a_command_that_makes_no_sense_changes_no_alert(
    server: FleetServer,
    stub: OperatorServiceStub,
    asked: dict[str, Any],
    code: grpc.StatusCode,
    said: str,
) -> None:
    """It is refused with a reason, and nothing is in the log."""
    seed(server)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ControlAlert(pb.ControlAlertRequest(**asked))
    assert caught.value.code() is code and said in caught.value.details()
    with server.store.read() as session:
        assert session.scalars(select(Alert.state)).all() == ["open"]
        assert not session.scalars(select(Audit).where(Audit.action.like("alert.%"))).all()


def test_what_is_over_cannot_be_acknowledged(
    server: FleetServer, stub: OperatorServiceStub
) -> None:
    """The table of states refuses it, and says what the state is."""
    seed(server)
    stub.ControlAlert(pb.ControlAlertRequest(alert_id=1, command="ALERT_COMMAND_RESOLVE"))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ControlAlert(pb.ControlAlertRequest(alert_id=1, command="ALERT_COMMAND_ACKNOWLEDGE"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "is resolved does not take" in caught.value.details()


def with_profile(server: FleetServer) -> str:
    """Register a model and give it the smallest profile there is."""
    from shoal.server.drift.profile import build

    x = np.random.default_rng(1).normal(size=(40, 1, 4)).astype(np.float32)
    profile = build(
        x, np.linspace(0.5, 1, 40, dtype=np.float32), np.ones(40, bool), np.zeros(40, int),
        np.arange(40) % 2 == 1, channels=("ax",),
    )  # fmt: skip
    return server.profiled_model(profile)


def test_history_is_asked_for_by_group(server: FleetServer, stub: OperatorServiceStub) -> None:
    """The range, the grouping and the reference reach the history; its rows come back."""
    sha256 = with_profile(server)
    server.table = [{"group": "north", "feature": "ax", "hellinger": 0.1}]
    found = json.loads(
        stub.ShowDrift(
            pb.ShowDriftRequest(
                model_sha256=sha256, group_by="DRIFT_GROUPING_SITE", every="DRIFT_STEP_DAY",
                since_unix_ms=5, until_unix_ms=9,
            )
        ).json
    )  # fmt: skip
    assert server.tables_asked == [(sha256, "site", 5, 9, "day")]
    assert found["rows"] == server.table
    assert (found["group_by"], found["every"], found["reference_sha256"]) == (
        "site", "day", sha256,
    )  # fmt: skip
    stub.ShowDrift(pb.ShowDriftRequest(model_sha256=sha256, group_by="DRIFT_GROUPING_FLEET"))
    assert server.tables_asked[-1][1:3] == ("fleet", 0) and server.tables_asked[-1][4] == ""


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"since_unix_ms": 9, "until_unix_ms": 9}, grpc.StatusCode.INVALID_ARGUMENT, "is empty"),
        ({"since_unix_ms": -1}, grpc.StatusCode.INVALID_ARGUMENT, "is empty"),
        ({"model_sha256": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "model"),
        ({"model_sha256": "f" * 64}, grpc.StatusCode.NOT_FOUND, ""),
        ({"reference_sha256": "f" * 64}, grpc.StatusCode.NOT_FOUND, ""),
        ({"group_by": 77}, grpc.StatusCode.INVALID_ARGUMENT, "no value 77"),
        ({"every": 77}, grpc.StatusCode.INVALID_ARGUMENT, "no value 77"),
    ],
)
def test_a_history_that_makes_no_sense_is_refused(
    server: FleetServer,
    stub: OperatorServiceStub,
    change: dict[str, Any],
    code: grpc.StatusCode,
    said: str,
) -> None:
    """Before the history is asked."""
    asked = {"model_sha256": with_profile(server), "group_by": 2, **change}
    with pytest.raises(grpc.RpcError) as caught:
        stub.ShowDrift(pb.ShowDriftRequest(**asked))
    assert caught.value.code() is code and said in caught.value.details()
    assert server.tables_asked == []
