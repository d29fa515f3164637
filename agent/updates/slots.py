"""Two slots, one table of states: a device always boots a verified model.

    state, state.tmp          the state below, checksummed
    a/model.shoal  a/part     slot a: a complete bundle; one that is being downloaded
    b/model.shoal  b/part     slot b

    IDLE --offered--> DOWNLOADING --stored--> VERIFIED --tested--> TRIAL --passed--> IDLE
                          any of them --rejected--> IDLE

Rule 1: every step is in TRANSITIONS; nothing else assigns ``phase``. A step that the table lacks
        raises and changes nothing.
Rule 2: a step is durable before anything acts on it. A try is counted down before the load, and
        only in TRIAL (a confirmed model is never used up by power cycling, fault 55).
Rule 3: a bundle's hash is checked at every load.
Rule 4: the device never goes below what it confirmed. So an active bundle that rots is not
        replaced by the older one in the other slot: there is no model until it is there again.
        The other slot is for a trial that fails, and for a rollback that the fleet assigns: its
        bundle is then used without a download.

This file knows no signature, server or time. ``tests/agent/updates/test_slots_crash.py`` runs it
over a disk that dies at every operation, and shows that no fsync of it can be left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from .errors import DamagedStateError, IllegalEventError
from .fs import (
    DOCUMENT_BYTES_MAX,
    Disk,
    FileSystem,
    load_document,
    parse_document,
    save_document,
)

VERSION: Final = 1
BUNDLE: Final = "model.shoal"
PART: Final = "part"
REASON_CHARS_MAX: Final = 500  # of the update record


class Phase(StrEnum):
    """How far the newest assignment has come."""

    IDLE = "idle"
    DOWNLOADING = "downloading"
    VERIFIED = "verified"
    TRIAL = "trial"


class Event(StrEnum):
    """What happened to it."""

    OFFERED = "offered"
    ADOPTED = "adopted"
    STORED = "stored"
    TESTED = "tested"
    LOADED = "loaded"
    PASSED = "passed"
    REJECTED = "rejected"
    ROTTED = "rotted"


TRANSITIONS: Final[dict[tuple[Phase, Event], Phase]] = {
    # A newer assignment replaces one that is not in trial yet.
    (Phase.IDLE, Event.OFFERED): Phase.DOWNLOADING,
    (Phase.DOWNLOADING, Event.OFFERED): Phase.DOWNLOADING,
    (Phase.VERIFIED, Event.OFFERED): Phase.DOWNLOADING,
    # The assignment names what is active already.
    (Phase.IDLE, Event.ADOPTED): Phase.IDLE,
    (Phase.DOWNLOADING, Event.ADOPTED): Phase.IDLE,
    (Phase.VERIFIED, Event.ADOPTED): Phase.IDLE,
    # The road of an update.
    (Phase.DOWNLOADING, Event.STORED): Phase.VERIFIED,
    (Phase.VERIFIED, Event.TESTED): Phase.TRIAL,
    (Phase.TRIAL, Event.LOADED): Phase.TRIAL,
    (Phase.TRIAL, Event.PASSED): Phase.IDLE,
    # It ends anywhere on it, or before it began.
    (Phase.IDLE, Event.REJECTED): Phase.IDLE,
    (Phase.DOWNLOADING, Event.REJECTED): Phase.IDLE,
    (Phase.VERIFIED, Event.REJECTED): Phase.IDLE,
    (Phase.TRIAL, Event.REJECTED): Phase.IDLE,
    # The active bundle does not match its hash any more.
    (Phase.IDLE, Event.ROTTED): Phase.IDLE,
    (Phase.DOWNLOADING, Event.ROTTED): Phase.DOWNLOADING,
    (Phase.VERIFIED, Event.ROTTED): Phase.VERIFIED,
    (Phase.TRIAL, Event.ROTTED): Phase.TRIAL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A bundle, and the assignment that brought it."""

    model: str
    sha256: str
    length: int
    counter: int
    rollout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """All that is remembered; immutable."""

    phase: Phase = Phase.IDLE
    active: str = "a"
    """Slot that serves: ``a`` or ``b``."""
    serving: Held | None = None
    """What the active slot holds; None = nothing that can be loaded."""
    staging: Held | None = None
    """What is on its way through the other slot."""
    tries: int = 0
    """Loads left in the trial."""
    confirmed: Held | None = None
    """The last that passed its trial; its counter is the floor."""
    failed: Held | None = None
    """The last that was rejected; its counter is not tried again."""
    reason: str = ""
    """Why."""

    @property
    def spare(self) -> str:
        """The slot that may be overwritten."""
        return "b" if self.active == "a" else "a"

    def outcome(self) -> tuple[str, Held] | None:
        """Return ("confirmed" or "failed", which) of the newest assignment that was settled."""
        confirmed = self.confirmed.counter if self.confirmed else 0
        if self.failed is not None and self.failed.counter >= confirmed:
            return "failed", self.failed
        return ("confirmed", self.confirmed) if self.confirmed else None


