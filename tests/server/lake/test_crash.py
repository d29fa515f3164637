"""A server that dies at any step loses no window and doubles none.

Faults: a run of the lake dies at write, sync, rename, commit or removal number k, before or after
it took effect. Then a new server starts on what is on the disk. The invariant: each window counts
once, and the folder holds the files of the manifest and no other. One fault is drawn of each few
that follow each other; with SHOAL_CRASH_ALL=1 every k gets both, which takes minutes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import event, select

from shoal.server.errors import StoreError
from shoal.server.lake import Query, manifest
from shoal.server.lake.errors import LakeError
from shoal.server.lake.rules import DAY_MS, HOUR_MS, STEP_MS, Tier
from shoal.server.store.tables import Window

from .conftest import MIDNIGHT, MODEL, World, open_world

SETTINGS: dict[str, Any] = {
    "fold_s": (3_600, 3_600), "keep_days": (1, 2, 9), "export_rows_max": 3, "grace_s": 60,
}  # fmt: skip


class DiedError(BaseException):
    """The power went."""


class Power:
    """Counts the steps that reach the disk, and fails at one of them, before or after it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        world: World,
        *,
        last: int = -1,
        after: bool = False,
        raises: type[BaseException] = DiedError,
    ) -> None:
        self.count, self.last, self.after, self.raises = 0, last, after, raises
        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "unlink"),
            (pq.ParquetWriter, "write_table"),
        ):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        # SQLAlchemy tells it before it is done; the step after it is the one before the next one.
        self._engine = world.store.engine
        event.listen(self._engine, "commit", self._committed)

    def off(self) -> None:
        """Count no commit any more; the rest ends with the monkeypatch."""
        event.remove(self._engine, "commit", self._committed)

    def _committed(self, _connection: Any) -> None:
        self._step()

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.after:
                self._step()
            found = call(*args, **kwargs)
            if self.after:
                self._step()
            return found

        return wrapped

    def _step(self) -> None:
        if self.count == self.last:
            self.last = -1  # once
            raise self.raises("no space left on device")
        self.count += 1


def story(world: World) -> None:
    """Export, fold twice, let windows and hours go, remove their files."""
    for hours in (0, 2, 4, 60, 61, 90):
        world.now_ms = MIDNIGHT + 10 * STEP_MS + hours * HOUR_MS
        world.settle()


def predictions(world: World) -> int:
    """Return what all windows predicted, as the lake says."""
    query = Query(model=MODEL, since_ms=MIDNIGHT, until_ms=MIDNIGHT + DAY_MS)
    rows = world.lake.history.windows(query).table.to_pylist()
    assert [row["windows"] for row in rows] == [len(world.told)]
    return sum(row["predictions"] for row in rows)


def check(world: World) -> None:
    """Assert the invariant."""
    assert predictions(world) == sum(sum(each.classes) for each in world.told)
    with world.store.read() as session:
        known = manifest.paths(session)
    found = {
        each.relative_to(world.folder).as_posix()
        for each in (world.folder / "windows").rglob("part-*")
    }
    assert found == known


@pytest.fixture
def small(make_world: Callable[..., World]) -> World:
    """Four windows of one device; their sketches are damaged, so one dataset is all there is."""
    world = make_world(**SETTINGS)
    world.now_ms = MIDNIGHT + 10 * STEP_MS
    for i in range(4):
        world.window("dev-0", MIDNIGHT + i * STEP_MS, rows=0, sketch=b"damaged")
    world.store.close()
    return world


@pytest.fixture
def copies(small: World, tmp_path: Path) -> Iterator[Callable[[], World]]:
    """Return a maker of copies of the small world, each on a disk of its own."""
    worlds: list[World] = []

    def copy() -> World:
        folder = tmp_path / f"copy{len(worlds)}"
        shutil.copytree(small.folder.parent, folder)
        world = open_world(folder, **SETTINGS)
        world.adopt(small)
        worlds.append(world)
        return world

    yield copy
    for world in worlds:
        world.store.close()


class Disk:
    """One disk that is set back again and again, under one engine: that of the new server."""

    def __init__(self, small: World, folder: Path) -> None:
        self._small, self._folder = small, folder
        shutil.copytree(small.folder.parent, folder)
        self._world = open_world(folder, **SETTINGS)

    def set_back(self) -> World:
        """Return the small world as it was."""
        self._world.store.engine.dispose()
        shutil.rmtree(self._folder)
        shutil.copytree(self._small.folder.parent, self._folder)
        return self.restart(self._small)

    def restart(self, before: World) -> World:
        """Return a server that knows only what is on the disk."""
        store = self._world.store
        store.engine.dispose()
        world = open_world(self._folder, store=store, **SETTINGS)
        world.adopt(before)
        return world

    def close(self) -> None:
        """Let the database go."""
        self._world.store.close()


