"""Stories and faults of rounds and evaluations, with simulated devices and no network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.server.errors import InvalidError, NotFoundError, StoreError
from shoal.server.federated import rules
from shoal.server.federated.coordinator import Rounds, RoundsConfig
from shoal.server.federated.errors import DeltaError, IllegalEventError, RoundClosedError
from shoal.server.federated.evaluations import Evaluations
from shoal.server.federated.fold import Fold, FoldConfig
from shoal.server.federated.leases import EvaluateWork, Lease, Leases, Peer, TrainWork, entitled
from shoal.server.registry.artefacts import Artefacts
from shoal.server.registry.config import ArtefactConfig
from shoal.server.store.engine import Store
from shoal.server.store.tables import Artefact, Audit, Device, Model, RoundsRun, Task
from tests.sims.stores import fresh_store, fresh_url

SIZE = 5
BASE = "b" * 64
START = np.linspace(-1, 1, SIZE).astype(np.float32)
RUN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 0.1,
    "deadline_s": 30,
    "seed": 7,
}


class Crash(BaseException):
    """The server dies here."""


class DyingStore(Store):
    """A database whose server dies at the n-th transaction, before or after its commit."""

    dies_at = 0
    after = False
    count = 0

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """Yield a transaction, and die as told."""
        self.count += 1
        dies = self.count == self.dies_at
        with super().begin() as session:
            yield session
            if dies and not self.after:
                raise Crash
        if dies:
            raise Crash


@dataclass
class FakeWorkshop:
    """Says what the parameters of the base are, and registers nothing."""

    built: list[tuple[str, bytes]] = field(default_factory=list)

    async def initial(self, bundle_sha256: str) -> bytes:
        """Return the start."""
        return START.astype("<f4").tobytes()

    async def candidate(self, base_sha256: str, parameters: bytes, *, facts: dict[str, str]) -> str:
        """Name a candidate by its parameters."""
        self.built.append((base_sha256, parameters))
        return hashlib.sha256(parameters).hexdigest()


class Fleet:
    """A server's federated part over a database, and devices that talk to it directly."""

    def __init__(self, root: Path, *, devices: int = 3, store: Store | None = None) -> None:
        self.root, self.now_ms = root, 1_000_000
        self.store = store or fresh_store(root / "fleet.db")
        self.peers = [Peer(i + 1, f"wrist-{i + 1:02d}") for i in range(devices)]
        with self.store.read() as session:
            fresh = session.scalars(select(Device)).first() is None
        if fresh:
            with self.store.begin() as session:
                session.add_all(
                    Device(id=peer.id, name=peer.name, created_ms=0) for peer in self.peers
                )
                for sha256, version in ((BASE, 1), ("c" * 64, 2)):
                    session.add(
                        Model(
                            name="m", version=version, sha256=sha256, size=1, created_ms=0,
                            manifest={}, profile={},
                        )
                    )  # fmt: skip
        self.nudged: list[str] = []
        self.workshop = FakeWorkshop()
        self.boot()

    def boot(self) -> None:
        """Start the server's objects anew on what is on disk."""
        clock = lambda: self.now_ms  # noqa: E731
        nudge = lambda name, what: self.nudged.append(name)  # noqa: E731
        self.artefacts = Artefacts(
            self.root / "artefacts", self.store, clock=clock, config=ArtefactConfig()
        )
        self.leases = Leases(
            self.store, self.root / "federated", clock=clock,
            monotonic=lambda: self.now_ms / 1000,
        )  # fmt: skip
        self.rounds = Rounds(
            self.store, self.artefacts, self.leases, self.workshop, clock=clock, nudge=nudge,
            config=RoundsConfig(gather_s=5, voids_max=2),
        )  # fmt: skip
        self.evaluations = Evaluations(self.store, self.leases, clock=clock, nudge=nudge)

    async def ask(self, peer: Peer, *, labelled: int = 10, bundle: str = BASE) -> Lease | None:
        """Let a device ask for a task."""
        return await self.leases.next(peer, wait_ms=0, bundle_sha256=bundle, labelled=labelled)

    def delta(self, peer: Peer, work: TrainWork) -> NDArray[np.float32]:
        """Return what a device learns: a pull towards its own mark, and its seed's noise."""
        data = self.artefacts.read(work.parameters_sha256, bytes_max=1000)
        now = np.frombuffer(data, "<f4")
        noise = np.random.default_rng(work.seed).normal(0, 0.01, SIZE)
        return (0.5 * (peer.id - now) + noise).astype(np.float32)

    async def send(
        self, peer: Peer, lease: Lease, *, delta: NDArray[Any] | None = None, windows: int = 0,
        sha256: str = "", loss: float = 1.0,
    ) -> bool:  # fmt: skip
        """Hand in a training result."""
        assert isinstance(lease.work, TrainWork)
        sent = self.delta(peer, lease.work) if delta is None else delta
        upload = self.leases.uploads / f"up-{peer.id}"
        upload.write_bytes(sent.tobytes())
        result = {
            "windows": windows or 10 * peer.id, "loss_first": loss, "loss_last": loss / 2,
            "train_ms": 3,
        }  # fmt: skip
        digest = sha256 or hashlib.sha256(sent.tobytes()).hexdigest()
        return await self.leases.report_train(
            peer, lease, result=result, sha256=digest, upload=upload
        )

    async def turn(self, run_id: str) -> dict[str, Any]:
        """Let the server and then every device do what they can."""
        for peer in self.peers:
            if lease := await self.ask(peer):
                await self.send(peer, lease)
        await self.rounds.advance(run_id)
        return await self.rounds.get(run_id)

    async def finish(self, run_id: str) -> dict[str, Any]:
        """Go on until the run is over."""
        for _ in range(50):
            found = await self.turn(run_id)
            if found["state"] in ("done", "failed"):
                return found
        raise AssertionError("the run does not end")

    def parameters(self, run_id: str) -> NDArray[np.float32]:
        """Return the newest parameters of a run."""
        with self.store.read() as session:
            sha256 = session.get_one(RoundsRun, run_id).parameters_sha256
        return np.frombuffer(self.artefacts.read(sha256, bytes_max=1000), "<f4")


