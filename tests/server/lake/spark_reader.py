"""Runs under Spark's Python, without shoal: what Spark and DataSketches' Java library read.

    python spark_reader.py files FOLDER CODE    the code of docs/lake.md, in the lake's folder
    python spark_reader.py sketches FILE        sketches as base64, JSON lists by kind

Prints one line of JSON, the last one.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession  # type: ignore[import-not-found,unused-ignore]

SHARES = (0.1, 0.5, 0.9)


def session() -> Any:
    """Return a Spark of this process alone, on 127.0.0.1."""
    return (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.memory", "1g")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )


def files(code: str) -> list[list[Any]]:
    """Run the documentation's code and return the rows that it names ``found``."""
    names: dict[str, Any] = {"spark": session()}
    exec(code, names)
    return [list(row) for row in names["found"].collect()]


def sketches(path: Path) -> dict[str, list[Any]]:
    """Return what Java says of sketches."""
    jvm = session()._jvm
    apache = jvm.org.apache.datasketches
    told: dict[str, list[Any]] = {"kll": [], "doubles": [], "hll": [], "frequent": []}
    for kind, blobs in json.loads(path.read_text()).items():
        for text in blobs:
            data = base64.b64decode(text)
            memory = apache.memory.Memory.wrap(data)
            if kind in ("kll", "doubles"):
                of = apache.kll.KllFloatsSketch if kind == "kll" else apache.kll.KllDoublesSketch
                sketch = of.heapify(memory)
                same = bytes(sketch.toByteArray()) == data  # first: an answer may reorder it
                found = [sketch.getQuantile(share) for share in SHARES]
                wide = of.newHeapInstance(200)
                wide.merge(sketch)  # what it cannot merge, it fails on
                wide.merge(sketch)
                told[kind].append([sketch.getN(), found, same, wide.getN()])
            elif kind == "hll":
                told[kind].append(apache.hll.HllSketch.heapify(data).getEstimate())
            else:
                sketch = apache.frequencies.LongsSketch.getInstance(memory)
                no_false = apache.frequencies.ErrorType.NO_FALSE_NEGATIVES
                rows = [
                    [row.getItem(), row.getLowerBound(), row.getUpperBound()]
                    for row in sketch.getFrequentItems(0, no_false)
                ]
                told[kind].append([sketch.getStreamLength(), sorted(rows)])
    return told


def main() -> None:
    """Answer."""
    if sys.argv[1] == "files":
        code = sys.argv[3]
        os.chdir(sys.argv[2])
        print(json.dumps(files(code)))
    else:
        print(json.dumps(sketches(Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
