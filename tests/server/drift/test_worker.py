"""The drift worker: rows are folded once, alerts open and resolve, damage is survived."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from shoal.ext.sketch import SketchBank
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.detectors import DriftConfig
from shoal.server.drift.profile import build
from shoal.server.drift.worker import Drift
from shoal.server.store import Store
from shoal.server.store.tables import Alert, Device, DriftState, Labels, Model, Stream, Window
from tests.sims.stores import statements

OLD, NEW = "a" * 64, "b" * 64
RNG = np.random.default_rng(1)


def data(shift: float = 0.0, windows: int = 60) -> tuple[Any, Any]:
    """Return (windows, confidences) of a person; ``shift`` moves the first channel."""
    x = RNG.normal(size=(windows, 2, 20)).astype(np.float32)
    x[:, 0] += np.float32(shift)
    confidence = RNG.uniform(0.9, 1.0, windows).astype(np.float32)
    return x, confidence


def reference() -> Any:
    """Return a profile of five people who differ a little."""
    parts = [data(shift) for shift in (-0.1, -0.05, 0.0, 0.05, 0.1) for _ in range(2)]
    x = np.concatenate([each[0] for each in parts])
    confidence = np.concatenate([each[1] for each in parts])
    groups = np.repeat(np.arange(5), 120)
    held = np.tile(np.repeat([False, True], 60), 5)
    right = RNG.uniform(size=len(x)) < 0.95
    return build(x, confidence, right, groups, held, channels=("ax", "ay"))


PROFILE = reference()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with three devices and two models of one profile."""
    found = Store(f"sqlite:///{tmp_path}/fleet.db")
    found.migrate()
    raw = json.loads(PROFILE.to_json())
    with found.begin() as session:
        for i in range(3):
            device = Device(name=f"d-{i}", created_ms=1, reported={"model": OLD})
            session.add(device)
            session.flush()
            session.add(Stream(device_id=device.id, stream=bytes([i] * 16), first_ms=1))
        for version, sha256 in enumerate((OLD, NEW), start=1):
            session.add(
                Model(
                    name="m", version=version, sha256=sha256, size=1, created_ms=1,
                    manifest={}, profile=raw,
                )
            )  # fmt: skip
    yield found
    found.close()


def tell(
    store: Store, device: int, number: int, *, shift: float = 0.0, right: int = 57,
    model: str = OLD, sketch: bytes | None = None,
) -> None:  # fmt: skip
    """Store one window of a device, and its labels."""
    bank = SketchBank(3, edges=[np.array(f.edges, np.float32) for f in PROFILE.features])
    x, confidence = data(shift)
    bank.update_channels(x)
    bank.update_channels(confidence.reshape(-1, 1, 1), first=2)
    with store.begin() as session:
        session.add(
            Window(
                device_id=device, stream_id=device, model_sha256=model, number=number,
                device_start_ms=1, device_end_ms=2, received_ms=3, predictions=60, errors=0,
                classes=[], latency_us=[], sketch=bank.to_bytes() if sketch is None else sketch,
            )
        )  # fmt: skip
        session.add(
            Labels(
                device_id=device, stream_id=device, seq=number + (1000 if model == NEW else 1),
                model_sha256=model, number=number, split=2, received_ms=3, labelled=60,
                correct=right, confusion=[],
            )
        )  # fmt: skip


def worker(store: Store) -> Drift:
    """Return a worker that judges early."""
    rules = DriftConfig(windows_min=2, predictions_min=100, block_windows=6, clear_windows=2)
    return Drift(store, clock=lambda: 9, config=DriftWorkerConfig(rules=rules))