Story = Callable[[Fleet], Any]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A server with three devices."""
    found = Fleet(tmp_path)
    yield found
    found.store.close()


def test_three_rounds_are_the_weighted_means(fleet: Fleet) -> None:
    """The parameters are those that plain numpy computes, and the candidate is made of them."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=3, devices_min=3, **RUN)
        want, weights = START.astype(np.float64), np.array([10, 20, 30])
        for number in range(3):
            for peer in fleet.peers:
                assert await fleet.ask(peer) is None
            await fleet.rounds.advance(run_id)
            leases = [await fleet.ask(peer) for peer in fleet.peers]
            works = [lease.work for lease in leases if lease]
            assert all(isinstance(work, TrainWork) for work in works) and len(works) == 3
            assert len({work.seed for work in works if isinstance(work, TrainWork)}) == 3
            deltas = []
            for peer, lease in zip(fleet.peers, leases, strict=True):
                assert lease is not None and isinstance(lease.work, TrainWork)
                deltas.append(fleet.delta(peer, lease.work))
                assert await fleet.send(peer, lease, delta=deltas[-1])
            want = want + np.average(deltas, axis=0, weights=weights)
            await fleet.rounds.advance(run_id)
            assert (await fleet.rounds.get(run_id))["round"] == number + 1
            np.testing.assert_allclose(fleet.parameters(run_id), want, rtol=1e-6)
        found = await fleet.finish(run_id)
        assert found["state"] == "done" and found["reason"] == ""
        parameters = fleet.parameters(run_id).tobytes()
        assert fleet.workshop.built == [(BASE, parameters)]
        assert found["candidate_sha256"] == hashlib.sha256(parameters).hexdigest()
        assert [entry["round"] for entry in found["history"]] == [1, 2, 3]
        entry = found["history"][0]
        assert (entry["devices"], entry["windows"], entry["void"]) == (3, 60, False)
        assert entry["loss_first"] == 1.0 and entry["loss_last"] == 0.5

    asyncio.run(story())
    with fleet.store.read() as session:
        kinds = session.scalars(select(Artefact.kind)).all()
        actions = session.scalars(select(Audit.action)).all()
    assert kinds == ["parameters"], "old parameters are deleted"
    assert not list((fleet.root / "federated" / "deltas").iterdir()), "folded deltas too"
    assert {"rounds.started", "rounds.finished"} <= set(actions)


