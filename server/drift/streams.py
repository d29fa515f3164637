"""Watch each feature of a device against the device's own first windows. Pure.

    windows --first--> baseline --fit--> null of each stream --fold--> score --findings--> Findings

D devices of one model, F watched features, B bins; a stream is one feature of one device.
:mod:`.detectors` asks whether a device is unlike all that the model was made with; this file asks
whether it is still what it was when it began to run the model. A device that was always a little
special is no news here, and a small lasting change is, long before it leaves what others do.

**Null** and **error control** are those of :mod:`.e_cusum`: counts of a window are
over-dispersed around any mean within the tolerance of the baseline's; the streams of a model
together raise one false alarm in ``alarm.windows_per_false_alarm`` windows on average, given that
the baseline has not drifted and has seen what is usual (a day, with its cycle). In a device with an
alarm, further features are named by e-BH over device × feature at ``discoveries_false_max``.

**Baseline**: at least ``baseline_windows`` windows that span at least ``baseline_s``. It is kept in
at most twice as many rows: when they are full, neighbours are added up. The scatter of longer rows
is at least that of the windows, as far as the null tells, so a null fitted on them is no narrower.
The reference profile counts as one value a bin: a bin that the baseline never met is rare, not
impossible.

Rule 1: a model's state starts anew with the model; what is operated on here is of one model.
Rule 2: a score stops at ``SCORE_MAX``, which no threshold reaches: the end of a long change must
not take as long as the change did.

Sources: those of :mod:`.e_cusum` (Shin, Ramdas, Rinaldo, NEJSDS 2, 2023) and of
:mod:`.multiplicity` (Wang, Ramdas, JRSS B 84, 2022).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import multiplicity, statistics
from .detectors import Finding
from .e_cusum import ECusum, ECusumConfig, threshold
from .e_cusum_null import NullConfig, StreamNulls, fit
from .profile import CONFIDENCE, FeatureProfile, ReferenceProfile

Array = NDArray[np.float64]

SCORE_MAX: Final = 60.0  # nats; ln(1e6 streams x 1e9 windows) = 35
RADIUS_MAX: Final = 50.0  # nats: everything is usual for a stream of which too little was seen
COUNT_MAX: Final = 2**53
SCALARS: Final = 7  # of a stream: radius, inflation, concentration, score, windows, began (2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """When a device has changed since its first windows."""

    baseline_windows: int = 72
    """Windows at least that a device's null is fitted on …"""
    baseline_s: int = 86_400
    """… and time that they span at least, s: a day, so that its cycle is no change."""
    discoveries_false_max: float = 0.05
    """Expected share of false ones among the features named in devices with an alarm."""
    null: NullConfig = field(default_factory=lambda: NullConfig(tolerance_psi=0.0025))
    """What is still like the baseline; 0.0025 is a shift of 0.05 standard deviations."""
    alarm: ECusumConfig = field(
        default_factory=lambda: ECusumConfig(
            windows_per_false_alarm=100_000, strengths_smooth=(20.0, 100.0)
        )
    )
    """How rare false alarms are; 100,000 windows of 5 minutes are a year. The alternative of 20
    rows is for windows of few of them, which would teach the other one nothing."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not self.null.baseline_windows_min <= self.baseline_windows <= 1000:
            raise ValueError("baseline_windows must be null.baseline_windows_min to 1000")
        if not 0 <= self.baseline_s <= 366 * 86_400:
            raise ValueError("baseline_s must be 0 to 31622400 s")
        if not 0 < self.discoveries_false_max < 1:
            raise ValueError("discoveries_false_max must be in (0, 1)")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what is in a device's vector of numbers, and which features are watched."""

    bins: tuple[int, ...]
    """B of each feature of the profile, in its order."""
    look_back: int
    alternatives: int

    @classmethod
    def of(cls, bins: Sequence[int], config: StreamConfig) -> Layout:
        """Return the layout for features of so many bins."""
        return cls(tuple(bins), config.alarm.look_back, config.alarm.alternatives)

    def size(self, feature: int) -> int:
        """Return how many numbers a stream has; 0 = it has one bin, and nothing to watch."""
        bins = self.bins[feature]
        return 2 * bins + self.look_back + self.alternatives + SCALARS if bins > 1 else 0

    def columns(self, features: Sequence[int]) -> NDArray[np.intp]:
        """Return the places of some features' numbers, (features, size); they share B."""
        begins = np.cumsum([0, *(self.size(i) for i in range(len(self.bins)))])
        return begins[list(features)][:, None] + np.arange(self.size(features[0]))[None]

    def families(self) -> list[list[int]]:
        """Return the watched features, those of equal B together: they are folded at once."""
        found: dict[int, list[int]] = {}
        for i, bins in enumerate(self.bins):
            if bins > 1:
                found.setdefault(bins, []).append(i)
        return list(found.values())


