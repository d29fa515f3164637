"""A fleet in memory: devices that follow the rollout protocol, well or badly, without a network.

The server's side is the real thing: a database, the real rollouts with their real tables. A
device is what its records say: the sim reads assignments as a device would over gRPC, and hands
UPDATE and REPORTED bodies and telemetry windows in as ingest would, in a write transaction.
Time is a number that moves when the test says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import Session

from shoal.proto import latency
from shoal.server.rollouts import RolloutConfig, Rollouts
from shoal.server.store.tables import (
    AssignmentRow,
    Device,
    Labels,
    Model,
    Rollout,
    RolloutDevice,
    Stream,
    Window,
)
from tests.sims.stores import fresh_store

START_MS = 1_800_000_000_000


@dataclass(frozen=True)
class Behaviour:
    """How a model does on a device."""

    accuracy: float = 0.9
    error_share: float = 0.0
    latency_us: float = 100.0


@dataclass
class SimDevice:
    """One device, as its own state."""

    name: str
    id: int
    stream: int
    mute: bool = False
    """It never answers."""
    rejects: frozenset[str] = frozenset()
    """Digests that it gives up in the trial."""
    counter: int = 0
    running: str = ""
    step: str = "idle"
    windows: int = 0


class SimDirector:
    """Assigns without a signature, as the database sees it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, str, str]] = []
        """(device, counter, digest, rollout) of each assignment."""

    def assign(
        self, session: Session, device: Device, model: Model, rollout_id: str
    ) -> AssignmentRow:
        """Assign; the counter grows."""
        assert device.revoked_ms is None
        assert model.approved_ms is not None
        row = session.get(AssignmentRow, device.id)
        if row is None:
            row = AssignmentRow(device_id=device.id, counter=0)
            session.add(row)
        row.counter += 1
        row.rollout_id, row.model_sha256 = rollout_id, model.sha256
        row.payload, row.signature, row.issued_ms = b"{}", b"", 0
        device.desired_version += 1
        session.flush()
        self.log.append((device.name, row.counter, model.sha256, rollout_id))
        return row


def _unsynced(connection: Any, _record: Any) -> None:
    """A story makes thousands of commits; what a power cut does is another test's business."""
    connection.execute("PRAGMA synchronous=OFF")


