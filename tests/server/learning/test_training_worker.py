"""Stories and faults of training runs: real child processes, a real database, crashes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.proto.bundle import unpack
from shoal.proto.errors import ContractError
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.errors import InvalidError, NotFoundError
from shoal.server.learning.config import ProfileConfig
from shoal.server.learning.dataset import npz
from shoal.server.learning.training import Training, TrainingConfig, Workshop
from shoal.server.learning.worker import (
    Executor,
    ExecutorConfig,
    JobDiedError,
    JobFailedError,
)
from shoal.server.registry.artefacts import Artefacts
from shoal.server.registry.config import ArtefactConfig
from shoal.server.registry.models import Models
from shoal.server.store.tables import TrainingRun
from tests.sims.stores import fresh_store

N = 80


def dataset(**more: Any) -> bytes:
    """Return a small data set, with more arrays than there must be."""
    rng = np.random.default_rng(0)
    y__n = rng.integers(0, 2, N)
    x__nct = rng.normal(size=(N, 1, 8)) + y__n[:, None, None] * np.sin(np.arange(8))
    return npz(
        {
            "x__nct": x__nct.astype(np.float32),
            "y__n": y__n,
            "split__n": np.resize(np.array([0, 0, 0, 1], np.uint8), N),
            "group__n": np.repeat([1, 2], N // 2),
            "channels": np.array('["a"]'),
            "classes": np.array('["k", "l"]'),
            **more,
        }
    )


class System:
    """Training over a database."""

    def __init__(self, root: Path) -> None:
        self.store = fresh_store(root / "fleet.db")
        clock = lambda: 1_000  # noqa: E731
        self.artefacts = Artefacts(root / "a", self.store, clock=clock, config=ArtefactConfig())
        self.models = Models(self.store, self.artefacts, clock=clock)
        self.executor: Any = Executor()
        self.clock = clock

    def training(self, *, profile: ProfileConfig | None = None, **config: Any) -> Training:
        """Return a fresh component, as after a restart."""
        return Training(
            self.store, self.artefacts, self.models, self.executor, clock=self.clock,
            config=TrainingConfig(progress_s=0.0, **config), profile=profile,
        )  # fmt: skip

    def row(self, run_id: str) -> TrainingRun:
        """Return what the database says."""
        with self.store.read() as session:
            return session.get_one(TrainingRun, run_id)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A server's learning part."""
    found = System(tmp_path)
    yield found
    found.store.close()


async def ended(training: Training, run_id: str) -> dict[str, Any]:
    """Run the component until a run is over."""
    loop = asyncio.create_task(training.run())
    try:
        async with asyncio.timeout(120):
            while (found := await training.get(run_id))["state"] not in ("done", "failed"):
                assert not loop.done(), loop
                await asyncio.sleep(0.02)
            return found
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


