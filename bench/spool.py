"""Time the spool against SQLite (WAL, synchronous FULL) keeping the same records in the same run.

    python bench/spool.py [--json FILE] [--repeats 5]

A record is an event of about 1 KB. Both sides make it durable after every 1, 100 or 1000 records;
spool and SQLite take turns in one folder, so that other load on the disk hits both. Records that
were kept are counted on both sides after each turn. Besides records per second of wall time,
which is the disk's, there are records per second of this process's CPU time, which is ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

from shoal.agent.spool import Spool, SpoolConfig, read_totals
from shoal.proto.records import Kind, Record, encode_record

BODY = {"name": "bench", "severity": "info", "text": "t" * 900, "data": {"value": 1.5}}
COUNTS = {1: 200, 100: 5_000, 1000: 20_000}  # records per batch size: a second or so each


def spool_work(folder: Path, batch: int, count: int) -> Callable[[], int]:
    """Append and flush; return what counts the records that were kept."""
    config = SpoolConfig(flush_records=batch)
    spool = Spool(folder, config=config, clock=lambda: 1_764_072_000_000)
    spool.open()
    for _ in range(count):
        spool.append(Kind.EVENT, BODY)
    spool.close()
    return lambda: read_totals(folder)[0].spooled


def sqlite_work(folder: Path, batch: int, count: int) -> Callable[[], int]:
    """Encode the same records and insert them, one transaction per batch; as above."""
    folder.mkdir()
    base = sqlite3.connect(folder / "spool.db", isolation_level=None)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=FULL")
    base.execute("CREATE TABLE record (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    for start in range(1, count + 1, batch):
        base.execute("BEGIN")
        for seq in range(start, start + batch):
            payload = encode_record(Record(seq, Kind.EVENT, 1_764_072_000_000, BODY))
            base.execute("INSERT INTO record VALUES (?, ?)", (seq, payload))
        base.execute("COMMIT")
    base.close()

    def kept() -> int:
        with contextlib.closing(sqlite3.connect(folder / "spool.db")) as again:
            (found,) = again.execute("SELECT count(*) FROM record").fetchone()
            return int(found)

    return kept


Work = Callable[[Path, int, int], Callable[[], int]]


def rates(work: Work, batch: int, count: int) -> tuple[float, float]:
    """Return records per second of wall time and of CPU time."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=Path.cwd()) as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        kept = work(Path(folder) / "spool", batch, count)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert kept() == count
        return count / wall, count / cpu


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    return dict(zip(("low", "median", "high"), quantiles(values, n=4), strict=True))


def measure(batch: int, count: int, repeats: int) -> dict[str, Any]:
    """Time both in turns."""
    found: dict[str, list[tuple[float, float]]] = {"spool": [], "sqlite": []}
    for _ in range(repeats):
        found["spool"].append(rates(spool_work, batch, count))
        found["sqlite"].append(rates(sqlite_work, batch, count))
    row: dict[str, Any] = {"batch": batch, "records": count}
    for name, pairs in found.items():
        row[f"{name}_per_s"] = spread([wall for wall, _ in pairs])
        row[f"{name}_per_cpu_s"] = spread([cpu for _, cpu in pairs])
    row["ratio"] = row["spool_per_s"]["median"] / row["sqlite_per_s"]["median"]
    row["ratio_cpu"] = row["spool_per_cpu_s"]["median"] / row["sqlite_per_cpu_s"]["median"]
    return row


def text(values: dict[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{values['median']:>8,.0f} ({values['low']:,.0f}-{values['high']:,.0f})"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    rows = []
    for batch, count in COUNTS.items():
        row = measure(batch, count, arguments.repeats)
        rows.append(row)
        print(f"batch {batch}, {count} records, median (quartiles) of {arguments.repeats}:")
        for unit, ratio in (("per_s", "ratio"), ("per_cpu_s", "ratio_cpu")):
            ours, peer = text(row[f"spool_{unit}"]), text(row[f"sqlite_{unit}"])
            print(f"  records {unit:9}  spool {ours}  SQLite {peer}  ratio {row[ratio]:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
