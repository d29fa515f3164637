"""What the page shows, as one JSON document read in one transaction.

    summary   devices, drifting, totals, accuracy, version   the tiles
    fleet     total, devices: [{id, online, model, accuracy, trend, drift, rollout, warnings,
              untold, …}], the last two as shoal.server.api.reported reads them
    accuracy  since_ms, until_ms, bucket_ms, devices: [{id, points}], median     the chart
    rollouts  [{model, state, counts, eligible, waves, began, evidence, …}]      newest first
    alerts    open, alerts: [{kind, scope, subject, text, evidence, …}]          live ones first
    drift     features, devices, sites: [{name, now, points}]                    the heat map
    rounds    [{round, rounds, state, history, …}]                               newest first

Rules of honesty: what is not known is null and never a guess; shares come with the counts they
are made of; denominators count every device that was meant, answering or not. The facts come from
``shoal.server.api.summary``, which the command line asks too; here they are put into the page's
shape and bounded.

Accuracy of a device *now* is that of the model it reports to run, over its newest labelled
windows, at least ``NOW_WINDOWS`` of them if there are as many.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import case, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ... import __version__
from ..api import summary
from ..drift.alerts import AlertState
from ..drift.verdicts import place_name
from ..errors import StoreError
from ..store import Store
from ..store.tables import Alert, Device, Labels, RolloutDevice, RoundsRun
from . import heat
from .config import ConsoleConfig

NOW_WINDOWS: Final = 200  # two standard errors are 4 points at 90 %; older ones say less of now
BUCKETS: Final = 48  # of the chart: wide enough to hold labels, narrow enough to show a change
STEPS_S: Final = (2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
TREND: Final = 24  # newest points of a device's sparkline
ROLLOUTS_MAX: Final = 10
RUNS_MAX: Final = 5
FEATURES_MAX: Final = 16
TEXT_MAX: Final = 600  # characters; a page is no place for more
SEVERE: Final = frozenset({"accuracy_loss", "key_conflict"})
ORDER: Final = {state.value: at for at, state in enumerate(AlertState)}
ALERT_DEVICES_MAX: Final = 12  # names of an alert's devices; the counts are always whole

Counts = list[tuple[int, int, int]]
"""(start of the bucket in Unix ms, labelled, correct), ascending in time."""
Series = Mapping[str, Mapping[str, Counts]]
"""Device -> digest of a model -> counts."""


def look(store: Store, *, now_ms: int, config: ConsoleConfig) -> dict[str, Any]:
    """Return the whole document.

    Args:
        store: The database.
        now_ms: Unix ms.
        config: How much to show.

    Raises:
        StoreError: The database could not be read.
    """
    try:
        with store.read() as session:
            return _look(session, now_ms, config)
    except SQLAlchemyError as exc:
        raise StoreError(
            f"the database could not be read: {exc!s:.200}",
            hint="look at the server's log; the page shows what was read last",
        ) from exc


def _look(session: Session, now_ms: int, config: ConsoleConfig) -> dict[str, Any]:
    since_ms, bucket_ms = _range(session, now_ms, config.history_s)
    series = _series(session, since_ms, bucket_ms)
    rollouts = _rollouts(session)
    versions = {rollout["id"]: rollout["version"] for rollout in rollouts}
    fleet = summary.fleet(session, now_ms)["devices"]
    devices = [_device(row, series.get(row["id"], {}), versions) for row in fleet]
    urgent = sorted(devices, key=lambda row: (-_urgency(row), row["id"]))
    shown = sorted(urgent[: config.devices_max], key=lambda row: row["id"])
    chart = _chart(
        {row["id"]: series[row["id"]] for row in shown if row["id"] in series},
        range(since_ms, now_ms - bucket_ms + 1, bucket_ms),
    )
    trends = {line["id"]: [point[1] for point in line["points"]] for line in chart["devices"]}
    for row in shown:
        row["trend"] = trends.get(row["id"], [])[-TREND:]
    return {
        "summary": {
            "version": __version__,
            "devices": {
                "total": len(devices),
                "online": sum(row["online"] and not row["revoked"] for row in devices),
            },
            "drifting": [row["id"] for row in devices if row["drift"] and row["drift"]["drifting"]],
            "totals": summary.totals(session),
            "accuracy": _now(devices),
        },
        "fleet": {"total": len(devices), "devices": shown},
        "accuracy": {"since_ms": since_ms, "bucket_ms": bucket_ms, **chart},
        "rollouts": rollouts[:ROLLOUTS_MAX],
        "alerts": _alerts(session, config.alerts_max),
        "drift": heat.document(session, fleet, devices_max=config.heat_devices_max),
        "rounds": _rounds(session),
    }


# --- devices ---------------------------------------------------------------------------------


def _device(
    row: Mapping[str, Any], by_model: Mapping[str, Counts], versions: Mapping[str, int | None]
) -> dict[str, Any]:
    model, drift, rollout = row["model"], row["drift"], row["rollout"]
    running = model["sha256"] if model else ""
    others = {sha: counts for sha, counts in by_model.items() if sha != running}
    return {
        "id": row["id"],
        "online": row["online"],
        "revoked": row["revoked"],
        "seen_ms": row["seen_ms"],
        "model": model and {key: model[key] for key in ("sha256", "name", "version")},
        "accuracy": _newest(by_model.get(running, [])),
        # The model that ran before: the one among the others that was labelled last.
        "before": _newest(max(others.values(), key=lambda counts: counts[-1][0], default=[])),
        "drift": drift
        and {
            "drifting": bool(drift.get("drifting")),
            "features": [str(name)[:80] for name in drift.get("features", [])][:FEATURES_MAX],
            "text": _text(drift.get("text")),
            "windows": drift["windows"],
        },
        "rollout": rollout
        and {
            "id": rollout["id"],
            "version": versions.get(rollout["id"]),
            "state": rollout["state"],
            "reason": _text(rollout["reason"]),
        },
        "warnings": row["warnings"],
        "untold": row["untold"],
        "reported_ms": row["reported_ms"],
    }


def _newest(counts: Counts) -> dict[str, Any] | None:
    """Return the share over the newest windows, at least NOW_WINDOWS if there are as many."""
    labelled = correct = 0
    for _, more, right in reversed(counts):
        labelled, correct = labelled + more, correct + right
        if labelled >= NOW_WINDOWS:
            break
    if not labelled:
        return None
    return {"value": round(correct / labelled, 4), "correct": correct, "labelled": labelled}


def _urgency(row: Mapping[str, Any]) -> int:
    drifting = bool(row["drift"] and row["drift"]["drifting"])
    failed = bool(row["rollout"] and row["rollout"]["state"] in ("failed", "silent"))
    warned = bool(row["warnings"] or (row["untold"] and row["untold"]["text"]))
    return 8 * failed + 4 * drifting + 2 * (not row["online"]) + warned


def _now(devices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fleet's median, and what it gained over the models that ran before."""
    known = [row for row in devices if row["accuracy"]]
    paired = [row for row in known if row["before"]]
    return {
        "value": _median([row["accuracy"]["value"] for row in known]),
        "devices": len(known),
        "gain": _median([row["accuracy"]["value"] - row["before"]["value"] for row in paired]),
    }


