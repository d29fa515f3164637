"""The reference of one feature: its bins, range, nulls, quantiles, moments and frequent items.

    values --edges at quantiles--> bins of all, and of each group's training and held-out data
           --sorted--> 128 quantiles --> Kolmogorov-Smirnov and Wasserstein distances
           --counted--> frequent items and "other" (kinds "integer" and "category")

Whole numbers have a bin each while there are not too many. Those of a category, which have no
order, do not share theirs with what training never saw: a code in a gap between two known ones, or
beyond them, has a bin that was empty, so that whatever looks at bins sees it. With more codes than
bins it is seen by its item, and by the range if it is beyond that.

A value is stuck if it is in a run of ``STUCK_MIN`` equal ones, as devices count it. How often the
training data were so says whether a device that is so is broken: a count of errors rests for days.

The quantiles are a summary with a bound, not a sample: the point j of 128 is the training value of
rank (j + 1/2) / 128, so the summary's distribution function is nowhere further than
1/256 + 1/values from the exact one.

G groups, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import profile_fields as fields
from .errors import ProfileError

BINS_MAX: Final = 256
QUANTILES: Final = 128
QUANTILES_ERROR: Final = 1 / (2 * QUANTILES)
"""Largest error of a rank by the summary, beside 1 / values."""
ITEMS_MAX: Final = 64
ITEM_MAX: Final = 2**53  # a code travels as a float and is exact
KINDS: Final = ("float", "double", "integer", "category")
STUCK_MIN: Final = 200  # values in a run: what a device's monitor takes unless it is told another
CONFIDENCE: Final = "confidence"
"""Name of the last feature."""
RESERVED: Final = (CONFIDENCE, "accuracy", "inputs")
"""What findings are told about besides channels; no channel may have such a name."""


@dataclass(frozen=True, slots=True)
class FeatureProfile:
    """Reference of one feature.

    All from ``kind`` on is of the training data (of the held-out data for the confidence), and
    says nothing in a profile of version 1, where ``values`` is 0.
    """

    name: str
    edges: tuple[float, ...]
    """B - 1 ascending bin edges."""
    counts: tuple[int, ...]
    """Counts of all groups: of the training data; of the held-out data for the confidence."""
    trained: tuple[tuple[int, ...], ...]
    """Counts of each group's training data, G x B."""
    held: tuple[tuple[int, ...], ...]
    """Counts of each group's held-out data, G x B."""
    kind: str = "float"
    """One of ``KINDS``."""
    low: float = -math.inf
    """A value below is out of range."""
    high: float = math.inf
    """A value above is out of range."""
    values: int = 0
    """Values that are not null; an infinity is a value."""
    nulls: int = 0
    """NaN among the training data."""
    below: int = 0
    """Training values below ``low``, -inf among them: not even training was without."""
    above: int = 0
    """Training values above ``high``."""
    minimum: float = 0.0
    """Of the finite values, as the three that follow."""
    maximum: float = 0.0
    mean: float = 0.0
    variance: float = 0.0
    """Mean squared distance from the mean."""
    quantiles: tuple[float, ...] = ()
    """128 ascending values: the j-th has rank (j + 1/2) / 128 among the finite ones."""
    items: tuple[tuple[int, int], ...] = ()
    """(item, count) of the at most 64 most frequent values, the most frequent first."""
    other: int = 0
    """Values that are none of ``items``; 0 for the kinds "float" and "double"."""
    stuck: int | None = None
    """Values in runs of at least ``STUCK_MIN`` equal ones, each group's windows one after the
    other; None: nobody counted, as in the first profiles of version 2 and of the confidence."""

    @property
    def ordered(self) -> bool:
        """Whether a larger value is more of something; the codes of a category are just names."""
        return self.kind != "category"

    @property
    def null_rate(self) -> float:
        """Share of nulls, 0 to 1; 0 if nothing is known."""
        return self.nulls / (self.nulls + self.values) if self.nulls else 0.0

    def to_dict(self, version: int) -> dict[str, Any]:
        """Return the JSON object of a version."""
        raw: dict[str, Any] = {
            "name": self.name,
            "edges": self.edges,
            "counts": self.counts,
            "trained": self.trained,
            "held": self.held,
        }
        if version > 1:
            bounds = (self.low, self.high, self.minimum, self.maximum)
            low, high, minimum, maximum = fields.short(bounds)
            raw |= {
                "edges": fields.short(self.edges),
                "trained": fields.table_text(self.trained),
                "held": fields.table_text(self.held),
                "kind": self.kind,
                "low": low,
                "high": high,
                "values": self.values,
                "nulls": self.nulls,
                "below": self.below,
                "above": self.above,
                "minimum": minimum,
                "maximum": maximum,
                "mean": self.mean,
                "variance": self.variance,
                "quantiles": fields.text(fields.pack(np.array(self.quantiles), "<f4")),
                "items": self.items,
                "other": self.other,
            }
            if self.stuck is not None:
                raw["stuck"] = self.stuck
        return raw

    @classmethod
    def from_dict(cls, raw: Any, *, groups: int, version: int) -> FeatureProfile:
        """Return the feature of parsed JSON.

        Raises:
            ProfileError: A field is missing, ill-typed or out of bounds.
        """
        if not isinstance(raw, Mapping) or not isinstance(name := raw.get("name"), str):
            raise ProfileError("a feature of the profile has no name")
        if len(name) > fields.NAME_CHARS_MAX:
            raise ProfileError(f"the name of feature {name:.40}… is too long")
        listed = fields.items(raw, "edges", bound=BINS_MAX - 1)
        edges = fields.float32s(listed, len(listed), "edges")
        if any(b <= a for a, b in pairwise(edges)):
            raise ProfileError(f"the edges of feature {name:.40} do not ascend")
        bins = len(edges) + 1
        found: dict[str, Any] = {
            "name": name,
            "edges": edges,
            "counts": fields.counts(raw.get("counts"), bins, "counts"),
            "trained": fields.tables(raw.get("trained"), groups, bins, "trained"),
            "held": fields.tables(raw.get("held"), groups, bins, "held"),
        }
        return cls(**found, **(_reference(raw) if version > 1 else {}))


