"""Bring stored windows into the lake, make old ones coarser, let the oldest go.

    window, labels rows --export--> fine files --fold--> hours --fold--> days --> the end

Rule 1: each step writes files first, then changes the manifest in one transaction. A crash between
leaves files that no manifest knows; they are set aside at the next start, and the step runs again.
Rule 2: a file is removed ``grace_s`` after it was retired, and only then forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ... import ShoalError
from ..store import Store
from . import manifest
from .config import DAY_S, LakeConfig
from .errors import LakeError
from .files import Files
from .fold import Folder
from .history import History
from .rows import Memo, waiting
from .rules import FileFacts, Job, expired
from .rules import jobs as jobs_of
from .schema import DATASETS

log = logging.getLogger(__name__)


class Lake:
    """Made cheap, run in a task group, ended by cancellation. One per folder."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        clock: Callable[[], int],
        config: LakeConfig,
    ) -> None:
        """Take the database and the folder; nothing is touched yet.

        Args:
            store: The metadata database.
            folder: Of the lake; made when it is first written.
            clock: The wall clock, Unix ms.
            config: Pace and bounds.
        """
        self._store, self._clock, self._config = store, clock, config
        self._files = Files(folder)
        self._folder = Folder(self._files, config=config)
        self._memo = Memo(windows_max=5 * config.export_rows_min)
        self.history = History(store, folder, clock=clock, config=config, memo=self._memo)
        """Questions about what is in the lake and on its way into it."""

    async def run(self) -> None:
        """Settle what a crash left, then work until cancelled."""
        await asyncio.to_thread(self.settle)
        while True:
            try:
                while await asyncio.to_thread(self.step):
                    pass
            except ShoalError as exc:
                if not exc.retry:
                    log.error("the lake: %s; %s", exc, exc.hint)
                else:
                    log.warning("the lake: %s; it will be tried again", exc)
            await asyncio.sleep(self._config.tick_s)

    def settle(self) -> None:
        """Set files aside that no manifest knows. Call it once, before the first step.

        Raises:
            LakeError: The folder cannot be read.
        """
        with self._store.read() as session:
            known = manifest.paths(session)
        before_s = self._clock() / 1000 - self._config.orphan_days * DAY_S
        count = self._files.sweep(known, before_s=before_s)
        if count:
            log.warning("%d files of the lake are in no manifest; they were set aside", count)
        self._publish()

    def step(self) -> bool:
        """Do the next piece of each work; say whether more waits.

        Raises:
            LakeError: The disk refused; the manifest is as it was.
            StoreError: The database refused; the manifest is as it was.
        """
        more = self.export()
        more |= self.fold()
        self.retire()
        return more

    def export(self, *, at_once: bool = False) -> bool:
        """Write waiting windows and labels into files, if there are enough or they waited enough.

        Args:
            at_once: Do not wait for more of them.

        Returns:
            Whether there was more than goes into one step.
        """
        config, now_ms = self._config, self._clock()
        with self._store.read() as session:
            rows = waiting(
                session,
                self._memo,
                limit=config.export_rows_max,
                clock=config.clock,
                datasets=DATASETS,
            )
        if rows.oldest_ms is None:
            return False
        count = max(len(rows.windows), len(rows.labels))
        old = now_ms - rows.oldest_ms >= config.export_s * 1000
        if not (at_once or old or count >= config.export_rows_min):
            return False  # they were read all the same: a question finds that done
        fresh: list[FileFacts] = []
        for (dataset, model, day), table in rows.tables().items():
            fresh += self._folder.fresh(DATASETS[dataset], model, day, table, now_ms=now_ms)
        with self._store.begin() as session:
            manifest.add(session, fresh)
            manifest.mark(session, windows=rows.windows, labels=rows.labels)
        self._memo.forget(rows.windows)
        self._publish()
        return count >= config.export_rows_max

    def fold(self) -> bool:
        """Fold or compact one partition that is due; say whether another is."""
        now_ms = self._clock()
        with self._store.read() as session:
            jobs = list(_jobs(manifest.live(session), now_ms, self._config))
        if not jobs:
            return False
        old = jobs[0].files
        fresh = self._folder.rewrite(jobs[0], now_ms=now_ms)
        # Whatever went in came out, once in each tier: if not, nothing is changed.
        if {each.windows for each in fresh} != {sum(each.windows for each in old)}:
            raise LakeError("files of the lake do not hold the windows that the manifest says")
        with self._store.begin() as session:
            manifest.add(session, fresh)
            manifest.retire(session, old, now_ms=now_ms)
        self._publish()
        return len(jobs) > 1

    def retire(self) -> None:
        """Retire files whose time is over, remove those retired long ago, prune the database."""
        now_ms, limit = self._clock(), self._config.job_files_max
        with self._store.read() as session:
            over = expired(manifest.live(session), now_ms, config=self._config)
            gone = manifest.gone(
                session, before_ms=now_ms - self._config.grace_s * 1000, limit=limit
            )
        if over:
            with self._store.begin() as session:
                manifest.retire(session, over, now_ms=now_ms)
            self._publish()
        if gone:
            self._files.remove(path for _, path in gone)
            with self._store.begin() as session:
                manifest.forget(session, [number for number, _ in gone])
        if self._config.database_days:
            before_ms = now_ms - self._config.database_days * DAY_S * 1000
            with self._store.begin() as session:
                manifest.prune(session, before_ms=before_ms, limit=self._config.export_rows_max)

    def _publish(self) -> None:
        with self._store.read() as session:
            self._files.publish(manifest.live(session))


def _jobs(files: Iterable[FileFacts], now_ms: int, config: LakeConfig) -> Iterator[Job]:
    partitions: dict[tuple[str, ...], list[FileFacts]] = {}
    for each in files:
        key = (each.dataset, each.grain, each.tier, each.model, each.day)
        partitions.setdefault(key, []).append(each)
    for part in partitions.values():
        yield from jobs_of(part, now_ms, config=config)
