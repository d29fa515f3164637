"""Compare what a fleet counted with a reference profile: the rows of ``shoal drift show``.

Where the reference has the edges that the model's windows were binned with, its bins are compared
with theirs, exactly. Where it has others, the counts between them come from ranks of the merged
sketches, and ``rank_error`` says how far off a rank may be.

B bins, G rows of one feature.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ext.frequent import FrequentItems
from ...ext.hll import HllSketch
from ...ext.kll import BulkMerger
from ..drift.comparison import BINNED, TESTED, Observed, assess
from ..drift.comparison import compare as compare_feature
from ..drift.frequent_tests import FrequentCounts
from ..drift.profile import ReferenceProfile
from ..drift.quantile_tests import Quantiles
from .kll import THREADS
from .query import Answer

CONFIDENCE: Final = 0.99
"""Of the bounds of each quantile and rank by itself."""
_SHARES: Final = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_DIGITS: Final = 6
_GRID: Final = 256  # quantiles that a test between sketches takes: shares are 1/512 exact
_TRAIN: Final = 0  # split of the data that a model may have learned from: it tells nothing
ROWS_WIDE: Final = 200
"""Rows of an answer up to which each gets a merger of full width and is tested by its sketch."""
K_NARROW: Final = 256
ORDERED: Final = ("below", "above", "mean", "deviation")
"""Counters that say nothing of codes, which have no order."""


def compare(
    answer: Answer, *, own: ReferenceProfile | None, profile: ReferenceProfile
) -> list[dict[str, Any]]:
    """Return one row per row of an answer.

    Args:
        answer: Of features.
        own: Profile of the model, whose edges the bins have; None = not known.
        profile: What it is compared with.

    Returns:
        Dicts of JSON values: ``group``, ``since_ms``, ``bucket_ms``, ``feature``, ``kind``,
        ``windows``, ``clock_off``, ``n``, ``nulls``, ``below``, ``above``, ``stuck``, ``mean``,
        ``deviation``, ``minimum``, ``maximum``; ``p05``, ``p50``, ``p95`` as [estimate, low, high]
        at 99 %;
        all that :func:`shoal.server.drift.comparison.compare` tells; ``fraction_share`` (of
        a category: values that are no whole number), ``exact`` (of the bins), ``rank_error`` (a
        share, at 99 %). What is not known is null: distances of a feature that
        the reference lacks, quantiles without a sketch, in answers of more than 200 rows the tests
        between sketches (there the bins alone are tested), and of a category, whose codes have no
        order, ``below``, ``above``, ``mean`` and ``deviation``.

    Raises:
        SketchRecordError: A sketch of the lake is damaged.
    """
    edges = {each.name: each.edges for each in own.features} if own is not None else {}
    ranges = {each.name: (each.low, each.high) for each in own.features} if own is not None else {}
    features = {each.name: each for each in profile.features}
    rows = answer.table.to_pylist()
    mergers, told = _asked(answer)
    found = [_counters(row, answer) | said for row, said in zip(rows, told, strict=True)]
    seen: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row["feature"] in features:
            seen.setdefault(row["feature"], []).append(i)

    def look(i: int) -> Observed:
        row, feature = rows[i], features[rows[i]["feature"]]
        bins: NDArray[np.float64] | None = None
        if row["n"] and edges.get(feature.name) == feature.edges:
            found[i]["exact"] = True
            bins = np.array(row["bins"], np.float64)
        elif row["n"] and answer.sketches is not None:
            merger = mergers[i] if mergers else answer.sketches.of(i, k_wide=K_NARROW)
            bins = counts_between(merger, feature.edges) if merger is not None else None
        if bins is not None and len(bins) != len(feature.counts):
            bins = None
        return Observed(
            n=row["n"],
            nulls=row["nulls"],
            below=row["below"],
            above=row["above"],
            bins=bins,
            sketch=_sample(mergers[i]) if mergers else None,
            frequent=_frequent(row.get("frequent")),
            distinct=_distinct(row.get("hll")),
        )

    for name, part in seen.items():
        figures = compare_feature(features[name], [look(i) for i in part])
        for i, figure in zip(part, figures, strict=True):
            found[i] |= figure
            if not features[name].ordered:
                found[i] |= dict.fromkeys(ORDERED)
                found[i]["fraction_share"] = _fractions(rows[i])
            if ranges.get(name) != (features[name].low, features[name].high):
                found[i]["out_of_range_share"] = None  # devices counted by another range
    return found


def assess_groups(
    windows: Answer, labels: Answer, *, profile: ReferenceProfile
) -> list[dict[str, Any]]:
    """Return what each group tells of the model as a whole.

    Args:
        windows: Answer of windows.
        labels: Answer of labels, of the same groups and times.
        profile: Of the model.

    Returns:
        One dict per group and bucket: ``group``, ``since_ms``, ``until_ms``, ``bucket_ms``,
        ``windows``, ``predictions``, ``errors``, ``shed``, ``refused`` (windows whose sketches
        were damaged or of other edges, which no feature counts), and all that
        :func:`shoal.server.drift.comparison.assess` tells. Labels of training data are left out.
    """
    told: dict[tuple[str, int], dict[str, list[int]]] = {}
    for row in labels.table.to_pylist():
        if row["split"] != _TRAIN:
            parts = told.setdefault((row["group"], row["bucket_ms"]), {})
            for name in ("confusion", "calibration"):
                parts[name] = _added(parts.get(name, []), row[name] or [])
            parts["answers"] = _added(parts.get("answers", []), [row["labelled"], row["correct"]])
    found = []
    for row in windows.table.to_pylist():
        late = told.get((row["group"], row["bucket_ms"]), {})
        found.append(
            {
                "group": row["group"],
                "since_ms": windows.since_ms,
                "until_ms": windows.until_ms,
                **{
                    name: row[name]
                    for name in ("bucket_ms", "windows", "predictions", "errors", "shed", "refused")
                },
                **assess(
                    profile,
                    scores=row["scores"],
                    projection=row["projection"],
                    projected=row["projected"],
                    **late,
                ),
            }
        )
    return found


def _added(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=0)]


def _sample(merger: BulkMerger | None) -> Quantiles | None:
    """Return a merged sketch as tests take it."""
    if merger is None or not merger.n:
        return None
    shares = (np.arange(_GRID) + 0.5) / _GRID
    values = np.asarray(merger.quantiles(shares, CONFIDENCE).estimate, np.float64)
    return Quantiles.of_grid(
        values,
        n=merger.n,
        variance=merger.variance,
        minimum=min(float(merger.minimum), float(values[0])),
        maximum=max(float(merger.maximum), float(values[-1])),
    )


def _frequent(blob: bytes | None) -> FrequentCounts[int] | None:
    """Return the items of the values that such sketches took: windows of bins alone sent none."""
    if blob is None:
        return None
    sketch = FrequentItems.from_bytes(blob)
    if not sketch.total:
        return None
    items = sketch.items(threshold=0, no_false_positives=False)
    return FrequentCounts.of(items, sketch.total, unlisted_high=sketch.error_max)


def _fractions(row: Mapping[str, Any]) -> float | None:
    """Return the share of a category's values that are no whole number; None = nothing tells."""
    blob, sketched = row.get("frequent"), row["sketched"] or 0
    if blob is None or not sketched:
        return None
    return round(max(0.0, 1.0 - FrequentItems.from_bytes(blob).total / sketched), _DIGITS)