def test_server_momentum_carries_over(fleet: Fleet) -> None:
    """With m = 0.9 m + mean and p = p + m: what a client of constant delta must see."""

    async def story() -> None:
        run_id = await fleet.rounds.start(
            bundle_sha256=BASE, rounds=3, server_momentum=0.9, devices_min=3, **RUN
        )
        for _ in range(3):
            for peer in fleet.peers:
                await fleet.ask(peer)
            await fleet.rounds.advance(run_id)
            for peer in fleet.peers:
                lease = await fleet.ask(peer)
                assert lease
                await fleet.send(peer, lease, delta=np.ones(SIZE, np.float32))
            await fleet.rounds.advance(run_id)
        moved = 1 + (0.9 + 1) + (0.81 + 0.9 + 1)
        np.testing.assert_allclose(fleet.parameters(run_id), START + moved, rtol=1e-5)

    asyncio.run(story())


@pytest.mark.parametrize("after", [False, True], ids=["before commit", "after commit"])
def test_a_crash_at_any_transaction_changes_nothing(tmp_path: Path, after: bool) -> None:
    """Whenever the server dies, the run ends with the same parameters, to the bit."""

    async def story(root: Path, dies_at: int) -> tuple[bytes, int, int]:
        store = DyingStore(fresh_url(root / "fleet.db"))
        fleet, crashes = Fleet(root, store=store), 0
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=2, devices_min=3, **RUN)
        with store.begin() as session:  # run ids are random, and so would be nothing else
            assert session.get(RoundsRun, run_id)
        store.count, store.dies_at, store.after = 0, dies_at, after
        for _ in range(30):
            try:
                found = await fleet.turn(run_id)
            except Crash:
                crashes += 1
                fleet.boot()
                continue
            if found["state"] == "done":
                break
        store.close()
        assert found["state"] == "done" and found["round"] == 2
        assert [each["devices"] for each in found["history"]] == [3, 3]
        return fleet.parameters(run_id).tobytes(), crashes, store.count

    roots = iter(tmp_path / str(i) for i in range(1000))

    def run(dies_at: int) -> tuple[bytes, int, int]:
        root = next(roots)
        root.mkdir()
        return asyncio.run(story(root, dies_at))

    want, crashes, total = run(0)
    assert crashes == 0 and total > 10
    for dies_at in range(1, total + 1):
        got, crashes, _ = run(dies_at)
        assert got == want and crashes == 1, f"dying at transaction {dies_at} of {total}"