def test_a_shifted_device_is_named_with_its_feature(store: Store) -> None:
    """One device moves in one channel and loses accuracy: it alone is flagged, with why."""
    subject = worker(store)
    for number in range(10):
        for device in (1, 2, 3):
            tell(store, device, number, shift=2.0 * (device == 3), right=40 if device == 3 else 57)
        subject.step()
    found = {each["device"]: each for each in subject.report(OLD)["devices"]}
    assert [name for name, each in found.items() if each["drifting"]] == ["d-2"]
    assert found["d-2"]["kind"] == "accuracy_loss"
    assert found["d-2"]["features"] == ["ax"]  # the others are as usual, and not named
    assert "accuracy 67%" in found["d-2"]["text"] and "ax higher" in found["d-2"]["text"]
    assert 2 <= found["d-2"]["detected_after_windows"] <= 10
    with store.read() as session:
        alerts = {alert.kind: alert for alert in session.scalars(select(Alert))}
    # Lost accuracy and a channel that is far off are two facts, and both are told.
    assert set(alerts) == {"accuracy_loss", "sensor_fault"}
    assert all(alert.state == "open" and alert.subject == "d-2" for alert in alerts.values())
    first = min(alert.windows for alert in alerts.values())
    assert first == found["d-2"]["detected_after_windows"]
    assert alerts["sensor_fault"].evidence["features"][0]["feature"] == "ax"
    assert set(found["d-2"]["open_alerts"]) == {alert.id for alert in alerts.values()}


def test_bins_alone_are_judged_as_whole_windows_are(store: Store) -> None:
    """Three devices tell the same: whole, now and then as bins alone, and always so."""
    subject = worker(store)
    edges = [np.array(f.edges, np.float32) for f in PROFILE.features]
    for number in range(8):
        bank = SketchBank(3, edges=edges)
        x, confidence = data(2.0)
        bank.update_channels(x)
        bank.update_channels(confidence.reshape(-1, 1, 1), first=2)
        for device, alone in ((1, False), (2, number % 2 == 1), (3, True)):
            tell(store, device, number, right=40, sketch=bank.to_bytes(bins_only=alone))
        subject.step()
    with store.read() as session:
        states = [dict(each.state) for each in session.scalars(select(DriftState)).all()]
        assert [each.windows for each in session.scalars(select(DriftState)).all()] == [8] * 3
    # The mean of the confidence alone is of the whole windows.
    for each in states:
        del each["scores"], each["trace"]
    assert states[0] == states[1] == states[2]
    found = {each["device"]: each for each in subject.report(OLD)["devices"]}
    assert all(each["drifting"] for each in found.values())
    assert {tuple(each["features"]) for each in found.values()} == {tuple(found["d-0"]["features"])}


def test_rows_are_folded_once(store: Store) -> None:
    """A second look, and a second worker after a restart, find nothing to fold."""
    for number in range(3):
        tell(store, 1, number)
    for subject in (worker(store), worker(store)):
        subject.step()
        subject.step()
        with store.read() as session:
            (state,) = session.scalars(select(DriftState)).all()
            assert state.windows == 3
            assert state.state["labelled"] == 180


def test_a_long_judgement_rests_while_windows_are_folded(store: Store) -> None:
    """A quarter of a core: after 2 s the fleet is judged again 6 s later, also by a new worker."""
    now_s, cpu_s = [100.0], [0.0]

    def cpu() -> float:
        cpu_s[0] += 2.0
        return cpu_s[0]

    rules = DriftConfig(windows_min=2, predictions_min=100, block_windows=6, clear_windows=2)

    def made() -> Drift:
        config = DriftWorkerConfig(rules=rules)
        return Drift(store, clock=lambda: 9, config=config, monotonic=lambda: now_s[0], cpu=cpu)

    def step(subject: Drift, number: int) -> tuple[int, bool]:
        if number >= 0:
            tell(store, 3, number, shift=3.0, right=30)
        subject.step()
        with store.read() as session:
            state = session.scalars(select(DriftState)).one()
            return state.windows, bool(state.verdict.get("drifting"))

    subject = made()
    assert step(subject, 0) == (1, False)
    for number in range(1, 8):
        now_s[0] += 0.8
        assert step(subject, number) == (number + 1, False)  # folded, not judged
    now_s[0] += 0.5
    assert step(subject, -1) == (8, False)  # it rests no more: a first look, though nothing came
    now_s[0] += 6.1
    assert step(subject, 8) == (9, True)  # the second one confirms
    tell(store, 1, 0)
    tell(store, 1, 1)
    subject.step()  # folded, and it rests
    with store.read() as session:
        first = session.scalars(select(DriftState).where(DriftState.device_id == 1)).one()
        assert first.windows == 2 and not first.verdict
    made().step()
    with store.read() as session:
        first = session.scalars(select(DriftState).where(DriftState.device_id == 1)).one()
        assert first.verdict


