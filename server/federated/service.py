"""The federated exchange over gRPC: protobuf at the edge, bounded uploads, nothing decided.

Not here: leases and checks (``leases``), who the peer is (``api/identity``), how errors become
status codes (``api/errors``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc

from ...proto import federated_pb2 as pb
from ...proto.federated_pb2_grpc import FederatedServiceServicer
from ..errors import InvalidError
from .leases import EvaluateWork, Lease, Leases, Peer, TrainWork

CHUNK_BYTES_MAX: Final = 256 << 10
SPLITS: Final = {
    "train": pb.SPLIT_TRAIN, "validation": pb.SPLIT_VALIDATION, "test": pb.SPLIT_TEST
}  # fmt: skip

Messages = AsyncIterator[pb.SubmitResultRequest]


class FederatedServicer(FederatedServiceServicer):
    """Registered on the device server; raises ShoalErrors."""

    def __init__(
        self,
        leases: Leases,
        *,
        peer: Callable[[grpc.aio.ServicerContext], Awaitable[Peer]],
        clock: Callable[[], int],
    ) -> None:
        """Prepare.

        Args:
            leases: Hands out tasks.
            peer: Returns the device behind a call, or raises.
            clock: Unix ms.
        """
        self._leases, self._peer, self._clock = leases, peer, clock

    async def GetTask(
        self, request: pb.GetTaskRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTaskResponse:
        """Return the device's task, or nothing after a while."""
        peer = await self._peer(context)
        lease = await self._leases.next(
            peer,
            wait_ms=request.wait_ms,
            bundle_sha256=request.bundle_sha256,
            labelled=request.labelled_windows,
        )
        if lease is None:
            return pb.GetTaskResponse()
        return pb.GetTaskResponse(task=_task(lease, now_ms=self._clock()))

    async def SubmitResult(
        self, requests: Messages, context: grpc.aio.ServicerContext
    ) -> pb.SubmitResultResponse:
        """Take a result: the header, then the chunks of the delta."""
        peer = await self._peer(context)
        header = await _header(requests)
        lease = await self._leases.lease(peer, header.task_id)
        if lease is None:
            return pb.SubmitResultResponse(accepted=False)
        outcome = header.WhichOneof("outcome")
        if outcome == "failure":
            accepted = await self._leases.report_failure(
                peer, lease, code=header.failure.code, text=header.failure.text
            )
        elif outcome == "train" and isinstance(lease.work, TrainWork):
            accepted = await self._train(peer, lease, header.train, requests)
        elif outcome == "evaluate" and isinstance(lease.work, EvaluateWork):
            scores = [_score(each) for each in header.evaluate.scores]
            accepted = await self._leases.report_evaluation(peer, lease, scores)
        else:
            raise InvalidError(f"the result is {outcome}, which the task did not ask for")
        return pb.SubmitResultResponse(accepted=accepted)

    async def _train(
        self, peer: Peer, lease: Lease, result: pb.TrainResult, requests: Messages
    ) -> bool:
        assert isinstance(lease.work, TrainWork)
        bound = lease.work.parameters_size
        fd, name = tempfile.mkstemp(dir=self._leases.uploads)
        upload = Path(name)
        try:
            # Written on the loop: a chunk into the page cache takes less than a thread's switch.
            with os.fdopen(fd, "wb") as file:
                async for request in requests:
                    chunk = request.chunk
                    if not 0 < len(chunk) <= CHUNK_BYTES_MAX:
                        raise InvalidError("a chunk is empty or longer than 256 KiB")
                    if file.tell() + len(chunk) > bound:
                        raise InvalidError(f"the delta is longer than {bound} bytes")
                    file.write(chunk)
            facts = {
                "windows": result.windows,
                "loss_first": result.loss_first,
                "loss_last": result.loss_last,
                "train_ms": result.train_ms,
            }
            return await self._leases.report_train(
                peer, lease, result=facts, sha256=result.delta_sha256, upload=upload
            )
        finally:
            upload.unlink(missing_ok=True)


async def _header(requests: Messages) -> pb.ResultHeader:
    async for first in requests:
        if first.WhichOneof("part") == "header":
            return first.header
        break
    raise InvalidError("a result begins with its header")


def _task(lease: Lease, *, now_ms: int) -> pb.Task:
    task = pb.Task(
        task_id=lease.task_id,
        round_id=f"{lease.owner_id}/{lease.round}",
        expires_in_ms=max(0, lease.deadline_ms - now_ms),
    )
    work = lease.work
    if isinstance(work, EvaluateWork):
        task.evaluate.CopyFrom(
            pb.EvaluateTask(bundle_sha256=work.bundles, split=SPLITS[work.split])
        )
        return task
    task.train.CopyFrom(
        pb.TrainTask(
            bundle_sha256=work.bundle_sha256,
            parameters_sha256=work.parameters_sha256,
            parameters_size=work.parameters_size,
            epochs=work.epochs,
            batch_size=work.batch_size,
            learning_rate=work.learning_rate,
            proximal_mu=work.proximal_mu,
            clip_norm=work.clip_norm,
            seed=work.seed,
        )
    )
    return task


def _score(score: pb.BundleScore) -> dict[str, Any]:
    return {
        "bundle_sha256": score.bundle_sha256,
        "windows": score.windows,
        "correct": score.correct,
        "loss_sum": score.loss_sum,
        "confusion": list(score.confusion),
        "latency_p50_us": score.latency_p50_us,
    }
