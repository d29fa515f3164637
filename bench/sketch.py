"""Time SketchBank against NumPy doing the same work in the same run.

    python bench/sketch.py [--json FILE] [--repeats 15] [--edges 31]

Each figure is the median over repeats, bank and NumPy taking turns, with the quartiles beside it;
NumPy makes a histogram, mean, variance, minimum, maximum and null count for each feature. The
counts of both are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.ext import _sketch
from shoal.ext.sketch import SketchBank

Deed = Callable[[], object]


def numpy_work(x__nd: NDArray[Any], bins: list[NDArray[Any]]) -> list[NDArray[np.int64]]:
    """Do with NumPy what one update of a bank does; return the counts of each feature."""
    null__nd = np.isnan(x__nd)
    null__nd.sum(axis=0)
    x__nd.mean(axis=0), x__nd.var(axis=0), x__nd.min(axis=0), x__nd.max(axis=0)
    return [np.histogram(x__nd[:, i], edges)[0] for i, edges in enumerate(bins)]


def time_ns(deed: Deed, loops: int) -> float:
    """Return the mean CPU time of one deed over some loops, in ns: other load waits outside."""
    begin = time.thread_time_ns()
    for _ in range(loops):
        deed()
    return (time.thread_time_ns() - begin) / loops


def loops_for(deed: Deed, target_ns: float = 2e7) -> int:
    """Return how many deeds take about 20 ms: long against the clock and the scheduler's tick."""
    return max(1, int(target_ns / max(time_ns(deed, 1), 1.0)))


def measure(ours: Deed, peer: Deed, values: int, repeats: int) -> dict[str, Any]:
    """Time two deeds in turns; return ns per value with quartiles, and the ratio of medians."""
    ours(), peer()
    loops_ours, loops_peer = loops_for(ours), loops_for(peer)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(time_ns(ours, loops_ours) / values)
        times[1].append(time_ns(peer, loops_peer) / values)
    rows = [dict(zip(("low", "median", "high"), quantiles(row, n=4), strict=True)) for row in times]
    return {
        "bank_ns_per_value": rows[0],
        "numpy_ns_per_value": rows[1],
        "ratio": rows[1]["median"] / rows[0]["median"],
    }


def cases(edges: int, repeats: int) -> list[dict[str, Any]]:
    """Measure each shape of input."""
    rng = np.random.default_rng(0)
    batch__nd = rng.standard_normal((100_000, 20), np.float32)
    window__bct = rng.standard_normal((1, 6, 100), np.float32)
    inputs: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("batch 100,000 x 20 float32", batch__nd, batch__nd),
        ("batch 100,000 x 20 float64", batch__nd.astype(np.float64), batch__nd),
        ("window 1 x 6 x 100 float32", window__bct, window__bct[0].T),
        ("rows 1 x 20 float32", batch__nd[0].copy(), batch__nd[:1]),
    ]
    found = []
    for name, x, x__nd in inputs:
        features = x__nd.shape[1]
        inner = [np.sort(rng.standard_normal(edges, np.float32)) for _ in range(features)]
        bins = [np.array([-np.inf, *each, np.inf]) for each in inner]
        bank = SketchBank(features, edges=inner)
        update = {1: bank.update_row, 2: bank.update, 3: bank.update_channels}[x.ndim]
        update(x)
        for i, want in enumerate(numpy_work(x__nd, bins)):
            assert bank.counts(i).tolist() == want.tolist(), f"{name}: feature {i} differs"

        def ours(update: Callable[[Any], None] = update, x: NDArray[Any] = x) -> None:
            update(x)

        def peer(x__nd: NDArray[Any] = x__nd, bins: list[NDArray[Any]] = bins) -> None:
            numpy_work(x__nd, bins)

        found.append({"input": name, "values": x.size, **measure(ours, peer, x.size, repeats)})
    return found


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_1min": os.getloadavg()[0],
        "variants": list(_sketch.variants()),
    }


def main() -> None:
    """Print the table; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=15, help="timings of each figure")
    parser.add_argument("--edges", type=int, default=31, help="edges of each feature")
    options = parser.parse_args()
    here = machine()
    print("  ".join(f"{name}: {value}" for name, value in here.items()))
    print(f"{options.edges} edges and moments per feature, {options.repeats} repeats, one thread")
    print(f"{'variant':<9}{'input':<28}{'bank ns/value':>24}{'NumPy ns/value':>34}{'ratio':>8}")
    report: dict[str, Any] = {"machine": here, "edges": options.edges, "results": []}
    for variant in _sketch.variants():
        _sketch.use_variant(variant)
        for case in cases(options.edges, options.repeats):
            report["results"].append({"variant": variant, **case})
            cells = [
                f"{row['median']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
                for row in (case["bank_ns_per_value"], case["numpy_ns_per_value"])
            ]
            print(
                f"{variant:<9}{case['input']:<28}{cells[0]:>24}{cells[1]:>34}{case['ratio']:>7.1f}x"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