def test_an_alert_ends_when_the_device_runs_a_model_that_knows_it(store: Store) -> None:
    """The old model's alarm is settled once the new one has enough windows."""
    subject = worker(store)
    for number in range(8):
        tell(store, 1, number, right=40)
        subject.step()
    with store.begin() as session:
        assert session.scalars(select(Alert)).one().state == "open"
        session.get_one(Device, 1).reported = {"model": NEW}
    for number in range(3):
        tell(store, 1, number, model=NEW)
        subject.step()
    with store.read() as session:
        alert = session.scalars(select(Alert)).one()
        assert (alert.state, alert.resolved_ms) == ("resolved", 9)
    tell(store, 1, 8, right=40)  # a window of the old model that came late
    subject.step()
    with store.read() as session:
        assert session.scalars(select(Alert)).one().state == "resolved"


@pytest.mark.parametrize("sketch", [b"", b"garbage", SketchBank(2).to_bytes()])
def test_a_damaged_sketch_is_left_out(store: Store, sketch: bytes) -> None:
    """It is marked as done, logged, and the next window is folded."""
    subject = worker(store)
    tell(store, 1, 0, sketch=sketch)
    tell(store, 1, 1)
    subject.step()
    with store.read() as session:
        assert session.scalars(select(DriftState)).one().windows == 1
        assert all(session.scalars(select(Window.drift_done)))


def test_the_alert_of_a_device_that_was_shut_out_ends(store: Store) -> None:
    """Though others still run its model: nobody will ever hear of it again."""
    subject = worker(store)

    def state() -> dict[str, str]:
        with store.read() as session:
            return {alert.kind: alert.state for alert in session.scalars(select(Alert))}

    for number in range(10):
        for device in (1, 2, 3):
            tell(store, device, number, shift=2.0 * (device == 3))
        subject.step()
    assert state() == {"sensor_fault": "open"}
    with store.begin() as session:
        session.get_one(Device, 3).revoked_ms = 10
    for number in range(10, 14):
        for device in (1, 2):
            tell(store, device, number)
        subject.step()
    assert state() == {"sensor_fault": "resolved"}


def test_an_alert_means_the_devices_of_its_place(store: Store) -> None:
    """All that drift, however many are named in it; and no device that is called like a site."""
    subject = worker(store)
    with store.begin() as session:
        for number, name in ((1, "north"), (2, "d-1"), (3, "d-2")):
            row = session.get_one(Device, number)
            row.name, row.site = name, "south" if number == 1 else "north"
    for number in range(3):
        for device in (1, 2, 3):
            tell(store, device, number)
    subject.step()
    with store.begin() as session:
        session.add(
            Alert(
                scope="site", subject="north", model_sha256=OLD, kind="local_shift", state="open",
                text="site north: drifts", evidence={"devices": ["d-1"]}, opened_ms=1,
            )
        )  # fmt: skip
        state = session.scalars(select(DriftState).where(DriftState.device_id == 3)).one()
        state.verdict = {
            **state.verdict, "drifting": True, "kind": "local_shift", "scope": "site",
        }  # fmt: skip
    meant = {each["device"]: each["open_alerts"] for each in subject.report(OLD)["devices"]}
    assert meant == {"north": [], "d-1": [1], "d-2": [1]}


def test_a_report_leaves_what_the_detectors_keep_where_it_is(store: Store) -> None:
    """The states grow with features and windows; a report is of verdicts."""
    subject = worker(store)
    tell(store, 1, 0)
    subject.step()
    with statements(store) as asked:
        assert [each["device"] for each in subject.report(OLD)["devices"]] == ["d-0"]
    assert any("drift_state.verdict" in each for each in asked)
    assert not any("drift_state.state" in each for each in asked)
