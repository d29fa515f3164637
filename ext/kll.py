"""Read KLL sketches of Apache DataSketches and merge a fleet of them, with error bounds.

    bytes of C++, Java, Python or ours --read_kll--> KllSketch      one sketch, checked
                                       --BulkMerger-> ranks, quantiles, each with its bounds

A rank is the share of values <= v. A quantile of q is the smallest value kept whose rank is
at least q. V, in squared counts, bounds a rank's error: for each v by itself

    P(|rank estimated - rank true| * n > t) <= 2 exp(-t^2 / 2V),

and V adds up when sketches that were made by different coins merge. The format is little-endian and
does not say whether its items are float32 or float64: the exact length does. Sketches of int64 look
like those of float64, those of int32 like floats: they are read as such.

N values kept, Q queries.

Source: Apache DataSketches, KLL serial versions 1 and 2; Karnin, Lang, Liberty, FOCS 2016.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._kll import Blobs, Merger, read
from .errors import SketchMismatchError, SketchRecordError

__all__ = [
    "Blobs",
    "BulkMerger",
    "Estimates",
    "KllSketch",
    "RunQuantiles",
    "SketchMismatchError",
    "SketchRecordError",
    "quantiles_of_runs",
    "read_kll",
]

K_WIDE = 4096  # the fleet of 10,000 sketches of k=64 keeps ranks within 0.1 %
BYTES_MAX = 1 << 21  # above 2^53 values in float64 at k=65535, the largest sketch there is


class Estimates(NamedTuple):
    """What a merger says about each query, with bounds at the confidence asked for."""

    estimate: NDArray[Any]
    """Ranks in float64, or quantiles in the merger's dtype; shape (Q,)."""
    low: NDArray[Any]
    """Lower bounds, same shape and dtype."""
    high: NDArray[Any]
    """Upper bounds, same shape and dtype."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KllSketch:
    """A sketch that was read and checked. Its arrays are read-only."""

    k: int
    """Accuracy parameter, 8 to 65535."""
    min_k: int
    """Smallest k of the sketches that were merged into it, 8 to k."""
    n: int
    """Values seen, 0 to 2^53; NaNs were never counted."""
    minimum: float
    """Smallest value, exact; NaN if empty."""
    maximum: float
    """Largest value, exact; NaN if empty."""
    values: NDArray[Any]
    """Values kept, shape (N,), float32 or float64, ascending. An empty sketch says float32."""
    weights: NDArray[np.int64]
    """How many values each of them stands for, shape (N,); they sum to n."""
    variance_bound: float
    """Bound of V in squared counts, if the reference's update and merge made the sketch. A sketch
    that was made or shrunk otherwise travels with its own V."""

    def quantiles(self, q: ArrayLike) -> NDArray[Any]:
        """Return the quantile of each share.

        Args:
            q: Shares, each in [0, 1], of any shape. 0 gives the minimum, 1 the maximum.

        Returns:
            The same shape, dtype of ``values``; NaN if the sketch is empty.

        Raises:
            ValueError: A share is NaN or outside [0, 1].
        """
        return self._curve().quantiles(_shares(q))

    def ranks(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the share of values <= each of ``values``.

        Args:
            values: Of any shape, no NaN. Where floats are kept, a value is taken as the nearest
                float.

        Returns:
            The same shape, float64 in [0, 1]; 0 below the minimum, 1 from the maximum on, NaN
            if the sketch is empty.

        Raises:
            ValueError: A value is NaN.
        """
        return self._curve().ranks(_reals(values))

    def _curve(self) -> _Curve:
        return _Curve(self.values, np.cumsum(self.weights), self.minimum, self.maximum)


