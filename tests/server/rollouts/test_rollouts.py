"""Stories: whole rollouts over a fleet in memory, with the real tables and the real database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shoal.proto.errors import ContractError
from shoal.server.errors import InvalidError, NotFoundError
from shoal.server.rollouts import GateConfig, RolloutConfig
from shoal.server.rollouts.errors import IllegalEventError, NotApprovedError
from shoal.server.store import audit
from shoal.server.store.tables import Audit, Device
from tests.sims.fleet import Behaviour, Fleet

Make = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a maker of fleets that are closed in the end."""
    made: list[Fleet] = []

    def fleet(devices: int, **settings: Any) -> Fleet:
        made.append(Fleet(tmp_path, devices=devices, **settings))
        return made[-1]

    yield fleet
    for each in made:
        each.close()


def actions(fleet: Fleet) -> Counter[str]:
    """Return how often the audit log, whose chain is checked, tells of each action."""
    with fleet.store.read() as session:
        audit.verify(session)
        return Counter(session.scalars(select(Audit.action)))


def test_a_good_model_reaches_every_device_wave_by_wave(make: Make) -> None:
    """The plain story: each device is offered the model once, after the wave before passed."""
    fleet = make(10)
    rollout = fleet.roll_out(fleet.model("a"), waves=[2, 5, 0], canary_ids=["d-0007", "d-0003"])
    fleet.step()
    assert {name for name, row in fleet.rows(rollout).items() if row.state == "offered"} == {
        "d-0003",
        "d-0007",
    }
    assert fleet.run(rollout) == "completed"
    assert fleet.counts(rollout) == {"confirmed": 10}
    row = fleet.rollout(rollout)
    assert (row.waves, row.wave) == ([2, 5, 10], 2)
    assert [(each["wave"], each["verdict"]) for each in row.evidence] == [
        (0, "PASS"),
        (1, "PASS"),
        (2, "PASS"),
    ]
    # Each device heard of each version exactly once, and no counter was used twice.
    assert Counter(fleet.published) == Counter((f"d-{i:04}", 1) for i in range(10))
    assert len(fleet.director.log) == 10
    assert actions(fleet)["device.confirmed"] == 10


def test_a_thousand_devices(make: Make) -> None:
    """Mute and failing devices below the limit are counted as what they are, not waited for."""
    fleet = make(1000, config=RolloutConfig(gate_s=0.0, offers_per_tick_max=500), brief=True)
    model = fleet.model("a")
    for i, device in enumerate(fleet.devices):
        device.mute = i % 50 == 0
        device.rejects = frozenset({model}) if i % 50 == 1 else frozenset()
    rollout = fleet.roll_out(model, waves=[100, 0], deadline_s=60)
    assert fleet.run(rollout, seconds=10.0) == "completed"
    assert fleet.counts(rollout) == {"confirmed": 960, "silent": 20, "failed": 20}


def test_mute_devices_fail_the_rollout(make: Make) -> None:
    """Faults 69: a brick never says that it is one; its silence is evidence."""
    fleet = make(20)
    old, new = fleet.model("a"), fleet.model("b")
    assert fleet.run(fleet.roll_out(old)) == "completed"
    canaries = [f"d-{i:04}" for i in range(10)]
    for device in fleet.devices[:3]:
        device.mute = True
    rollout = fleet.roll_out(new, waves=[10, 0], canary_ids=canaries, deadline_s=30)
    assert fleet.run(rollout) == "failed"
    row = fleet.rollout(rollout)
    assert "3 fell silent of 10" in row.reason
    assert row.evidence[-1]["counts"]["silent"] == 3
    # All that were offered the model are called back, the silent ones too: they may wake up.
    for _ in range(5):
        fleet.act()
        fleet.step()
    assert fleet.counts(rollout) == {"eligible": 10, "reverted": 7, "silent": 3}
    assert {device.running for device in fleet.devices} == {old}
    counters = {name: counter for name, counter, _, _ in fleet.director.log}
    assert {counters[name] for name in canaries} == {3}
    for device in fleet.devices[:3]:
        device.mute = False
    for _ in range(5):
        fleet.act()
    assert {device.running for device in fleet.devices} == {old}
    assert fleet.rows(rollout)["d-0000"].state == "silent"