def test_a_mute_device_costs_one_deadline(fleet: Fleet) -> None:
    """Who lets a lease expire is not waited for in the next round; it may come back."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=3, devices_min=2, **RUN)
        good, mute = fleet.peers[:2], fleet.peers[2]
        for peer in fleet.peers:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        late = await fleet.ask(mute)
        assert late
        for peer in good:
            lease = await fleet.ask(peer)
            assert lease
            await fleet.send(peer, lease)
        await fleet.rounds.advance(run_id)
        assert (await fleet.rounds.get(run_id))["round"] == 0, "it is waited for"
        fleet.now_ms += 30_000
        await fleet.rounds.advance(run_id)
        first = (await fleet.rounds.get(run_id))["history"][0]
        assert (first["devices"], first["expired"]) == (2, 1)
        with pytest.raises(RoundClosedError):
            await fleet.send(mute, late, delta=np.ones(SIZE, np.float32))
        for peer in good:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        for peer in good:
            lease = await fleet.ask(peer)
            assert lease
            await fleet.send(peer, lease)
        await fleet.rounds.advance(run_id)
        second = (await fleet.rounds.get(run_id))["history"][1]
        assert (second["devices"], second["expired"]) == (2, 0)
        for peer in fleet.peers:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        found = await fleet.finish(run_id)
        assert found["history"][2]["devices"] == 3

    asyncio.run(story())


def test_a_late_comer_joins_the_open_round(fleet: Fleet) -> None:
    """A device that asks while the round is open gets a lease with the round's deadline."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=2, **RUN)
        await fleet.ask(fleet.peers[0])
        await fleet.ask(fleet.peers[1])
        await fleet.rounds.advance(run_id)
        assert await fleet.ask(fleet.peers[0]) is None, "the third may still come"
        assert fleet.nudged == [peer.name for peer in fleet.peers]
        fleet.now_ms += 5000
        await fleet.rounds.advance(run_id)
        leases = [await fleet.ask(peer) for peer in fleet.peers]
        assert leases[0] and leases[1] and leases[2] is None
        fleet.now_ms += 1000
        await fleet.rounds.advance(run_id)
        joined = await fleet.ask(fleet.peers[2])
        assert joined and joined.deadline_ms == leases[0].deadline_ms

    asyncio.run(story())


def test_too_few_results_void_a_round_and_end_the_run(fleet: Fleet) -> None:
    """Two void rounds in a row fail the run with a reason; the parameters stay."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=9, devices_min=3, **RUN)
        await fleet.ask(fleet.peers[0])
        for _ in range(4):
            await fleet.rounds.advance(run_id)
            fleet.now_ms += 31_000
        found = await fleet.rounds.get(run_id)
        assert found["state"] == "failed" and "2 rounds in a row" in found["reason"]
        assert [each["void"] for each in found["history"]] == [True, True]
        assert fleet.parameters(run_id).tolist() == START.tolist()

    asyncio.run(story())


def test_a_run_that_learned_nothing_makes_no_candidate(fleet: Fleet) -> None:
    """Also if it has fewer rounds than may be void in a row."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=2, **RUN)
        await fleet.ask(fleet.peers[0])
        for _ in range(3):
            await fleet.rounds.advance(run_id)
            fleet.now_ms += 31_000
        found = await fleet.rounds.get(run_id)
        assert found["state"] == "failed" and "nothing was learned" in found["reason"]
        assert found["candidate_sha256"] == ""

    asyncio.run(story())


