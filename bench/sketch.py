"""Time SketchBank against Apache DataSketches and NumPy doing the same work in the same run.

    python bench/sketch.py [--json FILE] [--repeats 15] [--edges 31]

Update: a running bank (500,000 rows seen) against ``vector_of_kll_floats_sketches`` of the same k,
both fed the same matrix in turns; beside it NumPy's histogram, mean, variance, minimum, maximum and
null count of each feature, which the bank does as well. Single rows: the cost within a fused step
is that of rows put by and sorted together, the cost through Python includes the call. Merge: the
sketches of a fleet. Distinct values and frequent items: one dict of rows each.

Each figure is the median over repeats in CPU time, the rivals taking turns, with quartiles. What is
counted is compared before anything is timed. Memory and bytes on the wire stand below.
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

import _distinct
import _merge
import numpy as np
from datasketches import vector_of_kll_floats_sketches
from numpy.typing import NDArray

from shoal.ext import _sketch
from shoal.ext.sketch import SketchBank

Deed = Callable[[], object]
ROWS, FEATURES, K = 100_000, 20, 200
PUT_BY = 128  # rows of a call that are copied and sorted later, as a fused step's rows are
SEEN = 5  # times ROWS before anything is timed: a fresh library sketch is nearly twice as fast


def numpy_work(x__nd: NDArray[Any], bins: list[NDArray[Any]]) -> list[NDArray[np.int64]]:
    """Do with NumPy what one update of a bank does beside its sketches; return the counts."""
    np.isnan(x__nd).sum(axis=0)
    x__nd.mean(axis=0), x__nd.var(axis=0), x__nd.min(axis=0), x__nd.max(axis=0)
    return [np.histogram(x__nd[:, i], edges)[0] for i, edges in enumerate(bins)]


def time_ns(deed: Deed, loops: int) -> float:
    """Return the mean CPU time of one deed over some loops, in ns: other load waits outside."""
    begin = time.thread_time_ns()
    for _ in range(loops):
        deed()
    return (time.thread_time_ns() - begin) / loops


def in_turns(deeds: list[tuple[Deed, int]], values: int, repeats: int) -> list[dict[str, float]]:
    """Time (deed, loops) in turns; return ns per value with quartiles for each."""
    times: list[list[float]] = [[] for _ in deeds]
    for deed, _ in deeds:
        deed()
    for _ in range(repeats):
        for row, (deed, loops) in zip(times, deeds, strict=True):
            row.append(time_ns(deed, loops) / values)
    names = ("low", "median", "high")
    return [dict(zip(names, quantiles(row, n=4), strict=True)) for row in times]


def running(x__nd: NDArray[Any], edges: list[NDArray[np.float32]] | None) -> SketchBank:
    """Return a bank that has seen enough."""
    bank = SketchBank(x__nd.shape[1], k=K, edges=edges)
    for _ in range(SEEN):
        bank.update(x__nd)
    return bank


def batches(edges_n: int, repeats: int) -> list[dict[str, Any]]:
    """Time updates of a whole matrix and of single rows in one variant of the kernel."""
    rng = np.random.default_rng(0)
    x__nd = rng.standard_normal((ROWS, FEATURES), np.float32)
    edges = [np.sort(rng.standard_normal(edges_n, np.float32)) for _ in range(FEATURES)]
    bins = [np.array([-np.inf, *each, np.inf]) for each in edges]
    once = SketchBank(FEATURES, edges=edges)
    once.update(x__nd)
    for i, want in enumerate(numpy_work(x__nd, bins)):
        assert once.counts(i).tolist() == want.tolist(), f"feature {i} differs"
    library = vector_of_kll_floats_sketches(K, FEATURES)
    for _ in range(SEEN):
        library.update(x__nd)
    plain, full = running(x__nd, None), running(x__nd, edges)
    wide__nd, row__d = x__nd.astype(np.float64), x__nd[0].copy()
    found = []

    def add(name: str, values: int, deeds: list[tuple[Deed, int]], peer: str) -> None:
        ours, theirs = in_turns(deeds, values, repeats)
        ratio = theirs["median"] / ours["median"]
        found.append({"input": name, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ratio})

    whole = x__nd.size
    add(
        "KLL, moments",
        whole,
        [(lambda: plain.update(x__nd), 4), (lambda: library.update(x__nd), 1)],
        "KLL",
    )
    add(
        "KLL, moments, bins",
        whole,
        [(lambda: full.update(x__nd), 4), (lambda: library.update(x__nd), 1)],
        "KLL",
    )
    add(
        "… of float64",
        whole,
        [(lambda: full.update(wide__nd), 4), (lambda: library.update(wide__nd), 1)],
        "KLL",
    )
    add(
        "bins, moments, KLL",
        whole,
        [(lambda: full.update(x__nd), 4), (lambda: numpy_work(x__nd, bins), 1)],
        "NumPy",
    )
    part__nd = np.ascontiguousarray(x__nd[:1000])
    add(
        "1,000 rows",
        part__nd.size,
        [(lambda: full.update(part__nd), 100), (lambda: library.update(part__nd), 20)],
        "KLL",
    )
    some__nd = np.ascontiguousarray(x__nd[:PUT_BY])
    add(
        "one row, no call",
        PUT_BY,
        [(lambda: full.update(some__nd), 400), (lambda: library.update(some__nd), 100)],
        "KLL",
    )
    add(
        "one row, Python call",
        1,
        [(lambda: full.update_row(row__d), 20_000), (lambda: library.update(row__d), 2000)],
        "KLL",
    )
    return found


def sizes(edges_n: int) -> dict[str, float]:
    """Return the memory and the bytes of a running bank, per feature."""
    rng = np.random.default_rng(1)
    edges = [np.sort(rng.standard_normal(edges_n, np.float32)) for _ in range(FEATURES)]
    bank = running(rng.standard_normal((ROWS, FEATURES), np.float32), edges)
    bank.update_row(np.zeros(FEATURES, np.float32))
    return {
        "memory_bytes": bank.memory_bytes,
        "record_bytes": len(bank.to_bytes()) / FEATURES,
        "kll_bytes": len(bank.kll_bytes(0)),
    }


def our_maker(k: int) -> _merge.Maker:
    """Return a maker of device sketches by SketchBank."""

    def make(values__n: NDArray[np.float32]) -> tuple[bytes, float | None]:
        bank = SketchBank(1, k=k)
        bank.update(values__n.reshape(-1, 1))
        return bank.kll_bytes(0), bank.variance_certificate(0)

    return make


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
    """Print the tables; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=15, help="timings of each figure")
    parser.add_argument("--edges", type=int, default=31, help="edges of each feature")
    options = parser.parse_args()
    here = machine()
    print("  ".join(f"{name}: {value}" for name, value in here.items()))
    print(
        f"\n{ROWS:,} x {FEATURES} float32, k {K}, {options.edges} edges; {options.repeats} repeats"
    )
    print(f"{'variant':<9}{'work':<22}{'SketchBank ns':>24}{'peer':>7}{'peer ns':>26}{'ratio':>8}")
    report: dict[str, Any] = {"machine": here, "edges": options.edges, "updates": []}
    for variant in _sketch.variants():
        _sketch.use_variant(variant)
        for case in batches(options.edges, options.repeats):
            report["updates"].append({"variant": variant, **case})
            cells = [
                f"{row['median']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
                for row in (case["ours"], case["theirs"])
            ]
            print(
                f"{variant:<9}{case['input']:<22}{cells[0]:>24}{case['peer']:>7}{cells[1]:>26}"
                f"{case['ratio']:>7.1f}x"
            )
    print(
        "KLL is vector_of_kll_floats_sketches. Batches in ns per value, single rows in ns per row."
    )
    report["sizes"] = sizes(options.edges)
    row = report["sizes"]
    print(
        f"\nper feature: {row['memory_bytes']:.0f} bytes of memory, {row['record_bytes']:.0f} on "
        f"the wire; its whole sketch takes {row['kll_bytes']:.0f}"
    )
    merge = _merge.measure_merge(our_maker(64))._asdict()
    report["merge"] = merge
    print("\nmerge of a fleet's sketches, k 64")
    for name, value in merge.items():
        print(f"  {name:<26}{value:>12.6g}")
    report["items"] = _distinct.rows()
    print("\ndistinct values and frequent items, ns per value")
    for each in report["items"]:
        print("  " + "  ".join(f"{name} {_short(value)}" for name, value in each.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
