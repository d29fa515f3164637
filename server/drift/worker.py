"""Have new windows folded into the detectors' states, judge the fleet, open and resolve alerts.

    window, labels rows --fold--> drift_state --judge, over all devices of a model--> verdicts
    verdicts --settle--> alert        alerts, evaluations, labels --policy--> retraining

A row is folded once (``fold.py``). A run that the policy asks for is in the audit log before it is
started: a crash between the two costs a run, and never makes two.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from ... import ShoalError
from ..store import Store, audit
from ..store.tables import Alert, Device, DriftState, Labels, Model, Window
from . import detectors, quality, retraining, rows, scores, streams, verdicts
from .config import DriftWorkerConfig
from .detectors import DeviceState, Finding
from .device_verdict import alarms, device_verdict, nothing_found, unlike
from .fold import QUALITY, SCORES, STREAMS, TRACE, Folder
from .localise import Place, Scope
from .profile import ReferenceProfile
from .profile_cache import Profiles
from .quality import QualityState
from .retraining import Action, Decision
from .scores import ScoreState
from .trace import extended
from .verdicts import Look

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A retraining that the policy asks for."""

    model_sha256: str
    name: str
    road: str
    """rounds or training."""
    dataset_sha256: str
    """For training: what to train on."""
    note: str


Retrain = Callable[[Request], Awaitable[str]]
"""Starts a run and returns its id; raises ShoalErrors."""


