"""Do the fleet's learning tasks on this device: train on labelled windows, judge candidates.

    nudge or slow poll -> GetTask -> child: train | evaluate -> SubmitResult -> GetTask ...

The windows never leave the device: what goes up is the change of the parameters, or counts. The
work runs in a child process at low priority; serving goes first. Nothing is kept of a task: after
a crash the server offers it again, and the same task on the same windows gives the same delta.

Not here: the arithmetic (``jobs``), limits (``children``), which bundle runs (``updates``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from .. import ShoalError
from ..proto import federated_pb2 as pb
from ..proto import model_pb2
from ..proto.federated_pb2_grpc import FederatedServiceStub
from ..proto.model_pb2_grpc import ModelServiceStub
from ..proto.names import check_digest
from .children import Child, ChildConfig, JobRefusedError
from .errors import AgentError, NoLabelsError

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 256 << 10
RETRY_S: Final = 0.2  # doubles up to RETRY_S_MAX
RETRY_S_MAX: Final = 30.0
LATER: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
TRAIN: Final = 0  # number of the split that may be trained on
SPLITS: Final = {
    pb.SPLIT_TRAIN: TRAIN,
    pb.SPLIT_VALIDATION: 1,
    pb.SPLIT_TEST: 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How much this device does for the fleet's learning."""

    enabled: bool = True
    """Whether the device takes tasks at all."""
    poll_s: float = 300.0
    """The server is asked this often even without a nudge."""
    wait_s: float = 25.0
    """How long the server may hold a question while tasks are coming in."""
    linger_s: float = 60.0
    """Tasks are waited for this long after the last one or the last nudge."""
    bundle_bytes_max: int = 256 << 20
    """Size of a candidate that is fetched for evaluation."""
    parameters_bytes_max: int = 256 << 20
    """Size of the parameters of a training task."""
    cache_bytes_max: int = 512 << 20
    """Size of all fetched candidates together; the one used longest ago goes first."""
    child: ChildConfig = field(default_factory=ChildConfig)
    """Limits of the process that does the work."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.poll_s <= 0 or not 0 <= self.wait_s <= 30 or self.linger_s < 0:
            raise ValueError("poll_s must be above 0 s, wait_s 0 to 30 s, linger_s at least 0 s")
        if not 0 < self.bundle_bytes_max <= self.cache_bytes_max or self.parameters_bytes_max <= 0:
            raise ValueError("bundle_bytes_max must be above 0 and at most cache_bytes_max")


class FetchError(AgentError):
    """An artefact could not be fetched as it should be; what came was thrown away."""

    code = "agent.trainer.fetch"


class OtherBundleError(AgentError):
    """The task is for another bundle than the one that runs; nothing was trained."""

    code = "agent.trainer.bundle"


class Labelled(Protocol):
    """The labelled windows of this device."""

    def count(self, split: int) -> int:
        """Return how many windows of a split are labelled."""

    def windows(self, split: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return x float32 (N, C, T) and y int64 (N,) of a split."""


