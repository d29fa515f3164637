"""Distances and tests between histograms over the same bins, from counts alone. Pure.

    counts --shares, Jeffreys' half a count--> distances (psi, Jensen–Shannon, Hellinger, direction)
    counts --as they are--> tests (chi_square, psi_p_value of distances)

``expected`` is the reference, ``observed`` the device. B bins, the last axis; all axes before it
are streams (groups, devices, features) and broadcast: one reference (B,) against (G, B) devices
gives (G,). Counts are finite and non-negative; merged counts are sums of counts, so any
granularity of time or fleet is one call. Nothing here decides: thresholds and the multiplicity of
tests are elsewhere.

The null of both tests: the two histograms are independent samples of one distribution, and values
within a sample are independent. Sensor values are not: a device that dwells in one state for a
while is rejected by these tests although nothing is wrong. Who alarms on them must fit an
over-dispersed null on baseline windows; :mod:`.detectors` has one that asks nothing of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .special import chi_square_above

PRIOR = 0.5  # Jeffreys' pseudo-count: an empty bin is not an infinite distance
EXPECTED_MIN: Final = 5.0  # Cochran, Biometrics 10 (1954): below it chi-squared is no good limit

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distances:
    """How far histograms are apart; each field has the shape of the streams, (...)."""

    psi: Array
    """Debiased population stability index, see :func:`psi`."""
    psi_p_value: Array
    """P(a PSI at least this large) under the null in the module head. Asymptotic in the counts: the
    half count in each bin makes it careful where bins are sparse; measured size at .05 is .046 with
    31 values a bin, .015 with 3. One test; 1 where a histogram is empty. Source: as for
    :func:`psi`."""
    jensen_shannon: Array
    """Divergence in bits, 0 to 1; symmetric. Source: Lin, "Divergence measures based on the Shannon
    entropy", IEEE Trans. IT 37 (1991)."""
    jensen_shannon_debiased: Array
    """The same minus its mean under equality, ``(B - 1)(1/n + 1/m) / (8 ln 2)``: about 0 when
    nothing changed, however few values there are; may be below 0."""
    jensen_shannon_distance: Array
    """Square root of the divergence in bits: a metric, 0 to 1. Tools that take natural logarithms
    (scipy's default, which Evidently uses) show sqrt(ln 2) = 0.8326 of it."""
    hellinger: Array
    """Distance, 0 to 1, see :func:`hellinger`."""
    direction: Array
    """-1 lower ... +1 higher, see :func:`direction`."""


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """Test of homogeneity; each field has the shape of the streams, (...)."""

    statistic: Array
    freedom: Array
    """Bins after pooling minus 1; 0: nothing could be tested, and ``p_value`` is 1."""
    p_value: Array
    """Of the null in the module head, 0 to 1."""
    effect: Array
    """Cramer's V of the table with both samples at equal weight, 0 to 1: a figure of the shares
    alone, which does not fall because the reference is long."""


def distances(expected: ArrayLike, observed: ArrayLike) -> Distances:
    """Return all distances of many streams at once.

    Args:
        expected: Reference counts, shape (..., B).
        observed: Device counts, shape (..., B); leading axes broadcast.

    Raises:
        ValueError: Bins differ, there is none, or a count is not a finite, non-negative number.
    """
    (p, n), (q, m) = _pair(expected, observed)
    bits = _jensen_shannon(p, q)
    noise = _noise(p.shape[-1], n, m)
    return Distances(
        _psi(p, q, n, m),
        _psi_p_value(p, q, n, m),
        bits,
        np.where(noise > 0, bits - noise / (8 * math.log(2)), 0.0),
        np.sqrt(bits),
        _hellinger(p, q),
        _direction(p, q),
    )


