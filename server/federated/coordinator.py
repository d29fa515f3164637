"""Run federated rounds: open them, fold what came, and hand the result to the workshop.

    start -> [open -> leases -> close -> fold -> step] x rounds -> quantize -> candidate

Every step is persisted before the next begins, and each can be done again after a crash: leases
have fixed ids, a round is closed in the database before it is folded, the fold gives the same
bytes again, and artefacts are named by their content. What is in memory alone (who is present)
comes back with the devices' next questions.

Not here: the rules (``rules``), the sum (``fold``), devices (``leases``), the quantization and
registration of the candidate (``learning``).

P parameters.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from ... import ShoalError
from ..errors import InvalidError, NotFoundError
from ..registry.artefacts import Artefacts
from ..store import audit
from ..store.engine import Store
from ..store.tables import Device, RoundsRun, Task
from . import rules
from .errors import DeltaError
from .fold import Fold, FoldConfig
from .leases import Leases, Peer
from .rules import RunEvent, RunState, TaskEvent, TaskState, Verdict

log = logging.getLogger(__name__)

PARAMETERS: Final = "parameters"  # the kind of artefact that both of these are


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsConfig:
    """How rounds are gathered and given up."""

    gather_s: float = 5.0
    """A round waits this long for devices that could take part and did not ask yet."""
    nudge_s: float = 5.0
    """Devices are nudged again after this time while a round waits for them."""
    tick_s: float = 1.0
    """Deadlines are looked at this often."""
    settle_s: float = 0.01
    """After news, more of it is waited for this long: results of a round come close together."""
    voids_max: int = 3
    """A run fails after this many rounds in a row with too few results."""
    attempts_max: int = 60
    """A step that fails is tried this often, ``tick_s`` apart; then the run is given up."""
    parameters_bytes_max: int = 256 << 20
    """Size of the parameters of a model."""
    fold: FoldConfig = field(default_factory=FoldConfig)
    """Bounds of a round's sum."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.gather_s, self.settle_s) < 0 or min(self.nudge_s, self.tick_s) <= 0:
            raise ValueError("gather_s, settle_s must be at least 0 s, nudge_s, tick_s above 0 s")
        if min(self.voids_max, self.attempts_max) < 1 or self.parameters_bytes_max < 4:
            raise ValueError("voids_max, attempts_max must be at least 1, parameters_bytes_max 4")


class Workshop(Protocol):
    """What rounds need of the learning part."""

    async def initial(self, bundle_sha256: str) -> bytes:
        """Return the parameters of a bundle, float32 little-endian, in its graph's order."""

    async def candidate(self, base_sha256: str, parameters: bytes, *, facts: dict[str, str]) -> str:
        """Build, store and register the bundle with other parameters; return its SHA-256.

        Idempotent: the same arguments give the same bundle.
        """


