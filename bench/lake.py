"""Time the lake: export and folding of windows, and the fleet query, beside DuckDB in the same run.

    python bench/lake.py [--devices 10000] [--features 20] [--repeats 5] [--json FILE]

Two parts, in a folder that is removed afterwards:

1. A sample of 100 devices of one site sends an hour of five-minute windows through the database,
   the export and the fold. Seconds per million rows of ``features``, as wall time and CPU time.
2. The lake of a whole fleet, at its real size: the sample's own files of each tier are written
   again for every hundred devices, each with sketches of its own (every value scaled by a factor
   near 1, so that nothing compresses better than it would), for 24 hours, the hour that is not
   folded yet and the windows that are not exported yet. Then ``drift_table`` by site over the past
   24 hours: merge of bins, moments and KLL sketches, quantiles with bounds, distances. DuckDB
   merges bins and counts of the same files alone, in SQL, with as many threads. Both must count
   the same values of each site and feature.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.ext.sketch import SketchBank
from shoal.server.drift import profile as profiles
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.lake import Lake, LakeConfig, manifest
from shoal.server.lake.files import Files
from shoal.server.lake.rules import HOUR_MS, STEP_MS, FileFacts, Grain, Tier, day_name, floor
from shoal.server.lake.schema import FEATURES
from shoal.server.store import Store
from shoal.server.store.tables import Device, Model, Stream, Window

MODEL = "ab" * 32
SAMPLE = 100  # devices of one site, of three hardware classes
START_MS = 1_764_028_800_000 + 9 * HOUR_MS
NOW_MS = START_MS + HOUR_MS + 37 * 60_000  # neither an hour nor a day begins here
ROWS = 300  # values per feature and window: one a second


def sample(store: Store, profile: ReferenceProfile, devices: int) -> int:
    """Store an hour of windows of some devices; return how many."""
    rng = np.random.default_rng(1)
    edges = [np.array(each.edges, np.float32) for each in profile.features]
    with store.begin() as session:
        raw = json.loads(profile.to_json())
        session.add(
            Model(name="m", version=1, sha256=MODEL, size=1, created_ms=1, manifest={}, profile=raw)
        )
        for i in range(devices):
            device = Device(name=f"d-{i}", site="s-0", hardware=f"hw-{i % 3}", created_ms=1)
            session.add(device)
            session.flush()
            stream = Stream(device_id=device.id, stream=f"{i:016}".encode(), first_ms=1)
            session.add(stream)
            session.flush()
            for number in range(12):
                bank = SketchBank(len(edges), k=64, edges=edges)
                bank.update(rng.normal(0, 1, (ROWS, len(edges))).astype(np.float32))
                begin_ms = START_MS + number * STEP_MS
                session.add(window(device, stream, number, begin_ms, bank.to_bytes()))
    return devices * 12


def window(device: Device, stream: Stream, number: int, begin_ms: int, sketch: bytes) -> Window:
    """Return one window's row."""
    return Window(
        device_id=device.id, stream_id=stream.id, model_sha256=MODEL, number=number,
        device_start_ms=begin_ms, device_end_ms=begin_ms + STEP_MS, received_ms=begin_ms + STEP_MS,
        predictions=ROWS, errors=0, classes=[100, 200], latency_us=[0, 200, 100], sketch=sketch,
    )  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds of some work; the machine may have other work to do."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Fleet:
    """Writes the lake of a fleet from the files of a sample."""

    def __init__(self, store: Store, files: Files, sites: int) -> None:
        self._store, self._files, self._sites = store, files, sites
        self._rng = np.random.default_rng(2)

    def write(self, rows: pa.Table, like: FileFacts, moved_ms: int, *, folded: bool) -> FileFacts:
        """Write the rows of one site for all sites, moved in time, as one file."""
        day = day_name(like.first_ms + moved_ms)
        with self._files.create(FEATURES, like.grain, like.tier, MODEL, day) as part:
            sites = [self._of(rows, site, moved_ms) for site in range(self._sites)]
            part.write(pa.concat_tables(sites).unify_dictionaries().combine_chunks())
            size = part.close()
        facts = dataclasses.replace(
            like, day=day, path=part.path, rows=part.rows, bytes=size, folded=folded,
            windows=like.windows * self._sites,
            first_ms=like.first_ms + moved_ms, last_ms=like.last_ms + moved_ms,
        )  # fmt: skip
        with self._store.begin() as session:
            manifest.add(session, [facts])
        return facts

    def _of(self, rows: pa.Table, site: int, moved_ms: int) -> pa.Table:
        names = pa.array([f"s-{site:04}"]).dictionary_encode()
        column = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(rows.num_rows, np.int32)), names.dictionary
        )
        times = pa.array(rows["time_ms"].to_numpy() + moved_ms)
        factors = self._rng.uniform(0.97, 1.03, rows.num_rows).astype(np.float32)
        blobs = [scaled(b, f) for b, f in zip(rows["kll"].to_pylist(), factors, strict=True)]
        for name, new in (("site", column), ("time_ms", times), ("kll", pa.array(blobs))):
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, FEATURES.schema.field(name), new)
        return rows


