"""A story over real gRPC on 127.0.0.1: a model is trained, three devices make it theirs.

Real are the trainer of the agent with its child process, the federated service, rounds,
evaluations, the training child of the server, quantization and registration. The data are
synthetic; the third device wears its sensor the other way round.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.agent.children import ChildConfig, self_test
from shoal.agent.trainer import Trainer, TrainerConfig
from shoal.proto import federated_pb2 as pb
from shoal.proto.bundle import unpack
from shoal.proto.federated_pb2_grpc import (
    FederatedServiceStub,
    add_FederatedServiceServicer_to_server,
)
from shoal.proto.model_pb2_grpc import add_ModelServiceServicer_to_server
from shoal.server.api.config import ApiConfig
from shoal.server.api.errors import ErrorInterceptor
from shoal.server.api.models import ModelServicer
from shoal.server.errors import NotFoundError
from shoal.server.federated.coordinator import Rounds, RoundsConfig
from shoal.server.federated.evaluations import Evaluations
from shoal.server.federated.leases import Leases, Peer, entitled
from shoal.server.federated.service import FederatedServicer
from shoal.server.learning.training import Training, Workshop
from shoal.server.learning.worker import Executor
from shoal.server.registry.artefacts import Artefacts
from shoal.server.registry.config import ArtefactConfig
from shoal.server.registry.models import Models
from shoal.server.store.tables import Device, Model
from tests.sims.stores import fresh_store

C, T, K = 2, 12, 3
ROUNDS: dict[str, Any] = {
    "rounds": 6, "epochs": 3, "batch_size": 16, "learning_rate": 0.1, "proximal_mu": 0.01,
    "devices_min": 3, "deadline_s": 60, "seed": 1,
}  # fmt: skip


def windows(seed: int, count: int, *, turned: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return noisy waves: the class is the frequency, seen by channel 0; turned swaps channels."""
    rng = np.random.default_rng(seed)
    y__n = rng.integers(0, K, count)
    phase__n1 = rng.uniform(0, 6.28, (count, 1))
    wave__nt = np.sin(phase__n1 + (1 + 1.5 * y__n[:, None]) * np.arange(T) * 0.7)
    noise__nct = rng.normal(0, 0.3, (count, C, T))
    noise__nct[:, 1 if turned else 0] += wave__nt * (1 if not turned else -2)
    return noise__nct.astype(np.float32), y__n


def dataset(path: Path) -> None:
    """Write what the first model may see: two people who wear the sensor as they should."""
    parts = [windows(seed, 120, turned=False) for seed in (1, 2)]
    split = np.resize(np.array([0, 0, 0, 1, 2], np.uint8), 240)
    np.savez(
        path,
        x__nct=np.concatenate([x for x, _ in parts]),
        y__n=np.concatenate([y for _, y in parts]),
        split__n=split,
        group__n=np.repeat([1, 2], 120),
        channels=np.array(json.dumps(["a", "b"])),
        classes=np.array(json.dumps(["slow", "fast", "faster"])),
    )


