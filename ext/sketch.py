"""Count the values of features into KLL sketches, exact bins and moments, and merge such counts.

    matrix or windows --update--> SketchBank --to_bytes--> record --from_bytes, merge--> fleet
                                             --kll_bytes-> Apache DataSketches, Spark, Druid

Axes: N rows, D features, B batch, C channels, T time. The loops are in ``_sketch``, the format of
the record in ``sketch_record``; ``kll`` reads KLL bytes and merges very many of them.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import sketch_record
from ._sketch import VALUES_MAX, Bank
from .errors import SketchMismatchError, SketchRecordError
from .frequent import FrequentItems
from .hll import HllSketch
from .sketch_record import KINDS, Picks, SketchRecord

__all__ = ["BYTES_MAX", "Moments", "SketchBank", "SketchMismatchError", "SketchRecordError"]

BYTES_MAX = 350
"""Bytes of a record per feature, unless its exact counters alone take more."""
PICKS_MIN = 2
"""Values of the sketch that a record carries at least, whatever the counters take."""


class Moments(NamedTuple):
    """Moments of one feature's values; nulls are not among them.

    The real numbers are NaN when there is no value. An infinity is a value, and counts as in
    NumPy: it is a minimum or maximum, makes the mean infinite (NaN if both signs came) and the
    variance NaN. Finite float64 values beyond 1e150 may make the variance infinite.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, as a field named so must
    """Values that are not null."""
    mean: float
    """Arithmetic mean; never outside [minimum, maximum]."""
    variance: float
    """Mean squared distance from the mean (divisor ``count``)."""
    minimum: float
    """Smallest value."""
    maximum: float
    """Largest value."""


