"""Stories and faults of the trainer, against a scripted server over real gRPC on 127.0.0.1."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.agent.children import ChildConfig
from shoal.agent.trainer import Trainer, TrainerConfig
from shoal.proto import federated_pb2 as pb
from shoal.proto import model_pb2
from shoal.proto.bundle import Manifest, pack
from shoal.proto.federated_pb2_grpc import (
    FederatedServiceServicer,
    add_FederatedServiceServicer_to_server,
)
from shoal.proto.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from shoal.server.learning.autodiff import training_graph

C, T, K = 1, 3, 2
RNG = np.random.default_rng(2)
X__nct = RNG.normal(size=(20, C, T)).astype(np.float32)
Y__n = (X__nct.mean((1, 2)) > 0).astype(np.int64)
PARAMETERS = np.zeros(T * K + K, "<f4").tobytes()
CONFIG = TrainerConfig(wait_s=0.2, poll_s=0.2, child=ChildConfig(memory_bytes_max=1 << 30))


def bundle(scale: float) -> bytes:
    """Return a bundle of softmax regression; `scale` makes it right (> 0) or wrong (< 0)."""
    weight = np.zeros((T, K), np.float32)
    weight[:, 1] = scale
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]

    def model(count: int) -> Any:
        graph = helper.make_graph(
            nodes[:count],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", C, T])],
            [
                helper.make_tensor_value_info(
                    nodes[count - 1].output[0], TensorProto.FLOAT, ["b", K]
                )
            ],
            [
                numpy_helper.from_array(weight, "weight"),
                numpy_helper.from_array(np.zeros(K, np.float32), "bias"),
            ],
        )
        opsets = [helper.make_opsetid("", 18)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    golden = io.BytesIO()
    np.savez(golden, x=X__nct[:1], p=np.full((1, K), 0.5, np.float32))
    training = training_graph(model(2), trainable=["weight", "bias"])
    manifest = Manifest(
        name="m", model="model.onnx", input="x", output="p", channels=("a",),
        classes=("k", "l"), samples=T,
    )  # fmt: skip
    return pack(
        manifest,
        {
            "model.onnx": model(3).SerializeToString(),
            "golden.npz": golden.getvalue(),
            "profile.json": b"{}",
            "training.onnx": training.SerializeToString(),
        },
    )


def digest(data: bytes) -> str:
    """Return the SHA-256."""
    return hashlib.sha256(data).hexdigest()


CHAMPION, RIVAL = bundle(-3.0), bundle(3.0)


class Server(FederatedServiceServicer, ModelServiceServicer):
    """Hands out the tasks it is given, and keeps what comes back."""

    def __init__(self) -> None:
        self.tasks: list[pb.Task] = []
        self.asked: list[pb.GetTaskRequest] = []
        self.results: dict[str, tuple[pb.ResultHeader, bytes]] = {}
        self.artefacts = {digest(data): data for data in (CHAMPION, RIVAL, PARAMETERS)}
        self.fetched: list[str] = []
        self.fail: list[grpc.StatusCode] = []
        self.changed = asyncio.Event()

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        """Return the first task, again and again until its result came."""
        self.asked.append(request)
        if self.tasks:
            return pb.GetTaskResponse(task=self.tasks[0])
        await asyncio.sleep(min(request.wait_ms / 1000, 0.02))
        return pb.GetTaskResponse()

    async def SubmitResult(self, requests: Any, context: Any) -> pb.SubmitResultResponse:
        """Keep a result and go on to the next task."""
        if self.fail:
            await context.abort(self.fail.pop(0), "as told")
        parts = [each async for each in requests]
        header, chunks = parts[0].header, [each.chunk for each in parts[1:]]
        assert all(0 < len(chunk) <= 256 << 10 for chunk in chunks)
        self.results[header.task_id] = (header, b"".join(chunks))
        self.tasks = [task for task in self.tasks if task.task_id != header.task_id]
        self.changed.set()
        return pb.SubmitResultResponse(accepted=True)

    async def FetchArtefact(
        self, request: model_pb2.FetchArtefactRequest, context: Any
    ) -> AsyncIterator[model_pb2.FetchArtefactResponse]:
        """Stream an artefact in small chunks."""
        self.fetched.append(request.sha256)
        if request.sha256 not in self.artefacts:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is none")
        data = self.artefacts[request.sha256]
        for start in range(0, len(data), 1000):
            yield model_pb2.FetchArtefactResponse(
                offset=start, data=data[start : start + 1000], length=len(data)
            )

    async def answer(self, task: pb.Task) -> tuple[pb.ResultHeader, bytes]:
        """Offer a task and return its result."""
        self.tasks.append(task)
        while task.task_id not in self.results:
            self.changed.clear()
            async with asyncio.timeout(60):
                await self.changed.wait()
        return self.results[task.task_id]


class Windows:
    """Labelled windows: everything in every split, or nothing."""

    def __init__(self, count: int = len(Y__n)) -> None:
        self.size = count

    def count(self, split: int) -> int:
        """Return how many there are."""
        return self.size

    def windows(self, split: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the first ones."""
        return X__nct[: self.size], Y__n[: self.size]


