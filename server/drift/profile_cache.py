"""The profiles of registered models, read once, with the devices that a model learned from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...ext.sketch import SketchBank, SketchRecordError
from ..store.tables import Device, Model, RoundsRun, Task, Window
from .errors import ProfileError
from .profile import ReferenceProfile, with_devices
from .windows import window_counts

log = logging.getLogger(__name__)

TAUGHT_WINDOWS_MAX: Final = 64  # per device: enough for its bins, and little to read


class Profiles:
    """By digest. A model's profile never changes."""

    def __init__(self) -> None:
        self._known: dict[str, ReferenceProfile | None] = {}

    def of(self, session: Session, model: str) -> ReferenceProfile | None:
        """Return the profile of a model; None if there is none, or none that can be read."""
        if model not in self._known:
            row = session.scalars(select(Model).where(Model.sha256 == model)).first()
            try:
                found = ReferenceProfile.from_dict(row.profile) if row is not None else None
                if row is not None and found is not None:
                    found = _taught(session, row, found)
            except ProfileError as exc:
                log.warning("model %.12s has no usable profile: %s", model, exc)
                found = None
            self._known[model] = found
        return self._known[model]


def _taught(session: Session, model: Model, found: ReferenceProfile) -> ReferenceProfile:
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
                counted.append(window_counts(SketchBank.from_bytes(sketch), old)[0][:-1])
        if len(counted) >= 2:
            middle = len(counted) // 2
            halves[name] = (_sum(counted[:middle]), _sum(counted[middle:]))
    return with_devices(found, halves) if halves else found


def _sum(tables: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return the counts of several windows together, F x B."""
    return [[sum(bins) for bins in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