class Labelled:
    """The labelled windows of one device."""

    def __init__(self, seed: int, *, turned: bool) -> None:
        self._parts = {s: windows(100 * seed + s, 90, turned=turned) for s in range(3)}

    def count(self, split: int) -> int:
        """Return how many there are."""
        return len(self._parts[split][1])

    def windows(self, split: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return them."""
        return self._parts[split]


async def peer_of(context: grpc.aio.ServicerContext) -> Peer:
    """Return who calls: here the metadata says it, in production the certificate."""
    number = int(dict(context.invocation_metadata())["device"])
    return Peer(number, f"wrist-{number:02d}")


class Nothing:
    """Approval metadata, which this story does not need."""

    def metadata(self, name: str) -> bytes:
        """Refuse."""
        raise NotFoundError(name)


class System:
    """A server with its loops, and devices."""

    def __init__(self, root: Path) -> None:
        clock = lambda: round(time.time() * 1000)  # noqa: E731
        self.root = root
        self.store = fresh_store(root / "fleet.db")
        with self.store.begin() as session:
            session.add_all(Device(id=i, name=f"wrist-{i:02d}", created_ms=0) for i in range(1, 4))
        self.trainers: dict[str, Trainer] = {}
        self.artefacts = Artefacts(
            root / "artefacts", self.store, clock=clock, config=ArtefactConfig()
        )
        self.models = Models(self.store, self.artefacts, clock=clock)
        self.leases = Leases(self.store, root / "federated", clock=clock)
        executor = Executor()
        self.training = Training(self.store, self.artefacts, self.models, executor, clock=clock)
        self.rounds = Rounds(
            self.store, self.artefacts, self.leases,
            Workshop(self.artefacts, self.models, executor),
            clock=clock, nudge=self.nudge, config=RoundsConfig(gather_s=30, nudge_s=0.5),
        )  # fmt: skip
        self.evaluations = Evaluations(self.store, self.leases, clock=clock, nudge=self.nudge)
        self.downloads = ModelServicer(
            self.store, self.artefacts, Nothing(), peer=peer_of, entitled=entitled, clock=clock,
            config=ApiConfig(),
        )  # fmt: skip
        self.service = FederatedServicer(self.leases, peer=peer_of, clock=clock)

    def nudge(self, name: str, what: str) -> None:
        """Tell a device; called from threads."""
        assert what == "tasks"
        if name in self.trainers:
            self.loop.call_soon_threadsafe(self.trainers[name].nudge)

    async def __aenter__(self) -> System:
        self.loop = asyncio.get_running_loop()
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor(retry_after_ms=100)])
        add_FederatedServiceServicer_to_server(self.service, self.server)
        add_ModelServiceServicer_to_server(self.downloads, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.loops = [
            asyncio.create_task(each.run())
            for each in (self.training, self.rounds, self.evaluations)
        ]
        self.channels: list[grpc.aio.Channel] = []
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.loops:
            task.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)
        for channel in self.channels:
            await channel.close()
        await self.server.stop(None)
        self.store.close()

    def channel(self, number: int) -> grpc.aio.Channel:
        """Return a channel that says which device it is."""
        found = grpc.aio.insecure_channel(
            f"127.0.0.1:{self.port}", interceptors=metadata_of(number)
        )
        self.channels.append(found)
        return found

    def start_device(self, number: int, bundle: bytes, sha256: str) -> None:
        """Let a device run a bundle and its trainer."""
        home = self.root / f"wrist-{number:02d}"
        home.mkdir()
        (home / "active.shoal").write_bytes(bundle)
        channel = self.channel(number)
        trainer = Trainer(
            home / "trainer",
            channel=lambda: channel,
            labelled=Labelled(number, turned=number == 3),
            active=lambda: (home / "active.shoal", sha256),
            config=TrainerConfig(poll_s=30, child=ChildConfig(memory_bytes_max=1 << 30)),
        )
        self.trainers[f"wrist-{number:02d}"] = trainer
        self.loops.append(asyncio.create_task(trainer.run()))


def metadata_of(number: int) -> list[Any]:
    """Return interceptors that add the device's number to every call."""

    def named(details: Any) -> Any:
        return details._replace(metadata=grpc.aio.Metadata(("device", str(number))))

    class Unary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
        async def intercept_unary_unary(self, go: Any, details: Any, request: Any) -> Any:
            return await go(named(details), request)

    class Download(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
        async def intercept_unary_stream(self, go: Any, details: Any, request: Any) -> Any:
            return await go(named(details), request)

    class Upload(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
        async def intercept_stream_unary(self, go: Any, details: Any, requests: Any) -> Any:
            return await go(named(details), requests)

    return [Unary(), Download(), Upload()]


async def until(get: Any, key: str, states: tuple[str, ...]) -> dict[str, Any]:
    """Wait for a run to be in one of the states."""
    async with asyncio.timeout(200):
        while True:
            found: dict[str, Any] = await get(key)
            if found["state"] in states:
                return found
            await asyncio.sleep(0.05)


@pytest.mark.story
def test_three_devices_make_a_better_model(tmp_path: Path) -> None:
    """Train, three devices learn, the candidate beats the champion on what they hold out."""

    async def tell() -> None:
        async with System(tmp_path) as system:
            dataset(tmp_path / "data.npz")
            data = system.artefacts.put((tmp_path / "data.npz").read_bytes(), "dataset")
            run_id = await system.training.start(
                name="wave", dataset_sha256=data, epochs=15, seed=3, note="first"
            )
            trained = await until(system.training.get, run_id, ("done", "failed"))
            assert trained["state"] == "done", trained["reason"]
            assert trained["progress"]["epoch"] == 15
            assert trained["progress"]["accuracy_int8"] > 0.8
            champion = trained["model_sha256"]
            bundle = system.artefacts.read(champion, bytes_max=1 << 20)
            for number in (1, 2, 3):
                system.start_device(number, bundle, champion)

            rounds = await system.rounds.start(bundle_sha256=champion, **ROUNDS)
            found = await until(system.rounds.get, rounds, ("done", "failed"))
            assert found["state"] == "done", found["reason"]
            assert [entry["devices"] for entry in found["history"]] == [3] * 6
            assert found["history"][-1]["loss_last"] < found["history"][0]["loss_first"]
            candidate = found["candidate_sha256"]

            row = system.models.get(candidate)
            assert (row.name, row.version, row.parent_sha256) == ("wave", 2, champion)
            data_ = system.artefacts.read(candidate, bytes_max=1 << 20)
            made = unpack(data_)
            assert made.manifest.facts["rounds"] == rounds
            (tmp_path / "candidate.shoal").write_bytes(data_)
            assert (await self_test(tmp_path / "candidate.shoal", candidate))["golden"] == 16

            evaluation = await system.evaluations.start(
                bundle_sha256=[champion, candidate], split="test"
            )
            scores = await until(system.evaluations.get, evaluation, ("done", "failed"))
            assert scores["devices"] == ["wrist-01", "wrist-02", "wrist-03"]
            before, after = (each["accuracy"] for each in scores["bundles"])
            assert after > before + 0.1
            third = {
                each["bundle_sha256"]: each["correct"]
                for each in scores["scores"]
                if each["device"] == "wrist-03"
            }
            assert third[candidate] > third[champion], "the turned sensor is understood now"

    asyncio.run(tell())


def test_hostile_messages_are_refused(tmp_path: Path) -> None:
    """Wrong order, oversize, another device's task, another outcome: nothing is taken."""

    async def tell() -> None:
        async with System(tmp_path) as system:
            with system.store.begin() as session:
                session.add(
                    Model(
                        name="m", version=1, sha256="b" * 64, size=1, created_ms=0,
                        manifest={}, profile={},
                    )
                )  # fmt: skip
            await system.evaluations.start(bundle_sha256=["b" * 64], split="test")
            stub = FederatedServiceStub(system.channel(1))
            task = (await stub.GetTask(pb.GetTaskRequest(wait_ms=0))).task
            assert list(task.evaluate.bundle_sha256) == ["b" * 64]
            assert task.evaluate.split == pb.SPLIT_TEST and task.expires_in_ms > 0
            head = pb.ResultHeader(task_id=task.task_id)

            async def send(*parts: pb.SubmitResultRequest, number: int = 1) -> str:
                stub = FederatedServiceStub(system.channel(number))
                try:
                    await stub.SubmitResult(iter(parts))
                except grpc.aio.AioRpcError as exc:
                    return str(exc.details())
                return "taken"

            header = pb.SubmitResultRequest(header=head)
            chunk = pb.SubmitResultRequest(chunk=b"x")
            assert "begins with its header" in await send()
            assert "begins with its header" in await send(chunk, header)
            assert "there is no task" in await send(header, number=2)
            unknown = pb.SubmitResultRequest(header=pb.ResultHeader(task_id="0" * 32))
            assert "there is no task" in await send(unknown)
            head.train.CopyFrom(pb.TrainResult(windows=1))
            other = pb.SubmitResultRequest(header=head)
            assert "did not ask for" in await send(other)
            again = (await stub.GetTask(pb.GetTaskRequest(wait_ms=0))).task
            assert again.task_id == task.task_id, "the task is still open"

    asyncio.run(tell())
