"""The reference profile: what a model's inputs, confidence and accuracy looked like in training.

    profile.json -+- features     one for each channel, and the confidence   profile_feature
                  |- deciles, confidence     scores and calibration          profile_confidence
                  |- projection   joint distribution of the channels         profile_projection
                  `- groups, labelled, correct, samples_per_window

It travels inside the signed bundle. The device reads how to count (edges, kinds, ranges, deciles,
the projection; its reader is the agent's ``profile.py``); the server compares with the rest.
``groups`` are the people, machines or sites of the training data. What each of them looked like in
training says which devices are like one of them; how far its held-out windows are from its
training windows says how much the same one changes with time. The null hypothesis of every
detector is built of these two.

Version 1 has no ``deciles``, ``confidence`` and ``projection``, and of a feature only name, edges
and counts. It is read, and written back as it was: a profile keeps the version it came with. The
first profiles of version 2 spelled every float32 as a float64 and the groups' tables as lists of
counts. They are read; what is written is shorter, and all agents that read version 2 read it.

F features (the input channels and, last, ``confidence``), G groups, B bins, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import profile_confidence, profile_feature, profile_fields, profile_projection
from .errors import ProfileError
from .profile_confidence import ConfidenceProfile
from .profile_feature import BINS_MAX, CONFIDENCE, RESERVED, FeatureProfile
from .profile_projection import ProjectionProfile

__all__ = [
    "BINS_MAX",
    "BYTES_MAX",
    "CONFIDENCE",
    "FEATURES_MAX",
    "GROUPS_MAX",
    "VERSION",
    "ConfidenceProfile",
    "FeatureProfile",
    "ProjectionProfile",
    "ReferenceProfile",
    "build",
    "with_devices",
]

VERSION: Final = 2
FEATURES_MAX: Final = 1025  # the channels of a manifest, 1024 at most, and the confidence
GROUPS_MAX: Final = 256
BYTES_MAX: Final = 8 << 20
"""Of the JSON. A feature takes some 1.1 KB, and 2 x 16 bins x 8/3 bytes for each group (counts of
two bytes in base64): 1,025 features of 75 groups, or 350 of 256. Not more, because the bundle of
every device and the database's row carry it, and a drift worker holds 110 MB of one; a device
reads it in 0.04 s and 17 MB on an x86 core."""

Table = Sequence[Sequence[int]]
"""Counts of each channel of a device, C x B."""


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
    confidence: ConfidenceProfile | None = None
    """How sure and how often right the model was; None: version 1."""
    projection: ProjectionProfile | None = None
    """Random features of the channels; None: version 1, or nothing to project."""

    @property
    def version(self) -> int:
        """Version of the format that it is written in: 1 if it holds nothing newer."""
        return VERSION if self.confidence is not None else 1

    def to_json(self) -> bytes:
        """Return the canonical JSON: the same profile makes the same bytes.

        Raises:
            ProfileError: Nobody would read it: it has more than ``FEATURES_MAX`` features or
                ``GROUPS_MAX`` groups, or is longer than ``BYTES_MAX``.
        """
        if len(self.features) > FEATURES_MAX:
            raise ProfileError(
                f"{len(self.features) - 1} channels are more than the {FEATURES_MAX - 1} that a "
                "model may have",
                hint="leave out channels, or train several models",
            )
        if len(self.groups) > GROUPS_MAX:
            raise ProfileError(
                f"{len(self.groups)} groups are more than the {GROUPS_MAX} of a reference profile",
                hint="number fewer and larger groups, e.g. sites in place of machines",
            )
        raw: dict[str, Any] = {
            "version": self.version,
            "groups": self.groups,
            "labelled": self.labelled,
            "correct": self.correct,
            "samples_per_window": self.samples_per_window,
            "features": [each.to_dict(self.version) for each in self.features],
        }
        if self.confidence is not None:
            raw["deciles"] = profile_fields.short(self.confidence.deciles)
            raw["confidence"] = self.confidence.to_dict()
            raw["projection"] = self.projection.to_dict() if self.projection else None
        data = json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        if len(data) > BYTES_MAX:
            bins = max(len(each.counts) for each in self.features)
            raise ProfileError(
                f"the reference profile of {len(self.features) - 1} channels in {bins} bins and "
                f"{len(self.groups)} groups takes {len(data)} bytes, more than {BYTES_MAX}",
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
        """Return the profile of parsed JSON, of version 1 or 2.

        Raises:
            ProfileError: As for :meth:`from_json`.
        """
        version = raw.get("version") if isinstance(raw, Mapping) else None
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ProfileError(
                f"the profile is not of version 1 to {VERSION}",
                hint="update the server before this model",
            )
        groups = profile_fields.items(raw, "groups", bound=GROUPS_MAX)
        chars_max = profile_fields.NAME_CHARS_MAX
        if not all(isinstance(name, str) and len(name) <= chars_max for name in groups):
            raise ProfileError("the profile's groups are not short names")
        features = tuple(
            FeatureProfile.from_dict(item, groups=len(groups), version=version)
            for item in profile_fields.items(raw, "features", bound=FEATURES_MAX)
        )
        if not features or len({each.name for each in features}) < len(features):
            raise ProfileError("the profile has no feature, or two of one name")
        labelled, correct = (
            profile_fields.counts(raw.get(key), len(groups), key) for key in ("labelled", "correct")
        )
        if any(right > all_ for right, all_ in zip(correct, labelled, strict=True)):
            raise ProfileError("the profile has more correct windows than labelled ones")
        size = profile_fields.whole(raw, "samples_per_window", low=1, high=1 << 24)
        found = cls(features, tuple(groups), labelled, correct, size)
        if version == 1:
            return found
        projection = raw.get("projection")
        return replace(
            found,
            confidence=ConfidenceProfile.from_dict(
                raw.get("confidence"), deciles=raw.get("deciles")
            ),
            projection=None
            if projection is None
            else ProjectionProfile.from_dict(
                projection, columns=len(features) - 1, groups=len(groups)
            ),
        )


def build(
    x__nct: NDArray[np.float32],
    confidence__n: NDArray[np.float32],
    correct__n: NDArray[np.bool_],
    group__n: NDArray[np.int64],
    held__n: NDArray[np.bool_],
    *,
    channels: Sequence[str],
    bins: int = 16,
    kinds: Sequence[str] = (),
    predicted__n: NDArray[np.int64] | None = None,
    classes: int = 1,
    projected: int = 64,
    seed: int = 0,
) -> ReferenceProfile:
    """Return the profile of a training set and a model's answers to it.

    Args:
        x__nct: Windows, float32 (N, C, T), those of a group in the order of time. NaN is null.
        confidence__n: Largest probability of each answer, float32 (N,), 0 to 1.
        correct__n: Whether the answer was right, bool (N,).
        group__n: Person, machine or site of each window, int64 (N,).
        held__n: Which windows training did not touch, bool (N,). What is normal for the
            confidence and the accuracy comes from these: on its own training data a model is
            surer than it should be.
        channels: Names of the C channels.
        bins: Bins per feature at most, 2 to 256.
        kinds: Of each channel, "float", "double", "integer" or "category"; empty: all "float".
        predicted__n: Class of each answer, int64 (N,); None: classes are not told apart.
        classes: Number of classes, 1 to 1,024.
        projected: Random features, 1 to 256; 0: the channels' joint distribution is not watched.
        seed: Of the random features. The same arguments make the same profile.

    Raises:
        ValueError: A shape does not fit, a value is out of range, a channel has no finite value,
            or there is no window in one of the parts.
    """
    n = len(x__nct)
    if x__nct.ndim != 3 or x__nct.shape[1] != len(channels):
        raise ValueError(f"windows of shape {x__nct.shape} do not fit {len(channels)} channels")
    if len({*channels, *RESERVED}) != len(channels) + len(RESERVED):
        raise ValueError(f"channels need different names, none of them {', '.join(RESERVED)}")
    if not 2 <= bins <= BINS_MAX:
        raise ValueError(f"bins must be 2 to {BINS_MAX}, not {bins}")
    if not 0 <= projected <= profile_projection.FEATURES_MAX:
        raise ValueError(f"projected must be 0 to {profile_projection.FEATURES_MAX}")
    if len(kinds) not in (0, len(channels)):
        raise ValueError(f"{len(kinds)} kinds do not fit {len(channels)} channels")
    if predicted__n is None:
        predicted__n = np.zeros(n, np.int64)
    parts = (confidence__n, correct__n, group__n, held__n, predicted__n)
    if any(len(each) != n for each in parts):
        raise ValueError("all arrays must have one entry per window")
    if not held__n.any() or held__n.all():
        raise ValueError("a profile needs training windows and held-out windows")
    names = [int(each) for each in np.unique(group__n)]
    trained = [~held__n & (group__n == name) for name in names]
    held = [held__n & (group__n == name) for name in names]
    features = []
    for i, name in enumerate((*channels, CONFIDENCE)):
        values = x__nct[:, i] if i < len(channels) else confidence__n[:, None]
        features.append(
            profile_feature.measure(
                values[~held__n] if i < len(channels) else values[held__n],
                name=name,
                kind=kinds[i] if i < len(kinds) else "float",
                bins=bins,
                trained=[values[chosen] for chosen in trained],
                held=[values[chosen] for chosen in held],
            )
        )
    return ReferenceProfile(
        tuple(features),
        tuple(str(name) for name in names),
        tuple(int(chosen.sum()) for chosen in held),
        tuple(int(correct__n[chosen].sum()) for chosen in held),
        int(x__nct.shape[2]),
        profile_confidence.measure(
            confidence__n[held__n], correct__n[held__n], predicted__n[held__n], classes=classes
        ),
        profile_projection.measure(
            x__nct,
            trained=trained,
            held=held,
            bounds__c2=np.array([(each.low, each.high) for each in features[:-1]], np.float32),
            features=projected,
            seed=seed,
        )
        if projected
        else None,
    )


def with_devices(
    profile: ReferenceProfile, devices: Mapping[str, tuple[Table, Table]]
) -> ReferenceProfile:
    """Return the profile of a model that was also trained on devices, from their counters alone.

    A federated model has learned from devices whose windows the server never sees. What they are
    like is known all the same: their telemetry was counted in the same bins. With them the profile
    says whom the model was made with, and a device that taught it is no stranger to it. The result
    is for the server: a bundle goes to every device, and must not carry what others are like.
    Ranges, quantiles, moments, items and random features stay those of the server's own data.

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
            replace(
                feature,
                counts=tuple(int(count) for count in total),
                trained=feature.trained + early,
                held=feature.held + tuple(each[1] for each in halves),
            )
        )
    nothing = (0,) * len(devices)
    projection = profile.projection
    return replace(
        profile,
        features=tuple(features),
        groups=names,
        labelled=profile.labelled + nothing,
        correct=profile.correct + nothing,
        projection=projection.with_groups(len(devices)) if projection else None,
    )


def _row(table: Table, i: int, bins: int) -> tuple[int, ...]:
    if i >= len(table) or len(table[i]) != bins:
        raise ValueError(f"channel {i} of a device does not have the profile's {bins} bins")
    return tuple(int(count) for count in table[i])
