"""A fleet whose windows are known value by value, on a clock that the test turns."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import event

from shoal.ext.sketch import SketchBank
from shoal.server.drift import profile as profiles
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.lake import Lake, LakeConfig
from shoal.server.lake.rules import DAY_MS
from shoal.server.store import Store
from shoal.server.store.tables import Device, Labels, Model, Stream, Window

MODEL = "ab" * 32
CHANNELS = ("speed", "heat")
FEATURES = (*CHANNELS, "confidence")
MIDNIGHT = 1_764_028_800_000  # 2025-11-25T00:00Z


@functools.cache
def make_profile(seed: int = 1, *, bins: int = 8) -> ReferenceProfile:
    """Return the reference of a model with two channels."""
    rng = np.random.default_rng(seed)
    return profiles.build(
        rng.normal(0, 1, (200, 2, 4)).astype(np.float32),
        rng.random(200).astype(np.float32),
        np.ones(200, np.bool_),
        np.zeros(200, np.int64),
        np.arange(200) % 2 == 0,
        channels=CHANNELS,
        bins=bins,
    )


@dataclass(frozen=True, slots=True)
class Told:
    """One window as the device knows it."""

    device: str
    site: str
    hardware: str
    slice: str
    number: int
    start_ms: int
    x__nd: NDArray[np.float32]
    classes: tuple[int, ...]
    labelled: int = 0
    confusion: tuple[int, ...] = ()


@dataclass
class World:
    """A database, a lake and all that was ever told."""

    store: Store
    lake: Lake
    folder: Path
    config: LakeConfig
    profile: ReferenceProfile
    rng: np.random.Generator
    now_ms: int = MIDNIGHT
    told: list[Told] = field(default_factory=list)
    _ids: dict[str, tuple[int, int]] = field(default_factory=dict)
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def device(self, name: str, *, site: str, hardware: str) -> None:
        """Enrol a device with one stream."""
        with self.store.begin() as session:
            device = Device(name=name, site=site, hardware=hardware, created_ms=1)
            session.add(device)
            session.flush()
            stream = Stream(device_id=device.id, stream=name.encode().ljust(16), first_ms=1)
            session.add(stream)
            session.flush()
            self._ids[name] = (device.id, stream.id)

    def bank(self, x__nd: NDArray[np.float32]) -> bytes:
        """Return the sketches of values as a device sends them."""
        edges = [np.array(each.edges, np.float32) for each in self.profile.features]
        bank = SketchBank(len(edges), k=64, edges=edges, seed=int(self.rng.integers(1 << 30)))
        if len(x__nd):
            bank.update(np.ascontiguousarray(x__nd))
        return bank.to_bytes()

    def adopt(self, other: World) -> None:
        """Take what another world was told: this one is a copy of its folder."""
        self.now_ms, self.told = other.now_ms, list(other.told)
        self._ids, self._numbers = dict(other._ids), dict(other._numbers)

    def window(
        self,
        device: str,
        start_ms: int,
        *,
        rows: int = 40,
        slice_: str = "",
        labelled: bool = False,
        **fields: Any,
    ) -> Told:
        """Store one window of a device, of five minutes, as ingest does."""
        site, hardware = self._about(device)
        key = (device, slice_)
        number = self._numbers.setdefault(key, 0)
        self._numbers[key] += 1
        x__nd = self.rng.normal(0, 1, (rows, len(FEATURES))).astype(np.float32)
        x__nd[self.rng.random(x__nd.shape) < 0.05] = np.nan
        classes = tuple(int(c) for c in self.rng.integers(0, 9, int(self.rng.integers(2, 5))))
        confusion = tuple(int(c) for c in self.rng.integers(0, 5, 4)) if labelled else ()
        device_id, stream_id = self._ids[device]
        base = {
            "device_id": device_id,
            "stream_id": stream_id,
            "model_sha256": MODEL,
            "slice": slice_,
            "number": number,
            "received_ms": self.now_ms,
        }
        row: dict[str, Any] = {
            **base,
            "device_start_ms": start_ms,
            "device_end_ms": start_ms + 300_000,
            "predictions": sum(classes),
            "errors": 1,
            "classes": list(classes),
            "latency_us": [0, rows, 2],
            "sketch": self.bank(x__nd),
            "drift_done": True,
        }
        with self.store.begin() as session:
            session.add(Window(**(row | fields)))
            if labelled:
                session.add(
                    Labels(
                        **base,
                        seq=1_000 * len(self.told) + 1,
                        split=2,
                        labelled=sum(confusion),
                        correct=confusion[0] + confusion[3],
                        confusion=list(confusion),
                        drift_done=True,
                    )
                )
        told = Told(
            device, site, hardware, slice_, number, start_ms, x__nd, classes,
            sum(confusion), confusion,
        )  # fmt: skip
        self.told.append(told)
        return told

    def furnish(self) -> None:
        """Register the model and four devices at two sites."""
        with self.store.begin() as session:
            session.add(
                Model(
                    name="m",
                    version=1,
                    sha256=MODEL,
                    size=1,
                    created_ms=1,
                    manifest={},
                    profile=json.loads(self.profile.to_json()),
                )
            )
        self.device("dev-0", site="north", hardware="pi4")
        self.device("dev-1", site="north", hardware="pi5")
        self.device("dev-2", site="south", hardware="pi4")
        self.device("dev-3", site="south", hardware="pi4")

    def settle(self) -> None:
        """Export and fold until nothing is due."""
        while self.lake.step():
            pass

    def _about(self, name: str) -> tuple[str, str]:
        with self.store.read() as session:
            device = session.get_one(Device, self._ids[name][0])
            return device.site, device.hardware


def _hurry(connection: Any, _record: Any) -> None:
    """Let SQLite not wait for the disk: no test cuts the power of this machine."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files not wait for the disk either."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def open_world(
    folder: Path, *, seed: int = 0, store: Store | None = None, **settings: Any
) -> World:
    """Return the world in a folder; its store, which may be given, is to be closed."""
    if store is None:
        store = Store(f"sqlite:///{folder}/fleet.db")
        event.listen(store.engine, "connect", _hurry)
    if not (folder / "fleet.db").exists():
        store.migrate()
    config = LakeConfig(**({"export_s": 0.0, "tick_s": 0.01} | settings))
    world: World
    lake = Lake(store, folder / "lake", clock=lambda: world.now_ms, config=config)
    rng = np.random.default_rng(seed)
    world = World(store, lake, folder / "lake", config, make_profile(), rng)
    return world


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Return a maker of worlds with four devices at two sites."""
    stores: list[Store] = []

    def make(**settings: Any) -> World:
        folder = tmp_path / f"world{len(stores)}"
        folder.mkdir()
        world = open_world(folder, **settings)
        stores.append(world.store)
        world.furnish()
        return world

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """A world with production settings, but for the wait before an export."""
    return make_world()


BUSY: dict[str, Any] = {
    "fold_s": (3_600, 8 * 3_600), "files_max": 4, "job_rows_max": 1_000, "export_rows_max": 25,
}  # fmt: skip


@pytest.fixture(scope="session")
def busy_once(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Make the world of three days that the tests get copies of."""
    folder = tmp_path_factory.mktemp("busy")
    world = open_world(folder, **BUSY)
    world.furnish()
    rng = np.random.default_rng(5)
    for hour in range(0, 72, 6):
        world.now_ms = MIDNIGHT + hour * 3_600_000
        for device in ("dev-0", "dev-1", "dev-2", "dev-3"):
            back_ms = int(rng.integers(1, 6 * 3_600_000))
            if rng.random() < 0.2:
                back_ms += DAY_MS  # it was out of reach
            world.window(
                device,
                world.now_ms - 300_000 - back_ms,
                slice_=str(rng.choice(["", "night"])),
                labelled=bool(rng.random() < 0.4),
            )
        if hour % 12 == 0 and hour < 60:
            world.settle()
    world.store.close()
    return world


@pytest.fixture
def busy(busy_once: World, tmp_path: Path) -> Iterator[World]:
    """A world after three days: windows in all tiers, in no order, some late, some waiting."""
    shutil.copytree(busy_once.folder.parent, tmp_path / "busy")
    world = open_world(tmp_path / "busy", **BUSY)
    world.adopt(busy_once)
    yield world
    world.store.close()