def step(
    state: SlotState, event: Event, *, held: Held | None = None, tries: int = 0, reason: str = ""
) -> SlotState:
    """Return the state after an event.

    Args:
        state: The state before.
        event: What happened.
        held: With OFFERED and ADOPTED the bundle; with REJECTED the one that was (by default
            the staged one).
        tries: With TESTED: how often it may be loaded without passing.
        reason: With REJECTED: why, for people.

    Raises:
        IllegalEventError: The table has no such step.
    """
    phase = TRANSITIONS.get((state.phase, event))
    if phase is None:
        raise IllegalEventError(f"an update that is {state.phase} cannot be {event}")
    changed: dict[str, Any] = {"phase": phase}
    match event:
        case Event.OFFERED:
            assert held is not None
            changed |= {"staging": held}
        case Event.ADOPTED:
            assert held is not None
            changed |= {"staging": None, "serving": held, "confirmed": held}
        case Event.TESTED:
            changed |= {"tries": tries}
        case Event.LOADED:
            if state.tries < 1:
                raise IllegalEventError("the trial has no tries left")
            changed |= {"tries": state.tries - 1}
        case Event.PASSED:
            new = state.staging
            changed |= {
                "active": state.spare, "serving": new, "confirmed": new, "staging": None,
                "tries": 0,
            }  # fmt: skip
        case Event.REJECTED:
            changed |= {
                "staging": None, "tries": 0, "failed": held or state.staging,
                "reason": reason[:REASON_CHARS_MAX],
            }  # fmt: skip
        case Event.ROTTED:
            changed |= {"serving": None}
    return dataclasses.replace(state, **changed)


@dataclass(frozen=True, slots=True)
class Choice:
    """The bundle to load now."""

    path: Path
    held: Held
    trial: bool
    """It has not passed its trial yet."""