def psi(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return the population stability index, debiased for the sizes of both samples.

    Args:
        expected: Reference counts, shape (B,).
        observed: Device counts, shape (B,).

    Returns:
        ``sum (p - q) ln(p / q)`` minus its mean under equality, ``(B - 1)(1/n + 1/m)``: near 0,
        and possibly below it, when both come from one distribution with independent samples
        (below 5 values a bin rather below: the half counts draw the shares together); not bounded
        above; 0 if a histogram is empty. Samples that depend on each other (a sensor's do)
        have a larger mean: what is normal must come from reference groups, see :mod:`.detectors`.

    Raises:
        ValueError: As for :func:`distances`, or there is more than one stream.

    Source: Yurdakul, Naranjo, "Statistical properties of the population stability index",
    Journal of Risk Model Validation 14 (2020): PSI ~ chi2(B - 1)(1/n + 1/m) under equality.
    """
    (p, n), (q, m) = _one(expected, observed)
    return float(_psi(p, q, n, m))


def shifts(expected: ArrayLike, observed: ArrayLike) -> tuple[Array, Array]:
    """Return (:func:`psi`, :func:`direction`) of many streams at once, (...) each.

    Args:
        expected: Reference counts, shape (..., B).
        observed: Device counts, shape (..., B); leading axes broadcast.

    Raises:
        ValueError: As for :func:`distances`.
    """
    (p, n), (q, m) = _pair(expected, observed)
    return _psi(p, q, n, m), _direction(p, q)


def hellinger(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return the Hellinger distance, 0 to 1; a metric.

    No test, and biased: under its null, one distribution, sampling alone makes the square about
    (B - 1) / 8 (1/n + 1/m) for n and m independent values in B bins. No error is controlled here:
    :mod:`.detectors` compares it with the groups' own distances, and says how.

    Raises:
        ValueError: As for :func:`psi`.

    Source: Le Cam, Yang, "Asymptotics in Statistics" (2000), scaled to 1.
    """
    (p, _), (q, _) = _one(expected, observed)
    return float(_hellinger(p, q))


def direction(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return where the observed mass lies: P(observed > expected) - P(observed < expected).

    Bins are ordered; -1 = all lower, 0 = balanced, +1 = all higher. This is Cliff's delta on
    binned values (Cliff, Psychological Bulletin 114, 1993).

    Raises:
        ValueError: As for :func:`psi`.
    """
    (p, _), (q, _) = _one(expected, observed)
    return float(_direction(p, q))


def chi_square(expected: ArrayLike, observed: ArrayLike) -> ChiSquare:
    """Test whether both histograms are samples of one distribution, many streams at once.

    Pooling rule: bins are walked in order and joined with the next until the smaller of the joint
    bin's two expected counts, ``(a + b) min(n, m) / (n + m)``, is at least 5; what remains at the
    end joins the last joint bin. The rule sees the sums ``a + b`` alone, on which the test
    conditions anyway, so that it cannot favour a rejection; neighbours of ordered bins are alike,
    so that joining them costs little power.

    Null: the one in the module head. Error control: asymptotic, with every expected count >= 5
    (size at .05 and .01 measured in the tests); one test, multiplicity is the caller's.

    Args:
        expected: Reference counts, shape (..., B).
        observed: Device counts, shape (..., B); leading axes broadcast.

    Returns:
        Fields of shape (...).

    Raises:
        ValueError: As for :func:`distances`.

    Source: Pearson, Biometrika 8 (1911), for two samples; Cochran, Biometrics 10 (1954),
    for the least expected count; Cramer, "Mathematical Methods of Statistics" (1946).
    """
    a, b = _pooled(*_aligned(expected, observed))
    n, m = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    freedom = np.maximum(((a + b) > 0).sum(-1) - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = a * np.sqrt(m / n) - b * np.sqrt(n / m)
        statistic = np.where(a + b > 0, gap**2 / (a + b), 0.0).sum(-1)
        p, q = a / n, b / m
        half = np.where(p + q > 0, (p - q) ** 2 / (p + q), 0.0).sum(-1) / 2
    tested = freedom > 0
    p_value = chi_square_above(np.where(tested, statistic, 0.0), np.maximum(freedom, 1))
    return ChiSquare(
        np.where(tested, statistic, 0.0),
        freedom.astype(np.float64),
        np.where(tested, p_value, 1.0),
        np.where(tested, np.sqrt(np.clip(half, 0.0, 1.0)), 0.0),
    )


def _pooled(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the counts with sparse bins joined; a joint bin stands where its last one stood."""
    n, m = a.sum(-1), b.sum(-1)
    share = np.minimum(n, m) / np.where(n + m > 0, n + m, 1)
    joint = np.zeros((2, *a.shape))
    open_a, open_b = np.zeros(n.shape), np.zeros(n.shape)
    last = np.zeros(n.shape, np.intp)
    for i in range(a.shape[-1]):
        open_a, open_b = open_a + a[..., i], open_b + b[..., i]
        full = (open_a + open_b) * share >= EXPECTED_MIN
        joint[0, ..., i], joint[1, ..., i] = np.where(full, open_a, 0), np.where(full, open_b, 0)
        open_a, open_b = np.where(full, 0, open_a), np.where(full, 0, open_b)
        last = np.where(full, i, last)
    ends = np.arange(a.shape[-1]) == last[..., None]
    joint[0] += np.where(ends, open_a[..., None], 0)
    joint[1] += np.where(ends, open_b[..., None], 0)
    return joint[0], joint[1]


def _counts(counts: ArrayLike) -> Array:
    values = np.asarray(counts, np.float64)
    if values.ndim < 1 or not values.shape[-1]:
        raise ValueError("counts must have an axis of bins, the last one")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("counts must be finite, non-negative numbers")
    return values


def _aligned(expected: ArrayLike, observed: ArrayLike) -> tuple[Array, Array]:
    a, b = _counts(expected), _counts(observed)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"histograms have {a.shape[-1]} and {b.shape[-1]} bins")
    one, two = np.broadcast_arrays(a, b)
    return one, two


def _pair(expected: ArrayLike, observed: ArrayLike) -> tuple[tuple[Array, Array], ...]:
    """Return (shares, total) of both, (..., B) and (...)."""
    found = []
    for counts in _aligned(expected, observed):
        total = counts.sum(-1)
        shares = (counts + PRIOR) / (total[..., None] + PRIOR * counts.shape[-1])
        found.append((shares, total))
    return tuple(found)


def _one(expected: ArrayLike, observed: ArrayLike) -> tuple[tuple[Array, Array], ...]:
    pair = _pair(expected, observed)
    if pair[0][0].ndim != 1:
        raise ValueError("counts must be vectors here; distances() takes many streams")
    return pair


def _noise(bins: int, n: Array, m: Array) -> Array:
    """Return (B - 1)(1/n + 1/m); 0 where a histogram is empty."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(np.minimum(n, m) > 0, (bins - 1) * (1 / n + 1 / m), 0.0))


def _psi_raw(p: Array, q: Array) -> Array:
    return np.asarray(((p - q) * np.log(p / q)).sum(-1))


def _psi(p: Array, q: Array, n: Array, m: Array) -> Array:
    noise = _noise(p.shape[-1], n, m)
    return np.asarray(np.where(np.minimum(n, m) > 0, _psi_raw(p, q) - noise, 0.0))


def _psi_p_value(p: Array, q: Array, n: Array, m: Array) -> Array:
    freedom = p.shape[-1] - 1
    if not freedom:
        return np.ones(p.shape[:-1])
    noise = _noise(p.shape[-1], n, m)
    scaled = np.where(noise > 0, _psi_raw(p, q) / np.where(noise > 0, noise, 1.0), 0.0)
    return chi_square_above(scaled * freedom, freedom)


def _jensen_shannon(p: Array, q: Array) -> Array:
    middle = (p + q) / 2
    found = (p * np.log2(p / middle) + q * np.log2(q / middle)).sum(-1) / 2
    return np.asarray(np.clip(found, 0.0, 1.0))


def _hellinger(p: Array, q: Array) -> Array:
    return np.asarray(np.sqrt(np.maximum(0.0, 1 - np.sqrt(p * q).sum(-1))))


def _direction(p: Array, q: Array) -> Array:
    up_to = np.cumsum(p, -1)
    return np.asarray((q * (up_to - p - (1 - up_to))).sum(-1))


def student_above(t: float, freedom: int) -> float:
    """Return P(T > t) for Student's distribution.

    Args:
        t: Any finite number.
        freedom: Degrees of freedom, at least 1.

    Returns:
        0 to 1, to 1e-12 of the exact value.

    Source: Abramowitz, Stegun 26.7.3 (odd) and 26.7.4 (even degrees of freedom), exact sums.
    """
    theta = math.atan(t / math.sqrt(freedom))
    sin, cos = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cos, (cos if freedom > 1 else 0.0)
        for k in range(3, freedom - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        middle = 2 / math.pi * (theta + sin * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        middle = sin * total
    return min(1.0, max(0.0, (1 - middle) / 2))
