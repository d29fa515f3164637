"""Whole fleets through the drift worker: one fact, one alert; no drift, no word.

100 devices at 5 sites, of 2 hardware classes, with 3 channels. Each window is drawn as the counts
that a device would send of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from shoal import ShoalError
from shoal.ext.sketch import SketchBank
from shoal.server.drift import rows as drift_rows
from shoal.server.drift.alerts import AlertConfig
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.detectors import DriftConfig
from shoal.server.drift.profile import build
from shoal.server.drift.retraining import RetrainingConfig
from shoal.server.drift.streams import StreamConfig
from shoal.server.drift.worker import Drift, Request
from shoal.server.store import Store, audit
from shoal.server.store.tables import (
    Alert,
    Audit,
    Device,
    DriftState,
    Evaluation,
    Labels,
    Model,
    Stream,
    Task,
    Window,
)

MODEL, NEXT = "a" * 64, "b" * 64
CHANNELS = ("temp", "flow", "tilt")
SITES = ("east", "north", "south", "west", "yard")
SIZE = 60
RULES = DriftConfig(windows_min=2, predictions_min=100, block_windows=6, clear_windows=2)
START_MS = 1_790_000_000_000
MINUTE_MS = 60_000


def rows(rng: np.random.Generator, count: int, shift: Any = (0.0, 0.0, 0.0)) -> Any:
    """Return (windows, confidences) of a device, moved by so much in each channel."""
    x = rng.normal(size=(count, 3, 10)) + rng.normal(0, 0.03, (1, 3, 1)) + np.reshape(shift, (3, 1))
    return x.astype(np.float32), rng.uniform(0.9, 1, count).astype(np.float32)


def reference() -> Any:
    """Return the profile of six machines that differ a little."""
    rng = np.random.default_rng(1)
    parts = [rows(rng, 120, [s, -s, s / 2]) for s in (-0.1, -0.06, -0.02, 0.02, 0.06, 0.1)]
    held = np.tile(np.repeat([False, True], 60), 6)
    right = rng.random(720) < 0.95
    return build(
        np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), right,
        np.repeat(np.arange(6), 120), held, channels=CHANNELS,
    )  # fmt: skip


PROFILE = reference()
EDGES = [np.array(each.edges, np.float32) for each in PROFILE.features]


@dataclass
class Device_:
    """What is done to one device."""

    shift: list[float] = field(default_factory=lambda: [0.0] * 3)
    right: int = 57
    quality: dict[str, Any] = field(default_factory=dict)
    slices: tuple[str, ...] = ("",)


class Fleet:
    """A store with devices, and the worker over it."""

    def __init__(self, store: Store, count: int, **settings: Any) -> None:
        self.store, self.now_ms = store, START_MS
        self.rng = np.random.default_rng(11)
        self.devices = {f"d-{i:03d}": Device_() for i in range(count)}
        self.number = 0
        self.asked: list[Request] = []
        self.refuse = False
        config = DriftWorkerConfig(rules=RULES, rows_max=5000, **settings)
        self.worker = Drift(
            store, clock=lambda: self.now_ms, config=config, retrain=self._retrain,
            cpu=lambda: 0.0,  # a slow machine judges as often as a fast one
        )  # fmt: skip
        with store.begin() as session:
            for sha256, version in ((MODEL, 1), (NEXT, 2)):
                session.add(
                    Model(
                        name="m", version=version, sha256=sha256, size=1, created_ms=START_MS,
                        manifest={}, profile=json.loads(PROFILE.to_json()),
                    )
                )  # fmt: skip
            for i, name in enumerate(self.devices):
                session.add(
                    Device(
                        id=i + 1, name=name, created_ms=1, reported={"model": MODEL},
                        site=SITES[i * 5 // count], hardware="arm" if i % 2 else "x86",
                    )
                )  # fmt: skip
            session.flush()
            for i in range(count):
                session.add(
                    Stream(id=i + 1, device_id=i + 1, stream=i.to_bytes(16, "big"), first_ms=1)
                )

    async def _retrain(self, request: Request) -> str:
        if self.refuse:
            raise ShoalError("no device is there")
        self.asked.append(request)
        return f"run-{len(self.asked)}"

    def site(self, name: str) -> list[Device_]:
        """Return the devices of a site."""
        at, size = SITES.index(name), len(self.devices) // 5
        return list(self.devices.values())[at * size : (at + 1) * size]

    def windows(self, count: int = 1, *, labels: bool = True) -> None:
        """Let every device send windows, and judge after each."""
        for _ in range(count):
            self.now_ms += MINUTE_MS
            with self.store.begin() as session:
                for i, told in enumerate(self.devices.values()):
                    for part, slice_ in enumerate(told.slices):
                        session.add(self._window(i + 1, told, part, slice_))
                    if labels:
                        session.add(
                            Labels(
                                device_id=i + 1, stream_id=i + 1, seq=self.number,
                                model_sha256=MODEL, number=self.number, split=2,
                                received_ms=self.now_ms, labelled=60, correct=told.right,
                                confusion=[],
                            )
                        )  # fmt: skip
            self.number += 1
            self.worker.step()
            asyncio.run(self.worker.start_asked())

    def _window(self, row: int, told: Device_, part: int, slice_: str) -> Window:
        size = SIZE // len(told.slices)
        x, confidence = rows(self.rng, size, told.shift)
        bank = SketchBank(4, edges=EDGES)
        bank.update_channels(x)
        bank.update_channels(confidence.reshape(-1, 1, 1), first=3)
        return Window(
            device_id=row, stream_id=row, model_sha256=MODEL, number=self.number, slice=slice_,
            device_start_ms=self.now_ms, device_end_ms=self.now_ms, received_ms=self.now_ms,
            predictions=size, errors=0, classes=[], latency_us=[], sketch=bank.to_bytes(),
            extra={"quality": told.quality, "aligned_ms": self.now_ms},
        )  # fmt: skip

    def alerts(self, *states: str) -> list[tuple[str, str, str]]:
        """Return (kind, scope, subject) of the alerts in some states; none = of all."""
        with self.store.read() as session:
            query = select(Alert).order_by(Alert.id)
            if states:
                query = query.where(Alert.state.in_(states))
            return [(a.kind, a.scope, a.subject) for a in session.scalars(query)]

    def one(self, **wanted: str) -> Alert:
        """Return the one alert with these columns."""
        with self.store.read() as session:
            return session.scalars(select(Alert).filter_by(**wanted)).one()

    def audit(self, prefix: str) -> list[Audit]:
        """Return the audit log's entries that begin so."""
        with self.store.read() as session:
            query = select(Audit).where(Audit.action.startswith(prefix)).order_by(Audit.id)
            return list(session.scalars(query))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Make fleets."""
    stores: list[Store] = []

    def make(count: int = 100, **settings: Any) -> Fleet:
        store = Store(f"sqlite:///{tmp_path}/fleet-{len(stores)}.db")
        store.migrate()
        stores.append(store)
        return Fleet(store, count, **settings)

    yield make
    for store in stores:
        store.close()


def test_a_broken_sensor_is_a_fault_of_its_device_alone(fleet: Callable[..., Fleet]) -> None:
    """It stands still, and its channel is far off: one alert, of one device."""
    subject = fleet()
    broken = subject.devices["d-042"]
    broken.shift[1] = 3.0
    broken.quality = {"stuck": [0, 400, 0, 0], "rate": [60, 60]}
    subject.windows(7)
    assert subject.alerts() == [("sensor_fault", "device", "d-042")]
    assert subject.one().text.startswith("d-042: flow stands still in 67%")
    found = {each["device"]: each for each in subject.worker.report(MODEL)["devices"]}
    assert [name for name, each in found.items() if each["drifting"]] == ["d-042"]
    assert found["d-042"]["features"][0] == "flow"
    assert found["d-042"]["faults"][0]["check"] == "stuck"


def test_a_site_that_shifts_is_one_alert(fleet: Callable[..., Fleet]) -> None:
    """Not twenty."""
    subject = fleet()
    for device in subject.site("south"):
        device.shift = [0.6, -0.6, 0.6]
    subject.windows(4)
    assert subject.alerts() == [("local_shift", "site", "south")]
    alert = subject.one()
    assert alert.device_id is None and alert.evidence["judged"] == 20
    assert alert.evidence["rest"] == {"affected": 0, "judged": 80}
    assert alert.seen >= 2 and alert.state == "open"
    found = subject.worker.report(MODEL)["devices"]
    drifting = [each for each in found if each["drifting"]]
    assert {each["site"] for each in drifting} == {"south"} and len(drifting) >= 18
    assert {each["scope"] for each in drifting} == {"site"}
    assert all(each["open_alerts"] == [alert.id] for each in drifting)


def test_a_sites_alert_ends_when_it_is_as_before(fleet: Callable[..., Fleet]) -> None:
    """And none of its devices is told of on the way out."""
    subject = fleet(25)
    for device in subject.site("south"):
        device.shift = [0.8, -0.8, 0.8]
    subject.windows(4)
    assert subject.alerts("open") == [("local_shift", "site", "south")]
    for device in subject.site("south"):
        device.shift = [0.0] * 3
    subject.windows(10)
    assert subject.alerts("open") == []
    assert subject.one(scope="site").note == "not found any more"


def test_a_fleet_that_shifts_is_one_alert(fleet: Callable[..., Fleet]) -> None:
    """All sites, both classes."""
    subject = fleet()
    for device in subject.devices.values():
        device.shift = [0.6, -0.6, 0.6]
    subject.windows(3)
    assert subject.alerts() == [("fleet_shift", "fleet", "")]
    assert not subject.audit("retraining")  # a shift alone never retrains


def test_a_loss_of_accuracy_is_told_and_asks_for_a_run(fleet: Callable[..., Fleet]) -> None:
    """Labels of one site say so: started once, then the cool-down holds the next one back."""
    policy = RetrainingConfig(mode="automatic", labels_min=100)
    subject = fleet(40, retraining=policy)
    for device in subject.site("yard"):
        device.right = 40
    subject.windows(8)
    assert subject.alerts() == [("accuracy_loss", "site", "yard")]
    assert not subject.one().evidence["suspected"]
    assert [request.model_sha256 for request in subject.asked] == [MODEL]
    assert [entry.action for entry in subject.audit("retraining")] == [
        "retraining.decided", "retraining.started",
    ]  # fmt: skip
    decided, started = subject.audit("retraining")
    assert decided.detail["reasons"] == ["labels tell of lost accuracy: site yard"]
    assert started.detail == {"run": "run-1", "road": "rounds"}
    (told,) = subject.worker.report(MODEL)["retraining"]
    assert told["action"] == "nothing" and any("cool-down" in why for why in told["reasons"])


def test_a_run_that_cannot_start_is_in_the_log(fleet: Callable[..., Fleet]) -> None:
    """With the reason; the worker goes on."""
    policy = RetrainingConfig(mode="automatic", labels_min=0)
    subject = fleet(10, retraining=policy)
    subject.refuse = True
    for device in subject.devices.values():
        device.right = 30
    subject.windows(6)
    assert [entry.action for entry in subject.audit("retraining")] == [
        "retraining.decided", "retraining.failed",
    ]  # fmt: skip
    assert subject.audit("retraining")[1].detail["reason"] == "no device is there"


def test_a_challengers_win_is_proposed(fleet: Callable[..., Fleet]) -> None:
    """The default is manual: the proposal is in the log once, and nothing is started."""
    subject = fleet(10, retraining=RetrainingConfig(labels_min=0))
    with subject.store.begin() as session:
        session.add(
            Evaluation(
                id="e1", state="done", bundles=[MODEL, NEXT], split="test", devices=[],
                created_ms=START_MS + 1, deadline_ms=START_MS + 2,
            )
        )  # fmt: skip
        for i in range(1, 6):
            scores = [
                {"bundle_sha256": MODEL, "windows": 200, "correct": 120},
                {"bundle_sha256": NEXT, "windows": 200, "correct": 150},
            ]
            session.add(
                Task(
                    id=f"t{i}", owner_id="e1", kind="evaluate", round=0, device_id=i,
                    state="reported", result={"scores": scores}, created_ms=1, deadline_ms=2,
                    changed_ms=1,
                )
            )  # fmt: skip
    subject.windows(3)
    (entry,) = subject.audit("retraining")
    assert (entry.action, entry.detail["trigger"]) == ("retraining.proposed", "challenger_win")
    assert subject.asked == [] and subject.alerts() == []


def test_a_loss_is_proposed_once(fleet: Callable[..., Fleet]) -> None:
    """However long it waits for an operator; a loss that comes after it was resolved is another."""
    policy = RetrainingConfig(labels_min=0, cooldown_s=0, per_week_max=100)
    subject = fleet(5, retraining=policy, alerts=AlertConfig(flap_s=0, repair_s=0))
    for device in subject.devices.values():
        device.right = 40
    subject.windows(15)
    (proposed,) = subject.audit("retraining")
    first = subject.one(kind="accuracy_loss", state="open")
    assert proposed.action == "retraining.proposed"
    assert proposed.detail["asked_by"] == [f"alert {first.id}"]
    (told,) = subject.worker.report(MODEL)["retraining"]
    assert any("proposed already" in why for why in told["reasons"])
    subject.worker.control(first.id, "resolve")
    subject.windows(3)
    again = subject.one(kind="accuracy_loss", state="open")
    assert again.id != first.id
    assert [entry.detail["asked_by"] for entry in subject.audit("retraining")] == [
        [f"alert {first.id}"], [f"alert {again.id}"],
    ]  # fmt: skip


def test_labels_count_from_the_last_run_however_long_ago(fleet: Callable[..., Fleet]) -> None:
    """A month after a run, what came before it is still not new."""
    config = RetrainingConfig(mode="automatic", labels_min=500)
    subject = fleet(1)
    subject.windows(10)
    with subject.store.begin() as session:
        audit.append(
            session, now_ms=subject.now_ms, actor="server", action=drift_rows.DECIDED,
            subject=MODEL, detail={},
        )  # fmt: skip
    subject.now_ms += 30 * 86_400_000
    subject.devices["d-000"].right = 20
    subject.windows(8)
    with subject.store.read() as session:
        model = session.scalars(select(Model).where(Model.sha256 == MODEL)).one()
        facts = drift_rows.facts(session, model, now_ms=subject.now_ms, config=config)
    assert facts.losses and facts.labels_new == 8 * 60 and not facts.runs_ms


def test_a_replaced_model_asks_for_nothing(fleet: Callable[..., Fleet]) -> None:
    """Its late labels tell of the loss still; the run that it asked for was the only one."""
    policy = RetrainingConfig(mode="automatic", labels_min=0, cooldown_s=0, per_week_max=100)
    subject = fleet(5, retraining=policy)
    for device in subject.devices.values():
        device.right = 40
    while not subject.asked:
        subject.windows(1)
    with subject.store.begin() as session:
        for row in session.scalars(select(Device)):
            row.reported = {"model": NEXT}
    subject.windows(5)
    assert len(subject.asked) == 1
    assert subject.alerts("open") == []
    assert subject.one(kind="accuracy_loss").note == "no device runs its model any more"


def test_no_drift_no_word(fleet: Callable[..., Fleet]) -> None:
    """200 windows of a fleet in which nothing happens."""
    subject = fleet(5)
    subject.windows(200)
    assert subject.alerts() == [] and not subject.audit("retraining")
    found = subject.worker.report(MODEL)["devices"]
    assert len(found) == 5 and not any(each["drifting"] for each in found)
    assert all(each["windows"] == 200 for each in found)


def test_a_fleet_of_a_hundred_in_which_nothing_happens(fleet: Callable[..., Fleet]) -> None:
    """Many devices, and still no word."""
    subject = fleet()
    subject.windows(6)
    assert subject.alerts() == []


def test_slices_are_judged_together(fleet: Callable[..., Fleet]) -> None:
    """Three slices of each window are one window of the device."""
    subject = fleet(10)
    for device in subject.devices.values():
        device.slices = ("day", "night", "dawn")
    subject.devices["d-003"].shift = [0.8, -0.8, 0.8]
    subject.windows(5)
    assert subject.alerts() == [("local_shift", "device", "d-003")]
    found = subject.worker.report(MODEL)["devices"]
    assert {each["windows"] for each in found} == {5}


def test_an_operator_and_the_worker_share_an_alert(fleet: Callable[..., Fleet]) -> None:
    """Acknowledged it stays so while it is found; silenced it wakes up; resolved it waits."""
    subject = fleet(10)
    subject.devices["d-003"].shift = [0.8, -0.8, 0.8]
    subject.windows(4)
    alert = subject.one()
    assert subject.worker.control(alert.id, "acknowledge", note="mine")["state"] == "acknowledged"
    subject.windows(2)
    again = subject.one()
    assert (again.state, again.note, again.actor) == ("acknowledged", "mine", "operator")
    assert again.seen > alert.seen
    subject.worker.control(alert.id, "silence", silence_s=120)
    subject.windows(1)
    assert subject.one().state == "silenced"
    subject.windows(2)
    assert subject.one().state == "open"
    subject.worker.control(alert.id, "resolve", note="moved back")
    subject.windows(5)
    assert subject.one().state == "resolved"  # the evidence is of before the repair
    subject.windows(12)
    assert subject.one().state == "open"  # it was not repaired
    actions = [entry.action for entry in subject.audit("alert")]
    assert actions == ["alert.acknowledged", "alert.silenced", "alert.resolved"]


def test_alerts_of_an_older_server_go_on(fleet: Callable[..., Fleet]) -> None:
    """Their kinds are named anew, and the same device gets no second alert."""
    subject = fleet(10)
    subject.devices["d-003"].shift = [0.8, -0.8, 0.8]
    with subject.store.begin() as session:
        for kind, at in (("covariate_drift", 5), ("confidence_drift", 4), ("key_conflict", 3)):
            session.add(
                Alert(
                    device_id=4, model_sha256=MODEL, kind=kind, state="open", text="t",
                    evidence={}, opened_ms=at,
                )
            )  # fmt: skip
    subject.windows(4)
    assert sorted(subject.alerts("open")) == [
        ("key_conflict", "device", ""), ("local_shift", "device", "d-003"),
    ]  # fmt: skip
    assert subject.one(kind="local_shift", state="open").opened_ms == 5


SOON = StreamConfig(baseline_windows=20, baseline_s=0)


def test_a_change_since_the_first_windows_is_told_with_its_window(
    fleet: Callable[..., Fleet],
) -> None:
    """A small lasting shift, still like what the model knows; resolved, it is the new way."""
    subject = fleet(20, streams=SOON)
    subject.windows(22)
    assert subject.alerts() == []
    subject.devices["d-003"].shift = [0.22, 0.0, 0.0]
    subject.windows(12)
    assert subject.alerts() == [("local_shift", "device", "d-003")]
    alert = subject.one()
    assert "changed since its first windows: temp higher since window 2" in alert.text
    (change,) = alert.evidence["changes"]
    assert (change["device"], change["feature"]) == ("d-003", "temp")
    assert 20 <= change["since_window"] <= 30 and change["since_ms"] > START_MS
    found = {each["device"]: each for each in subject.worker.report(MODEL)["devices"]}
    assert found["d-003"]["changes"] and "temp" in found["d-003"]["features"]
    subject.worker.control(alert.id, "resolve", note="moved for good")
    subject.windows(30)
    assert subject.alerts("open") == []


def test_a_site_that_changed_is_one_alert(fleet: Callable[..., Fleet]) -> None:
    """Its text says that it is the devices' own past that they left."""
    subject = fleet(25, streams=SOON)
    subject.windows(22)
    for device in subject.site("south"):
        device.shift = [0.25, 0.0, 0.0]
    subject.windows(10)
    assert subject.alerts("open") == [("local_shift", "site", "south")]
    assert "have changed since their first windows" in subject.one(state="open").text


def test_windows_in_slices_are_watched_as_one(fleet: Callable[..., Fleet]) -> None:
    """The state counts whole windows, one behind the newest."""
    subject = fleet(2, streams=SOON)
    for device in subject.devices.values():
        device.slices = ("day", "night")
    subject.windows(5)
    with subject.store.read() as session:
        states = session.scalars(select(DriftState)).all()
        assert [each.state["streams"]["windows"] for each in states] == [4, 4]


def test_scores_stand_beside_a_verdict_and_never_make_one(fleet: Callable[..., Fleet]) -> None:
    """A rise of the accuracy is followed and told of nobody; a loss shows when it began."""
    subject = fleet(5)
    for device in subject.devices.values():
        device.right = 50
    subject.windows(25)
    known = subject.alerts()
    for device in subject.devices.values():
        device.right = 60
    subject.windows(20)
    assert subject.alerts() == known
    subject.devices["d-001"].right = 30
    subject.windows(12)
    alert = subject.one(kind="accuracy_loss", subject="d-001", state="open")
    told = {line["detector"]: line for line in alert.evidence["scores"]}
    assert told["page_hinkley"]["device"] == "d-001"
    assert told["adwin"]["before"] > told["adwin"]["after"]
