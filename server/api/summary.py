"""The state of the fleet as JSON documents, read in one transaction.

    fleet            every device: what it runs, how well, what is wrong with it
    accuracy_series  accuracy over time by device and model, in buckets
    rollouts         every rollout, newest first, with honest denominators
    alerts           what is live: open, acknowledged, silenced
    totals           the server's side of the accounts: stored, lost, quarantined
    untold           devices that tell less than they see, in their own words (reported.py)

What is not known is null; a share comes with the counts it is made of. Sums are made by the
database, over indexed ranges, so that a document costs its range and not the history.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..drift.alerts import LIVE, AlertState
from ..rollouts.states import DeviceState
from ..store.tables import (
    Alert,
    Device,
    DriftState,
    Gap,
    Labels,
    Model,
    Quarantine,
    RecordRow,
    Rollout,
    RolloutDevice,
)
from . import reported

SPLITS: Final = ("train", "validation", "test")
RANGE_MS: Final = 86_400_000  # accuracy is that of the last day: older labels say less of now
NEWEST: Final = 100  # label records per device and split: a few thousand labels at most
ROLLOUTS_MAX: Final = 100
ALERTS_MAX: Final = 500
HEARD: Final = (AlertState.OPEN, AlertState.ACKNOWLEDGED)
"""States of alerts that count: what is silenced is heard of where one looks for it alone."""


def summary(session: Session, *, now_ms: int) -> dict[str, Any]:
    """Return ``{at_ms, totals, fleet, rollouts, alerts}``; the parts are documented below."""
    return {
        "at_ms": now_ms,
        "totals": totals(session),
        "fleet": fleet(session, now_ms),
        "rollouts": rollouts(session),
        "alerts": alerts(session),
    }


def fleet(session: Session, now_ms: int) -> dict[str, Any]:
    """Return the fleet's table.

    Returns:
        ``{"devices": [{id, online, revoked, seen_ms, agent, model, accuracy, drift, rollout,
        alerts_open, site, hardware, reported_ms, warnings, untold}]}`` by id, where ``model`` is
        ``{sha256, digest, name, version}`` of what the device reports to run or null; ``accuracy``
        maps a split to ``{labelled, correct, share}`` over the newest labels of that model;
        ``drift`` is the newest verdict or null; ``alerts_open`` counts its open and acknowledged
        alerts; ``rollout`` is ``{id, state, reason}`` of the newest rollout that names the device
        or null; ``warnings`` and ``untold`` are those of reported.py, as of ``reported_ms``.
    """
    models = {
        row.sha256: row for row in session.execute(select(Model.sha256, Model.name, Model.version))
    }
    accuracy = _accuracy(session, now_ms - RANGE_MS)
    verdicts = {
        (row.device_id, row.model_sha256): row
        for row in session.execute(
            select(
                DriftState.device_id, DriftState.model_sha256, DriftState.windows,
                DriftState.verdict,
            )
        )
    }  # fmt: skip
    rollout = _newest_rollouts(session)
    counted = session.execute(
        select(Alert.device_id, func.count(Alert.id))
        .where(Alert.state.in_(HEARD), Alert.device_id.is_not(None))
        .group_by(Alert.device_id)
    )
    open_alerts = {device: count for device, count in counted}
    devices = []
    for device in session.scalars(select(Device).order_by(Device.name)):
        running = str(device.reported.get("model") or "")
        model = models.get(running)
        verdict = verdicts.get((device.id, running))
        devices.append(
            {
                "id": device.name,
                "online": device.online,
                "revoked": device.revoked_ms is not None,
                "seen_ms": device.seen_ms,
                "agent": device.agent_version,
                "model": {
                    "sha256": running,
                    "digest": running[:12],
                    "name": model.name if model else None,
                    "version": model.version if model else None,
                }
                if running
                else None,
                "accuracy": accuracy.get((device.id, running), {}),
                "drift": {**verdict.verdict, "windows": verdict.windows} if verdict else None,
                "rollout": rollout.get(device.id),
                "alerts_open": open_alerts.get(device.id, 0),
                "site": device.site,
                "hardware": device.hardware,
                "reported_ms": device.reported_ms,
                "warnings": reported.warnings(device.reported),
                "untold": reported.untold(device.reported),
            }
        )
    return {"devices": devices}


def untold(session: Session, *, model_sha256: str = "") -> list[dict[str, Any]]:
    """Return the devices whose windows lack something, by id: their silence is no health.

    Args:
        session: A session to read with.
        model_sha256: Those that run this model; "" = whatever they run.

    Returns:
        ``[{device, model_sha256, reported_ms, …}]`` with all of ``reported.untold``; devices that
        were shut out are left out.
    """
    rows = session.execute(
        select(Device.name, Device.reported, Device.reported_ms)
        .where(Device.revoked_ms.is_(None))
        .order_by(Device.name)
    )
    found = []
    for name, said, at_ms in rows:
        running, lacks = str(said.get("model") or ""), reported.untold(said)
        if lacks and lacks["text"] and model_sha256 in ("", running):
            found.append({"device": name, "model_sha256": running, "reported_ms": at_ms, **lacks})
    return found


def accuracy_series(session: Session, *, since_ms: int, bucket_ms: int) -> dict[str, Any]:
    """Return accuracy over time.

    Args:
        session: A session to read with.
        since_ms: Labels received before this Unix time, in ms, are left out.
        bucket_ms: Width of a bucket, ms, at least 1.

    Returns:
        ``{"bucket_ms", "series": [{device, model_sha256, points: [[start_ms, labelled,
        correct]]}]}`` with the points of all splits, ascending in time.
    """
    start = (Labels.received_ms - Labels.received_ms % bucket_ms).label("start")
    rows = session.execute(
        select(
            Device.name,
            Labels.model_sha256,
            start,
            func.sum(Labels.labelled),
            func.sum(Labels.correct),
        )
        .join(Device, Device.id == Labels.device_id)
        .where(Labels.received_ms >= since_ms)
        .group_by(Device.name, Labels.model_sha256, start)
        .order_by(Device.name, Labels.model_sha256, start)
    )
    lines: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
    for name, model, at, labelled, correct in rows:
        lines[name, model].append([int(at), int(labelled), int(correct)])
    return {
        "bucket_ms": bucket_ms,
        "series": [
            {"device": name, "model_sha256": model, "points": points}
            for (name, model), points in lines.items()
        ],
    }


def rollouts(session: Session, *, rollout_id: str = "") -> list[dict[str, Any]]:
    """Return rollouts, the newest first; with ``rollout_id`` that one alone, or none.

    Returns:
        ``[{id, model_sha256, name, version, state, wave, waves, bake_windows, deadline_s,
        created_ms, changed_ms, reason, counts, wave_counts, evidence}]``: ``waves`` are
        cumulative device counts, ``counts`` maps every state of a device to its number of
        devices, zero included, ``wave_counts`` is the same for each wave.
    """
    query = select(Rollout).order_by(Rollout.created_ms.desc(), Rollout.id.desc())
    query = query.where(Rollout.id == rollout_id) if rollout_id else query.limit(ROLLOUTS_MAX)
    found = session.scalars(query).all()
    counted = session.execute(
        select(
            RolloutDevice.rollout_id,
            RolloutDevice.wave,
            RolloutDevice.state,
            func.count(RolloutDevice.id),
        )
        .where(RolloutDevice.rollout_id.in_([row.id for row in found]))
        .group_by(RolloutDevice.rollout_id, RolloutDevice.wave, RolloutDevice.state)
    )
    waves: dict[str, dict[int, dict[str, int]]] = defaultdict(dict)
    for of, wave, state, count in counted:
        waves[of].setdefault(wave, _zeros())[state] = count
    models = {
        row.sha256: row for row in session.execute(select(Model.sha256, Model.name, Model.version))
    }
    documents = []
    for row in found:
        by_wave = [waves[row.id].get(number, _zeros()) for number in range(len(row.waves))]
        model = models.get(row.model_sha256)
        documents.append(
            {
                "id": row.id,
                "model_sha256": row.model_sha256,
                "name": model.name if model else None,
                "version": model.version if model else None,
                "state": row.state,
                "wave": row.wave,
                "waves": row.waves,
                "bake_windows": row.bake_windows,
                "deadline_s": row.deadline_s,
                "created_ms": row.created_ms,
                "changed_ms": row.changed_ms,
                "reason": row.reason,
                "counts": {state: sum(counts[state] for counts in by_wave) for state in _zeros()},
                "wave_counts": by_wave,
                "evidence": row.evidence,
            }
        )
    return documents


def rollout(session: Session, rollout_id: str) -> dict[str, Any] | None:
    """Return one rollout as :func:`rollouts` does, with its devices; None if there is none.

    Returns:
        The document and ``devices: [{device, wave, state, reason, offered_ms, changed_ms}]``, by
        wave and id.
    """
    found = rollouts(session, rollout_id=rollout_id)
    if not found:
        return None
    rows = session.execute(
        select(RolloutDevice, Device.name)
        .join(Device, Device.id == RolloutDevice.device_id)
        .where(RolloutDevice.rollout_id == rollout_id)
        .order_by(RolloutDevice.wave, Device.name)
    )
    devices = [
        {
            "device": name,
            "wave": row.wave,
            "state": row.state,
            "reason": row.reason,
            "offered_ms": row.offered_ms,
            "changed_ms": row.changed_ms,
        }
        for row, name in rows
    ]
    return {**found[0], "devices": devices}


def models(session: Session) -> list[dict[str, Any]]:
    """Return the registered models, by name and version.

    Returns:
        ``[{sha256, name, version, size, created_ms, approved_ms, note, parent_sha256, classes,
        channels, facts, evidence}]``; ``approved_ms`` is null until it is approved.
    """
    return [
        {
            "sha256": row.sha256,
            "name": row.name,
            "version": row.version,
            "size": row.size,
            "created_ms": row.created_ms,
            "approved_ms": row.approved_ms,
            "note": row.note,
            "parent_sha256": row.parent_sha256,
            "classes": row.manifest.get("classes", []),
            "channels": row.manifest.get("channels", []),
            "facts": row.manifest.get("facts", {}),
            "evidence": row.evidence,
        }
        for row in session.scalars(select(Model).order_by(Model.name, Model.version))
    ]


def alerts(
    session: Session, *, every: bool = False, model_sha256: str = "", alert_id: int = 0
) -> list[dict[str, Any]]:
    """Return alerts, the newest first.

    Args:
        session: A session to read with.
        every: Also those that are resolved.
        model_sha256: Of this model alone; "" = of every model.
        alert_id: This one alone, whatever its state; 0 = all.

    Returns:
        ``[{id, kind, scope, subject, device, model_sha256, state, text, evidence, suspected,
        windows, seen, opened_ms, seen_ms, changed_ms, silenced_until_ms, resolved_ms, actor,
        note}]``; ``device`` is null for an alert of a group, ``subject`` "" for one of the fleet.
    """
    query = (
        select(Alert, Device.name)
        .outerjoin(Device, Device.id == Alert.device_id)
        .order_by(Alert.opened_ms.desc(), Alert.id.desc())
        .limit(ALERTS_MAX)
    )
    if alert_id:
        query = query.where(Alert.id == alert_id)
    elif not every:
        query = query.where(Alert.state.in_(LIVE))
    if model_sha256:
        query = query.where(Alert.model_sha256 == model_sha256)
    return [
        {
            "id": alert.id,
            "kind": alert.kind,
            "scope": alert.scope,
            "subject": alert.subject or name or "",
            "device": name,
            "model_sha256": alert.model_sha256,
            "state": alert.state,
            "text": alert.text,
            "evidence": alert.evidence,
            "suspected": bool(alert.evidence.get("suspected")),
            "windows": alert.windows,
            "seen": alert.seen,
            "opened_ms": alert.opened_ms,
            "seen_ms": alert.seen_ms or alert.opened_ms,
            "changed_ms": alert.changed_ms or alert.opened_ms,
            "silenced_until_ms": alert.silenced_until_ms,
            "resolved_ms": alert.resolved_ms,
            "actor": alert.actor,
            "note": alert.note,
        }
        for alert, name in session.execute(query)
    ]


def totals(session: Session) -> dict[str, Any]:
    """Return ``{devices, online, stored, lost, quarantined}``: devices, records, messages.

    ``lost`` are the records that stored gap records tell of. With what devices still hold it makes
    the identity: produced = stored + spooled + lost.
    """
    return {
        "devices": session.scalar(select(func.count(Device.id))) or 0,
        "online": session.scalar(select(func.count(Device.id)).where(Device.online)) or 0,
        "stored": session.scalar(select(func.count(RecordRow.id))) or 0,
        "lost": int(session.scalar(select(func.sum(Gap.count))) or 0),
        "quarantined": session.scalar(select(func.count(Quarantine.id))) or 0,
    }


def _zeros() -> dict[str, int]:
    return {str(state): 0 for state in DeviceState}


def _accuracy(session: Session, since_ms: int) -> dict[tuple[int, str], dict[str, Any]]:
    """Return, by device and model, the accuracy of each split over the newest label records."""
    place = (
        func.row_number()
        .over(
            partition_by=(Labels.device_id, Labels.model_sha256, Labels.split),
            order_by=Labels.id.desc(),
        )
        .label("place")
    )
    newest = (
        select(
            Labels.device_id, Labels.model_sha256, Labels.split, Labels.labelled, Labels.correct,
            place,
        )
        .where(Labels.received_ms >= since_ms, Labels.split < len(SPLITS))
        .subquery()
    )  # fmt: skip
    rows = session.execute(
        select(
            newest.c.device_id,
            newest.c.model_sha256,
            newest.c.split,
            func.sum(newest.c.labelled),
            func.sum(newest.c.correct),
        )
        .where(newest.c.place <= NEWEST)
        .group_by(newest.c.device_id, newest.c.model_sha256, newest.c.split)
    )
    found: dict[tuple[int, str], dict[str, Any]] = defaultdict(dict)
    for device, model, split, labelled, correct in rows:
        if labelled:
            found[device, model][SPLITS[split]] = {
                "labelled": int(labelled),
                "correct": int(correct),
                "share": round(int(correct) / int(labelled), 6),
            }
    return found


def _newest_rollouts(session: Session) -> dict[int, dict[str, Any]]:
    newest = (
        select(func.max(RolloutDevice.id).label("id")).group_by(RolloutDevice.device_id).subquery()
    )
    rows = session.scalars(select(RolloutDevice).join(newest, RolloutDevice.id == newest.c.id))
    return {
        row.device_id: {"id": row.rollout_id, "state": row.state, "reason": row.reason}
        for row in rows
    }
