"""Faults: power is cut at every operation of an update (fault 54), over the real code.

The invariant, whatever is cut, as soon as a first bundle was reported confirmed:
the device boots a bundle that was published, never an older one than it reported confirmed, a bad
one is loaded at most three times and never becomes active.

The last test is about this test: with any one fsync of the code left out, the invariant breaks.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.agent.updates import UpdateConfig, Updater
from shoal.agent.updates.errors import UpdateError
from shoal.agent.updates.floor import Floor
from shoal.agent.updates.metadata import Approved
from shoal.agent.updates.remote import Chunk
from shoal.proto.assignment import Assignment, sign
from shoal.proto.bundle import Manifest, pack, unpack
from shoal.proto.records import Kind, check_body
from tests.sims.disk import PowerCutError, SimDisk, Site, formatted

ROOT = Path("/state")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOW_MS = 1_790_000_000_000
CONFIG = UpdateConfig(retry_s=0)


def make_bundle(number: int) -> bytes:
    """Return a small valid bundle."""
    manifest = Manifest(
        name="demo", model="model.onnx", input="x", output="p", channels=("c",),
        classes=("a", "b"), samples=4,
    )  # fmt: skip
    parts = {"model.onnx": b"graph %d" % number, "golden.npz": b"g", "profile.json": b"{}"}
    return pack(manifest, parts)


BUNDLES = {number: make_bundle(number) for number in (1, 2, 3)}
DIGESTS = {number: unpack(data).sha256 for number, data in BUNDLES.items()}
BAD = 2  # loads, passes its self-test, and fails its trial
# What the fleet assigns, by counter: a first model, a bad one, a good one, back to the first.
PLAN = {1: 1, 2: BAD, 3: 3, 4: 1}


@dataclass
class Signed:
    """A signed assignment."""

    payload: bytes
    signature: bytes


def signed(counter: int) -> Signed:
    """Return the assignment with this counter."""
    number = PLAN[counter]
    return Signed(
        *sign(
            Assignment(
                device="wrist-01", counter=counter, issued_unix_ms=NOW_MS,
                expires_unix_ms=NOW_MS + 1000, model="demo", path=f"models/demo/{number}",
                sha256=DIGESTS[number], length=len(BUNDLES[number]), rollout=f"r{counter}",
            ),
            KEY,
        )
    )  # fmt: skip


SIGNED = {counter: signed(counter) for counter in PLAN}


class Server:
    """Approves and delivers everything, in chunks."""

    def metadata(self, name: str, *, timeout_s: float) -> bytes:
        """Not used: lookup answers."""
        raise AssertionError(name)

    def artefact(self, sha256: str, offset: int, *, timeout_s: float) -> Iterator[Chunk]:
        """Yield thirds of the bundle."""
        data = next(BUNDLES[number] for number in BUNDLES if DIGESTS[number] == sha256)
        third = len(data) // 3 + 1
        for start in range(offset, len(data), third):
            yield Chunk(start, data[start : start + third], len(data))

    def lookup(self, path: str, floor: Floor) -> Approved:
        """Return what the path stands for."""
        number = int(path.rpartition("/")[2])
        versions = dict.fromkeys(("root", "timestamp", "snapshot", "targets"), 1)
        return Approved(DIGESTS[number], len(BUNDLES[number]), versions)


class BrokenPromiseError(AssertionError):
    """The invariant does not hold."""


@dataclass
class World:
    """What is known outside the device: what it told, and what it loaded."""

    told: dict[int, str] = field(default_factory=dict)
    confirmed: int = 0
    assigned: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    """Loads in trial, by counter."""
    crashes: int = 0

    def emit(self, kind: Kind, body: dict[str, Any]) -> None:
        """Take a record."""
        check_body(kind, body)
        if kind is Kind.UPDATE:
            self.told[body["counter"]] = body["state"]
            if body["state"] == "confirmed":
                self.confirmed = max(self.confirmed, body["counter"])

    def loaded(self, disk: SimDisk, updater: Updater, path: Path | None) -> None:
        """Check the invariant on a bundle that the device loads."""
        if path is None:
            if self.confirmed:
                raise BrokenPromiseError("no bundle to load after one was confirmed")
            return
        data = disk.read(path, bytes_max=1 << 20)
        number = next((number for number in BUNDLES if BUNDLES[number] == data), 0)
        if not number:
            raise BrokenPromiseError("a bundle that nobody published is loaded")
        if updater.in_trial:
            staged = updater.staged
            if staged is None or staged.counter <= self.confirmed:
                raise BrokenPromiseError("what was told confirmed is in trial again")
            self.loads[staged.counter] += 1
            if number == BAD and self.loads[staged.counter] > CONFIG.tries:
                raise BrokenPromiseError("a bad bundle is loaded again and again")
        elif number == BAD:
            raise BrokenPromiseError("a bad bundle is active")
        elif PLAN[self.confirmed or 1] != number and not (
            updater.active is not None and updater.active.counter > self.confirmed
        ):
            raise BrokenPromiseError("an older bundle than the confirmed one is loaded")


def live(disk: SimDisk, world: World, *, hangs: bool = False) -> None:
    """One life of the agent, from boot until all assignments are settled, or power is cut.

    ``hangs``: the bad model takes the agent down in its trial instead of failing a check.
    """
    server = Server()
    updater = Updater(
        ROOT, device="wrist-01", director_key=KEY.public_key().public_bytes_raw(),
        approvals=server, remote=server, self_test=lambda path: None, emit=world.emit,
        clock=lambda: NOW_MS, config=CONFIG, fs=disk, monotonic=lambda: 0.0,
        sleep=lambda wait_s: None,
    )  # fmt: skip
    path = updater.boot()
    world.loaded(disk, updater, path)
    _judge(updater, path, hangs=hangs)
    for counter in PLAN:
        if counter < world.assigned:
            continue  # the server offers only the newest
        world.assigned = counter
        try:
            path = updater.apply_here(SIGNED[counter])
        except (UpdateError, OSError) as exc:
            raise BrokenPromiseError(f"an update failed without a fault: {exc}") from exc
        if path is not None:
            world.loaded(disk, updater, path)
            _judge(updater, path, hangs=hangs)


def _judge(updater: Updater, path: Path | None, *, hangs: bool) -> None:
    if path is None or not updater.in_trial:
        return
    staged = updater.staged
    assert staged is not None
    if staged.sha256 != DIGESTS[BAD]:
        updater.trial_passed()
    elif hangs:
        raise PowerCutError
    else:
        updater.trial_failed("wrong answers")


def finish(disk: SimDisk, world: World, *, fine: bool) -> None:
    """Live to the end without a crash, and check that the fleet's plan was carried out."""
    for _ in range(2):  # the second boot finds all settled
        live(disk, world)
    if world.told.get(2, "failed") != "failed" or world.told[4] not in ("confirmed", "failed"):
        raise BrokenPromiseError(f"the plan was not carried out: {world.told}")
    if fine and "failed" in (world.told[counter] for counter in (1, 3, 4) if counter in world.told):
        raise BrokenPromiseError("a good bundle was given up for one crash")


