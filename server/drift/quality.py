"""Tell data that are broken from data that have changed. Pure.

    counters of a window --fold--> the last K windows --faults--> what is wrong with which feature

A null, a value outside the range of the training data, a value that stands still, a code that is no
whole number, a record of the wrong shape, and a sensor that falls silent are facts about a sensor,
whatever the world does. A code that training never met is counted in the same way, and is none: a
category has no range, and a new one is a change of the world. It is in ``SHIFTS``.

Null, for each device, feature and check: a window's share of such values exceeds what is allowed
with a probability of at most ``windows_bad_max``, given the windows before it. The p-value is the
binomial tail of the windows that do, of the last K: values inside a window depend on each other,
and nothing is assumed of them. :func:`judge` keeps the expected share of false discoveries over
device × feature × check at ``discoveries_false_max`` (Benjamini–Yekutieli: any dependence).

What is allowed is the profile's own share, if it tells, plus ``share_allowed``. Stuck values come
in spells: where a share p of the training data was stuck, a window is so as a whole or not at all.
By Markov's inequality at most ``windows_bad_max`` of such windows have a share above p /
``windows_bad_max``, and that is what is allowed. A count that rests for a tenth of the time is thus
never called stuck. Nor is a category, whatever its training data did: a machine may stay in a mode.

Sources: sign test against a quantile: Conover, "Practical Nonparametric Statistics" (1999) §3.2;
Benjamini, Yekutieli, Annals of Statistics 29 (2001).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .localise import binomial_tail
from .profile import FeatureProfile

NULLS: Final = "nulls"
BELOW: Final = "below"
ABOVE: Final = "above"
STUCK: Final = "stuck"
UNKNOWN: Final = "unknown"
FRACTION: Final = "fraction"
SCHEMA: Final = "schema"
RATE: Final = "rate"
CHECKS: Final[Mapping[str, str]] = {
    NULLS: "is missing",
    BELOW: "is below its range",
    ABOVE: "is above its range",
    STUCK: "stands still",
    UNKNOWN: "has unknown codes",
    FRACTION: "is no whole number",
    SCHEMA: "has the wrong shape",
    RATE: "comes too rarely",
}
"""Checks, and what a value that fails one does."""
SHIFTS: Final = frozenset({UNKNOWN})
"""Checks that tell of data that changed, not of data that are broken."""
CHECKS_EACH: Final = 4  # of a feature: nulls and two of a category, nulls and three of any other
CODES_SHOWN: Final = 3  # unknown codes of a feature
DEVICE: Final = ""
"""Name of the feature of checks that are of the device as a whole: schema and rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """When data are called broken."""

    block_windows: int = 12
    """Windows that a judgement looks back on."""
    share_allowed: float = 0.02
    """Share of a window's values that may fail a check beyond what the profile tells."""
    rate_min: float = 0.5
    """Share of the expected predictions that must come."""
    windows_bad_max: float = 0.1
    """Share of windows that may exceed what is allowed without anything being broken."""
    discoveries_false_max: float = 0.05
    """Expected share of false ones among the faults of one look at the fleet."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 2 <= self.block_windows <= 1000:
            raise ValueError("block_windows must be 2 to 1000")
        for name in ("windows_bad_max", "discoveries_false_max"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1)")
        if not 0 <= self.share_allowed < 1 or not 0 <= self.rate_min <= 1:
            raise ValueError("share_allowed must be in [0, 1), rate_min in [0, 1]")


@dataclass(frozen=True, slots=True)
class Fault:
    """One check that one feature of a device fails."""

    feature: str
    """Its name; "" = the device as a whole."""
    check: str
    """One of ``CHECKS``."""
    share: float
    """Share of its values, over the windows looked at, that failed; for the rate: missing."""
    allowed: float
    """Share that may."""
    windows_bad: int
    """Windows that exceeded it …"""
    windows: int
    """… of so many that told."""
    p_value: float
    """Of the null in the module head, 0 to 1."""
    codes: tuple[int, ...] = ()
    """The most frequent unknown codes, as far as the device tells them, the most frequent first."""

    @property
    def said(self) -> str:
        """What is wrong, without how often: ``gear: unknown code 9``, ``temp stands still``."""
        if self.check == UNKNOWN and self.codes:
            codes = ", ".join(map(str, self.codes))
            return f"{self.feature}: unknown code{'s' if len(self.codes) > 1 else ''} {codes}"
        return f"{self.feature or 'data'} {CHECKS[self.check]}"

    @property
    def key(self) -> str:
        """Feature and check, e.g. ``gyro_x:stuck``."""
        return f"{self.feature}:{self.check}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """What a window tells of the values of a category."""

    unknown: int
    """Whole numbers that are no code of the training data, at least."""
    fractions: int
    """Values that are no whole number, at least."""
    named: tuple[int, ...] = ()
    """The most frequent unknown codes that the device tells, the most frequent first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What one window tells of the quality of its data; a check that it does not tell is absent."""

    values: tuple[int, ...]
    """Values of each feature that were seen, nulls included."""
    failed: Mapping[str, tuple[int, ...]]
    """Check -> values of each feature that failed it."""
    schema: tuple[int, int] | None = None
    """(predictions refused for their shape, predictions in all)."""
    rate: tuple[int, int] | None = None
    """(expected, seen) predictions."""
    named: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Position of a category -> its unknown codes, as in :class:`Codes`."""


