"""Made-up streams for bench/drift.py, and the rules of other tools restated on their counts.

S streams = devices x features, B bins at the reference's quantiles. Values are standard normal,
a shift is in standard deviations. Rules see bins, not values:

- the KS statistic is the largest difference at the B - 1 edges, so its p-values are a little too
  large, and these rules raise fewer false alarms here than with the values;
- Wasserstein-1 takes each bin as its mean under the reference.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.server.drift.special import kolmogorov_above, normal_above

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]

NORMAL = NormalDist()


def inner_edges(bins: int) -> Array:
    """Return the inner edges of equally likely bins of the standard normal, (B - 1,)."""
    return np.array([NORMAL.inv_cdf(i / bins) for i in range(1, bins)])


def shares(bins: int, shift__s: Array) -> Array:
    """Return the share of each bin when the mean lies off by so much, (S, B)."""
    below = normal_above(shift__s[:, None] - inner_edges(bins))
    ends = np.zeros((len(shift__s), 1)), np.ones((len(shift__s), 1))
    return np.diff(np.concatenate([ends[0], below, ends[1]], 1), axis=1)


class Source(Protocol):
    """Draws one window of every stream after another."""

    def draw(self, shift__s: Array) -> Counts:
        """Return counts (S, B) of the next window, shifted by so much in each stream."""
        ...


class Independent:
    """Rows that know nothing of each other: the multinomial of the textbooks."""

    def __init__(self, rng: np.random.Generator, rows: int, bins: int) -> None:
        self._rng, self._rows, self._bins = rng, rows, bins

    def draw(self, shift__s: Array) -> Counts:
        """Return the next window."""
        kinds, which = np.unique(shift__s, return_inverse=True)
        return self._rng.multinomial(self._rows, shares(self._bins, kinds)[which])


class Autoregressive:
    """Neighbouring rows are alike: AR(1), going on from window to window."""

    def __init__(
        self, rng: np.random.Generator, streams: int, rows: int, bins: int, correlation: float
    ) -> None:
        self._rng, self._rows, self._edges = rng, rows, inner_edges(bins)
        self._correlation = correlation
        self._last = rng.standard_normal(streams)

    def draw(self, shift__s: Array) -> Counts:
        """Return the next window."""
        streams, bins = len(self._last), len(self._edges) + 1
        counts = np.zeros((streams, bins), np.int64)
        at = np.arange(streams)
        noise = math.sqrt(1 - self._correlation**2)
        for _ in range(self._rows):
            fresh = self._rng.standard_normal(streams)
            self._last = self._correlation * self._last + noise * fresh
            counts[at, np.searchsorted(self._edges, self._last + shift__s, side="right")] += 1
        return counts


class Daily:
    """The mean goes up and down once a day; each stream's day begins at another hour."""

    def __init__(
        self, rng: np.random.Generator, streams: int, rows: int, bins: int, amplitude: float
    ) -> None:
        self._rng, self._rows, self._bins, self._amplitude = rng, rows, bins, amplitude
        self._hour = rng.integers(0, 24, streams)

    def draw(self, shift__s: Array) -> Counts:
        """Return the next window: one hour."""
        self._hour += 1
        mean = self._amplitude * np.sin(2 * math.pi * self._hour / 24) + shift__s
        return self._rng.multinomial(self._rows, shares(self._bins, mean))


class Scattered:
    """Each window has shares of its own, Dirichlet around the common ones."""

    def __init__(
        self, rng: np.random.Generator, rows: int, bins: int, concentration: float
    ) -> None:
        self._rng, self._rows, self._bins = rng, rows, bins
        self._concentration = concentration

    def draw(self, shift__s: Array) -> Counts:
        """Return the next window."""
        gammas = self._rng.standard_gamma(self._concentration * shares(self._bins, shift__s))
        own = (gammas + 1e-300) / (gammas + 1e-300).sum(1, keepdims=True)
        return self._rng.multinomial(self._rows, own)


def peers(window: Counts, reference: Counts, small: Counts, *, features: int) -> dict[str, Mask]:
    """Return which streams drift by the rule of each other tool, (S,).

    KS and PSI as textbooks have them. Evidently, pages "Data drift algorithm"
    (docs-old.evidentlyai.com/reference/data-drift-algorithm) and
    docs.evidentlyai.com/metrics/preset_data_drift: up to 1,000 rows of reference a KS test at
    p < 0.05 for each numerical column, above it Wasserstein-1 over the reference's standard
    deviation >= 0.1; a data set drifts where half its columns do. (Its chi-square and
    Jensen–Shannon branches are for columns of at most 5 values.) whylogs 1.6,
    ``whylogs/viz/drift/configs.py``: KS p < 0.05 is DRIFT, p < 0.15 POSSIBLE_DRIFT; Hellinger
    >= 0.4 is DRIFT, >= 0.15 POSSIBLE_DRIFT.

    Args:
        window: Counts, (S, B).
        reference: Counts of about 10,000 rows, (S, B).
        small: Counts of 1,000 rows, (S, B).
        features: Of a device; a device is a data set.
    """
    ks, ks_small = _ks(window, reference), _ks(window, small)
    wasserstein, hellinger = _wasserstein(window, reference), _hellinger(window, reference)

    def dataset(drifted: Mask) -> Mask:
        half = drifted.reshape(-1, features).mean(1) >= 0.5
        return np.repeat(half, features)

    return {
        "KS p < .05 (also whylogs: drift)": ks < 0.05,
        "PSI > 0.1": _psi(window, reference) > 0.1,
        "Evidently column, ref 1,000": ks_small < 0.05,
        "Evidently column, ref 10,000": wasserstein >= 0.1,
        "Evidently data set, ref 1,000": dataset(ks_small < 0.05),
        "Evidently data set, ref 10,000": dataset(wasserstein >= 0.1),
        "whylogs KS: possible drift": ks < 0.15,
        "whylogs Hellinger: possible drift": hellinger >= 0.15,
        "whylogs Hellinger: drift": hellinger >= 0.4,
    }


def _below(counts: Counts) -> Array:
    return np.cumsum(counts, 1)[:, :-1] / counts.sum(1, keepdims=True)


def _ks(window: Counts, reference: Counts) -> Array:
    n, m = window.sum(1), reference.sum(1)
    apart = np.abs(_below(window) - _below(reference)).max(1)
    return kolmogorov_above(apart * np.sqrt(n * m / (n + m)))


def _psi(window: Counts, reference: Counts) -> Array:
    p, q = (np.maximum(x / x.sum(1, keepdims=True), 1e-4) for x in (window, reference))
    return np.asarray(((p - q) * np.log(p / q)).sum(1))


def _wasserstein(window: Counts, reference: Counts) -> Array:
    edges = np.array([-np.inf, *inner_edges(window.shape[1]), np.inf])
    density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    middle = (density[:-1] - density[1:]) * window.shape[1]  # means of equally likely bins
    return np.asarray((np.abs(_below(window) - _below(reference)) * np.diff(middle)).sum(1))


def _hellinger(window: Counts, reference: Counts) -> Array:
    p, q = (np.sqrt(x / x.sum(1, keepdims=True)) for x in (window, reference))
    return np.asarray(np.sqrt(((p - q) ** 2).sum(1) / 2))