class Drift:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], int],
        config: DriftWorkerConfig,
        retrain: Retrain | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._store, self._clock, self._config, self._retrain = store, clock, config, retrain
        self._monotonic, self._cpu = monotonic, cpu
        self._unjudged: dict[str, None] = {}  # models that told something new, in order
        self._rests_until_s: dict[str, float] = {}
        self._fresh = asyncio.Event()
        self._profiles = Profiles()
        self._folder = Folder(self._profiles, clock=clock, config=config)
        self._found: dict[tuple[str, str], tuple[Any, list[Finding]]] = {}
        self._adopted = False
        self._decisions: dict[str, Decision] = {}
        self._asked: list[Request] = []
        self._asking: list[Request] = []  # of the open transaction: asked once it is committed

    def wake(self) -> None:
        """Say that windows were stored. Call it on the event loop."""
        self._fresh.set()

    async def run(self) -> None:
        """Fold and judge until cancelled."""
        while True:
            while await asyncio.to_thread(self.step):
                pass
            await self.start_asked()
            try:
                async with asyncio.timeout(self._config.tick_s):
                    await self._fresh.wait()
                await asyncio.sleep(0.2)  # what comes together is judged together
            except TimeoutError:
                pass
            self._fresh.clear()

    def step(self) -> bool:
        """Fold one group of rows and judge the models they belong to; say whether more wait.

        A model whose judgement takes long is judged again after a rest, by whichever step comes.
        """
        self._asking = []
        with self._store.begin() as session:
            if not self._adopted:
                rows.adopt(session)
            rows.wake(session, now_ms=self._clock())
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
            states = self._folder.fold(session, windows, labels)
            self._unjudged |= dict.fromkeys(model for _, model in states)
            if not self._adopted:  # what was folded before a crash may not be judged yet
                self._unjudged |= dict.fromkeys(
                    session.scalars(select(DriftState.model_sha256).distinct())
                )
            judged = self._judge_rested(session)
        self._adopted = True
        for model in judged:
            del self._unjudged[model]
        self._asked += self._asking
        return max(len(windows), len(labels)) >= self._config.rows_max

    async def start_asked(self) -> None:
        """Start the runs that the policy asked for; what becomes of each goes into the log."""
        while self._asked:
            request = self._asked.pop(0)
            try:
                if self._retrain is None:
                    raise ShoalError("nothing here starts runs")
                told = {"run": await self._retrain(request), "road": request.road}
                action = "retraining.started"
            except ShoalError as exc:
                log.warning("the retraining of %.12s did not start: %s", request.model_sha256, exc)
                action, told = "retraining.failed", {"reason": str(exc), "road": request.road}
            await asyncio.to_thread(self._tell, action, request.model_sha256, told)

    def control(
        self, alert_id: int, command: str, *, note: str = "", silence_s: int = 0
    ) -> dict[str, Any]:
        """Acknowledge, silence or resolve an alert for an operator.

        Resolving says that things are in order as they are: devices of the alert that changed
        since their first windows are learned anew, or they would be told of for ever.

        Returns:
            ``{id, state, silenced_until_ms}``.

        Raises:
            NotFoundError, InvalidError, AlertEventError: As ``rows.control`` says; nothing changed.
        """
        with self._store.begin() as session:
            alert = rows.control(
                session,
                alert_id,
                command,
                note=note,
                silence_s=silence_s,
                now_ms=self._clock(),
                config=self._config.alerts,
            )
            if command == "resolve":
                self._learn_anew(session, alert)
            return {
                "id": alert.id,
                "state": alert.state,
                "silenced_until_ms": alert.silenced_until_ms,
            }

    def _learn_anew(self, session: Session, alert: Alert) -> None:
        """Forget the baselines of an alert's devices that have left them."""
        profile = self._profiles.of(session, alert.model_sha256)
        if profile is None or alert.kind not in verdicts.KINDS:
            return
        pairs = session.execute(
            select(DriftState, Device)
            .join(Device, Device.id == DriftState.device_id)
            .where(DriftState.model_sha256 == alert.model_sha256)
        ).all()
        changed = self._changed(pairs, alert.model_sha256, profile)
        for row, device in pairs:
            if changed.get(device.name) and (alert.scope, alert.subject) in _places(device):
                row.state = {**row.state, STREAMS: {}}

    def report(self, model_sha256: str = "") -> dict[str, Any]:
        """Return the newest verdict of each device.

        Args:
            model_sha256: A model, or "" for what each device runs now.

        Returns:
            ``{"devices": [{device, model_sha256, site, hardware, windows, drifting, kind, scope,
            features, text, detected_after_windows, findings, changes, scores, faults,
            open_alerts}],
            "retraining": [{model_sha256, action, trigger, reasons}]}``; ``open_alerts`` are the
            ids of live alerts that the device is meant by, alone or in a group.
        """
        with self._store.read() as session:
            pairs = session.execute(
                select(DriftState, Device)
                .join(Device, Device.id == DriftState.device_id)
                .options(defer(DriftState.state))  # megabytes in all, and not of a report
                .order_by(Device.name)
            ).all()
            meant = _Meant(rows.live(session))
            found = []
            for state, device in pairs:
                wanted = model_sha256 or str(device.reported.get("model", ""))
                if state.model_sha256 == wanted:
                    verdict = nothing_found(device.name) | state.verdict
                    base = {
                        "device": device.name,
                        "model_sha256": state.model_sha256,
                        "site": device.site,
                        "hardware": device.hardware,
                        "open_alerts": meant.ids(wanted, device, verdict),
                    }
                    found.append(base | verdict | {"windows": state.windows})
        shown = {each["model_sha256"] for each in found}
        decided = [
            {
                "model_sha256": model,
                "action": str(decision.action),
                "trigger": decision.trigger,
                "reasons": list(decision.reasons),
            }
            for model, decision in self._decisions.items()
            if model in shown
        ]
        return {"devices": found, "retraining": decided}

    # --- judging ---------------------------------------------------------------------------

    def _judge_rested(self, session: Session) -> list[str]:
        """Judge the models that wait for it and do not rest; return them."""
        judged = []
        for model in self._unjudged:
            if self._monotonic() < self._rests_until_s.get(model, 0.0):
                continue
            begin_s = self._cpu()
            self._judge(session, model)
            took_s = self._cpu() - begin_s
            if took_s > self._config.judge_quick_s:
                rest_s = took_s / self._config.judge_share_max - took_s
                self._rests_until_s[model] = self._monotonic() + rest_s
            judged.append(model)
        return judged

    def _judge(self, session: Session, model: str) -> None:
        rules, profile = self._config.rules, self._profiles.of(session, model)
        if profile is None:
            return
        now_ms = self._clock()
        pairs = session.execute(
            select(DriftState, Device)
            .join(Device, Device.id == DriftState.device_id)
            .where(DriftState.model_sha256 == model)
        ).all()
        states = {device.name: DeviceState.from_dict(row.state) for row, device in pairs}
        found = {
            name: self._findings((model, name), state, profile) for name, state in states.items()
        }
        levels = {
            name: detectors.level(state, standing=unlike(state), config=rules)
            for name, state in states.items()
        }
        kept = detectors.judge_fleet(found, config=rules, levels=levels)
        broken = self._broken(pairs, profile)
        changed = self._changed(pairs, model, profile)
        looks = {
            device.name: Look(
                place=Place(device.site, device.hardware),
                found=found[device.name],
                kept=kept[device.name],
                faults=broken[device.name],
                changes=changed.get(device.name, ()),
                scores=self._lines(row, profile)
                if states[device.name].alarms
                or kept[device.name]
                or broken[device.name]
                or changed.get(device.name)
                else (),
                told=bool(states[device.name].windows),
            )
            for row, device in pairs
        }
        fresh = set()
        for name, state in states.items():
            if state.windows > state.judged_windows:
                fresh.add(name)
                causes = verdicts.causes(looks[name], config=self._config.verdicts)
                detectors.settle(state, causes, config=rules)
        # Late windows of a model that was replaced say nothing of the fleet any more.
        running = {
            device.name: device.id
            for _, device in pairs
            if device.reported.get("model") == model and device.revoked_ms is None
        }
        told = verdicts.judge(
            {name: looks[name] for name in running},
            {name: alarms(states[name]) for name in running},
            config=self._config.verdicts,
            named=[(each.kind, each.scope, each.subject) for each in rows.live(session, model)],
        )
        for row, device in pairs:
            name = device.name
            row.verdict = device_verdict(name, row.verdict or {}, looks[name], states[name], told)
            trace = row.state.get(TRACE, {})
            if name in fresh:
                trace = extended(trace, found[name], now_ms=now_ms)
            row.state = {**row.state, **states[name].to_dict(), TRACE: trace}
        rows.settle(
            session,
            model,
            told,
            running,
            {name: states[name].opened_windows for name in running},
            revoked={device.name for _, device in pairs if device.revoked_ms is not None},
            now_ms=now_ms,
            config=self._config.alerts,
        )
        self._replaced(session, model, running, states, now_ms)
        if running:  # late labels of a model that was replaced ask for nothing any more
            self._consider(session, model, now_ms)
        else:
            self._decisions.pop(model, None)

    def _findings(
        self, key: tuple[str, str], state: DeviceState, profile: ReferenceProfile
    ) -> list[Finding]:
        """Return a device's findings; those of one that told nothing new are remembered."""
        told = (state.windows, tuple(state.slices), state.labelled)
        known = self._found.get(key)
        if known is None or known[0] != told:
            known = told, detectors.findings(state, profile, config=self._config.rules)
            self._found[key] = known
        return known[1]

    def _lines(self, row: DriftState, profile: ReferenceProfile) -> list[dict[str, Any]]:
        state = ScoreState.from_dict(row.state.get(SCORES, {}))
        return scores.lines(state, profile, config=self._config.scores)

    def _changed(
        self, pairs: Sequence[Any], model: str, profile: ReferenceProfile
    ) -> dict[str, list[Finding]]:
        """Return what changed since its first windows in each device that runs the model."""
        there = [
            (row, device)
            for row, device in pairs
            if device.reported.get("model") == model and device.revoked_ms is None
        ]
        found = streams.findings(
            [self._folder.streams(row, profile) for row, _ in there],
            profile,
            config=self._config.streams,
        )
        return {device.name: each for (_, device), each in zip(there, found, strict=True)}

    def _broken(
        self, pairs: Sequence[Any], profile: ReferenceProfile
    ) -> dict[str, list[quality.Fault]]:
        config, expected = self._config.quality, quality.expected(profile.features)
        fleet = {
            device.name: quality.faults(
                QualityState.from_dict(row.state.get(QUALITY, {})), expected=expected, config=config
            )
            for row, device in pairs
        }
        return quality.judge(fleet, features=len(profile.features), config=config)

    def _replaced(
        self,
        session: Session,
        model: str,
        running: Mapping[str, int],
        states: Mapping[str, DeviceState],
        now_ms: int,
    ) -> None:
        ready = [name for name in running if states[name].windows >= self._config.rules.windows_min]
        others = select(Device.name, Device.reported).where(Device.revoked_ms.is_(None))
        if not running or any(each.model_sha256 != model for each in rows.live(session)):
            fleet = {name: str(said.get("model", "")) for name, said in session.execute(others)}
            rows.replaced(session, model, fleet, ready, now_ms=now_ms)

    # --- retraining ------------------------------------------------------------------------

    def _consider(self, session: Session, model_sha256: str, now_ms: int) -> None:
        config = self._config.retraining
        model = session.scalars(select(Model).where(Model.sha256 == model_sha256)).one()
        if config.mode == "off":
            return
        facts = rows.facts(session, model, now_ms=now_ms, config=config)
        decision = retraining.decide(facts, now_ms=now_ms, config=config)
        self._decisions[model_sha256] = decision
        if decision.action is Action.NOTHING:
            return
        dataset = rows.newest_dataset(session, model.name) if config.road == "training" else ""
        detail = {
            "trigger": decision.trigger,
            "reasons": list(decision.reasons),
            "road": config.road,
            "labels_new": facts.labels_new,
            "asked_by": list(decision.asked_by),
        }
        started = decision.action is Action.START
        audit.append(
            session,
            now_ms=now_ms,
            actor="server",
            action=rows.DECIDED if started else rows.PROPOSED,
            subject=model_sha256,
            detail=detail,
        )
        if started:
            note = f"retraining on {decision.trigger}: {'; '.join(decision.reasons)}"[:500]
            self._asking.append(Request(model_sha256, model.name, config.road, dataset, note))

    def _tell(self, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        with self._store.begin() as session:
            audit.append(
                session,
                now_ms=self._clock(),
                actor="server",
                action=action,
                subject=subject,
                detail=detail,
            )


def _places(device: Device) -> tuple[tuple[str, str], ...]:
    """Return the (scope, subject) of the alerts that a device may belong to."""
    return (
        (Scope.DEVICE.value, device.name),
        (Scope.SITE.value, device.site),
        (Scope.HARDWARE.value, device.hardware),
        (Scope.FLEET.value, ""),
    )


class _Meant:
    """Which live alerts each device is meant by: looked up, as there may be one for each."""

    def __init__(self, alerts: Sequence[Alert]) -> None:
        self._named: dict[tuple[str, str], list[int]] = {}
        self._placed: dict[tuple[str, str, str, str], list[int]] = {}
        for alert in alerts:
            names = set(alert.evidence.get("devices", []))
            if alert.scope == Scope.DEVICE:
                names.add(alert.subject)
            else:
                place = (alert.model_sha256, alert.kind, alert.scope, alert.subject)
                self._placed.setdefault(place, []).append(alert.id)
            for name in names:
                self._named.setdefault((alert.model_sha256, name), []).append(alert.id)

    def ids(self, model: str, device: Device, verdict: Mapping[str, Any]) -> list[int]:
        """Return the alerts of a device that runs a model.

        Names in the evidence are cut where they are many: a device that drifts as its place does is
        meant by the alert of that place, named or not.
        """
        found = set(self._named.get((model, device.name), []))
        for scope, subject in _places(device) if verdict["drifting"] else ():
            if scope == verdict["scope"]:
                found.update(self._placed.get((model, verdict["kind"], scope, subject), []))
        return sorted(found)
