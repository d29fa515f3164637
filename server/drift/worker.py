"""Fold new windows into the detectors' states, judge the fleet, open and resolve alerts.

    window, labels rows --fold--> drift_state --judge, over all devices of a model--> alert

A row is folded once: it is marked in the same transaction that stores the state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...ext.sketch import SketchBank, SketchRecordError
from ..store import Store
from ..store.tables import Alert, Device, DriftState, Labels, Model, RoundsRun, Task, Window
from . import detectors
from .detectors import DeviceState, DriftConfig, Finding
from .errors import ProfileError
from .profile import ReferenceProfile, with_devices

log = logging.getLogger(__name__)

TRAIN_SPLIT = 0
TAUGHT_WINDOWS_MAX = 64  # per device: enough for its bins, and little to read


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftWorkerConfig:
    """How the worker runs."""

    tick_s: float = 1.0
    """New windows are looked for this often, and whenever some were stored."""
    rows_max: int = 500
    """Rows folded in one transaction."""
    rules: DriftConfig = field(default_factory=DriftConfig)
    """When a device is called unlike the others."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.tick_s <= 0 or not 1 <= self.rows_max <= 100_000:
            raise ValueError("tick_s must be above 0 s, rows_max 1 to 100000")


class Drift:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self, store: Store, *, clock: Callable[[], int], config: DriftWorkerConfig
    ) -> None:
        self._store, self._clock, self._config = store, clock, config
        self._fresh = asyncio.Event()
        self._profiles: dict[str, ReferenceProfile | None] = {}

    def wake(self) -> None:
        """Say that windows were stored. Call it on the event loop."""
        self._fresh.set()

    async def run(self) -> None:
        """Fold and judge until cancelled."""
        while True:
            while await asyncio.to_thread(self.step):
                pass
            try:
                async with asyncio.timeout(self._config.tick_s):
                    await self._fresh.wait()
                await asyncio.sleep(0.2)  # what comes together is judged together
            except TimeoutError:
                pass
            self._fresh.clear()

    def step(self) -> bool:
        """Fold one group of rows and judge the models they belong to; say whether more wait."""
        with self._store.begin() as session:
            windows = session.scalars(
                select(Window)
                .where(Window.drift_done.is_(False))
                .order_by(Window.id)
                .limit(self._config.rows_max)
            ).all()
            labels = session.scalars(
                select(Labels)
                .where(Labels.drift_done.is_(False))
                .order_by(Labels.id)
                .limit(self._config.rows_max)
            ).all()
            states = self._fold(session, windows, labels)
            for model in dict.fromkeys(model for _, model in states):
                self._judge(session, model)
        return max(len(windows), len(labels)) >= self._config.rows_max

    def report(self, model_sha256: str = "") -> dict[str, Any]:
        """Return the newest verdict of each device.

        Args:
            model_sha256: A model, or "" for what each device runs now.

        Returns:
            ``{"devices": [{device, model_sha256, windows, drifting, features, text,
            detected_after_windows, findings, open_alerts}]}``.
        """
        with self._store.read() as session:
            rows = session.execute(
                select(DriftState, Device)
                .join(Device, Device.id == DriftState.device_id)
                .order_by(Device.name)
            ).all()
            found = []
            for state, device in rows:
                wanted = model_sha256 or str(device.reported.get("model", ""))
                if state.model_sha256 == wanted:
                    base = {"device": device.name, "model_sha256": state.model_sha256}
                    verdict = _empty(device.name) | state.verdict
                    found.append(base | verdict | {"windows": state.windows})
        return {"devices": found}

    # --- folding ---------------------------------------------------------------------------

    def _fold(
        self, session: Session, windows: Sequence[Window], labels: Sequence[Labels]
    ) -> dict[tuple[int, str], DriftState]:
        rules = self._config.rules
        rows: dict[tuple[int, str], DriftState] = {}
        states: dict[tuple[int, str], DeviceState] = {}

        def state_of(device_id: int, model: str) -> DeviceState:
            key = (device_id, model)
            if key not in states:
                row = session.scalars(
                    select(DriftState).where(
                        DriftState.device_id == device_id, DriftState.model_sha256 == model
                    )
                ).first()
                if row is None:
                    row = DriftState(
                        device_id=device_id, model_sha256=model, state={}, changed_ms=0
                    )
                    session.add(row)
                rows[key], states[key] = row, DeviceState.from_dict(row.state or {})
            return states[key]

        for window in windows:
            window.drift_done = True
            profile = self._profile(session, window.model_sha256)
            if profile is None:
                continue
            try:
                counts = _counts(window.sketch, profile)
            except (SketchRecordError, ProfileError) as exc:
                log.warning("window %d is not folded: %s", window.id, exc)
                continue
            state_of(window.device_id, window.model_sha256).fold(counts, config=rules)
        for label in labels:
            label.drift_done = True
            profile = self._profile(session, label.model_sha256)
            # What a model may have been trained on says nothing about what it will meet.
            if profile is not None and label.split != TRAIN_SPLIT:
                state_of(label.device_id, label.model_sha256).label(
                    label.labelled, label.correct, profile=profile, config=rules
                )
        now_ms = self._clock()
        for key, row in rows.items():
            row.state, row.windows = states[key].to_dict(), states[key].windows
            row.changed_ms = now_ms
        session.flush()
        return rows

    def _profile(self, session: Session, model: str) -> ReferenceProfile | None:
        if model not in self._profiles:
            row = session.scalars(select(Model).where(Model.sha256 == model)).first()
            try:
                found = ReferenceProfile.from_dict(row.profile) if row is not None else None
                if row is not None and found is not None:
                    found = self._taught(session, row, found)
            except ProfileError as exc:
                log.warning("model %.12s has no usable profile: %s", model, exc)
                found = None
            self._profiles[model] = found
        return self._profiles[model]

    def _taught(self, session: Session, model: Model, found: ReferenceProfile) -> ReferenceProfile:
        """Add the devices whose windows a federated model learned from to its groups."""
        run = session.scalars(
            select(RoundsRun).where(RoundsRun.candidate_sha256 == model.sha256)
        ).first()
        base = session.scalars(
            select(Model).where(Model.sha256 == (run.base_sha256 if run else ""))
        ).first()
        if run is None or base is None:
            return found
        old = ReferenceProfile.from_dict(base.profile)
        bins = [[each.edges for each in one.features[:-1]] for one in (old, found)]
        if bins[0] != bins[1]:
            return found  # other bins: the counts of the parent's windows say nothing here
        taught = session.execute(
            select(Device.id, Device.name)
            .join(Task, Task.device_id == Device.id)
            .where(Task.owner_id == run.id, Task.state == "reported")
            .distinct()
        ).all()
        halves: dict[str, tuple[list[list[int]], list[list[int]]]] = {}
        for device_id, name in taught:
            sketches = session.scalars(
                select(Window.sketch)
                .where(Window.device_id == device_id, Window.model_sha256 == base.sha256)
                .order_by(Window.id)
                .limit(TAUGHT_WINDOWS_MAX)
            ).all()
            counted = []
            for sketch in sketches:
                with contextlib.suppress(SketchRecordError, ProfileError):
                    counted.append(_counts(sketch, old)[:-1])
            if len(counted) >= 2:
                middle = len(counted) // 2
                halves[name] = (_sum(counted[:middle]), _sum(counted[middle:]))
        return with_devices(found, halves) if halves else found

    # --- judging ---------------------------------------------------------------------------

    def _judge(self, session: Session, model: str) -> None:
        rules, profile = self._config.rules, self._profile(session, model)
        if profile is None:
            return
        pairs = session.execute(
            select(DriftState, Device)
            .join(Device, Device.id == DriftState.device_id)
            .where(DriftState.model_sha256 == model)
        ).all()
        found: dict[str, list[Finding]] = {}
        for row, device in pairs:
            found[device.name] = detectors.findings(
                DeviceState.from_dict(row.state), profile, config=rules
            )
        kept = detectors.judge_fleet(found, config=rules)
        for row, device in pairs:
            state = DeviceState.from_dict(row.state)
            if state.windows > state.judged_windows:
                detectors.settle(state, kept[device.name], config=rules)
                row.state = state.to_dict()
            row.verdict = self._verdict(device, state, kept[device.name], found[device.name])
            self._alert(session, device, row, state)

    def _verdict(
        self, device: Device, state: DeviceState, kept: list[Finding], found: list[Finding]
    ) -> dict[str, Any]:
        if not state.open:
            return _empty(device.name)
        # An alarm that is about to end keeps its last evidence until it does.
        shown = kept or found
        features = [f.feature for f in detectors.unlike(found)]
        named = [f.feature for f in kept if f.feature not in (detectors.ACCURACY, detectors.INPUTS)]
        return {
            "drifting": True,
            "kind": detectors.kind(shown),
            "features": list(dict.fromkeys([*named, *features])),
            "text": detectors.sentence(device.name, kept, found),
            "detected_after_windows": state.opened_windows,
            "findings": [_finding(each) for each in shown],
        }

    def _alert(self, session: Session, device: Device, row: DriftState, state: DeviceState) -> None:
        now_ms = self._clock()
        open_alerts = session.scalars(
            select(Alert).where(
                Alert.device_id == device.id,
                Alert.state == "open",
                Alert.kind.in_(("covariate_drift", "confidence_drift", "accuracy_loss")),
            )
        ).all()
        for alert in open_alerts:
            # A device that runs another model now has a new reference: the old alarm is settled.
            ended = alert.model_sha256 == row.model_sha256 and not state.open
            replaced = (
                alert.model_sha256 != row.model_sha256
                and device.reported.get("model") == row.model_sha256
                and state.windows >= self._config.rules.windows_min
            )
            if ended or replaced:
                alert.state, alert.resolved_ms = "resolved", now_ms
        mine = [a for a in open_alerts if a.model_sha256 == row.model_sha256 and a.state == "open"]
        if state.open and mine:
            mine[0].kind, mine[0].text = row.verdict["kind"], row.verdict["text"]
            mine[0].evidence = {"findings": row.verdict["findings"]}
        elif state.open and device.reported.get("model") == row.model_sha256:
            # Late windows of a model that was replaced open nothing any more.
            session.add(
                Alert(
                    device_id=device.id,
                    model_sha256=row.model_sha256,
                    kind=row.verdict["kind"],
                    state="open",
                    text=row.verdict["text"],
                    evidence={"findings": row.verdict["findings"]},
                    windows=state.opened_windows,
                    opened_ms=now_ms,
                )
            )


def _counts(sketch: bytes, profile: ReferenceProfile) -> list[list[int]]:
    bank = SketchBank.from_bytes(sketch)
    if bank.features != len(profile.features):
        raise ProfileError(
            f"the sketch has {bank.features} features, the profile {len(profile.features)}"
        )
    counts = [[int(count) for count in bank.counts(i)] for i in range(bank.features)]
    for row, feature in zip(counts, profile.features, strict=True):
        if len(row) != len(feature.counts):
            raise ProfileError(f"{feature.name} has {len(row)} bins, not {len(feature.counts)}")
    return counts


def _sum(tables: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return the counts of several windows together, F x B."""
    return [[sum(bins) for bins in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _finding(found: Finding) -> dict[str, Any]:
    return {
        "feature": found.feature,
        "p_value": round(found.p_value, 6),
        "effect": round(found.effect, 4),
        "normal": round(found.normal, 4),
        "direction": round(found.direction, 3),
    }


def _empty(device: str) -> dict[str, Any]:
    return {
        "drifting": False,
        "kind": "",
        "features": [],
        "text": f"{device}: like what the model was made with",
        "detected_after_windows": 0,
        "findings": [],
    }