class Fake:
    """An executor that does what a test says."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.jobs = list(answers), 0

    async def run(self, job: str, arguments: dict[str, Any], *, told: Any = None) -> Any:
        """Raise or hang."""
        self.jobs += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        told({"epoch": 1, "epochs": 9, "loss": 0.5})
        await asyncio.Event().wait()


def test_a_run_registers_its_model_and_a_candidate_follows(system: System) -> None:
    """In a real child process; the candidate has the parameters it was given."""

    async def tell() -> None:
        data = system.artefacts.put(dataset(), "dataset")
        training = system.training()
        run_id = await training.start(name="m", dataset_sha256=data, epochs=2, seed=5, note="hi")
        found = await ended(training, run_id)
        assert found["state"] == "done", found["reason"]
        progress = found["progress"]
        assert progress["epoch"] == progress["epochs"] == 2 and progress["loss"] > 0
        assert 0 <= progress["accuracy_int8"] <= 1 and progress["attempts"] == 1
        base = system.models.get(found["model_sha256"])
        assert (base.name, base.version, base.note) == ("m", 1, "hi")
        assert base.manifest["facts"] == {"seed": "5"}

        workshop = Workshop(system.artefacts, system.models, system.executor)
        vector = await workshop.initial(base.sha256)
        changed = (np.frombuffer(vector, "<f4") * 2).astype("<f4").tobytes()
        facts = {"rounds": "r1"}
        sha256 = await workshop.candidate(base.sha256, changed, facts=facts)
        assert await workshop.initial(sha256) == changed
        assert await workshop.candidate(base.sha256, changed, facts=facts) == sha256
        row = system.models.get(sha256)
        assert (row.version, row.parent_sha256) == (2, base.sha256)
        with pytest.raises(JobFailedError, match="not the parameters"):
            await workshop.candidate(base.sha256, changed[:-4], facts=facts)

    asyncio.run(tell())


def test_a_bad_data_set_fails_the_run_with_its_reason(system: System) -> None:
    """The next run works: the queue goes on."""

    async def tell() -> None:
        training = system.training()
        bad = system.artefacts.put(b"not an npz", "dataset")
        run_id = await training.start(name="m", dataset_sha256=bad)
        found = await ended(training, run_id)
        assert found["state"] == "failed" and found["model_sha256"] == ""
        assert found["reason"].startswith("the data set cannot be read")

    asyncio.run(tell())


def test_a_bad_kind_fails_the_run_with_what_to_do(system: System) -> None:
    """The reason is all that an operator sees of a child process."""

    async def tell() -> None:
        training = system.training()
        data = system.artefacts.put(dataset(kinds=np.array('["category"]')), "dataset")
        run_id = await training.start(name="m", dataset_sha256=data)
        found = await ended(training, run_id)
        assert found["state"] == "failed"
        assert "channel a is of kind category and holds" in found["reason"]
        assert "number the categories from 0 on" in found["reason"]

    asyncio.run(tell())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"x__nct": np.zeros((N, 1025, 1), np.float32),
             "channels": np.array(json.dumps([f"c{i}" for i in range(1025)]))},
            "the data set has 1025 channels, a model at most 1024: "
            "leave out channels, or train several models",
        ),
        (
            {"x__nct": np.random.default_rng(0).normal(size=(600, 1, 8)).astype(np.float32),
             "y__n": np.arange(600) % 2, "group__n": np.arange(600) // 2,
             "split__n": np.arange(600).astype(np.uint8) % 2},
            "300 groups are more than the 256 of a reference profile: "
            "number fewer and larger groups, e.g. sites in place of machines",
        ),
        (
            {"x__nct": np.random.default_rng(0).normal(size=(512, 48, 12)).astype(np.float32),
             "y__n": np.arange(512) % 2, "group__n": np.arange(512) // 2,
             "split__n": np.arange(512).astype(np.uint8) % 2,
             "channels": np.array(json.dumps([f"c{i}" for i in range(48)]))},
            "the reference profile of 48 channels in 256 bins and 256 groups "
            "takes",
        ),
    ],
    ids=["channels", "groups", "bytes"],
)  # fmt: skip
def test_a_model_too_large_for_its_profile_is_refused_before_it_is_trained(
    system: System, more: dict[str, Any], said: str
) -> None:
    """The reason says what to do, and not one epoch was spent on it."""

    async def tell() -> None:
        training = system.training(profile=ProfileConfig(bins=256))
        data = system.artefacts.put(dataset(**more), "dataset")
        run_id = await training.start(name="m", dataset_sha256=data, epochs=100)
        found = await ended(training, run_id)
        assert found["state"] == "failed" and said in found["reason"]
        assert found["progress"] == {"attempts": 1}

    asyncio.run(tell())


def test_a_run_and_a_candidate_have_the_profile_that_is_configured(system: System) -> None:
    """In real child processes: fewer bins, nothing projected."""

    async def tell() -> None:
        profile = ProfileConfig(bins=4, projected=0)
        training = system.training(profile=profile)
        data = system.artefacts.put(dataset(), "dataset")
        run_id = await training.start(name="m", dataset_sha256=data, epochs=1)
        base = (await ended(training, run_id))["model_sha256"]
        workshop = Workshop(system.artefacts, system.models, system.executor, profile=profile)
        candidate = await workshop.candidate(base, await workshop.initial(base), facts={})
        for sha256 in (base, candidate):
            bundle = unpack(system.artefacts.path(sha256).read_bytes())
            found = ReferenceProfile.from_json(bundle.parts["profile.json"])
            assert [len(each.counts) for each in found.features] == [4, 4]
            assert found.projection is None

    asyncio.run(tell())


@pytest.mark.parametrize("wrong", [{"bins": 1}, {"bins": 257}, {"projected": -1}])
def test_a_profile_that_no_device_reads_is_not_configured(wrong: dict[str, int]) -> None:
    """The server does not start with it."""
    with pytest.raises(ValueError, match="must be"):
        ProfileConfig(**wrong)


def test_requests_that_make_no_sense_start_nothing(system: System) -> None:
    """Unknown artefact, name, epochs, seed, note: refused before anything is queued."""

    async def tell() -> None:
        training, data = system.training(), system.artefacts.put(b"x", "dataset")
        for wrong, error in (
            ({"dataset_sha256": "0" * 64}, NotFoundError),
            ({"name": "No Name"}, ContractError),
            ({"epochs": -1}, InvalidError),
            ({"epochs": 10_001}, InvalidError),
            ({"seed": -1}, InvalidError),
            ({"note": "x" * 501}, InvalidError),
        ):
            arguments: dict[str, Any] = {"name": "m", "dataset_sha256": data, **wrong}
            with pytest.raises(error):
                await training.start(**arguments)
        with pytest.raises(NotFoundError):
            await training.get("none")
        workshop = Workshop(system.artefacts, system.models, system.executor)
        with pytest.raises(NotFoundError):
            await workshop.initial("0" * 64)

    asyncio.run(tell())


def test_a_run_that_the_server_died_with_is_queued_again(system: System) -> None:
    """Progress is stored; after a restart the run is done from the start, a bounded often."""

    async def tell() -> None:
        data = system.artefacts.put(b"x", "dataset")
        system.executor = Fake()
        first = system.training()
        run_id = await first.start(name="m", dataset_sha256=data)
        for attempt in (1, 2):
            loop = asyncio.create_task(system.training(attempts_max=2).run())
            want = {"attempts": attempt, "epoch": 1, "epochs": 9, "loss": 0.5}
            async with asyncio.timeout(60):
                while system.row(run_id).progress != want:
                    await asyncio.sleep(0.01)
            loop.cancel()  # as if the server died: nothing is tidied up
            await asyncio.gather(loop, return_exceptions=True)
            assert system.row(run_id).state == "running"
        found = await ended(system.training(attempts_max=2), run_id)
        assert found["state"] == "failed" and "the server died" in found["reason"]
        assert system.executor.jobs == 2

    asyncio.run(tell())


def test_a_process_that_dies_is_tried_again_a_job_that_fails_is_not(system: System) -> None:
    """Three deaths end the run; one refusal does."""

    async def tell() -> None:
        data = system.artefacts.put(b"x", "dataset")
        for answers, jobs in (
            ([JobDiedError("died")] * 9, 3),
            ([JobDiedError("died"), JobFailedError("no")], 2),
        ):
            system.executor = Fake(*answers)
            training = system.training(attempts_max=3)
            run_id = await training.start(name="m", dataset_sha256=data)
            found = await ended(training, run_id)
            assert found["state"] == "failed" and found["reason"] == str(answers[jobs - 1])
            assert system.executor.jobs == jobs

    asyncio.run(tell())


def children() -> set[int]:
    """Return the live child processes of this one."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def test_a_killed_or_endless_job_is_an_error_and_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL, the wall limit and cancellation: typed, and nothing goes on running."""
    (tmp_path / "data.npz").write_bytes(dataset())
    job = {
        "dataset": str(tmp_path / "data.npz"), "name": "m", "epochs": 10_000, "seed": 0,
        "profile": {}, "out": str(tmp_path),
    }  # fmt: skip

    async def tell() -> None:
        before = children()
        executor, started = Executor(), asyncio.Event()
        running = asyncio.create_task(
            executor.run("train", job, told=lambda progress: started.set())
        )
        await started.wait()
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(JobDiedError, match="died with status"):
            await running
        with pytest.raises(JobDiedError, match="was killed"):
            await Executor(config=ExecutorConfig(wall_s_max=0.2)).run("train", job)
        started.clear()
        running = asyncio.create_task(
            executor.run("train", job, told=lambda progress: started.set())
        )
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert children() == before

    asyncio.run(tell())
