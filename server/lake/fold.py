"""Make files: of fresh windows, of files that become coarser, of files that are too many.

    fine files, not folded --rewrite--> one fine file (folded) + one file of hours
    files of hours, not folded --rewrite--> one file of hours (folded) + one file of days
    many files of one partition --rewrite--> one file

Nothing here enters a file into the manifest: that is ``worker``. Memory is bounded: what is too
much is worked through device by device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from . import merge
from .config import LakeConfig
from .files import Files, PartFile
from .rules import TIERS, WIDTH_MS, FileFacts, Grain, Job, Tier
from .schema import DATASETS, Dataset


class Folder:
    """Writes new files from rows and from files. Used from one thread at a time."""

    def __init__(self, files: Files, *, config: LakeConfig) -> None:
        """Take the folder."""
        self._files, self._config = files, config

    def fresh(
        self, dataset: Dataset, model: str, day: str, rows: pa.Table, *, now_ms: int
    ) -> list[FileFacts]:
        """Write rows of one model and day that are new to the lake, for both grains.

        Returns:
            What to enter into the manifest.

        Raises:
            LakeError: The disk refused; files may be left that no manifest knows.
        """
        found = []
        for grain in Grain:
            with _Output(self._files, dataset, grain, Tier.FINE, model, day) as out:
                out.write(self._at(rows, dataset, grain, Tier.FINE))
                found += out.close(now_ms=now_ms, folded=False)
        return found

    def rewrite(self, job: Job, *, now_ms: int) -> list[FileFacts]:
        """Write the files that replace those of a job: one of their tier, one of the next.

        Raises:
            LakeError: The disk refused; files may be left that no manifest knows.
        """
        one = job.files[0]
        dataset, tier = DATASETS[one.dataset], one.tier
        up = TIERS[TIERS.index(tier) + 1] if job.folds else tier
        where = (self._files, dataset, one.grain)
        with (
            _Output(*where, tier, one.model, one.day) as same,
            _Output(*where, up, one.model, one.day) as coarse,
        ):
            for rows in self._parts(dataset, job.files):
                table = self._at(rows, dataset, one.grain, tier)
                same.write(table)
                if job.folds:
                    coarse.write(self._at(table, dataset, one.grain, up))
            return [
                *same.close(now_ms=now_ms, folded=one.folded or job.folds),
                *coarse.close(now_ms=now_ms, folded=False),
            ]

    def _at(self, rows: pa.Table, dataset: Dataset, grain: Grain, tier: Tier) -> pa.Table:
        """Return rows as they are in a grain and tier, in the order of files."""
        if grain is Grain.DEVICE and tier is Tier.FINE:
            return merge.in_order(rows, dataset)
        if grain is Grain.COHORT:
            place = rows.schema.get_field_index("device")
            nobody = pa.array(np.zeros(rows.num_rows, np.int32))
            column = pa.DictionaryArray.from_arrays(nobody, pa.array([""]))
            rows = rows.set_column(place, dataset.schema.field("device"), column)
        time__r = merge.whole(rows["time_ms"])
        time__r = time__r - time__r % WIDTH_MS[tier]
        k = self._config.kll_k[1 if tier is Tier.DAY else 0]
        groups = merge.group(rows, dataset.keys, [time__r])
        return merge.merged(rows, dataset, groups, time__r=time__r, k=k)

    def _parts(self, dataset: Dataset, sources: Sequence[FileFacts]) -> Iterator[pa.Table]:
        """Yield all rows, some at a time; rows that merge come together, in the order of files."""
        paths = [each.path for each in sources]
        if sum(each.rows for each in sources) <= self._config.job_rows_max:
            yield self._files.read(dataset, paths)
            return
        key = "device" if sources[0].grain is Grain.DEVICE else "site"
        names = self._files.read(dataset, paths, columns=[key])[key].cast(pa.string())
        counted = pc.value_counts(names.combine_chunks())
        held = sorted(zip(*(each.to_pylist() for each in counted.flatten()), strict=True))
        first, rows = held[0][0], 0
        for i, (name, count) in enumerate(held):
            rows += count
            if i + 1 == len(held) or rows + held[i + 1][1] > self._config.job_rows_max:
                where = (ds.field(key) >= first) & (ds.field(key) <= name)
                yield self._files.read(dataset, paths, where=where)
                first, rows = held[min(i + 1, len(held) - 1)][0], 0


class _Output:
    """One new file and what the manifest will know of it."""

    def __init__(
        self, files: Files, dataset: Dataset, grain: Grain, tier: Tier, model: str, day: str
    ) -> None:
        self._part: PartFile = files.create(dataset, grain, tier, model, day)
        self._dataset, self._grain, self._tier = dataset, grain, tier
        self._model, self._day = model, day
        self._windows = 0
        self._first_ms: int | None = None
        self._last_ms = 0

    def __enter__(self) -> _Output:
        self._part.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._part.__exit__(*exc)

    def write(self, table: pa.Table) -> None:
        """Append rows in the order of files."""
        if not table.num_rows:
            return
        self._part.write(table)
        ends = pc.min_max(table["time_ms"]).as_py()
        first = ends["min"] if self._first_ms is None else min(self._first_ms, ends["min"])
        self._first_ms, self._last_ms = first, max(self._last_ms, ends["max"])
        self._windows += self._windows_in(table)

    def close(self, *, now_ms: int, folded: bool) -> list[FileFacts]:
        """Bring the file to the disk; an empty one does not come to be."""
        size = self._part.close()
        if self._first_ms is None:
            return []
        return [
            FileFacts(
                id=0,
                dataset=self._dataset.name,
                grain=self._grain,
                tier=self._tier,
                model=self._model,
                day=self._day,
                path=self._part.path,
                rows=self._part.rows,
                bytes=size,
                windows=self._windows,
                first_ms=self._first_ms,
                last_ms=self._last_ms,
                created_ms=now_ms,
                folded=folded,
            )
        ]

    def _windows_in(self, table: pa.Table) -> int:
        """Return how many windows rows hold; every window has one row for each feature."""
        windows = merge.whole(table["windows"])
        if "position" in table.column_names:
            windows = windows[merge.whole(table["position"]) == 0]
        return int(windows.sum())
