"""Hand tasks to devices and take their results: the device's side of rounds and evaluations.

    GetTask --(none yet: wait)--> lease --> result: checked, kept as a file, then committed

Invariants:
- A result is committed once: a repeated one is acknowledged and thrown away.
- A delta is a file ``<task>.f32`` from before its commit until its round is folded. It is not
  fsynced: if a power cut tears it, its digest no longer fits, and the round does without it.
- What came too late, or is not acceptable, never reaches a sum; a task whose result was refused
  is failed, so that it is not offered for ever.

Not here: when rounds open and close (``coordinator``, ``evaluations``), messages (``service``).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..errors import InvalidError, NotFoundError, ServerError
from ..store.engine import Store
from ..store.tables import Device, Evaluation, RoundsRun, Task
from . import rules
from .errors import DeltaError, RoundClosedError
from .fold import FoldConfig, check
from .rules import TaskEvent, TaskState

WINDOWS_MAX: Final = 1 << 30  # in one result; more is a lie or a mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseConfig:
    """Bounds of what devices ask and send."""

    wait_ms_max: int = 30_000
    """A question for a task is held at most this long."""
    present_s: float = 15.0
    """A device that asked within this time counts as ready for a round."""
    waiting_max: int = 20_000
    """Questions held at once; more are answered at once."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 <= self.wait_ms_max <= 300_000 or self.present_s <= 0 or self.waiting_max < 1:
            raise ValueError("wait_ms_max must be 0 to 300000; present_s, waiting_max above 0")