@asynccontextmanager
async def running(
    root: Path, *, windows: Windows | None = None, config: TrainerConfig = CONFIG
) -> AsyncIterator[tuple[Server, Trainer]]:
    """Run a server and a trainer that has the champion."""
    (root / "active.shoal").write_bytes(CHAMPION)
    made = Server()
    server = grpc.aio.server()
    add_FederatedServiceServicer_to_server(made, server)
    add_ModelServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    trainer = Trainer(
        root / "trainer",
        channel=lambda: channel,
        labelled=windows or Windows(),
        active=lambda: (root / "active.shoal", digest(CHAMPION)),
        config=config,
    )
    task = asyncio.create_task(trainer.run())
    try:
        yield made, trainer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await channel.close()
        await server.stop(None)


def story(tell: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Tell an async story."""
    asyncio.run(tell())


def train(task_id: str = "t1", **changed: Any) -> pb.Task:
    """Return a training task."""
    work: dict[str, Any] = {
        "bundle_sha256": digest(CHAMPION), "parameters_sha256": digest(PARAMETERS),
        "parameters_size": len(PARAMETERS), "epochs": 5, "batch_size": 4, "learning_rate": 0.5,
        "seed": 3,
    }  # fmt: skip
    return pb.Task(
        task_id=task_id, round_id="r/0", expires_in_ms=60_000, train=pb.TrainTask(**work | changed)
    )


def judge(task_id: str, bundles: list[str]) -> pb.Task:
    """Return an evaluation task."""
    work = pb.EvaluateTask(bundle_sha256=bundles, split=pb.SPLIT_TEST)
    return pb.Task(task_id=task_id, expires_in_ms=60_000, evaluate=work)


def test_it_trains_and_hands_in_the_delta(tmp_path: Path) -> None:
    """The delta moves the parameters the right way; the child and the files are used again."""

    async def tell() -> None:
        async with running(tmp_path) as (server, trainer):
            header, delta = await server.answer(train())
            result = header.train
            assert result.windows == 20 and result.loss_last < result.loss_first
            assert result.delta_size == len(delta) == len(PARAMETERS)
            assert result.delta_sha256 == digest(delta)
            weight = np.frombuffer(delta, "<f4")[: T * K].reshape(T, K)
            assert (weight[:, 1] > weight[:, 0]).all()
            child = trainer._child.pid
            _, again = await server.answer(train("t2"))
            _, other = await server.answer(train("t3", seed=4))
            assert delta == again != other
            assert trainer._child.pid == child, "one warm process does every task"
            assert server.fetched == [digest(PARAMETERS)], "parameters are fetched once"
            while trainer.tasks_done < 3:  # the server's answer is on its way
                await asyncio.sleep(0.01)
            asked = server.asked[0]
            assert (asked.bundle_sha256, asked.labelled_windows) == (digest(CHAMPION), 20)

    story(tell)


def test_it_judges_bundles_on_its_own_windows(tmp_path: Path) -> None:
    """The active bundle is used in place, a candidate is fetched once."""

    async def tell() -> None:
        async with running(tmp_path) as (server, _):
            pair = [digest(CHAMPION), digest(RIVAL)]
            header, _ = await server.answer(judge("e1", pair))
            wrong, right = header.evaluate.scores
            assert [wrong.bundle_sha256, right.bundle_sha256] == pair
            assert wrong.windows == right.windows == 20 and wrong.correct == 0
            assert right.correct == 20 and sum(right.confusion) == 20
            assert right.loss_sum < wrong.loss_sum
            await server.answer(judge("e2", pair))
            assert server.fetched == [digest(RIVAL)]

    story(tell)


REFUSALS: dict[str, tuple[pb.Task, str]] = {
    "other bundle": (train(bundle_sha256="0" * 64), "agent.trainer.bundle"),
    "unknown parameters": (train(parameters_sha256="1" * 64), "agent.trainer.fetch"),
    "no digest": (train(parameters_sha256="../x"), "proto.contract"),
    "size": (train(parameters_size=len(PARAMETERS) - 4), "agent.trainer.fetch"),
    "huge": (train(parameters_size=1 << 40), "agent.trainer.fetch"),
    "diverges": (train(learning_rate=1e38), "agent.trainer.diverged"),
    "no proximal term": (train(proximal_mu=1.0), "agent.trainer.graph"),
    "unknown candidate": (judge("t1", ["2" * 64]), "agent.trainer.fetch"),
    "too many": (judge("t1", [digest(RIVAL)] * 5), "agent"),
    "nothing": (pb.Task(task_id="t1", expires_in_ms=60_000), "agent"),
}


def test_a_task_that_cannot_be_done_is_told_with_its_reason(tmp_path: Path) -> None:
    """Each is a TaskFailure, and the next task works."""

    async def tell() -> None:
        async with running(tmp_path) as (server, _):
            for number, (task, code) in enumerate(REFUSALS.values()):
                named = pb.Task()
                named.CopyFrom(task)
                named.task_id = f"bad{number}"
                header, delta = await server.answer(named)
                assert header.WhichOneof("outcome") == "failure" and not delta
                assert header.failure.code == code
            header, _ = await server.answer(train("good"))
            assert header.WhichOneof("outcome") == "train"

    story(tell)


def test_no_labels_no_work(tmp_path: Path) -> None:
    """A device without labels says so."""

    async def tell() -> None:
        async with running(tmp_path, windows=Windows(0)) as (server, _):
            for task in (train(), judge("e1", [digest(CHAMPION)])):
                header, _ = await server.answer(task)
                assert header.failure.code == "agent.trainer.no_labels"

    story(tell)


def test_an_artefact_with_other_bytes_is_thrown_away(tmp_path: Path) -> None:
    """What came is checked against its name before anything opens it."""

    async def tell() -> None:
        async with running(tmp_path) as (server, _):
            server.artefacts[digest(RIVAL)] = RIVAL[:-1] + b"x"
            header, _ = await server.answer(judge("e1", [digest(RIVAL)]))
            assert header.failure.code == "agent.trainer.fetch"
            assert not list((tmp_path / "trainer" / "bundles").iterdir())
            server.artefacts[digest(RIVAL)] = RIVAL
            header, _ = await server.answer(judge("e2", [digest(RIVAL)]))
            assert header.evaluate.scores[0].correct == 20

    story(tell)


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """The candidate used longest ago goes when there is no room."""

    async def tell() -> None:
        room = max(len(RIVAL), len(CHAMPION)) + 10
        config = TrainerConfig(
            wait_s=0.2, poll_s=0.2, bundle_bytes_max=room, cache_bytes_max=room,
            child=CONFIG.child,
        )  # fmt: skip
        async with running(tmp_path, config=config) as (server, _):
            third = bundle(1.0)
            server.artefacts[digest(third)] = third
            await server.answer(judge("e1", [digest(RIVAL)]))
            await server.answer(judge("e2", [digest(third)]))
            held = [each.name for each in (tmp_path / "trainer" / "bundles").iterdir()]
            assert held == [digest(third)]

    story(tell)


def test_a_server_that_is_away_gets_the_result_when_it_is_back(tmp_path: Path) -> None:
    """UNAVAILABLE is tried again; a refusal is not."""

    async def tell() -> None:
        async with running(tmp_path) as (server, _):
            server.fail = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]
            await server.answer(train())
            server.fail = [grpc.StatusCode.INVALID_ARGUMENT]
            await server.answer(train("t2"))
            assert not server.fail

    story(tell)


def test_a_child_that_is_killed_fails_the_task_and_is_started_again(tmp_path: Path) -> None:
    """The out-of-memory killer took it: the fleet hears of it, and the next round works."""

    async def tell() -> None:
        async with running(tmp_path) as (server, trainer):
            await server.answer(train())
            assert trainer._child.pid
            os.kill(trainer._child.pid, signal.SIGSTOP)  # so that it cannot answer first
            server.tasks.append(train("t2", epochs=100))
            while not (
                trainer._child._pipes
                and trainer._child._pipes._waiting
                and not trainer._child._pipes._waiting.done()
            ):
                await asyncio.sleep(0.01)
            os.kill(trainer._child.pid, signal.SIGKILL)
            header, _ = await server.answer(train("t3"))
            assert header.WhichOneof("outcome") == "train"
            assert server.results["t2"][0].failure.code == "agent.child.died"

    story(tell)


def test_a_disabled_trainer_asks_nothing(tmp_path: Path) -> None:
    """The owner of a device may keep it out of all learning."""

    async def tell() -> None:
        config = TrainerConfig(enabled=False)
        async with running(tmp_path, config=config) as (server, _):
            await asyncio.sleep(0.05)
            assert not server.asked and not (tmp_path / "trainer").exists()

    story(tell)


@pytest.mark.parametrize(
    "wrong", [{"poll_s": 0.0}, {"wait_s": 31.0}, {"linger_s": -1.0}, {"cache_bytes_max": 1}]
)
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    """A configuration that makes no sense is refused at the start."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainerConfig(**wrong)