def read_kll(
    data: bytes | bytearray | memoryview, *, k_max: int = 65535, bytes_max: int = BYTES_MAX
) -> KllSketch:
    """Read a KLL sketch of floats or doubles; whatever the bytes are, nothing else happens.

    Args:
        data: Bytes of the compact form (serial version 1 or 2), without anything behind them.
        k_max: Largest k to take, 8 to 65535.
        bytes_max: Longest data to take, in bytes.

    Returns:
        The sketch; it owns its arrays.

    Raises:
        SketchRecordError: The bytes are no such sketch, or one beyond the limits.

    >>> read_kll(bytes.fromhex("02020f04c80008000000c03f")).values.tolist()
    [1.5]
    """
    if len(data) > bytes_max:
        raise SketchRecordError(f"{len(data)} bytes: a KLL sketch may have {bytes_max} here")
    is_double, k, min_k, n, minimum, maximum, bound, starts, items = read(bytes(data))
    if k > k_max:
        raise SketchRecordError(f"a KLL sketch of k={k}: at most {k_max} is taken here")
    values__n: NDArray[Any] = np.frombuffer(items, np.float64 if is_double else np.float32)
    weights__n = np.repeat(np.int64(1) << np.arange(len(starts) - 1), np.diff(starts))
    order__n = np.argsort(values__n, kind="stable")
    values__n, weights__n = values__n[order__n], weights__n[order__n]
    values__n.setflags(write=False)
    weights__n.setflags(write=False)
    return KllSketch(
        k=k,
        min_k=min_k,
        n=n,
        minimum=minimum if n else math.nan,
        maximum=maximum if n else math.nan,
        values=values__n,
        weights=weights__n,
        variance_bound=bound,
    )