class Slots:
    """The two slots on a disk. One owner at a time; not thread-safe."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        """Prepare; :meth:`open` comes before everything else. The folder ``root`` exists."""
        self._root, self._fs = root, fs
        self._state = SlotState()

    @property
    def state(self) -> SlotState:
        """What is remembered."""
        return self._state

    @property
    def part(self) -> Path:
        """Where the bundle of the staged assignment is downloaded to."""
        return self._root / self._state.spare / PART

    def open(self) -> None:
        """Read the state, or begin with empty slots.

        Raises:
            DamagedStateError: The state was rotten and moved aside; the slots are empty now, and
                the next assignment fills them again.
        """
        for slot in ("a", "b"):
            self._fs.make_dir(self._root / slot)  # made durable by the first saved state
        document = load_document(self._fs, self._root / "state")
        if document is not None:
            self._state = _parse(document)

    def stage(self, held: Held) -> None:
        """Give the spare slot to an assignment; a part of the same bundle is kept."""
        staged = self._state.staging
        if staged is not None and staged.sha256 != held.sha256:
            self._fs.remove(self.part)
        self._fire(Event.OFFERED, held=held)

    def is_stored(self) -> bool:
        """Return whether the spare slot has the staged bundle already, as after a rollback."""
        return self._intact(self._state.spare, self._staging)

    def store(self) -> bool:
        """Take the downloaded part as the staged bundle, if its hash is right.

        Returns:
            Whether it is; if not, the part was removed and the state is as before.
        """
        slot = self._root / self._state.spare
        if self._fs.size(self.part) is not None:
            if self._digest(self.part) != self._staging.sha256:
                self._fs.remove(self.part)
                return False
            self._fs.sync(self.part)
            self._fs.rename(self.part, slot / BUNDLE)
        elif not self.is_stored():
            return False
        self._fs.sync_dir(slot)
        self._fire(Event.STORED)
        return True

    def stored_path(self) -> Path:
        """Return the path of the staged bundle, for its self-test."""
        return self._root / self._state.spare / BUNDLE

    def adopt(self, held: Held) -> None:
        """Note that an assignment names what is active already."""
        self._fire(Event.ADOPTED, held=held)

    def begin_trial(self, tries: int) -> None:
        """Note that the staged bundle passed its self-test."""
        self._fire(Event.TESTED, tries=tries)

    def load(self) -> Choice | None:
        """Return the bundle to load now; None if there is no valid one.

        In a trial this uses up one try, and a bundle without tries is rejected.
        """
        if self._state.phase is Phase.TRIAL:
            staged, slot = self._staging, self._state.spare
            if self._state.tries < 1:
                self.reject("it did not pass its trial in all its tries")
            elif not self._intact(slot, staged):
                self.reject("it does not match its hash any more")
            else:
                self._fire(Event.LOADED)
                return Choice(self._root / slot / BUNDLE, staged, trial=True)
        return self.load_active()

    def load_active(self) -> Choice | None:
        """Return the confirmed bundle, after checking its hash; None if there is no valid one."""
        state = self._state
        if state.serving is None:
            return None
        if not self._intact(state.active, state.serving):
            self._fire(Event.ROTTED)
            return None
        return Choice(self._root / state.active / BUNDLE, state.serving, trial=False)

    def confirm(self) -> None:
        """Note that the bundle in trial is fine: it is active now, and the floor."""
        self._fire(Event.PASSED)

    def reject(self, reason: str, *, held: Held | None = None) -> None:
        """Give up the staged bundle, or the assignment ``held`` that never got that far."""
        part = self.part
        self._fire(Event.REJECTED, held=held, reason=reason)
        self._fs.remove(part)

    @property
    def _staging(self) -> Held:
        staged = self._state.staging
        if staged is None:
            raise IllegalEventError("no bundle is staged")
        return staged

    def _intact(self, slot: str, held: Held) -> bool:
        # Only what belongs there: a graph could name a file beside it (fault 18).
        if not set(self._fs.names(self._root / slot)) <= {BUNDLE, PART}:
            return False
        return self._digest(self._root / slot / BUNDLE) == held.sha256

    def _digest(self, path: Path) -> str | None:
        try:
            return self._fs.sha256(path)
        except OSError:  # a link, a directory, or a sector that cannot be read
            return None

    def _fire(
        self, event: Event, *, held: Held | None = None, tries: int = 0, reason: str = ""
    ) -> None:
        state = step(self._state, event, held=held, tries=tries, reason=reason)
        save_document(self._fs, self._root / "state", {"version": VERSION, **asdict(state)})
        self._state = state


def peek(root: Path) -> SlotState:
    """Return what slots remember, for people to look at: nothing is changed or made durable.

    Raises:
        DamagedStateError: It cannot be read; the agent says more when it runs.
    """
    path = root / "state"
    try:
        document = parse_document(Disk().read(path, bytes_max=DOCUMENT_BYTES_MAX))
    except FileNotFoundError:
        return SlotState()
    except OSError as exc:
        raise DamagedStateError(f"{path} cannot be read: {exc.strerror}") from exc
    if document is None:
        raise DamagedStateError(f"{path} does not match its checksum")
    return _parse(document)


def _parse(document: dict[str, Any]) -> SlotState:
    if document.pop("version", None) != VERSION:
        raise DamagedStateError(
            "the slots were written by another version of the agent; they count as empty",
            hint="the assigned bundle is fetched again; nothing is to be done",
        )
    for name in ("serving", "staging", "confirmed", "failed"):
        document[name] = Held(**document[name]) if document[name] is not None else None
    return SlotState(**{**document, "phase": Phase(document["phase"])})