# --- the chart -------------------------------------------------------------------------------


def _range(session: Session, now_ms: int, history_s: int) -> tuple[int, int]:
    """Return (start, width of a bucket) of the chart, both ms; the start is a multiple."""
    oldest = session.scalar(select(Labels.received_ms).order_by(Labels.id).limit(1))
    since = max(now_ms - 1000 * history_s, min(now_ms, oldest if oldest is not None else now_ms))
    span_s = (now_ms - since) / 1000
    bucket_ms = 1000 * next((step for step in STEPS_S if step * BUCKETS >= span_s), STEPS_S[-1])
    return since - since % bucket_ms, bucket_ms


def _series(session: Session, since_ms: int, bucket_ms: int) -> Series:
    found: dict[str, dict[str, Counts]] = defaultdict(dict)
    series = summary.accuracy_series(session, since_ms=since_ms, bucket_ms=bucket_ms)["series"]
    for line in series:
        counts = [(at, labelled, right) for at, labelled, right in line["points"] if labelled]
        if counts:
            found[line["device"]][line["model_sha256"]] = counts
    return found


def _chart(series: Series, times: range) -> dict[str, Any]:
    """Return the lines: points are [Unix ms of the bucket's middle, share or null, labelled].

    ``times`` ends before the bucket in progress: its share jumps about until it is full.
    """
    middle = times.step // 2
    lines, shares = [], defaultdict[int, list[float]](list)
    for name, by_model in series.items():
        sums: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for counts in by_model.values():
            for at, labelled, correct in counts:
                sums[at] = (sums[at][0] + labelled, sums[at][1] + correct)
        points: list[list[Any]] = []
        for at in times:
            labelled, correct = sums[at]
            share = round(correct / labelled, 4) if labelled else None
            points.append([at + middle, share, labelled])
            if share is not None:
                shares[at].append(share)
        if any(point[2] for point in points):
            lines.append({"id": name, "points": points})
    return {
        "until_ms": times.start + len(times) * times.step,
        "devices": lines,
        "median": [[at + middle, _median(shares[at])] for at in times],
    }


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


# --- the rest ----------------------------------------------------------------------------------