class BulkMerger(Merger):
    """Merge very many sketches; ask for ranks and quantiles with bounds.

    Ten thousand sketches of k=64 merge in a few milliseconds, and the merger adds about as much
    to V as they bring. Sketches of any k mix; floats and doubles do not: the first sketch that is
    not empty decides. Until some level fills 512 rows of a vector nothing is sampled, so few small
    sketches merge exactly. Minimum, maximum and n are always exact.

    Any thread may call any method: a lock keeps calls whole. ``add_many`` lets the GIL go.
    Memory: address space for 54 tiles of k_wide vectors (7 MiB at 4096 with AVX2), of which only
    touched pages count: about 0.5 MiB for 10,000 sketches.

    >>> merger = BulkMerger()
    >>> merger.add(bytes.fromhex("02020f04c80008000000c03f"))
    >>> merger.ranks([1.0, 1.5]).estimate.tolist()
    [0.0, 1.0]
    """

    def __init__(self, k_wide: SupportsIndex = K_WIDE, *, seed: int | None = None) -> None:
        """Make an empty merger.

        Args:
            k_wide: Rows of the widest tiles, a power of 2 from 64 to 65536: V that merging adds
                falls with its square.
            seed: Makes the coins repeat, for tests; by default they come from the system.

        Raises:
            ValueError: k_wide is not such a number.
        """
        super().__init__(k_wide, _coins(seed))
        self._seen = -1
        self._kept: tuple[_Curve, int, float] | None = None

    @property
    def minimum(self) -> float:
        """Smallest value of all, exact; NaN if empty."""
        return self._curve()[0].minimum

    @property
    def maximum(self) -> float:
        """Largest value of all, exact; NaN if empty."""
        return self._curve()[0].maximum

    def add_many(self, blobs: Iterable[bytes], variances: ArrayLike | None = None) -> None:
        """Merge many sketches in one pass without the GIL: all of them, or none.

        Args:
            blobs: Sketches as ``add`` takes them, each of type bytes. A tuple is not copied.
            variances: V of each, shape (number of blobs,), finite and >= 0 or NaN for unknown;
                None if none is known.

        Raises:
            ValueError: As in ``add``, for the first sketch that is refused; or another number of
                variances than of sketches. The merger is as before.
            TypeError: A sketch is not of type bytes. The merger is as before.
        """
        given__n = None if variances is None else np.ascontiguousarray(variances, np.float64)
        self.add_all(tuple(blobs), given__n)

    def ranks(self, values: ArrayLike, confidence: float = 0.99) -> Estimates:
        """Return the share of values <= each of ``values``, with two-sided bounds.

        Args:
            values: Of any shape, no NaN. Where floats are kept, a value is taken as the nearest
                float.
            confidence: Of each pair of bounds by itself, 0 < confidence < 1: the true rank is in
                [low, high] with at least this probability.

        Returns:
            Shares in float64; below the minimum and from the maximum on they are exact. NaN if
            the merger is empty.

        Raises:
            ValueError: A value is NaN, or the confidence is out of range.
        """
        curve, n, variance = self._curve()
        error = _error(n, variance, confidence)
        reals = curve.near(_reals(values))
        found = curve.ranks(reals)
        if n == 0:
            return Estimates(found, found.copy(), found.copy())
        inside = (reals >= curve.minimum) & (reals < curve.maximum)
        # Inside of the extremes, which are exact, one value at least is on either side.
        low = np.where(inside, np.maximum(found - error, 1.0 / n), found)
        high = np.where(inside, np.minimum(found + error, 1.0 - 1.0 / n), found)
        return Estimates(np.clip(found, low, high), low, high)

    def quantiles(self, q: ArrayLike, confidence: float = 0.99) -> Estimates:
        """Return the quantile of each share, with two-sided bounds.

        Args:
            q: Shares, each in [0, 1], of any shape. 0 gives the minimum, 1 the maximum, exactly.
            confidence: Of each pair of bounds by itself, 0 < confidence < 1: the smallest value
                whose true rank is at least q is in [low, high] with at least this probability.

        Returns:
            Values in the dtype of the sketches; NaN if the merger is empty.

        Raises:
            ValueError: A share is NaN or outside [0, 1], or the confidence is out of range.
        """
        curve, n, variance = self._curve()
        error = _error(n, variance, confidence)
        shares = _shares(q)
        # q = 0 and q = 1 ask for the extremes, which are exact.
        error__q = np.where((shares > 0.0) & (shares < 1.0), error, 0.0)
        return Estimates(
            curve.quantiles(shares),
            curve.quantiles(np.maximum(shares - error__q, 0.0)),
            curve.quantiles(np.minimum(shares + error__q, 1.0)),
        )

    def _curve(self) -> tuple[_Curve, int, float]:
        """Return the curve, n and V of one moment; the sorted curve is kept until a change."""
        kept = self._kept
        if kept is not None and self._seen == self.changes:
            return kept
        changes, is_double, n, variance, minimum, maximum, values, below = self.curve()
        curve = _Curve(
            np.frombuffer(values, np.float64 if is_double else np.float32),
            np.frombuffer(below, np.int64),
            minimum if n else math.nan,
            maximum if n else math.nan,
        )
        self._kept, self._seen = (curve, n, variance), changes
        return self._kept


class RunQuantiles(NamedTuple):
    """What the runs of :func:`quantiles_of_runs` hold; G runs, Q shares."""

    n: NDArray[np.int64]
    """Values of each run, shape (G,)."""
    variance: NDArray[np.float64]
    """V of each, with what merging added, in squared counts, shape (G,)."""
    estimate: NDArray[np.float64]
    """Quantiles, shape (G, Q); NaN for a run without a value."""
    low: NDArray[np.float64]
    """Lower bounds of them."""
    high: NDArray[np.float64]
    """Upper bounds of them."""


