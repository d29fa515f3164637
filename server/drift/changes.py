"""Find the window at which a score began to change: Page–Hinkley and ADWIN on window sums. Pure.

    (sum, count) of a score per window --PageHinkley.fold--> which of many streams rose or fell
                                       --Adwin.add---------> where one stream's past was cut off

Scores are means of values in [0, 1] (confidence, correctness, a distance). Page–Hinkley knows its
null from baseline windows, costs four numbers a stream, and is the quicker for a small lasting
change. ADWIN needs no baseline and says since when things are as they are. Both take a *window* as
one independent observation whose variance falls with its count; values within a window may depend
on each other. Neither says whether a change matters: effects and multiplicity are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

OVERSHOOT: Final = 1.166  # Siegmund's correction of the threshold: mean excess at both ends
CAREFUL_Z: Final = 0.8416212335729143  # normal quantile of .8: as far as a baseline is let err
BUCKETS: Final = 5  # of each size in ADWIN's histogram, M of the paper: cuts are within 1/M exact
ROWS_MAX: Final = 40  # sizes of buckets: 2^40 windows, more than will ever come


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHinkleyConfig:
    """What is a change, and how rare false alarms are."""

    tolerance: float = 0.25
    """Shifts of a window mean below this many of its standard deviations never add up; it is
    quickest for twice as much."""
    alarm_windows: float = 100_000.0
    """Mean windows of one stream between two false alarms, both directions together."""
    deviation_min: float = 0.01
    """Of one value: a score that hardly varied in the baseline may vary so much."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0.01 <= self.tolerance <= 3 or not 0 < self.deviation_min < math.inf:
            raise ValueError("tolerance must be 0.01 to 3, deviation_min above 0")
        if not 10 <= self.alarm_windows <= 1e15:
            raise ValueError("alarm_windows must be 10 to 1e15")

    @property
    def threshold(self) -> float:
        """The sum, in standard deviations, from which on it is an alarm.

        Solves ``ARL = (exp(2 d b) - 2 d b - 1) / (2 d^2)``, b = threshold + 1.166, d = tolerance,
        for twice ``alarm_windows`` (two directions).

        Source: Siegmund, "Sequential Analysis" (1985): the corrected approximation of Page's test.
        """
        low, high = 0.0, 1e5
        for _ in range(100):
            middle = (low + high) / 2
            power = 2 * self.tolerance * (middle + OVERSHOOT)
            length = math.expm1(min(power, 600.0)) - power
            if length / (2 * self.tolerance**2) < 2 * self.alarm_windows:
                low = middle
            else:
                high = middle
        return high


