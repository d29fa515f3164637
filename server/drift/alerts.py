"""The life of an alert, as a table. Pure.

Rule 1: every transition is in ALERT below; nothing else decides what follows.
Rule 2: this file does not know the database or time; ``worker.py`` and the API feed it events.
Rule 3: one alert of a fingerprint is live at a time; finding it again counts, and adds no row.

    open          --acknowledge--> acknowledged     --silence--> silenced until a time
    acknowledged  --silence--> silenced             silenced --its time is over--> open
    open, acknowledged, silenced  --cleared, or resolved by an operator--> resolved
    resolved      --found again soon enough--> open

A fingerprint is (kind, scope, subject, model). An alert that is found again within ``flap_s`` of
its end is the same one and opens again, silent still if its silence lasts; later it is a new one.
What an operator resolved is given ``repair_s``: the evidence looks back on windows of before the
repair, and would open it again at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from .errors import AlertEventError


class AlertState(StrEnum):
    """States of an alert."""

    OPEN = "open"
    """Found, and nobody has said anything about it."""
    ACKNOWLEDGED = "acknowledged"
    """An operator has seen it and is on it."""
    SILENCED = "silenced"
    """An operator does not want to hear of it until a time."""
    RESOLVED = "resolved"
    """It is not found any more, or an operator said that it is over."""


class AlertEvent(StrEnum):
    """What happens to an alert."""

    FOUND = "found"
    """A judgement found it again."""
    CLEARED = "cleared"
    """Judgements do not find it any more, or a larger scope explains it."""
    ACKNOWLEDGE = "acknowledge"
    SILENCE = "silence"
    SILENCE_OVER = "silence_over"
    RESOLVE = "resolve"


_S, _E = AlertState, AlertEvent

ALERT: Final[Mapping[AlertState, Mapping[AlertEvent, AlertState]]] = {
    _S.OPEN: {
        _E.FOUND: _S.OPEN,
        _E.CLEARED: _S.RESOLVED,
        _E.ACKNOWLEDGE: _S.ACKNOWLEDGED,
        _E.SILENCE: _S.SILENCED,
        _E.RESOLVE: _S.RESOLVED,
    },
    _S.ACKNOWLEDGED: {
        _E.FOUND: _S.ACKNOWLEDGED,
        _E.CLEARED: _S.RESOLVED,
        _E.SILENCE: _S.SILENCED,
        _E.RESOLVE: _S.RESOLVED,
    },
    _S.SILENCED: {
        _E.FOUND: _S.SILENCED,
        _E.CLEARED: _S.RESOLVED,
        _E.ACKNOWLEDGE: _S.ACKNOWLEDGED,
        _E.SILENCE: _S.SILENCED,  # until another time
        _E.SILENCE_OVER: _S.OPEN,  # also if it had been acknowledged: it is still there
        _E.RESOLVE: _S.RESOLVED,
    },
    _S.RESOLVED: {_E.FOUND: _S.OPEN},
}

LIVE: Final = (_S.OPEN, _S.ACKNOWLEDGED, _S.SILENCED)
"""States of an alert that is not over."""
SERVER: Final = ""
"""The actor of what no operator did."""
NOTE_CHARS_MAX: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertConfig:
    """When an alert that ended is the same one again."""

    flap_s: int = 3600
    """Found again within this time after its end, s, it opens again instead of a new one."""
    repair_s: int = 900
    """What an operator resolved is not opened again within this time, s."""
    silence_s_max: int = 90 * 86_400
    """Longest silence, s: one that nobody ends must end by itself."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 <= self.repair_s <= self.flap_s or self.silence_s_max < 1:
            raise ValueError("0 <= repair_s <= flap_s and silence_s_max >= 1 must hold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What changes in an alert's life; times are Unix ms of the server's clock."""

    state: AlertState = AlertState.OPEN
    seen: int = 1
    """Judgements that found it since it opened."""
    opened_ms: int = 0
    seen_ms: int = 0
    """The last of them."""
    changed_ms: int = 0
    """Last change of its state."""
    silenced_until_ms: int | None = None
    resolved_ms: int | None = None
    actor: str = SERVER
    """Who changed its state last."""
    note: str = ""
    """What they said."""


class Again(StrEnum):
    """What to do about a verdict, given the newest alert of its fingerprint."""

    NEW = "new"
    """There is none, or it ended long ago."""
    SAME = "same"
    """It is live, or ended just now: FOUND."""
    WAIT = "wait"
    """An operator has just resolved it: leave it."""


def fingerprint(kind: str, scope: str, subject: str, model_sha256: str) -> str:
    """Return what is the same alert, as canonical JSON: no two alerts share one by chance.

    >>> fingerprint("local_shift", "site", "north", "ab12")
    '["local_shift","site","north","ab12"]'
    """
    return json.dumps([kind, scope, subject, model_sha256], separators=(",", ":"))


def begun(now_ms: int) -> Life:
    """Return the life of an alert that is found for the first time."""
    return Life(opened_ms=now_ms, seen_ms=now_ms, changed_ms=now_ms)


def again(life: Life | None, *, now_ms: int, config: AlertConfig) -> Again:
    """Return what a verdict means for the newest alert of its fingerprint.

    Args:
        life: Of that alert; None = there is none.
        now_ms: Unix ms.
        config: How long an alert that ended is remembered.
    """
    if life is None:
        return Again.NEW
    if life.state is not AlertState.RESOLVED:
        return Again.SAME
    since_ms = now_ms - (life.resolved_ms or life.changed_ms)
    if life.actor != SERVER and since_ms < 1000 * config.repair_s:
        return Again.WAIT
    return Again.SAME if since_ms < 1000 * config.flap_s else Again.NEW


def due(life: Life, *, now_ms: int) -> bool:
    """Return whether its silence is over."""
    return life.state is AlertState.SILENCED and now_ms >= (life.silenced_until_ms or 0)


def after(
    life: Life,
    event: AlertEvent,
    *,
    now_ms: int,
    actor: str = SERVER,
    note: str = "",
    until_ms: int | None = None,
) -> Life:
    """Return the life after an event.

    Args:
        life: Before it.
        event: What happened.
        now_ms: Unix ms.
        actor: Who did it; "" = the server.
        note: What they said about it.
        until_ms: End of the silence, Unix ms; for ``SILENCE`` alone, and needed there.

    Raises:
        AlertEventError: The table has no such step, or the end of a silence is missing or past;
            nothing has changed.
    """
    try:
        state = ALERT[life.state][event]
    except KeyError:
        raise AlertEventError(
            f"an alert that is {life.state.value} does not take the event {event.value!r}",
            hint="look at its state first: shoal alerts list",
        ) from None
    if event is AlertEvent.SILENCE and (until_ms is None or until_ms <= now_ms):
        raise AlertEventError("a silence needs an end in the future", hint="e.g. --for 12h")
    if event is AlertEvent.FOUND:
        return _found(life, state, now_ms)
    changed = replace(life, state=state, changed_ms=now_ms, actor=actor, note=note)
    if event is AlertEvent.SILENCE:
        return replace(changed, silenced_until_ms=until_ms)
    if event is AlertEvent.CLEARED:  # its silence goes on: it may be found again
        return replace(changed, resolved_ms=now_ms)
    if event is AlertEvent.RESOLVE:
        changed = replace(changed, resolved_ms=now_ms)
    return replace(changed, silenced_until_ms=None)


def _found(life: Life, state: AlertState, now_ms: int) -> Life:
    seen = replace(life, state=state, seen=life.seen + 1, seen_ms=now_ms)
    if life.state is not AlertState.RESOLVED:
        return seen
    opened = replace(seen, changed_ms=now_ms, resolved_ms=None, actor=SERVER, note="")
    if life.silenced_until_ms is not None and life.silenced_until_ms > now_ms:
        return after(opened, AlertEvent.SILENCE, now_ms=now_ms, until_ms=life.silenced_until_ms)
    return replace(opened, silenced_until_ms=None)


def table_markdown() -> str:
    """Return the table for the documentation; a test compares it with ``docs/alerts.md``."""
    head = "| state | " + " | ".join(event.value for event in AlertEvent) + " |"
    rows = [
        f"| **{state.value}** | "
        + " | ".join(ALERT[state].get(event, "–") for event in AlertEvent)
        + " |"
        for state in AlertState
    ]
    return "\n".join([head, "|---" * (1 + len(AlertEvent)) + "|", *rows])
