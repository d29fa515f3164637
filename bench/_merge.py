"""Time the merge of a fleet's KLL sketches against the datasketches library in the same run.

``measure_merge`` makes the sketches of a fleet with the library (or takes the caller's maker),
merges them with ``BulkMerger`` and with ``kll_floats_sketch.merge`` in turns, and compares the
ranks of both with the values themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from datasketches import kll_floats_sketch
from numpy.typing import NDArray

from shoal.ext.kll import BulkMerger

Maker = Callable[[NDArray[np.float32]], tuple[bytes, float | None]]


class MergeFigures(NamedTuple):
    """What merging a fleet cost and how well it kept the ranks; times are medians of repeats."""

    sketches: int
    add_many_us: float
    """Microseconds a sketch, all in one call."""
    add_us: float
    """Microseconds a sketch, one Python call each."""
    library_us: float
    """Microseconds a sketch of the library's merge into a sketch of k=4096; the sketches stand
    there as objects, so it has nothing to parse."""
    rank_error_max: float
    """Largest error of a rank over 2,000 quantiles, as a share, sketches' own errors included."""
    library_rank_error_max: float
    rank_bound: float
    """The merger's bound at 99 %, as a share."""


def library_maker(k: int) -> Maker:
    """Return a maker of sketches by the library, whose V has to be bounded from the bytes."""

    def make(values__n: NDArray[np.float32]) -> tuple[bytes, float | None]:
        sketch = kll_floats_sketch(k)
        sketch.update(values__n)
        return sketch.serialize(), None

    return make


def measure_merge(
    make: Maker, *, sketches: int = 10_000, values: int = 10_000, repeats: int = 7
) -> MergeFigures:
    """Merge the sketches of a fleet of devices that differ by a shift of their own.

    Args:
        make: Gives (bytes of a KLL floats sketch, its V or None) of a device's values.
        sketches: Devices.
        values: Values of each device, from half to three halves of it.
        repeats: Timings of each figure.
    """
    rng = np.random.default_rng(0)
    blobs: list[bytes] = []
    variances = np.full(sketches, np.nan)
    grid__q = np.linspace(-4.0, 4.0, 2001, dtype=np.float32)
    true__q = np.zeros(len(grid__q) + 1, np.int64)
    for i in range(sketches):
        size = int(rng.integers(values // 2, values + values // 2 + 1))
        values__n = rng.standard_normal(size, np.float32) + np.float32(0.3 * rng.standard_normal())
        true__q += np.bincount(np.searchsorted(grid__q, values__n), minlength=len(true__q))
        blob, variance = make(values__n)
        blobs.append(blob)
        variances[i] = np.nan if variance is None else variance
    ranks__q = np.cumsum(true__q)[:-1] / true__q.sum()
    peers = [kll_floats_sketch.deserialize(blob) for blob in blobs]

    held = tuple(blobs)

    def many() -> BulkMerger:
        merger = BulkMerger()
        merger.add_many(held, variances)
        return merger

    given = [None if np.isnan(v) else float(v) for v in variances]

    def single() -> BulkMerger:
        merger = BulkMerger()
        for blob, variance in zip(blobs, given, strict=True):
            merger.add(blob, variance)
        return merger

    def library() -> kll_floats_sketch:
        wide = kll_floats_sketch(4096)
        for peer in peers:
            wide.merge(peer)
        return wide

    times: dict[str, list[float]] = {"many": [], "single": [], "library": []}
    deeds: dict[str, Callable[[], Any]] = {"many": many, "single": single, "library": library}
    for _ in range(repeats):
        for name, deed in deeds.items():
            begin = time.thread_time_ns()
            deed()
            times[name].append((time.thread_time_ns() - begin) / 1e3 / sketches)
    found = many().ranks(grid__q)
    wide = library()
    peer__q = np.array([wide.get_rank(float(v), True) for v in grid__q[::100]])
    return MergeFigures(
        sketches=sketches,
        add_many_us=median(times["many"]),
        add_us=median(times["single"]),
        library_us=median(times["library"]),
        rank_error_max=float(np.abs(found.estimate - ranks__q).max()),
        library_rank_error_max=float(np.abs(peer__q - ranks__q[::100]).max()),
        rank_bound=float((found.high - found.estimate)[1000]),
    )


def print_merge(figures: MergeFigures) -> None:
    """Print the figures as lines of a report."""
    print(
        f"merge of {figures.sketches} sketches: {figures.add_many_us:.3f} us each with add_many, "
        f"{figures.add_us:.3f} with add, library {figures.library_us:.2f}; "
        f"max rank error {figures.rank_error_max:.5%} (99 % bound {figures.rank_bound:.5%}), "
        f"library {figures.library_rank_error_max:.5%}"
    )
