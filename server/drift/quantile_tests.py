"""Kolmogorov–Smirnov and Wasserstein between sketches, the sketches' own error accounted for. Pure.

    sketch --> Quantiles (values, weights, n, V) --ks-----------> D, its bounds, p-value
                                                 --wasserstein--> distance, its bounds, effect
    bins   -------------------------------------- ks_binned ----> D on the edges, p-value

A sketch knows ranks up to an error; a test that ignores it calls identical data drifted when the
sketch is small. V (squared counts) bounds it: for any fixed value, P(|rank error| > t) <=
2 exp(-t^2 / 2V), the sub-Gaussian certificate that travels beside each sketch and adds on merge.
For **all** values at once, put j = 1 ... M - 1 marks at the true quantiles j/M: between two marks
the true rank moves by at most n/M, so that

    P(sup |rank error| > t + n/M) <= 4 (M - 1) exp(-t^2 / 2V)

(twice per mark: ties make the ranks below and up to a mark differ). M is free, and chosen best.
The marks do not depend on the sketch's coins, hence no bound is broken by looking at the sketch.
With certainty, sup |rank error| <= V: a compaction of groups of weight G >= 2 errs by at most G/2
and adds G^2/4 to V; that is what makes the sketches of small windows nearly exact.

The null of both tests is that reference and observed values are independent samples of one
distribution; values of a sensor depend on each other, see :mod:`.statistics` for what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .special import kolmogorov_above

Array = NDArray[np.float64]

MARKS__M: Final = 2.0 ** np.arange(1, 25)  # as many as make the uniform bound best; 2 ... 16 M
SHARES__E: Final = 10.0 ** -np.arange(0.5, 18.0, 0.5)  # chances of a sketch error to trade against


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution as a sketch, or all values, knows it."""

    values: Array
    """Ascending, (R,), no NaN; +-Inf are values."""
    weights: Array
    """How many values each stands for, > 0, (R,); their sum is n."""
    variance: float
    """V in squared counts; 0: the ranks are exact."""
    minimum: float
    """The least value of all, at most ``values[0]``."""
    maximum: float
    """The greatest value of all, at least ``values[-1]``."""
    slack: float = 0.0
    """What the shares may be off beyond V, with certainty: 1/(2Q) of Q quantiles on a grid."""

    def __post_init__(self) -> None:
        """Check what the tests rely on."""
        values, weights = self.values, self.weights
        if values.ndim != 1 or values.shape != weights.shape or not len(values):
            raise ValueError("a distribution needs as many weights as values, and at least one")
        if np.isnan(values).any() or (values[1:] < values[:-1]).any():
            raise ValueError("values must ascend, and none may be NaN")
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError("weights must be finite and above 0")
        if not 0 <= self.variance < math.inf or not 0 <= self.slack <= 1:
            raise ValueError("the variance must be finite and not below 0, the slack 0 to 1")
        if not (self.minimum <= values[0] and values[-1] <= self.maximum):
            raise ValueError("minimum and maximum must enclose the values")

    @property
    def n(self) -> float:
        """How many values there were."""
        return float(self.weights.sum())

    @classmethod
    def of_grid(
        cls, quantiles: ArrayLike, *, n: float, variance: float, minimum: float, maximum: float
    ) -> Quantiles:
        """Return the distribution whose quantiles at (i + 1/2) / Q, i = 0 ... Q - 1, are given.

        Args:
            quantiles: Ascending, (Q,), as a merged sketch answers them.
            n: How many values there were.
            variance: V of the sketch, in squared counts.
            minimum: Least value of all.
            maximum: Greatest value of all.

        Raises:
            ValueError: There is none, they do not ascend, or a number is out of its range.
        """
        values = np.asarray(quantiles, np.float64)
        size = max(1, values.size)
        weights = np.full(values.shape, n / size)
        return cls(values, weights, variance, minimum, maximum, 1 / (2 * size))

    def shares(self, at: Array) -> Array:
        """Return the share of values <= each of ``at``, 0 to 1."""
        summed = np.concatenate([[0.0], np.cumsum(self.weights)])
        return np.asarray(summed[np.searchsorted(self.values, at, side="right")] / summed[-1])

    def quantile(self, share: float) -> float:
        """Return the least value whose rank reaches ``share`` (0 to 1) of all."""
        summed = np.cumsum(self.weights)
        at = int(np.searchsorted(summed, share * summed[-1], side="left"))
        return float(self.values[min(at, len(self.values) - 1)])

    def errors(self, chances__e: Array) -> Array:
        """Return the e with P(sup |share error| > e) <= chance, 0 to 1, for each chance, (E,)."""
        if not self.variance:
            return np.full(len(chances__e), self.slack)
        logs = np.log(4 * (MARKS__M - 1) / chances__e[:, None])
        spread = np.sqrt(2 * self.variance * np.maximum(logs, 0)) / self.n
        found = np.minimum((spread + 1 / MARKS__M).min(1), self.variance / self.n)
        return np.asarray(np.minimum(1.0, found + self.slack))