class Fleet:
    """The server's rollouts and the devices under them."""

    def __init__(
        self,
        root: Path,
        *,
        devices: int,
        config: RolloutConfig | None = None,
        seed: int = 0,
        classes: Sequence[str] = ("",),
        brief: bool = False,
    ) -> None:
        """Make a fleet; ``brief`` devices tell the outcome of an update and not its steps."""
        self.brief = brief
        self.now_ms = START_MS
        self.random = random.Random(seed)
        self.store = fresh_store(root / "fleet.db")
        event.listen(self.store.engine, "connect", _unsynced)
        self.director = SimDirector()
        self.config = config or RolloutConfig(gate_s=0.0)
        self.published: list[tuple[str, int]] = []
        self.rollouts = self.restart()
        self.behaviours: dict[str, Behaviour] = {}
        self.devices: list[SimDevice] = []
        with self.store.begin() as session:
            rows = [
                Device(
                    name=f"d-{i:04}",
                    created_ms=START_MS,
                    online=True,
                    seen_ms=START_MS,
                    reported={"state": {"class": classes[i % len(classes)]}},
                )
                for i in range(devices)
            ]
            session.add_all(rows)
            session.flush()
            streams = [
                Stream(device_id=row.id, stream=row.id.to_bytes(16, "big"), first_ms=START_MS)
                for row in rows
            ]
            session.add_all(streams)
            session.flush()
            self.devices = [
                SimDevice(row.name, row.id, stream.id)
                for row, stream in zip(rows, streams, strict=True)
            ]

    def restart(self) -> Rollouts:
        """Give up the server's memory, as a crash does; what is in the database stays."""
        self.rollouts = Rollouts(
            self.store,
            self.director,
            clock=lambda: self.now_ms,
            publish_desired=lambda name, version: self.published.append((name, version)),
            config=self.config,
        )
        return self.rollouts

    def close(self) -> None:
        """Close the database."""
        self.store.close()

    def model(
        self, digit: str, behaviour: Behaviour | None = None, *, approved: bool = True
    ) -> str:
        """Register a model whose digest is one digit repeated, and return the digest."""
        sha256 = digit * 64
        self.behaviours[sha256] = behaviour or Behaviour()
        with self.store.begin() as session:
            session.add(
                Model(
                    name="m", version=int(digit, 16) + 1, sha256=sha256, size=1,
                    created_ms=self.now_ms, manifest={}, profile={},
                    approved_ms=self.now_ms if approved else None,
                )
            )  # fmt: skip
        return sha256

    # --- devices -----------------------------------------------------------------------------

    def act(self, devices: Sequence[SimDevice] | None = None) -> None:
        """Let devices take one step towards what they are assigned."""
        with self.store.begin() as session:
            known = session.scalars(select(Device)).all()  # one query, and get() finds them
            assigned = {row.device_id: row for row in session.scalars(select(AssignmentRow))}
            assert len(known) == len(self.devices)
            for device in self.devices if devices is None else devices:
                if not device.mute and device.id in assigned:
                    self._act(session, device, assigned[device.id])

    def _act(self, session: Session, device: SimDevice, assigned: AssignmentRow) -> None:
        if assigned.counter > device.counter:
            device.counter, device.step = assigned.counter, "offered"
        elif device.step == "offered":
            device.step = "downloading"
        elif device.step == "downloading":
            device.step = "trial"
        elif device.step == "trial":
            bad = assigned.model_sha256 in device.rejects
            device.step = "failed" if bad else "confirmed"
            if not bad:
                device.running = assigned.model_sha256
        else:
            return
        if device.step in ("confirmed", "failed") or not self.brief:
            self.tell(session, device, device.step, model=assigned.model_sha256)

    def tell(
        self,
        session: Session,
        device: SimDevice,
        state: str,
        *,
        model: str,
        counter: int | None = None,
    ) -> None:
        """Hand in an UPDATE record."""
        row = session.get_one(Device, device.id)
        row.seen_ms = self.now_ms
        body = {
            "rollout": "", "counter": device.counter if counter is None else counter,
            "model": model, "state": state, "reason": "it was slow" if state == "failed" else "",
        }  # fmt: skip
        self.rollouts.on_update(session, row, body)

    def report(self, device: SimDevice, *, stale: bool = False) -> None:
        """Hand in a REPORTED record of what the device runs."""
        with self.store.begin() as session:
            row = session.get_one(Device, device.id)
            body: dict[str, Any] = {
                "version": self.now_ms, "model": device.running, "desired": row.desired_version,
                "agent": "0", "rss_bytes": 0, "state": {},
            }  # fmt: skip
            if not stale:
                row.reported, row.seen_ms = body, self.now_ms
            self.rollouts.on_reported(session, row, body)

    def observe(self, *, predictions: int = 100, split: int = 2) -> None:
        """Let each device that runs a model send one telemetry window and its labels."""
        with self.store.begin() as session:
            for device in self.devices:
                if device.running and not device.mute:
                    self._window(session, device, predictions, split)

    def _window(self, session: Session, device: SimDevice, predictions: int, split: int) -> None:
        does = self.behaviours[device.running]
        device.windows += 1
        errors = sum(self.random.random() < does.error_share for _ in range(predictions))
        histogram = [0] * latency.BINS
        for _ in range(predictions - errors):
            histogram[latency.bin_of(does.latency_us * self.random.lognormvariate(0, 0.2))] += 1
        right = sum(self.random.random() < does.accuracy for _ in range(predictions - errors))
        session.add(
            Window(
                device_id=device.id, stream_id=device.stream, model_sha256=device.running,
                number=device.windows, device_start_ms=0, device_end_ms=0, received_ms=self.now_ms,
                predictions=predictions - errors, errors=errors, classes=[],
                latency_us=histogram, sketch=b"",
            )
        )  # fmt: skip
        session.add(
            Labels(
                device_id=device.id, stream_id=device.stream,
                seq=device.windows, model_sha256=device.running,
                number=device.windows, split=split, received_ms=self.now_ms,
                labelled=predictions - errors, correct=right, confusion=[],
            )
        )  # fmt: skip
        session.get_one(Device, device.id).seen_ms = self.now_ms

    # --- running -----------------------------------------------------------------------------

    def step(self, *, seconds: float = 1.0) -> None:
        """Let time pass, then let the server step."""
        self.now_ms += int(1000 * seconds)
        self.rollouts.step()

    def run(
        self,
        rollout_id: str,
        *,
        until: Callable[[str], bool] = lambda state: state not in ("running", "baking"),
        steps_max: int = 200,
        telemetry: bool = False,
        restart: bool = False,
        seconds: float = 1.0,
    ) -> str:
        """Go on until the rollout is in such a state, and return it.

        Args:
            rollout_id: The rollout.
            until: Which states end it.
            steps_max: More are a failure.
            telemetry: Devices send a window per step.
            restart: The server forgets everything before every step.
            seconds: Time between two steps.
        """
        for _ in range(steps_max):
            if restart:
                self.restart()
            self.step(seconds=seconds)
            self.act()
            if telemetry:
                self.observe()
            if until(state := self.state(rollout_id)):
                return state
        raise AssertionError(
            f"{rollout_id} is still {self.state(rollout_id)}: {self.counts(rollout_id)}"
        )

    def roll_out(self, sha256: str, **settings: Any) -> str:
        """Create a rollout and return its id."""
        return self.rollouts.create(sha256, **settings)

    def state(self, rollout_id: str) -> str:
        """Return the state of a rollout."""
        with self.store.read() as session:
            return session.get_one(Rollout, rollout_id).state

    def rollout(self, rollout_id: str) -> Rollout:
        """Return the row of a rollout."""
        with self.store.read() as session:
            return session.get_one(Rollout, rollout_id)

    def rows(self, rollout_id: str) -> dict[str, RolloutDevice]:
        """Return the rows of a rollout's devices, by id."""
        with self.store.read() as session:
            found = session.execute(
                select(Device.name, RolloutDevice)
                .join(Device, Device.id == RolloutDevice.device_id)
                .where(RolloutDevice.rollout_id == rollout_id)
            )
            return {name: row for name, row in found}

    def counts(self, rollout_id: str) -> dict[str, int]:
        """Return the devices of a rollout by state."""
        found: dict[str, int] = {}
        for row in self.rows(rollout_id).values():
            found[row.state] = found.get(row.state, 0) + 1
        return found
