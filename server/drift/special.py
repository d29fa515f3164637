"""Tails of the distributions that the detectors need. Pure; numpy alone.

Every function takes scalars or arrays that broadcast, and returns float64 of the broadcast shape.
Accuracies are those that ``tests/server/drift/test_special.py`` holds against 50-digit values.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .log_gamma import log_gamma

FREEDOM_MAX: Final = 1e6  # beyond it the sums below would need more than STEPS_MAX terms
STEPS_MAX: Final = 20_000
TINY: Final = 1e-300  # keeps Lentz's recurrence from dividing by 0
PRECISION: Final = 1e-15

Array = NDArray[np.float64]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def normal_above(z: ArrayLike) -> Array:
    """Return P(Z > z) of the standard normal distribution, to 1e-14 of the value."""
    return np.asarray(_erfc(np.asarray(z, np.float64) / math.sqrt(2)) / 2)


def normal_quantile(p: float) -> float:
    """Return the z with P(Z <= z) = p, to 1e-14 of the value.

    Raises:
        ValueError: ``p`` is not within (0, 1).

    Source: Wichura, "Algorithm AS 241", Applied Statistics 37 (1988), PPND16, polished by one
    step of Newton's method.
    """
    if not 0 < p < 1:
        raise ValueError(f"a normal quantile needs a share within (0, 1), not {p}")
    if p > 0.5:
        # 1 - p is exact for p in [0.5, 1] (Sterbenz), and keeps the polish below accurate.
        return -normal_quantile(1 - p)
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        z = q * _ratio(r, CENTRE)
    else:
        r = math.sqrt(-math.log(p))
        z = -(_ratio(r - 1.6, MIDDLE) if r <= 5 else _ratio(r - 5, FAR))
    error = math.erfc(-z / math.sqrt(2)) / 2 - p
    return z - error * math.sqrt(2 * math.pi) * math.exp(z * z / 2)


def chi_square_above(x: ArrayLike, freedom: ArrayLike) -> Array:
    """Return P(X > x) of a chi-squared distribution: Q(freedom / 2, x / 2).

    Args:
        x: Values; below 0 counts as 0.
        freedom: Degrees of freedom, 0 < freedom <= 1e6, not only whole ones.

    Returns:
        0 to 1, to 1e-12 of the value while freedom <= 1e4, and to 1e-10 beyond it.

    Raises:
        ValueError: A value is NaN, or the freedom is out of its range.

    Source: DLMF 8.11.4 (series, below the mean) and 8.9.2 (continued fraction, above it, by the
    modified Lentz recurrence); Gil, Segura, Temme, SIAM J. Sci. Comput. 34 (2012) for where each
    is stable.
    """
    a__n, x__n = np.broadcast_arrays(
        np.asarray(freedom, np.float64) / 2, np.asarray(x, np.float64) / 2
    )
    if np.isnan(x__n).any() or not ((a__n > 0) & (a__n <= FREEDOM_MAX / 2)).all():
        raise ValueError(f"chi-squared needs numbers, and a freedom in (0, {FREEDOM_MAX:g}]")
    found = np.ones(a__n.shape)
    found[x__n == np.inf] = 0.0
    inside = (x__n > 0) & (x__n < np.inf)
    low, high = inside & (x__n < a__n + 1), inside & (x__n >= a__n + 1)
    found[low] = 1 - _gamma_series(a__n[low], x__n[low])
    found[high] = _gamma_fraction(a__n[high], x__n[high])
    return np.clip(found, 0.0, 1.0)


def fisher_above(x: ArrayLike, freedom_over: ArrayLike, freedom_under: ArrayLike) -> Array:
    """Return P(X > x) of Fisher's F distribution.

    Args:
        x: Values; below 0 counts as 0.
        freedom_over: Degrees of freedom of the numerator, > 0.
        freedom_under: Degrees of freedom of the denominator, > 0.

    Returns:
        0 to 1, to 1e-11 of the value for freedoms up to 1e4.

    Raises:
        ValueError: A value is NaN, or a freedom is out of (0, 1e6].

    Source: DLMF 8.17.22, the continued fraction of the incomplete beta function; P(X > x) =
    I_y(under / 2, over / 2), y = under / (under + over x) (Abramowitz, Stegun 26.6.2).
    """
    x__n, over__n, under__n = np.broadcast_arrays(
        *(np.asarray(each, np.float64) for each in (x, freedom_over, freedom_under))
    )
    freedoms = np.stack([over__n, under__n])
    if np.isnan(x__n).any() or not ((freedoms > 0) & (freedoms <= FREEDOM_MAX)).all():
        raise ValueError(f"F needs numbers, and freedoms in (0, {FREEDOM_MAX:g}]")
    found = np.ones(x__n.shape)
    found[x__n == np.inf] = 0.0
    inside = (x__n > 0) & (x__n < np.inf)
    a, b, ratio = under__n[inside] / 2, over__n[inside] / 2, x__n[inside]
    scaled = ratio * b / a
    y, rest = 1 / (1 + scaled), scaled / (1 + scaled)
    front = np.exp(
        log_gamma(a + b) - log_gamma(a) - log_gamma(b) + a * np.log(y) + b * np.log(rest)
    )
    direct = y < (a + 1) / (a + b + 2)
    tail = np.empty_like(y)
    tail[direct] = (front / a)[direct] * _beta_fraction(a[direct], b[direct], y[direct])
    other = ~direct
    tail[other] = 1 - (front / b)[other] * _beta_fraction(b[other], a[other], rest[other])
    found[inside] = tail
    return np.clip(found, 0.0, 1.0)


def kolmogorov_above(t: ArrayLike) -> Array:
    """Return P(K > t) of Kolmogorov's distribution, the limit of sqrt(n) sup |F_n - F|.

    Args:
        t: Values; below 0 counts as 0.

    Returns:
        0 to 1, to 1e-13 of the value.

    Raises:
        ValueError: A value is NaN.

    Source: Kolmogorov, Giornale dell'Istituto Italiano degli Attuari 4 (1933): the alternating
    series, and below 1 its theta transform (Feller, Ann. Math. Stat. 19 (1948)).
    """
    t__n = np.asarray(t, np.float64)
    if np.isnan(t__n).any():
        raise ValueError("Kolmogorov's distribution needs numbers")
    found = np.ones(t__n.shape)
    small, large = (t__n > 0.04) & (t__n < 1), t__n >= 1  # below 0.04 the tail is 1 - 1e-330
    odd__k = np.arange(1, 12, 2)
    terms = np.exp(-((odd__k * math.pi / t__n[small, None]) ** 2) / 8)
    found[small] = 1 - math.sqrt(2 * math.pi) / t__n[small] * terms.sum(-1)
    k = np.arange(1, 7)
    terms = np.exp(-2 * (k * t__n[large, None]) ** 2)
    found[large] = 2 * (terms * (-1.0) ** (k - 1)).sum(-1)
    return np.clip(found, 0.0, 1.0)


def _gamma_front(a: Array, x: Array) -> Array:
    """Return x^a e^-x / Gamma(a)."""
    big = a > 100
    found = np.empty_like(a)
    small = ~big
    found[small] = np.exp(a[small] * np.log(x[small]) - x[small] - log_gamma(a[small]))
    # Stirling's series in a, so that a ln x - x - ln Gamma(a) does not cancel.
    a, ratio = a[big], x[big] / a[big]
    away = ratio - 1
    rest = 1 / (12 * a) - 1 / (360 * a**3) + 1 / (1260 * a**5)
    found[big] = np.exp(a * (np.log1p(away) - away) - rest) * np.sqrt(a / (2 * math.pi))
    return found


def _gamma_series(a: Array, x: Array) -> Array:
    """Return P(a, x) where x < a + 1."""
    term = total = 1 / a
    for step in range(1, STEPS_MAX):
        term = term * x / (a + step)
        total = total + term
        if (term <= PRECISION * total).all():
            break
    return total * _gamma_front(a, x)


def _gamma_fraction(a: Array, x: Array) -> Array:
    """Return Q(a, x) where x >= a + 1."""
    b = x + 1 - a
    c, d = np.full_like(b, 1 / TINY), 1 / b
    h = d.copy()
    for step in range(1, STEPS_MAX):
        factor = -step * (step - a)
        b = b + 2
        d = 1 / _kept(factor * d + b)
        c = _kept(b + factor / c)
        change = d * c
        h *= change
        if (abs(change - 1) <= PRECISION).all():
            break
    return h * _gamma_front(a, x)


def _beta_fraction(a: Array, b: Array, x: Array) -> Array:
    """Return I_x(a, b) a B(a, b) / (x^a (1 - x)^b) where x < (a + 1) / (a + b + 2)."""
    c = np.ones_like(x)
    d = 1 / _kept(1 - (a + b) * x / (a + 1))
    h = d.copy()
    for m in range(1, STEPS_MAX):
        change = np.ones_like(x)
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _kept(1 + factor * d)
            c = _kept(1 + factor / c)
            change = d * c
            h *= change
        if (abs(change - 1) <= PRECISION).all():
            break
    return h


def _kept(values: Array) -> Array:
    return np.where(abs(values) < TINY, TINY, values)


def _ratio(x: float, pair: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
    over = under = 0.0
    for top, bottom in zip(reversed(pair[0]), reversed(pair[1]), strict=True):
        over, under = over * x + top, under * x + bottom
    return over / under


# Coefficients of AS 241, constant term first.
CENTRE: Final = (
    (
        3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
        1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
        3.3430575583588128105e4, 2.5090809287301226727e3,
    ),
    (
        1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
        2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)  # fmt: skip
MIDDLE: Final = (
    (
        1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
        3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
        2.27238449892691845833e-2, 7.74545014278341407640e-4,
    ),
    (
        1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
        1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)  # fmt: skip
FAR: Final = (
    (
        6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
        2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
        2.71155556874348757815e-5, 2.01033439929228813265e-7,
    ),
    (
        1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
        7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)  # fmt: skip