@dataclass(slots=True)
class QualityState:
    """The last windows of one device and model. ``to_dict`` is what the server keeps."""

    seen: dict[str, list[list[int]]] = field(default_factory=dict)
    """``feature:check`` -> [failed, of] of the last windows, oldest first; only of checks that a
    value failed in one of them: a device in order costs nothing."""
    told: dict[str, int] = field(default_factory=dict)
    """Check -> windows that told of it."""
    codes: dict[str, list[int]] = field(default_factory=dict)
    """Feature -> its unknown codes in the newest window that named some."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> QualityState:
        """Return the state that :meth:`to_dict` wrote; {} is a new one."""
        return cls(**raw)

    def fold(self, window: Counters, features: Sequence[str], *, config: QualityConfig) -> None:
        """Add one window.

        Args:
            window: Its counters.
            features: Names of the features, in the order of the counters; what the window tells
                of more features than these is left out.
            config: How far back to look.
        """
        for check, failed in window.failed.items():
            self.told[check] = self.told.get(check, 0) + 1
            for name, bad, of in zip(features, failed, window.values, strict=False):
                self._add(f"{name}:{check}", bad, of, config)
        self.codes |= {features[i]: list(named) for i, named in window.named.items() if named}
        self.codes = {n: each for n, each in self.codes.items() if f"{n}:{UNKNOWN}" in self.seen}
        if window.schema is not None:
            self.told[SCHEMA] = self.told.get(SCHEMA, 0) + 1
            self._add(f"{DEVICE}:{SCHEMA}", *window.schema, config)
        if window.rate is not None and window.rate[0] > 0:
            expected, seen = window.rate
            self.told[RATE] = self.told.get(RATE, 0) + 1
            self._add(f"{DEVICE}:{RATE}", max(0, expected - seen), expected, config)

    def _add(self, key: str, failed: int, of: int, config: QualityConfig) -> None:
        if of <= 0:
            return
        before = self.seen.get(key)
        if before is None:
            if failed == 0:
                return
            # The windows before were in order, and count as what they were.
            good = self.told[key.rpartition(":")[2]] - 1
            before = [[0, of]] * min(good, config.block_windows - 1)
        self.seen[key] = [*before, [min(failed, of), of]][-config.block_windows :]
        if not any(bad for bad, _ in self.seen[key]):
            del self.seen[key]


def codes(
    feature: FeatureProfile,
    *,
    bins: Sequence[int],
    items: Sequence[tuple[int, int, int]] | None,
    whole: int,
) -> Codes:
    """Return what a window tells of a category; what it cannot tell counts as known.

    Bins that were empty in training tell it of every window, items say which codes. A bin that is
    not empty though no code of the training data is in it was filled by devices that taught the
    model: what is in it is known to them.

    Args:
        feature: The category.
        bins: Counts of its bins, as many as the profile's.
        items: (code, low, high) of the window's frequent items; None: it came without sketches.
        whole: How many of its values were whole numbers; of no meaning without ``items``.
    """
    known = {item: bisect_right(feature.edges, item) for item, _ in feature.items}
    filled = {at for at, count in enumerate(feature.counts) if count and not feature.other}
    taught = filled - set(known.values())
    strange = [
        (code, low)
        for code, low, _ in items or ()
        if code not in known
        and bisect_right(feature.edges, code) not in taught
        and not (feature.other and feature.low <= code <= feature.high)
    ]
    fractions = max(0, sum(bins) - whole) if items is not None else 0
    unseen = sum(now for now, then in zip(bins, feature.counts, strict=True) if not then)
    return Codes(
        unknown=max(sum(low for _, low in strange), unseen - fractions),
        fractions=fractions,
        named=tuple(code for code, low in strange[:CODES_SHOWN] if low),
    )


def counters(
    quality: Mapping[str, Any],
    values: Sequence[int],
    nulls: Sequence[int],
    categories: Mapping[int, Codes] | None = None,
) -> Counters:
    """Return the counters of a window's record.

    Args:
        quality: The record's ``quality`` map, {} if it has none. What is not a list of
            non-negative integers in it is left out: a device's mistake costs its own evidence.
        values: Values of each feature that were not null.
        nulls: Null values of each feature.
        categories: What it tells of each category, by position. Of these stuck values do not
            count, and what is out of range is an unknown code or no whole number.
    """
    categories = categories or {}
    lists = {
        name: tuple(each)
        for name, each in quality.items()
        if isinstance(each, list | tuple)
        and all(type(number) is int and number >= 0 for number in each)
    }
    total = tuple(a + b for a, b in zip(values, nulls, strict=True))
    failed: dict[str, tuple[int, ...]] = {NULLS: tuple(nulls)}
    for check in (BELOW, ABOVE, STUCK):
        if check in lists:
            told = enumerate(lists[check])
            failed[check] = tuple(0 if i in categories else bad for i, bad in told)
    if categories:
        unknown, fractions = [0] * len(total), [0] * len(total)
        for i, found in categories.items():
            outside = sum(sum(lists.get(check, ())[i : i + 1]) for check in (BELOW, ABOVE))
            unknown[i] = max(found.unknown, outside - found.fractions)
            fractions[i] = found.fractions
        failed |= {UNKNOWN: tuple(unknown), FRACTION: tuple(fractions)}
    predictions = lists.get(RATE, ())
    refused = lists.get(SCHEMA, ())
    return Counters(
        values=total,
        failed=failed,
        schema=(refused[0], refused[0] + (predictions[1] if len(predictions) > 1 else 0))
        if refused
        else None,
        rate=(predictions[0], predictions[1]) if len(predictions) > 1 else None,
        named={i: found.named for i, found in categories.items()},
    )


def expected(features: Sequence[FeatureProfile]) -> dict[str, float]:
    """Return ``feature:check`` -> share of values that failed it already in the training data."""
    return {
        f"{feature.name}:{check}": failed / (feature.nulls + feature.values)
        for feature in features
        for check, failed in (
            (NULLS, feature.nulls),
            (BELOW, feature.below),
            (ABOVE, feature.above),
            (STUCK, feature.stuck),
        )
        if failed
    }


def faults(
    state: QualityState, *, expected: Mapping[str, float], config: QualityConfig
) -> list[Fault]:
    """Return what a device's windows tell against each of its features.

    Args:
        state: Of the device.
        expected: What :func:`expected` returns of the profile.
        config: What is allowed.
    """
    found = []
    for key, rows in state.seen.items():
        feature, _, check = key.rpartition(":")
        usual = expected.get(key, 0.0) / (config.windows_bad_max if check == STUCK else 1)
        allowed = min(1.0, usual + config.share_allowed)
        if check == RATE:
            allowed = 1 - config.rate_min
        bad = sum(failed > allowed * of for failed, of in rows)
        share = sum(failed for failed, _ in rows) / sum(of for _, of in rows)
        p_value = binomial_tail(bad, len(rows), config.windows_bad_max)
        named = tuple(state.codes.get(feature, ())) if check == UNKNOWN else ()
        found.append(Fault(feature, check, share, allowed, bad, len(rows), p_value, named))
    return found


def judge(
    fleet: Mapping[str, Sequence[Fault]], *, features: int, config: QualityConfig
) -> dict[str, list[Fault]]:
    """Return the faults of each device that stand, strongest first.

    Args:
        fleet: Faults by device, every judged device included.
        features: Features of the model; with the checks, how many questions were asked of each.
        config: Share of false discoveries.
    """
    total = max(1, len(fleet) * (features * CHECKS_EACH + 2))
    penalty = sum(1 / i for i in range(1, total + 1))
    ranked = sorted(
        ((device, fault) for device, found in fleet.items() for fault in found),
        key=lambda item: (item[1].p_value, -item[1].share),
    )
    passed = 0
    for rank, (_, fault) in enumerate(ranked, start=1):
        if fault.p_value <= rank * config.discoveries_false_max / (total * penalty):
            passed = rank
    kept: dict[str, list[Fault]] = {device: [] for device in fleet}
    for device, fault in ranked[:passed]:
        kept[device].append(fault)
    return kept
