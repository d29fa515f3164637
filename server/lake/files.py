"""Write, read and remove the Parquet files of the lake; the only file that touches the folder.

    <folder>/<dataset>/grain=<>/tier=<>/model=<12 hex>/day=<YYYY-MM-DD>/part-<random>.parquet

Rule 1: a file has its name only when all of it is on the disk: written beside, synced, renamed,
and the folder synced. Rule 2: a name is never used twice. Rule 3: what is in the folder without
being in the manifest is of a crash, or of a database that was set back: it is set aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .errors import LakeError
from .rules import FileFacts, Grain, Tier
from .schema import DATASETS, Dataset

ROW_GROUP_ROWS: Final = 32_768  # some 20 MB of features: small enough to skip devices
MANIFEST: Final = "manifest.json"
ORPHANS: Final = "orphans"


class Files:
    """The folder of one lake. One writer at a time; any number of readers."""

    def __init__(self, folder: Path) -> None:
        """Take a folder; it is made when the first file is written."""
        self.folder = folder

    def create(self, dataset: Dataset, grain: Grain, tier: Tier, model: str, day: str) -> PartFile:
        """Begin a file; it is nothing until :meth:`PartFile.close`."""
        relative = (
            f"{dataset.name}/grain={grain}/tier={tier}/model={model[:12]}/day={day}/"
            f"part-{secrets.token_hex(8)}.parquet"
        )
        return PartFile(self.folder, relative, dataset)

    def dataset(self, dataset: Dataset, paths: Sequence[str]) -> ds.Dataset:
        """Return files as one dataset to scan; they are opened when it is scanned.

        Raises:
            LakeError: A file is missing or damaged.
        """
        with _refused("read"):
            return ds.dataset(
                [str(self.folder / path) for path in paths],
                schema=dataset.schema,
                format=ds.ParquetFileFormat(
                    default_fragment_scan_options=ds.ParquetFragmentScanOptions(
                        page_checksum_verification=True, pre_buffer=True
                    )
                ),
            )

    def read(
        self,
        dataset: Dataset,
        paths: Sequence[str],
        *,
        columns: Sequence[str] | None = None,
        where: ds.Expression | None = None,
    ) -> pa.Table:
        """Return the rows of files that pass a filter.

        Args:
            dataset: Theirs.
            paths: Under the folder; none gives an empty table.
            columns: What is read; None = all.
            where: Filter; row groups that cannot pass are skipped.

        Raises:
            LakeError: A file is missing or damaged.
        """
        if not paths:
            empty = dataset.schema.empty_table()
            return empty.select(list(columns)) if columns is not None else empty
        with _refused("read"):
            return self.dataset(dataset, paths).to_table(
                columns=None if columns is None else list(columns), filter=where
            )

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""
        for path in paths:
            with _refused("remove"), contextlib.suppress(FileNotFoundError):
                (self.folder / path).unlink()

    def publish(self, files: Iterable[FileFacts]) -> None:
        """Write the manifest for readers that have no access to the database: JSON, one line each.

        Raises:
            LakeError: It could not be written; the one of before is there.
        """
        rows = [
            json.dumps(
                {
                    "dataset": each.dataset,
                    "grain": each.grain,
                    "tier": each.tier,
                    "model": each.model,
                    "day": each.day,
                    "path": each.path,
                    "rows": each.rows,
                    "windows": each.windows,
                    "first_ms": each.first_ms,
                    "last_ms": each.last_ms,
                    "folded": each.folded,
                }
            )
            for each in files
        ]
        with _refused("publish"):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{MANIFEST}.tmp"
            with temporary.open("w", encoding="utf-8") as file:
                file.write("".join(f"{row}\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / MANIFEST)
            _sync_folder(self.folder)

    def sweep(self, known: Collection[str], *, before_s: float) -> int:
        """Set files aside that the manifest does not know; call it before anything is written.

        Args:
            known: Paths of the manifest, retired ones too.
            before_s: Files that were set aside before this time, Unix s, are removed.

        Returns:
            How many were set aside; half-written ones are removed instead.
        """
        aside = self.folder / ORPHANS
        count = 0
        with _refused("sweep"):
            for name in DATASETS:
                for found in sorted((self.folder / name).rglob("*")):
                    if found.suffix == ".tmp":
                        found.unlink()
                    elif found.suffix == ".parquet":
                        relative = found.relative_to(self.folder).as_posix()
                        if relative not in known:
                            aside.mkdir(exist_ok=True)
                            os.utime(found)
                            found.rename(aside / relative.replace("/", "."))
                            count += 1
            for old in sorted(aside.glob("*.parquet")):
                if old.stat().st_mtime < before_s:
                    old.unlink()
        return count


class PartFile:
    """One file while it is written. Use it in a ``with``: left without ``close`` it is removed."""

    def __init__(self, folder: Path, path: str, dataset: Dataset) -> None:
        """Name the file; nothing is opened before the first rows."""
        self.path = path
        """Under the folder."""
        self.rows = 0
        self._dataset, self._folder = dataset, folder
        self._final = folder / path
        self._temporary = self._final.with_suffix(".tmp")
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._temporary.unlink(missing_ok=True)

    def write(self, table: pa.Table) -> None:
        """Append rows, which are in the order of the dataset.

        Raises:
            LakeError: The disk refused; the file is nothing.
        """
        if not table.num_rows:
            return
        with _refused("write"):
            if self._writer is None:
                _make_folder(self._final.parent, self._folder)
                self._writer = pq.ParquetWriter(
                    self._temporary,
                    self._dataset.schema,
                    compression=_compressions(self._dataset),
                    use_dictionary=_dictionaries(self._dataset),
                    write_statistics=_statistics(self._dataset),
                    write_page_checksum=True,
                )
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            self.rows += table.num_rows

    def close(self) -> int:
        """Bring the file to the disk under its name.

        Returns:
            Its bytes; 0 if no row was written, and then there is no file.

        Raises:
            LakeError: The disk refused; there is no file of this name.
        """
        if self._writer is None:
            return 0
        with _refused("write"):
            writer, self._writer = self._writer, None
            writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.replace(self._final)
            _sync_folder(self._final.parent)
            return self._final.stat().st_size


def _compressions(dataset: Dataset) -> dict[str, str]:
    """Return how to compress columns: sketches shrink by a sixth, which is too slow."""
    names = [path for each in dataset.schema for path in _leaves(each)]
    return {name: "none" if name in ("kll", "hll", "frequent") else "zstd" for name in names}


def _leaves(field: pa.Field) -> list[str]:
    return [f"{field.name}.list.element"] if pa.types.is_list(field.type) else [field.name]


def _dictionaries(dataset: Dataset) -> list[str]:
    return [each.name for each in dataset.schema if pa.types.is_dictionary(each.type)] + ["stream"]


def _statistics(dataset: Dataset) -> list[str]:
    """Return the columns that readers filter by; bounds of sketches and lists are waste."""
    wanted = (*dataset.keys, "time_ms", "number", "stream", "n", "minimum", "maximum")
    return [each.name for each in dataset.schema if each.name in wanted]


def _make_folder(folder: Path, root: Path) -> None:
    """Make a folder so that it survives a power cut: its name is in its parent, on the disk."""
    if folder.is_dir():
        return
    if folder != root:
        _make_folder(folder.parent, root)
    folder.mkdir(parents=folder == root, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _refused(verb: str) -> Any:
    try:
        yield
    except (OSError, pa.ArrowException) as exc:
        raise LakeError(
            f"the lake could not {verb} a file: {exc!s:.300}",
            hint="check the disk; nothing is lost, the next try begins anew",
        ) from exc