def test_devices_without_labels_or_with_another_bundle_are_not_asked(fleet: Fleet) -> None:
    """Only who runs the bundle and holds labelled windows takes part."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=1, **RUN)
        first, second, third = fleet.peers
        await fleet.ask(first)
        await fleet.ask(second, labelled=0)
        await fleet.ask(third, bundle="d" * 64)
        fleet.now_ms += 5000
        await fleet.rounds.advance(run_id)
        fleet.now_ms += 5000
        await fleet.rounds.advance(run_id)
        assert await fleet.ask(first)
        assert await fleet.ask(second, labelled=0) is None
        assert await fleet.ask(third, bundle="d" * 64) is None

    asyncio.run(story())


def test_a_repeated_result_is_acknowledged_once(fleet: Fleet) -> None:
    """The reply was lost and the device sends again: nothing is folded twice."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=3, **RUN)
        for peer in fleet.peers:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        peer = fleet.peers[0]
        lease = await fleet.ask(peer)
        assert lease
        assert await fleet.send(peer, lease)
        assert not await fleet.send(peer, lease, delta=np.full(SIZE, 9, np.float32))
        assert await fleet.leases.lease(peer, lease.task_id) is None
        with pytest.raises(NotFoundError):
            await fleet.leases.lease(fleet.peers[1], lease.task_id)
        for other in fleet.peers[1:]:
            theirs = await fleet.ask(other)
            assert theirs
            await fleet.send(other, theirs, delta=np.zeros(SIZE, np.float32), windows=10)
        with fleet.store.read() as session:
            task = session.get_one(Task, lease.task_id)
            assert task.result["norm"] < 5
        await fleet.rounds.advance(run_id)
        moved = fleet.parameters(run_id) - START
        assert np.abs(moved).max() < 1

    asyncio.run(story())


ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"delta": np.full(SIZE, np.nan, np.float32)}, "NaN"),
    "huge": ({"delta": np.full(SIZE, 1e6, np.float32)}, "norm"),
    "short": ({"delta": np.zeros(SIZE - 1, np.float32)}, "16 bytes"),
    "long": ({"delta": np.zeros(SIZE + 1, np.float32)}, "24 bytes"),
    "other bytes": ({"sha256": "0" * 64}, "does not hash"),
    "windows": ({"windows": 1 << 31}, "windows"),
    "loss": ({"loss": float("nan")}, "loss"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attacker_is_refused_and_the_round_goes_on(fleet: Fleet, name: str) -> None:
    """A bad result fails its task alone: the mean is the honest devices' (fault 75)."""
    how, said = ATTACKS[name]

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=2, **RUN)
        for peer in fleet.peers:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        evil = fleet.peers[0]
        lease = await fleet.ask(evil)
        assert lease
        with pytest.raises(DeltaError, match=said):
            await fleet.send(evil, lease, **how)
        assert await fleet.ask(evil) is None, "the task is not offered again"
        for peer in fleet.peers[1:]:
            theirs = await fleet.ask(peer)
            assert theirs
            await fleet.send(peer, theirs, delta=np.full(SIZE, peer.id, np.float32))
        await fleet.rounds.advance(run_id)
        found = await fleet.rounds.get(run_id)
        entry = found["history"][0]
        assert (entry["devices"], entry["failed"]) == (2, 1)
        assert entry["failures"] == {"server.federated.delta": 1}
        mean = (2 * 20 + 3 * 30) / 50
        np.testing.assert_allclose(fleet.parameters(run_id), START + mean, rtol=1e-6)

    asyncio.run(story())


def test_sign_flippers_move_a_clipped_mean_by_a_bounded_amount(tmp_path: Path) -> None:
    """3 of 10 devices send the opposite, 200 times as large: the model still goes the right way.

    With clip c and share s of attackers of full weight, the mean moves at least
    (1 - s) d - s c along the honest direction.
    """
    honest, clip = 0.5, 0.6
    fold = Fold(SIZE, config=FoldConfig(clip_norm=clip))
    direction = np.ones(SIZE, np.float32) / np.float32(np.sqrt(SIZE))
    for _ in range(7):
        fold.update(direction * np.float32(honest), weight=50)
    for _ in range(3):
        fold.update(direction * np.float32(-100), weight=50)
    along = float(fold.finalize() @ direction)
    assert along == pytest.approx(0.7 * honest - 0.3 * clip, rel=1e-5)
    assert along > 0