@dataclass(slots=True)
class Streams:
    """The streams of one device and model. ``to_dict`` is what the server keeps."""

    windows: int = 0
    """Windows of the baseline."""
    step: int = 1
    """Windows in each row of it."""
    first_ms: int = 0
    last_ms: int = 0
    """The time that it spans."""
    rows: NDArray[np.int64] | None = None
    """Counts, (rows, sum of all B); the last one may be filling. None: it was fitted."""
    vector: Array | None = None
    """All numbers of the streams, see :class:`Layout`; None: the baseline is not complete."""
    shape: tuple[int, ...] = ()
    """look_back, alternatives, B of each feature."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values: numbers as little-endian base64, exactly."""
        raw: dict[str, Any] = {
            "windows": self.windows,
            "step": self.step,
            "span_ms": [self.first_ms, self.last_ms],
            "shape": list(self.shape),
        }
        if self.rows is not None:
            raw["rows"] = _pack(self.rows, "<i8" if self.rows.max(initial=0) >> 31 else "<i4")
            raw["wide"] = bool(self.rows.max(initial=0) >> 31)
        if self.vector is not None:
            raw["vector"] = _pack(self.vector, "<f8")
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], layout: Layout) -> Streams:
        """Return the state that :meth:`to_dict` wrote; a new one if there is none that fits.

        A state of other bins, or of another ``look_back`` or other strengths, is of another
        configuration, and the device is learned anew.
        """
        shape = (layout.look_back, layout.alternatives, *layout.bins)
        new = cls(shape=shape, rows=np.zeros((0, sum(layout.bins)), np.int64))
        try:
            if tuple(raw["shape"]) != shape:
                return new
            first_ms, last_ms = map(int, raw["span_ms"])
            state = cls(int(raw["windows"]), int(raw["step"]), first_ms, last_ms, shape=shape)
            if "rows" in raw:
                numbers = _unpack(raw["rows"], "<i8" if raw["wide"] else "<i4")
                state.rows = numbers.astype(np.int64).reshape(-1, sum(layout.bins))
            if "vector" in raw:
                state.vector = _unpack(raw["vector"], "<f8").astype(np.float64)
                if len(state.vector) != sum(map(layout.size, range(len(layout.bins)))):
                    return new
                if not np.isfinite(state.vector).all():
                    return new
        except (KeyError, TypeError, ValueError):
            return new
        return state if (state.rows is None) != (state.vector is None) else new


Counted = tuple[Sequence[Sequence[int]], int]
"""Counts of a window, F x B, and its time, Unix ms."""


def fold(
    devices: Sequence[Streams],
    windows: Sequence[Sequence[Counted]],
    profile: ReferenceProfile,
    *,
    config: StreamConfig,
) -> None:
    """Add windows to the streams of devices of one model.

    Args:
        devices: Their streams.
        windows: New windows of each device, in their order.
        profile: Of the model; its bins are those of the windows.
        config: When a baseline is complete.
    """
    layout = Layout.of([len(each.counts) for each in profile.features], config)
    queues = [
        [(np.concatenate([np.asarray(row, np.int64) for row in counts]), at) for counts, at in told]
        for told in windows
    ]
    complete = [
        device
        for device, queue in zip(devices, queues, strict=True)
        if device.vector is None and _learn(device, queue, config)
    ]
    if complete:
        _fit(complete, profile, layout, config)
    for at in range(max((len(queue) for queue in queues), default=0)):
        there = [i for i, queue in enumerate(queues) if at < len(queue)]
        vectors = [devices[i].vector for i in there]
        table = np.stack([each for each in vectors if each is not None])
        counts = np.stack([queues[i][at][0] for i in there])
        times = np.array([queues[i][at][1] for i in there])
        _fold(table, counts, times, layout, config)
        for i, row in zip(there, table, strict=True):
            devices[i].vector = row


