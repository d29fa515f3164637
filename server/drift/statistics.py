"""Distances between two histograms over the same bins, and one tail. Pure; nothing here decides.

B bins, counts are non-negative integers. ``expected`` is the reference, ``observed`` the device.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRIOR = 0.5  # Jeffreys' pseudo-count: an empty bin is not an infinite distance


def _shares(counts: ArrayLike) -> tuple[NDArray[np.float64], float]:
    values = np.asarray(counts, np.float64)
    if values.ndim != 1 or not len(values) or (values < 0).any() or not np.isfinite(values).all():
        raise ValueError("counts must be a vector of finite, non-negative numbers")
    total = float(values.sum())
    return (values + PRIOR) / (total + PRIOR * len(values)), total


def psi(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return the population stability index, debiased for the sizes of both samples.

    Args:
        expected: Reference counts, shape (B,).
        observed: Device counts, shape (B,).

    Returns:
        ``sum (p - q) ln(p / q)`` minus its mean under equality, ``(B - 1)(1/n + 1/m)``: near 0,
        and possibly below it, when both come from one distribution with independent samples; not
        bounded above. Samples that depend on each other (a sensor's do) have a larger mean: what
        is normal must come from reference groups, see :mod:`.detectors`.

    Raises:
        ValueError: Shapes differ or a count is not a finite, non-negative number.

    Source: Yurdakul, Naranjo, "Statistical properties of the population stability index",
    Journal of Risk Model Validation 14 (2020): PSI ~ chi2(B - 1)(1/n + 1/m) under equality.
    """
    (p, n), (q, m) = _shares(expected), _shares(observed)
    if len(p) != len(q):
        raise ValueError(f"histograms have {len(p)} and {len(q)} bins")
    raw = float(((p - q) * np.log(p / q)).sum())
    if not n or not m:
        return 0.0
    return raw - (len(p) - 1) * (1 / n + 1 / m)


def jensen_shannon(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return the Jensen–Shannon divergence in bits, 0 to 1; symmetric.

    Raises:
        ValueError: As for :func:`psi`.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. IT 37 (1991).
    """
    (p, _), (q, _) = _shares(expected), _shares(observed)
    if len(p) != len(q):
        raise ValueError(f"histograms have {len(p)} and {len(q)} bins")
    middle = (p + q) / 2
    found = ((p * np.log2(p / middle)).sum() + (q * np.log2(q / middle)).sum()) / 2
    return float(min(1.0, max(0.0, found)))


def hellinger(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return the Hellinger distance, 0 to 1; a metric.

    Raises:
        ValueError: As for :func:`psi`.
    """
    (p, _), (q, _) = _shares(expected), _shares(observed)
    if len(p) != len(q):
        raise ValueError(f"histograms have {len(p)} and {len(q)} bins")
    return float(np.sqrt(max(0.0, 1 - np.sqrt(p * q).sum())))


def direction(expected: ArrayLike, observed: ArrayLike) -> float:
    """Return where the observed mass lies: P(observed > expected) - P(observed < expected).

    Bins are ordered; -1 = all lower, 0 = balanced, +1 = all higher. This is Cliff's delta on
    binned values (Cliff, Psychological Bulletin 114, 1993).

    Raises:
        ValueError: As for :func:`psi`.
    """
    (p, _), (q, _) = _shares(expected), _shares(observed)
    if len(p) != len(q):
        raise ValueError(f"histograms have {len(p)} and {len(q)} bins")
    below = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    return float((q * (below - (1 - below - p))).sum())


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