def test_a_delta_that_a_power_cut_tore_fails_its_task_alone(fleet: Fleet) -> None:
    """The file no longer hashes to what was committed: the round does without it."""

    async def story() -> None:
        run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=2, **RUN)
        for peer in fleet.peers:
            await fleet.ask(peer)
        await fleet.rounds.advance(run_id)
        for peer in fleet.peers:
            lease = await fleet.ask(peer)
            assert lease
            await fleet.send(peer, lease, delta=np.full(SIZE, peer.id, np.float32))
            if peer.id == 1:
                fleet.leases.delta_path(lease.task_id).write_bytes(b"torn")
        await fleet.rounds.advance(run_id)
        entry = (await fleet.rounds.get(run_id))["history"][0]
        assert (entry["devices"], entry["failed"], entry["void"]) == (2, 1, False)
        mean = (2 * 20 + 3 * 30) / 50
        np.testing.assert_allclose(fleet.parameters(run_id), START + mean, rtol=1e-6)

    asyncio.run(story())


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0}, {"rounds": 10_001}, {"epochs": 0}, {"batch_size": 5000},
        {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"proximal_mu": -1.0},
        {"clip_norm": -1.0}, {"devices_min": 0}, {"deadline_s": 0}, {"server_momentum": 1.0},
        {"seed": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_start_nothing(fleet: Fleet, wrong: dict[str, Any]) -> None:
    """The message names the setting, and no run exists afterwards."""
    settings: dict[str, Any] = {"rounds": 1, **wrong}
    with pytest.raises(InvalidError, match=next(iter(wrong))):
        asyncio.run(fleet.rounds.start(bundle_sha256=BASE, **settings))
    with fleet.store.read() as session:
        assert session.scalars(select(RoundsRun)).first() is None


def test_a_candidate_that_cannot_be_built_ends_the_run(fleet: Fleet) -> None:
    """What may pass is tried again, a bounded often; what will not is given up at once."""

    class Broken(FakeWorkshop):
        error: Exception = StoreError("the disk is full")

        async def candidate(
            self, base_sha256: str, parameters: bytes, *, facts: dict[str, str]
        ) -> str:
            """Fail."""
            self.built.append((base_sha256, parameters))
            raise self.error

    async def story() -> None:
        for error, tries in ((StoreError("the disk is full"), 60), (InvalidError("no"), 1)):
            fleet.workshop = Broken()
            fleet.workshop.error = error
            fleet.boot()
            run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=3, **RUN)
            for _ in range(70):
                found = await fleet.turn(run_id)
            assert found["state"] == "failed" and found["reason"] == str(error)
            assert len(fleet.workshop.built) == tries

    asyncio.run(story())


def score(sha256: str, right: int, **changed: Any) -> dict[str, Any]:
    """Return the score of 10 windows of two classes."""
    found = {
        "bundle_sha256": sha256, "windows": 10, "correct": right, "loss_sum": 1.5,
        "confusion": [right, 10 - right, 0, 0], "latency_p50_us": 100,
    }  # fmt: skip
    return found | changed


def test_an_evaluation_adds_up(fleet: Fleet) -> None:
    """Scores per device and per bundle; done when all answered; entitled while open."""

    async def story() -> None:
        pair = [BASE, "c" * 64]
        evaluation = await fleet.evaluations.start(
            bundle_sha256=pair, split="validation", deadline_s=30
        )
        for peer in fleet.peers:
            lease = await fleet.ask(peer, labelled=0, bundle="")
            assert lease and lease.work == EvaluateWork(bundles=tuple(pair), split="validation")
            with fleet.store.read() as session:
                assert entitled(session, peer.id, now_ms=fleet.now_ms) == set(pair)
            scores = [score(BASE, 5), score("c" * 64, 5 + peer.id)]
            assert await fleet.leases.report_evaluation(peer, lease, scores)
            with fleet.store.read() as session:
                assert entitled(session, peer.id, now_ms=fleet.now_ms) == set()
        fleet.evaluations.advance(evaluation)
        found = await fleet.evaluations.get(evaluation)
        assert found["state"] == "done" and len(found["scores"]) == 6
        assert found["devices"] == [peer.name for peer in fleet.peers]
        assert [each["accuracy"] for each in found["bundles"]] == [0.5, 0.7]

    asyncio.run(story())


def test_an_evaluation_ends_at_its_deadline(fleet: Fleet) -> None:
    """One answer is enough for done, none is failed; failures are told with their reason."""

    async def story() -> None:
        start = fleet.evaluations.start
        one = await start(bundle_sha256=[BASE], split="test", deadline_s=30)
        peer = fleet.peers[0]
        lease = await fleet.ask(peer)
        assert lease
        await fleet.leases.report_evaluation(peer, lease, [score(BASE, 9)])
        none = await start(
            bundle_sha256=[BASE], split="test", device_ids=[peer.name], deadline_s=20
        )
        lease = await fleet.ask(peer)
        assert lease
        await fleet.leases.report_failure(peer, lease, code="agent.trainer.no_labels", text="none")
        fleet.evaluations.advance(one)
        assert (await fleet.evaluations.get(one))["state"] == "running"
        assert set(fleet.nudged) == {"wrist-02", "wrist-03"}
        fleet.now_ms += 30_000
        for each in (one, none):
            fleet.evaluations.advance(each)
        found = await fleet.evaluations.get(one)
        assert found["state"] == "done" and found["devices"] == [peer.name]
        found = await fleet.evaluations.get(none)
        assert found["state"] == "failed" and found["bundles"][0]["accuracy"] is None
        assert found["failures"][0]["code"] == "agent.trainer.no_labels"

    asyncio.run(story())


