"""Run rollouts: create, offer wave after wave, judge, go on or go back.

All state is in the database. A step reads it, decides by the tables of ``states.py`` and the
rules of ``gates.py``, and writes the result in one transaction, so a crash anywhere leaves a
state from which the next step goes on; nothing is remembered in between that matters.

    Invariants: a device has one assignment, the newest; its counter only grows. A device is
    called back only while its assignment is this rollout's: a newer rollout wins every race.
    Within a rollout a device is assigned the model at most once.

Not here: signing (trust/director.py), delivery (api), the MQTT connection (ingest).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from ...proto.names import check_digest, check_name
from ..errors import InvalidError, NotFoundError, StoreError
from ..store import Store, audit
from ..store.tables import AssignmentRow, Device, Model, Rollout, RolloutDevice
from . import evidence, gates, plan, rows
from .config import RolloutConfig
from .errors import IllegalEventError, NotApprovedError
from .gates import Verdict
from .states import (
    DEVICE,
    LIVE,
    OPEN,
    ROLLOUT,
    WAITING,
    DeviceEvent,
    DeviceState,
    RolloutEvent,
    RolloutState,
    after,
)

_log = logging.getLogger(__name__)

TOLD: Final[Mapping[str, DeviceEvent]] = {
    "downloading": DeviceEvent.DOWNLOAD_TOLD,
    "verified": DeviceEvent.DOWNLOAD_TOLD,
    "trial": DeviceEvent.TRIAL_TOLD,
    "confirmed": DeviceEvent.CONFIRMATION_TOLD,
    "failed": DeviceEvent.FAILURE_TOLD,
}
"""What the states of an UPDATE record mean; "offered" only says that the offer arrived."""
COMMANDS: Final[Mapping[str, RolloutEvent]] = {
    "pause": RolloutEvent.PAUSED,
    "resume": RolloutEvent.RESUMED,
    "abort": RolloutEvent.ABORTED,
}
STEPS_MAX: Final = 1000  # per call of step(): a bound on a loop that ends after a few


class Director(Protocol):
    """Who signs assignments."""

    def assign(
        self, session: Session, device: Device, model: Model, rollout_id: str
    ) -> AssignmentRow:
        """Assign a model within the caller's transaction: counter + 1, desired_version + 1."""


@dataclass(slots=True)
class _Judged:
    """A verdict made from a reading, to be written if the rollout is still where it was."""

    wave: int
    entry: dict[str, Any]