@pytest.mark.parametrize(
    ("worse", "check"),
    [
        (Behaviour(accuracy=0.7), "accuracy"),
        (Behaviour(error_share=0.15), "errors"),
        (Behaviour(latency_us=900.0), "latency"),
    ],
)
def test_a_worse_model_is_stopped_at_the_canary(make: Make, worse: Behaviour, check: str) -> None:
    """A bad model installs perfectly: only what it does tells."""
    fleet = make(20)
    old, new = fleet.model("a"), fleet.model("b", worse)
    fleet.run(fleet.roll_out(old))
    for _ in range(10):
        fleet.observe()
    rollout = fleet.roll_out(new, waves=[4, 0], bake_windows=2)
    assert fleet.run(rollout, telemetry=True) == "failed"
    entry = fleet.rollout(rollout).evidence[-1]
    failed = [each["name"] for each in entry["checks"] if each["verdict"] == "FAIL"]
    assert failed == [check]
    for _ in range(5):
        fleet.act()
        fleet.step()
    assert fleet.counts(rollout) == {"eligible": 16, "reverted": 4}
    assert {device.running for device in fleet.devices} == {old}
    assert actions(fleet)["rollout.failed"] == 1


def test_a_better_model_passes_its_gates(make: Make) -> None:
    """The numbers of a comparison are kept as evidence with their interval."""
    fleet = make(12)
    fleet.run(fleet.roll_out(fleet.model("a", Behaviour(accuracy=0.8))))
    for _ in range(10):
        fleet.observe()
    better = fleet.model("b", Behaviour(accuracy=0.9))
    rollout = fleet.roll_out(better, waves=[2, 0], bake_windows=2)
    assert fleet.run(rollout, telemetry=True) == "completed"
    first = fleet.rollout(rollout).evidence[0]
    accuracy = next(each for each in first["checks"] if each["name"] == "accuracy")
    assert accuracy["verdict"] == "PASS"
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert min(accuracy["trials_now"], accuracy["trials_before"]) >= 400
    assert accuracy["now"] > accuracy["before"]


def test_the_gate_waits_for_each_devices_windows(make: Make) -> None:
    """A gate that judged the quick devices alone would not hear of the slow ones."""
    fleet = make(4)
    fleet.run(fleet.roll_out(fleet.model("a")))
    rollout = fleet.roll_out(fleet.model("b"), waves=[2, 0], bake_windows=3)
    for _ in range(6):
        fleet.step()
        fleet.act()
    assert fleet.state(rollout) == "baking"
    lazy = next(d for d in fleet.devices if fleet.rows(rollout)[d.name].wave == 0)
    for _ in range(10):
        lazy.mute = True
        fleet.observe()
        fleet.step()
    assert (fleet.state(rollout), fleet.rollout(rollout).wave) == ("baking", 0)
    lazy.mute = False
    for _ in range(30):  # how many windows the gate takes beyond the three is drawn by chance
        fleet.observe()
        fleet.step()
        if fleet.rollout(rollout).wave == 1:
            break
    assert fleet.rollout(rollout).wave == 1


def test_insufficient_evidence_pauses_and_is_accepted_by_the_operator(make: Make) -> None:
    """Too little evidence is no PASS; going on without it is a person's decision, on record."""
    config = RolloutConfig(gate_s=0.0, bake_s_max=20.0)
    fleet = make(4, config=config)
    fleet.run(fleet.roll_out(fleet.model("a")))
    fleet.observe(predictions=20)
    rollout = fleet.roll_out(fleet.model("b"), waves=[2, 0], bake_windows=1)
    for _ in range(5):
        fleet.step()
        fleet.act()
    fleet.observe(predictions=20)
    assert fleet.run(rollout) == "paused"
    row = fleet.rollout(rollout)
    assert row.evidence[-1]["verdict"] == "INSUFFICIENT"
    assert row.wave == 0
    assert fleet.rollouts.control(rollout, "resume") == "running"
    fleet.step()
    row = fleet.rollout(rollout)
    assert row.wave == 1
    assert row.evidence[0]["accepted"] is True