def measure(
    values: NDArray[np.float32],
    *,
    name: str,
    kind: str,
    bins: int,
    trained: Sequence[NDArray[np.float32]],
    held: Sequence[NDArray[np.float32]],
) -> FeatureProfile:
    """Return the reference of a feature.

    Args:
        values: What the edges, the range and the quantiles are made of, float32, any shape; NaN
            is null, an infinity is a value in an outer bin.
        name: Of the feature.
        kind: One of ``KINDS``.
        bins: At most so many, 2 to 256.
        trained: The training values of each group, any shapes, in the order of time.
        held: The held-out values of each group.

    Raises:
        ValueError: No value is finite, the kind is unknown, or a value of an "integer" or
            "category" is no whole number.
    """
    if kind not in KINDS:
        raise ValueError(f"channel {name} is of kind {kind!r}, not {', '.join(KINDS)}")
    flat = values.reshape(-1)
    values__k = flat[~np.isnan(flat)]
    finite = np.sort(values__k[np.isfinite(values__k)])
    if not len(finite):
        raise ValueError(f"channel {name} has no finite value in what the profile is made of")
    discrete = kind in ("integer", "category")
    if discrete and (len(finite) < len(values__k) or _fraction(finite)):
        raise ValueError(f"channel {name} is of kind {kind} and holds what is no whole number")
    codes, repeats = np.unique(finite, return_counts=True) if discrete else (finite[:0], None)
    edges = _edges(finite, bins) if len(codes) == 0 else _code_edges(codes, finite, kind, bins)
    low, high = _range(finite, exact=discrete) if name != CONFIDENCE else (0.0, 1.0)
    items = _items(codes, repeats) if repeats is not None else ()
    mean = float(finite.mean(dtype=np.float64))
    at = ((np.arange(QUANTILES) + 0.5) / QUANTILES * len(finite)).astype(np.int64)
    return FeatureProfile(
        name,
        tuple(float(edge) for edge in edges),
        histogram(values__k, edges),
        tuple(histogram(each, edges) for each in trained),
        tuple(histogram(each, edges) for each in held),
        kind=kind,
        low=low,
        high=high,
        values=len(values__k),
        nulls=len(flat) - len(values__k),
        below=int((values__k < low).sum()),
        above=int((values__k > high).sum()),
        minimum=float(finite[0]),
        maximum=float(finite[-1]),
        mean=min(max(mean, float(finite[0])), float(finite[-1])),
        variance=float(finite.var(dtype=np.float64)),
        quantiles=tuple(float(value) for value in finite[at]),
        items=items,
        other=len(values__k) - sum(count for _, count in items) if discrete else 0,
        stuck=sum(map(_stuck, trained)) if name != CONFIDENCE else None,
    )


def histogram(values: NDArray[np.float32], edges: NDArray[np.float32]) -> tuple[int, ...]:
    """Return right-open counts, as SketchBank counts them."""
    flat = values.reshape(-1)
    where = np.searchsorted(edges, flat[~np.isnan(flat)], side="right")
    return tuple(int(count) for count in np.bincount(where, minlength=len(edges) + 1))


def _stuck(values: NDArray[np.float32]) -> int:
    """Return how many values are in runs of equal ones; NaN equals nothing."""
    flat = values.reshape(-1)
    ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], True)) + 1
    runs = np.diff(ends, prepend=0) if len(flat) else ends[:0]
    return int(runs[runs >= STUCK_MIN].sum())