@pytest.fixture
def disk(small: World, tmp_path: Path) -> Iterator[Disk]:
    """The disk of the small world."""
    found = Disk(small, tmp_path / "disk")
    yield found
    found.close()


def faults(steps: int) -> list[tuple[int, bool]]:
    """Return which steps get a fault, and whether after it: all, or one of each six."""
    every = [(k, after) for k in range(steps) for after in (False, True)]
    if os.environ.get("SHOAL_CRASH_ALL"):
        return every
    rng = np.random.default_rng(0)
    return [every[i + int(rng.integers(min(6, len(every) - i)))] for i in range(0, len(every), 6)]


def test_a_crash_at_any_step_loses_and_doubles_nothing(disk: Disk) -> None:
    """The steps are counted in a run without a fault, then they get one each."""
    world = disk.set_back()
    with pytest.MonkeyPatch.context() as monkeypatch:
        power = Power(monkeypatch, world)
        story(world)
        power.off()
    check(world)
    assert power.count > 60
    for k, after in faults(power.count):
        world = disk.set_back()
        with pytest.MonkeyPatch.context() as monkeypatch:
            power = Power(monkeypatch, world, last=k, after=after)
            with pytest.raises(DiedError):
                story(world)
            power.off()
        truth = sum(sum(each.classes) for each in world.told)
        assert predictions(world) == truth, (k, after)
        again = disk.restart(world)
        again.lake.settle()
        assert predictions(again) == truth, (k, after)
        story(again)
        check(again)
        left = [each for each in again.folder.rglob("*.tmp") if each.name != "manifest.json.tmp"]
        assert left == []


def test_a_full_disk_is_told_and_tried_again(copies: Callable[[], World]) -> None:
    """An error of the disk changes nothing; the next step brings everything in."""
    world = copies()
    with pytest.MonkeyPatch.context() as monkeypatch:
        Power(monkeypatch, world, last=1, raises=OSError)
        with pytest.raises(LakeError, match="could not write") as caught:
            world.lake.step()
        assert caught.value.retry
        assert predictions(world) > 0
    story(world)
    world.lake.settle()
    check(world)


def test_redelivered_windows_are_exported_once(copies: Callable[[], World]) -> None:
    """Two servers on one database: the second export is refused as a whole."""
    world = copies()
    with world.store.begin() as session:
        ids = session.scalars(select(Window.id)).all()
        manifest.mark(session, windows=ids[:1], labels=[])
    with pytest.raises(StoreError, match="by someone else"), world.store.begin() as session:
        manifest.mark(session, windows=ids, labels=[])
    with world.store.read() as session:
        assert session.scalars(select(Window.id).where(Window.lake_done)).all() == ids[:1]


def test_files_of_another_time_are_set_aside(copies: Callable[[], World]) -> None:
    """A database that was set back does not know newer files: they are kept apart for a week."""
    world = copies()
    world.settle()
    with world.store.begin() as session:
        files = manifest.live(session)
        manifest.forget(session, [files[0].id])
        session.query(Window).update({"lake_done": False})
        manifest.forget(session, [each.id for each in files])
    world.lake.settle()
    aside = list((world.folder / "orphans").glob("*.parquet"))
    assert len(aside) == len(files)
    world.settle()
    check(world)
    for each in aside:
        os.utime(each, (world.now_ms / 1000 - 8 * 86_400,) * 2)
    world.lake.settle()
    assert not list((world.folder / "orphans").glob("*.parquet"))


def test_nothing_is_retired_before_it_is_in_a_coarser_tier(copies: Callable[[], World]) -> None:
    """Fine windows go when they are in hours, hours when they are in days, days at their end."""
    world = copies()
    story(world)
    with world.store.read() as session:
        tiers = {(each.tier, each.windows) for each in manifest.live(session)}
    assert tiers == {(Tier.DAY, 4)}
    world.now_ms += 30 * DAY_MS
    world.settle()
    with world.store.read() as session:
        assert manifest.live(session) == []


def test_the_database_forgets_only_what_the_lake_has(copies: Callable[[], World]) -> None:
    """With ``database_days`` windows leave the database when they are exported and judged."""
    world = copies()
    lake = open_world(world.folder.parent, **SETTINGS, database_days=1)
    lake.adopt(world)
    with world.store.begin() as session:
        first = session.scalars(select(Window.id)).first()
        session.get_one(Window, first).drift_done = False
    try:
        lake.now_ms += 2 * DAY_MS
        lake.lake.retire()
        with world.store.read() as session:
            assert len(session.scalars(select(Window.id)).all()) == 4
        lake.settle()
        lake.lake.retire()
        with world.store.read() as session:
            assert session.scalars(select(Window.id)).all() == [first]
        assert predictions(lake) == sum(sum(each.classes) for each in world.told)
    finally:
        lake.store.close()
