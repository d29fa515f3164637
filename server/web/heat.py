"""The heat map: how unlike the reference devices and sites are, by feature and over time.

    traces of the drift worker --bounded--> {features, devices, sites, more}

Evidence is -log10 of a p-value, 0 = as usual. A site's is the mean of its devices', at every time
that any of them was judged. A device that could not be judged yet has no row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..store.tables import Device, DriftState

FEATURES_MAX: Final = 12  # columns; the most unlike ones are drawn
ROWS_MAX: Final = 16  # devices, and sites
POINTS_MAX: Final = 24  # columns of a row's history
NAME_MAX: Final = 80

Point = tuple[int, dict[str, float]]
"""(Unix ms, evidence by feature)."""


def document(
    session: Session, fleet: Sequence[Mapping[str, Any]], *, devices_max: int
) -> dict[str, Any]:
    """Return what the heat map draws.

    Args:
        session: A session to read with.
        fleet: ``summary.fleet(...)["devices"]``.
        devices_max: Devices that are looked at, those that drift first.

    Returns:
        ``{"features": [name], "devices": [row], "sites": [row], "looked": n, "more": n}``; a row
        is ``{name, devices, now: [evidence or null], points: [[unix_ms, [evidence or null]]]}``
        with the values in the order of ``features``, ``more`` counts the features left out.
    """
    judged = [row for row in fleet if row["drift"] and row["model"]]
    judged.sort(key=lambda row: (not row["drift"].get("drifting"), row["id"]))
    looked = {row["id"]: row for row in judged[:devices_max]}
    rows = session.execute(
        select(Device.name, DriftState.model_sha256, DriftState.state["trace"])
        .join(DriftState, DriftState.device_id == Device.id)
        .where(Device.name.in_(looked))
    )
    traces: dict[str, list[Point]] = {}
    for name, model, trace in rows:
        points = _points(trace)
        if points and model == looked[name]["model"]["sha256"]:
            traces[name] = points
    strongest: dict[str, float] = defaultdict(float)
    for points in traces.values():
        for feature, value in points[-1][1].items():
            strongest[feature] = max(strongest[feature], value)
    features = sorted(strongest, key=lambda name: (-strongest[name], name))
    sites: dict[str, list[str]] = defaultdict(list)
    for name in traces:
        if site := looked[name]["site"]:
            sites[site].append(name)
    shown = features[:FEATURES_MAX]
    return {
        "features": [name[:NAME_MAX] for name in shown],
        "devices": _strongest([_row(name, 1, points, shown) for name, points in traces.items()]),
        "sites": _strongest(
            [
                _row(site, len(names), _together([traces[name] for name in names]), shown)
                for site, names in sites.items()
            ]
        ),
        "looked": len(traces),
        "more": len(features) - len(shown),
    }


def _points(trace: Any) -> list[Point]:
    """Return a trace's points, oldest first."""
    if not isinstance(trace, dict) or not trace.get("points"):
        return []
    names = trace["features"]
    return [
        (at, {name: value for name, value in zip(names, row, strict=False) if value is not None})
        for at, row in trace["points"]
    ]


def _together(traces: Sequence[list[Point]]) -> list[Point]:
    """Return the means of several devices, in at most POINTS_MAX steps of time."""
    times = sorted(at for points in traces for at, _ in points)
    step = max(1, -(-(times[-1] - times[0] + 1) // POINTS_MAX))
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for points in traces:
        for at, values in points:
            for name, value in values.items():
                found[(at - times[0]) // step][name].append(value)
    means = [
        (times[0] + bucket * step, {n: round(sum(v) / len(v), 1) for n, v in values.items()})
        for bucket, values in sorted(found.items())
    ]
    # What holds now is each device's newest judgement, however old the step that it fell into.
    newest: dict[str, list[float]] = defaultdict(list)
    for points in traces:
        for name, value in points[-1][1].items():
            newest[name].append(value)
    return [*means[:-1], (times[-1], {n: round(sum(v) / len(v), 1) for n, v in newest.items()})]


def _row(name: str, devices: int, points: list[Point], features: Sequence[str]) -> dict[str, Any]:
    lines = [[at, [values.get(f) for f in features]] for at, values in points[-POINTS_MAX:]]
    return {"name": name[:NAME_MAX], "devices": devices, "now": lines[-1][1], "points": lines}


def _strongest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def most(row: dict[str, Any]) -> float:
        return max((value for value in row["now"] if value is not None), default=0.0)

    return sorted(rows, key=lambda row: (-most(row), row["name"]))[:ROWS_MAX]
