"""Read from the database what a gate needs to know; it judges nothing.

Each function is one or a few queries over indexed ranges, bounded per device, whatever the size
of the fleet's history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.orm import Session

from ..store.tables import Labels, Model, Rollout, RolloutDevice, Window
from .gates import Cluster, Observed, Seen
from .states import DeviceState

IDS_MAX = 500  # per query: SQLite takes 32,766 variables, and a plan is cached by their number


def counts(session: Session, rollout: Rollout, *, wave: int) -> dict[str, int]:
    """Return the devices of a wave by state."""
    rows = session.execute(
        select(RolloutDevice.state, func.count(RolloutDevice.id))
        .where(RolloutDevice.rollout_id == rollout.id, RolloutDevice.wave == wave)
        .group_by(RolloutDevice.state)
    )
    return {state: count for state, count in rows}


def previous(session: Session, rollout_id: str, device_ids: Collection[int]) -> dict[int, str]:
    """Return, by device, the approved model that it confirmed last before this rollout.

    Devices without one are left out, and so are those that had this very model.
    """
    own = select(func.min(RolloutDevice.id)).where(RolloutDevice.rollout_id == rollout_id)
    first = session.scalar(own)
    model = session.scalar(select(Rollout.model_sha256).where(Rollout.id == rollout_id))
    found: dict[int, str] = {}
    for ids in _chunks(device_ids):
        rows = session.execute(
            select(RolloutDevice.device_id, Rollout.model_sha256)
            .join(Rollout, Rollout.id == RolloutDevice.rollout_id)
            .join(Model, Model.sha256 == Rollout.model_sha256)
            .where(
                RolloutDevice.device_id.in_(ids),
                RolloutDevice.id < first,
                RolloutDevice.state == DeviceState.CONFIRMED,
                Model.approved_ms.is_not(None),
            )
            .order_by(RolloutDevice.id)
        )
        found.update({device: sha256 for device, sha256 in rows})
    return {device: sha256 for device, sha256 in found.items() if sha256 != model}


def windows_since_offer(session: Session, rollout: Rollout, *, wave: int) -> dict[int, int]:
    """Return how many telemetry windows each confirmed device of a wave sent with the new model."""
    rows = session.execute(
        select(RolloutDevice.device_id, func.count(Window.id))
        .outerjoin(Window, _since_offer(Window, rollout))
        .where(*_confirmed(rollout, wave))
        .group_by(RolloutDevice.device_id)
    )
    return {device: count for device, count in rows}


def observe(session: Session, rollout: Rollout, *, wave: int, windows_max: int) -> Observed:
    """Return what the confirmed devices of a wave showed now and before, and the control.

    Args:
        session: A session to read with.
        rollout: The rollout.
        wave: Which wave, from 0.
        windows_max: Newest windows and label records of a device that are read.
    """
    now: dict[int, Seen] = {
        device: Seen()
        for device in session.scalars(
            select(RolloutDevice.device_id).where(*_confirmed(rollout, wave))
        )
    }
    members = select(RolloutDevice.device_id).where(*_confirmed(rollout, wave))
    _read(
        session,
        now,
        windows=(
            Window.device_id.in_(members),
            Window.model_sha256 == rollout.model_sha256,
            Window.received_ms >= _offered_ms(Window, rollout),
        ),
        labels=(
            Labels.device_id.in_(members),
            Labels.model_sha256 == rollout.model_sha256,
            Labels.received_ms >= _offered_ms(Labels, rollout),
        ),
        windows_max=windows_max,
    )
    before: dict[int, Seen] = {}
    by_model: dict[str, list[int]] = defaultdict(list)
    for device, sha256 in previous(session, rollout.id, now).items():
        by_model[sha256].append(device)
    for sha256, devices in by_model.items():
        for ids in _chunks(devices):
            _read(
                session,
                before,
                windows=(Window.device_id.in_(ids), Window.model_sha256 == sha256),
                labels=(Labels.device_id.in_(ids), Labels.model_sha256 == sha256),
                windows_max=windows_max,
            )
    return Observed(now, before, _control(session, rollout, wave, windows_max))


def _control(session: Session, rollout: Rollout, wave: int, windows_max: int) -> Seen:
    """Return what the devices of later waves showed since this wave began, pooled."""
    began = session.scalar(
        select(func.min(RolloutDevice.offered_ms)).where(
            RolloutDevice.rollout_id == rollout.id, RolloutDevice.wave == wave
        )
    )
    waiting = select(RolloutDevice.device_id).where(
        RolloutDevice.rollout_id == rollout.id, RolloutDevice.wave > wave
    )
    found: dict[int, Seen] = {}
    if began is not None:
        _read(
            session,
            found,
            windows=(
                Window.device_id.in_(waiting),
                Window.model_sha256 != rollout.model_sha256,
                Window.received_ms >= began,
            ),
            labels=(
                Labels.device_id.in_(waiting),
                Labels.model_sha256 != rollout.model_sha256,
                Labels.received_ms >= began,
            ),
            windows_max=windows_max,
        )
    pooled = Seen()
    for seen in found.values():
        pooled.windows += seen.windows
        pooled.labels += seen.labels
        _add(pooled.latency_us, seen.latency_us)
    return pooled


def _read(
    session: Session,
    found: dict[int, Seen],
    *,
    windows: Iterable[ColumnElement[bool]],
    labels: Iterable[ColumnElement[bool]],
    windows_max: int,
) -> None:
    """Add the newest windows and label records of each device to ``found``."""
    for device, predictions, errors, latency_us in session.execute(
        _newest(
            Window,
            (Window.predictions, Window.errors, Window.latency_us),
            windows,
            windows_max,
        )
    ):
        seen = found.setdefault(device, Seen())
        # A call that failed is counted in errors alone, one that answered in predictions alone.
        seen.windows.append(Cluster(predictions + errors, errors))
        _add(seen.latency_us, latency_us)
    held_out = (*labels, Labels.split != 0)  # on split 0 the model may have been trained
    for device, labelled, correct in session.execute(
        _newest(Labels, (Labels.labelled, Labels.correct), held_out, windows_max)
    ):
        found.setdefault(device, Seen()).labels.append(Cluster(labelled, correct))


def _newest(
    table: Any, columns: Sequence[Any], where: Iterable[ColumnElement[bool]], limit: int
) -> Select[Any]:
    place = func.row_number().over(partition_by=table.device_id, order_by=table.id.desc())
    inner = select(table.device_id, *columns, place.label("place")).where(*where).subquery()
    return select(inner.c.device_id, *(inner.c[column.key] for column in columns)).where(
        inner.c.place <= limit
    )


def _since_offer(table: Any, rollout: Rollout) -> ColumnElement[bool]:
    return and_(
        table.device_id == RolloutDevice.device_id,
        table.model_sha256 == rollout.model_sha256,
        table.received_ms >= RolloutDevice.offered_ms,
    )


def _offered_ms(table: Any, rollout: Rollout) -> Any:
    return (
        select(RolloutDevice.offered_ms)
        .where(RolloutDevice.rollout_id == rollout.id, RolloutDevice.device_id == table.device_id)
        .scalar_subquery()
    )


def _confirmed(rollout: Rollout, wave: int) -> tuple[ColumnElement[bool], ...]:
    return (
        RolloutDevice.rollout_id == rollout.id,
        RolloutDevice.wave == wave,
        RolloutDevice.state == DeviceState.CONFIRMED,
    )


def _add(into: list[int], counts_of: Sequence[int]) -> None:
    for i, count in enumerate(counts_of):
        into[i] += count


def _chunks(ids: Collection[int]) -> Iterable[list[int]]:
    ordered = sorted(ids)
    return (ordered[i : i + IDS_MAX] for i in range(0, len(ordered), IDS_MAX))
