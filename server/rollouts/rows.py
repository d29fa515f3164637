"""The rows of rollouts: find them, and keep the evidence of the wave in progress.

Nothing here decides: ``worker.py`` does, by the tables and gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..errors import InvalidError, NotFoundError
from ..store.tables import AssignmentRow, Device, Rollout, RolloutDevice
from . import evidence
from .gates import Verdict


def find_devices(session: Session, names: Sequence[str]) -> dict[str, Device]:
    """Return devices by id: those named, or all that are not revoked."""
    found: dict[str, Device] = {}
    if names:
        wanted = list(dict.fromkeys(names))
        for i in range(0, len(wanted), evidence.IDS_MAX):
            part = wanted[i : i + evidence.IDS_MAX]
            rows = session.scalars(select(Device).where(Device.name.in_(part)))
            found.update({device.name: device for device in rows})
        missing = [name for name in wanted if name not in found]
        if missing:
            raise NotFoundError(
                f"there is no device {', '.join(missing)[:200]}", hint="shoal devices list"
            )
        revoked = [name for name, device in found.items() if device.revoked_ms is not None]
        if revoked:
            raise InvalidError(f"revoked devices cannot take part: {', '.join(revoked)[:200]}")
    else:
        rows = session.scalars(select(Device).where(Device.revoked_ms.is_(None)))
        found = {device.name: device for device in rows}
    if not found:
        raise InvalidError("there is no device to roll out to", hint="shoal devices token")
    return found


def class_of(device: Device) -> str:
    """Return what a device reports as its class (hardware, site); "" when it reports none."""
    state = device.reported.get("state")
    return str(state.get("class", ""))[:80] if isinstance(state, dict) else ""


def progress_of(
    session: Session, device_id: int
) -> tuple[AssignmentRow, RolloutDevice, str] | None:
    """Return a device's assignment, its row in that rollout, and the rollout's model."""
    found = session.execute(
        select(AssignmentRow, RolloutDevice, Rollout.model_sha256)
        .join(
            RolloutDevice,
            (RolloutDevice.rollout_id == AssignmentRow.rollout_id)
            & (RolloutDevice.device_id == AssignmentRow.device_id),
        )
        .join(Rollout, Rollout.id == AssignmentRow.rollout_id)
        .where(AssignmentRow.device_id == device_id)
    ).first()
    return None if found is None else (found[0], found[1], found[2])


def note(rollout: Rollout, entry: dict[str, Any]) -> None:
    """Keep the newest entry of the wave in progress."""
    kept = [each for each in rollout.evidence if each["wave"] != rollout.wave]
    rollout.evidence = [*kept, {**entry, "wave": rollout.wave}]


def note_lack(rollout: Rollout, own: dict[str, Any], now_ms: int) -> None:
    """Mark the entry of the wave in progress as what the operator may accept."""
    entry = entry_of(rollout) or {
        **own,
        "verdict": str(Verdict.INSUFFICIENT),
        "reasons": [*own["reasons"], "not every device sent its telemetry windows"],
        "at_ms": now_ms,
        "accepted": False,
    }
    note(rollout, {**entry, "lacked": True})


def accept(rollout: Rollout) -> None:
    """Mark the lacking evidence of the wave in progress as accepted by the operator."""
    entry = entry_of(rollout)
    if entry is not None and entry.get("lacked"):
        note(rollout, {**entry, "accepted": True})


def is_accepted(rollout: Rollout) -> bool:
    """Return whether the operator accepted the evidence of the wave in progress."""
    entry = entry_of(rollout)
    return entry is not None and bool(entry["accepted"])


def entry_of(rollout: Rollout) -> dict[str, Any] | None:
    """Return the evidence entry of the wave in progress."""
    found = [each for each in rollout.evidence if each["wave"] == rollout.wave]
    return found[-1] if found else None