def test_a_manual_pause_accepts_nothing(make: Make) -> None:
    """Only what was paused for want of evidence is accepted by resuming."""
    fleet = make(4)
    fleet.run(fleet.roll_out(fleet.model("a")))
    fleet.observe(predictions=20)
    rollout = fleet.roll_out(fleet.model("b"), waves=[2, 0], bake_windows=1)
    for _ in range(5):
        fleet.step()
        fleet.act()
    fleet.observe(predictions=20)
    fleet.step()
    assert fleet.rollout(rollout).evidence[-1]["verdict"] == "INSUFFICIENT"
    assert fleet.rollouts.control(rollout, "pause") == "paused"
    fleet.step()
    fleet.rollouts.control(rollout, "resume")
    for _ in range(3):
        fleet.step()
    assert (fleet.state(rollout), fleet.rollout(rollout).wave) == ("baking", 0)


def test_nothing_is_offered_while_paused(make: Make) -> None:
    """A pause holds from its commit on."""
    fleet = make(4)
    rollout = fleet.roll_out(fleet.model("a"), waves=[2, 0])
    fleet.rollouts.control(rollout, "pause")
    for _ in range(3):
        fleet.step()
        fleet.act()
    assert fleet.director.log == []
    fleet.rollouts.control(rollout, "resume")
    assert fleet.run(rollout) == "completed"


def test_abort_brings_devices_back_by_one_command(make: Make) -> None:
    """Rolling back by hand is one command; an ended rollout stays ended."""
    fleet = make(6)
    old, new = fleet.model("a"), fleet.model("b")
    fleet.run(fleet.roll_out(old))
    rollout = fleet.roll_out(new, waves=[3, 0])
    fleet.run(rollout, until=lambda _: fleet.rollout(rollout).wave == 1)
    assert fleet.rollouts.control(rollout, "abort") == "aborted"
    for _ in range(6):
        fleet.step()
        fleet.act()
    assert {device.running for device in fleet.devices} == {old}
    assert set(fleet.counts(rollout)) <= {"reverted", "eligible"}
    with pytest.raises(IllegalEventError, match="aborted"):
        fleet.rollouts.control(rollout, "resume")


def test_a_first_model_has_nothing_to_go_back_to(make: Make) -> None:
    """A device without an earlier model keeps the one it has, and is not assigned it again."""
    fleet = make(4)
    rollout = fleet.roll_out(fleet.model("a"))
    fleet.run(rollout, until=lambda _: fleet.counts(rollout).get("confirmed") == 4)
    if fleet.state(rollout) == "running":
        fleet.rollouts.control(rollout, "abort")
    for _ in range(3):
        fleet.step()
        fleet.act()
    assert len(fleet.director.log) == 4


def test_a_device_that_falls_back_counts_as_failed(make: Make) -> None:
    """Fault 68: a success that did not last is none, and one canary of two is too many."""
    fleet = make(4)
    old, new = fleet.model("a"), fleet.model("b")
    fleet.run(fleet.roll_out(old))
    rollout = fleet.roll_out(new, waves=[2, 0], bake_windows=5)
    fleet.run(rollout, until=lambda state: state == "baking")
    canary = next(d for d in fleet.devices if fleet.rows(rollout)[d.name].wave == 0)
    canary.running = old
    fleet.report(canary, stale=True)  # a late record of an earlier boot says nothing about now
    assert fleet.rows(rollout)[canary.name].state == "confirmed"
    fleet.report(canary)
    row = fleet.rows(rollout)[canary.name]
    assert row.state == "failed"
    assert row.reason == f"fell back: it runs {old[:12]}"
    fleet.step()
    assert fleet.state(rollout) == "failed"


def test_a_device_that_goes_mute_while_baking_is_silent(make: Make) -> None:
    """A confirmed device that is never heard of again is no success."""
    fleet = make(4)
    fleet.run(fleet.roll_out(fleet.model("a")))
    rollout = fleet.roll_out(fleet.model("b"), waves=[2, 0], bake_windows=5, deadline_s=30)
    fleet.run(rollout, until=lambda state: state == "baking")
    canary = next(d for d in fleet.devices if fleet.rows(rollout)[d.name].wave == 0)
    canary.mute = True
    assert fleet.run(rollout, steps_max=60) == "failed"
    assert fleet.rollout(rollout).evidence[-1]["counts"]["silent"] >= 1


