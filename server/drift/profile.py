"""The reference profile: what a model's inputs, confidence and accuracy looked like in training.

It travels inside the signed bundle. The device needs the edges alone (they cut its sketches);
the server compares with the counts. ``groups`` are the people, machines or sites of the training
data. What each of them looked like in training says which devices are like one of them; how far
its held-out windows are from its training windows says how much the same one changes with time.
The null hypothesis of every detector is built of these two.

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
EDGE_MAX: Final = float(np.finfo(np.float32).max)
CONFIDENCE: Final = "confidence"
"""Name of the last feature; no channel may have it."""

Table = Sequence[Sequence[int]]
"""Counts of each channel of a device, C x B."""


@dataclass(frozen=True, slots=True)
class FeatureProfile:
    """Reference of one feature."""

    name: str
    edges: tuple[float, ...]
    """B - 1 ascending bin edges."""
    counts: tuple[int, ...]
    """Counts of all groups: of the training data; of the held-out data for the confidence."""
    trained: tuple[tuple[int, ...], ...]
    """Counts of each group's training data, G x B."""
    held: tuple[tuple[int, ...], ...]
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
        """Return the canonical JSON: the same profile makes the same bytes.

        Raises:
            ProfileError: Nobody would read it: it is longer than ``BYTES_MAX``.
        """
        raw = {
            "version": VERSION,
            "groups": self.groups,
            "labelled": self.labelled,
            "correct": self.correct,
            "samples_per_window": self.samples_per_window,
            "features": [
                {
                    "name": f.name,
                    "edges": f.edges,
                    "counts": f.counts,
                    "trained": f.trained,
                    "held": f.held,
                }
                for f in self.features
            ],
        }
        data = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
        if len(data) > BYTES_MAX:
            raise ProfileError(
                f"profile of {len(data)} bytes exceeds {BYTES_MAX}",
                hint="use fewer bins, or fewer and larger groups",
            )
        return data

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
        except (ValueError, RecursionError) as exc:
            raise ProfileError(f"the profile is not JSON: {exc!s:.100}") from exc
        return cls.from_dict(raw)

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
        if not features or len({each.name for each in features}) < len(features):
            raise ProfileError("the profile has no feature, or two of one name")
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
        held__n: Which windows training did not touch, bool (N,). What is normal for the
            confidence and the accuracy comes from these: on its own training data a model is
            surer than it should be.
        channels: Names of the C channels.
        bins: Bins per feature, 2 to 256.

    Raises:
        ValueError: A shape does not fit, or there is no window in one of the parts.
    """
    n = len(x__nct)
    if x__nct.ndim != 3 or x__nct.shape[1] != len(channels):
        raise ValueError(f"windows of shape {x__nct.shape} do not fit {len(channels)} channels")
    if len({*channels, CONFIDENCE}) != len(channels) + 1:
        raise ValueError(f"channels need different names, none of them {CONFIDENCE}")
    if not 2 <= bins <= BINS_MAX:
        raise ValueError(f"bins must be 2 to {BINS_MAX}, not {bins}")
    if any(len(each) != n for each in (confidence__n, correct__n, group__n, held__n)):
        raise ValueError("all arrays must have one entry per window")
    if not held__n.any() or held__n.all():
        raise ValueError("a profile needs training windows and held-out windows")
    names = [int(each) for each in np.unique(group__n)]
    trained = [~held__n & (group__n == name) for name in names]
    held = [held__n & (group__n == name) for name in names]
    features = []
    for i, name in enumerate((*channels, CONFIDENCE)):
        values = x__nct[:, i] if i < len(channels) else confidence__n[:, None]
        base = values[~held__n] if i < len(channels) else values[held__n]
        edges = _edges(base, bins)
        features.append(
            FeatureProfile(
                name,
                tuple(float(edge) for edge in edges),
                _histogram(base, edges),
                tuple(_histogram(values[chosen], edges) for chosen in trained),
                tuple(_histogram(values[chosen], edges) for chosen in held),
            )
        )
    return ReferenceProfile(
        tuple(features),
        tuple(str(name) for name in names),
        tuple(int(chosen.sum()) for chosen in held),
        tuple(int(correct__n[chosen].sum()) for chosen in held),
        int(x__nct.shape[2]),
    )


def with_devices(
    profile: ReferenceProfile, devices: Mapping[str, tuple[Table, Table]]
) -> ReferenceProfile:
    """Return the profile of a model that was also trained on devices, from their counters alone.

    A federated model has learned from devices whose windows the server never sees. What they are
    like is known all the same: their telemetry was counted in the same bins. With them the profile
    says whom the model was made with, and a device that taught it is no stranger to it. The result
    is for the server: a bundle goes to every device, and must not carry what others are like.

    Args:
        profile: Of the same model, made from the training data that the server has.
        devices: By name, the channels' counts of an earlier and of a later half of its telemetry,
            in the bins of ``profile``. Confidence is left out: another model's is no reference.

    Raises:
        ValueError: A table does not have the profile's channels and bins.
        ProfileError: A name is taken, or there would be more than ``GROUPS_MAX`` groups.
    """
    names = (*profile.groups, *devices)
    if len(set(names)) < len(names) or len(names) > GROUPS_MAX:
        raise ProfileError(f"{len(names)} groups are more than {GROUPS_MAX}, or share a name")
    features = []
    for i, feature in enumerate(profile.features):
        bins = len(feature.counts)
        if feature.name == CONFIDENCE:
            halves = [((0,) * bins, (0,) * bins)] * len(devices)
        else:
            halves = [(_row(a, i, bins), _row(b, i, bins)) for a, b in devices.values()]
        early = tuple(each[0] for each in halves)
        total = np.sum([feature.counts, *early], axis=0)
        features.append(
            FeatureProfile(
                feature.name,
                feature.edges,
                tuple(int(count) for count in total),
                feature.trained + early,
                feature.held + tuple(each[1] for each in halves),
            )
        )
    nothing = (0,) * len(devices)
    return ReferenceProfile(
        tuple(features),
        names,
        profile.labelled + nothing,
        profile.correct + nothing,
        profile.samples_per_window,
    )


def _row(table: Table, i: int, bins: int) -> tuple[int, ...]:
    if i >= len(table) or len(table[i]) != bins:
        raise ValueError(f"channel {i} of a device does not have the profile's {bins} bins")
    return tuple(int(count) for count in table[i])


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
    if not all(type(edge) is float and abs(edge) <= EDGE_MAX for edge in edges):
        raise ProfileError(f"feature {name:.40} has an edge that is no finite float32")
    if any(float(np.float32(edge)) != edge for edge in edges):
        raise ProfileError(f"feature {name:.40} has an edge that is no float32")
    if any(b <= a for a, b in pairwise(edges)):
        raise ProfileError(f"the edges of feature {name:.40} do not ascend")
    tables = [_items(raw, key, bound=GROUPS_MAX) for key in ("trained", "held")]
    if any(len(rows) != groups for rows in tables) or len(name) > 80:
        raise ProfileError(f"feature {name:.40} does not have counts of {groups} groups")
    trained, held = (tuple(_counts(r, len(edges) + 1, "group counts") for r in t) for t in tables)
    return FeatureProfile(
        name,
        tuple(edges),
        _counts(raw.get("counts"), len(edges) + 1, "counts"),
        trained,
        held,
    )