class Rounds:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        artefacts: Artefacts,
        leases: Leases,
        workshop: Workshop,
        *,
        clock: Callable[[], int],
        nudge: Callable[[str, str], None],
        config: RoundsConfig | None = None,
    ) -> None:
        """Prepare.

        Args:
            store: The database.
            artefacts: Holds the parameters that devices fetch.
            leases: Where devices ask.
            workshop: Makes parameters of bundles and bundles of parameters.
            clock: Unix ms.
            nudge: Tells a device by name to look for "tasks"; does not block.
            config: The bounds.
        """
        self._store, self._artefacts, self._leases = store, artefacts, leases
        self._workshop, self._clock, self._nudge = workshop, clock, nudge
        self._config = config or RoundsConfig()
        self._changed = leases.subscribe()
        self._since_ms: dict[tuple[str, int], int] = {}
        self._nudged_ms: dict[str, int] = {}
        self._failures: Counter[str] = Counter()

    async def start(
        self,
        *,
        bundle_sha256: str = "",
        rounds: int = 10,
        epochs: int = 1,
        batch_size: int = 32,
        learning_rate: float = 0.05,
        proximal_mu: float = 0.0,
        clip_norm: float = 0.0,
        devices_min: int = 1,
        deadline_s: int = 60,
        seed: int = 0,
        server_momentum: float = 0.0,
    ) -> str:
        """Start a run and return its id; :meth:`run` carries it out.

        Args:
            bundle_sha256: Registered bundle whose graph and parameters to start from.
            rounds: 1 to 10000.
            epochs: Of a device in a round, 1 to 100.
            batch_size: 1 to 4096.
            learning_rate: Of a device, above 0.
            proximal_mu: FedProx weight, at least 0.
            clip_norm: L2 bound of a delta; 0 = none.
            devices_min: A round with fewer results is void.
            deadline_s: Of a round, 1 to 86400.
            seed: Of all shuffles.
            server_momentum: 0 to below 1; 0 = FedAvg.

        Raises:
            InvalidError: A setting is out of range, or the bundle cannot be trained.
            NotFoundError: The bundle is not registered.
        """
        settings = {
            "rounds": _within("rounds", rounds, 1, 10_000),
            "epochs": _within("epochs", epochs, 1, 100),
            "batch_size": _within("batch_size", batch_size, 1, 4096),
            "learning_rate": _within("learning_rate", learning_rate, 1e-9, 100.0),
            "proximal_mu": _within("proximal_mu", proximal_mu, 0.0, 1000.0),
            "clip_norm": _within("clip_norm", clip_norm, 0.0, self._config.fold.norm_max),
            "devices_min": _within("devices_min", devices_min, 1, 1 << 20),
            "deadline_s": _within("deadline_s", deadline_s, 1, 86_400),
            "seed": _within("seed", seed, 0, 2**63 - 1),
            "server_momentum": _within("server_momentum", server_momentum, 0.0, 0.999),
        }
        parameters = await self._workshop.initial(bundle_sha256)
        settings["parameters_size"] = _within(
            "parameters", len(parameters), 4, self._config.parameters_bytes_max
        )

        def write() -> str:
            sha256 = self._artefacts.put(parameters, PARAMETERS)
            now_ms, run_id = self._clock(), uuid.uuid4().hex
            with self._store.begin() as session:
                session.add(
                    RoundsRun(
                        id=run_id, state=RunState.RUNNING, base_sha256=bundle_sha256,
                        settings=settings, parameters_sha256=sha256,
                        created_ms=now_ms, changed_ms=now_ms, history=[],
                    )
                )  # fmt: skip
                audit.append(
                    session, now_ms=now_ms, actor="operator", action="rounds.started",
                    subject=run_id, detail={"bundle_sha256": bundle_sha256, **settings},
                )  # fmt: skip
            return run_id

        run_id = await asyncio.to_thread(write)
        self._changed.set()
        return run_id

    async def get(self, run_id: str) -> dict[str, Any]:
        """Return a run as JSON.

        Raises:
            NotFoundError: There is none.
        """

        def look() -> dict[str, Any]:
            with self._store.read() as session:
                run = session.get(RoundsRun, run_id)
                if run is None:
                    raise NotFoundError(f"there is no run of rounds {run_id:.40}")
                return {
                    "run_id": run.id,
                    "state": run.state,
                    "base_sha256": run.base_sha256,
                    "round": run.round,
                    "rounds": run.settings["rounds"],
                    "settings": run.settings,
                    "history": run.history,
                    "candidate_sha256": run.candidate_sha256,
                    "reason": run.reason,
                    "created_ms": run.created_ms,
                    "changed_ms": run.changed_ms,
                }

        return await asyncio.to_thread(look)

    async def run(self) -> None:
        """Carry runs out until cancelled."""
        while True:
            for run_id in await asyncio.to_thread(self._unfinished):
                await self.advance(run_id)
            try:
                async with asyncio.timeout(self._config.tick_s):
                    await self._changed.wait()
                    await asyncio.sleep(self._config.settle_s)
            except TimeoutError:
                pass
            self._changed.clear()

    async def advance(self, run_id: str) -> None:
        """Do what can be done now for one run; a failed step is done again at the next tick."""
        try:
            run = await asyncio.to_thread(self._load, run_id)
            if run.state == RunState.QUANTIZING:
                await self._finish(run)
            elif await asyncio.to_thread(self._round, run):
                self._changed.set()
            self._failures.pop(run_id, None)
        except ShoalError as exc:
            self._failures[run_id] += 1
            if exc.retry and self._failures[run_id] < self._config.attempts_max:
                log.warning("rounds %s: %s; will try again", run_id, exc)
            else:
                await asyncio.to_thread(self._give_up, run_id, str(exc))

    def _load(self, run_id: str) -> RoundsRun:
        with self._store.read() as session:
            return session.get_one(RoundsRun, run_id)

    def _unfinished(self) -> Sequence[str]:
        states = (RunState.RUNNING, RunState.QUANTIZING)
        with self._store.read() as session:
            query = select(RoundsRun.id).where(RoundsRun.state.in_(states))
            return session.scalars(query.order_by(RoundsRun.created_ms)).all()

    # --- one round, in a thread ----------------------------------------------------------------

    def _round(self, run: RoundsRun) -> bool:
        """Open, watch or close the round of a run; say whether to look again at once."""
        now_ms = self._clock()
        tasks = self._tasks(run)
        if not tasks:
            return self._open(run, now_ms)
        deadline_ms = max(task.deadline_ms for task in tasks)
        offered = any(task.state == TaskState.OFFERED for task in tasks)
        if offered and now_ms < deadline_ms:
            self._offer(run, deadline_ms, known={task.device_id for task in tasks})
        verdict = rules.judge(
            (task.state for task in tasks),
            now_ms=now_ms,
            deadline_ms=deadline_ms,
            reports_min=run.settings["devices_min"],
        )
        if verdict is Verdict.WAIT:
            return False
        tasks = self._freeze(run)
        self._leases.forget([t.device_id for t in tasks if t.state == TaskState.EXPIRED])
        self._close(run, tasks, void=verdict is Verdict.VOID)
        return True

    def _tasks(self, run: RoundsRun) -> Sequence[Task]:
        with self._store.read() as session:
            query = select(Task).where(Task.owner_id == run.id, Task.round == run.round)
            return session.scalars(query).all()

    def _open(self, run: RoundsRun, now_ms: int) -> bool:
        since_ms = self._since_ms.setdefault((run.id, run.round), now_ms)
        settings = run.settings
        with self._store.read() as session:
            fleet = session.scalars(select(Device).where(Device.revoked_ms.is_(None))).all()
            before = select(Task.id).where(
                Task.owner_id == run.id,
                Task.round == run.round - 1,
                Task.state == TaskState.REPORTED,
            )
            reported = len(session.scalars(before).all())
        ready = self._leases.ready(run.base_sha256)
        deadline_ms = settings["deadline_s"] * 1000
        if rules.may_open(
            ready=len(ready),
            known=reported or len(fleet),
            waited_ms=now_ms - since_ms,
            gather_ms=round(self._config.gather_s * 1000),
            devices_min=settings["devices_min"],
        ):
            self._offer(run, now_ms + deadline_ms, known=set())
            self._since_ms.pop((run.id, run.round), None)
            return False
        if now_ms - since_ms >= deadline_ms:
            self._since_ms.pop((run.id, run.round), None)
            self._close(run, (), void=True)
            return True
        if now_ms - self._nudged_ms.get(run.id, 0) >= self._config.nudge_s * 1000:
            self._nudged_ms[run.id] = now_ms
            for device in fleet:
                self._nudge(device.name, "tasks")
        return False

    def _offer(self, run: RoundsRun, deadline_ms: int, *, known: set[int]) -> None:
        """Lease the open round to devices that are ready and have no lease yet."""
        new = [peer for peer in self._leases.ready(run.base_sha256) if peer.id not in known]
        now_ms = self._clock()
        if new:
            with self._store.begin() as session:
                session.add_all(self._task(run, peer, now_ms, deadline_ms) for peer in new)
        self._leases.wake([peer.id for peer in new])
        for peer in new:
            self._nudge(peer.name, "tasks")

    def _task(self, run: RoundsRun, peer: Peer, now_ms: int, deadline_ms: int) -> Task:
        return Task(
            id=rules.task_id(run.id, run.round, peer.name), owner_id=run.id, kind="train",
            round=run.round, device_id=peer.id, state=TaskState.OFFERED, result={},
            created_ms=now_ms, deadline_ms=deadline_ms, changed_ms=now_ms,
        )  # fmt: skip

    def _freeze(self, run: RoundsRun) -> Sequence[Task]:
        """Close the round for results, and return its tasks as they stay."""
        now_ms = self._clock()
        with self._store.begin() as session:
            query = select(Task).where(Task.owner_id == run.id, Task.round == run.round)
            tasks = session.scalars(query).all()
            for task in tasks:
                if task.state == TaskState.OFFERED:
                    task.state = rules.task_after(task.state, TaskEvent.ROUND_CLOSED)
                    task.changed_ms = now_ms
        return tasks

    def _close(self, run: RoundsRun, tasks: Sequence[Task], *, void: bool) -> None:
        """Fold a frozen round and store what comes out; done again after a crash, it is equal."""
        size = run.settings["parameters_size"] // 4
        fold = Fold(size, config=_fold_config(run, self._config))
        norms, clipped, lost = [], 0, []
        reported = [task for task in tasks if task.state == TaskState.REPORTED]
        for task in () if void else reported:
            try:
                contribution = fold.update(self._delta(task, size), weight=task.result["windows"])
            except (DeltaError, OSError) as exc:
                log.warning("task %s: its delta is lost: %s", task.id, exc)
                lost.append(task.id)
                continue
            norms.append(contribution.norm)
            clipped += contribution.clipped
        entry = _entry(run.round, tasks, lost)
        parameters_sha256, momentum_sha256 = run.parameters_sha256, run.momentum_sha256
        if void or fold.weight == 0 or fold.count < run.settings["devices_min"]:
            entry["void"] = True
        else:
            parameters_sha256, momentum_sha256 = self._step(run, fold)
            entry |= {"norm_mean": float(np.mean(norms)), "clipped": clipped}
        with self._store.begin() as session:
            stored = session.get_one(RoundsRun, run.id)
            for task_id in lost:
                task = session.get_one(Task, task_id)
                task.state = rules.task_after(task.state, TaskEvent.DELTA_LOST)
            stored.history = [*stored.history, entry]
            stored.round = run.round + 1
            stored.parameters_sha256, stored.momentum_sha256 = parameters_sha256, momentum_sha256
            stored.changed_ms = self._clock()
            last = stored.history[-self._config.voids_max :]
            if len(last) == self._config.voids_max and all(each["void"] for each in last):
                stored.state = rules.run_after(stored.state, RunEvent.GAVE_UP)
                stored.reason = (
                    f"{len(last)} rounds in a row had fewer than "
                    f"{run.settings['devices_min']} results"
                )
            elif stored.round >= run.settings["rounds"] and all(
                each["void"] for each in stored.history
            ):
                stored.state = rules.run_after(stored.state, RunEvent.GAVE_UP)
                stored.reason = (
                    f"no round had the {run.settings['devices_min']} results that it needs: "
                    "nothing was learned"
                )
            elif stored.round >= run.settings["rounds"]:
                stored.state = rules.run_after(stored.state, RunEvent.ROUNDS_FINISHED)
        self._leases.drop_deltas([task.id for task in tasks])
        for old, new in (
            (run.parameters_sha256, parameters_sha256),
            (run.momentum_sha256, momentum_sha256),
        ):
            if old and old != new:
                self._drop(old)

    def _delta(self, task: Task, size: int) -> NDArray[np.float32]:
        path = self._leases.delta_path(task.id)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != task.delta_sha256:
                raise DeltaError("the file is not what the device sent")
        return np.memmap(path, "<f4", "r", shape=(size,))

    def _step(self, run: RoundsRun, fold: Fold) -> tuple[str, str]:
        """Store the next parameters and momentum, and return their digests."""
        momentum = self._vector(run.momentum_sha256) if run.momentum_sha256 else None
        new__p, after__p = rules.step(
            self._vector(run.parameters_sha256),
            fold.finalize(),
            momentum,
            server_momentum=run.settings["server_momentum"],
        )
        parameters = self._artefacts.put(new__p.astype("<f4").tobytes(), PARAMETERS)
        if after__p is None:
            return parameters, ""
        return parameters, self._artefacts.put(after__p.astype("<f4").tobytes(), PARAMETERS)

    def _vector(self, sha256: str) -> NDArray[np.float32]:
        data = self._artefacts.read(sha256, bytes_max=self._config.parameters_bytes_max)
        return np.frombuffer(data, "<f4").astype(np.float32)

    def _drop(self, sha256: str) -> None:
        """Delete parameters that no run needs any more."""
        with self._store.read() as session:
            needed = select(RoundsRun.id).where(
                (RoundsRun.parameters_sha256 == sha256) | (RoundsRun.momentum_sha256 == sha256)
            )
            if session.scalars(needed.limit(1)).first() is None:
                self._artefacts.delete(sha256)

    # --- the end -------------------------------------------------------------------------------

    async def _finish(self, run: RoundsRun) -> None:
        parameters = await asyncio.to_thread(
            self._artefacts.read, run.parameters_sha256, bytes_max=run.settings["parameters_size"]
        )
        facts = {"rounds": run.id, "round": str(run.round)}
        sha256 = await self._workshop.candidate(run.base_sha256, parameters, facts=facts)

        def write() -> None:
            with self._store.begin() as session:
                stored = session.get_one(RoundsRun, run.id)
                stored.state = rules.run_after(stored.state, RunEvent.CANDIDATE_BUILT)
                stored.candidate_sha256, stored.changed_ms = sha256, self._clock()
                audit.append(
                    session, now_ms=self._clock(), actor="server", action="rounds.finished",
                    subject=run.id, detail={"candidate_sha256": sha256},
                )  # fmt: skip

        await asyncio.to_thread(write)

    def _give_up(self, run_id: str, reason: str) -> None:
        log.error("rounds %s failed: %s", run_id, reason)
        with self._store.begin() as session:
            run = session.get_one(RoundsRun, run_id)
            run.state = rules.run_after(run.state, RunEvent.GAVE_UP)
            run.reason, run.changed_ms = reason[:500], self._clock()


