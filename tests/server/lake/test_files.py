"""Any reader of Parquet reads the lake, and the SQL of docs/lake.md is what it says it is."""

from __future__ import annotations

import re
from pathlib import Path

import datasketches
import duckdb
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from shoal.ext.kll import read_kll
from shoal.server.lake import manifest
from shoal.server.lake.errors import LakeError
from shoal.server.lake.files import Files
from shoal.server.lake.rules import Grain, Tier
from shoal.server.lake.schema import FEATURES, WINDOWS

from .conftest import FEATURES as NAMES
from .conftest import World

DOCS = Path(__file__).parents[3] / "docs" / "lake.md"


def sql(name: str) -> str:
    """Return a marked block of SQL of the documentation."""
    found = re.search(rf"<!-- {name} -->\n```sql\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def settled(busy: World) -> World:
    """The busy world with every window in the lake."""
    busy.settle()
    return busy


def test_duckdb_reads_what_the_devices_counted(settled: World) -> None:
    """The manifest's live files, at the finest tier of each window, without a line of ours."""
    with duckdb.connect() as db:
        db.execute(f"SET file_search_path = '{settled.folder}'")
        db.execute(sql("files"))
        rows = db.execute(sql("bins")).fetchall()
        got = {(site, feature): bins for site, feature, _, bins in rows}
        counted = {(site, feature): n for site, feature, n, _ in rows}
        accuracy = dict(db.execute(sql("accuracy")).fetchall())
    for site in ("north", "south"):
        members = [each for each in settled.told if each.site == site]
        for i, name in enumerate(NAMES):
            values = np.concatenate([each.x__nd[:, i] for each in members])
            values = values[~np.isnan(values)]
            edges = np.array(settled.profile.features[i].edges, np.float32)
            where = np.searchsorted(edges, values, side="right")
            assert got[site, name] == np.bincount(where, minlength=len(edges) + 1).tolist()
            assert counted[site, name] == len(values)
        told = [each.confusion for each in members if each.confusion]
        right = sum(each[0] + each[3] for each in told)
        assert accuracy[site] == pytest.approx(right / sum(map(sum, told)))


def test_kll_bytes_are_read_by_the_library(settled: World) -> None:
    """Sketches of every tier and grain say what they counted, to C++ as to us."""
    seen = set()
    for path in settled.folder.glob("features/**/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            theirs = datasketches.kll_floats_sketch.deserialize(row["kll"])
            ours = read_kll(row["kll"])
            assert theirs.n == ours.n == row["n"]
            assert theirs.get_min_value() == row["minimum"]
            assert theirs.get_max_value() == row["maximum"]
            assert row["kll_variance"] >= 0
        seen.add(tuple(part for part in path.parts if part.startswith(("grain=", "tier="))))
    assert len(seen) == 6


def test_hive_partitions_are_columns(settled: World) -> None:
    """Tools that know folders like these skip what is not asked for."""
    found = ds.dataset(settled.folder / "features", format="parquet", partitioning="hive").to_table(
        filter=(ds.field("grain") == "device") & (ds.field("tier") == "day")
    )
    assert {"model", "day", "grain", "tier", "kll"} <= set(found.column_names)
    assert set(found["device"].to_pylist()) == {"dev-0", "dev-1", "dev-2", "dev-3"}


def test_rows_of_a_device_are_together(settled: World) -> None:
    """Files are sorted by device, then feature, then time: a reader skips the rest."""
    with settled.store.read() as session:
        files = manifest.live(session, dataset="features", grain=Grain.DEVICE)
    for each in files:
        rows = pq.read_table(settled.folder / each.path).to_pylist()
        keys = [
            (r["device"], r["site"], r["hardware"], r["slice"], r["feature"], r["time_ms"])
            for r in rows
        ]
        assert keys == sorted(keys)
        assert len(rows) == each.rows
        assert {r["time_ms"] for r in rows} >= {each.first_ms, each.last_ms}
        if each.tier is not Tier.FINE:
            assert len(set(keys)) == len(keys)


def test_a_file_is_nothing_until_it_is_whole(tmp_path: Path) -> None:
    """A file left half-way leaves no trace under its name, and an empty one none at all."""
    files = Files(tmp_path)
    table = WINDOWS.schema.empty_table()
    with files.create(WINDOWS, Grain.DEVICE, Tier.FINE, "ab" * 32, "2025-01-01") as part:
        part.write(table)
        assert part.close() == 0
    row = {each.name: None for each in FEATURES.schema}
    rows = FEATURES.schema.empty_table().from_pylist([row], FEATURES.schema)
    with (
        pytest.raises(RuntimeError),
        files.create(FEATURES, Grain.DEVICE, Tier.FINE, "ab" * 32, "2025-01-01") as part,
    ):
        part.write(rows)
        raise RuntimeError
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_a_damaged_file_is_a_clear_error(settled: World) -> None:
    """A flipped byte is found by the page's checksum; a missing file is named."""
    files = Files(settled.folder)
    with settled.store.read() as session:
        one = manifest.live(session, dataset="features")[0]
    path = settled.folder / one.path
    whole = bytearray(path.read_bytes())
    at = next(
        column.data_page_offset + column.total_compressed_size // 2
        for column in (
            pq.read_metadata(path).row_group(0).column(i)
            for i in range(pq.read_metadata(path).num_columns)
        )
        if column.path_in_schema == "kll"
    )
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(LakeError, match="could not read"):
        files.read(FEATURES, [one.path])
    path.unlink()
    with pytest.raises(LakeError, match="could not read"):
        files.read(FEATURES, [one.path])
