"""What "not drifted" means for a stream, fitted on windows that are known not to have drifted.

    reference (B,) + baseline windows (W, B) --fit--> centre, radius, inflation, concentration

S streams, W baseline windows, B bins; a stream is one feature of one device. The null of a window
of n rows: its counts are Dirichlet-multinomial, with a mean p and a concentration K, where

- **p** lies within ``radius`` of the centre: KL(centre || p) <= radius, in nats. It may be another
  p in every window, chosen by anything but that window's own rows;
- **K** says how far windows scatter beyond the multinomial: the variance of a bin's count is
  ``inflation`` = (n + K) / (1 + K) times n p (1 - p). Neighbouring rows of a sensor are alike,
  and what a device meets in one window is not what it meets in the next.

The radius is made of three parts:

1. the tolerance, PSI(p, truth) <= ``tolerance_psi``. Proven: every p within it has
   KL(truth || p) <= f * tolerance_psi, with f from :func:`tolerance_radius` (1/2 to 1);
2. slow variation (hours of a day): how far runs of 4 to W / 2 baseline windows lay from the
   centre, beyond what their own noise explains. A fit, not a bound: a cycle that the baseline
   does not cover at least once is not in it. The square roots of 1 and 2 add up: such distances
   keep the triangle inequality in the limit of small ones;
3. the error of the centre, which is not the truth but m rows of reference and baseline together:
   by Wilks' theorem 2 m KL(centre || p) is non-central chi-squared with B - 1 degrees of freedom
   and 2 m times the sum of 1 and 2 (m is divided by the inflation). Its quantile at
   ``reference_confidence`` is the radius: right for each p, asymptotically in m.

The inflation is estimated from differences of successive windows, which slow variation does not
enter, in each of: all bins together, and the directions in which sensors vary, location and scale
(the first two orthogonal polynomials of the rank). The largest of their upper confidence bounds
counts. Given many streams in one call, each estimate is moderated by the others, as far as they
are alike (Smyth): one stream's 70 windows alone would leave a factor of 1.4 of doubt.

Sources: Neyman, "Smooth test for goodness of fit" (1937); von Neumann, Annals of Mathematical
Statistics 12 (1941), successive differences, with 2 (W - 1) / 3 degrees of freedom; Wilks,
ibid. 9 (1938); Patnaik, Biometrika 36 (1949), non-central chi-squared; Mosimann,
Biometrika 49 (1962), Dirichlet-multinomial; Smyth, Statistical Applications in Genetics and
Molecular Biology 3 (2004), moderated variances; Wilson, Hilferty, PNAS 17 (1931), quantiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .log_gamma import digamma, trigamma, trigamma_inverse

Array = NDArray[np.float64]

PRIOR: Final = 0.5  # Jeffreys' pseudo-count: an empty bin is rare, not impossible
DEGREES: Final = 3  # of the polynomials: location, scale, skewness
CONCENTRATION_MAX: Final = 1e6  # windows of 1e5 rows scatter by 10 % more than the multinomial
CONCENTRATION_MIN: Final = 1e-2
FREEDOM_PRIOR_MAX: Final = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class NullConfig:
    """How much like the reference is like it."""

    tolerance_psi: float = 0.001
    """Population stability index below which a change does not matter; 0.001 is a shift of 0.03
    standard deviations, 0.01 one of 0.1."""
    reference_confidence: float = 0.99
    """That the centre's own error lies within the radius, for each stream."""
    inflation_confidence: float = 0.95
    """That the over-dispersion lies below its bound, for each stream."""
    slow_confidence: float = 0.999
    """That no run of baseline windows is called slow variation where there is none, for each
    stream."""
    slow_margin: float = 1.5
    """Factor on the slow variation seen: the next day may be a little more than this one."""
    baseline_windows_min: int = 20
    """Windows that a fit needs."""

    def __post_init__(self) -> None:
        """Check the limits."""
        shares = (self.reference_confidence, self.inflation_confidence, self.slow_confidence)
        if not all(0.5 <= share < 1 for share in shares):
            raise ValueError("confidences must be in [0.5, 1)")
        if not 0 <= self.tolerance_psi < 10 or not 1 <= self.slow_margin <= 10:
            raise ValueError("tolerance_psi must be in [0, 10), slow_margin in [1, 10]")
        if self.baseline_windows_min < 8:
            raise ValueError("baseline_windows_min must be at least 8")