def _fraction(finite: NDArray[np.float32]) -> bool:
    return bool((np.abs(finite) > ITEM_MAX).any() or (finite != np.rint(finite)).any())


def _edges(finite: NDArray[np.float32], bins: int) -> NDArray[np.float32]:
    """Return distinct inner quantiles, so that each bin holds about as many values."""
    found = _quantiles(finite, np.linspace(0, 1, bins + 1)[1:-1]).astype(np.float32)
    distinct: NDArray[np.float32] = np.unique(found + np.float32(0))  # -0.0 is 0.0
    return distinct


def _code_edges(
    codes: NDArray[np.float32], finite: NDArray[np.float32], kind: str, bins: int
) -> NDArray[np.float32]:
    """Return what bins whole numbers one by one, while there are not too many."""
    each = codes[1:]
    if kind == "category":
        apart: NDArray[np.float32] = np.union1d(codes, codes + 1)
        if len(apart) < bins:
            return apart
    return each if 1 <= len(each) < bins else _edges(finite, bins)


def _quantiles(finite: NDArray[np.float32], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return linear quantiles of ascending values.

    As ``np.quantile``, without its copy of all values, and in float64, where the difference of two
    float32 cannot overflow.
    """
    at = ranks * (len(finite) - 1)
    below = np.floor(at).astype(np.int64)
    left = finite[below].astype(np.float64)
    right = finite[np.minimum(below + 1, len(finite) - 1)].astype(np.float64)
    found: NDArray[np.float64] = left + (right - left) * (at - below)
    return found


def _range(finite: NDArray[np.float32], *, exact: bool) -> tuple[float, float]:
    """Return what no good value should leave.

    The inner 99.8 % widened by half their width on each side: an outlier in the training data
    does not widen it, and a new extreme of a healthy sensor stays inside. Where the inner values
    are all one, and for codes, it is the smallest and the largest value.
    """
    inner = _quantiles(finite, np.array((0.001, 0.999)))
    margin = (inner[1] - inner[0]) / 2
    if exact or margin == 0:
        return float(finite[0]), float(finite[-1])
    bounds = np.array([inner[0] - margin, inner[1] + margin])
    low, high = np.clip(bounds, -fields.FLOAT_MAX, fields.FLOAT_MAX).astype(np.float32)
    return float(low), float(high)


def _items(codes: NDArray[np.float32], repeats: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return the most frequent codes; of equally frequent ones the smaller first."""
    order = np.lexsort((codes, -repeats))[:ITEMS_MAX]
    return tuple((int(codes[i]), int(repeats[i])) for i in order)


def _reference(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked fields that version 2 added."""
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProfileError(f"a feature of the profile is none of {', '.join(KINDS)}")
    found: dict[str, Any] = {
        key: fields.whole(raw, key) for key in ("values", "nulls", "below", "above", "other")
    }
    bounds = ("low", "high", "minimum", "maximum")
    found |= zip(bounds, fields.float32s([raw.get(k) for k in bounds], 4, "range"), strict=True)
    found["mean"] = fields.real(raw, "mean", low=found["minimum"], high=found["maximum"])
    found["variance"] = fields.real(raw, "variance", low=0.0, high=4 * fields.FLOAT_MAX**2)
    data = fields.packed(raw, "quantiles", "<f4", QUANTILES)
    quantiles = [float(value) for value in np.frombuffer(data, "<f4")]
    ordered = [found["minimum"], *quantiles, found["maximum"]]
    if found["low"] > found["high"] or any(b < a for a, b in pairwise(ordered)):
        raise ProfileError("a range or the quantiles of the profile do not ascend")
    if not found["values"] or found["below"] + found["above"] > found["values"]:
        raise ProfileError("a feature of the profile has no values, or fewer than out of range")
    if raw.get("stuck") is not None:
        found["stuck"] = fields.whole(raw, "stuck", high=found["values"])
    items = []
    for each in fields.items(raw, "items", bound=ITEMS_MAX):
        item, count = each if isinstance(each, list) and len(each) == 2 else (None, None)
        if type(item) is not int or abs(item) > ITEM_MAX:
            raise ProfileError("the profile's items hold something that is no item")
        items.append((item, *fields.counts([count], 1, "items")))
    if len({item for item, _ in items}) < len(items):
        raise ProfileError("the profile's items hold an item twice")
    discrete = kind in ("integer", "category")
    if sum(count for _, count in items) + found["other"] != (found["values"] if discrete else 0):
        raise ProfileError("the profile's items and other are not all values")
    return found | {"kind": kind, "quantiles": tuple(quantiles), "items": tuple(items)}