def quantiles_of_runs(
    blobs: Blobs,
    starts: ArrayLike,
    variances: ArrayLike,
    q: ArrayLike,
    *,
    confidence: float = 0.99,
    k_wide: int = K_WIDE,
    seed: int | None = None,
) -> RunQuantiles:
    """Merge many groups of sketches, each by itself, and return quantiles of each.

    The same as a :class:`BulkMerger` for each group, at a tenth of the time: one tower is used for
    all, and Python runs once. The GIL is let go, so that threads may share the groups.

    Args:
        blobs: Sketches, those of a group next to each other.
        starts: Group g is the sketches starts[g] to starts[g + 1] - 1; ascending, shape (G + 1,).
        variances: V of each sketch, finite and >= 0, or NaN for unknown.
        q: Shares, each in [0, 1], shape (Q,).
        confidence: Of each pair of bounds by itself.
        k_wide: Width, as of a merger.
        seed: Makes the coins repeat, for tests.

    Raises:
        SketchRecordError: The bytes of a sketch are damaged.
        SketchMismatchError: A group mixes floats and doubles, or has more than 2^53 values.
        ValueError: Starts do not ascend or shapes do not fit; a share, V or the confidence is out
            of range.
        IndexError: Starts lie beyond the sketches.
    """
    starts__g = np.ascontiguousarray(starts, np.int64)
    shares__q = np.ascontiguousarray(_shares(q))
    runs = max(0, len(starts__g) - 1)
    n__g, variance__g = np.zeros(runs, np.int64), np.zeros(runs)
    found__gbq = np.full((runs, 3, len(shares__q)), np.nan)
    Merger(k_wide, _coins(seed)).ask_runs(
        blobs,
        starts__g,
        np.ascontiguousarray(variances, np.float64),
        shares__q,
        _deviations(confidence),
        n__g,
        variance__g,
        found__gbq,
    )
    return RunQuantiles(n__g, variance__g, *(found__gbq[:, b] for b in range(3)))


class _Curve:
    """Ranks and quantiles of ascending values with running weights; exact at the extremes."""

    def __init__(
        self,
        values__n: NDArray[Any],
        below__n: NDArray[np.int64],
        minimum: float,
        maximum: float,
    ) -> None:
        self.values__n = values__n
        self.below__n = below__n  # values <= each, in int64: exact up to 2^53
        self.minimum = minimum
        self.maximum = maximum

    def near(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values in the type of those kept."""
        with np.errstate(over="ignore"):
            return values.astype(self.values__n.dtype)

    def ranks(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the share <= each value."""
        if len(self.values__n) == 0:
            return np.full(values.shape, np.nan)
        near = self.near(values)
        at = np.searchsorted(self.values__n, near, side="right")
        found = np.concatenate([[0], self.below__n])[at] / self.below__n[-1]
        return np.where(near >= self.maximum, 1.0, np.where(near < self.minimum, 0.0, found))

    def quantiles(self, shares: NDArray[np.float64]) -> NDArray[Any]:
        """Return the smallest value kept whose rank is at least each share."""
        dtype: np.dtype[Any] = self.values__n.dtype
        if len(self.values__n) == 0:
            return np.full(shares.shape, np.nan, dtype)
        total = self.below__n[-1]
        at = np.searchsorted(self.below__n, shares * total, side="left")
        # The product may have been rounded up, by which the rank of the value before is enough.
        at -= (at > 0) & (self.below__n[np.maximum(at, 1) - 1] / total >= shares)
        found = np.asarray(self.values__n[np.minimum(at, len(self.values__n) - 1)])
        ends = np.where(shares <= 0.0, dtype.type(self.minimum), dtype.type(self.maximum))
        return np.where((shares <= 0.0) | (shares >= 1.0), ends, found).astype(dtype, copy=False)


def _coins(seed: int | None) -> int:
    """Return 64 bits that are not all 0; seeds that lie close give bits that do not."""
    if seed is None:
        return secrets.randbits(64) or 1
    (bits,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return int(bits) or 1


def _deviations(confidence: float) -> float:
    """Return how many sqrt(V) a rank errs at most, in counts, at a confidence."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence is between 0 and 1, got {confidence}")
    return math.sqrt(2.0 * math.log(2.0 / (1.0 - confidence)))


def _error(n: int, variance: float, confidence: float) -> float:
    """Return the error of a rank, as a share, that is exceeded with 1 - confidence at most."""
    deviations = _deviations(confidence)
    return deviations * math.sqrt(variance) / n if n else 0.0


def _reals(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if np.isnan(found).any():
        raise ValueError("NaN has no rank")
    return found


def _shares(q: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(q, np.float64)
    if not ((found >= 0.0) & (found <= 1.0)).all():
        raise ValueError("a share is from 0 to 1")
    return found