def findings(
    devices: Sequence[Streams], profile: ReferenceProfile, *, config: StreamConfig
) -> list[list[Finding]]:
    """Return what has changed in each device since its first windows, strongest first.

    Args:
        devices: The streams of all devices that run the model: the threshold counts them.
        profile: Of the model.
        config: How rare false alarms are.

    Returns:
        For each device, its streams beyond the threshold and, where there is one, its other
        features that are discoveries too. Of each: ``p_value`` = 1 / e-value of "no change within
        the last ``look_back`` windows"; ``effect`` = Hellinger distance of what came since the
        change to the baseline; ``normal`` = distance that is tolerated; ``since`` and ``since_ms``
        = the change point. A confidence that rises is none.
    """
    layout = Layout.of([len(each.counts) for each in profile.features], config)
    found: list[list[Finding]] = [[] for _ in devices]
    told = [i for i, each in enumerate(devices) if each.vector is not None]
    if not told:
        return found
    table = np.stack([v for i in told if (v := devices[i].vector) is not None])
    score__df, e__df = (np.full((len(told), len(layout.bins)), v) for v in (0.0, 1.0))
    parts: dict[int, tuple[StreamNulls, ECusum, int, int]] = {}
    live = 0
    for features in layout.families():
        nulls, state = _open(table, features, layout)
        shape = (len(told), len(features))
        score__df[:, features] = state.score__s.reshape(shape)
        e__df[:, features] = state.e_values().reshape(shape)
        live += int((nulls.radius__s < RADIUS_MAX).sum())
        parts |= {f: (nulls, state, j, len(features)) for j, f in enumerate(features)}
    alarms__df = score__df > threshold(live, config=config.alarm)
    named = multiplicity.hierarchy(e__df, config.discoveries_false_max).features__df
    changed__df = alarms__df | (named & alarms__df.any(1, keepdims=True))
    for d, f in np.argwhere(changed__df).tolist():
        nulls, state, j, width = parts[f]
        at, feature = d * width + j, profile.features[f]
        each = _finding(feature, nulls, state, at, devices[told[d]].windows, float(e__df[d, f]))
        if feature.name != CONFIDENCE or each.direction < 0:
            found[told[d]].append(each)
    for each_device in found:
        each_device.sort(key=lambda each: (each.p_value, -each.effect))
    return found


def _learn(
    device: Streams, queue: list[tuple[NDArray[np.int64], int]], config: StreamConfig
) -> bool:
    """Move windows from the queue into the baseline; say whether it is complete."""
    rows = device.rows
    if rows is None:
        raise ValueError("streams without a vector have a baseline")
    while queue:
        counts, at_ms = queue.pop(0)
        if not device.windows:
            device.first_ms = device.last_ms = at_ms
        if device.windows % device.step == 0:
            if len(rows) == 2 * config.baseline_windows:
                rows, device.step = rows[::2] + rows[1::2], 2 * device.step
            rows = np.vstack([rows, counts])
        else:
            rows[-1] += counts
        device.rows = rows
        device.windows += 1
        device.first_ms = min(device.first_ms, at_ms)
        device.last_ms = max(device.last_ms, at_ms)
        whole = device.windows % device.step == 0
        span_ms = device.last_ms - device.first_ms
        if whole and len(rows) >= config.baseline_windows and span_ms >= 1000 * config.baseline_s:
            return True
    return False


def _fit(
    devices: Sequence[Streams], profile: ReferenceProfile, layout: Layout, config: StreamConfig
) -> None:
    """Fit the nulls of devices whose baseline is complete, each feature over all of them."""
    table = np.zeros((len(devices), sum(map(layout.size, range(len(layout.bins))))))
    longest = max(len(each.rows) for each in devices if each.rows is not None)
    begins = np.cumsum([0, *layout.bins])
    baseline = np.zeros((len(devices), longest, begins[-1]), np.int64)
    for i, each in enumerate(devices):
        if each.rows is not None:
            baseline[i, : len(each.rows)] = each.rows  # rows of zeros are missing ones
    for features in layout.families():
        for f in features:
            bins = layout.bins[f]
            part = baseline[:, :, begins[f] : begins[f + 1]]
            reference = np.asarray(profile.features[f].counts, np.float64) + 1e-3
            reference = reference / reference.sum() * bins
            nulls = _nulls(reference, part, config)
            state = ECusum.new(len(devices), bins, config=config.alarm)
            _close(table, nulls, state, [f], layout)
    for each, row in zip(devices, table, strict=True):
        each.rows, each.vector = None, row