def _distinct(blob: bytes | None) -> tuple[float, float, float] | None:
    if blob is None:
        return None
    sketch = HllSketch.from_bytes(blob)
    return (sketch.estimate(), *sketch.bounds(CONFIDENCE))


def _counters(row: dict[str, Any], answer: Answer) -> dict[str, Any]:
    variance = _real(row["variance"])
    return {
        "group": row["group"],
        "since_ms": answer.since_ms,
        "until_ms": answer.until_ms,
        "bucket_ms": row["bucket_ms"],
        "feature": row["feature"],
        "kind": None,
        "windows": row["windows"],
        "clock_off": row["clock_off"],
        "n": row["n"],
        "nulls": row["nulls"],
        "below": row["below"],
        "above": row["above"],
        "stuck": row["stuck"],
        "mean": _real(row["mean"]),
        "deviation": math.sqrt(variance) if variance is not None else None,
        "minimum": _real(row["minimum"]),
        "maximum": _real(row["maximum"]),
        **dict.fromkeys((*BINNED, *TESTED)),
        "fraction_share": None,
        "exact": False,
    }


def _asked(answer: Answer) -> tuple[list[BulkMerger | None], list[dict[str, Any]]]:
    """Return the merger of each row, where rows are few, and what the sketches of each say."""
    rows, sketches = answer.table.num_rows, answer.sketches
    if sketches is None:
        return [], [dict.fromkeys((*_SHARES, "rank_error")) for _ in range(rows)]
    if rows > ROWS_WIDE:
        asked = sketches.quantiles(
            rows, tuple(_SHARES.values()), confidence=CONFIDENCE, k_wide=K_NARROW
        )
        three = np.stack(asked[2:], axis=-1).tolist()
        return [], [
            _said(n, variance, bounds)
            for n, variance, bounds in zip(
                asked.n.tolist(), asked.variance.tolist(), three, strict=True
            )
        ]
    with ThreadPoolExecutor(THREADS) as pool:  # merging and sorting let the interpreter go
        mergers = list(pool.map(sketches.of, range(rows)))
    said = []
    for merger in mergers:
        if merger is None:
            said.append(_said(0, 0.0, []))
            continue
        three = np.stack(merger.quantiles(tuple(_SHARES.values()), CONFIDENCE), axis=-1).tolist()
        said.append(_said(merger.n, merger.variance, three))
    return mergers, said


def _said(n: int, variance: float, bounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return quantiles as [estimate, low, high] and the error of a rank; null without a value."""
    if not n:
        return dict.fromkeys((*_SHARES, "rank_error"))
    shown: dict[str, Any] = {
        name: [_real(each) for each in three] for name, three in zip(_SHARES, bounds, strict=True)
    }
    error = math.sqrt(2 * variance * math.log(2 / (1 - CONFIDENCE))) / n
    return shown | {"rank_error": round(error, _DIGITS)}


def counts_between(merger: BulkMerger, edges: Sequence[float]) -> NDArray[np.float64]:
    """Return the values between edges, right-open as exact bins are, from ranks; (B,).

    Args:
        merger: Of any sketch with values.
        edges: Ascending, (B - 1,).
    """
    # Ranks count what is on the value. The one below it must be of the sketch's own type: the
    # double below an edge is the edge again, as a float.
    kept = merger.quantiles(0.5).estimate.dtype
    below = np.nextafter(np.array(edges).astype(kept), kept.type(-np.inf))
    shares = np.concatenate([[0.0], merger.ranks(below).estimate, [1.0]])
    return np.asarray(np.diff(shares) * merger.n, np.float64)


def _real(value: float | None) -> float | None:
    """Return a number as JSON has it: no infinity, no NaN."""
    return value if value is not None and math.isfinite(value) else None
