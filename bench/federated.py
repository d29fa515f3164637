"""Time and memory of folding the deltas of a round, against plain numpy in the same run.

    python bench/federated.py [--deltas 100] [--size 1000000]

Both take float32 deltas that are in memory already. The peer keeps all of them as one matrix and
averages it, as a server does that waits for a whole round; the fold takes them one by one. Memory
is what each allocates beyond the deltas themselves.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.server.federated.fold import Fold

Deltas = list[NDArray[np.float32]]


def by_fold(deltas: Deltas, weights: list[int]) -> NDArray[np.float32]:
    """Return the weighted mean by the product's fold."""
    fold = Fold(len(deltas[0]))
    for delta__p, weight in zip(deltas, weights, strict=True):
        fold.update(delta__p, weight=weight)
    return fold.finalize()


def by_matrix(deltas: Deltas, weights: list[int]) -> NDArray[np.float32]:
    """Return the weighted mean of one matrix of all deltas."""
    return np.average(np.stack(deltas), axis=0, weights=weights).astype(np.float32)


def by_sum(deltas: Deltas, weights: list[int]) -> NDArray[np.float32]:
    """Return the weighted mean by a running float32 sum, without any check."""
    total = np.zeros_like(deltas[0])
    for delta__p, weight in zip(deltas, weights, strict=True):
        total += delta__p * np.float32(weight)
    return total / np.float32(sum(weights))


def measure(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return CPU time, median and spread of the time, and the peak of what is allocated."""
    run()
    times, cpu_times = [], []
    for _ in range(repeats):
        start_s, cpu_s = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - start_s)
        cpu_times.append(time.process_time() - cpu_s)
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "cpu_seconds_median": round(statistics.median(cpu_times), 4),
        "seconds_median": round(statistics.median(times), 4),
        "seconds_min": round(min(times), 4),
        "seconds_max": round(max(times), 4),
        "memory_mb": round(peak / 1e6, 1),
    }


def main() -> None:
    """Print a table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--deltas", type=int, default=100)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    deltas = [
        rng.standard_normal(given.size, np.float32) * np.float32(1e-2) for _ in range(given.deltas)
    ]
    weights = rng.integers(50, 500, given.deltas).tolist()
    exact = np.zeros(given.size)
    for delta__p, weight in zip(deltas, weights, strict=True):
        exact += delta__p.astype(np.float64) * weight
    exact /= sum(weights)
    found: dict[str, Any] = {
        "deltas": given.deltas,
        "size": given.size,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    print(f"{given.deltas} deltas of {given.size} float32", file=sys.stderr)
    for run in (by_fold, by_matrix, by_sum):
        figures: dict[str, Any] = dict(
            measure(functools.partial(run, deltas, weights), given.repeats)
        )
        figures["error_max"] = float(np.abs(run(deltas, weights) - exact).max())
        backwards = run(deltas[::-1], weights[::-1])
        figures["same_bits_in_any_order"] = bool((backwards == run(deltas, weights)).all())
        found[run.__name__] = figures
        print(f"{run.__name__:10}", figures, file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