class SketchBank(Bank):
    """KLL sketches, exact bins, moments and null counts of a number of features.

    ``update``, ``update_row`` and ``update_channels`` count values: a whole array in one call
    without the GIL, nothing allocated but the growth of a sketch. They are inherited from the
    kernel, with their checks, because a Python frame between costs as much as a row. What they
    refuse changes nothing. NaN is null; an infinity is a value.

    Any thread may call any method: a lock makes each call whole, so threads that feed one bank
    lose nothing but wait for each other. Where that matters give each thread its own bank and
    merge; calls of 2,048 values or more then run side by side.

    Guarantees: bins, nulls and extremes are exact, in any order of updates and merges. The mean
    is within 1e-13 of the largest magnitude, and the variance within 1e-8 of itself where it is
    above 1e-14 of the squared mean (measured over 300,000 rows: 9e-15 and 6e-10). Other orders of
    the same values may differ in the last digits. For any value v chosen beforehand, the rank of
    v by the sketch is off by more than t counts with a probability of at most
    ``2 exp(-t**2 / 2V)``, V = ``variance_certificate(i)``; at k = 200 that is 1.2 % of n at 99 %
    confidence, and the mean error is zero.

    Source: Karnin, Lang, Liberty, "Optimal quantile approximation in streams", FOCS 2016;
    Hoeffding, JASA 58 (1963) for the certificate.
    """

    def __init__(
        self,
        features: int,
        *,
        k: int = 200,
        edges: Sequence[NDArray[np.float32]] | None = None,
        kinds: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """Make an empty bank.

        Args:
            features: Number of features, 1 to 65,536.
            k: Size of the sketches, 8 to 65,535: the error falls as 1 / k, memory grows with it.
            edges: For each feature the inner edges of its bins: shape (E,), E from 0 to 65,535,
                float32, strictly ascending, no NaN. E edges make E + 1 bins, the outer ones
                without end. None: one bin for each feature.
            kinds: For each feature what it is. "float": values rounded to float32 in a KLL floats
                sketch. "double": a KLL doubles sketch. "integer": KLL floats, distinct values and
                frequent items. "category": codes whose order means nothing; distinct values and
                frequent items alone. None: "float" for all. Bins and moments are exact for float64
                values whatever the kind. Items are whole numbers; a float32 holds those up to
                2**24 exactly, a float64 up to 2**53.
            seed: Of the sketches' coins, for tests; None: from the operating system, so that the
                errors of banks are independent, which is what makes a fleet's error small.

        Raises:
            TypeError: ``features``, ``k`` or ``seed`` is not an int.
            ValueError: ``features`` or ``k`` is out of range, or ``edges`` or ``kinds`` are not as
                above.

        >>> bank = SketchBank(2, edges=[np.float32([0.0, 1.0]), np.float32([])])
        >>> bank.update(np.float32([[0.5, 7.0], [1.0, np.nan], [-3.0, 8.0]]))
        >>> bank.counts(0).tolist(), bank.counts(1).tolist(), bank.nulls(1)
        ([1, 1, 1], [2], 1)
        >>> bank.moments(1)
        Moments(count=2, mean=7.5, variance=0.25, minimum=7.0, maximum=8.0)
        >>> bank.quantiles(0, [0.0, 0.5, 1.0]).tolist()
        [-3.0, 0.5, 1.0]
        """
        if isinstance(features, bool):
            raise TypeError("'bool' object is not taken for an integer")
        features, k = operator.index(features), operator.index(k)
        if not 1 <= features <= sketch_record.FEATURES_MAX:
            raise ValueError(f"features must be 1 to {sketch_record.FEATURES_MAX}, got {features}")
        if not sketch_record.K_MIN <= k <= sketch_record.K_MAX:
            raise ValueError(f"k must be 8 to 65535, got {k}")
        sizes__d, edges__e = _flatten(features, edges)
        self._start(k, sizes__d, edges__e, _kinds(features, kinds), seed)

    def _start(
        self,
        k: int,
        sizes__d: NDArray[np.int64],
        edges__e: NDArray[np.float32] | None,
        kinds__d: NDArray[np.uint8],
        seed: int | None,
    ) -> None:
        chosen = int.from_bytes(os.urandom(8)) if seed is None else operator.index(seed)
        # Neighbouring seeds must not make neighbouring streams: SplitMix64's finaliser.
        mixed = (chosen + 0x9E3779B97F4A7C15) & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        super().__init__(sizes__d, edges__e, kinds__d, k, mixed ^ mixed >> 31 or 1)
        self._k, self._sizes__d, self._kinds__d = k, sizes__d, kinds__d
        self._edges__e = edges__e
        if edges__e is not None:
            self._digest = sketch_record.edges_digest(sizes__d, edges__e)

    @property
    def k(self) -> int:
        """Size of the sketches."""
        return self._k

    @property
    def edges_digest(self) -> bytes:
        """16 bytes that stand for sizes and edges: banks with the same may be merged."""
        return self._digest

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each feature."""
        return tuple(KINDS[kind] for kind in self._kinds__d)

    @property
    def bins_only(self) -> bool:
        """Whether it was restored from a record of bins alone, or merged with one."""
        return self._bins_only

    def counts(self, i: int) -> NDArray[np.int64]:
        """Return the bins of feature ``i``.

        Args:
            i: Feature, 0 <= i < features.

        Returns:
            Shape (E + 1,), int64, a copy: ``np.histogram(x[~isnan(x)], [-inf, *edges, inf])[0]``.
            A value on an edge is in the bin above it; infinities are in the outer bins.

        Raises:
            IndexError: There is no feature ``i``.
        """
        return np.array(self.read_bins(i), np.int64)

    def moments(self, i: int) -> Moments:
        """Return the moments of feature ``i``; IndexError if there is none.

        All but the count are NaN where the bank is ``bins_only``.
        """
        found = Moments(*self.read_moments(i))
        if self._bins_only:
            return Moments(found.count, np.nan, np.nan, np.nan, np.nan)
        return found

    def quantiles(self, i: int, q: ArrayLike) -> NDArray[Any]:
        """Return values of feature ``i`` by their rank.

        Args:
            i: Feature, 0 <= i < features.
            q: Ranks, any shape, each 0 to 1; 0 is the minimum and 1 the maximum, both exact.

        Returns:
            The least value whose rank is at least q, in the shape of ``q``; float32, or float64
            for a feature that keeps doubles. NaN if there is no value.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: A q is not in [0, 1], the feature is a category, or the bank is
                ``bins_only``.
        """
        wanted = np.asarray(q, np.float64)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise ValueError("ranks must be 0 to 1")
        view = self._view(i)
        values = view.values
        if not len(values):
            return np.full(wanted.shape, np.nan, values.dtype)
        sums = np.cumsum(view.weights)
        # ceil(q n) th value; the ceiling of a product that rounding put just above a whole
        # number would be one too many
        product = wanted * float(sums[-1])
        place = np.ceil(np.nextafter(product, 0.0)).astype(np.int64)
        at = np.minimum(np.searchsorted(sums, place, side="left"), len(values) - 1)
        found = np.where(wanted == 0, view.low, np.where(wanted == 1, view.high, values[at]))
        return found.astype(values.dtype)

    def ranks(self, i: int, values: ArrayLike) -> NDArray[np.float64]:
        """Return the share of the values of feature ``i`` that are not above each of some values.

        Args:
            i: Feature, 0 <= i < features.
            values: Any shape. Infinities are fine; the rank of NaN is NaN. Where floats are kept,
                a value is taken as the nearest float, as those that came were.

        Returns:
            0 to 1, float64, in the shape of ``values``; exactly 0 below the minimum and 1 from
            the maximum on. NaN if there is no value.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: The bank is ``bins_only``.
        """
        wanted = np.asarray(values, np.float64)
        view = self._view(i)
        if not len(view.values):
            return np.full(wanted.shape, np.nan)
        sums = np.concatenate([[0], np.cumsum(view.weights)])
        with np.errstate(over="ignore"):
            near = wanted.astype(view.values.dtype)
        share = sums[np.searchsorted(view.values, near, side="right")] / float(sums[-1])
        found = np.where(near < view.low, 0.0, np.where(near >= view.high, 1.0, share))
        return np.where(np.isnan(wanted), np.nan, found)

    def variance_certificate(self, i: int) -> float:
        """Return V of feature ``i``'s sketch, in squared counts, for what ``kll_bytes`` returns.

        For any value, P(|rank error| > t counts) <= 2 exp(-t**2 / 2V): the bank's own coins are
        the randomness. 0 while nothing was left out. V adds when sketches are merged that were
        made by different coins; a copy of a bank shares its errors, and 4V is what both have.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: The bank is ``bins_only``.
        """
        self._refuse_bins_only()
        _, _, _, variance, _, _ = self.read_levels(i)
        self._refuse_category(i)
        return variance

    def kll_bytes(self, i: int) -> bytes:
        """Return the sketch of feature ``i`` as Apache DataSketches writes it.

        ``kll_floats_sketch`` reads it, or ``kll_doubles_sketch`` for a feature that keeps doubles.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: The bank is ``bins_only``.
        """
        self._refuse_bins_only()
        found = self.write_kll(i)
        self._refuse_category(i)
        return found

    def distinct(self, i: int, *, confidence: float = 0.95) -> tuple[float, float, float]:
        """Return (estimate, low, high) of the number of distinct values of feature ``i``.

        Args:
            i: Feature whose kind is "integer" or "category".
            confidence: With which the number lies between low and high, 0 to 1.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: It is of another kind, or the bank is ``bins_only``.
        """
        sketch = HllSketch.from_bytes(self.hll_bytes(i))
        low, high = sketch.bounds(confidence)
        return min(max(sketch.estimate(), low), high), low, high

    def frequent(self, i: int) -> list[tuple[int, int, int]]:
        """Return (item, low, high) of the most frequent whole numbers of feature ``i``.

        The largest first; low and high are certain. Exact while there are up to 24 of them.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: Its kind is not "integer" or "category", or the bank is ``bins_only``.
        """
        sketch = FrequentItems.from_bytes(self.frequent_bytes(i))
        return sketch.items(threshold=0, no_false_positives=False)

    def hll_bytes(self, i: int) -> bytes:
        """Return the distinct values of feature ``i`` as Apache DataSketches writes HLL.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: Its kind is not "integer" or "category", or the bank is ``bins_only``.
        """
        self._refuse_bins_only()
        return self.read_items(i)[0]

    def frequent_bytes(self, i: int) -> bytes:
        """Return the frequent items of feature ``i`` as Apache DataSketches writes those of longs.

        Raises:
            IndexError: There is no feature ``i``.
            ValueError: Its kind is not "integer" or "category", or the bank is ``bins_only``.
        """
        self._refuse_bins_only()
        return self.read_items(i)[1]

    def merge(self, other: SketchBank) -> None:
        """Add all that another bank counted, as if its values had come here.

        Args:
            other: A bank with the same features, edges and kinds, which is left as it is; its k
                may be another. A bank that was restored without edges has the digest of those it
                was made with. One of bins only makes this one so.

        Raises:
            TypeError: ``other`` is no bank.
            SketchMismatchError: Other features, edges or kinds, or more than 2**53 values
                together; a ValueError. Neither bank was changed.
        """
        if not isinstance(other, SketchBank):
            raise TypeError(f"can only merge a SketchBank, got {type(other).__name__}")
        same = self._digest == other._digest
        hindrance = self.add(other) if same else "sizes"
        if hindrance == "values":
            raise SketchMismatchError(
                f"the banks hold more than {VALUES_MAX} values together; neither was changed"
            )
        if hindrance:
            raise SketchMismatchError(
                f"banks with other features, edges or kinds ({other.features} features, edges "
                f"{other._digest.hex()}; here {self.features}, {self._digest.hex()}); "
                "neither was changed",
                hint="windows of models with other reference profiles are kept apart",
            )

    def to_bytes(
        self, *, edges: bool = False, bins_only: bool = False, bytes_max: int = BYTES_MAX
    ) -> bytes:
        """Return a record of the bank: counters and moments exact, sketches shrunk to a budget.

        A sketch is shrunk in one step: it is cut into equal groups of values, and one value of
        each, chosen at random, stands for its group. The certificate in the record covers that.

        Args:
            edges: Let the edges travel, 4 bytes each, beyond the budget. Else their digest does:
                the reader can read and merge the bank, but not update it, and needs the edges
                from elsewhere to say what a bin means.
            bins_only: Leave sketches and moments out, and with them every value that was seen:
                for privacy.
            bytes_max: Budget in bytes per feature. Counters are never cut: if they take too much
                the sketch is left with its ``PICKS_MIN`` values and the record is longer.

        Returns:
            At most ``bytes_max * features`` bytes, but see above: the counters of 32 bins and the
            rest take 81 to 340 bytes, by their magnitude.

        Raises:
            ValueError: ``edges`` is asked of a bank that was itself restored without them.
        """
        if edges and self._edges__e is None:
            raise ValueError("this bank was restored without its edges and cannot write them")
        counters__k = np.empty(int(self._sizes__d.sum()) + 4 * self.features, np.int64)
        reals__d4 = np.empty((self.features, 4), np.float64)
        room = bytes_max - sketch_record.fixed_bytes(self.features)
        shrunk, items = self.dump(counters__k, reals__d4, room, PICKS_MIN, not bins_only)
        picks = None
        if shrunk is not None:
            picks = tuple(map(_picks, reals__d4.tolist(), shrunk, items, self._kinds__d))
        return sketch_record.encode(
            SketchRecord(
                k=self._k,
                sizes__d=self._sizes__d,
                kinds__d=self._kinds__d,
                digest=self._digest,
                edges__e=self._edges__e if edges else None,
                counters__k=counters__k,
                picks=picks,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Return the bank that a record holds.

        Args:
            data: A record; whatever it is, memory is taken in proportion to its length and to the
                k it states.

        Raises:
            TypeError: ``data`` is not bytes-like.
            SketchRecordError: Not a record, or one that no bank can have written; a ValueError.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"a sketch record is bytes, got {type(data).__name__}")
        record = sketch_record.decode(bytes(data))
        bank = cls.__new__(cls)
        bank._start(record.k, record.sizes__d, record.edges__e, record.kinds__d, None)
        bank._digest = record.digest
        reals__d4 = np.tile([0.0, 0.0, np.inf, -np.inf], (bank.features, 1))
        for i, each in enumerate(record.picks or ()):
            reals__d4[i] = each.reals
        bank.load(record.counters__k, reals__d4)
        bank._bins_only = record.picks is None
        for i, each in enumerate(record.picks or ()):
            bank._restore(i, each)
        return bank

    def _refuse_bins_only(self) -> None:
        if self._bins_only:
            raise ValueError("this bank holds bins alone: its record left sketches out")

    def _refuse_category(self, i: int) -> None:
        if KINDS[self._kinds__d[i]] == "category":
            raise ValueError(f"feature {i} is a category: its values have no order and no sketch")

    def _view(self, i: int) -> _View:
        self._refuse_bins_only()
        levels = self.read_levels(i)
        self._refuse_category(i)
        return _View.of(levels, self._kinds__d[i])

    def _restore(self, i: int, picks: Picks) -> None:
        if picks.distinct:
            lg_k = HllSketch.from_bytes(picks.distinct).lg_k
            self.load_items(i, picks.distinct, lg_k, picks.frequent)
        if not len(picks.values):
            return
        # (n >> shift) whole picks and one for the rest, which stands on a level for each bit of it
        n = self.read_moments(i)[0]
        whole, rest = n >> picks.shift, n & (1 << picks.shift) - 1
        below = [rest >> h & 1 for h in range(picks.shift)]
        items = picks.values[-1:].repeat(sum(below)).tobytes() + picks.values[:whole].tobytes()
        self.load_levels(i, items, [*below, whole], picks.k_min, picks.variance)


def _picks(
    reals: list[float],
    shrunk: tuple[int, bytes, float, int],
    items: tuple[tuple[bytes, bytes], int] | None,
    kind: int,
) -> Picks:
    """Return what a record carries of one feature."""
    shift, values, variance, k_min = shrunk
    distinct = frequent = b""
    if items is not None:
        distinct, frequent = _shrunk(*items[0], items[1] - 2)
    mean, square, minimum, maximum = reals
    picks = np.frombuffer(values, _dtype(kind))
    return Picks(
        (mean, square, minimum, maximum), variance, k_min, shift, picks, distinct, frequent
    )


def _shrunk(distinct: bytes, frequent: bytes, room: int) -> tuple[bytes, bytes]:
    """Fold distinct values and leave out the rarest items until both fit, or nearly."""
    full = HllSketch.from_bytes(distinct)
    for lg_k in range(full.lg_k, 3, -1):
        folded = HllSketch(lg_k)
        folded.merge(full)
        distinct = folded.to_bytes()
        if len(distinct) <= room // 2:
            break
    sketch = FrequentItems.from_bytes(frequent)
    items = sketch.items(threshold=0, no_false_positives=False)
    for kept in range(len(items), 0, -1):
        # An item left out weighs at most what was counted of it, and what may be missing from that.
        missing = items[kept][1] if kept < len(items) else 0
        rows = [(low, item) for item, low, _ in items[:kept]]
        frequent = sketch_record.frequent_bytes(rows, sketch.total, sketch.error_max + missing)
        if len(sketch_record.pack_items(frequent)) <= room - len(distinct):
            break
    return distinct, frequent


class _View(NamedTuple):
    """A sketch laid open."""

    values: NDArray[Any]
    """Ascending, float32 or float64."""
    weights: NDArray[np.int64]
    k_min: int
    variance: float
    low: Any
    """Exact extremes, as the sketch's type."""
    high: Any

    @classmethod
    def of(cls, levels: tuple[bytes, list[int], int, float, float, float], kind: int) -> Self:
        items, pops, k_min, variance, low, high = levels
        values = np.frombuffer(items, _dtype(kind))
        order = np.argsort(values, kind="stable")
        weights = np.repeat(np.int64(1) << np.arange(len(pops), dtype=np.int64), pops)
        ends = _rounded((low, high), values.dtype)
        return cls(values[order], weights[order], k_min, variance, ends[0], ends[1])


def _dtype(kind: int) -> np.dtype[Any]:
    return np.dtype(np.float64 if KINDS[kind] == "double" else np.float32)


def _rounded(ends: tuple[float, float], kind: np.dtype[Any]) -> NDArray[Any]:
    """Round as the kernel does: beyond float32 is infinite, and no zero is negative."""
    with np.errstate(over="ignore"):
        found: NDArray[Any] = np.array(ends).astype(kind) + kind.type(0.0)
    return found


def _kinds(features: int, kinds: Sequence[str] | None) -> NDArray[np.uint8]:
    """Return the number of each feature's kind."""
    if kinds is None:
        return np.zeros(features, np.uint8)
    if not isinstance(kinds, Sequence) or isinstance(kinds, str) or len(kinds) != features:
        raise ValueError(f"kinds must be a list of {features} names, one for each feature")
    unknown = [each for each in kinds if each not in KINDS]
    if unknown:
        raise ValueError(f"kinds are {', '.join(KINDS)}; got {unknown[0]!r:.40}")
    return np.array([KINDS.index(each) for each in kinds], np.uint8)


def _flatten(
    features: int, edges: Sequence[NDArray[np.float32]] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the number of edges of each feature, and all edges in a row; check them."""
    if edges is None:
        return np.zeros(features, np.int64), np.empty(0, np.float32)
    if not isinstance(edges, Sequence) or len(edges) != features:
        raise ValueError(f"edges must be a list of {features} arrays, one for each feature")
    for i, each in enumerate(edges):
        if not isinstance(each, np.ndarray) or each.dtype != np.float32 or each.ndim != 1:
            raise ValueError(f"edges[{i}] must be a float32 array of one axis")
        if len(each) > sketch_record.EDGES_MAX:
            raise ValueError(f"edges[{i}] has {len(each)} edges, {sketch_record.EDGES_MAX} at most")
        if np.isnan(each).any() or not (each[1:] > each[:-1]).all():
            raise ValueError(f"edges[{i}] must be strictly ascending, without NaN")
    sizes__d = np.array([len(each) for each in edges], np.int64)
    # + 0.0 makes 0.0 of -0.0: they bin the same, so their digest is the same
    return sizes__d, np.concatenate(edges) + np.float32(0.0)