@dataclass(frozen=True, slots=True)
class StreamNulls:
    """The nulls of S streams over B bins each. Checked."""

    centre__sb: Array
    """Shares, each > 0, rows sum to 1."""
    radius__s: Array
    """Nats, >= 0."""
    inflation__s: Array
    """Variance over the multinomial's, >= 1, for windows as long as the baseline's or shorter."""
    concentration__s: Array
    """K of the Dirichlet-multinomial, for windows longer than the baseline's."""
    basis__sjb: Array = field(init=False, repr=False, compare=False)
    """Orthonormal polynomials of the rank under the centre, (S, J, B), J = min(3, B - 1)."""

    def __post_init__(self) -> None:
        """Check shapes and ranges; make the basis."""
        centre = np.array(self.centre__sb, np.float64)
        if centre.ndim != 2 or centre.shape[1] < 2:
            raise ValueError("the centre must be streams x bins, with at least 2 bins")
        if not (centre > 0).all() or not np.allclose(centre.sum(1), 1, rtol=0, atol=1e-9):
            raise ValueError("each centre must be positive shares that sum to 1")
        object.__setattr__(self, "centre__sb", centre)
        for name, least in (("radius", 0.0), ("inflation", 1.0), ("concentration", 0.0)):
            values = np.array(getattr(self, f"{name}__s"), np.float64)
            if values.shape != centre.shape[:1] or not np.isfinite(values).all():
                raise ValueError(f"{name} must be one finite number per stream")
            if (values < least).any() or (name == "concentration" and (values == 0).any()):
                raise ValueError(f"{name} is out of range")
            object.__setattr__(self, f"{name}__s", values)
        object.__setattr__(self, "basis__sjb", _basis(centre))

    def __len__(self) -> int:
        """Return S."""
        return len(self.centre__sb)


def fit(
    reference__sb: ArrayLike, baseline__swb: ArrayLike, *, config: NullConfig | None = None
) -> StreamNulls:
    """Return the nulls of streams of one kind.

    Args:
        reference__sb: Counts of the training data, shape (S, B) or (B,) for all alike.
        baseline__swb: Counts of windows of each stream that have not drifted, shape (S, W, B), in
            their order in time; a window of only zeros is one that is missing.
        config: Tolerance and confidences.

    Returns:
        One null for each stream. The moderation makes a stream's null depend a little on which
        other streams are given: give those of one feature, over its devices.

    Raises:
        ValueError: Shapes do not fit, a count is negative or not finite, the reference is empty,
            or a stream has fewer than ``baseline_windows_min`` windows with rows.
    """
    config = config or NullConfig()
    counts = np.asarray(baseline__swb, np.float64)
    reference = np.asarray(reference__sb, np.float64)
    if counts.ndim != 3 or counts.shape[2] < 2:
        raise ValueError("baseline must be streams x windows x bins, with at least 2 bins")
    if reference.shape not in (counts.shape[2:], (counts.shape[0], counts.shape[2])):
        raise ValueError("reference must be streams x bins, with the bins of the baseline")
    for each in (counts, reference):
        if not np.isfinite(each).all() or (each < 0).any():
            raise ValueError("counts must be finite and not negative")
    reference = np.broadcast_to(reference, (counts.shape[0], counts.shape[2]))
    rows__sw = counts.sum(2)
    if not (reference.sum(1) > 0).all():
        raise ValueError("a reference without a row says nothing")
    if ((rows__sw > 0).sum(1) < config.baseline_windows_min).any():
        raise ValueError(f"a stream has fewer than {config.baseline_windows_min} baseline windows")
    bins = counts.shape[2]
    pooled = reference + counts.sum(1) + PRIOR
    centre = pooled / pooled.sum(1, keepdims=True)
    basis = _basis(centre)
    inflation = _inflation(counts, rows__sw, centre, basis, config)
    rows__s = rows__sw.sum(1) / (rows__sw > 0).sum(1)
    slow = _slow(counts, rows__sw, centre, basis, inflation, config)
    inner = (np.sqrt(tolerance_radius(centre, config.tolerance_psi)) + np.sqrt(slow)) ** 2
    radius = _around(inner, pooled.sum(1) / inflation, bins - 1, config.reference_confidence)
    concentration = concentration_of(inflation, rows__s)
    return StreamNulls(centre, radius, inflation, concentration)


