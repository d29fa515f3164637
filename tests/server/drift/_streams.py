"""Streams whose law is known: windows of counts in bins of the standard normal's quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shoal.server.drift.e_cusum_null import StreamNulls
from shoal.server.drift.special import normal_above, normal_quantile

Array = NDArray[np.float64]

ROWS, BINS, BASELINE = 500, 16, 72
EDGES = np.array([normal_quantile(i / BINS) for i in range(1, BINS)])
FLAT = np.full(BINS, 1 / BINS)


def shifted(shift: float) -> Array:
    """Return the shares of standard normal values whose mean lies off by so much."""
    return np.asarray(np.diff(np.concatenate([[0.0], normal_above(shift - EDGES), [1.0]])))


def kl(centre: Array, p: Array) -> Array:
    """Return KL(centre || p) over the last axis."""
    return np.asarray((centre * np.log(centre / p)).sum(-1))


def psi(p: Array, centre: Array) -> float:
    """Return the population stability index of shares."""
    return float(((p - centre) * np.log(p / centre)).sum())


def nulls_of(
    centre: Array, streams: int, *, radius: float = 0, inflation: float = 1, k: float = 1e6
) -> StreamNulls:
    """Return the same null for all streams."""
    rows = (np.full(streams, value) for value in (radius, inflation, k))
    return StreamNulls(np.tile(centre, (streams, 1)), *rows)


def autoregressive(
    rng: np.random.Generator, streams: int, correlation: float
) -> Callable[[int], NDArray[np.int64]]:
    """Return what draws windows of rows that are like their neighbours."""
    last = rng.standard_normal(streams)
    at = np.arange(streams)

    def draw(_: int) -> NDArray[np.int64]:
        nonlocal last
        counts = np.zeros((streams, BINS), np.int64)
        for _ in range(ROWS):
            fresh = rng.standard_normal(streams)
            last = correlation * last + math.sqrt(1 - correlation**2) * fresh
            counts[at, np.searchsorted(EDGES, last, side="right")] += 1
        return counts

    return draw


def daily(
    rng: np.random.Generator, streams: int, amplitude: float
) -> Callable[[int], NDArray[np.int64]]:
    """Return what draws windows of an hour, whose mean goes up and down once a day."""
    begin = rng.integers(0, 24, streams)
    hours = np.array([shifted(amplitude * math.sin(2 * math.pi * h / 24)) for h in range(24)])
    return lambda window: rng.multinomial(ROWS, hours[(begin + window) % 24])