class Rollouts:
    """The rollouts of a fleet. Methods are thread-safe; :meth:`run` is for one event loop."""

    def __init__(
        self,
        store: Store,
        director: Director,
        *,
        clock: Callable[[], int],
        publish_desired: Callable[[str, int], None],
        config: RolloutConfig | None = None,
    ) -> None:
        """Take what rollouts need; nothing is read yet.

        Args:
            store: The database.
            director: Signs assignments.
            clock: Unix ms.
            publish_desired: Tells a device, by id, the version of its desired state. Called after
                the commit; must not block, and may fail to reach the device.
            config: Pace and limits.
        """
        self._store, self._director, self._clock = store, director, clock
        self._publish, self._config = publish_desired, config or RolloutConfig()
        self._judged_ms: dict[str, int] = {}  # pace only: after a restart a wave is judged at once
        self._back: dict[str, int] = {}  # ended rollout -> last of its device rows called back
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    # --- the operator ------------------------------------------------------------------------

    def create(
        self,
        sha256: str,
        *,
        device_ids: Sequence[str] = (),
        waves: Sequence[int] = (),
        canary_ids: Sequence[str] = (),
        bake_windows: int = 0,
        deadline_s: int = 0,
    ) -> str:
        """Make a rollout and return its id; the first offers go out with the next step.

        The set of devices is fixed now. Devices that an older rollout has not finished with are
        taken over from it.

        Args:
            sha256: A registered and approved bundle.
            device_ids: Devices; none = all that are enrolled and not revoked.
            waves: Cumulative device counts, ascending; a last 0 = all; none = one wave.
            canary_ids: Devices that come first.
            bake_windows: Telemetry windows that each device of a wave reports with the new model
                before the gate compares it; 0 = the gate counts confirmations only.
            deadline_s: Per device, s, from its offer; 0 = the configured default.

        Raises:
            NotFoundError: The model or a device does not exist.
            NotApprovedError: The model is not approved.
            InvalidError: The waves or bounds are not acceptable, or there is no device.
        """
        check_digest(sha256)
        config = self._config
        deadline_s = deadline_s or config.deadline_s
        if not 1 <= deadline_s <= config.deadline_s_max:
            raise InvalidError(f"deadline_s must be 1 to {config.deadline_s_max} s")
        if not 0 <= bake_windows <= config.bake_windows_max:
            raise InvalidError(f"bake_windows must be 0 to {config.bake_windows_max}")
        for name in (*device_ids, *canary_ids):
            check_name(name)
        rollout_id, now_ms = f"ro-{secrets.token_hex(6)}", self._clock()
        with self._store.begin() as session:
            model = session.scalars(select(Model).where(Model.sha256 == sha256)).first()
            if model is None:
                raise NotFoundError(
                    f"model {sha256[:12]} is not registered", hint="shoal models add"
                )
            if model.approved_ms is None:
                raise NotApprovedError(
                    f"model {model.name} version {model.version} is not approved",
                    hint=f"look at its evidence, then: shoal models approve {sha256[:12]}",
                )
            devices = rows.find_devices(session, device_ids)
            steps = plan.waves_of(waves, devices=len(devices), waves_max=config.waves_max)
            groups = {name: rows.class_of(device) for name, device in devices.items()}
            wave_of = plan.assign_waves(groups, steps, canaries=canary_ids, seed=rollout_id)
            ids = [device.id for device in devices.values()]
            self._take_over(session, ids, rollout_id, now_ms)
            session.add(
                Rollout(
                    id=rollout_id,
                    model_sha256=sha256,
                    state=RolloutState.RUNNING,
                    wave=0,
                    waves=steps,
                    bake_windows=bake_windows,
                    deadline_s=deadline_s,
                    created_ms=now_ms,
                    changed_ms=now_ms,
                    reason="",
                    evidence=[],
                )
            )
            session.flush()
            session.add_all(
                RolloutDevice(
                    rollout_id=rollout_id,
                    device_id=devices[name].id,
                    wave=wave,
                    state=DeviceState.ELIGIBLE,
                    reason="",
                    offered_ms=None,
                    changed_ms=now_ms,
                )
                for name, wave in wave_of.items()
            )
            self._audit(
                session,
                "rollout.created",
                rollout_id,
                {
                    "model_sha256": sha256,
                    "devices": len(devices),
                    "waves": steps,
                    "bake_windows": bake_windows,
                    "deadline_s": deadline_s,
                },
                actor="operator",
            )
        self.poke()
        return rollout_id

    def control(self, rollout_id: str, command: str) -> str:
        """Pause, resume or abort a rollout, and return its state.

        Resuming a rollout that was paused for want of evidence accepts what evidence there is.
        Aborting one brings its devices back to the model that each confirmed before.

        Args:
            rollout_id: The rollout.
            command: pause, resume or abort.

        Raises:
            NotFoundError: There is no such rollout.
            InvalidError: The command is unknown.
            IllegalEventError: The rollout's state does not allow it.
        """
        if command not in COMMANDS:
            raise InvalidError(f"rollout command {command!r:.20} is unknown")
        with self._store.begin() as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None:
                raise NotFoundError(
                    f"there is no rollout {rollout_id!r:.80}", hint="shoal rollouts list"
                )
            self._fire(rollout, COMMANDS[command], reason="" if command == "resume" else "operator")
            if command == "resume":
                rows.accept(rollout)
            self._audit(session, f"rollout.{COMMANDS[command]}", rollout_id, actor="operator")
            state = rollout.state
        self.poke()
        return state

    # --- what devices say, within ingest's transaction -----------------------------------------

    def on_update(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Take an UPDATE record; one that is late, repeated or of another assignment is ignored.

        Args:
            session: Ingest's open write transaction.
            device: Who said it.
            body: Checked body of the record.
        """
        found, event = rows.progress_of(session, device.id), TOLD.get(body["state"])
        if found is None or event is None:
            return
        assignment, row, model_sha256 = found
        if (body["counter"], body["model"]) != (assignment.counter, assignment.model_sha256):
            return
        if assignment.model_sha256 != model_sha256:  # it is on its way back
            if event is not DeviceEvent.CONFIRMATION_TOLD:
                if event is DeviceEvent.FAILURE_TOLD:
                    row.reason = f"could not go back: {body['reason']}"[:500]
                return
            event = DeviceEvent.RETURN_TOLD
        if self._tell(session, row, device, event, reason=str(body["reason"])):
            self.poke()

    def on_reported(self, session: Session, device: Device, body: Mapping[str, Any]) -> None:
        """Take a REPORTED record: a device that confirmed, and runs another model, fell back.

        Args:
            session: Ingest's open write transaction, after ``device.reported`` was brought up to
                date: a report that is not the newest says nothing about now.
            device: Who said it.
            body: Checked body of the record.
        """
        newest = device.reported
        if newest.get("version") != body["version"] or newest.get("model") != body["model"]:
            return
        found = rows.progress_of(session, device.id)
        if found is None or body["desired"] < device.desired_version:
            return
        assignment, row, _ = found
        # No model says nothing: at its start a device has not loaded one yet, and one that has no
        # valid model tells so by an event.
        if body["model"] in ("", assignment.model_sha256):
            return
        if row.state != DeviceState.CONFIRMED:
            return
        reason = f"fell back: it runs {body['model'][:12]}"
        if self._tell(session, row, device, DeviceEvent.FAILURE_TOLD, reason=reason):
            self.poke()

    def _tell(
        self,
        session: Session,
        row: RolloutDevice,
        device: Device,
        event: DeviceEvent,
        *,
        reason: str,
    ) -> bool:
        """Move a device's row; return whether it moved."""
        try:
            state = after(DEVICE, DeviceState(row.state), event)
        except IllegalEventError:
            return False  # told twice, or out of order: what is known says more
        if state is row.state:
            return False
        row.state, row.reason, row.changed_ms = state, reason[:500], self._clock()
        if state in (DeviceState.CONFIRMED, DeviceState.FAILED, DeviceState.REVERTED):
            self._audit(
                session,
                f"device.{state}",
                device.name,
                {"rollout": row.rollout_id, "reason": row.reason},
                actor=f"device:{device.name}",
            )
        return True

    # --- the component -----------------------------------------------------------------------

    async def run(self) -> None:
        """Step at every tick and whenever a device told something, until cancelled."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.remind)
            while True:
                self._wake.clear()
                try:
                    await asyncio.to_thread(self.step)
                except StoreError:
                    _log.exception("a step of the rollouts failed; the next tick tries again")
                try:
                    async with asyncio.timeout(self._config.tick_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._loop = None

    def poke(self) -> None:
        """Let :meth:`run` step soon. Thread-safe; does nothing when it does not run."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._wake.set)

    def remind(self) -> None:
        """Publish the desired version of every device that has not come to an end yet.

        A crash may have come between the commit of an offer and its publishing.
        """
        with self._store.read() as session:
            found = session.execute(
                select(Device.name, Device.desired_version)
                .join(RolloutDevice, RolloutDevice.device_id == Device.id)
                .where(RolloutDevice.state.in_((*WAITING, DeviceState.REVERTING)))
                .distinct()
            ).all()
        for name, version in found:
            self._publish(name, version)

    def step(self) -> None:
        """Bring every rollout as far as it goes now.

        Raises:
            StoreError: The database failed; what was committed stands, the rest comes next time.
        """
        with self._store.read() as session:
            ids = session.scalars(
                select(Rollout.id)
                .where(Rollout.state.in_((RolloutState.RUNNING, RolloutState.BAKING)))
                .order_by(Rollout.created_ms, Rollout.id)
            ).all()
        for rollout_id in ids:
            for _ in range(STEPS_MAX):
                if not self._advance(rollout_id):
                    break
        with self._store.read() as session:
            ended = session.scalars(
                select(Rollout.id)
                .join(AssignmentRow, AssignmentRow.rollout_id == Rollout.id)
                .where(
                    Rollout.state.in_((RolloutState.FAILED, RolloutState.ABORTED)),
                    AssignmentRow.model_sha256 == Rollout.model_sha256,
                )
                .distinct()
            ).all()
        for rollout_id in ended:
            while self._call_back(rollout_id):
                pass

    def _advance(self, rollout_id: str) -> bool:
        """Do one transaction's worth; return whether there may be more to do at once."""
        judged = self._judge(rollout_id)
        notices: list[tuple[str, int]] = []
        with self._store.begin() as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None:
                return False
            if rollout.state == RolloutState.RUNNING:
                again = self._run_wave(session, rollout, notices)
            elif rollout.state == RolloutState.BAKING:
                again = self._bake_wave(session, rollout, judged)
            else:
                again = False
        for name, version in notices:
            self._publish(name, version)
        return again

    def _run_wave(self, session: Session, rollout: Rollout, notices: list[tuple[str, int]]) -> bool:
        now_ms = self._clock()
        offered = self._offer(session, rollout, notices, now_ms)
        self._silence(session, rollout, now_ms)
        session.flush()
        counts = evidence.counts(session, rollout, wave=rollout.wave)
        entry = gates.judge(counts, None, self._config.gate)
        if entry["verdict"] == Verdict.FAIL:
            self._fail(session, rollout, entry)
            return False
        if not any(counts.get(state) for state in OPEN):
            self._fire(rollout, RolloutEvent.WAVE_SETTLED)
            return True
        return offered == self._config.offers_per_tick_max

    def _offer(
        self, session: Session, rollout: Rollout, notices: list[tuple[str, int]], now_ms: int
    ) -> int:
        """Assign the model to devices of the wave that wait for it; return how many were seen."""
        waiting = session.execute(
            select(RolloutDevice, Device)
            .join(Device, Device.id == RolloutDevice.device_id)
            .where(
                RolloutDevice.rollout_id == rollout.id,
                RolloutDevice.wave == rollout.wave,
                RolloutDevice.state == DeviceState.ELIGIBLE,
            )
            .order_by(RolloutDevice.id)
            .limit(self._config.offers_per_tick_max)
        ).all()
        if not waiting:
            return 0
        model = session.scalars(select(Model).where(Model.sha256 == rollout.model_sha256)).one()
        assigned = {}
        for row, device in waiting:
            event = DeviceEvent.ASSIGNED if device.revoked_ms is None else DeviceEvent.TAKEN_OVER
            row.state, row.changed_ms = after(DEVICE, DeviceState(row.state), event), now_ms
            if event is DeviceEvent.TAKEN_OVER:
                row.reason = "the device was revoked"
                continue
            assignment = self._director.assign(session, device, model, rollout.id)
            row.offered_ms = now_ms
            assigned[device.name] = assignment.counter
            notices.append((device.name, device.desired_version))
        self._audit(session, "rollout.offered", rollout.id, {"counters": assigned})
        return len(waiting)

    def _silence(self, session: Session, rollout: Rollout, now_ms: int) -> None:
        """Give up devices whose deadline passed; most ticks find none."""
        late = session.scalars(
            select(RolloutDevice).where(
                RolloutDevice.rollout_id == rollout.id,
                RolloutDevice.state.in_(WAITING),
                RolloutDevice.offered_ms <= now_ms - 1000 * rollout.deadline_s,
            )
        )
        for row in late:
            reached = row.state
            row.state = after(DEVICE, DeviceState(reached), DeviceEvent.DEADLINE_PASSED)
            row.reason = f"last heard of as {reached}, {rollout.deadline_s} s after the offer"
            row.changed_ms = now_ms

    # --- judging -----------------------------------------------------------------------------

    def _judge(self, rollout_id: str) -> _Judged | None:
        """Judge a baking wave from one reading, outside of the write lock; None = not yet."""
        config, now_ms = self._config, self._clock()
        last_ms = self._judged_ms.get(rollout_id)
        if last_ms is not None and 0 <= now_ms - last_ms < 1000 * config.gate_s:
            return None
        with self._store.read() as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None or rollout.state != RolloutState.BAKING:
                return None
            self._judged_ms[rollout_id] = now_ms
            wave = rollout.wave
            counts = evidence.counts(session, rollout, wave=wave)
            if not rollout.bake_windows:
                return _Judged(wave, gates.judge(counts, None, config.gate))
            windows = evidence.windows_since_offer(session, rollout, wave=wave)
            if any(count < rollout.bake_windows for count in windows.values()):
                return None
            observed = evidence.observe(
                session, rollout, wave=wave, windows_max=config.gate.windows_max
            )
        return _Judged(wave, gates.judge(counts, observed, config.gate))

    def _bake_wave(self, session: Session, rollout: Rollout, judged: _Judged | None) -> bool:
        now_ms = self._clock()
        self._silence_baking(session, rollout, now_ms)
        session.flush()
        counts = evidence.counts(session, rollout, wave=rollout.wave)
        own = gates.judge(counts, None, self._config.gate)
        if own["verdict"] == Verdict.FAIL:
            self._fail(session, rollout, own)
            return False
        entry = judged.entry if judged and judged.wave == rollout.wave else None
        if entry is not None:
            rows.note(rollout, {**entry, "at_ms": now_ms, "accepted": rows.is_accepted(rollout)})
            if entry["verdict"] == Verdict.FAIL:
                self._fail(session, rollout, entry)
                return False
        if rows.is_accepted(rollout) or (entry is not None and entry["verdict"] == Verdict.PASS):
            return self._pass(session, rollout)
        if now_ms - rollout.changed_ms > 1000 * self._config.bake_s_max:
            self._fire(
                rollout,
                RolloutEvent.EVIDENCE_LACKED,
                reason="the evidence is insufficient; resume to accept it, or abort",
            )
            rows.note_lack(rollout, own, now_ms)
            self._audit(session, "rollout.evidence_lacked", rollout.id, {"wave": rollout.wave})
        return False

    def _silence_baking(self, session: Session, rollout: Rollout, now_ms: int) -> None:
        """Give up devices of the wave that confirmed and were not heard of for a deadline."""
        since_ms = now_ms - 1000 * rollout.deadline_s
        for row in session.scalars(
            select(RolloutDevice)
            .join(Device, Device.id == RolloutDevice.device_id)
            .where(
                RolloutDevice.rollout_id == rollout.id,
                RolloutDevice.wave == rollout.wave,
                RolloutDevice.state == DeviceState.CONFIRMED,
                RolloutDevice.changed_ms <= since_ms,
                func.coalesce(Device.seen_ms, 0) <= since_ms,
            )
        ):
            row.state = after(DEVICE, DeviceState(row.state), DeviceEvent.DEADLINE_PASSED)
            row.reason = f"confirmed, then not heard of for {rollout.deadline_s} s"
            row.changed_ms = now_ms

    def _pass(self, session: Session, rollout: Rollout) -> bool:
        last = rollout.wave == len(rollout.waves) - 1
        detail = {"wave": rollout.wave, "evidence": rows.entry_of(rollout)}
        self._fire(rollout, RolloutEvent.LAST_WAVE_PASSED if last else RolloutEvent.WAVE_PASSED)
        if not last:
            rollout.wave += 1
        self._audit(session, "rollout.wave_passed", rollout.id, detail)
        return not last

    def _fail(self, session: Session, rollout: Rollout, entry: dict[str, Any]) -> None:
        rows.note(rollout, {**entry, "at_ms": self._clock(), "accepted": False})
        failed = [check["text"] for check in entry["checks"] if check["verdict"] == Verdict.FAIL]
        self._fire(rollout, RolloutEvent.GATE_FAILED, reason="; ".join(failed)[:500])
        self._audit(
            session,
            "rollout.failed",
            rollout.id,
            {"wave": rollout.wave, "evidence": rows.entry_of(rollout)},
        )

    # --- going back --------------------------------------------------------------------------

    def _call_back(self, rollout_id: str) -> bool:
        """Assign the model of before to some devices of an ended rollout; return if more are left.

        Each is then no longer assigned this rollout's model, so a crash in between is harmless.
        """
        notices: list[tuple[str, int]] = []
        limit = self._config.offers_per_tick_max
        with self._store.begin() as session:
            rollout = session.get(Rollout, rollout_id)
            assert rollout is not None
            members = session.execute(
                select(RolloutDevice, Device)
                .join(Device, Device.id == RolloutDevice.device_id)
                .join(AssignmentRow, AssignmentRow.device_id == RolloutDevice.device_id)
                .where(
                    RolloutDevice.rollout_id == rollout_id,
                    AssignmentRow.rollout_id == rollout_id,
                    AssignmentRow.model_sha256 == rollout.model_sha256,
                    RolloutDevice.id > self._back.get(rollout_id, 0),
                )
                .order_by(RolloutDevice.id)
                .limit(limit)
            ).all()
            if not members:
                return False
            before = evidence.previous(session, rollout_id, [device.id for _, device in members])
            models = {
                model.sha256: model
                for model in session.scalars(
                    select(Model).where(Model.sha256.in_(set(before.values())))
                )
            }
            # A device without a model to go back to keeps what it has.
            assigned = {}
            for row, device in members:
                if device.id not in before or device.revoked_ms is not None:
                    continue
                model = models[before[device.id]]
                assignment = self._director.assign(session, device, model, rollout_id)
                assigned[device.name] = assignment.counter
                notices.append((device.name, device.desired_version))
                if DeviceEvent.CALLED_BACK in DEVICE[DeviceState(row.state)]:
                    state = after(DEVICE, DeviceState(row.state), DeviceEvent.CALLED_BACK)
                    row.state, row.changed_ms = state, self._clock()
                    row.reason = f"goes back to {model.name} version {model.version}"
            if assigned:
                self._audit(session, "rollout.called_back", rollout_id, {"counters": assigned})
        for name, version in notices:
            self._publish(name, version)
        self._back[rollout_id] = members[-1][0].id
        return len(members) == limit

    def _take_over(self, session: Session, device_ids: Sequence[int], by: str, now_ms: int) -> None:
        """End the business of older rollouts with these devices."""
        takes = [state for state, events in DEVICE.items() if DeviceEvent.TAKEN_OVER in events]
        for i in range(0, len(device_ids), evidence.IDS_MAX):
            session.execute(
                update(RolloutDevice)
                .where(
                    RolloutDevice.device_id.in_(device_ids[i : i + evidence.IDS_MAX]),
                    RolloutDevice.state.in_(takes),
                )
                .values(
                    state=DeviceState.SUPERSEDED, reason=f"taken over by {by}", changed_ms=now_ms
                )
            )
        taken = set(device_ids)
        for rollout in session.scalars(select(Rollout).where(Rollout.state.in_(LIVE))):
            members = session.execute(
                select(RolloutDevice.device_id, RolloutDevice.state, RolloutDevice.wave).where(
                    RolloutDevice.rollout_id == rollout.id
                )
            ).all()
            # What it still has to do: bring devices to an end, and judge the wave in progress.
            left = any(
                state in OPEN
                or (state == DeviceState.CONFIRMED and wave == rollout.wave and device not in taken)
                for device, state, wave in members
            )
            if not left and any(device in taken for device, _, _ in members):
                self._fire(rollout, RolloutEvent.TAKEN_OVER, reason=f"taken over by {by}")
                self._audit(session, "rollout.superseded", rollout.id, {"by": by})

    def _fire(self, rollout: Rollout, event: RolloutEvent, *, reason: str = "") -> None:
        rollout.state = after(ROLLOUT, RolloutState(rollout.state), event)
        rollout.reason, rollout.changed_ms = reason, self._clock()
        self._judged_ms.pop(rollout.id, None)

    def _audit(
        self,
        session: Session,
        action: str,
        subject: str,
        detail: Mapping[str, Any] | None = None,
        *,
        actor: str = "server",
    ) -> None:
        audit.append(
            session,
            now_ms=self._clock(),
            actor=actor,
            action=action,
            subject=subject,
            detail=detail,
        )
