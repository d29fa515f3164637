"""Properties of the two tables, and of any interleaving of events that devices and time bring."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import select

from shoal.server.rollouts import RolloutConfig
from shoal.server.rollouts.errors import IllegalEventError
from shoal.server.rollouts.states import (
    DEVICE,
    LIVE,
    ROLLOUT,
    DeviceEvent,
    DeviceState,
    RolloutEvent,
    RolloutState,
    after,
)
from shoal.server.store import audit
from shoal.server.store.tables import AssignmentRow, Device, Rollout, RolloutDevice
from tests.sims.fleet import Fleet


def test_every_state_has_a_row_and_every_end_is_final() -> None:
    """A state without a row would swallow events."""
    assert set(ROLLOUT) == set(RolloutState)
    assert set(DEVICE) == set(DeviceState)
    assert {state for state, row in ROLLOUT.items() if not row} == set(RolloutState) - LIVE


def test_every_event_is_taken_somewhere_and_every_state_reached() -> None:
    """A table that names what nothing brings about is wrong somewhere."""
    assert {event for row in ROLLOUT.values() for event in row} == set(RolloutEvent)
    assert {event for row in DEVICE.values() for event in row} == set(DeviceEvent)
    reached = {state for row in DEVICE.values() for state in row.values()}
    assert reached == set(DeviceState) - {DeviceState.ELIGIBLE}


def test_only_the_devices_own_word_confirms() -> None:
    """Faults 68, 69: nothing else may end in success."""
    ways = {
        event
        for row in DEVICE.values()
        for event, state in row.items()
        if state is DeviceState.CONFIRMED
    }
    assert ways == {DeviceEvent.CONFIRMATION_TOLD}


@pytest.mark.parametrize("state", [state for state in RolloutState if state not in LIVE])
def test_an_ended_rollout_takes_no_event(state: RolloutState) -> None:
    """What ended stays ended, and says so."""
    for event in RolloutEvent:
        with pytest.raises(IllegalEventError, match=state.value):
            after(ROLLOUT, state, event)


DEVICES = 4
INDEX = st.integers(0, DEVICES - 1)


class Interleavings(RuleBasedStateMachine):
    """Rollouts, devices, crashes and time in any order (fault 70)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        config = RolloutConfig(gate_s=0.0, offers_per_tick_max=2, bake_s_max=30.0)
        self.fleet = Fleet(Path(self.folder.name), devices=DEVICES, config=config)
        self.models = [self.fleet.model(digit) for digit in "abc"]
        self.counters = [0] * DEVICES
        self.told: list[tuple[int, str, int, str]] = []

    def teardown(self) -> None:
        """Close and remove the database."""
        self.fleet.close()
        self.folder.cleanup()

    @rule(model=st.integers(0, 2), chosen=st.sets(INDEX, max_size=4), first=st.integers(1, 3))
    def create(self, model: int, chosen: set[int], first: int) -> None:
        """Make a rollout for some devices, or for all."""
        names = [self.fleet.devices[i].name for i in sorted(chosen)]
        self.fleet.roll_out(self.models[model], device_ids=names, waves=[first, 0], deadline_s=20)

    @rule(command=st.sampled_from(["pause", "resume", "abort"]), pick=st.integers(0, 99))
    def control(self, command: str, pick: int) -> None:
        """Give the operator's command to some rollout; a refusal changes nothing."""
        with self.fleet.store.read() as session:
            ids = session.scalars(select(Rollout.id).order_by(Rollout.id)).all()
        if ids:
            with contextlib.suppress(IllegalEventError):
                self.fleet.rollouts.control(ids[pick % len(ids)], command)

    @rule(seconds=st.sampled_from([1.0, 10.0, 40.0]))
    def step(self, seconds: float) -> None:
        """Let time pass and the server step."""
        self.fleet.step(seconds=seconds)

    @rule()
    def crash(self) -> None:
        """Let the server forget all that it did not store."""
        self.fleet.restart()

    @rule(i=INDEX)
    def act(self, i: int) -> None:
        """Let a device take its next step."""
        self.fleet.act([self.fleet.devices[i]])

    @rule(i=INDEX, state=st.sampled_from(["downloading", "trial", "confirmed", "failed"]))
    def say(self, i: int, state: str) -> None:
        """Let a device say anything about what it was assigned last."""
        device = self.fleet.devices[i]
        with self.fleet.store.begin() as session:
            row = session.get(AssignmentRow, device.id)
            if row is not None:
                told = (i, state, row.counter, row.model_sha256)
                self.told.append(told)
                self.fleet.tell(session, device, state, model=told[3], counter=told[2])

    @rule(pick=st.integers(0, 99))
    def repeat(self, pick: int) -> None:
        """Let an old record arrive again, however late."""
        if self.told:
            i, state, counter, model = self.told[pick % len(self.told)]
            with self.fleet.store.begin() as session:
                device = self.fleet.devices[i]
                self.fleet.tell(session, device, state, model=model, counter=counter)

    @invariant()
    def holds(self) -> None:
        """Counters only grow; states are of the tables; a device is in one open rollout."""
        with self.fleet.store.read() as session:
            for i, device in enumerate(self.fleet.devices):
                row = session.get(AssignmentRow, device.id)
                counter = row.counter if row else 0
                assert counter >= self.counters[i]
                assert session.get_one(Device, device.id).desired_version == counter
                self.counters[i] = counter
            seen = [(name, counter) for name, counter, _, _ in self.fleet.director.log]
            assert len(seen) == len(set(seen))
            rows = session.execute(
                select(RolloutDevice, Rollout.state).join(
                    Rollout, Rollout.id == RolloutDevice.rollout_id
                )
            ).all()
            busy = [
                row.device_id
                for row, state in rows
                if state in LIVE and row.state in ("eligible", "offered", "downloading", "trial")
            ]
            assert len(busy) == len(set(busy))
            for progress, state in rows:
                assert progress.state in set(DeviceState)
                assert state in set(RolloutState)
                assert (progress.offered_ms is not None) or progress.state in (
                    "eligible",
                    "superseded",
                )
            offers = [
                (name, sha256, rollout) for name, _, sha256, rollout in self.fleet.director.log
            ]
            assert len(offers) == len(set(offers))
            audit.verify(session)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
