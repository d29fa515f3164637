"""Multivariate drift: do two means of random Fourier features differ (MMD)? Pure.

    window: sums of F cosines, rows --/ rows--> mean__f --mean_test---> statistic, p-value
    groups of the reference, G means ---------> means__gf --groups_test--> statistic, p-value

With features ``phi(x)_i = sqrt(2 / F) cos(w_i x + b_i)``, w drawn from a Gaussian, b uniform,
``||mean phi(X) - mean phi(Y)||^2`` estimates the squared maximum mean discrepancy of a Gaussian
kernel, to about 1/sqrt(F): a distance that sees correlations between inputs which no histogram
of one input sees. Sums of features add: any number of devices and windows is one mean.

Inputs here are means of the plain cosines, each within -1 to 1; the factor 2/F is applied here.
Leading axes ``...`` are windows, devices or groups of them, F features the last.

Sources: Rahimi, Recht, "Random features for large-scale kernel machines", NIPS 2007, algorithm 1;
Gretton et al., "A kernel two-sample test", JMLR 13 (2012): the statistic, and its null (a
weighted sum of chi-squared variables).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .special import chi_square_above, fisher_above

Array = NDArray[np.float64]

BEYOND: Final = 1.5365  # in means of the null: from here on one weight alone has the largest tail


@dataclass(frozen=True, slots=True)
class ProjectionTest:
    """What a test found; each field has the shape of the windows, (...)."""

    discrepancy: Array
    """Squared MMD, debiased: mean 0 under the null, then possibly below 0; at most 8."""
    p_value: Array
    """0 to 1; 1 where a window has no rows."""


def means(sums: ArrayLike, rows: ArrayLike) -> Array:
    """Return the means of cosines of windows; NaN where there is no row.

    Args:
        sums: Sums of the cosines, (..., F).
        rows: Rows in them, (...).

    Raises:
        ValueError: Shapes differ, not finite, or a sum is more than its rows allow.
    """
    total, count = np.asarray(sums, np.float64), np.asarray(rows, np.float64)
    if total.ndim < 1 or total.shape[:-1] != count.shape or not total.shape[-1]:
        raise ValueError(f"sums {total.shape} do not fit rows {count.shape}")
    if not np.isfinite(total).all() or not (np.isfinite(count) & (count >= 0)).all():
        raise ValueError("sums and rows must be finite, rows not below 0")
    # float32 sums of many rows are off by some of their last bits.
    if (abs(total) > count[..., None] * (1 + 1e-4)).any():
        raise ValueError("a sum of cosines is larger than its rows")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / count[..., None])


def mean_test(
    reference: ArrayLike,
    observed: ArrayLike,
    *,
    spread: ArrayLike,
    n: float,
    m: ArrayLike,
    square: float | None = None,
) -> ProjectionTest:
    """Test whether windows have the reference's mean features, rows independent.

    Null: rows of both are independent draws of one distribution. Then ``||d||^2 / (1/n + 1/m)`` is
    a sum of chi-squared variables (1) weighted by the eigenvalues of the features' covariance.

    Error control, asymptotic in the rows, one test (multiplicity is the caller's):

    - ``spread`` (F, F), the covariance: a shifted and scaled chi-squared with the null's first
      three cumulants, tr S^k, k = 1, 2, 3. Sizes measured in the tests.
    - ``spread`` (F,), the variances, and ``square`` = tr S^2: the first two cumulants, which say a
      little too often that a change is real far out (measured sizes: .057 at .05, .018 at .01,
      .005 at .002).
    - ``spread`` (F,), the variances alone: P <= P(chi-squared(1) tr S > x) from 1.5365 tr S on,
      the largest tail of any eigenvalues with that sum; never too small, and less powerful. Values
      below that point have p-value 1.

    Rows of a sensor depend on each other: prefer :func:`groups_test` where there are groups.

    Args:
        reference: Mean cosines of the reference, (F,).
        observed: Mean cosines of windows, (..., F); NaN of windows without rows.
        spread: Covariance (F, F) or variances (F,) of one row's cosines, on the reference.
        n: Rows of the reference, > 0.
        m: Rows of the windows, (...).
        square: Sum of the squares of the F x F covariances, if only that is known beside the
            variances, as of a reference profile; it must not be below theirs.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or rows are out of range.

    Source: two cumulants: Satterthwaite, Biometrics Bulletin 2 (1946); three: Pearson,
    Biometrika 46 (1959), as in Imhof, Biometrika 48 (1961); the largest tail: Szekely,
    Bakirov, Probab. Theory Relat. Fields 126 (2003).
    """
    p, q, rows = _aligned(reference, observed, m)
    covariance = np.asarray(spread, np.float64)
    size = len(p)
    if covariance.shape not in ((size,), (size, size)) or not np.isfinite(covariance).all():
        raise ValueError(f"spread {covariance.shape} must be finite, ({size},) or ({size}, {size})")
    if not 0 < n < np.inf:
        raise ValueError("the reference needs rows")
    factor = 2 / size
    whole = covariance.ndim == 2
    first = factor * float(np.trace(covariance) if whole else covariance.sum())
    if first < 0:
        raise ValueError("variances must not be below 0")
    least = float((np.diagonal(covariance) ** 2).sum() if whole else (covariance**2).sum())
    if square is not None and (whole or not least * (1 - 1e-3) <= square < np.inf):
        raise ValueError("square goes with variances, and is finite and not below their squares")
    some = rows > 0
    scale = 1 / n + 1 / np.where(some, rows, 1.0)
    raw = factor * ((np.where(some[..., None], q, p) - p) ** 2).sum(-1)
    discrepancy = np.where(some, raw - scale * first, 0.0)
    scaled = raw / scale
    if first == 0:
        p_value = np.where(scaled > 0, 0.0, 1.0)
    elif whole:
        values = np.maximum(np.linalg.eigvalsh((covariance + covariance.T) / 2), 0.0) * factor
        second, third = float((values**2).sum()), float((values**3).sum())
        freedom = second**3 / third**2
        x = (scaled - values.sum()) * np.sqrt(freedom / second) + freedom
        p_value = chi_square_above(x, freedom)
    elif square is not None:
        second = factor**2 * min(square, (first / factor) ** 2)
        p_value = chi_square_above(scaled * first / second, first**2 / second)
    else:
        p_value = np.where(scaled >= BEYOND * first, chi_square_above(scaled / first, 1), 1.0)
    return ProjectionTest(discrepancy, np.where(some, p_value, 1.0))


def groups_test(groups: ArrayLike, observed: ArrayLike) -> ProjectionTest:
    """Test whether windows are means of just another group like the reference's.

    Null: the means of the G groups (people, machines, days) and the window's mean are independent
    draws of one Gaussian in feature space; rows within a group may depend on each other as they
    like. The window must be about as long as the groups: a shorter one scatters more.

    Error control: ``||q - mean||^2 / (1 + 1/G)`` over the mean square of the groups around theirs
    is about F with (f, (G - 1) f) degrees of freedom, f = (tr S)^2 / tr S^2 the effective dimension
    from unbiased estimates of both traces, divided by 1 + 2 / sqrt(G - 1): few groups overrate it.
    Measured worst sizes at .01, over effective dimensions from 1 to 33: .018 with 5 groups, .014
    with 8, .012 with 15; mostly below .01. All windows share the groups, which makes their p-values
    positively dependent: Benjamini–Hochberg over them holds. One test a window; multiplicity is the
    caller's.

    Args:
        groups: Mean cosines of the groups, (G, F), G >= 5.
        observed: Mean cosines of windows, (..., F); NaN makes p-value 1.

    Raises:
        ValueError: Shapes do not fit, fewer than 5 groups, or groups are not finite.

    Source: Dempster, Annals of Math. Statistics 29 (1958), the F approximation; Srivastava, J.
    Japan Stat. Soc. 35 (2005), the unbiased traces.
    """
    table = np.asarray(groups, np.float64)
    if table.ndim != 2 or len(table) < 5 or not table.shape[1] or not np.isfinite(table).all():
        raise ValueError(f"groups must be finite, (G, F) with G >= 5, not {table.shape}")
    size, free = len(table), len(table) - 1
    middle = table.mean(0)
    p, q, some = _aligned(middle, observed, None)
    apart = (table - middle) * np.sqrt(2 / len(p))
    gram = apart @ apart.T  # its traces of powers are those of the scatter, F x F
    trace, square = float(np.trace(gram)) / free, float((gram**2).sum()) / free**2
    unbiased = free**2 / ((free - 1) * (free + 2)) * (square - trace**2 / free)
    whole = trace**2 - 2 * max(unbiased, 0.0) / free
    found = min(whole / unbiased, len(p)) if unbiased > 0 else float(len(p))
    freedom = max(1.0, found / (1 + 2 / free**0.5))
    known = some > 0
    raw = 2 / len(p) * ((np.where(known[..., None], q, p) - p) ** 2).sum(-1)
    usual = trace * (1 + 1 / size)
    if usual > 0:
        p_value = fisher_above(raw / usual, freedom, free * freedom)
    else:
        p_value = np.where(raw > 0, 0.0, 1.0)
    return ProjectionTest(np.where(known, raw - usual, 0.0), np.where(known, p_value, 1.0))


def _aligned(
    reference: ArrayLike, observed: ArrayLike, rows: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Return the reference, the windows and their rows: 0 where a mean is NaN."""
    p, q = np.asarray(reference, np.float64), np.asarray(observed, np.float64)
    if p.ndim != 1 or not len(p) or q.ndim < 1 or q.shape[-1] != len(p):
        raise ValueError(f"windows {q.shape} do not fit a reference {p.shape}")
    if np.isinf(q).any() or not np.isfinite(p).all():
        raise ValueError("means of cosines must be finite")
    found = np.asarray(np.isfinite(q).all(-1))
    if rows is None:
        return p, q, found.astype(np.float64)
    count = np.asarray(rows, np.float64)
    if not (np.isfinite(count) & (count >= 0)).all():
        raise ValueError("rows must be finite and not below 0")
    if count.shape not in ((), q.shape[:-1]):
        raise ValueError(f"rows {count.shape} do not fit windows {q.shape}")
    return p, q, np.asarray(np.where(found, np.broadcast_to(count, q.shape[:-1]), 0.0))