def test_a_late_confirmation_still_counts(make: Make) -> None:
    """The device's word is the only proof, and it proves even when it comes late."""
    config = RolloutConfig(gate_s=0.0, gate=GateConfig(failures_max_share=0.5))
    fleet = make(4, config=config)
    fleet.devices[0].mute = True
    rollout = fleet.roll_out(fleet.model("a"), deadline_s=5)
    assert fleet.run(rollout) == "completed"
    assert fleet.counts(rollout) == {"confirmed": 3, "silent": 1}
    fleet.devices[0].mute = False
    for _ in range(5):
        fleet.act()
    assert fleet.counts(rollout) == {"confirmed": 4}


def test_old_counters_and_strange_models_are_ignored(make: Make) -> None:
    """Records of an earlier assignment arrive late by design; they say nothing about this one."""
    fleet = make(2)
    old, new = fleet.model("a"), fleet.model("b")
    fleet.run(fleet.roll_out(old))
    rollout = fleet.roll_out(new)
    fleet.step()
    device = fleet.devices[0]
    with fleet.store.begin() as session:
        for model, counter in ((new, 1), (old, 1), (old, 2), (new, 3), ("c" * 64, 2)):
            fleet.tell(session, device, "confirmed", model=model, counter=counter)
    assert fleet.rows(rollout)[device.name].state == "offered"


def test_a_newer_rollout_takes_over(make: Make) -> None:
    """One stuck rollout must not block all later ones."""
    fleet = make(6)
    first = fleet.roll_out(fleet.model("a"), waves=[2, 0])
    fleet.step()
    second = fleet.roll_out(fleet.model("b"))
    assert fleet.state(first) == "superseded"
    assert fleet.counts(first) == {"superseded": 6}
    fleet.act()  # the two canaries still say that the first one's offer came
    assert fleet.run(second) == "completed"
    assert fleet.counts(first) == {"superseded": 6}


def test_disjoint_rollouts_leave_each_other_alone(make: Make) -> None:
    """Two parts of a fleet may be updated side by side."""
    fleet = make(6)
    left = [f"d-{i:04}" for i in range(3)]
    right = [f"d-{i:04}" for i in range(3, 6)]
    first = fleet.roll_out(fleet.model("a"), device_ids=left, bake_windows=3)
    fleet.run(first, until=lambda state: state == "baking")
    second = fleet.roll_out(fleet.model("b"), device_ids=right)
    assert fleet.state(first) == "baking"
    assert fleet.run(second) == "completed"
    assert fleet.run(first, telemetry=True) == "completed"


def test_a_failing_rollout_never_calls_back_what_a_newer_one_has(make: Make) -> None:
    """Fault 70: the rollback races a newer rollout, and loses."""
    fleet = make(4)
    old, bad, new = fleet.model("a"), fleet.model("b"), fleet.model("c")
    fleet.run(fleet.roll_out(old))
    names = [device.name for device in fleet.devices]
    first = fleet.roll_out(bad, device_ids=names)
    fleet.run(first, until=lambda _: fleet.counts(first).get("confirmed", 0) >= 1)
    second = fleet.roll_out(new, device_ids=names[:2])
    fleet.step()
    fleet.rollouts.control(first, "abort") if fleet.state(first) in ("running", "baking") else None
    assert fleet.run(second) == "completed"
    for _ in range(5):
        fleet.step()
        fleet.act()
    assert [device.running for device in fleet.devices[:2]] == [new, new]
    counters: dict[str, list[int]] = {}
    for name, counter, _, _ in fleet.director.log:
        counters.setdefault(name, []).append(counter)
    assert all(seen == list(range(1, len(seen) + 1)) for seen in counters.values())


def test_a_revoked_device_is_left_out(make: Make) -> None:
    """A revoked device is neither offered anything nor counted against the model."""
    fleet = make(4)
    rollout = fleet.roll_out(fleet.model("a"), waves=[2, 0])
    with fleet.store.begin() as session:
        late = next(name for name, row in fleet.rows(rollout).items() if row.wave == 1)
        session.scalars(select(Device).where(Device.name == late)).one().revoked_ms = 1
    assert fleet.run(rollout) == "completed"
    assert fleet.counts(rollout) == {"confirmed": 3, "superseded": 1}
    assert late not in {name for name, _, _, _ in fleet.director.log}
    with pytest.raises(InvalidError, match="revoked"):
        fleet.roll_out("a" * 64, device_ids=[late])


