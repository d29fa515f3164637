"""The command line against a real server's socket: data, exit codes, and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, select

from shoal.proto.settings import build
from shoal.server.cli import COMMANDS, main, times
from shoal.server.drift.profile import build as build_profile
from shoal.server.learning.dataset import npz
from shoal.server.store.tables import (
    Alert,
    Artefact,
    AssignmentRow,
    Device,
    DriftState,
    Rollout,
)
from tests.sims.server import FleetServer, make_bundle

Shoal = Callable[..., Result]
PROFILE = build_profile(
    np.random.default_rng(1).normal(size=(40, 1, 4)).astype(np.float32),
    np.linspace(0.5, 1, 40, dtype=np.float32), np.ones(40, bool), np.zeros(40, int),
    np.arange(40) % 2 == 1, channels=("ax",),
)  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FleetServer]:
    """Return a running server."""
    with FleetServer(tmp_path) as found:
        yield found


@pytest.fixture
def shoal(server: FleetServer) -> Shoal:
    """Return the command, bound to that server."""

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, ["--state", str(server.state), *args])

    return run


def test_help_loads_nothing_heavy() -> None:
    """Help is asked for by people who wait for it."""
    code = (
        "import sys\n"
        "from shoal.server.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'sqlalchemy', 'numpy', 'rich', 'cryptography', 'google.protobuf'}\n"
        "sys.exit(9 if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_every_command_has_help(name: str) -> None:
    """A group that cannot be loaded would be found by a user."""
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_a_model_from_a_file_to_all_devices(
    server: FleetServer, shoal: Shoal, tmp_path: Path
) -> None:
    """The operator's whole way, by the commands that the commands themselves name."""
    path = tmp_path / "wearable.shoal"
    path.write_bytes(make_bundle())
    added = shoal("models", "add", str(path), "--note", "first")
    assert added.exit_code == 0, added.stderr
    sha256 = added.stdout.strip()
    assert f"shoal models approve {sha256[:12]}" in added.stderr
    evidence = tmp_path / "evidence.json"
    evidence.write_text('{"accuracy": 0.9}')
    server.enrol("wrist-01")
    refused = shoal("rollouts", "create", "wearable")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "error: model wearable version 1 is not approved" in refused.stderr
    assert "hint: look at its evidence" in refused.stderr
    approved = shoal("models", "approve", "wearable:1", "--evidence", str(evidence))
    assert approved.stdout.strip() == sha256
    created = shoal("rollouts", "create", sha256[:8], "--bake-windows", "0")
    rollout = created.stdout.strip()
    assert rollout.startswith("ro-")
    listed = shoal("rollouts", "list", "-o", "json")
    assert [row["id"] for row in json.loads(listed.stdout)["rollouts"]] == [rollout]
    confirm(server, rollout)
    watched = shoal("rollouts", "status", rollout, "--watch", "--timeout", "30")
    assert watched.exit_code == 0, watched.stderr
    assert "completed" in watched.stdout
    assert "gate: PASS" in watched.stdout
    models = shoal("models", "list", "-o", "name")
    assert models.stdout == "wearable:1\n"


def confirm(server: FleetServer, rollout: str, state: str = "confirmed") -> None:
    """Let each device say how its update ended, once it is assigned."""
    import time

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with server.store.begin() as session:
            rows = session.scalars(
                select(AssignmentRow).where(AssignmentRow.rollout_id == rollout)
            ).all()
            for row in rows:
                body = {
                    "rollout": rollout, "counter": row.counter, "model": row.model_sha256,
                    "state": state, "reason": "no good" if state == "failed" else "",
                }  # fmt: skip
                server.rollouts.on_update(session, session.get_one(Device, row.device_id), body)
            if rows:
                return
        time.sleep(0.02)
    pytest.fail("nothing was assigned")


def test_a_failed_gate_exits_4(server: FleetServer, shoal: Shoal) -> None:
    """A deployment script stops there."""
    server.enrol("wrist-01")
    sha256 = server.approved_model()
    rollout = shoal("rollouts", "create", sha256).stdout.strip()
    confirm(server, rollout, "failed")
    result = shoal("rollouts", "status", rollout, "--watch", "--timeout", "30")
    assert result.exit_code == 4
    assert "failed its gate: 1 failed and 0 fell silent of 1 devices" in result.stderr
    assert result.stderr.endswith(
        "hint: a device goes back to the model that it had; one that had none keeps this one if it "
        "confirmed it\n"
    )
    assert "no good" in result.stdout