def scaled(blob: bytes, factor: np.float32) -> bytes:
    """Return a KLL sketch of floats with every value scaled."""
    head = 20 + 4 * blob[18]
    return blob[:head] + (np.frombuffer(blob, "<f4", offset=head) * factor).tobytes()


def build(store: Store, files: Files, sites: int, features: int) -> dict[str, Any]:
    """Write 24 folded hours, the fine files at both ends and the windows that wait."""
    with store.read() as session:
        parts = {
            (each.grain, each.tier): each for each in manifest.live(session, dataset="features")
        }
    with store.begin() as session:
        manifest.retire(session, manifest.live(session), now_ms=NOW_MS)
    hour, fine = parts[Grain.COHORT, Tier.HOUR], parts[Grain.COHORT, Tier.FINE]
    single = parts[Grain.DEVICE, Tier.FINE]
    fleet = Fleet(store, files, sites)
    tables = {each.path: pq.read_table(files.folder / each.path) for each in (hour, fine, single)}
    tables = {path: table.cast(FEATURES.schema) for path, table in tables.items()}
    facts = [
        fleet.write(tables[hour.path], hour, -back * HOUR_MS, folded=False) for back in range(24)
    ]
    # The present hour is not folded: as it is after compaction, and as small exports leave it.
    facts.append(fleet.write(tables[fine.path], fine, HOUR_MS, folded=False))
    few = tables[single.path].filter(pc.field("number") == 0).slice(0, 2 * features)
    nobody = pa.array([""] * few.num_rows).dictionary_encode()
    few = few.set_column(1, FEATURES.schema.field("device"), nobody)
    like = dataclasses.replace(fine, windows=2)
    for _ in range(16):
        facts.append(fleet.write(few, like, HOUR_MS, folded=False))
    facts.append(fleet.write(tables[fine.path], fine, -23 * HOUR_MS, folded=True))
    waiting = LakeConfig().export_rows_min - 1
    with store.begin() as session:
        some = session.query(Window).limit(1).one()
        device, stream = (
            session.get_one(Device, some.device_id),
            session.get_one(Stream, some.stream_id),
        )
        sketch = some.sketch
        for i in range(waiting):
            session.add(window(device, stream, 100 + i, NOW_MS - STEP_MS - i, sketch))
    return {
        "files": len(facts),
        "rows": sum(each.rows for each in facts),
        "bytes": sum(each.bytes for each in facts),
        "waiting_windows": waiting,
        "bytes_per_row": {
            f"{grain}/{tier}": each.bytes / each.rows for (grain, tier), each in parts.items()
        },
        "paths": [str(files.folder / each.path) for each in facts],
    }


SQL = """
WITH wide AS (
    SELECT site, feature, n, nulls, bins, generate_subscripts(bins, 1) AS bin
    FROM read_parquet($paths) WHERE time_ms >= $since AND time_ms < $until)
SELECT site, feature, bin, sum(bins[bin]), sum(nulls) FROM wide GROUP BY ALL
"""


