"""Time HllSketch and the frequent-items sketches against the datasketches library.

``rows`` is called by ``sketch.py``: one dict for each comparison, ns per value, ours and theirs in
turns. The library's Python face takes one value a call; that call is part of its time, as it is
of its users'. The answers of both are compared before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import datasketches
import numpy as np

from shoal.ext.frequent import FrequentItems, FrequentTexts
from shoal.ext.hll import HllSketch

Deed = Callable[[], Any]
PEER_VALUES = 50_000  # of each row, for the library: it has no batch, so its time is linear


def ns_per_value(deed: Deed, values: int) -> float:
    """Return the CPU time of a deed for each of its values."""
    begin = time.thread_time_ns()
    deed()
    return (time.thread_time_ns() - begin) / values


def feed(sketch: Any, values: list[Any]) -> Any:
    """Update a library sketch, value by value."""
    update = sketch.update
    for value in values:
        update(value)
    return sketch


def fill(sketch: Any, values: Any) -> Any:
    """Update one of our sketches with a batch."""
    sketch.update(values)
    return sketch


def compared(name: str, ours: Deed, peer: Deed, values: int, repeats: int) -> dict[str, Any]:
    """Time two deeds in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(ns_per_value(ours, values))
        times[1].append(ns_per_value(peer, PEER_VALUES))
    low, median, high = quantiles(times[0], n=4)
    peer_median = quantiles(times[1], n=4)[1]
    return {
        "name": name,
        "ns_per_value": median,
        "ns_per_value_quartiles": [low, high],
        "peer_ns_per_value": peer_median,
        "ratio": peer_median / median,
    }


def rows(values: int = 1_000_000, repeats: int = 7) -> list[dict[str, Any]]:
    """Measure and return the rows.

    Args:
        values: Values of each batch, 50,000 or more.
        repeats: Runs of each side; medians are returned.
    """
    rng = np.random.default_rng(0)
    out = []
    doubles = rng.normal(size=values)
    few = doubles[:PEER_VALUES].tolist()
    theirs = feed(datasketches.hll_sketch(12, datasketches.HLL_8), few)
    assert (
        HllSketch.from_bytes(theirs.serialize_compact()).to_bytes()
        == fill(HllSketch(12), doubles[:PEER_VALUES]).to_bytes()
    )
    for name, batch in (
        ("HLL lg_k 12, float64", doubles),
        ("HLL lg_k 12, float32", doubles.astype(np.float32)),
        ("HLL lg_k 12, int64", rng.integers(0, 2**40, size=values)),
    ):
        part = batch[:PEER_VALUES].tolist()
        out.append(
            compared(
                name,
                lambda batch=batch: fill(HllSketch(12), batch),
                lambda part=part: feed(datasketches.hll_sketch(12, datasketches.HLL_8), part),
                values,
                repeats,
            )
        )
    for name, batch in (
        ("frequent int64, lg_max 6, 40 codes", rng.integers(0, 40, size=values)),
        ("frequent int64, lg_max 6, Zipf 1.3", rng.zipf(1.3, size=values) % 100_000),
    ):
        part = batch[:PEER_VALUES].tolist()
        theirs = feed(datasketches.frequent_items_sketch(6), part)
        ours = fill(FrequentItems(6), batch[:PEER_VALUES])
        for item, low, high in ours.items():
            assert (theirs.get_lower_bound(item), theirs.get_upper_bound(item)) == (low, high)
        out.append(
            compared(
                name,
                lambda batch=batch: fill(FrequentItems(6), batch),
                lambda part=part: feed(datasketches.frequent_items_sketch(6), part),
                values,
                repeats,
            )
        )
        texts = [str(value) for value in batch[: 4 * PEER_VALUES].tolist()]
        out.append(
            compared(
                name.replace("int64", "strings"),
                lambda texts=texts: fill(FrequentTexts(6), texts),
                lambda texts=texts: feed(
                    datasketches.frequent_strings_sketch(6), texts[:PEER_VALUES]
                ),
                len(texts),
                repeats,
            )
        )
    return out


def main() -> None:
    """Print the rows alone."""
    for row in rows():
        low, high = row["ns_per_value_quartiles"]
        print(
            f"{row['name']:38} {row['ns_per_value']:7.2f} ns ({low:.2f} to {high:.2f}), "
            f"library {row['peer_ns_per_value']:7.1f} ns: {row['ratio']:.1f} times"
        )


if __name__ == "__main__":
    main()