def _rollouts(session: Session) -> list[dict[str, Any]]:
    found = summary.rollouts(session)
    began: dict[str, dict[int, int]] = defaultdict(dict)
    rows = session.execute(
        select(RolloutDevice.rollout_id, RolloutDevice.wave, func.min(RolloutDevice.offered_ms))
        .where(RolloutDevice.rollout_id.in_([row["id"] for row in found]))
        .group_by(RolloutDevice.rollout_id, RolloutDevice.wave)
    )
    for rollout_id, wave, at in rows:
        if at is not None:
            began[rollout_id][wave] = at
    return [
        {
            "id": row["id"],
            "model_sha256": row["model_sha256"],
            "name": row["name"],
            "version": row["version"],
            "state": row["state"],
            "wave": row["wave"],
            "eligible": sum(row["counts"].values()),
            "counts": row["counts"],
            "waves": [
                {
                    "devices": sum(counts.values()),
                    "counts": counts,
                    "began_ms": began[row["id"]].get(number),
                    "evidence": _evidence(row["evidence"], number),
                }
                for number, counts in enumerate(row["wave_counts"])
            ],
            "reason": _text(row["reason"]),
            "created_ms": row["created_ms"],
            "changed_ms": row["changed_ms"],
        }
        for row in found
    ]


def _evidence(entries: Sequence[Mapping[str, Any]], wave: int) -> dict[str, Any] | None:
    """Return the newest judgement of a wave, None while there is none."""
    judged = [entry for entry in entries if entry.get("wave") == wave]
    if not judged:
        return None
    checks = [
        {"verdict": _text(check.get("verdict")), "text": _text(check.get("text"))}
        for check in judged[-1].get("checks", [])
    ]
    return {"verdict": _text(judged[-1].get("verdict")), "checks": checks}


def _alerts(session: Session, limit: int) -> dict[str, Any]:
    rows = session.execute(
        select(Alert, Device.name)
        .outerjoin(Device, Device.id == Alert.device_id)
        .order_by(case(ORDER, value=Alert.state, else_=len(ORDER)), Alert.opened_ms.desc())
        .limit(limit)
    )
    return {
        "open": session.scalar(select(func.count(Alert.id)).where(Alert.state == "open")) or 0,
        "alerts": [_alert(alert, name) for alert, name in rows],
    }


def _alert(alert: Alert, name: str | None) -> dict[str, Any]:
    subject = alert.subject or name or ""
    where = place_name(alert.scope, subject)
    suspected = bool(alert.evidence.get("suspected"))
    return {
        "id": alert.id,
        "device": name,
        "scope": alert.scope,
        "subject": subject,
        "where": _text(where),
        "kind": alert.kind,
        "suspected": suspected,
        "tone": "bad" if alert.kind in SEVERE and not suspected else "warn",
        "state": alert.state,
        "text": _text(alert.text.removeprefix(f"{where}: ")),
        "evidence": _counted(alert.evidence),
        "seen": alert.seen,
        "note": _text(alert.note),
        "opened_ms": alert.opened_ms,
        "silenced_until_ms": alert.silenced_until_ms if alert.state == "silenced" else None,
        "resolved_ms": alert.resolved_ms,
    }


def _counted(evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of a verdict's evidence that a page has room for; None = it has none."""
    if "judged" not in evidence:
        return None
    return {
        "affected": evidence["affected"],
        "judged": evidence["judged"],
        "rest": evidence["rest"],
        "p_value": evidence["p_value"],
        "devices": [_text(name) for name in evidence["devices"][:ALERT_DEVICES_MAX]],
        "features": [
            {"feature": _text(each["feature"]), "devices": each["devices"]}
            for each in evidence["features"][:FEATURES_MAX]
        ],
    }


def _rounds(session: Session) -> list[dict[str, Any]]:
    runs = session.scalars(
        select(RoundsRun).order_by(RoundsRun.created_ms.desc(), RoundsRun.id).limit(RUNS_MAX)
    )
    return [
        {
            "id": run.id,
            "state": run.state,
            "round": run.round,
            "rounds": int(run.settings.get("rounds", run.round)),
            "base_sha256": run.base_sha256,
            "candidate_sha256": run.candidate_sha256,
            "history": [_round(entry) for entry in run.history],
            "reason": _text(run.reason),
            "created_ms": run.created_ms,
            "changed_ms": run.changed_ms,
        }
        for run in runs
    ]


def _round(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The loss before local training is that of the fleet's model, on the devices' own data."""
    devices = entry.get("devices", 0)
    return {
        "round": entry.get("round"),
        "devices": len(devices) if isinstance(devices, list) else devices,
        "loss": entry.get("loss_first"),
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:TEXT_MAX]