def test_waiting_too_long_exits_5(server: FleetServer, shoal: Shoal) -> None:
    """The rollout goes on; only the command gives up."""
    server.enrol("wrist-01")
    rollout = shoal("rollouts", "create", server.approved_model()).stdout.strip()
    result = shoal("rollouts", "status", rollout, "--watch", "--timeout", "0.1")
    assert result.exit_code == 5
    with server.store.read() as session:
        assert session.get_one(Rollout, rollout).state == "running"
    for command, state in (("pause", "paused"), ("resume", "running"), ("abort", "aborted")):
        assert shoal("rollouts", command, rollout).stdout.strip() == state
    assert shoal("rollouts", "status", rollout).exit_code == 1
    assert "does not take the event" in shoal("rollouts", "pause", rollout).stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["rollouts", "status", "ro-1"], 3, "there is no rollout"),
        (["models", "approve", "nothing"], 3, "no model is meant by"),
        (["devices", "revoke", "nobody", "--reason", "x", "--yes"], 3, "there is no device"),
        (["train", "status", "x"], 3, "there is no training"),
        (["devices", "revoke", "nobody", "--reason", "x"], 2, "no terminal to ask on"),
        (["devices", "list", "--selector", "colour:red"], 1, "unknown key 'colour'"),
        (["devices", "token", "Not A Name"], 1, "not a legal name"),
        (["devices", "explode"], 2, "No such command"),
        (["models", "add", "/nowhere"], 2, "does not exist"),
        (["rollouts", "create", "m", "--wave", "-1"], 2, "not in the range"),
    ],
)
def test_refusals(shoal: Shoal, args: list[str], code: int, said: str) -> None:
    """Each with its exit code, its words on stderr, and no data."""
    result = shoal(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


def test_no_server_says_what_to_do(tmp_path: Path) -> None:
    """The most common mistake has the best message."""
    result = CliRunner().invoke(main, ["devices", "list", "--state", str(tmp_path)])
    assert result.exit_code == 1
    assert f"error: no server answers at {tmp_path / 'operator.sock'}" in result.stderr
    assert "hint: start one with: shoal server run" in result.stderr


def test_devices(server: FleetServer, shoal: Shoal) -> None:
    """A token is data; how to use it is not."""
    made = shoal("devices", "token", "wrist-01", "--ttl", "60")
    assert made.stdout.startswith("shoal1.wrist-01.")
    assert made.stdout.count("\n") == 1
    assert made.stderr.endswith("  shoal-agent enroll --config agent.toml --token TOKEN\n")
    assert shoal("devices", "list").stdout == ""
    server.enrol("wrist-01")
    table = shoal("devices", "list").stdout.splitlines()
    assert table[0].split()[:2] == ["ID", "STATUS"]
    assert table[1].split()[:3] == ["wrist-01", "offline", "–"]
    assert shoal("devices", "list", "-o", "name").stdout == "wrist-01\n"
    revoked = shoal("devices", "revoke", "wrist-01", "--reason", "lost", "--yes")
    assert revoked.exit_code == 0
    found = json.loads(shoal("devices", "list", "-o", "json").stdout)
    assert found["devices"][0]["revoked"] is True


def say(server: FleetServer, name: str, **state: Any) -> None:
    """Let a device report a state, as ingest keeps it."""
    with server.store.begin() as session:
        device = session.scalars(select(Device).where(Device.name == name)).one()
        device.reported, device.reported_ms = {"model": "", "agent": "0.1.0", "state": state}, 0
        device.site = state.get("site", "")


SKETCH = {
    "code": "monitor.sketch", "severity": "warning",
    "text": "bins alone: 600 features x 31 edges do not fit a record",
}  # fmt: skip
REFUSED = {"code": "spool.refused", "severity": "error", "text": "the spool has no room"}
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n\u202e" + "x" * 5000


def test_devices_say_what_is_wrong_with_them(server: FleetServer, shoal: Shoal) -> None:
    """A mark with the count in the list, all of it for one device; what to do about it as well."""
    for name in ("pump-07", "pump-08"):
        server.enrol(name)
    assert "!" not in shoal("devices", "list").output
    say(server, "pump-07", warnings=[SKETCH, REFUSED], monitor={
        "withheld": 3200, "sketch_stride": 4, "bins_alone": 1, "labels_missed": 5,
        "sketch_hindrance": SKETCH["text"],
    })  # fmt: skip
    listed = shoal("devices", "list")
    assert listed.stdout.splitlines()[1].split()[:3] == ["pump-07", "offline", "!2"]
    assert listed.stdout.splitlines()[2].split()[:3] == ["pump-08", "offline", "–"]
    assert "shoal devices show pump-07" in listed.stderr
    assert shoal("devices", "list", "-l", "warnings:yes", "-o", "name").stdout == "pump-07\n"
    shown = shoal("devices", "show", "pump-07")
    assert max(map(len, shown.stdout.splitlines())) <= 100
    told = " ".join(shown.stdout.split())
    assert told.startswith("pump-07: offline seen never model – agent – site – hardware –")
    for text in (
        "not told 3,200 predictions withheld, 1 of 4 predictions sketched, 1 window as bins alone "
        "(bins alone: 600 features x 31 edges do not fit a record)",
        "missed 5 labels not joined",
        "warning monitor.sketch: bins alone: 600 features",
        "fix make the profile with fewer bins",
        "error spool.refused: the spool has no room",
    ):
        assert text in told
    row = json.loads(shoal("devices", "show", "pump-07", "-o", "json").stdout)
    assert row["id"] == "pump-07" and [each["code"] for each in row["warnings"]] == [
        "monitor.sketch", "spool.refused",
    ]  # fmt: skip
    for name in ("pump-0", "status:online", "nobody"):
        assert shoal("devices", "show", name).exit_code == 3


def test_a_device_without_a_window_is_not_called_whole(server: FleetServer, shoal: Shoal) -> None:
    """Whoever waits for its first window would take it for one that came."""
    sha256 = server.approved_model()
    server.enrol("pump-08")

    def runs(model: str) -> None:
        with server.store.begin() as session:
            device = session.scalars(select(Device)).one()
            device.reported_ms = 0
            device.reported = {"model": model, "state": {"monitor": {"withheld": 0}}}

    def counted(windows: int) -> None:
        with server.store.begin() as session:
            session.execute(delete(DriftState))
            session.add(
                DriftState(
                    device_id=session.scalars(select(Device.id)).one(), model_sha256=sha256,
                    windows=windows, state={}, verdict={}, changed_ms=0,
                )
            )  # fmt: skip

    def told() -> str:
        lines = shoal("devices", "show", "pump-08").stdout.splitlines()
        return next(line for line in lines if "not told" in line).split(maxsplit=2)[2]

    assert told() == "–"
    runs("")
    assert told() == "nothing: it runs no model and sends no window"
    runs(sha256)
    assert told() == "nothing yet: no window of its model has been counted"
    counted(0)
    assert told() == "nothing yet: no window of its model has been counted"
    counted(1)
    assert told() == "nothing: all windows are whole"


def test_what_devices_say_steers_no_terminal(server: FleetServer, shoal: Shoal) -> None:
    """Text of a device is one bounded line of printable characters, wherever it is shown."""
    server.enrol("pump-07")
    entry = {"code": HOSTILE, "severity": HOSTILE, "text": HOSTILE}
    sha256 = server.profiled_model(PROFILE)
    server.table = [drift_row(HOSTILE[:40])]
    server.models_table = [{**drift_row(HOSTILE[:40]), "refused": 2}]
    for output in ("table", "name"):
        grouped = shoal(
            "drift", "show", "--model", sha256, "--group-by", "site", "-o", output
        )  # fmt: skip
        lines = grouped.output.splitlines()
        assert len(lines) == (1 if output == "name" else 3)
        assert all(line.isprintable() for line in lines)
    say(server, "pump-07", site=HOSTILE[:40], warnings=[entry] * 20, monitor={
        "withheld": 1, "sketch_hindrance": HOSTILE,
    })  # fmt: skip
    asked = (["devices", "list"], ["devices", "show", "pump-07"], ["drift", "show"], ["doctor"])
    for args in asked:
        found = shoal(*args)
        assert all(line.isprintable() for line in found.output.splitlines()), args
        assert len(found.output) < 6000 and max(map(len, found.output.splitlines())) < 500
    assert "owned" in shoal("devices", "show", "pump-07").stdout


def test_the_list_of_devices_fits(server: FleetServer, shoal: Shoal) -> None:
    """A hundred columns, with everything wrong at once."""
    sha256 = server.approved_model()
    name = "wrist-010"
    server.enrol(name)
    say(server, name, warnings=[SKETCH] * 10)
    verdict = {"drifting": True, "features": ["accel_x", "gyro_z", "confidence"], "text": "t"}
    with server.store.begin() as session:
        device = session.scalars(select(Device)).one()
        device.seen_ms, device.reported = 1, {**device.reported, "model": sha256}
        session.add(
            DriftState(
                device_id=device.id, model_sha256=sha256, windows=7, state={}, verdict=verdict,
                changed_ms=0,
            )
        )  # fmt: skip
    rollout = shoal("rollouts", "create", sha256).stdout.strip()
    confirm(server, rollout, "downloading")
    table = shoal("devices", "list").stdout.splitlines()
    assert table[1].split() == [
        name, "offline", "!10", "wearable:1", "–", "accel_x,", "+2", "downloading", "0",
        "1970-01-01", "00:00",
    ]  # fmt: skip
    assert max(map(len, table)) <= 100


def test_drift(server: FleetServer, shoal: Shoal) -> None:
    """``-o name`` is for the next command of a pipe."""
    server.drift = {
        "devices": [
            {"device": "w-1", "drifting": True, "features": ["ax"], "windows": 6, "text": "ax up"},
            {"device": "w-2", "drifting": False, "features": [], "windows": 6, "text": ""},
        ]
    }
    assert shoal("drift", "show", "-o", "name").stdout == "w-1\n"
    assert "ax up" in shoal("drift", "show").stdout
    assert json.loads(shoal("drift", "show", "-o", "json").stdout)["model_sha256"] == ""
    assert shoal("drift", "show", "--model", "nothing").exit_code == 3


def test_drift_says_who_does_not_tell_all(server: FleetServer, shoal: Shoal) -> None:
    """Silence of a device that withholds is no health; it need not have a verdict at all."""
    server.enrol("pump-07")
    server.enrol("pump-08")
    assert shoal("drift", "show").stderr == "no device has sent a telemetry window yet\n"
    say(server, "pump-07", monitor={"withheld": 3200, "sketch_hindrance": "windows are withheld"})
    say(server, "pump-08", monitor={"withheld": 0, "sketch_stride": 1, "sketch_hindrance": ""})
    shown = shoal("drift", "show")
    assert shown.stderr.splitlines()[1:] == [
        "pump-07 does not tell all: 3,200 predictions withheld (windows are withheld)"
    ]
    (told,) = json.loads(shoal("drift", "show", "-o", "json").stdout)["untold"]
    assert (told["device"], told["withheld"]) == ("pump-07", 3200)


def test_training_and_rounds(server: FleetServer, shoal: Shoal, tmp_path: Path) -> None:
    """Settings arrive, progress goes to stderr, and what was made to stdout."""
    dataset = tmp_path / "data.npz"
    dataset.write_bytes(npz(arrays()))
    base = {"model_sha256": "", "progress": {"epoch": 1, "loss": 0.5}, "reason": ""}
    made = server.artefacts.put(make_bundle(), "bundle")
    server.models.register("wearable", made)
    server.training.answers = [
        {"state": "running", **base},
        {"state": "done", **base, "model_sha256": made},
    ]
    started = shoal("train", "start", "wearable", str(dataset), "--seed", "3", "--watch")
    assert started.exit_code == 0, started.stderr
    assert started.stdout == "training-1\n"
    assert "running: epoch 1, loss 0.5" in started.stderr
    assert started.stderr.endswith(
        "made wearable:1; no device takes it before:\n  shoal models approve wearable:1\n"
    )
    assert server.training.asked[0]["seed"] == 3
    sent = server.artefacts.size(server.training.asked[0]["dataset_sha256"])
    assert sent == dataset.stat().st_size
    assert shoal("train", "status", "training-1", "-o", "name").stdout == made + "\n"
    sha256 = server.approved_model(salt=1)
    run = {"state": "failed", "round": 2, "rounds": 5, "history": [{"loss_last": 0.25}]}
    server.rounds.answers = [{**run, "candidate_sha256": "", "reason": "no device came"}]
    begun = shoal("rounds", "start", "wearable", "--rounds", "5", "--learning-rate", "0.1")
    assert begun.stdout == "rounds-1\n"
    assert server.rounds.asked[0]["bundle_sha256"] == sha256
    assert server.rounds.asked[0]["rounds"] == 5
    shown = shoal("rounds", "status", "rounds-1")
    assert shown.exit_code == 1
    assert shown.stdout == "failed: round 2 of 5, loss 0.2500\n"
    assert "no device came" in shown.stderr
    assert shoal("rounds", "status", "rounds-1", "-o", "name").exit_code == 3
    candidate = server.artefacts.put(make_bundle(salt=2), "bundle")
    server.models.register("wearable", candidate)
    server.rounds.answers = [{**run, "state": "done", "candidate_sha256": candidate}]
    watched = shoal("rounds", "start", "wearable:2", "--rounds", "5", "--watch")
    assert watched.exit_code == 0, watched.stderr
    assert watched.stderr.endswith("  shoal models approve wearable:3\n")


def arrays(**changed: Any) -> dict[str, Any]:
    """Return the arrays of a data set, some of them others."""
    x__nct = np.random.default_rng(0).normal(size=(40, 2, 4)).astype(np.float32)
    return {
        "x__nct": x__nct, "y__n": np.arange(40) % 2, "group__n": np.zeros(40, np.int64),
        "split__n": (np.arange(40) % 4 == 0).astype(np.uint8),
        "channels": np.array(json.dumps(["ax", "ay"])),
        "classes": np.array(json.dumps(["rest", "walk"])), **changed,
    }  # fmt: skip


def test_a_wrong_data_set_is_refused_before_it_is_sent(
    server: FleetServer, shoal: Shoal, tmp_path: Path
) -> None:
    """With what to do, and no run is left that would fail later and unseen."""
    path = tmp_path / "train.npz"
    path.write_bytes(npz(arrays(kinds=np.array("float, category"))))
    refused = shoal("train", "start", "wearable", str(path))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == (
        "error: kinds is not the JSON of a list of kinds\n"
        'hint: e.g. np.array(json.dumps(["float", "category"]))\n'
    )
    path.write_bytes(b"no archive")
    assert "error: the data set cannot be read" in shoal("train", "start", "m", str(path)).stderr
    assert server.training.asked == []
    with server.store.read() as session:
        assert session.scalars(select(Artefact)).all() == []


def test_audit(server: FleetServer, shoal: Shoal) -> None:
    """The chain is whole, or the command says where it is not."""
    server.approved_model()
    assert "2 entries, unbroken" in shoal("audit", "verify").stdout
    assert json.loads(shoal("audit", "verify", "-o", "json").stdout)["entries"] == 2


def test_doctor_finds_what_is_wrong(server: FleetServer, shoal: Shoal) -> None:
    """Each finding names its fix; a failed one makes the command fail."""
    found = {
        (each["check"], each["level"])
        for each in json.loads(shoal("doctor", "-o", "json").stdout)["findings"]
    }
    assert {("folder", "ok"), ("certificates", "ok"), ("approval", "ok")} <= found
    assert {("database", "ok"), ("server", "ok"), ("keys", "warn")} <= found
    (server.state / "server.toml").write_text('[broker]\nurl = "mqtt://127.0.0.1:1"\n')
    (server.state / "keys" / "director.pem").chmod(0o644)
    (server.state / "metadata" / "timestamp.json").write_text('{"signed": {"expires": "x"}}')
    server.state.chmod(0o755)
    result = shoal("doctor")
    assert result.exit_code == 1
    assert f"fix: chmod 700 {server.state}" in result.stdout
    assert f"fix: chmod 600 {server.state / 'keys' / 'director.pem'}" in result.stdout
    assert "fail  approval:" in result.stdout
    assert "nothing listens at 127.0.0.1:1" in result.stdout
    assert "checks failed" in result.stderr


def test_doctor_tells_what_devices_warn_of(server: FleetServer, shoal: Shoal) -> None:
    """By code, with some of their names and the fix; a device fails nobody's script."""

    def found() -> list[tuple[str, str, str]]:
        listed = json.loads(shoal("doctor", "-o", "json").stdout)["findings"]
        return [
            (each["level"], each["text"], each["fix"])
            for each in listed
            if each["check"] == "devices"
        ]

    assert found() == [("ok", "none warns of itself", "")]
    names = [f"pump-{number}" for number in range(1, 8)]
    for name in names:
        server.enrol(name)
        say(server, name, warnings=[SKETCH])
    new = {"code": "new.code", "severity": "error", "text": "of a newer agent"}
    say(server, "pump-3", warnings=[SKETCH, new])
    server.enrolment.revoke("pump-7")
    sketch, other = found()
    assert sketch[:2] == (
        "warn",
        "monitor.sketch on pump-1, pump-2, pump-3, pump-4, pump-5 and 1 more: "
        "bins alone: 600 features x 31 edges do not fit a record",
    )
    assert "fewer bins" in sketch[2]
    assert other == (
        "warn", "new.code on pump-3: of a newer agent", "shoal devices show pump-3"
    )  # fmt: skip
    assert "fail" not in {level for level, _, _ in found()}


def test_doctor_tells_of_open_alerts(server: FleetServer, shoal: Shoal) -> None:
    """They are not what a device warns of itself, and no failure of the server."""

    def found() -> list[tuple[str, str]]:
        listed = json.loads(shoal("doctor", "-o", "json").stdout)["findings"]
        return [(each["level"], each["text"]) for each in listed if each["check"] == "alerts"]

    assert found() == [("ok", "none is open")]
    kinds = ("local_shift", "sensor_fault", "local_shift")
    with server.store.begin() as session:
        for number, kind in enumerate(kinds):
            session.add(
                Alert(
                    scope="device", subject=f"w-{number}", model_sha256="a" * 64, kind=kind,
                    state="open", text="drifts", evidence={}, opened_ms=server.clock(),
                )
            )  # fmt: skip
    assert found() == [("warn", "2 local_shift, 1 sensor_fault open")]
    for alert in ("1", "2", "3"):
        assert shoal("alerts", "ack", alert).exit_code == 0
    assert found() == [("ok", "none is open; 3 acknowledged or silenced")]


def test_doctor_finds_a_damaged_database(tmp_path: Path) -> None:
    """A corrupt page is told before it is read."""
    (tmp_path / "fleet.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    tmp_path.chmod(0o700)
    result = CliRunner().invoke(main, ["--state", str(tmp_path), "doctor"])
    assert result.exit_code == 1
    assert "fail  database:" in result.stdout
    assert "fix: stop the server and restore the last backup" in result.stdout


def test_init_makes_a_configuration_that_the_server_takes(tmp_path: Path) -> None:
    """What init writes, run reads; a second init changes nothing."""
    import tomllib

    from shoal.server.config import ServerConfig

    state = tmp_path / "fleet"
    made = CliRunner().invoke(
        main,
        [
            "--state", str(state), "server", "init", "--fleet", "home", "--advertise", "10.0.0.2",
            "--console-port", "8470",
        ],
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert made.stdout.strip() == str(state / "server.toml")
    assert state.stat().st_mode & 0o777 == 0o700
    raw = tomllib.loads((state / "server.toml").read_text())
    config = build(raw, ServerConfig, where="server.toml", base=state)
    assert (config.fleet, config.state_dir) == ("home", state)
    assert config.listen.advertise == "10.0.0.2"
    assert (config.console.host, config.console.port) == ("127.0.0.1", 8470)
    again = CliRunner().invoke(main, ["--state", str(state), "server", "init"])
    assert again.exit_code == 1
    assert "nothing was changed" in again.stderr
    bad = CliRunner().invoke(
        main, ["--state", str(tmp_path / "x"), "server", "init", "--broker", 'mqtt://"\n']
    )
    assert bad.exit_code == 1


def test_run_without_a_configuration_says_how_to_make_one(tmp_path: Path) -> None:
    """Nothing is started by accident."""
    result = CliRunner().invoke(main, ["--state", str(tmp_path), "server", "run"])
    assert result.exit_code == 1
    assert "hint: make one: shoal server init" in result.stderr


def test_drift_says_what_became_of_retraining(server: FleetServer, shoal: Shoal) -> None:
    """A proposal is for a person to see, and no data."""
    row = {"device": "w-1", "drifting": True, "kind": "accuracy_loss", "windows": 6, "text": "t"}
    server.drift = {
        "devices": [row],
        "retraining": [
            {"model_sha256": "a" * 64, "action": "propose", "trigger": "accuracy_loss",
             "reasons": ["labels tell of lost accuracy: the fleet"]},
            {"model_sha256": server.approved_model(), "action": "nothing",
             "trigger": "accuracy_loss", "reasons": ["one", "two"]},
        ],
    }  # fmt: skip
    shown = shoal("drift", "show")
    assert "accuracy_loss" in shown.stdout
    assert "retraining of aaaaaaaaaaaa proposed: labels tell" in shown.stderr
    assert "retraining of wearable:1 held back: one; two" in shown.stderr


def drift_row(group: str, **more: Any) -> dict[str, Any]:
    """Return a row of the history as the server makes them, as far as the command reads it."""
    return {
        "group": group, "since_ms": 0, "until_ms": 1, "bucket_ms": 0, "feature": "ax", "windows": 9,
        "n": 900, "nulls": 1, "p50": [0.5, 0.4, 0.6], "psi": 0.1, "hellinger": 0.1,
        "direction": -0.5, **more,
    }  # fmt: skip


def test_drift_by_group(server: FleetServer, shoal: Shoal) -> None:
    """A range and a grouping reach the server; the most unlike group comes first by name."""
    sha256 = server.profiled_model(PROFILE)
    server.table = [
        drift_row(group, hellinger=far, wasserstein={"normalised": far})
        for group, far in (("north", 0.01), ("south", 0.4))
    ]
    server.models_table = [
        {"group": "north", "since_ms": 0, "bucket_ms": 0,
         "accuracy": {"estimate": 0.81, "low": 0.78, "high": 0.84, "labelled": 700},
         "expected_accuracy": {"estimate": 0.83, "reference": 0.9},
         "calibration_error": {"estimate": 0.05, "low": 0.01, "high": 0.12},
         "mmd": {"squared": 0.0003, "p_value": 1e-7, "groups_p_value": 0.87}},
        {"group": "south", "since_ms": 0, "bucket_ms": 0, "accuracy": None, "refused": 1200},
    ]  # fmt: skip
    table = shoal("drift", "show", "--model", sha256, "--group-by", "site", "--since", "7d")
    assert table.exit_code == 0, table.stderr
    assert table.stdout.splitlines()[1].split()[:4] == ["north", "ax", "9", "900"]
    assert "-0.500" in table.stdout and "0.5" in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 100
    assert "north: accuracy 81.0% (78.0% to 84.0% of 700 labels)" in table.stderr
    assert "expected without labels 83.0% (reference 90.0%)" in table.stderr
    assert "calibration error 0.010 to 0.120" in table.stderr
    assert "MMD² 0.0003 (p 0.87 among the training data's groups)" in table.stderr
    assert table.stderr.splitlines()[1:] == [
        "south: 1,200 sketches refused (damaged, or binned for another model)"
    ]
    named = shoal("drift", "show", "--model", sha256, "--group-by", "site", "-o", "name")
    assert named.stdout == "south\nnorth\n"
    as_json = shoal("drift", "show", "--model", sha256, "--group-by", "day", "-o", "json")
    assert json.loads(as_json.stdout)["rows"] == server.table
    asked = [(group, until - since, every) for _, group, since, until, every in server.tables_asked]
    assert asked == [
        ("site", 604_800_000, ""), ("site", 604_800_000, ""), ("fleet", 604_800_000, "day"),
    ]  # fmt: skip
    dated = ("--since", "2026-03-01", "--until", "2026-03-02T12:00")
    shoal("drift", "show", "--model", sha256, "--group-by", "hardware", "--every", "hour", *dated)
    assert server.tables_asked[-1][1:] == ("hardware", 1772323200000, 1772452800000, "hour")


def test_drift_says_what_is_new_among_codes(server: FleetServer, shoal: Shoal) -> None:
    """What chance explains and what is too little to matter have no line."""
    sha256 = server.profiled_model(PROFILE)
    nothing = {"p_value": 0.5, "cramers_v": 0.2, "largest": [1], "new": [], "vanished": []}
    sure, unsure = ({"item": i, "share": 0.125, "p_value": p} for i, p in ((7, 1e-9), (8, 0.5)))
    mixes = {
        "north": {**nothing, "new": [sure, unsure], "vanished": [{**sure, "item": 3}]},
        "south": {**nothing, "p_value": 0.0, "largest": [2, 0]},
        "east": nothing,
        "west": {**nothing, "p_value": 0.0, "cramers_v": 0.05},
        "half": nothing,
        "sent none": None,
    }
    server.table = [
        drift_row(
            group,
            frequent=mix,
            distinct={"estimate": 5.01, "reference": None},
            fraction_share=0.125 if group == "half" else 0.0,
        )
        for group, mix in mixes.items()
    ]
    asked = ("drift", "show", "--model", sha256, "--group-by")
    assert shoal(*asked, "site").stderr.splitlines() == [
        "north ax: new 7 (12.5%); gone 3 (was 12.5%); 5 different values",
        "south ax: another mix (Cramér's V 0.20), most of all 2, 0; 5 different values",
        "half ax: no whole number in 12.5%; 5 different values",
    ]
    assert "north ax from 1970-01-01: new 7" in shoal(*asked, "day").stderr


def test_drift_by_day_says_when_each_row_begins(server: FleetServer, shoal: Shoal) -> None:
    """A row is of its own bucket, not of the whole range; all rows of a time stand together."""
    sha256 = server.profiled_model(PROFILE)
    days = [1772323200000, 1772409600000]
    server.table = [
        drift_row("", feature=feature, bucket_ms=at) for feature in ("ax", "ay") for at in days
    ]
    server.models_table = [
        {"group": "", "since_ms": 0, "bucket_ms": at, "refused": refused}
        for at, refused in zip(days, (1, 0), strict=True)
    ]
    shown = shoal("drift", "show", "--model", sha256, "--group-by", "day", "--since", "2026-01-01")
    assert [line.split()[:3] for line in shown.stdout.splitlines()[1:]] == [
        ["fleet", "2026-03-01", "ax"],
        ["fleet", "2026-03-01", "ay"],
        ["fleet", "2026-03-02", "ax"],
        ["fleet", "2026-03-02", "ay"],
    ]
    assert shown.stderr.splitlines() == [
        "fleet from 2026-03-01: 1 sketch refused (damaged, or binned for another model)"
    ]


def test_drift_names_devices_of_no_site(server: FleetServer, shoal: Shoal) -> None:
    """They are a group like others, and not the fleet."""
    sha256 = server.profiled_model(PROFILE)
    server.table = [drift_row("")]
    server.models_table = [{"group": "", "since_ms": 0, "bucket_ms": 0, "refused": 2}]
    shown = shoal("drift", "show", "--model", sha256, "--group-by", "site")
    assert shown.stdout.splitlines()[1].startswith("no site  ax")
    assert shown.stderr.startswith("no site: 2 sketches refused")
    assert shoal("drift", "show", "--model", sha256, "--group-by", "fleet").stderr.startswith(
        "fleet: 2 sketches refused"
    )


def test_drift_says_which_range_was_answered(server: FleetServer, shoal: Shoal) -> None:
    """Windows are kept by five minutes, or by hours: a shorter range is answered for longer."""
    sha256 = server.profiled_model(PROFILE)
    start_ms, end_ms = 1772323200000, 1772323500000
    server.table = [drift_row("north", since_ms=start_ms, until_ms=end_ms)]
    asked = ("drift", "show", "--model", sha256, "--group-by", "site", "--since", "2026-03-01")
    assert shoal(*asked, "--until", "2026-03-01T00:00:10").stderr == (
        "answered for 2026-03-01 00:00:00 to 2026-03-01 00:05:00 UTC: that time can be asked for "
        "no more exactly\n"
    )
    assert shoal(*asked, "--until", "2026-03-01T00:05:00").stderr == ""


def test_drift_says_what_a_reference_cannot_tell(server: FleetServer, shoal: Shoal) -> None:
    """A dash without a word would be taken for no drift."""
    sha256 = server.profiled_model(PROFILE)
    server.table = [
        drift_row(group, feature=feature, n=n, psi=psi)
        for group in ("north", "south")
        for feature, n, psi in (("ax", 900, 0.1), ("gear", 900, None), ("silent", 0, None))
    ]
    shown = shoal("drift", "show", "--model", sha256, "--group-by", "site", "--reference", sha256)
    assert shown.stderr == (
        "gear: not comparable with wearable:1, which has no such feature, or other bins than what "
        "devices counted in and no sketch says the rest\n"
    )


def test_drift_says_which_version_it_has_nothing_of(server: FleetServer, shoal: Shoal) -> None:
    """A name alone is its newest version, which may not run anywhere yet."""
    server.profiled_model(PROFILE)
    assert shoal("drift", "show", "--model", "wearable").stderr == (
        "no device has sent a telemetry window of wearable:1 yet\n"
    )
    grouped = shoal("drift", "show", "--model", "wearable", "--group-by", "site")
    assert grouped.stderr.splitlines() == [
        "no sketch of wearable:1 within that time; what runs: shoal devices list",
        "of wearable:1",
    ]


def test_a_name_is_what_runs_of_it(server: FleetServer, shoal: Shoal) -> None:
    """A candidate that nobody runs yet must not hide the model that drifts."""
    first = server.profiled_model(PROFILE)
    server.approved_model(salt=1)
    other = server.approved_model("pump")
    server.drift = {
        "devices": [
            {"device": f"w-{number}", "model_sha256": sha256, "drifting": True, "windows": 6}
            for number, sha256 in enumerate((first, other))
        ]
    }
    assert shoal("drift", "show", "--model", "wearable", "-o", "name").stdout == "w-0\n"
    server.table = [drift_row("north")]
    grouped = shoal("drift", "show", "--model", "wearable", "--group-by", "site")
    assert "north  ax" in grouped.stdout and grouped.stderr == "of wearable:1\n"
    assert server.tables_asked[-1][0] == first
    with server.store.begin() as session:
        for sha256 in (first, other):
            session.add(
                Alert(
                    scope="device", subject="w", model_sha256=sha256, kind="local_shift",
                    state="open", text="w: drifts", evidence={}, opened_ms=server.clock(),
                )
            )  # fmt: skip
    assert shoal("alerts", "list", "--model", "wearable", "-o", "name").stdout == "1\n"
    assert shoal("alerts", "list", "--model", "wearable:2", "-o", "name").stdout == ""
    assert shoal("alerts", "list", "--model", other, "-o", "name").stdout == "2\n"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--group-by", "site"], 2, "--group-by needs --model"),
        (["--since", "7d"], 2, "--since goes with --group-by"),
        (["--group-by", "colour"], 2, "is not one of"),
        (["--group-by", "day", "--every", "hour", "--model", "m"], 2, "leave one of them out"),
        (["--group-by", "site", "--model", "m", "--since", "soon"], 2, "no span such as"),
        (["--group-by", "site", "--model", "m", "--since", "7"], 2, "such as 2026-03-01T12:00"),
        (["--group-by", "site", "--model", "m", "--since", "0d"], 2, "more than none"),
        (["--group-by", "site", "--model", "m", "--since", "2999-01-01"], 2, "in the future"),
        (["--group-by", "site", "--model", "m", "--since", "now"], 2, "ends where it starts"),
        (["--group-by", "site", "--model", "nothing"], 3, "no model is meant by"),
    ],
)
def test_drift_refusals(shoal: Shoal, args: list[str], code: int, said: str) -> None:
    """A question that makes no sense is a usage error."""
    result = shoal("drift", "show", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


def test_alerts(server: FleetServer, shoal: Shoal) -> None:
    """List, show, acknowledge, silence, resolve; each answers with the new state."""
    assert shoal("alerts", "list").stdout == ""
    evidence = {
        "devices": ["w-1", "w-2", "w-3"], "affected": 3, "judged": 4, "share": 0.75,
        "rest": {"affected": 0, "judged": 16}, "p_value": 8e-4, "confounded": [],
        "features": [{"feature": "temp", "devices": 3}], "suspected": True,
    }  # fmt: skip
    with server.store.begin() as session:
        session.add(
            Alert(
                scope="site", subject="north", model_sha256="a" * 64, kind="accuracy_loss",
                state="open", text="site north: less sure than ever", evidence=evidence,
                opened_ms=server.clock(),
            )
        )  # fmt: skip
    table = shoal("alerts", "list").stdout.splitlines()
    assert "accuracy_loss (suspected)" in table[1] and "site north" in table[1]
    assert table[1].endswith("less sure than ever")
    assert shoal("alerts", "list", "-o", "name").stdout == "1\n"
    shown = shoal("alerts", "show", "1").stdout
    assert shown.startswith("site north: less sure than ever\n")
    assert "3 of 4 judged" in shown and "temp (3)" in shown and "0.0008" in shown
    assert shoal("alerts", "ack", "1", "--note", "on my way").stdout == "acknowledged\n"
    silenced = shoal("alerts", "silence", "1", "--for", "12h")
    assert silenced.stdout == "silenced\n" and "until 2" in silenced.stderr
    assert shoal("alerts", "resolve", "1").stdout == "resolved\n"
    assert shoal("alerts", "list", "-o", "name").stdout == ""
    assert "--all" in shoal("alerts", "list").stderr
    every = json.loads(shoal("alerts", "list", "--all", "-o", "json").stdout)["alerts"]
    assert every[0]["state"] == "resolved"
    assert json.loads(shoal("alerts", "show", "1", "-o", "json").stdout) == every[0]


def test_an_alert_of_one_device_shows_its_evidence(server: FleetServer, shoal: Shoal) -> None:
    """In words that read as what they are: new codes are no fault, one device is no chance."""
    finding = {"feature": "temp", "p_value": 1e-51, "effect": 0.4, "normal": 0.05, "direction": 0.5}
    evidence = {
        "devices": ["w-1"], "affected": 1, "judged": 1, "share": 1.0,
        "rest": {"affected": 0, "judged": 16}, "p_value": 1.0, "confounded": [],
        "features": [{"feature": "gear", "devices": 1}], "suspected": False,
        "findings": [
            finding, {**finding, "feature": "accuracy", "effect": 0.21, "normal": 0.96},
            {**finding, "feature": "confidence", "p_value": 0.012, "normal": -0.0001},
        ],
        "changes": [
            {**finding, "device": "w-1", "since_window": 81, "since_ms": 1772323200000, "psi": 0.07}
        ],
        "faults": [
            {"feature": "gear", "check": "unknown", "share": 0.3, "windows_bad": 4, "windows": 5,
             "codes": [9, 11]},
            {"feature": "", "check": "rate", "share": 0.5, "windows_bad": 2, "windows": 5},
        ],
    }  # fmt: skip
    with server.store.begin() as session:
        session.add(
            Alert(
                scope="device", subject="w-1", model_sha256="a" * 64, kind="local_shift",
                state="open", text="w-1: gear", evidence=evidence, opened_ms=server.clock(),
            )
        )  # fmt: skip
    assert shoal("alerts", "show", "1").stdout.splitlines()[9:] == [
        "  devices    1 of 1 judged",
        "  elsewhere  0 of 16",
        "  features   gear",
        "  finding    temp distance 0.400, usual 0.050 (p below 1e-09)",
        "  finding    accuracy 75.0%, expected 96.0% (p below 1e-09)",
        "  finding    confidence lower by 0.400, usual 0.000 (p 0.012)",
        "  change     temp since window 81 (2026-03-01 00:00:00), direction +0.50, PSI 0.07",
        "  new codes  gear unknown 9, 11: 30.0% of values, 4 of 5 windows",
        "  fault      data rate: 50.0% of values, 2 of 5 windows",
    ]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["show", "7"], 3, "there is no alert 7"),
        (["ack", "7"], 3, "there is no alert 7"),
        (["ack", "0"], 2, "not in the range"),
        (["silence", "1"], 2, "Missing option '--for'"),
        (["silence", "1", "--for", "a while"], 2, "no span such as"),
        (["silence", "1", "--for", "0h"], 2, "no span of time"),
    ],
)
def test_alerts_refusals(shoal: Shoal, args: list[str], code: int, said: str) -> None:
    """Each with its exit code and its words."""
    result = shoal("alerts", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


@given(st.lists(st.tuples(st.integers(1, 999), st.sampled_from("smhdw")), min_size=1, max_size=4))
def test_spans_add_up(parts: list[tuple[int, str]]) -> None:
    """Units may follow each other; the sum is in seconds."""
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert times.span_s(text) == sum(number * times.UNITS_S[unit] for number, unit in parts)


def test_moments() -> None:
    """A span is before now; a date is in UTC unless it says another zone."""
    now_ms = 10_000_000
    assert times.moment_ms("now", now_ms=now_ms) == now_ms
    assert times.moment_ms("30m", now_ms=now_ms) == now_ms - 1_800_000
    assert times.moment_ms("7d", now_ms=now_ms) == 0  # nothing was before 1970
    day_ms = times.moment_ms("2026-03-01", now_ms=0)
    assert times.moment_ms("2026-03-01T02:00+02:00", now_ms=0) == day_ms
    with pytest.raises(ValueError, match="before 1970"):
        times.moment_ms("1969-01-01", now_ms=0)