@pytest.mark.parametrize(
    "wrong",
    [
        {"correct": 6}, {"windows": 11}, {"windows": 0, "confusion": [0] * 4, "correct": 0},
        {"confusion": [5, 5, 0]}, {"confusion": []}, {"loss_sum": float("inf")},
        {"loss_sum": -1.0}, {"bundle_sha256": "d" * 64},
    ],
)  # fmt: skip
def test_scores_that_contradict_themselves_are_refused(fleet: Fleet, wrong: dict[str, Any]) -> None:
    """A device cannot tilt the gate with numbers that do not add up."""

    async def story() -> None:
        await fleet.evaluations.start(bundle_sha256=[BASE], split="test")
        lease = await fleet.ask(fleet.peers[0])
        assert lease
        with pytest.raises(InvalidError):
            await fleet.leases.report_evaluation(fleet.peers[0], lease, [score(BASE, 5, **wrong)])
        assert await fleet.ask(fleet.peers[0]) is None

    asyncio.run(story())


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"bundle_sha256": []}, InvalidError),
        ({"split": "train"}, InvalidError),
        ({"deadline_s": 0}, InvalidError),
        ({"bundle_sha256": ["d" * 64]}, NotFoundError),
        ({"device_ids": ["wrist-77"]}, NotFoundError),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_not_started(
    fleet: Fleet, how: dict[str, Any], error: type[Exception]
) -> None:
    """Nothing is asked of any device."""
    arguments: dict[str, Any] = {"bundle_sha256": [BASE], "split": "test", **how}
    with pytest.raises(error):
        asyncio.run(fleet.evaluations.start(**arguments))
    with fleet.store.read() as session:
        assert session.scalars(select(Task)).first() is None


def test_a_waiting_device_is_woken_by_its_task(fleet: Fleet) -> None:
    """A long poll ends as soon as there is something to do; the loops of both parts run."""

    async def story() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            loops = [
                group.create_task(fleet.rounds.run()),
                group.create_task(fleet.evaluations.run()),
            ]
            asked = [
                group.create_task(
                    fleet.leases.next(peer, wait_ms=30_000, bundle_sha256=BASE, labelled=5)
                )
                for peer in fleet.peers
            ]
            await asyncio.sleep(0)
            run_id = await fleet.rounds.start(bundle_sha256=BASE, rounds=1, devices_min=3, **RUN)
            for peer, task in zip(fleet.peers, asked, strict=True):
                lease = await task
                assert lease
                await fleet.send(peer, lease)
            while (await fleet.rounds.get(run_id))["state"] != "done":
                await asyncio.sleep(0.01)
            for each in loops:
                each.cancel()

    asyncio.run(story())


def test_the_tables_allow_nothing_else() -> None:
    """Every pair of state and event that a table lacks is refused."""
    for task in rules.TaskState:
        for event in rules.TaskEvent:
            if (task, event) not in rules.TASKS:
                with pytest.raises(IllegalEventError):
                    rules.task_after(task, event)
    for run in rules.RunState:
        for happened in rules.RunEvent:
            if (run, happened) not in rules.RUNS:
                with pytest.raises(IllegalEventError):
                    rules.run_after(run, happened)
            if (run, happened) not in rules.EVALUATIONS:
                with pytest.raises(IllegalEventError):
                    rules.evaluation_after(run, happened)
    with pytest.raises(IllegalEventError):
        rules.task_after("no state", rules.TaskEvent.RESULT_CAME)
