"""The reference profile: what a model's inputs, confidence and accuracy looked like in training.

It travels inside the signed bundle. The device needs the edges alone (they cut its sketches);
the server compares with the counts. ``groups`` are people, machines or sites of the held-out
part of the training data: how much they differ from each other is what is normal, and the null
hypothesis of every detector is built of it.

F features (the input channels and, last, ``confidence``), G groups, B bins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import ProfileError

VERSION: Final = 1
BYTES_MAX: Final = 1 << 20
FEATURES_MAX: Final = 1024
BINS_MAX: Final = 256
GROUPS_MAX: Final = 256
COUNT_MAX: Final = 2**53


@dataclass(frozen=True, slots=True)
class FeatureProfile:
    """Reference of one feature."""

    name: str
    edges: tuple[float, ...]
    """B - 1 ascending bin edges."""
    counts: tuple[int, ...]
    """Counts of the training data, B."""
    groups: tuple[tuple[int, ...], ...]
    """Counts of each group's held-out data, G x B."""


@dataclass(frozen=True, slots=True)
class ReferenceProfile:
    """Reference of one model."""

    features: tuple[FeatureProfile, ...]
    groups: tuple[str, ...]
    """Names of the G groups."""
    labelled: tuple[int, ...]
    """Held-out windows of each group."""
    correct: tuple[int, ...]
    """How many of them the model answered right."""
    samples_per_window: int
    """Samples of a channel per prediction; neighbouring samples are no independent evidence."""

    def to_json(self) -> bytes:
        """Return the canonical JSON: the same profile makes the same bytes."""
        raw = {
            "version": VERSION,
            "groups": self.groups,
            "labelled": self.labelled,
            "correct": self.correct,
            "samples_per_window": self.samples_per_window,
            "features": [
                {"name": f.name, "edges": f.edges, "counts": f.counts, "groups": f.groups}
                for f in self.features
            ],
        }
        return json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ReferenceProfile:
        """Return the profile of JSON bytes.

        Raises:
            ProfileError: Too long, not JSON, or a field is missing, ill-typed or out of bounds.
        """
        if len(data) > BYTES_MAX:
            raise ProfileError(f"profile of {len(data)} bytes exceeds {BYTES_MAX}")
        try:
            raw = json.loads(data)
            return cls.from_dict(raw)
        except (ValueError, RecursionError) as exc:
            raise ProfileError(f"the profile is not JSON: {exc!s:.100}") from exc

    @classmethod
    def from_dict(cls, raw: Any) -> ReferenceProfile:
        """Return the profile of parsed JSON.

        Raises:
            ProfileError: As for :meth:`from_json`.
        """
        if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
            raise ProfileError(f"the profile is not of version {VERSION}")
        groups = _items(raw, "groups", bound=GROUPS_MAX)
        if not all(isinstance(name, str) and len(name) <= 80 for name in groups):
            raise ProfileError("the profile's groups are not short names")
        features = tuple(
            _feature(item, len(groups)) for item in _items(raw, "features", bound=FEATURES_MAX)
        )
        if not features:
            raise ProfileError("the profile has no feature")
        labelled, correct = (_counts(raw.get(k), len(groups), k) for k in ("labelled", "correct"))
        if any(right > all_ for right, all_ in zip(correct, labelled, strict=True)):
            raise ProfileError("the profile has more correct windows than labelled ones")
        size = raw.get("samples_per_window")
        if type(size) is not int or not 1 <= size <= 1 << 24:
            raise ProfileError("the profile's samples_per_window is out of range")
        return cls(features, tuple(groups), labelled, correct, size)


