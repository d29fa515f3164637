"""Queue training runs and make candidates: the database and artefacts around the pipeline.

    run:  queued -> running -> done | failed        (running -> queued when the server restarts)

What is stored first: the artefacts, then the registered model, then the run's end. Each of these
may be done again; bundles are the same bytes again.

Not here: the work (``pipeline``), its processes (``worker``).
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select

from ... import ShoalError
from ...proto.names import check_name
from ..errors import InvalidError, NotFoundError
from ..registry.artefacts import Artefacts
from ..registry.models import Models
from ..store import audit
from ..store.engine import Store
from ..store.tables import TrainingRun
from .config import ProfileConfig
from .worker import Executor

log = logging.getLogger(__name__)

TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    "queued": frozenset({"running"}),
    "running": frozenset({"queued", "done", "failed"}),
    "done": frozenset(),
    "failed": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Bounds of training runs."""

    epochs_max: int = 10_000
    """Of one run."""
    attempts_max: int = 3
    """A run whose process died is tried this often."""
    progress_s: float = 0.5
    """Progress is stored at most this often."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.epochs_max < 1 or self.attempts_max < 1 or self.progress_s < 0:
            raise ValueError("epochs_max and attempts_max must be at least 1, progress_s 0 s")


class Training:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        artefacts: Artefacts,
        models: Models,
        executor: Executor,
        *,
        clock: Callable[[], int],
        config: TrainingConfig | None = None,
        profile: ProfileConfig | None = None,
    ) -> None:
        self._store, self._artefacts, self._models = store, artefacts, models
        self._executor, self._clock = executor, clock
        self._config, self._profile = config or TrainingConfig(), profile or ProfileConfig()
        self._queued = asyncio.Event()

    async def start(
        self,
        *,
        name: str = "",
        dataset_sha256: str = "",
        epochs: int = 0,
        seed: int = 0,
        note: str = "",
    ) -> str:
        """Queue a run and return its id.

        Args:
            name: Of the model.
            dataset_sha256: Artefact of the data set.
            epochs: 0 = the default.
            seed: Of the weights and the order.
            note: For people, at most 500 characters.

        Raises:
            NotFoundError: There is no such artefact.
            InvalidError: An argument is out of range.
            ContractError: The name is not legal.
        """
        check_name(name, what="model name")
        if not 0 <= epochs <= self._config.epochs_max or not 0 <= seed < 2**63 or len(note) > 500:
            raise InvalidError(
                f"epochs must be 0 to {self._config.epochs_max}, seed below 2**63, "
                "the note at most 500 characters"
            )

        def write() -> str:
            self._artefacts.size(dataset_sha256)
            run_id, now_ms = uuid.uuid4().hex, self._clock()
            with self._store.begin() as session:
                session.add(
                    TrainingRun(
                        id=run_id, state="queued", name=name, dataset_sha256=dataset_sha256,
                        settings={"epochs": epochs, "seed": seed, "note": note}, progress={},
                        created_ms=now_ms, changed_ms=now_ms,
                    )
                )  # fmt: skip
                audit.append(
                    session, now_ms=now_ms, actor="operator", action="training.started",
                    subject=run_id, detail={"name": name, "dataset_sha256": dataset_sha256},
                )  # fmt: skip
            return run_id

        run_id = await asyncio.to_thread(write)
        self._queued.set()
        return run_id

    async def get(self, run_id: str) -> dict[str, Any]:
        """Return a run as JSON.

        Raises:
            NotFoundError: There is none.
        """

        def look() -> dict[str, Any]:
            with self._store.read() as session:
                run = session.get(TrainingRun, run_id)
            if run is None:
                raise NotFoundError(f"there is no training run {run_id:.40}")
            return {
                "run_id": run.id,
                "state": run.state,
                "name": run.name,
                "dataset_sha256": run.dataset_sha256,
                "settings": run.settings,
                "progress": run.progress,
                "model_sha256": run.model_sha256,
                "reason": run.reason,
                "created_ms": run.created_ms,
                "changed_ms": run.changed_ms,
            }

        return await asyncio.to_thread(look)

    async def run(self) -> None:
        """Carry out queued runs, one after the other, until cancelled."""
        await asyncio.to_thread(self._requeue)
        while True:
            self._queued.clear()
            if (run := await asyncio.to_thread(self._take)) is not None:
                await self._carry_out(run)
            else:
                await self._queued.wait()

    async def _carry_out(self, run: TrainingRun) -> None:
        progress: dict[str, Any] = dict(run.progress)
        stored_s = 0.0
        storing: list[asyncio.Task[None]] = []

        def told(news: dict[str, Any]) -> None:
            nonlocal stored_s
            progress.update(news)
            now_s = time.monotonic()
            if now_s - stored_s >= self._config.progress_s and all(t.done() for t in storing):
                stored_s = now_s
                storing[:] = [
                    asyncio.ensure_future(
                        asyncio.to_thread(self._change, run.id, progress=dict(progress))
                    )
                ]

        try:
            with tempfile.TemporaryDirectory(prefix="shoal-training-") as folder:
                figures = await self._executor.run(
                    "train",
                    {
                        "dataset": str(self._artefacts.path(run.dataset_sha256)),
                        "name": run.name,
                        "epochs": run.settings["epochs"],
                        "seed": run.settings["seed"],
                        "profile": asdict(self._profile),
                        "out": folder,
                    },
                    told=told,
                )
                sha256 = await asyncio.to_thread(
                    store_made, Path(folder), self._artefacts, self._models,
                    name=run.name, note=run.settings["note"],
                )  # fmt: skip
            await asyncio.gather(*storing)
            progress |= figures
            await asyncio.to_thread(
                self._change, run.id, state="done", progress=progress, model_sha256=sha256
            )
        except ShoalError as exc:
            await asyncio.gather(*storing)
            again = exc.retry and progress["attempts"] < self._config.attempts_max
            log.warning("training run %s: %s", run.id, exc)
            await asyncio.to_thread(
                self._change,
                run.id,
                state="queued" if again else "failed",
                reason=str(exc)[:500],
            )
        finally:
            await asyncio.gather(*storing, return_exceptions=True)

    def _requeue(self) -> None:
        """Queue what ran when the server died; give up what died with it too often."""
        with self._store.begin() as session:
            for run in session.scalars(select(TrainingRun).where(TrainingRun.state == "running")):
                again = run.progress.get("attempts", 0) < self._config.attempts_max
                run.state = _checked(run.state, "queued" if again else "failed")
                run.reason = "" if again else "the server died during each attempt"
                run.changed_ms = self._clock()

    def _take(self) -> TrainingRun | None:
        with self._store.begin() as session:
            query = select(TrainingRun).where(TrainingRun.state == "queued")
            run = session.scalars(query.order_by(TrainingRun.created_ms).limit(1)).first()
            if run is not None:
                run.state, run.changed_ms = _checked(run.state, "running"), self._clock()
                run.progress = {"attempts": run.progress.get("attempts", 0) + 1}
            return run

    def _change(self, run_id: str, *, state: str = "", **values: Any) -> None:
        with self._store.begin() as session:
            run = session.get_one(TrainingRun, run_id)
            if state:
                run.state = _checked(run.state, state)
            for name, value in values.items():
                setattr(run, name, value)
            run.changed_ms = self._clock()


class Workshop:
    """Makes parameters of bundles and bundles of parameters, for federated rounds."""

    def __init__(
        self,
        artefacts: Artefacts,
        models: Models,
        executor: Executor,
        *,
        profile: ProfileConfig | None = None,
    ) -> None:
        self._artefacts, self._models, self._executor = artefacts, models, executor
        self._profile = profile or ProfileConfig()

    async def initial(self, bundle_sha256: str) -> bytes:
        """Return the float parameters that a registered bundle was made of.

        Raises:
            NotFoundError: It is not registered.
            InvalidError: It is foreign: the server has no float model of it.
        """
        from . import dataset, pipeline  # onnx is only loaded by servers that use it

        def read() -> bytes:
            source = dataset.read_source(self._artefacts.path(self._source(bundle_sha256)))
            return pipeline.vector(source.model)

        return await asyncio.to_thread(read)

    async def candidate(self, base_sha256: str, parameters: bytes, *, facts: dict[str, str]) -> str:
        """Build and register the base with other parameters; return the bundle's SHA-256.

        Raises:
            JobFailedError: The parameters do not fit.
            JobDiedError: The process died.
        """
        base = await asyncio.to_thread(self._models.get, base_sha256)
        with tempfile.TemporaryDirectory(prefix="shoal-candidate-") as folder:
            given = Path(folder) / "parameters"
            given.write_bytes(parameters)
            await self._executor.run(
                "candidate",
                {
                    "source": str(self._artefacts.path(self._source(base_sha256))),
                    "parameters": str(given),
                    "name": base.name,
                    "facts": {"parent": base_sha256, **facts},
                    "profile": asdict(self._profile),
                    "out": folder,
                },
            )
            return await asyncio.to_thread(
                store_made, Path(folder), self._artefacts, self._models,
                name=base.name, note="federated rounds", parent_sha256=base_sha256,
            )  # fmt: skip

    def _source(self, bundle_sha256: str) -> str:
        source_sha256 = self._models.get(bundle_sha256).source_sha256
        if not source_sha256:
            raise InvalidError(
                f"bundle {bundle_sha256:.12} was not made by this server and cannot be trained",
                hint="train the model here, or register it with its source",
            )
        return source_sha256


def store_made(
    folder: Path, artefacts: Artefacts, models: Models, *, name: str, note: str,
    parent_sha256: str = "",
) -> str:  # fmt: skip
    """Store and register what a job wrote; return the bundle's SHA-256."""
    source = artefacts.put((folder / "source").read_bytes(), "source")
    bundle = artefacts.put((folder / "bundle").read_bytes(), "bundle")
    models.register(name, bundle, note=note, parent_sha256=parent_sha256, source_sha256=source)
    return bundle


def _checked(state: str, new: str) -> str:
    assert new in TRANSITIONS[state], f"a training run that is {state} cannot become {new}"
    return new