def tolerance_radius(centre__sb: Array, psi: float) -> Array:
    """Return a radius in nats such that PSI(p, centre) <= psi implies KL(centre || p) <= radius.

    With r = p / centre in a bin, PSI = sum centre (r - 1) ln r and KL = sum centre (r - 1 - ln r),
    each summand >= 0. Their ratio falls as r grows, from 1 at 0 over 1/2 at 1; and no r is so
    small that its bin alone would exceed ``psi``. The ratio there bounds the ratio of the sums.

    Args:
        centre__sb: Shares, shape (S, B), each > 0.
        psi: Tolerance, >= 0.

    Returns:
        Shape (S,): between psi / 2 and psi.
    """
    limit = psi / centre__sb.min(1)  # the rarest bin reaches furthest
    low, high = np.full_like(limit, -800.0), np.zeros_like(limit)  # of ln r
    for _ in range(60):
        middle = (low + high) / 2
        beyond = np.expm1(middle) * middle > limit
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    u = np.minimum(low, -1e-4)  # (r - 1) ln r and r - 1 - ln r lose their digits near r = 1
    share = (np.expm1(u) - u) / (np.expm1(u) * u)
    return np.asarray(psi * share)


def concentration_of(inflation: Array, rows: Array) -> Array:
    """Return the K with (rows + K) / (1 + K) = inflation, within the range that is kept."""
    over = np.maximum(inflation - 1, 1e-12)
    return np.clip((rows - inflation) / over, CONCENTRATION_MIN, CONCENTRATION_MAX)


def chi_square_quantile(share: float, freedom: ArrayLike) -> Array:
    """Return the quantile of a chi-squared distribution, within 1 % for 3 degrees or more."""
    degrees = np.asarray(freedom, np.float64)
    spread = 2 / (9 * degrees)
    root = 1 - spread + NormalDist().inv_cdf(share) * np.sqrt(spread)
    return np.asarray(degrees * np.maximum(root, 0.05) ** 3)


def _around(inner: Array, rows: Array, freedom: int, confidence: float) -> Array:
    """Return the radius around an estimated centre that holds what lies ``inner`` off the truth.

    Patnaik's approximation of the non-central chi-squared distribution by a scaled central one.
    """
    apart = 2 * rows * inner
    scale = (freedom + 2 * apart) / (freedom + apart)
    matched = (freedom + apart) ** 2 / (freedom + 2 * apart)
    return np.asarray(scale * chi_square_quantile(confidence, matched) / (2 * rows))


def _basis(centre__sb: Array) -> Array:
    """Return the orthonormal polynomials of the mid-rank, (S, J, B)."""
    rank = np.cumsum(centre__sb, 1) - centre__sb / 2
    found: list[Array] = [np.ones_like(rank)]
    for _ in range(min(DEGREES, rank.shape[1] - 1)):
        each = found[-1] * (rank - 0.5)
        for _ in range(2):  # twice is enough (Kahan, Parlett): bins may be very unequal
            for other in found:
                each = each - (centre__sb * each * other).sum(1, keepdims=True) * other
        size = np.sqrt((centre__sb * each * each).sum(1, keepdims=True))
        found.append(each / np.maximum(size, 1e-150))
    return np.stack(found[1:], 1)