@dataclass(slots=True)
class PageHinkley:
    """Two-sided Page–Hinkley tests of S streams; every field has shape (S,).

    ``up = max(0, up + z - d)`` and ``down`` likewise, z = (window mean - mean) sqrt(count) /
    deviation; an alarm stands while one is above the threshold h. Sums stop at 2 h, so that an
    alarm ends at most h / d windows after the change did.

    Null: window means are independent, normal in the limit, with the baseline's mean and with
    variance deviation^2 / count. Error control: the mean run to a false alarm is ``alarm_windows``
    per stream for a known baseline; one of W windows is never known well, hence ``baseline``
    takes the .8 upper limit of the deviation, and d grows by the .8 limit of the mean's error
    (measured over baselines of 5 to 100 windows: half to three quarters of the false alarms
    stated; without it, up to three times as many). Autocorrelated windows alarm more often.

    Source: Page, Biometrika 41 (1954); Hinkley, Biometrika 58 (1971).
    """

    mean: Array
    deviation: Array
    """Of one value, as the scatter of window means tells it; not of the values themselves."""
    doubt: Array
    """Standard error of ``mean`` over ``deviation``; 0 if it is known."""
    up: Array
    down: Array

    @classmethod
    def baseline(cls, sums: ArrayLike, counts: ArrayLike) -> PageHinkley:
        """Return new tests whose null is fitted on baseline windows.

        Args:
            sums: Sum of the score in each window, (S, W).
            counts: Values in each window, (S, W); windows of 0 are left out, at least 3 remain.

        Raises:
            ValueError: Shapes, non-finite sums, counts below 0, or fewer than 3 windows.
        """
        totals, sizes = _windows(sums, counts, 2)
        some = sizes > 0
        windows, size = some.sum(-1), sizes.sum(-1)
        if (windows < 3).any():
            raise ValueError("a baseline needs at least 3 windows with values per stream")
        mean = totals.sum(-1) / size
        each = totals / np.where(some, sizes, 1.0)
        freedom = windows - 1
        variance = (sizes * (each - mean[:, None]) ** 2).sum(-1) / freedom
        # The .2 quantile of chi-squared over its freedom (Wilson, Hilferty, PNAS 17 (1931)).
        width = 2 / (9 * freedom)
        least = np.maximum(1 - width - CAREFUL_Z * np.sqrt(width), 0.1) ** 3
        zero = np.zeros(len(mean))
        return cls(mean, np.sqrt(variance / least), 1 / np.sqrt(size), zero, zero.copy())

    def fold(self, sums: ArrayLike, counts: ArrayLike, *, config: PageHinkleyConfig) -> Array:
        """Add one window of each stream.

        Args:
            sums: Sum of the score, (S,).
            counts: Values, (S,); a stream with 0 stays as it is.
            config: Tolerance and threshold.

        Returns:
            float64 (S,): +1 = alarm, the score rose; -1 = alarm, it fell; 0 = none.

        Raises:
            ValueError: Shapes, non-finite sums or counts below 0; nothing was added.
        """
        totals, sizes = _windows(sums, counts, 1)
        if totals.shape != self.mean.shape:
            raise ValueError(f"{len(totals)} windows do not fit {len(self.mean)} streams")
        some = sizes > 0
        root = np.sqrt(sizes)
        spread = np.maximum(self.deviation, config.deviation_min)
        z = np.where(some, totals / np.where(some, sizes, 1.0) - self.mean, 0.0) * root / spread
        slack = np.where(some, config.tolerance + CAREFUL_Z * self.doubt * root, 0.0)
        most = config.threshold
        self.up = np.clip(self.up + z - slack, 0.0, 2 * most)
        self.down = np.clip(self.down - z - slack, 0.0, 2 * most)
        sign = np.where(self.up >= self.down, 1.0, -1.0)
        return np.where(np.maximum(self.up, self.down) > most, sign, 0.0)

    def to_dict(self) -> dict[str, list[float]]:
        """Return the state as JSON values."""
        return {name: getattr(self, name).tolist() for name in self.__slots__}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PageHinkley:
        """Return the state that :meth:`to_dict` wrote.

        Raises:
            ValueError: A field is missing, not finite, or of another length.
        """
        try:
            fields = [np.asarray(raw[name], np.float64) for name in cls.__slots__]
        except (KeyError, TypeError) as exc:
            raise ValueError(f"the Page–Hinkley state is malformed: {exc!r}") from exc
        if any(each.shape != (len(fields[0]),) or not np.isfinite(each).all() for each in fields):
            raise ValueError("the Page–Hinkley state has fields of other lengths, or no numbers")
        return cls(*fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdwinConfig:
    """How sure a cut must be."""

    false_max: float = 0.002
    """Chance of a false cut per window, at most; the delta of the paper."""
    windows_min: int = 16
    """Windows before anything is cut: fewer do not tell their own scatter."""
    side_min: int = 4
    """Windows on each side of a cut, at least."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.false_max < 1:
            raise ValueError("false_max must be within (0, 1)")
        if not 2 <= 2 * self.side_min <= self.windows_min <= 1 << 20 or self.windows_min < 4:
            raise ValueError("4 <= 2 side_min <= windows_min <= 2^20 must hold")


Bucket = tuple[int, float, float, float]
"""Windows, values in them, their sum, and the scatter sum count (mean - bucket mean)^2."""


@dataclass(slots=True)
class Adwin:
    """An adaptive window over one stream: it grows while the mean stays, and is cut when it moves.

    An exponential histogram holds at most 5 + 1 buckets of 1, 2, 4, ... windows: memory grows with
    the logarithm of the windows. A cut between two buckets is made if the means of both sides
    differ by more than

        sqrt(2 v / m ln(2 / d')) + 2 / (3 m) ln(2 / d'),   1/m = 1/n_old + 1/n_new,

    with n the values of each side, d' = ``false_max`` / cuts looked at, and v the variance of one
    value *as the window means scatter*: sum count (mean_t - mean)^2 / (windows - 1). In place of
    the values' own variance it makes the test right for values that depend on each other within a
    window (over-dispersion), and for scores whose squares nobody sent. Of several cuts the one with
    the largest excess is made, again and again until there is none.

    Null: window means are independent with one expectation, values in [0, 1]. Error control: a cut
    is false with chance <= ``false_max`` per window (the paper's theorem on false positives, with
    Bernstein's bound, v taken as known; measured in the tests: below a tenth of it, over-dispersed
    or not).

    Source: Bifet, Gavalda, "Learning from time-changing data with adaptive windowing", SDM 2007:
    the cut with the variance, and the exponential histogram.
    """

    rows: list[list[Bucket]] = field(default_factory=list)
    """Row i: buckets of 2^i windows, oldest first."""

    def add(self, total: float, count: float, *, config: AdwinConfig) -> tuple[float, float] | None:
        """Add one window; cut the past off if the mean moved.

        Args:
            total: Sum of the score, each value 0 to 1.
            count: Values; 0 changes nothing.
            config: How sure a cut must be.

        Returns:
            (mean of what was cut off, mean of what stays), or None without a cut.

        Raises:
            ValueError: Not finite, or the mean is not within 0 to 1; nothing was added.
        """
        if not (math.isfinite(total) and math.isfinite(count) and count >= 0):
            raise ValueError("sums and counts must be finite, counts not below 0")
        if not -1e-9 * count <= total <= count * (1 + 1e-9):
            raise ValueError("values must be within 0 and 1")
        if not count:
            return None
        self._insert((1, count, total, 0.0))
        gone: list[Bucket] = []
        while (cut := self._cut(config)) is not None:
            gone.extend(self._drop() for _ in range(cut))
        if not gone:
            return None
        return sum(each[2] for each in gone) / sum(each[1] for each in gone), self.mean

    @property
    def windows(self) -> int:
        """How many windows are alike: the change was so many windows ago, or never."""
        return sum(each[0] for row in self.rows for each in row)

    @property
    def mean(self) -> float:
        """Mean of the score since the last change; NaN before any window."""
        counted = sum(each[1] for row in self.rows for each in row)
        summed = sum(each[2] for row in self.rows for each in row)
        return summed / counted if counted else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"rows": [[list(each) for each in row] for row in self.rows]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Adwin:
        """Return the state that :meth:`to_dict` wrote; {} is a new one.

        Raises:
            ValueError: A bucket is malformed, or there are more than fit.
        """
        try:
            rows = [
                [(int(a), float(b), float(c), float(d)) for a, b, c, d in row]
                for row in raw.get("rows", [])
            ]
        except (TypeError, ValueError) as exc:
            raise ValueError(f"the ADWIN state is malformed: {exc!r}") from exc
        if len(rows) > ROWS_MAX or any(len(row) > BUCKETS for row in rows):
            raise ValueError("the ADWIN state has more buckets than fit")
        if any(
            each[0] != 1 << i or each[1] <= 0 or not all(map(math.isfinite, each))
            for i, row in enumerate(rows)
            for each in row
        ):
            raise ValueError("the ADWIN state has buckets of other sizes, or no numbers")
        return cls(rows)

    def _insert(self, bucket: Bucket) -> None:
        for i in range(ROWS_MAX):
            if i == len(self.rows):
                self.rows.append([])
            self.rows[i].append(bucket)
            if len(self.rows[i]) <= BUCKETS:
                return
            bucket = _joined(self.rows[i].pop(0), self.rows[i].pop(0))

    def _drop(self) -> Bucket:
        while not self.rows[-1]:
            self.rows.pop()
        return self.rows[-1].pop(0)

    def _cut(self, config: AdwinConfig) -> int | None:
        """Return how many of the oldest buckets to cut off, or None."""
        buckets = [each for row in reversed(self.rows) for each in row]
        held = np.array(buckets)
        windows_all, n_all, summed_all, scatter = held.sum(0)
        if windows_all < config.windows_min:
            return None
        mean = summed_all / n_all
        scatter += (held[:, 1] * (held[:, 2] / held[:, 1] - mean) ** 2).sum()
        windows, n, summed = np.cumsum(held[:-1, :3], 0).T
        sides = np.minimum(windows, windows_all - windows) >= config.side_min
        if not sides.any():
            return None
        variance = scatter / (windows_all - 1)
        log = math.log(2 * sides.sum() / config.false_max)
        share = 1 / n + 1 / (n_all - n)
        allowed = np.sqrt(2 * variance * share * log) + 2 / 3 * share * log
        apart = abs(summed / n - (summed_all - summed) / (n_all - n))
        excess = np.where(sides, apart - allowed, -1.0)
        best = int(excess.argmax())
        return best + 1 if excess[best] > 0 else None


def _joined(one: Bucket, two: Bucket) -> Bucket:
    """Return the bucket of both; the scatter by Chan, Golub, LeVeque's update."""
    n = one[1] + two[1]
    gap = one[2] / one[1] - two[2] / two[1]
    scatter = one[3] + two[3] + gap * gap * one[1] * two[1] / n
    return one[0] + two[0], n, one[2] + two[2], scatter


def _windows(sums: ArrayLike, counts: ArrayLike, axes: int) -> tuple[Array, Array]:
    totals, sizes = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if totals.ndim != axes or totals.shape != sizes.shape:
        raise ValueError(f"sums {totals.shape} and counts {sizes.shape} must be alike, {axes}-d")
    if not (np.isfinite(totals) & np.isfinite(sizes) & (sizes >= 0)).all():
        raise ValueError("sums and counts must be finite, counts not below 0")
    return totals, sizes
