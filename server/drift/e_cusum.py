"""Watch bin counts of many streams window by window; alarm rarely and soon. Pure.

    counts of a window --fold--> e-value of the window --> score = max(score, 0) + ln e
                                                           score > ln(streams x windows): alarm

S streams, B bins, L windows looked back on, A alternatives. A reset is a window after which the
score is 0 or less; that window is the first that the next alternatives are learned from. If it
taught nothing, that is if no alternative left the null, those before it are remembered too, fading.

**Null** of a stream, see :mod:`.e_cusum_null`: in each window, given all before it, the counts
are Dirichlet-multinomial with the stream's over-dispersion and any mean p with
KL(centre || p) <= radius. A change too small to matter, the reference's own error, and a daily
cycle within the radius are no drift.

**E-value of a window**: the mean over alternatives q of DM(x; K q) / DM(x; K p*), each weighted by
its evidence since the last reset. Each q is made of earlier windows alone: the counts since the
last reset and what is remembered of before, shrunk towards the centre, bin by bin (any change) or
along smooth directions (location; location, scale and skewness: few numbers, so that one window
teaches them). p* is the reverse information projection of q on the null: the p within the radius
that minimises KL(q || p). By the Lagrange conditions of this ball it lies on the line between both,
p* = (1 - t) centre + t q; Newton's method finds t, and its steps stay at or beyond the surface.

What is proven of E[e] <= 1 under the null:

- no over-dispersion (independent rows), any radius: for every p in the ball
  sum p q / p* <= 1 (Grünwald, de Heide, Koolen, JRSS B 86, 2024; the ball is convex), and
  the window's e-value has expectation (sum p q / p*)^n <= 1 under p;
- any over-dispersion, radius 0: a likelihood ratio of two Dirichlet-multinomials, exactly 1.

Both at once (over-dispersion *and* p off the centre) hold to the second order, that is as far as
the counts of a window are nearly normal; ``tests/server/drift/test_e_cusum.py`` measures it. That
K, the centre and slow variation are fitted is covered by upper confidence bounds, not by proof:
where they are wrong for a stream, that stream may alarm falsely.

**Error control**: the score is Page's CUSUM of an e-process, an e-detector: whatever depends on
what, the mean number of windows to the first false alarm of one stream is at least the
exponential of its threshold (Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2, 2023;
Ville's inequality for each start, summed over starts). With ln(S x ``windows_per_false_alarm``)
the S streams together raise at most one false alarm in that many windows on average.

:meth:`ECusum.e_values` is for e-BH over device × feature: the mean over the last L starts of the
product since then has an expectation of at most 1 at any window fixed beforehand.

Sources besides: Page, Biometrika 41 (1954); Lorden, Annals of Mathematical Statistics 42 (1971);
Wang, Ramdas, JRSS B 84 (2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .e_cusum_null import StreamNulls, concentration_of
from .log_gamma import rising

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

BLOCK: Final = 2048  # streams in one go: their arrays stay in the cache
NEWTON_STEPS: Final = 3  # within 0.01 % of radii below 0.01 and 10 % of 0.3, and never short of it
LEAST: Final = 1e-9  # of the centre in each alternative: a share of 0 has no logarithm
BEND_MAX: Final = 20.0  # nats; polynomials are steep in rare bins
TILT_MAX: Final = 2.0  # standard deviations; a larger change is found at once anyhow


@dataclass(frozen=True, slots=True, kw_only=True)
class ECusumConfig:
    """When a stream's alarm is raised."""

    windows_per_false_alarm: int = 1000
    """Windows in which all streams together raise one false alarm at most, on average."""
    look_back: int = 16
    """Windows that :meth:`ECusum.e_values` looks back on, 1 to 256."""
    strengths_smooth: tuple[float, ...] = (100.0,)
    """Effective rows that pull a smooth alternative to the centre: few let it follow the last
    windows closely. Each costs two comparisons per window."""
    strengths_bins: tuple[float, ...] = (500.0,)
    """The same of the alternatives that follow each bin; each costs one."""
    memory_rows: float = 100.0
    """Effective rows that are remembered, fading, while they teach nothing beyond the null: windows
    of fewer would never teach anything; of more, none but the last is remembered."""

    @property
    def alternatives(self) -> int:
        """A, how many alternatives a window is compared with."""
        return 2 * len(self.strengths_smooth) + len(self.strengths_bins)

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.windows_per_false_alarm <= 10**9 or not 1 <= self.look_back <= 256:
            raise ValueError("windows_per_false_alarm must be 1 to 1e9, look_back 1 to 256")
        if not 1 <= self.memory_rows <= 1e6:
            raise ValueError("memory_rows must be 1 to 1e6")
        strengths = (*self.strengths_smooth, *self.strengths_bins)
        if not strengths or not all(0 < each < math.inf for each in strengths):
            raise ValueError("there must be strengths, each finite and > 0")