def every_crash(omit: frozenset[Site] = frozenset()) -> tuple[int, set[Site]]:
    """Cut power, or kill, at every operation; return the number of lives after it, and sites."""
    disk, world = formatted(ROOT), World()
    disk.omit = omit
    live(disk, world)
    total, sites, lives = disk.operations, disk.sites, 0
    for moment in range(1, total + 1):
        disk, world = formatted(ROOT), World()
        disk.omit, disk.sites, disk.dies_at = omit, sites, moment
        with pytest.raises(PowerCutError):
            live(disk, world)
        for left in disk.power_cuts():
            finish(left, copy.deepcopy(world), fine=True)
            lives += 1
        killed = copy.deepcopy(disk)
        killed.boot()
        finish(killed, copy.deepcopy(world), fine=True)
        lives += 1
    return lives, sites


def random_crashes(
    seed: int, omit: frozenset[Site] = frozenset(), *, kills: float = 0.5, hangs: float = 0.5
) -> int:
    """Live through up to 12 kills and power cuts at drawn operations; return how many came."""
    rng = random.Random(seed)
    disk, world = formatted(ROOT), World()
    disk.omit = omit
    for _ in range(12):
        disk.dies_at = rng.randint(1, 30)
        try:
            live(disk, world, hangs=rng.random() < hangs)
        except PowerCutError:
            world.crashes += 1
            if rng.random() < kills:
                disk.boot()
            else:
                disk.power_cut(rng)
        else:
            break
    disk.boot()
    finish(disk, world, fine=False)
    return world.crashes


def test_every_single_crash_is_survived() -> None:
    """Power cuts and kills at every operation, with every disk that may be left."""
    lives, sites = every_crash()
    assert lives > 200
    assert sorted(sites) == fsyncs(), "recovery syncs at other lines than a plain life"


def test_many_crashes_are_survived() -> None:
    """Crashes in the recovery from crashes."""
    assert sum(random_crashes(seed) for seed in range(120)) > 250


def fsyncs() -> list[Site]:
    """Return every line of the code that syncs in a life and in a second boot."""
    disk, world = formatted(ROOT), World()
    live(disk, world)
    live(disk, world)
    return sorted(disk.sites)


@pytest.mark.parametrize("site", fsyncs(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_no_fsync_can_be_left_out(site: Site) -> None:
    """The checker finds a violation for each fsync of the code that is taken away."""
    with pytest.raises(BrokenPromiseError):
        for seed in range(3000):
            random_crashes(seed, frozenset({site}))


def test_power_cycling_uses_up_nothing() -> None:
    """Fifty cuts at the start of a confirmed bundle consume no try (fault 55)."""
    disk, world = formatted(ROOT), World()
    live(disk, world)
    for number in range(50):
        before = disk.read(ROOT / "state", bytes_max=1 << 16)
        disk.power_cut(random.Random(number))
        live(disk, world)
        assert disk.read(ROOT / "state", bytes_max=1 << 16) == before