@dataclass(frozen=True, slots=True)
class Peer:
    """The device that a call comes from."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWork:
    """What a device is asked to train."""

    bundle_sha256: str
    parameters_sha256: str
    parameters_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    proximal_mu: float
    clip_norm: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateWork:
    """What a device is asked to evaluate."""

    bundles: tuple[str, ...]
    split: str


@dataclass(frozen=True, slots=True)
class Lease:
    """One task of one device."""

    task_id: str
    owner_id: str
    round: int
    deadline_ms: int
    work: TrainWork | EvaluateWork


@dataclass(slots=True)
class _Presence:
    name: str
    bundle_sha256: str
    labelled: int
    seen_s: float
    waiting: int = 0


class Leases:
    """One server's leases. Its methods belong to one event loop."""

    def __init__(
        self,
        store: Store,
        root: Path,
        *,
        clock: Callable[[], int],
        config: LeaseConfig | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            store: The database.
            root: Folder of this component's own, for deltas and uploads; made when missing.
            clock: Unix ms.
            config: The bounds.
            monotonic: Seconds, for presence.
        """
        self._store, self._clock, self._config = store, clock, config or LeaseConfig()
        self._monotonic = monotonic
        self._deltas, self.uploads = root / "deltas", root / "uploads"
        """Folder for files that are being received."""
        for folder in (self._deltas, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        for left in self.uploads.iterdir():
            left.unlink()  # of a server that died while it received
        self._present: dict[int, _Presence] = {}
        self._wake: dict[int, asyncio.Event] = {}
        self._changed: list[asyncio.Event] = []

    # --- for those who own rounds and evaluations -------------------------------------------

    def subscribe(self) -> asyncio.Event:
        """Return an event that is set whenever a device came or a result did."""
        event = asyncio.Event()
        self._changed.append(event)
        return event

    def wake(self, devices: Sequence[int]) -> None:
        """Let the waiting questions of devices look for a task again."""
        for device in devices:
            if event := self._wake.get(device):
                event.set()

    def changed(self) -> None:
        """Tell every subscriber."""
        for event in self._changed:
            event.set()

    def ready(self, bundle_sha256: str) -> list[Peer]:
        """Return the devices that asked lately, run the bundle and hold labelled windows."""
        horizon_s = self._monotonic() - self._config.present_s
        return [
            Peer(device, each.name)
            for device, each in self._present.items()
            if each.bundle_sha256 == bundle_sha256
            and each.labelled > 0
            and (each.waiting or each.seen_s >= horizon_s)
        ]

    def forget(self, devices: Sequence[int]) -> None:
        """Do not count devices as ready until they ask again: they let a lease expire."""
        for device in devices:
            presence = self._present.get(device)
            if presence and not presence.waiting:
                del self._present[device]

    def delta_path(self, task_id: str) -> Path:
        """Return where the delta of a task is kept until its round is folded."""
        return self._deltas / f"{task_id}.f32"

    def drop_deltas(self, task_ids: Sequence[str]) -> None:
        """Delete the deltas of a folded round."""
        for each in task_ids:
            self.delta_path(each).unlink(missing_ok=True)

    # --- for devices -----------------------------------------------------------------------

    async def next(
        self, peer: Peer, *, wait_ms: int, bundle_sha256: str, labelled: int
    ) -> Lease | None:
        """Return the open task of a device; without one, wait for it.

        Args:
            peer: The device.
            wait_ms: How long to wait at most.
            bundle_sha256: What the device runs; "" = nothing.
            labelled: Labelled training windows that it holds.
        """
        known = self._present.get(peer.id)
        presence = self._present.setdefault(peer.id, _Presence(peer.name, "", 0, 0.0))
        before = (presence.bundle_sha256, presence.labelled > 0)
        lapsed = presence.seen_s < self._monotonic() - self._config.present_s
        presence.bundle_sha256, presence.labelled = bundle_sha256, labelled
        presence.seen_s = self._monotonic()
        event = self._wake.setdefault(peer.id, asyncio.Event())
        event.clear()
        if known is None or lapsed or before != (bundle_sha256, labelled > 0):
            self.changed()
        held = sum(each.waiting for each in self._present.values())
        wait_s = min(wait_ms, self._config.wait_ms_max) / 1000
        if held >= self._config.waiting_max:
            wait_s = 0.0
        presence.waiting += 1
        try:
            until_s = self._monotonic() + wait_s
            while (lease := await asyncio.to_thread(self._find, peer)) is None:
                left_s = until_s - self._monotonic()
                if left_s <= 0:
                    return None
                try:
                    async with asyncio.timeout(left_s):
                        await event.wait()
                except TimeoutError:
                    return None
                event.clear()
            return lease
        finally:
            presence.waiting -= 1
            presence.seen_s = self._monotonic()

    async def lease(self, peer: Peer, task_id: str) -> Lease | None:
        """Return an open lease of a device, before its result is received.

        Returns:
            The lease; None if the task has its result already, and a repeated one need not be
            read.

        Raises:
            NotFoundError: Unknown, or another device's.
            RoundClosedError: Expired.
        """

        def look() -> Lease | None:
            with self._store.read() as session:
                task = self._own(session, peer, task_id)
                if task.state in (TaskState.REPORTED, TaskState.FAILED):
                    return None
                found = _lease(session, task)
                if found is None or task.state == TaskState.EXPIRED:
                    raise RoundClosedError(f"the round of task {task_id} is closed")
                return found

        return await asyncio.to_thread(look)

    async def report_train(
        self, peer: Peer, lease: Lease, *, result: Mapping[str, Any], sha256: str, upload: Path
    ) -> bool:
        """Take a delta; return False if the task had its result already.

        Args:
            peer: The device.
            lease: What it was asked.
            result: ``windows``, ``loss_first``, ``loss_last``, ``train_ms``.
            sha256: What the device says the delta hashes to.
            upload: File with the delta, float32 little-endian; taken over.

        Raises:
            DeltaError: Not acceptable; the task is failed.
            NotFoundError, RoundClosedError: As for :meth:`lease`.
        """
        assert isinstance(lease.work, TrainWork)
        work = lease.work

        def take() -> bool:
            try:
                facts = _check_delta(work, result, sha256, upload)
            except DeltaError as exc:
                self._settle(peer, lease, TaskEvent.FAILURE_CAME, _failure(exc))
                raise
            return self._settle(peer, lease, TaskEvent.RESULT_CAME, facts, sha256, upload)

        return await self._told(take)

    async def report_evaluation(
        self, peer: Peer, lease: Lease, scores: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Take scores, one per bundle in the task's order; as for :meth:`report_train`.

        Raises:
            InvalidError: The scores contradict themselves or the task; the task is failed.
            NotFoundError, RoundClosedError: As for :meth:`lease`.
        """
        assert isinstance(lease.work, EvaluateWork)
        work = lease.work

        def take() -> bool:
            try:
                _check_scores(work, scores)
            except InvalidError as exc:
                self._settle(peer, lease, TaskEvent.FAILURE_CAME, _failure(exc))
                raise
            result = {"scores": [dict(each) for each in scores]}
            return self._settle(peer, lease, TaskEvent.RESULT_CAME, result)

        return await self._told(take)

    async def report_failure(self, peer: Peer, lease: Lease, *, code: str, text: str) -> bool:
        """Take note that a device could not do a task; as for :meth:`report_train`."""
        facts = {"code": code[:80], "text": text[:500]}
        return await self._told(lambda: self._settle(peer, lease, TaskEvent.FAILURE_CAME, facts))

    async def _told(self, take: Callable[[], bool]) -> bool:
        try:
            return await asyncio.to_thread(take)
        finally:
            self.changed()

    def _find(self, peer: Peer) -> Lease | None:
        open_ = (
            select(Task)
            .where(Task.device_id == peer.id, Task.state == TaskState.OFFERED)
            .where(Task.deadline_ms > self._clock())
            .order_by(Task.created_ms, Task.id)
        )
        with self._store.read() as session:
            for task in session.scalars(open_):
                if (lease := _lease(session, task)) is not None:
                    return lease
        return None

    def _own(self, session: Session, peer: Peer, task_id: str) -> Task:
        task = session.get(Task, task_id)
        if task is None or task.device_id != peer.id:
            raise NotFoundError(f"there is no task {task_id:.40} of this device")
        return task

    def _settle(
        self,
        peer: Peer,
        lease: Lease,
        event: TaskEvent,
        result: dict[str, Any],
        sha256: str = "",
        upload: Path | None = None,
    ) -> bool:
        now_ms = self._clock()
        with self._store.begin() as session:
            task = self._own(session, peer, lease.task_id)
            if task.state in (TaskState.REPORTED, TaskState.FAILED):
                return False
            if task.state == TaskState.EXPIRED or now_ms >= task.deadline_ms:
                raise RoundClosedError(f"the round of task {lease.task_id} is closed")
            task.state = rules.task_after(task.state, event)
            task.result, task.delta_sha256, task.changed_ms = result, sha256, now_ms
            if upload is not None:
                upload.replace(self.delta_path(lease.task_id))  # first the file, then the commit
        return True


def entitled(session: Session, device_id: int, *, now_ms: int) -> set[str]:
    """Return the artefacts that a device may fetch for its open tasks: bundles and parameters."""
    open_ = select(Task).where(
        Task.device_id == device_id, Task.state == TaskState.OFFERED, Task.deadline_ms > now_ms
    )
    found: set[str] = set()
    for task in session.scalars(open_):
        run = session.get(RoundsRun, task.owner_id)
        evaluation = session.get(Evaluation, task.owner_id)
        if run is not None:
            found |= {run.parameters_sha256, run.base_sha256}
        if evaluation is not None:
            found.update(evaluation.bundles)
    return found


def _lease(session: Session, task: Task) -> Lease | None:
    """Return what a task asks; None if its round or evaluation is over."""
    work: TrainWork | EvaluateWork
    if task.kind == "train":
        run = session.get(RoundsRun, task.owner_id)
        device = session.get_one(Device, task.device_id)
        if run is None or run.state != rules.RunState.RUNNING or run.round != task.round:
            return None
        settings = run.settings
        work = TrainWork(
            bundle_sha256=run.base_sha256,
            parameters_sha256=run.parameters_sha256,
            parameters_size=settings["parameters_size"],
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            learning_rate=rules.rate_of(
                settings["learning_rate"], round_=task.round, rounds=settings["rounds"]
            ),
            proximal_mu=settings["proximal_mu"],
            clip_norm=settings["clip_norm"],
            seed=rules.seed_of(settings["seed"], task.round, device.name),
        )
    else:
        evaluation = session.get(Evaluation, task.owner_id)
        if evaluation is None or evaluation.state != rules.RunState.RUNNING:
            return None
        work = EvaluateWork(bundles=tuple(evaluation.bundles), split=evaluation.split)
    return Lease(task.id, task.owner_id, task.round, task.deadline_ms, work)


def _check_delta(
    work: TrainWork, result: Mapping[str, Any], sha256: str, upload: Path
) -> dict[str, Any]:
    size = upload.stat().st_size
    if size != work.parameters_size or size % 4:
        raise DeltaError(f"the delta has {size} bytes, the parameters {work.parameters_size}")
    with upload.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise DeltaError("the delta does not hash to what its header says")
    windows = result["windows"]
    if not 0 <= windows <= WINDOWS_MAX:
        raise DeltaError(f"the delta says it was trained on {windows} windows")
    if not all(math.isfinite(result[name]) for name in ("loss_first", "loss_last")):
        raise DeltaError("a loss is NaN or infinite")
    delta__p = np.memmap(upload, "<f4", "r")
    contribution = check(delta__p, size // 4, weight=windows, config=FoldConfig())
    return {**result, "norm": contribution.norm}


def _check_scores(work: EvaluateWork, scores: Sequence[Mapping[str, Any]]) -> None:
    if [each["bundle_sha256"] for each in scores] != list(work.bundles):
        raise InvalidError("the scores are not those of the task's bundles, in order")
    for each in scores:
        windows, correct = each["windows"], each["correct"]
        classes = math.isqrt(len(each["confusion"]))
        table = each["confusion"]
        if not 0 < windows <= WINDOWS_MAX or not 1 <= classes * classes == len(table) <= 1 << 20:
            raise InvalidError("a score has no windows, or its confusion table is not square")
        if sum(table) != windows or sum(table[:: classes + 1]) != correct:
            raise InvalidError("a score's confusion table contradicts its counts")
        if not math.isfinite(each["loss_sum"]) or each["loss_sum"] < 0:
            raise InvalidError("a score's loss is not a number of at least 0")


def _failure(exc: ServerError) -> dict[str, Any]:
    return {"code": exc.code, "text": str(exc)[:500]}