@dataclass(slots=True)
class ECusum:
    """The folded state of S streams."""

    score__s: Array
    """Evidence of a change in nats; 0 or less: none since the last window."""
    learned__sb: Array
    """Counts since the last reset, and those remembered of before, in effective rows: divided by
    the over-dispersion."""
    recent__sl: Array
    """ln e of the last L windows, newest last; 0 where there was none."""
    trust__sa: Array
    """Evidence of each alternative since the last reset in nats: its weight in the mean."""
    windows__s: Counts
    """Windows folded."""
    began__s: Counts
    """Number (from 1) of the window in which the present excursion began: the change, if any."""
    began_ms__s: Counts
    """Its time as given to :meth:`fold`."""

    @classmethod
    def new(cls, streams: int, bins: int, *, config: ECusumConfig) -> ECusum:
        """Return the state of streams of which nothing was seen."""
        return cls(
            np.zeros(streams),
            np.zeros((streams, bins)),
            np.zeros((streams, config.look_back)),
            np.zeros((streams, config.alternatives)),
            *(np.zeros(streams, np.int64) for _ in range(3)),
        )

    def __len__(self) -> int:
        """Return S."""
        return len(self.score__s)

    def fold(
        self, counts__sb: ArrayLike, nulls: StreamNulls, *, now_ms: int, config: ECusumConfig
    ) -> None:
        """Add one window of each stream.

        Args:
            counts__sb: Counts, shape (S, B), whole numbers >= 0; a row of zeros is a stream that
                sent no window, which is left as it is.
            nulls: Of the same streams in the same order.
            now_ms: Start of the window, for :attr:`began_ms__s`.
            config: The alternatives.

        Raises:
            ValueError: The shape is not (S, B), a count is negative, not whole or not finite, or
                the state was made with another configuration. Nothing was folded.
        """
        counts = np.asarray(counts__sb)
        if counts.dtype.kind not in "iuf" or counts.shape != nulls.centre__sb.shape:
            raise ValueError(f"counts must be numbers of shape {nulls.centre__sb.shape}")
        counts = counts.astype(np.float64)
        if not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1).any():
            raise ValueError("counts must be finite, whole and not negative")
        widths = (self.recent__sl.shape[1], self.trust__sa.shape[1])
        if self.learned__sb.shape != counts.shape:
            raise ValueError(f"the state is of {self.learned__sb.shape} streams and bins")
        if widths != (config.look_back, config.alternatives):
            raise ValueError("the state was made with another look_back or other strengths")
        for begin in range(0, len(self), BLOCK):
            rows = slice(begin, begin + BLOCK)
            self._fold(rows, counts[rows], nulls, now_ms, config)

    def _fold(
        self, rows: slice, counts: Array, nulls: StreamNulls, now_ms: int, config: ECusumConfig
    ) -> None:
        size = counts.sum(1)
        seen = size > 0
        inflation, concentration = _dispersion(size, nulls, rows)
        each__sa = _log_e(counts, self.learned__sb[rows], nulls, rows, concentration, config)
        trust = self.trust__sa[rows]
        gain = _log_sum_exp(trust + each__sa) - _log_sum_exp(trust)
        score = np.maximum(self.score__s[rows], 0) + gain
        fresh = score <= 0
        effective = counts / inflation[:, None]
        # Where no alternative left the null nothing was bet, and what was learned only fades: of
        # windows too short to teach one that does, some together will.
        fading = np.where(gain == 0, np.maximum(1 - effective.sum(1) / config.memory_rows, 0), 0)
        kept = np.where(fresh, fading, 1.0)
        learned = kept[:, None] * self.learned__sb[rows] + effective
        self.windows__s[rows] += seen
        self.score__s[rows] = np.where(seen, score, self.score__s[rows])
        self.learned__sb[rows] = np.where(seen[:, None], learned, self.learned__sb[rows])
        trust = np.where(fresh[:, None], 0.0, trust + each__sa)
        self.trust__sa[rows] = np.where(seen[:, None], trust, self.trust__sa[rows])
        shifted = np.concatenate([self.recent__sl[rows, 1:], gain[:, None]], 1)
        self.recent__sl[rows] = np.where(seen[:, None], shifted, self.recent__sl[rows])
        begins = seen & fresh
        self.began__s[rows] = np.where(begins, self.windows__s[rows], self.began__s[rows])
        self.began_ms__s[rows] = np.where(begins, now_ms, self.began_ms__s[rows])

    def alarms(self, *, config: ECusumConfig, streams: int | None = None) -> NDArray[np.bool_]:
        """Return which streams have changed, (S,).

        Args:
            config: Windows between false alarms.
            streams: How many are watched in the whole fleet; without it, those of this state.
        """
        return self.score__s > threshold(streams or len(self), config=config)

    def e_values(self) -> Array:
        """Return an e-value of "no change within the last L windows" of each stream, (S,)."""
        since = np.cumsum(self.recent__sl[:, ::-1], 1)
        return np.asarray(np.exp(np.minimum(since, 600.0)).mean(1))

    def reset(self, streams: ArrayLike) -> None:
        """Forget the excursions of some streams, as after an alarm that was dealt with.

        Args:
            streams: Anything that indexes (S,): a mask, numbers, a slice.
        """
        index: Any = np.asarray(streams) if not isinstance(streams, slice) else streams
        self.score__s[index] = 0
        self.learned__sb[index] = 0
        self.recent__sl[index] = 0
        self.trust__sa[index] = 0
        self.began__s[index] = self.windows__s[index]