def test_the_server_may_crash_between_any_two_steps(make: Make) -> None:
    """Fault 67: nothing that matters is in memory: no second assignment, no wave skipped."""
    fleet = make(30)
    old, new = fleet.model("a"), fleet.model("b", Behaviour(accuracy=0.6))
    assert fleet.run(fleet.roll_out(old), restart=True) == "completed"
    for _ in range(10):
        fleet.observe()
    rollout = fleet.roll_out(new, waves=[5, 0], bake_windows=2)
    assert fleet.run(rollout, telemetry=True, restart=True) == "failed"
    for _ in range(6):
        fleet.restart().step()
        fleet.act()
    assert fleet.counts(rollout) == {"eligible": 25, "reverted": 5}
    assert len(fleet.director.log) == 30 + 5 + 5


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("at", range(1, 22))
def test_a_crash_inside_a_transaction_undoes_all_of_it(
    make: Make, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die before or after the n-th assignment: the fleet ends as if nothing had happened."""
    fleet = make(5, config=RolloutConfig(gate_s=0.0, offers_per_tick_max=2))
    old, new = fleet.model("a"), fleet.model("b")
    assign, left = fleet.director.assign, [at]

    def failpoint() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Crash

    def dying(*args: Any) -> Any:
        failpoint()
        row = assign(*args)
        failpoint()
        return row

    monkeypatch.setattr(fleet.director, "assign", dying)

    def step() -> None:
        try:
            fleet.step()
        except Crash:
            fleet.restart()
            fleet.rollouts.remind()

    first = fleet.roll_out(old)
    for _ in range(15):
        step()
        fleet.act()
    assert fleet.state(first) == "completed"
    second = fleet.roll_out(new, waves=[3, 0])
    for _ in range(15):
        step()
        fleet.act()
        if fleet.rollout(second).wave == 1:
            break
    fleet.rollouts.control(second, "abort")
    for _ in range(15):
        step()
        fleet.act()
    assert {device.running for device in fleet.devices} == {old}
    with fleet.store.read() as session:
        for row in session.scalars(select(Device)):
            told = [version for name, version in fleet.published if name == row.name]
            assert max(told) == row.desired_version


def test_what_cannot_be_rolled_out_is_refused(make: Make) -> None:
    """A refusal says why, and leaves no trace."""
    fleet = make(2)
    model, raw = fleet.model("a"), fleet.model("b", approved=False)
    with pytest.raises(NotApprovedError, match="not approved"):
        fleet.roll_out(raw)
    with pytest.raises(NotFoundError, match="not registered"):
        fleet.roll_out("f" * 64)
    with pytest.raises(NotFoundError, match="d-9"):
        fleet.roll_out(model, device_ids=["d-0000", "d-9"])
    with pytest.raises(ContractError):
        fleet.roll_out(model, device_ids=["../etc"])
    with pytest.raises(InvalidError, match="canaries"):
        fleet.roll_out(model, device_ids=["d-0000"], canary_ids=["d-0001"])
    with pytest.raises(InvalidError, match="ascend"):
        fleet.roll_out(model, waves=[2, 2])
    with pytest.raises(InvalidError, match="deadline_s"):
        fleet.roll_out(model, deadline_s=10**9)
    with pytest.raises(InvalidError, match="bake_windows"):
        fleet.roll_out(model, bake_windows=10**9)
    with pytest.raises(InvalidError, match="command"):
        fleet.rollouts.control("ro-1", "explode")
    with pytest.raises(NotFoundError):
        fleet.rollouts.control("ro-1", "pause")
    assert actions(fleet) == Counter()


def test_waves_hold_each_class_in_proportion(make: Make) -> None:
    """Fault 71: a wave of only the easy devices proves nothing for the others."""
    fleet = make(40, classes=("pi", "pi", "pi", "jetson"))
    rollout = fleet.roll_out(fleet.model("a"), waves=[8, 0])
    canaries = {name for name, row in fleet.rows(rollout).items() if row.wave == 0}
    with fleet.store.read() as session:
        found = Counter(
            device.reported["state"]["class"]
            for device in session.scalars(select(Device))
            if device.name in canaries
        )
    assert found == {"pi": 6, "jetson": 2}
