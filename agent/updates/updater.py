"""Bring the assigned bundle into a slot, and tell the fleet how that goes.

    assignment -> signature, device, counter, expiry, clock      floor.py
               -> approved with the same hash and length         metadata.py
               -> download -> hash -> unpack -> self-test         fetch.py, slots.py
               -> trial (the app swaps models) -> confirmed or failed

What is told as an UPDATE record is durable in the slots before it is told. The last outcome is
told again at every start: a crash may have come between the two, and the fleet takes it once.

Not here: loading and swapping models, the trial's rules (serving.py), the child process of the
self-test (injected).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ... import ShoalError
from ...proto import assignment as contract
from ...proto import bundle
from ...proto.assignment import Assignment
from ...proto.errors import BundleError, SignatureError
from ...proto.records import Kind
from . import floor as floors
from .config import UpdateConfig
from .errors import (
    AssignmentError,
    BundleRejectedError,
    DamagedStateError,
    EndlessDataError,
    MetadataError,
    NotApprovedError,
    UpdateBusyError,
    UpdateError,
)
from .fetch import download
from .floor import Floor
from .fs import Disk, FileSystem
from .metadata import Approved
from .remote import Remote
from .slots import Held, Phase, Slots

Emit = Callable[[Kind, dict[str, Any]], object]


class Signed(Protocol):
    """A signed assignment as it came: ``shoal.v1.SignedAssignment`` has these."""

    @property
    def payload(self) -> bytes:
        """Canonical JSON."""

    @property
    def signature(self) -> bytes:
        """Ed25519, 64 bytes."""


class Approver(Protocol):
    """Who says what is approved."""

    def lookup(self, path: str, floor: Floor) -> Approved:
        """Return what is approved under a target path; see ``Approvals.lookup``."""


class Updater:
    """One device's updates. :meth:`boot` comes first; then the methods of one event loop."""

    def __init__(
        self,
        root: Path,
        *,
        device: str,
        director_key: bytes,
        approvals: Approver,
        remote: Remote,
        self_test: Callable[[Path], None],
        emit: Emit,
        clock: Callable[[], int],
        config: UpdateConfig | None = None,
        fs: FileSystem | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare; nothing on disk is touched before :meth:`boot`.

        Args:
            root: Folder that exists and is this class's own: slots and floor.
            device: Id of this device.
            director_key: Public ed25519 key of the director, 32 bytes, from enrolment.
            approvals: Says what the approval metadata lists: ``Approvals``.
            remote: The server.
            self_test: Loads a bundle in a child process with limits and checks its golden
                vectors; raises a ShoalError if it is not fit. Called in a thread.
            emit: Takes UPDATE and EVENT records.
            clock: Unix ms.
            config: The bounds.
            fs: The disk.
            monotonic: Seconds, for deadlines.
            sleep: Waits some seconds between two connections, in a thread.
        """
        self._device, self._key = device, Ed25519PublicKey.from_public_bytes(director_key)
        self._remote, self._self_test, self._emit, self._clock = remote, self_test, emit, clock
        self._config = config or UpdateConfig()
        self._fs = fs or Disk()
        self._monotonic, self._sleep = monotonic, sleep
        self._root = root
        self._slots = Slots(root, self._fs)
        self._approvals = approvals
        self._floor = Floor()
        self._refusal = ("", b"")
        self._lock = asyncio.Lock()

    @property
    def in_trial(self) -> bool:
        """Whether a bundle waits for :meth:`trial_passed` or :meth:`trial_failed`."""
        return self._slots.state.phase is Phase.TRIAL

    @property
    def active(self) -> Held | None:
        """The confirmed bundle, as far as is known; its hash is checked when it is loaded."""
        return self._slots.state.serving

    @property
    def staged(self) -> Held | None:
        """The bundle on its way, or in trial."""
        return self._slots.state.staging

    def boot(self) -> Path | None:
        """Read what is on disk, and return the bundle to load; None if there is no valid one.

        If :attr:`in_trial` is set afterwards, it is a candidate, one of its tries is used up, and
        :meth:`fallback` has the bundle before it.
        """
        for read in (self._slots.open, self._open_floor):
            try:
                read()
            except DamagedStateError as exc:
                self._event("update_state_damaged", "error", str(exc))
        self._recover_floor()
        path = self._load()
        outcome = self._slots.state.outcome()
        if outcome is not None:
            told, held = outcome
            self._tell(held, told, self._slots.state.reason if told == "failed" else "")
        return path

    def fallback(self) -> Path | None:
        """Return the confirmed bundle after checking its hash; None if there is no valid one."""
        had = self._slots.state.serving
        choice = self._slots.load_active()
        if choice is None and had is not None:
            self._event(
                "no_valid_model",
                "critical",
                f"bundle {had.sha256[:12]} does not match its hash any more; it is fetched again",
            )
        return choice.path if choice else None

    async def apply(self, signed: Signed) -> Path | None:
        """Bring an assignment as far as its trial.

        Safe to call again with the same assignment at any time: what is done is not done twice,
        and what was broken off resumes.

        Returns:
            The bundle to try now: then comes :meth:`trial_passed` or :meth:`trial_failed`. None if
            there is nothing to do: it is active already, or was given up before.

        Raises:
            UpdateBusyError: A trial is in progress.
            SignatureError: The assignment is not the director's.
            AssignmentError: It is not for this device, a replay, or expired.
            UpdateError: Anything else; ``retry`` says whether the same may work later.
        """
        async with self._lock:
            stop = threading.Event()
            try:
                return await asyncio.to_thread(self.apply_here, signed, stopped=stop.is_set)
            finally:
                stop.set()  # when cancelled, the thread ends at its next chunk

    def trial_passed(self) -> None:
        """Make the bundle in trial the active one, and tell the fleet."""
        held = self._slots.state.staging
        self._slots.confirm()
        assert held is not None
        self._tell(held, "confirmed")

    def trial_failed(self, reason: str) -> None:
        """Give up the bundle in trial, and tell the fleet why."""
        held = self._slots.state.staging
        if not self.in_trial or held is None:
            raise UpdateError("no bundle is in trial")
        self._reject(held, reason)

    def apply_here(
        self, signed: Signed, *, stopped: Callable[[], bool] = lambda: False
    ) -> Path | None:
        """Do what :meth:`apply` does, in this thread; ``stopped`` says whether to break off."""
        if self.in_trial:
            raise UpdateBusyError("a trial is in progress; the assignment waits for its end")
        try:
            assignment = contract.verify(signed.payload, signed.signature, self._key)
            held = _held(assignment)
            if self._is_settled(held, assignment):
                return None
            self._check(assignment)
        except (SignatureError, AssignmentError) as exc:
            self._refused(exc, signed)
            raise
        try:
            approved = self._approvals.lookup(assignment.path, self._floor)
        except MetadataError as exc:
            self._refused(exc, signed)
            raise
        self._approve(assignment, held, approved)
        serving = self._slots.state.serving
        if serving is not None and serving.sha256 == held.sha256:
            self._slots.adopt(held)
            self._tell(held, "confirmed")
            return None
        state = self._slots.state
        if state.staging != held or state.phase is Phase.IDLE:
            self._slots.stage(held)
            self._tell(held, "offered")
        if self._slots.state.phase is Phase.DOWNLOADING:
            self._bring(held, stopped)
        self._test(held)
        self._slots.begin_trial(self._config.tries)
        self._tell(held, "trial")
        return self._load()

    # --- the steps of apply ----------------------------------------------------------------------

    def _is_settled(self, held: Held, assignment: Assignment) -> bool:
        """Return whether this very assignment was carried out or given up before.

        Its expiry does not matter then: a device that stays as it is acts on nothing.
        """
        state = self._slots.state
        return assignment.device == self._device and held in (state.serving, state.failed)

    def _check(self, assignment: Assignment) -> None:
        skew_ms, now_ms = int(self._config.clock_skew_s * 1000), self._clock()
        self._floor.check_clock(now_ms, skew_ms=skew_ms)
        self._floor.check_assignment(
            assignment, device=self._device, now_ms=now_ms, skew_ms=skew_ms
        )

    def _approve(self, assignment: Assignment, held: Held, approved: Approved) -> None:
        if (approved.sha256, approved.length) != (held.sha256, held.length):
            reason = (
                f"the approval metadata does not list {assignment.path} with the assigned hash "
                "and length"
            )
            self._reject(held, reason)
            raise NotApprovedError(reason, hint="approve the model, then assign it again")
        if held.length > self._config.bundle_bytes_max:
            reason = (
                f"the bundle has {held.length} bytes, this device takes "
                f"{self._config.bundle_bytes_max}"
            )
            self._reject(held, reason)
            raise BundleRejectedError(reason, hint="raise updates.bundle_bytes_max")
        raised = self._floor.raised(approved.versions, assignment)
        if raised != self._floor:
            floors.save(self._fs, self._root / "floor", raised)
            self._floor = raised

    def _bring(self, held: Held, stopped: Callable[[], bool]) -> None:
        if self._slots.is_stored() and self._slots.store():
            return  # the fleet went back to the bundle before this one
        self._tell(held, "downloading")
        for fresh in (False, True):
            try:
                resumed = download(
                    self._remote,
                    held.sha256,
                    held.length,
                    self._slots.part,
                    fs=self._fs,
                    config=self._config,
                    monotonic=self._monotonic,
                    sleep=lambda wait_s: self._sleep(wait_s * random.uniform(0.5, 1.0)),
                    stopped=stopped,
                )
            except EndlessDataError as exc:
                self._reject(held, str(exc))
                raise
            if self._slots.store():
                return
            if fresh or not resumed:
                break
            # A power cut may have torn what was resumed: that proves nothing about the server.
        reason = "what was downloaded does not have the bundle's hash"
        self._reject(held, reason)
        raise BundleRejectedError(reason, hint="check the server's artefact store")

    def _test(self, held: Held) -> None:
        path = self._slots.stored_path()
        try:
            data = self._fs.read(path, bytes_max=held.length)
            found = bundle.unpack(data)
            if found.sha256 != held.sha256 or found.manifest.name != held.model:
                raise BundleError("the bundle is not the assigned one")
            del data, found
            self._self_test(path)
        except (ShoalError, OSError) as exc:
            if isinstance(exc, ShoalError) and exc.retry:
                raise
            self._reject(held, f"self-test: {exc}")
            raise BundleRejectedError(f"the bundle failed its self-test: {exc}") from exc
        self._tell(held, "verified")

    # --- common ----------------------------------------------------------------------------------

    def _load(self) -> Path | None:
        before = self._slots.state
        choice = self._slots.load() if before.phase is Phase.TRIAL else None
        if choice is not None:
            return choice.path
        return self.fallback()

    def _open_floor(self) -> None:
        self._floor = floors.load(self._fs, self._root / "floor")

    def _recover_floor(self) -> None:
        """Hold the floor against the slots, in case its own file was lost."""
        state = self._slots.state
        known = [held for held in (state.confirmed, state.staging) if held is not None]
        newest = max(known, key=lambda held: held.counter, default=None)
        if newest is not None and newest.counter > self._floor.counter:
            self._floor = Floor(counter=newest.counter, sha256=newest.sha256)

    def _reject(self, held: Held, reason: str) -> None:
        self._slots.reject(reason, held=held)
        self._tell(held, "failed", reason)

    def _refused(self, exc: ShoalError, signed: Signed) -> None:
        """Tell the fleet, once: the device will ask again, and be refused again."""
        if (exc.code, signed.payload) != self._refusal:
            self._refusal = (exc.code, signed.payload)
            self._event("update_rejected", "error", str(exc), code=exc.code)

    def _tell(self, held: Held, state: str, reason: str = "") -> None:
        self._emit(
            Kind.UPDATE,
            {
                "rollout": held.rollout[:64],
                "counter": held.counter,
                "model": held.sha256,
                "state": state,
                "reason": reason[:500],
            },
        )

    def _event(self, name: str, severity: str, text: str, **data: str) -> None:
        body: Mapping[str, Any] = {
            "name": name, "severity": severity, "text": text[:1000], "data": data,
        }  # fmt: skip
        self._emit(Kind.EVENT, dict(body))


def _held(assignment: Assignment) -> Held:
    return Held(
        model=assignment.model,
        sha256=assignment.sha256,
        length=assignment.length,
        counter=assignment.counter,
        rollout=assignment.rollout,
    )