@dataclass(frozen=True, slots=True)
class KolmogorovSmirnov:
    """What the test found."""

    statistic: float
    """Largest difference of the two sketches' shares, 0 to 1."""
    low: float
    """The difference of the values themselves is at least this, at ``confidence_sketch``, …"""
    high: float
    """… and at most this; both 0 to 1."""
    p_value: float


@dataclass(frozen=True, slots=True)
class Wasserstein:
    """How far mass must be moved, in the unit of the feature."""

    estimate: float
    low: float
    """The distance of the values themselves is at least this, at ``confidence_sketch``, …"""
    high: float
    """… and at most this."""
    usual: float
    """Its mean if nothing changed: sampling alone moves this much of the finite values."""
    effect: float
    """``(estimate - usual) / scale``, not below 0; inf if the reference has no scale and the
    estimate is not 0."""
    scale: float
    """Interquartile range of the reference; if that is 0, its standard deviation."""


def ks(
    reference: Quantiles, observed: Quantiles, *, confidence_sketch: float = 0.99
) -> KolmogorovSmirnov:
    """Return the two-sample Kolmogorov–Smirnov test between sketches.

    Null: the values are independent samples of one continuous distribution (ties make the test
    careful). Error control: P(p_value <= a) <= a, whatever the sketches' size. Two bounds of
    P(reported difference D' >= d) hold, and p_value is the least of them:

    1. D' exceeds d only if the difference of the values exceeds d - e or the sketches err by more
       than e in sum: ``Q(sqrt(N) (d - e)) + P(error > e)``, N = nm / (n + m), for every e (a fixed
       grid). Its first part is asymptotic; exact values (V = 0) get the classical p-value by it.
    2. At any mark sampling and sketches err independently, and Hoeffding's proxies add:
       ``2M exp(-(d - 1/M)^2 / (2 s^2))``, s^2 = 1/(4N) + V_n / n^2 + V_m / m^2, for every M. It
       holds for any n, m, and is the less where both kinds of error are alike large.

    One test; multiplicity is the caller's.

    Args:
        reference: What is compared with.
        observed: What was seen.
        confidence_sketch: Of ``low`` and ``high``, within (0, 1); shared out over both sketches.

    Raises:
        ValueError: ``confidence_sketch`` is out of its range.

    Source: Smirnov, Bull. Math. Univ. Moscou 2 (1939), with the limit of :mod:`.special`;
    sampling and the sketch's certificate: Hoeffding, JASA 58 (1963), the lemma on bounded
    variables, summed over values and compactions.
    """
    if not 0 < confidence_sketch < 1:
        raise ValueError(f"a confidence is within (0, 1), not {confidence_sketch}")
    at = np.concatenate([reference.values, observed.values])
    statistic = float(abs(reference.shares(at) - observed.shares(at)).max())
    root = math.sqrt(reference.n * observed.n / (reference.n + observed.n))
    chances = SHARES__E if reference.variance or observed.variance else np.zeros(1)
    # Each sketch may err with half the chance; an exact one leaves it all to the other.
    parts = max(1, sum(each.variance > 0 for each in (reference, observed)))
    errors = reference.errors(chances / parts) + observed.errors(chances / parts)
    worst = kolmogorov_above(root * np.maximum(statistic - errors, 0)) + chances
    proxy = 1 / (4 * root**2) + sum(each.variance / each.n**2 for each in (reference, observed))
    beyond = np.maximum(0, statistic - 1 / MARKS__M - reference.slack - observed.slack)
    joint = 2 * MARKS__M * np.exp(-(beyond**2) / (2 * proxy))
    chosen = np.array([(1 - confidence_sketch) / parts])
    error = float((reference.errors(chosen) + observed.errors(chosen))[0])
    return KolmogorovSmirnov(
        statistic,
        max(0.0, statistic - error),
        min(1.0, statistic + error),
        float(min(1.0, worst.min(), joint.min())),
    )


