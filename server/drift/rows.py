"""Alerts and the facts of retraining in the database: what ``alerts.py`` decides, written down.

Every function works within its caller's transaction and takes the time; none of them decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from ..errors import InvalidError, NotFoundError
from ..store import audit
from ..store.tables import (
    Alert,
    Audit,
    Device,
    Evaluation,
    Labels,
    Model,
    RoundsRun,
    Task,
    TrainingRun,
)
from . import alerts
from .alerts import Again, AlertConfig, AlertEvent, AlertState, Life
from .localise import Scope
from .retraining import WEEK_MS, Comparison, Facts, Loss, RetrainingConfig
from .verdicts import ACCURACY_LOSS, KINDS, LOCAL_SHIFT, Verdict, place_name

OLD_KINDS: Final = ("covariate_drift", "confidence_drift")
"""What servers before the verdicts called a shift of one device."""
DECIDED: Final = "retraining.decided"
PROPOSED: Final = "retraining.proposed"
ASKED_MAX: Final = 100  # runs and proposals of one model, the newest; live alerts are fewer
EVALUATIONS_MAX: Final = 20  # of one model, the newest: older ones were looked at before
OPERATOR: Final = "operator"
COMMANDS: Final[Mapping[str, AlertEvent]] = {
    "acknowledge": AlertEvent.ACKNOWLEDGE,
    "silence": AlertEvent.SILENCE,
    "resolve": AlertEvent.RESOLVE,
}


def adopt(session: Session) -> None:
    """Give the alerts of older servers the kinds and fingerprints of this one; idempotent."""
    session.execute(update(Alert).where(Alert.kind.in_(OLD_KINDS)).values(kind=LOCAL_SHIFT))
    rows = session.execute(
        select(Alert, Device.name)
        .join(Device, Device.id == Alert.device_id)
        .where(Alert.fingerprint == "", Alert.kind.in_(KINDS), Alert.state.in_(alerts.LIVE))
        .order_by(Alert.opened_ms.desc(), Alert.id.desc())
    ).all()
    known: set[str] = set()
    for alert, name in rows:
        alert.subject = name
        alert.fingerprint = alerts.fingerprint(alert.kind, Scope.DEVICE, name, alert.model_sha256)
        alert.seen_ms, alert.changed_ms = alert.opened_ms, alert.opened_ms
        if alert.fingerprint in known:  # two of one device: the newer one goes on
            alert.state, alert.resolved_ms = AlertState.RESOLVED, alert.opened_ms
        known.add(alert.fingerprint)


def live(session: Session, model_sha256: str | None = None) -> list[Alert]:
    """Return the live verdicts' alerts, of one model or of all."""
    query = select(Alert).where(Alert.state.in_(alerts.LIVE), Alert.kind.in_(KINDS))
    if model_sha256 is not None:
        query = query.where(Alert.model_sha256 == model_sha256)
    return list(session.scalars(query.order_by(Alert.id)))


def wake(session: Session, *, now_ms: int) -> int:
    """Open the alerts whose silence is over; return how many."""
    rows = session.scalars(
        select(Alert).where(Alert.state == AlertState.SILENCED, Alert.silenced_until_ms <= now_ms)
    ).all()
    for alert in rows:
        _write(alert, alerts.after(_life(alert), AlertEvent.SILENCE_OVER, now_ms=now_ms))
    return len(rows)


def settle(
    session: Session,
    model_sha256: str,
    verdicts: Sequence[Verdict],
    devices: Mapping[str, int],
    opened_windows: Mapping[str, int],
    *,
    revoked: Collection[str] = (),
    now_ms: int,
    config: AlertConfig,
) -> None:
    """Bring the alerts of a model in step with what was found.

    Args:
        session: A write transaction.
        model_sha256: The model.
        verdicts: All that is found of it now.
        devices: Row of each device that runs the model, by name. An alert that none of them is
            meant by is left alone: nothing was judged there.
        opened_windows: Telemetry windows of each of these devices when its alarm opened.
        revoked: Devices that were shut out: what they alone are meant by is over.
        now_ms: Unix ms.
        config: When an alert is the same one again.
    """
    newest: dict[str, Alert] = {}
    remembered = Alert.resolved_ms >= now_ms - 1000 * config.flap_s
    query = select(Alert).where(
        Alert.model_sha256 == model_sha256,
        Alert.kind.in_(KINDS),
        Alert.state.in_(alerts.LIVE) | remembered,
    )
    for alert in session.scalars(query.order_by(Alert.id)):
        newest[alert.fingerprint] = alert
    told: set[str] = set()
    for verdict in verdicts:
        key = alerts.fingerprint(verdict.kind, verdict.scope, verdict.subject, model_sha256)
        told.add(key)
        known = newest.get(key)
        what = alerts.again(_life(known) if known else None, now_ms=now_ms, config=config)
        if what is Again.WAIT:
            continue
        if known is None or what is Again.NEW:
            known = Alert(
                device_id=devices.get(verdict.subject) if verdict.scope == Scope.DEVICE else None,
                scope=str(verdict.scope),
                subject=verdict.subject,
                model_sha256=model_sha256,
                kind=verdict.kind,
                fingerprint=key,
                windows=min(
                    (opened_windows.get(name, 0) for name in verdict.locus.affected), default=0
                ),
            )
            _write(known, alerts.begun(now_ms))
            session.add(known)
        else:
            _write(known, alerts.after(_life(known), AlertEvent.FOUND, now_ms=now_ms))
        known.text = verdict.text
        known.evidence = {**verdict.evidence, "suspected": verdict.suspected}
    for key, alert in newest.items():
        if key in told or alert.state == AlertState.RESOLVED:
            continue
        members = _members(alert)
        if members and members <= set(revoked):
            note = "its devices were shut out"
        elif devices.keys().isdisjoint(members):
            continue
        else:
            wider = _wider(alert, verdicts)
            note = f"told as {wider}" if wider else "not found any more"
        _write(alert, alerts.after(_life(alert), AlertEvent.CLEARED, now_ms=now_ms, note=note))
    session.flush()


