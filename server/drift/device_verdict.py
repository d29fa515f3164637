"""What is told of one device: its own evidence, and the scope it is part of. Pure.

The fleet's verdicts are those of ``verdicts.py``; rows are read and written by ``worker.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import detectors, verdicts
from .detectors import DeviceState
from .verdicts import Look, Verdict


def device_verdict(
    name: str,
    before: Mapping[str, Any],
    look: Look,
    state: DeviceState,
    told: Sequence[Verdict],
) -> dict[str, Any]:
    """Return what is told of a device that was judged.

    Args:
        name: Of the device.
        before: What was told of it last; {} = nothing yet.
        look: What was found of it.
        state: Of its detectors, after the judgement.
        told: Verdicts of the whole fleet.

    Returns:
        ``{drifting, kind, scope, features, text, detected_after_windows, findings, changes,
        scores, faults}``, JSON.
    """
    if not state.open:
        return nothing_found(name)
    mine = next((each for each in told if name in each.locus.affected), None)
    kind = mine.kind if mine else before.get("kind") or _kind(state)
    named = [
        f.feature for f in look.kept if f.feature not in (detectors.ACCURACY, detectors.INPUTS)
    ]
    broken = [fault.feature for fault in look.faults if fault.feature]
    changed = [each.feature for each in look.changes]
    text = detectors.sentence(name, look.kept, look.found)
    if look.changes:
        said = f"changed since its first windows: {verdicts.changes_text(look.changes)}"
        text = f"{text}; {said}" if look.kept else f"{name}: {said}"
    if look.faults:
        said = "; ".join(f"{fault.said} in {fault.share:.0%}" for fault in look.faults[:3])
        text = f"{text}; {said}" if look.kept or look.changes else f"{name}: {said}"
    elif not (look.kept or look.changes) and before.get("drifting"):
        text = before["text"]  # an alarm that is about to end keeps its last words until then
    return {
        "drifting": True,
        "kind": kind,
        "scope": str(mine.scope) if mine else "device",
        "features": list(dict.fromkeys([*broken, *named, *changed]))
        or [each.feature for each in detectors.unlike(look.found)],  # all together, none alone
        "text": text,
        "detected_after_windows": state.opened_windows,
        "findings": [verdicts.finding_json(each) for each in (look.kept or look.found)],
        "changes": [verdicts.finding_json(each) for each in look.changes],
        "scores": list(look.scores),
        "faults": [verdicts.fault_json(each) for each in look.faults],
    }


def nothing_found(device: str) -> dict[str, Any]:
    """Return what is told of a device that has no open alarm."""
    return {
        "drifting": False,
        "kind": "",
        "scope": "",
        "features": [],
        "text": f"{device}: like what the model was made with",
        "detected_after_windows": 0,
        "findings": [],
        "changes": [],
        "scores": [],
        "faults": [],
    }


def alarms(state: DeviceState) -> dict[str, bool]:
    """Return what is found of a device now, or is open still: cause -> whether it is confirmed."""
    return {
        name: alarm.open for name, alarm in state.alarms.items() if alarm.open or alarm.streak > 0
    }


def unlike(state: DeviceState) -> bool:
    """Return whether the last judgement found the inputs or the confidence of a device unlike."""
    causes = (verdicts.SHIFT, verdicts.SUSPICION)
    return any(name in state.alarms for name in causes)


def _kind(state: DeviceState) -> str:
    """Return the kind of a device's own alarms, where no verdict covers it."""
    causes = {name for name, alarm in state.alarms.items() if alarm.open}
    if causes & {verdicts.LOSS, verdicts.SUSPICION}:
        return verdicts.ACCURACY_LOSS
    faulty = any(cause.startswith(verdicts.FAULT) for cause in causes)
    return verdicts.SENSOR_FAULT if faulty else verdicts.LOCAL_SHIFT