def _entry(round_: int, tasks: Sequence[Task], lost: Sequence[str]) -> dict[str, Any]:
    """Return the history entry of a round."""
    counts = Counter(task.state for task in tasks)
    results = [t.result for t in tasks if t.state == TaskState.REPORTED and t.id not in lost]
    windows = sum(each["windows"] for each in results)
    entry: dict[str, Any] = {
        "round": round_ + 1,
        "devices": len(results),
        "failed": counts[TaskState.FAILED] + len(lost),
        "expired": counts[TaskState.EXPIRED],
        "windows": windows,
        "void": False,
    }
    for name in ("loss_first", "loss_last"):
        if windows:
            entry[name] = sum(each[name] * each["windows"] for each in results) / windows
    reasons = Counter(t.result.get("code", "") for t in tasks if t.state == TaskState.FAILED)
    if reasons:
        entry["failures"] = dict(reasons)
    return entry


def _fold_config(run: RoundsRun, config: RoundsConfig) -> FoldConfig:
    fold = config.fold
    return FoldConfig(
        deltas_max=fold.deltas_max,
        weight_max=fold.weight_max,
        norm_max=fold.norm_max,
        clip_norm=run.settings["clip_norm"],
    )


def _within(name: str, value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:
        raise InvalidError(f"{name} must be {low:g} to {high:g}, not {value:g}")
    return value