def build(
    x__nct: NDArray[np.float32],
    confidence__n: NDArray[np.float32],
    correct__n: NDArray[np.bool_],
    group__n: NDArray[np.int64],
    held__n: NDArray[np.bool_],
    *,
    channels: Sequence[str],
    bins: int = 16,
) -> ReferenceProfile:
    """Return the profile of a training set and a model's answers to it.

    Args:
        x__nct: Windows, float32 (N, C, T).
        confidence__n: Largest probability of each answer, float32 (N,), 0 to 1.
        correct__n: Whether the answer was right, bool (N,).
        group__n: Person, machine or site of each window, int64 (N,).
        held__n: Which windows training did not touch, bool (N,). Confidence and group counts
            come from these: on its own training data a model is surer than it should be.
        channels: Names of the C channels.
        bins: Bins per feature, 2 to 256.

    Raises:
        ValueError: A shape does not fit, or there is no window in one of the parts.
    """
    n = len(x__nct)
    if x__nct.ndim != 3 or x__nct.shape[1] != len(channels) or not 2 <= bins <= BINS_MAX:
        raise ValueError(f"windows of shape {x__nct.shape} do not fit {len(channels)} channels")
    if any(len(each) != n for each in (confidence__n, correct__n, group__n, held__n)):
        raise ValueError("all arrays must have one entry per window")
    if not held__n.any() or held__n.all():
        raise ValueError("a profile needs training windows and held-out windows")
    names = [int(each) for each in np.unique(group__n[held__n])]
    members = [held__n & (group__n == name) for name in names]
    features = []
    for i, name in enumerate((*channels, "confidence")):
        values = x__nct[:, i] if i < len(channels) else confidence__n[:, None]
        base = values[~held__n] if i < len(channels) else values[held__n]
        edges = _edges(base, bins)
        features.append(
            FeatureProfile(
                name,
                tuple(float(edge) for edge in edges),
                _histogram(base, edges),
                tuple(_histogram(values[chosen], edges) for chosen in members),
            )
        )
    return ReferenceProfile(
        tuple(features),
        tuple(str(name) for name in names),
        tuple(int(chosen.sum()) for chosen in members),
        tuple(int(correct__n[chosen].sum()) for chosen in members),
        int(x__nct.shape[2]),
    )


def _edges(values: NDArray[np.float32], bins: int) -> NDArray[np.float32]:
    """Return distinct inner quantiles, so that each bin holds about as many values."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    found: NDArray[np.float32] = np.unique(np.quantile(values, inner).astype(np.float32))
    return found


def _histogram(values: NDArray[np.float32], edges: NDArray[np.float32]) -> tuple[int, ...]:
    """Return right-open counts, as SketchBank counts them."""
    flat = values.reshape(-1)
    where = np.searchsorted(edges, flat[~np.isnan(flat)], side="right")
    return tuple(int(count) for count in np.bincount(where, minlength=len(edges) + 1))


def _items(raw: Mapping[str, Any], name: str, *, bound: int) -> list[Any]:
    found = raw.get(name)
    if not isinstance(found, list) or len(found) > bound:
        raise ProfileError(f"the profile's {name} is not a list of at most {bound}")
    return found


def _counts(raw: Any, size: int, name: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) != size:
        raise ProfileError(f"the profile's {name} is not a list of {size} counts")
    if not all(type(count) is int and 0 <= count <= COUNT_MAX for count in raw):
        raise ProfileError(f"the profile's {name} holds something that is no count")
    return tuple(raw)


def _feature(raw: Any, groups: int) -> FeatureProfile:
    if not isinstance(raw, Mapping) or not isinstance(name := raw.get("name"), str):
        raise ProfileError("a feature of the profile has no name")
    edges = _items(raw, "edges", bound=BINS_MAX - 1)
    if not all(type(edge) in (int, float) and np.isfinite(edge) for edge in edges):
        raise ProfileError(f"feature {name:.40} has an edge that is no number")
    if any(b <= a for a, b in pairwise(edges)):
        raise ProfileError(f"the edges of feature {name:.40} do not ascend")
    rows = _items(raw, "groups", bound=GROUPS_MAX)
    if len(rows) != groups or len(name) > 80:
        raise ProfileError(f"feature {name:.40} has {len(rows)} groups, not {groups}")
    return FeatureProfile(
        name,
        tuple(float(edge) for edge in edges),
        _counts(raw.get("counts"), len(edges) + 1, "counts"),
        tuple(_counts(row, len(edges) + 1, "group counts") for row in rows),
    )