def ks_binned(expected: ArrayLike, observed: ArrayLike) -> tuple[Array, Array]:
    """Return the Kolmogorov–Smirnov test on bins alone, for many streams at once.

    Null and source: as for :func:`ks`. The difference at the edges is at most that of the values,
    so the test is careful; on 16 quantile bins it loses little against a shift. Exact counts: no
    sketch error.

    Args:
        expected: Reference counts in ascending bins, shape (..., B).
        observed: Device counts, shape (..., B); leading axes broadcast.

    Returns:
        (statistic, p_value), each (...), 0 to 1; (0, 1) where a histogram is empty.

    Raises:
        ValueError: Bins differ, there is none, or a count is not a finite, non-negative number.
    """
    pair = []
    for counts in (expected, observed):
        values = np.asarray(counts, np.float64)
        if values.ndim < 1 or not values.shape[-1]:
            raise ValueError("counts must have an axis of bins, the last one")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError("counts must be finite, non-negative numbers")
        pair.append(values)
    a, b = pair
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"histograms have {a.shape[-1]} and {b.shape[-1]} bins")
    n, m = a.sum(-1), b.sum(-1)
    some = (n > 0) & (m > 0)
    n, m = np.where(n > 0, n, 1), np.where(m > 0, m, 1)
    apart = abs(np.cumsum(a, -1) / n[..., None] - np.cumsum(b, -1) / m[..., None]).max(-1)
    statistic = np.where(some, np.minimum(apart, 1.0), 0.0)
    return statistic, kolmogorov_above(np.sqrt(n * m / (n + m)) * statistic)


def wasserstein(
    reference: Quantiles, observed: Quantiles, *, confidence_sketch: float = 0.99
) -> Wasserstein:
    """Return the Wasserstein-1 distance between sketches: the area between their shares.

    No test: it says how much, :func:`ks` whether. Of its null, one distribution, it tells the mean;
    what is controlled is the sketches' part, at ``confidence_sketch``. ``usual`` is what
    independent samples of the reference's distribution would show, E = sqrt(2/pi (1/n + 1/m)) *
    integral of sqrt(F (1 - F)), so that ``effect`` does not grow because a window is small.

    Args:
        reference: What is compared with.
        observed: What was seen.
        confidence_sketch: That ``low <= distance of the values <= high``, within (0, 1). The
            sketches' shares are bent up and down by their uniform error, never beyond 0, 1 and
            their extremes.

    Returns:
        All but ``effect`` in the unit of the feature. Mass at infinity that is not the same on
        both sides is infinitely far away.

    Raises:
        ValueError: ``confidence_sketch`` is out of its range.

    Source: Vallender, Theory of Probability 18 (1974): W1 is the area between the distribution
    functions; the mean under equality: del Barrio, Gine, Matran, Ann. Probab. 27 (1999)
    (the absolute Brownian bridge has mean sqrt(2/pi F (1 - F))).
    """
    if not 0 < confidence_sketch < 1:
        raise ValueError(f"a confidence is within (0, 1), not {confidence_sketch}")
    both = (reference, observed)
    parts = max(1, sum(each.variance > 0 for each in both))
    chosen = np.array([(1 - confidence_sketch) / parts])
    ends = [each.minimum for each in both] + [each.maximum for each in both]
    at = np.unique(np.concatenate([reference.values, observed.values, ends]))
    width = np.diff(at)
    bands: list[tuple[Array, Array, Array]] = []
    for each in both:
        share, error = each.shares(at[:-1]), float(each.errors(chosen)[0])
        inside = (at[:-1] >= each.minimum) & (at[:-1] < each.maximum)
        wide = np.where(inside, error, 0.0)
        bands.append((share, np.maximum(0.0, share - wide), np.minimum(1.0, share + wide)))
    (f, f_low, f_high), (g, g_low, g_high) = bands
    estimate = _area(abs(f - g), width)
    low = _area(np.maximum(0.0, np.maximum(f_low - g_high, g_low - f_high)), width)
    high = _area(np.maximum(f_high - g_low, g_high - f_low), width)
    noise = math.sqrt(2 / math.pi * (1 / reference.n + 1 / observed.n))
    usual = noise * _area(np.sqrt(f * (1 - f)), np.where(np.isfinite(width), width, 0.0))
    scale, gap = _scale(reference), max(0.0, estimate - usual)
    effect = gap / scale if scale > 0 else (math.inf if gap > 0 else 0.0)
    return Wasserstein(estimate, low, high, usual, effect, scale)


def _area(heights: Array, widths: Array) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.where(heights > 0, heights * widths, 0.0).sum())


def _scale(reference: Quantiles) -> float:
    finite = np.isfinite(reference.values)
    low, high = reference.quantile(0.25), reference.quantile(0.75)
    if math.isfinite(low) and math.isfinite(high) and high > low:
        return high - low
    if not finite.any():
        return 0.0
    values, weights = reference.values[finite], reference.weights[finite]
    middle = np.average(values, weights=weights)
    return float(np.sqrt(np.average((values - middle) ** 2, weights=weights)))