class Trainer:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        root: Path,
        *,
        channel: Callable[[], grpc.aio.Channel],
        labelled: Labelled,
        active: Callable[[], tuple[Path, str] | None],
        config: TrainerConfig,
    ) -> None:
        """Prepare; nothing is touched before :meth:`run`.

        Args:
            root: Folder of this component's own; made when missing. All in it can be fetched or
                made again.
            channel: Returns the open channel to the server.
            labelled: The labelled windows.
            active: Returns path and SHA-256 of the bundle that runs; None = none.
            config: The bounds.
        """
        self._root, self._channel, self._labelled = root, channel, labelled
        self._active, self._config = active, config
        self._child = Child(config=config.child)
        self._nudged = asyncio.Event()
        self.tasks_done = 0
        """Results that the server has taken."""
        self.bytes_up = 0
        """Bytes of deltas that were sent."""

    def nudge(self) -> None:
        """Ask for tasks now. Call it on the event loop."""
        self._nudged.set()

    async def run(self) -> None:
        """Do tasks until cancelled."""
        if not self._config.enabled:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        failures, listen_until_s = 0, 0.0
        self._nudged.set()  # a task may be open since before this start
        try:
            while True:
                if loop.time() > listen_until_s and await self._wait_for_nudge():
                    listen_until_s = loop.time() + self._config.linger_s
                try:
                    listening = loop.time() < listen_until_s
                    if await self._turn(self._config.wait_s if listening else 0.0):
                        listen_until_s = loop.time() + self._config.linger_s
                    failures = 0
                except grpc.aio.AioRpcError as exc:
                    log.info("the server cannot be asked for tasks: %s", exc.code().name)
                    failures += 1
                    await asyncio.sleep(_backoff_s(failures))
        finally:
            await self._child.close()

    async def _wait_for_nudge(self) -> bool:
        try:
            async with asyncio.timeout(self._config.poll_s):
                await self._nudged.wait()
        except TimeoutError:
            return False
        self._nudged.clear()
        return True

    async def _turn(self, wait_s: float) -> bool:
        """Ask for a task and do it; say whether there was one."""
        active = self._active()
        request = pb.GetTaskRequest(
            wait_ms=round(wait_s * 1000),
            bundle_sha256=active[1] if active else "",
            labelled_windows=self._labelled.count(TRAIN),
        )
        stub = FederatedServiceStub(self._channel())
        reply = await stub.GetTask(request, timeout=wait_s + 15)
        if not reply.HasField("task"):
            if reply.retry_after_ms:
                await asyncio.sleep(reply.retry_after_ms / 1000)
            return False
        task = reply.task
        loop = asyncio.get_running_loop()
        expires_s = loop.time() + task.expires_in_ms / 1000
        try:
            async with asyncio.timeout_at(expires_s):
                header, delta = await self._do(task)
                await self._submit(header, delta)
        except TimeoutError:
            log.warning("task %s expired before it was done", task.task_id)
        return True

    async def _do(self, task: pb.Task) -> tuple[pb.ResultHeader, bytes]:
        header, delta = pb.ResultHeader(task_id=task.task_id), b""
        try:
            if task.WhichOneof("work") == "train":
                result, delta = await self._train(task.train)
                header.train.CopyFrom(result)
            elif task.WhichOneof("work") == "evaluate":
                header.evaluate.CopyFrom(await self._evaluate(task.evaluate))
            else:
                raise AgentError("this agent does not know this kind of task")
        except ShoalError as exc:
            code = exc.reason if isinstance(exc, JobRefusedError) else exc.code
            header.failure.CopyFrom(pb.TaskFailure(code=code, text=str(exc)[:500]))
            log.warning("task %s failed: %s", task.task_id, exc)
        return header, delta

    async def _train(self, task: pb.TrainTask) -> tuple[pb.TrainResult, bytes]:
        active = self._active()
        if active is None or active[1] != task.bundle_sha256:
            raise OtherBundleError(
                f"the task trains bundle {task.bundle_sha256:.12}, this device runs "
                f"{active[1] if active else 'none':.12}"
            )
        windows = await self._windows(TRAIN)
        parameters = await self._parameters(task.parameters_sha256, task.parameters_size)
        found = await self._child.call(
            "train",
            bundle=str(active[0]),
            sha256=active[1],
            parameters=str(parameters),
            windows=windows,
            epochs=min(max(task.epochs, 1), 100),
            batch_size=min(max(task.batch_size, 1), 4096),
            learning_rate=task.learning_rate,
            proximal_mu=task.proximal_mu,
            clip_norm=task.clip_norm,
            seed=task.seed,
        )
        delta: bytes = found["delta"]
        result = pb.TrainResult(
            windows=found["windows"],
            loss_first=found["loss_first"],
            loss_last=found["loss_last"],
            delta_sha256=hashlib.sha256(delta).hexdigest(),
            delta_size=len(delta),
            train_ms=found["train_ms"],
        )
        return result, delta

    async def _evaluate(self, task: pb.EvaluateTask) -> pb.EvaluateResult:
        if task.split not in SPLITS or not 1 <= len(task.bundle_sha256) <= 4:
            raise AgentError("the task names no known split, or not 1 to 4 bundles")
        windows = await self._windows(SPLITS[task.split])
        bundles = [[str(await self._bundle(each)), each] for each in task.bundle_sha256]
        found = await self._child.call("evaluate", bundles=bundles, windows=windows)
        return pb.EvaluateResult(scores=[pb.BundleScore(**each) for each in found["scores"]])

    # --- files -----------------------------------------------------------------------------

    async def _windows(self, split: int) -> str:
        """Write the labelled windows of a split, if they changed, and return their path."""
        x__nct, y__n = self._labelled.windows(split)
        if not len(y__n):
            raise NoLabelsError("there are no labelled windows of this split yet")

        def write() -> str:
            digest = hashlib.sha256(np.ascontiguousarray(x__nct).data)
            digest.update(y__n.tobytes())
            path = self._root / f"windows-{split}-{digest.hexdigest()[:16]}.npz"
            if not path.exists():
                for old in self._root.glob(f"windows-{split}-*"):
                    old.unlink()
                with tempfile.NamedTemporaryFile(dir=self._root, delete=False) as file:
                    np.savez(file, x__nct=x__nct, y__n=y__n)
                os.replace(file.name, path)
            return str(path)

        return await asyncio.to_thread(write)

    async def _parameters(self, sha256: str, size: int) -> Path:
        if not 0 < size <= self._config.parameters_bytes_max:
            raise FetchError(f"parameters of {size} bytes are beyond the bound of this device")
        folder = self._root / "parameters"
        folder.mkdir(exist_ok=True)
        path = folder / check_digest(sha256)
        if not path.exists():
            for old in folder.iterdir():
                old.unlink()
            await self._fetch(sha256, path, bytes_max=size)
        return path

    async def _bundle(self, sha256: str) -> Path:
        active = self._active()
        if active and active[1] == sha256:
            return active[0]
        folder = self._root / "bundles"
        folder.mkdir(exist_ok=True)
        path = folder / check_digest(sha256)
        if not path.exists():
            await self._fetch(sha256, path, bytes_max=self._config.bundle_bytes_max)
        path.touch()
        kept = sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime_ns, reverse=True)
        room = self._config.cache_bytes_max
        for each in kept:
            room -= each.stat().st_size
            if room < 0:
                each.unlink()
        return path

    async def _fetch(self, sha256: str, path: Path, *, bytes_max: int) -> None:
        digest, size = hashlib.sha256(), 0
        stub = ModelServiceStub(self._channel())
        call = stub.FetchArtefact(model_pb2.FetchArtefactRequest(sha256=sha256), timeout=600)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                async for reply in call:
                    size += len(reply.data)
                    if size > bytes_max:
                        raise FetchError(f"artefact {sha256:.12} is longer than {bytes_max} bytes")
                    digest.update(reply.data)
                    file.write(reply.data)  # into the page cache: less than a thread's switch
            if digest.hexdigest() != sha256:
                raise FetchError(f"artefact {sha256:.12} came with other bytes")
            part.replace(path)
        except grpc.aio.AioRpcError as exc:
            if exc.code() in LATER:
                raise  # the task is offered again when the server has time
            raise FetchError(f"artefact {sha256:.12}: {exc.code().name}: {exc.details()}") from exc
        finally:
            part.unlink(missing_ok=True)
            call.cancel()

    # --- results -----------------------------------------------------------------------------

    async def _submit(self, header: pb.ResultHeader, delta: bytes) -> None:
        """Hand a result in; a server that is away is waited for until the task expires."""
        failures = 0
        while True:
            try:
                stub = FederatedServiceStub(self._channel())
                self.bytes_up += len(delta) + header.ByteSize()
                await stub.SubmitResult(_parts(header, delta), timeout=120)
            except grpc.aio.AioRpcError as exc:
                if exc.code() not in LATER:
                    log.warning(
                        "the server did not take the result of %s: %s: %s",
                        header.task_id, exc.code().name, exc.details(),
                    )  # fmt: skip
                    return
                failures += 1
                await asyncio.sleep(_backoff_s(failures))
            else:
                self.tasks_done += 1
                return


async def _parts(header: pb.ResultHeader, delta: bytes) -> AsyncIterator[pb.SubmitResultRequest]:
    yield pb.SubmitResultRequest(header=header)
    for start in range(0, len(delta), CHUNK_BYTES):
        yield pb.SubmitResultRequest(chunk=delta[start : start + CHUNK_BYTES])


def _backoff_s(failures: int) -> float:
    """Return a wait with full jitter, so that a fleet does not come back all at once."""
    return min(RETRY_S_MAX, RETRY_S * 2.0 ** min(failures, 16)) * random.uniform(0.3, 1.0)