def threshold(streams: int, *, config: ECusumConfig) -> float:
    """Return the score in nats beyond which a stream of a fleet of so many has changed."""
    return math.log(max(1, streams) * config.windows_per_false_alarm)


def project(centre__sb: Array, radius__s: Array, alternative__sb: Array) -> Array:
    """Return how far from the centre to each alternative its projection on the ball lies.

    Args:
        centre__sb: Shares, each > 0.
        radius__s: Of KL(centre || p) <= radius, nats.
        alternative__sb: Shares, each > 0.

    Returns:
        t from 0 to 1, shape (S,), with KL(centre || (1 - t) centre + t alternative) >= radius,
        hardly more than it; 1 where the alternative lies within the ball.
    """
    apart = alternative__sb / centre__sb - 1
    square = (centre__sb * apart**2).sum(1)
    t = np.minimum(1.0, np.sqrt(2 * radius__s / np.maximum(square, 1e-300)))
    for _ in range(NEWTON_STEPS):
        factor = 1 + t[:, None] * apart
        value = -(centre__sb * np.log(factor)).sum(1) - radius__s
        slope = -(centre__sb * apart / factor).sum(1)
        # KL is convex in t: a tangent meets the radius at or beyond the true t, never before.
        step = np.divide(value, slope, out=np.zeros_like(value), where=slope > 0)
        t = np.clip(t - step, 0.0, 1.0)
    return np.asarray(t)


def _dispersion(size: Array, nulls: StreamNulls, rows: slice) -> tuple[Array, Array]:
    """Return (inflation, concentration) of windows of so many rows.

    What neighbouring rows share inflates every window alike, what a whole window shares inflates
    longer ones more. Which of the two was fitted is not known: the larger one counts.
    """
    fitted, limit = nulls.inflation__s[rows], nulls.concentration__s[rows]
    concentration = np.minimum(limit, concentration_of(fitted, size))
    inflation = (size + concentration) / (1 + concentration)
    return np.maximum(inflation, 1.0), concentration


def _log_e(
    counts: Array,
    learned: Array,
    nulls: StreamNulls,
    rows: slice,
    concentration: Array,
    config: ECusumConfig,
) -> Array:
    centre, radius = nulls.centre__sb[rows], nulls.radius__s[rows]
    basis = nulls.basis__sjb[rows]
    total = learned.sum(1)
    moments = np.einsum("sb,sjb->sj", learned, basis)
    weights = []
    for strength in config.strengths_smooth:
        tilt = np.clip(moments / (strength + total)[:, None], -TILT_MAX, TILT_MAX)
        for degrees in (1, basis.shape[1]):
            bent = np.einsum("sj,sjb->sb", tilt[:, :degrees], basis[:, :degrees])
            weights.append(centre * np.exp(np.clip(bent, -BEND_MAX, BEND_MAX)))
    weights += [strength * centre + learned for strength in config.strengths_bins]
    found = [_ratio(counts, each, centre, radius, concentration) for each in weights]
    return np.asarray(np.stack(found, 1))


def _ratio(
    counts: Array, weights: Array, centre: Array, radius: Array, concentration: Array
) -> Array:
    """Return ln DM(x; K q) - ln DM(x; K p*) with q in proportion to the weights, (S,)."""
    q = (1 - LEAST) * weights / weights.sum(1, keepdims=True) + LEAST * centre
    # KL(centre || q): where it is within the ball, q is its own projection and says nothing.
    outside = np.flatnonzero((centre * np.log(centre / q)).sum(1) > radius)
    found = np.zeros(len(counts))
    if len(outside):
        q, centre, x = q[outside], centre[outside], counts[outside]
        t = project(centre, radius[outside], q)[:, None]
        k = concentration[outside][:, None]
        p = (1 - t) * centre + t * q
        found[outside] = (rising(k * q, x) - rising(k * p, x)).sum(1)
    return found


def _log_sum_exp(values__sa: Array) -> Array:
    top = values__sa.max(1, keepdims=True)
    return np.asarray(np.log(np.exp(values__sa - top).sum(1)) + top[:, 0])
