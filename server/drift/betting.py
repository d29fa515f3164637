"""Bet on late labels that a model is right less often than it may be. Pure.

    labels --gather--> look --factors--> evidence of a loss, from each look on, however late

**Null**: in every look, given all looks before it, the wrong answers are at most as many and at
most as dispersed as a beta-binomial's of mean ``n (1 - floor)`` and correlation ``rho`` (increasing
convex order). Answers of one look may depend on each other: ``rho`` is how much two of them do; it
is learned from the looks before, see :class:`Scatter`, and the null is as good as that is. Looks
may depend on each other in any way that leaves the expectation alone.

**Bet**: on w wrong answers of n, ``exp(theta w) / E0 exp(theta w)``, where E0 is of that
beta-binomial. It is convex and grows with w: under the null it is worth at most 1 on average. There
is a theta for each of ``DROPS``, the best one for a loss of so much below the floor.

**Error control**: the evidence is the Shiryaev–Roberts sum of the bets that began with each look so
far, R <- (R + 1) bet, averaged over the drops. Under the null R minus the looks is a
supermartingale, so the evidence of a device reaches r only after r looks on average or more (ARL).
A loss that begins after a thousand good looks is found as soon as one that begins at once: a bettor
with one purse would first have to win back what they lost, or share it out among the looks.
For D devices the same holds of the sum: if k of them are named where they reach ``D r / k`` (e-BH's
step-up), the fleet has one false alarm in r looks of each on average, whatever the dependence.

Sources: Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2 (2023), sections 2 and 3; beta-binomial:
Skellam, JRSS B 10 (1948); step-up of e-detectors: Dandapanthula, Ramdas, "Multiple testing in
multi-stream sequential change detection" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

DROPS: Final = (0.04, 0.08, 0.16, 0.32)  # below the floor: each is within sqrt 2 of any loss
EVIDENCE_MAX: Final = 1e12  # beyond it nothing changes, and a long run cannot overflow
LN_MAX: Final = 700.0  # of one bet, in nats: its exponential is a float still
PRIOR_PAIRS: Final = 20.0  # a correlation of .05 is known to about .02 by so many pairs
LOOK_MAX: Final = 10_000  # answers; the share of more is bet on as if it were of so many


def begun() -> list[float]:
    """Return the evidence before the first look."""
    return [0.0] * len(DROPS)


def after(
    evidence: Sequence[float], labelled: int, correct: int, *, floor: float, rho: float
) -> list[float]:
    """Return the evidence after one look.

    Args:
        evidence: Of each drop, before it.
        labelled: Answers of the look, at least 1.
        correct: How many of them were right, 0 to ``labelled``.
        floor: Smallest expected share of right answers that is no loss, 0 <= floor < 1.
        rho: Correlation of two answers of a look, 0 <= rho < 1.

    >>> [round(each, 2) for each in after(begun(), 20, 10, floor=0.9, rho=0.05)]
    [5.55, 22.52, 71.97, 1.45]
    """
    n = min(labelled, LOOK_MAX)
    wrong = n * (1 - correct / labelled)
    return [
        min(EVIDENCE_MAX, (old + 1) * math.exp(min(theta * wrong - usual, LN_MAX)))
        for old, (theta, usual) in zip(evidence, _stakes(n, floor, rho), strict=True)
    ]


def total(evidence: Sequence[float]) -> float:
    """Return the evidence over all drops: looks in which it comes by chance once, at least."""
    return sum(evidence) / len(evidence)


@dataclass(slots=True)
class Scatter:
    """How much the share of right answers goes to and fro between one look and the next.

    Half the squared difference of two neighbours is their variance, which a loss raises once and
    not for ever: ``p (1 - p) (1/n + (1 - 1/n) rho)`` for looks of n answers.
    """

    pairs: int = 0
    half_squares: float = 0.0
    inverse: float = 0.0
    """Sum of 1 / n, of the mean of each pair."""
    last: float = 0.0
    """Share of the newest look."""
    last_labelled: int = 0

    def add(self, labelled: int, correct: int) -> None:
        """Add a look of at least one answer."""
        share = correct / labelled
        if self.last_labelled:
            self.pairs += 1
            self.half_squares += (share - self.last) ** 2 / 2
            self.inverse += (1 / labelled + 1 / self.last_labelled) / 2
        self.last, self.last_labelled = share, labelled

    def rho(self, share: float, *, prior: float) -> float:
        """Return the correlation of two answers of a look, rounded up to a hundredth.

        Args:
            share: Of right answers, 0 to 1.
            prior: What it is taken for before the first look, and counted as ``PRIOR_PAIRS``.
        """
        usual = max(share * (1 - share), 0.01)
        found = PRIOR_PAIRS * prior + self.half_squares / usual - self.inverse
        rho = found / (PRIOR_PAIRS + self.pairs - self.inverse)
        return min(0.95, max(1, math.ceil(100 * rho)) / 100)


@lru_cache(4096)
def _stakes(n: int, floor: float, rho: float) -> list[tuple[float, float]]:
    """Return (theta, ln E0 exp(theta w)) of each drop."""
    spread = max(floor * (1 - floor), 0.02) * (1 + (n - 1) * rho)
    thetas = [drop / spread for drop in DROPS]
    wrong = 1 - floor
    if floor <= 0:  # all may be wrong
        return [(theta, theta * n) for theta in thetas]
    if not rho:
        return [(theta, n * math.log(floor + wrong * math.exp(theta))) for theta in thetas]
    size = 1 / rho - 1  # pseudo-answers that the look's own share is known by
    a, b, c__n = size * wrong, size * floor, np.arange(n, dtype=np.float64)
    first = np.log((b + c__n) / (size + c__n)).sum()  # of no wrong answer
    steps = np.log((n - c__n) / (c__n + 1) * (a + c__n) / (b + n - c__n - 1))
    logs = first + np.concatenate([[0.0], np.cumsum(steps)])
    counts = np.arange(n + 1, dtype=np.float64)
    return [(theta, float(np.logaddexp.reduce(logs + theta * counts))) for theta in thetas]