WHAT = {
    "query": "counters, bins, moments, 9 distances and tests, 3 quantiles with bounds "
    "from KLL, of {groups} sites × features",
    "duckdb": "bins and nulls alone, of the files alone",
}


def check(ours: list[dict[str, Any]], theirs: list[tuple[Any, ...]], waiting_site: str) -> None:
    """Compare the values that both counted of each site and feature.

    Raises:
        SystemExit: They differ.
    """
    counted: dict[tuple[str, str], int] = {}
    for site, feature, _, count, _ in theirs:
        counted[site, feature] = counted.get((site, feature), 0) + int(count)
    held = {
        (row["group"], row["feature"]): row["n"] for row in ours if row["group"] != waiting_site
    }
    if held != counted:
        raise SystemExit("the lake and DuckDB do not count the same values")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000, help="in whole hundreds")
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    rng = np.random.default_rng(0)
    profile = profiles.build(
        rng.normal(0, 1, (400, arguments.features - 1, 8)).astype(np.float32),
        rng.random(400).astype(np.float32),
        np.ones(400, np.bool_),
        np.zeros(400, np.int64),
        np.arange(400) % 2 == 0,
        channels=[f"channel-{i}" for i in range(arguments.features - 1)],
    )
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(f"sqlite:///{folder}/fleet.db")
        store.migrate()
        now = [NOW_MS]
        config = LakeConfig(export_s=1e9)
        lake = Lake(store, folder / "lake", clock=lambda: now[0], config=config)
        windows = sample(store, profile, SAMPLE)
        million = windows * arguments.features / 1e6
        for what, work in (("export", lambda: lake.export(at_once=True)), ("fold", lake.fold)):
            wall, cpu = timed(work)
            if what == "fold":
                now[0] += 2 * HOUR_MS
                wall, cpu = timed(lambda: [None for _ in iter(lake.fold, False)])
            figures[what] = {"s_per_million_rows": wall / million, "cpu_s": cpu / million}
            print(f"{what:7} {wall / million:8.1f} s ({cpu / million:.1f} s CPU) per million rows")
        now[0] = NOW_MS
        facts = build(
            store, Files(folder / "lake"), arguments.devices // SAMPLE, arguments.features
        )
        paths = facts.pop("paths")
        print(
            f"fleet   {arguments.devices} devices: {facts['rows']} rows of cohorts, "
            f"{facts['bytes'] / 1e6:.0f} MB, {facts['waiting_windows']} windows not exported"
        )
        sizes = ", ".join(f"{key} {size:.0f}" for key, size in facts["bytes_per_row"].items())
        print(f"        bytes per row: {sizes}")
        since, until = floor(NOW_MS - 24 * HOUR_MS, STEP_MS), NOW_MS  # as it is answered
        ours, theirs = [], []
        with duckdb.connect(config={"threads": os.cpu_count() or 1}) as db:

            def query() -> list[dict[str, Any]]:
                return lake.history.drift_table(MODEL, "site", since, until, profile)

            def bins() -> list[tuple[Any, ...]]:
                asked = {"paths": paths, "since": since, "until": until}
                found: list[tuple[Any, ...]] = db.execute(SQL, asked).fetchall()
                return found

            lake.export()  # a tick of the worker: it reads what waits, and leaves it there
            rows = query()
            figures["groups"] = len(rows)
            check(rows, bins(), "s-0")  # the windows that wait are of a site of their own
            for _ in range(arguments.repeats):
                ours.append(timed(query))
                theirs.append(timed(bins))
        store.close()
    figures |= facts | {"devices": arguments.devices}
    for name, times in (("query", ours), ("duckdb", theirs)):
        walls, cpus = zip(*times, strict=True)
        figures[name] = {"s": median(walls), "s_min": min(walls), "cpu_s": median(cpus)}
        print(
            f"{name:7} {median(walls):.2f} s (best {min(walls):.2f}), {median(cpus):.2f} s CPU: "
            + WHAT[name].format(groups=figures["groups"])
        )
    print(f"ratio   {figures['duckdb']['s'] / figures['query']['s']:.2f} (DuckDB / shoal)")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
