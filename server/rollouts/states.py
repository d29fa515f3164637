"""The states of rollouts and of the devices in them, as two tables.

Rule 1: every transition is in ROLLOUT or DEVICE below; nothing else decides what follows.
Rule 2: this file does not know the database, MQTT, or time; ``worker.py`` feeds it events.
Rule 3: a device counts as a success only in CONFIRMED, which only its own word brings about.

    rollout   RUNNING -> BAKING -> RUNNING (next wave) … -> COMPLETED
              RUNNING, BAKING -> FAILED; PAUSED at any time; ABORTED and SUPERSEDED end it

    device    ELIGIBLE -> OFFERED -> DOWNLOADING -> TRIAL -> CONFIRMED
              any of the last four -> FAILED, SILENT, SUPERSEDED
              FAILED, SILENT -> CONFIRMED: the device's word, even if it comes late
              an ended rollout's device that goes back: REVERTING -> REVERTED
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from .errors import IllegalEventError


class RolloutState(StrEnum):
    """States of a rollout."""

    RUNNING = "running"
    """The wave's devices are offered the model, or have not all come to an end with it."""
    BAKING = "baking"
    """Each device of the wave confirmed, failed or fell silent; the gate gathers evidence."""
    PAUSED = "paused"
    """Nothing is offered or judged until it is resumed; devices go on with what they have."""
    COMPLETED = "completed"
    FAILED = "failed"
    """A gate said so; the devices go back."""
    ABORTED = "aborted"
    """The operator said so; the devices go back."""
    SUPERSEDED = "superseded"
    """A newer rollout took every device that was still to come."""


class RolloutEvent(StrEnum):
    """What happens to a rollout."""

    WAVE_SETTLED = "wave_settled"
    WAVE_PASSED = "wave_passed"
    """The gate passed, and there is a next wave."""
    LAST_WAVE_PASSED = "last_wave_passed"
    GATE_FAILED = "gate_failed"
    EVIDENCE_LACKED = "evidence_lacked"
    """The longest baking time passed without a verdict."""
    PAUSED = "paused"
    RESUMED = "resumed"
    ABORTED = "aborted"
    TAKEN_OVER = "taken_over"


class DeviceState(StrEnum):
    """States of a device in a rollout."""

    ELIGIBLE = "eligible"
    OFFERED = "offered"
    DOWNLOADING = "downloading"
    TRIAL = "trial"
    CONFIRMED = "confirmed"
    FAILED = "failed"
    SILENT = "silent"
    SUPERSEDED = "superseded"
    REVERTING = "reverting"
    REVERTED = "reverted"


class DeviceEvent(StrEnum):
    """What happens to a device in a rollout."""

    ASSIGNED = "assigned"
    DOWNLOAD_TOLD = "download_told"
    TRIAL_TOLD = "trial_told"
    CONFIRMATION_TOLD = "confirmation_told"
    FAILURE_TOLD = "failure_told"
    """It said that it gave the model up, or that it runs another one after it had confirmed."""
    DEADLINE_PASSED = "deadline_passed"
    TAKEN_OVER = "taken_over"
    """By a newer rollout, or by its revocation."""
    CALLED_BACK = "called_back"
    """It was assigned the model that it ran before."""
    RETURN_TOLD = "return_told"
    """It confirmed the model that it ran before."""


_R, _E = RolloutState, RolloutEvent
_LIVE: Final = (_R.RUNNING, _R.BAKING, _R.PAUSED)

ROLLOUT: Final[Mapping[RolloutState, Mapping[RolloutEvent, RolloutState]]] = {
    _R.RUNNING: {
        _E.WAVE_SETTLED: _R.BAKING,
        _E.GATE_FAILED: _R.FAILED,  # too many failures, before the rest of the wave came to an end
        _E.PAUSED: _R.PAUSED,
        _E.ABORTED: _R.ABORTED,
        _E.TAKEN_OVER: _R.SUPERSEDED,
    },
    _R.BAKING: {
        _E.WAVE_PASSED: _R.RUNNING,
        _E.LAST_WAVE_PASSED: _R.COMPLETED,
        _E.GATE_FAILED: _R.FAILED,
        _E.EVIDENCE_LACKED: _R.PAUSED,
        _E.PAUSED: _R.PAUSED,
        _E.ABORTED: _R.ABORTED,
        _E.TAKEN_OVER: _R.SUPERSEDED,
    },
    _R.PAUSED: {
        _E.RESUMED: _R.RUNNING,  # which finds out anew whether the wave has settled
        _E.ABORTED: _R.ABORTED,
        _E.TAKEN_OVER: _R.SUPERSEDED,
    },
    _R.COMPLETED: {},
    _R.FAILED: {},
    _R.ABORTED: {},
    _R.SUPERSEDED: {},
}

_D, _V = DeviceState, DeviceEvent
_ENDS: Final = {
    _V.CONFIRMATION_TOLD: _D.CONFIRMED,
    _V.FAILURE_TOLD: _D.FAILED,
    _V.DEADLINE_PASSED: _D.SILENT,
    _V.TAKEN_OVER: _D.SUPERSEDED,
    _V.CALLED_BACK: _D.REVERTING,
}

DEVICE: Final[Mapping[DeviceState, Mapping[DeviceEvent, DeviceState]]] = {
    _D.ELIGIBLE: {_V.ASSIGNED: _D.OFFERED, _V.TAKEN_OVER: _D.SUPERSEDED},
    _D.OFFERED: {_V.DOWNLOAD_TOLD: _D.DOWNLOADING, _V.TRIAL_TOLD: _D.TRIAL, **_ENDS},
    _D.DOWNLOADING: {_V.TRIAL_TOLD: _D.TRIAL, **_ENDS},
    _D.TRIAL: {**_ENDS},
    _D.CONFIRMED: {
        _V.FAILURE_TOLD: _D.FAILED,  # it fell back: a success that did not last is none
        _V.DEADLINE_PASSED: _D.SILENT,  # it confirmed and was not heard of again while baking
        _V.CALLED_BACK: _D.REVERTING,
    },
    # What ended badly may still end well, when the device says so: its word is the only proof.
    # Calling it back leaves its mark: that it failed stays evidence.
    _D.FAILED: {_V.CONFIRMATION_TOLD: _D.CONFIRMED},
    _D.SILENT: {_V.CONFIRMATION_TOLD: _D.CONFIRMED, _V.FAILURE_TOLD: _D.FAILED},
    _D.SUPERSEDED: {},
    _D.REVERTING: {_V.RETURN_TOLD: _D.REVERTED, _V.TAKEN_OVER: _D.SUPERSEDED},
    _D.REVERTED: {},
}

LIVE: Final = frozenset(_LIVE)
"""Rollouts that the worker still has to do with."""
OPEN: Final = frozenset({_D.ELIGIBLE, _D.OFFERED, _D.DOWNLOADING, _D.TRIAL})
"""Devices that have not come to an end; a wave with none of them has settled."""
WAITING: Final = frozenset({_D.OFFERED, _D.DOWNLOADING, _D.TRIAL})
"""Devices that the deadline watches."""

S = TypeVar("S", RolloutState, DeviceState)
E = TypeVar("E", RolloutEvent, DeviceEvent)


def after(table: Mapping[S, Mapping[E, S]], state: S, event: E) -> S:
    """Return the state that follows.

    Raises:
        IllegalEventError: The table has no such step.
    """
    try:
        return table[state][event]
    except KeyError:
        raise IllegalEventError(
            f"{type(state).__name__} {state.value!r} does not take the event {event.value!r}",
            hint="look at its state first: shoal rollouts status",
        ) from None