def replaced(
    session: Session,
    model_sha256: str,
    running: Mapping[str, str],
    ready: Sequence[str],
    *,
    now_ms: int,
) -> None:
    """End the alerts of other models whose devices run another model now.

    An alert of a model that no device runs any more ends at once, whatever is told of it late;
    one of a model that other devices still run, once its own devices have a new reference.

    Args:
        session: A write transaction.
        model_sha256: The model that was judged.
        running: What each device of the fleet runs, by name; revoked devices are absent.
        ready: Devices that have told enough of this model: they have a new reference.
        now_ms: Unix ms.
    """
    used = set(running.values())
    for alert in live(session):
        note = "no device runs its model any more"
        if alert.model_sha256 in used:
            members = _members(alert)
            if alert.model_sha256 == model_sha256 or not members & set(ready):
                continue
            if any(running.get(name) == alert.model_sha256 for name in members):
                continue
            note = "its devices run another model now"
        _write(alert, alerts.after(_life(alert), AlertEvent.CLEARED, now_ms=now_ms, note=note))


def control(
    session: Session,
    alert_id: int,
    command: str,
    *,
    note: str,
    silence_s: int,
    now_ms: int,
    config: AlertConfig,
) -> Alert:
    """Do what an operator asks of an alert, and write it into the audit log.

    Args:
        session: A write transaction.
        alert_id: Row of the alert.
        command: acknowledge, silence or resolve.
        note: For people, at most 500 characters.
        silence_s: How long to be silent, s; for ``silence`` alone.
        now_ms: Unix ms.
        config: The longest silence.

    Returns:
        The alert as it is now.

    Raises:
        NotFoundError: There is no such alert.
        InvalidError: The command, the note or the time is out of bounds.
        AlertEventError: The alert's state does not take it.
    """
    if command not in COMMANDS:
        raise InvalidError(f"the command is one of {', '.join(COMMANDS)}")
    if len(note) > alerts.NOTE_CHARS_MAX:
        raise InvalidError(f"the note exceeds {alerts.NOTE_CHARS_MAX} characters")
    if command == "silence" and not 1 <= silence_s <= config.silence_s_max:
        raise InvalidError(
            f"a silence lasts 1 to {config.silence_s_max} s, not {silence_s}", hint="--for 12h"
        )
    alert = session.get(Alert, alert_id)
    if alert is None:
        raise NotFoundError(f"there is no alert {alert_id}", hint="shoal alerts list")
    until_ms = now_ms + 1000 * silence_s if command == "silence" else None
    life = alerts.after(
        _life(alert), COMMANDS[command], now_ms=now_ms, actor=OPERATOR, note=note, until_ms=until_ms
    )
    _write(alert, life)
    audit.append(
        session,
        now_ms=now_ms,
        actor=OPERATOR,
        action=f"alert.{life.state.value}",
        subject=str(alert_id),
        detail={
            "kind": alert.kind,
            "scope": alert.scope,
            "subject": alert.subject,
            "model": alert.model_sha256,
            "note": note,
            **({"until_ms": until_ms} if until_ms is not None else {}),
        },
    )
    return alert