def _inflation(
    counts: Array, rows__sw: Array, centre: Array, basis: Array, config: NullConfig
) -> Array:
    """Return the upper bound of the over-dispersion of each stream, >= 1."""
    seen = (rows__sw[:, 1:] > 0) & (rows__sw[:, :-1] > 0)
    shares = counts / np.maximum(rows__sw, 1)[:, :, None]
    inverse = 1 / np.maximum(rows__sw, 1)
    pairs = np.maximum(seen.sum(1), 1)
    step = np.diff(shares, axis=1) / np.sqrt(inverse[:, 1:] + inverse[:, :-1])[:, :, None]
    step = step * seen[:, :, None]
    freedom = pairs * 2 / 3
    bins = centre.shape[1]
    together = (step**2 / centre[:, None, :]).sum((1, 2)) / (pairs * (bins - 1))
    bounds = [_upper(together, freedom * (bins - 1), config.inflation_confidence)]
    for j in range(min(2, basis.shape[1])):
        along = np.einsum("swb,sb->sw", step, basis[:, j])
        bounds.append(_upper((along**2).sum(1) / pairs, freedom, config.inflation_confidence))
    return np.asarray(np.maximum(np.max(bounds, 0), 1.0))


def _upper(variance__s: Array, freedom__s: Array, confidence: float) -> Array:
    """Return the upper bound of each variance, moderated by the others."""
    prior, freedom_prior = _prior(variance__s, freedom__s)
    total = freedom__s + freedom_prior
    moderated = (freedom__s * variance__s + freedom_prior * prior) / total
    return np.asarray(moderated * total / chi_square_quantile(1 - confidence, total))


def _prior(variance__s: Array, freedom__s: Array) -> tuple[float, float]:
    """Return (variance, degrees of freedom) that the streams lend each other (Smyth, 2004)."""
    good = variance__s > 0
    if good.sum() < 10:
        return 1.0, 0.0
    half = float(np.median(freedom__s[good])) / 2
    logs = np.log(variance__s[good]) - digamma(half) + math.log(half)
    between = float(logs.var(ddof=1)) - trigamma(half)
    if between <= 0:
        return math.exp(float(logs.mean())), FREEDOM_PRIOR_MAX
    freedom = min(2 * trigamma_inverse(between), FREEDOM_PRIOR_MAX)
    centre = float(logs.mean()) + digamma(freedom / 2) - math.log(freedom / 2)
    return math.exp(centre), freedom


def _slow(
    counts: Array,
    rows__sw: Array,
    centre: Array,
    basis: Array,
    inflation: Array,
    config: NullConfig,
) -> Array:
    """Return how far runs of windows lay from the centre beyond their noise, in nats."""
    streams, windows, bins = counts.shape
    total = np.concatenate([np.zeros((streams, 1, bins)), np.cumsum(counts, 1)], 1)
    found = np.zeros(streams)
    runs = [2**i for i in range(2, windows.bit_length()) if 2**i <= windows // 2]
    tests = 2 * sum(
        windows + 1 - run for run in runs
    )  # they overlap: Bonferroni is on the safe side
    confidence = 1 - (1 - config.slow_confidence) / tests
    for run in runs:
        block = total[:, run:] - total[:, :-run]
        size = block.sum(2)
        shares = block / np.maximum(size, 1)[:, :, None]
        noise = inflation[:, None] / (2 * np.maximum(size, 1))
        apart = (shares - centre[:, None, :]) ** 2 / centre[:, None, :] / 2
        along = np.einsum("swb,sjb->swj", shares, basis) ** 2 / 2
        for distance, freedom in ((apart.sum(2), bins - 1), (along.sum(2), basis.shape[1])):
            limit = chi_square_quantile(confidence, freedom)
            # What the largest of windows / run independent runs shows without slow variation.
            usual = chi_square_quantile(1 - run / (2 * windows), freedom)
            slow = np.where((distance > limit * noise) & (size > 0), distance - usual * noise, 0)
            found = np.maximum(found, slow.max(1))
    return np.asarray(found * config.slow_margin)