def _nulls(
    reference__b: Array, baseline__dwb: NDArray[np.int64], config: StreamConfig
) -> StreamNulls:
    """Return a null for each device; one of which too little was seen can never be left."""
    enough = (baseline__dwb.sum(2) > 0).sum(1) >= config.null.baseline_windows_min
    devices = len(baseline__dwb)
    centre = np.tile(reference__b / reference__b.sum(), (devices, 1))
    radius, one, much = np.full(devices, RADIUS_MAX), np.ones(devices), np.full(devices, 1e6)
    if enough.any():
        known = fit(reference__b, baseline__dwb[enough], config=config.null)
        centre[enough], radius[enough] = known.centre__sb, np.minimum(known.radius__s, RADIUS_MAX)
        one[enough], much[enough] = known.inflation__s, known.concentration__s
    return StreamNulls(centre, radius, one, much)


def _fold(
    table: Array,
    counts: NDArray[np.int64],
    times: NDArray[np.int64],
    layout: Layout,
    config: StreamConfig,
) -> None:
    """Add one window of each device, in place."""
    begins = np.cumsum([0, *layout.bins])
    for features in layout.families():
        nulls, state = _open(table, features, layout)
        places = np.stack([np.arange(begins[f], begins[f + 1]) for f in features])
        before = state.began__s.copy()
        state.fold(counts[:, places].reshape(len(state), -1), nulls, now_ms=0, config=config.alarm)
        state.score__s = np.minimum(state.score__s, SCORE_MAX)
        begun = state.began__s != before
        state.began_ms__s = np.where(begun, np.repeat(times, len(features)), state.began_ms__s)
        _close(table, nulls, state, features, layout)


def _open(table: Array, features: Sequence[int], layout: Layout) -> tuple[StreamNulls, ECusum]:
    """Return the nulls and states of all devices' features, (device, feature) flat."""
    part = table[:, layout.columns(features)].reshape(-1, layout.size(features[0]))
    bins, back, others = layout.bins[features[0]], layout.look_back, layout.alternatives
    widths = [bins, 1, 1, 1, 1, bins, back, others, 1, 1, 1]
    cut = np.split(part, np.cumsum(widths)[:-1], 1)
    nulls = StreamNulls(cut[0], *(each[:, 0] for each in cut[1:4]))
    whole = [np.rint(each[:, 0]).astype(np.int64) for each in cut[8:]]
    score = cut[4][:, 0].copy()
    learned, recent, trust = (each.copy() for each in cut[5:8])
    return nulls, ECusum(score, learned, recent, trust, *whole)


def _close(
    table: Array, nulls: StreamNulls, state: ECusum, features: Sequence[int], layout: Layout
) -> None:
    """Put what :func:`_open` took back into the table."""
    scalars = [nulls.radius__s, nulls.inflation__s, nulls.concentration__s, state.score__s]
    whole = [state.windows__s, state.began__s, state.began_ms__s]
    part = np.concatenate(
        [
            nulls.centre__sb,
            *(each[:, None] for each in scalars),
            state.learned__sb,
            state.recent__sl,
            state.trust__sa,
            *(np.minimum(each, COUNT_MAX)[:, None].astype(np.float64) for each in whole),
        ],
        1,
    )
    table[:, layout.columns(features)] = part.reshape(len(table), len(features), -1)


def _finding(
    feature: FeatureProfile,
    nulls: StreamNulls,
    state: ECusum,
    at: int,
    baseline: int,
    e_value: float,
) -> Finding:
    learned, centre = state.learned__sb[at], nulls.centre__sb[at]
    expected = centre * max(1.0, 1000 * learned.sum())  # known well: its error is in the radius
    return Finding(
        feature.name,
        min(1.0, 1 / max(e_value, 1e-300)),
        statistics.hellinger(expected, learned),
        math.sqrt(nulls.radius__s[at]) / 2,  # KL(centre || p) = 4 H^2 for small distances H
        statistics.direction(expected, learned) if feature.ordered else 0.0,
        psi=statistics.psi(expected, learned),
        since=baseline + int(state.began__s[at]),
        since_ms=int(state.began_ms__s[at]),
        ordered=feature.ordered,
    )


def _pack(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> NDArray[Any]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype)
    except binascii.Error as exc:
        raise ValueError("the numbers of a state are no base64") from exc