def facts(session: Session, model: Model, *, now_ms: int, config: RetrainingConfig) -> Facts:
    """Return what is known for the retraining of a model."""
    losses = [
        Loss(
            place_name(each.scope, each.subject),
            bool(each.evidence.get("suspected")),
            f"alert {each.id}",
        )
        for each in live(session, model.sha256)
        if each.kind == ACCURACY_LOSS and each.state != AlertState.SILENCED
    ]
    comparisons = _comparisons(session, model)
    if not losses and not comparisons:
        return Facts()  # nothing asks for a run: what would hold it back need not be counted
    since_ms = now_ms - max(WEEK_MS, 1000 * config.cooldown_s)
    asked = session.execute(
        select(Audit.time_ms, Audit.action, Audit.detail)
        .where(Audit.action.in_((DECIDED, PROPOSED)), Audit.subject == model.sha256)
        .order_by(Audit.id.desc())
        .limit(ASKED_MAX)
    ).all()
    runs_ms = [time_ms for time_ms, _, _ in asked]
    proposed = {key for _, action, detail in asked if action == PROPOSED for key in _keys(detail)}
    labels = session.scalar(
        select(func.sum(Labels.labelled)).where(
            Labels.model_sha256 == model.sha256,
            Labels.received_ms > max(runs_ms, default=model.created_ms),
        )
    )
    trained = session.scalar(
        select(func.count()).where(
            TrainingRun.name == model.name, TrainingRun.state.in_(("queued", "running"))
        )
    )
    rounds = session.scalar(
        select(func.count()).where(
            RoundsRun.base_sha256 == model.sha256, RoundsRun.state.in_(("running", "quantizing"))
        )
    )
    return Facts(
        losses=losses,
        comparisons=comparisons,
        labels_new=int(labels or 0),
        runs_ms=[time_ms for time_ms in runs_ms if time_ms >= since_ms],
        proposed=proposed,
        busy=bool(trained or rounds),
    )


def newest_dataset(session: Session, name: str) -> str:
    """Return the data set of the newest training run of a model's name; "" = there was none."""
    query = select(TrainingRun.dataset_sha256).where(TrainingRun.name == name)
    return session.scalar(query.order_by(TrainingRun.created_ms.desc()).limit(1)) or ""


def _comparisons(session: Session, model: Model) -> list[Comparison]:
    """Return the finished evaluations of a model beside others since it was made, newest first."""
    found = []
    rows = session.scalars(
        select(Evaluation)
        .where(Evaluation.state == "done", Evaluation.created_ms >= model.created_ms)
        .order_by(Evaluation.created_ms.desc())
        .limit(EVALUATIONS_MAX)
    )
    for row in rows:
        if model.sha256 not in row.bundles:
            continue
        results = session.scalars(
            select(Task.result).where(Task.owner_id == row.id, Task.state == "reported")
        ).all()
        for other in row.bundles:
            if other == model.sha256:
                continue
            windows = champion = candidate = 0
            for result in results:
                scores = {each["bundle_sha256"]: each for each in result.get("scores", [])}
                own, new = scores.get(model.sha256), scores.get(other)
                # Both on the very same windows of a device, or the device says nothing.
                if own and new and own["windows"] == new["windows"]:
                    windows += own["windows"]
                    champion, candidate = champion + own["correct"], candidate + new["correct"]
            found.append(Comparison(row.id, other, windows, champion, candidate))
    return found


def _keys(detail: Mapping[str, Any]) -> list[str]:
    """Return what a proposal was made for; servers before this one did not write it down."""
    told = detail.get("asked_by")
    return [each for each in told if isinstance(each, str)] if isinstance(told, list) else []


# --- the row and its life ---------------------------------------------------------------------


def _life(alert: Alert) -> Life:
    return Life(
        state=AlertState(alert.state),
        seen=alert.seen,
        opened_ms=alert.opened_ms,
        seen_ms=alert.seen_ms,
        changed_ms=alert.changed_ms,
        silenced_until_ms=alert.silenced_until_ms,
        resolved_ms=alert.resolved_ms,
        actor=alert.actor,
        note=alert.note,
    )


def _write(alert: Alert, life: Life) -> None:
    alert.state = life.state.value
    for name in (
        "seen", "opened_ms", "seen_ms", "changed_ms", "silenced_until_ms", "resolved_ms", "actor",
        "note",
    ):  # fmt: skip
        setattr(alert, name, getattr(life, name))


def _members(alert: Alert) -> set[str]:
    named: Any = alert.evidence.get("devices", [])
    return {alert.subject, *named} if alert.scope == Scope.DEVICE else set(named)


def _wider(alert: Alert, verdicts: Sequence[Verdict]) -> str:
    """Return the larger scope that a device's alert went into; "" = none."""
    for verdict in verdicts:
        if verdict.scope != Scope.DEVICE and alert.subject in verdict.locus.affected:
            return f"{verdict.kind} of {place_name(verdict.scope, verdict.subject)}"
    return ""
