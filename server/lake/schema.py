"""The columns of the lake and how each of them merges.

    windows    one row per window: predictions, latency, classes, what was shed
    features   one row per window and feature: bins, moments, KLL bytes
    labels     one row per record of late labels: confusion counts

A row of a coarser tier, or of a cohort, has the same columns: its counters are those of all its
windows together, and what told the windows apart (``stream``, ``number``) is null.

Rule 1: every column is a key, or merges by the rule of its set below; nothing else may be added.
Rule 2: columns are plain Parquet types; a reader needs nothing of ours. KLL, HLL and frequent
items are Apache DataSketches bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pyarrow as pa

COUNT_MAX: Final = 1 << 40
"""Most that one window may count: a hostile one must not overflow the sum of millions."""

_TEXT: Final = pa.dictionary(pa.int32(), pa.string())
_COUNTS: Final = pa.list_(pa.int64())


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One kind of rows."""

    name: str
    schema: pa.Schema
    keys: tuple[str, ...]
    """What rows must share to be merged, beside the time; also the order of rows in a file."""
    sums: tuple[str, ...]
    """Counters that add; a null adds nothing."""
    lists: tuple[str, ...]
    """Lists of counters that add place by place; a shorter one as if with zeros."""
    lows: tuple[str, ...] = ()
    """The smallest counts."""
    highs: tuple[str, ...] = ()
    """The largest counts."""
    ones: tuple[str, ...] = ()
    """What names a single window: null after a merge."""
    reals: tuple[str, ...] = ()
    """Lists of real numbers that add place by place."""


_WHO: Final = [
    pa.field("model_sha256", _TEXT),
    pa.field("device", _TEXT),  # "" in cohorts
    pa.field("site", _TEXT),
    pa.field("hardware", _TEXT),
    pa.field("slice", _TEXT),
]
_WHEN: Final = [
    pa.field("time_ms", pa.int64()),  # start of the window, hour or day
    pa.field("stream", pa.string()),  # hex: one boot of the device
    pa.field("number", pa.int64()),  # of the window within (stream, model, slice)
    pa.field("windows", pa.int64()),  # merged into this row
    pa.field("clock_off", pa.int64()),  # of them, whose time is that of their receipt
]
_CELL: Final = ("device", "site", "hardware", "slice", "model_sha256")

WINDOWS: Final = Dataset(
    name="windows",
    schema=pa.schema(
        [
            *_WHO,
            *_WHEN,
            pa.field("device_start_ms", pa.int64()),
            pa.field("device_end_ms", pa.int64()),
            pa.field("received_ms", pa.int64()),
            pa.field("predictions", pa.int64()),
            pa.field("errors", pa.int64()),
            pa.field("shed", pa.int64()),  # predictions that were not sketched
            pa.field("expected", pa.int64()),  # predictions that should have come
            pa.field("schema_errors", pa.int64()),
            pa.field("refused", pa.int64()),  # windows without features: sketches do not fit
            pa.field("classes", _COUNTS),  # predictions by class
            pa.field("latency_us", _COUNTS),  # by bin of the latency histogram
            pa.field("scores", _COUNTS),  # class x confidence decile, row-major
            pa.field("projected", pa.int64()),  # rows in the projection
            pa.field("projection", pa.list_(pa.float64())),  # sums of random features
        ]
    ),
    keys=_CELL,
    sums=(
        "windows",
        "clock_off",
        "predictions",
        "errors",
        "shed",
        "expected",
        "schema_errors",
        "refused",
        "projected",
    ),
    lists=("classes", "latency_us", "scores"),
    lows=("device_start_ms",),
    highs=("device_end_ms", "received_ms"),
    ones=("stream", "number"),
    reals=("projection",),
)

FEATURES: Final = Dataset(
    name="features",
    schema=pa.schema(
        [
            *_WHO,
            pa.field("feature", _TEXT),
            pa.field("position", pa.int32()),  # of the feature in the model's profile, from 0
            *_WHEN,
            pa.field("n", pa.int64()),  # values that are not null
            pa.field("nulls", pa.int64()),
            pa.field("sketched", pa.int64()),  # of n: what moments, extremes and sketches are of
            pa.field("mean", pa.float64()),
            pa.field("variance", pa.float64()),  # divisor: sketched
            pa.field("minimum", pa.float64()),
            pa.field("maximum", pa.float64()),
            pa.field("bins", _COUNTS),  # right-open, between the edges of the model's profile
            pa.field("below", pa.int64()),  # values outside the profile's range
            pa.field("above", pa.int64()),
            pa.field("stuck", pa.int64()),  # values in runs of equal ones
            pa.field("kll", pa.binary()),  # Apache DataSketches KLL, floats or doubles
            pa.field("kll_variance", pa.float64()),  # V: P(|rank error| n > t) <= 2 e^(-t^2 / 2V)
            pa.field("hll", pa.binary()),  # Apache DataSketches HLL; null for real numbers
            pa.field("frequent", pa.binary()),  # frequent items (int64); null for real numbers
        ]
    ),
    keys=(*_CELL, "feature", "position"),
    sums=("windows", "clock_off", "n", "nulls", "sketched", "below", "above", "stuck"),
    lists=("bins",),
    lows=("minimum",),
    highs=("maximum",),
    ones=("stream", "number"),
)

LABELS: Final = Dataset(
    name="labels",
    schema=pa.schema(
        [
            *_WHO,
            pa.field("split", pa.int32()),  # of the data: 0 train, 1 validation, 2 test
            *_WHEN,
            pa.field("received_ms", pa.int64()),
            pa.field("labelled", pa.int64()),
            pa.field("correct", pa.int64()),
            pa.field("confusion", _COUNTS),  # true x predicted, row-major
            pa.field("calibration", _COUNTS),  # (wrong, right) x confidence decile, row-major
        ]
    ),
    keys=(*_CELL, "split"),
    sums=("windows", "clock_off", "labelled", "correct"),
    lists=("confusion", "calibration"),
    highs=("received_ms",),
    ones=("stream", "number"),
)

DATASETS: Final = {each.name: each for each in (WINDOWS, FEATURES, LABELS)}
