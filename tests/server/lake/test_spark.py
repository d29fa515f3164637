"""Spark reads the lake, and DataSketches' Java library every sketch: `make test-spark`."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import datasketches
import numpy as np
import pytest

from shoal.ext.frequent import FrequentItems
from shoal.ext.hll import HllSketch
from shoal.ext.kll import read_kll
from shoal.ext.sketch import SketchBank

from .conftest import FEATURES as NAMES
from .conftest import World

SPARK = os.environ.get("SHOAL_SPARK_PYTHON", "")
DOCS = Path(__file__).parents[3] / "docs" / "lake.md"
TIMEOUT_S = 240  # a JVM that starts on a slow machine
pytestmark = pytest.mark.skipif(
    not SPARK,
    reason="SHOAL_SPARK_PYTHON names no python that has pyspark >= 4.1 and a Java >= 17 beside it "
    "(make test-spark): that Spark and Java read the lake was NOT tested",
)


def spark(*arguments: str) -> Any:
    """Return what the reader prints."""
    reader = Path(__file__).with_name("spark_reader.py")
    done = subprocess.run(
        [SPARK, str(reader), *arguments], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_spark_reads_and_merges_what_the_devices_counted(busy: World) -> None:
    """The code of docs/lake.md: counters exactly, merged sketches within what sketches may err."""
    busy.settle()
    found = re.search(r"<!-- spark -->\n```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert found is not None
    rows = spark("files", str(busy.folder), found[1])
    assert {(site, name) for site, name, *_ in rows} == {
        (site, name) for site in ("north", "south") for name in NAMES
    }
    for site, name, n, sketched, median in rows:
        parts = [told.x__nd[:, NAMES.index(name)] for told in busy.told if told.site == site]
        values = np.concatenate(parts)
        values = np.sort(values[~np.isnan(values)])
        assert n == sketched == len(values)
        low, high = np.quantile(values, [0.45, 0.55])
        assert low <= median <= high


def test_java_reads_every_sketch(tmp_path: Path) -> None:
    """Of any size and k, fed, merged and restored: what Java says is what we say."""
    rng = np.random.default_rng(0)
    blobs: dict[str, list[bytes]] = {"kll": [], "doubles": [], "hll": [], "frequent": []}
    for n in (1, 2, 7, 199, 201, 5_000, 100_000):
        for k in (8, 64, 200, 4_000):
            bank = SketchBank(3, k=k, kinds=["float", "double", "integer"])
            x = rng.standard_normal((n, 3))
            x[:, 2] = rng.geometric(0.05, n)
            bank.update(x)
            back = SketchBank.from_bytes(bank.to_bytes())
            merged = SketchBank(3, k=64, kinds=["float", "double", "integer"])
            merged.merge(bank)
            merged.merge(back)
            for each in (bank, back, merged):
                blobs["kll"].append(each.kll_bytes(0))
                blobs["doubles"].append(each.kll_bytes(1))
                blobs["hll"].append(each.hll_bytes(2))
                blobs["frequent"].append(each.frequent_bytes(2))
    path = tmp_path / "sketches.json"
    path.write_text(
        json.dumps(
            {kind: [base64.b64encode(b).decode() for b in all_] for kind, all_ in blobs.items()}
        )
    )
    told = spark("sketches", str(path))
    for kind in ("kll", "doubles"):
        for data, (n, quantiles, same, twice) in zip(blobs[kind], told[kind], strict=True):
            ours = read_kll(data)
            assert (n, twice) == (ours.n, 2 * ours.n)
            want = ours.quantiles([0.1, 0.5, 0.9])
            assert np.array(quantiles, want.dtype).tolist() == want.tolist()
            assert same, "Java writes other bytes than it read"
    for data, estimate in zip(blobs["hll"], told["hll"], strict=True):
        assert estimate == pytest.approx(datasketches.hll_sketch.deserialize(data).get_estimate())
        low, high = HllSketch.from_bytes(data).bounds(0.999)  # by an estimator of our own
        assert low * (1 - 1e-6) <= estimate <= high * (1 + 1e-6)
    for data, (total, rows) in zip(blobs["frequent"], told["frequent"], strict=True):
        ours_items = FrequentItems.from_bytes(data)
        items = ours_items.items(threshold=0, no_false_positives=False)
        assert total == ours_items.total
        assert rows == sorted([list(each) for each in items])
