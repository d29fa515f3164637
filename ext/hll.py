"""Count how many distinct values came, within a stated error, in a fixed size.

    values --update--> HllSketch --to_bytes--> bytes of Apache DataSketches --from_bytes, merge-->

The rules are in ``_hll``. Axes: N values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ._hll import LG_K_MAX, LG_K_MIN, Distinct, peek
from .errors import SketchRecordError

__all__ = ["LG_K_MAX", "LG_K_MIN", "HllSketch", "SketchRecordError"]

RSE_FACTOR: Final = math.sqrt(3 * math.log(2) - 1)  # Ertl 2017: the most that registers tell
SHARES: Final = 3 << 26  # two keys in so many share a coupon
KINDS: Final = {"hll4": 0, "hll8": 2}


class HllSketch(Distinct):
    """The number of distinct values of a stream, by HyperLogLog.

    A value counts once however often it comes, in whatever order; merging sketches of parts gives
    exactly the sketch of the whole. Few values (up to 7, or to 3 * 2^(lg_k - 5) if lg_k is 8 or
    more) are kept as 32-bit coupons: the rounded estimate is then exact, but for once in
    2^28.6 / n^2 streams of n distinct values. Beyond, the relative standard error is
    1.039 / sqrt(2^lg_k), below lg_k 8 up to 1.16 times that:

        lg_k     8     10     11     12     14     16
        error    6.5 % 3.2 %  2.3 %  1.6 %  0.8 %  0.4 %

    An int is counted as its int64, a float as its float64: 1 and 1.0 are two values, and so are
    a float32 and the float64 that prints alike. -0.0 is 0.0. NaN is null in shoal and is skipped
    (the library would count it as one value); an empty string is skipped, as the library does.

    RAM: 2^lg_k bytes, 4 KiB at lg_k 12, coupons included. Bytes: at most 12 + 4 for each coupon;
    beyond, 40 + 2^(lg_k - 1) and a few ("hll4"), or 40 + 2^lg_k ("hll8").

    Any thread may call any method: a lock makes each call whole.

    Sources: Flajolet et al., "HyperLogLog", AofA 2007; Ertl, "New cardinality estimation
    algorithms for HyperLogLog sketches", 2017 (the improved estimator, its algorithm 6).
    """

    def __init__(self, lg_k: int = 12) -> None:
        """Make an empty sketch.

        Args:
            lg_k: Base-2 logarithm of the number of registers, 4 to 21.

        Raises:
            TypeError: ``lg_k`` is not an int.
            ValueError: ``lg_k`` is out of range.

        >>> sketch = HllSketch(lg_k=12)
        >>> sketch.update(np.arange(100) % 7)
        >>> round(sketch.estimate()), [round(end, 1) for end in sketch.bounds()]
        (7, [7.0, 7.0])
        """

    def update(self, values: NDArray[Any]) -> None:
        """Count the values of an array.

        Args:
            values: Any shape, int64, float64 or float32 in native byte order; copied if it is not
                C-contiguous. NaN is skipped.

        Raises:
            TypeError: Not an array of these types; nothing was counted.
        """
        if not isinstance(values, np.ndarray):
            raise TypeError(f"values are an array, got {type(values).__name__}")
        values__n = np.ascontiguousarray(values).reshape(-1)
        if values.dtype == np.float32:
            self.put_floats(values__n)
        elif values.dtype == np.float64:
            self.put_doubles(values__n)
        elif values.dtype == np.int64:
            self.put_integers(values__n)
        else:
            raise TypeError(f"values are int64, float64 or float32, got {values.dtype}")

    def update_texts(self, texts: Iterable[str]) -> None:
        """Count strings, by their UTF-8 bytes.

        Args:
            texts: Strings; empty ones are skipped.

        Raises:
            TypeError: ``texts`` is itself a string, or holds what is none; nothing was counted.
            ValueError: A string has no UTF-8 form (a lone surrogate); nothing was counted.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts are many strings, got one")
        self.put_texts(list(texts))

    def estimate(self) -> float:
        """Return the estimated number of distinct values; 0.0 if none came, never above 2^88."""
        return self.read()[0]

    def bounds(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return (low, high), between which the number of distinct values lies.

        Args:
            confidence: Share of streams for which that holds, 0 < confidence < 1, no unit. The
                share is of random hash values: who can choose values by their hash can make any
                bound wrong. Measured at 0.95 over lg_k 4 to 11: 0.943 to 0.995.

        With registers, distinct / estimate is taken for a gamma variate of mean 1 and the standard
        deviation ``error_rel``, as the sum behind the estimate nearly is, and its quantiles are
        those of Wilson and Hilferty, "The distribution of chi-square", 1931.

        Raises:
            ValueError: ``confidence`` is out of range.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
        estimate, least, coupons = self.read()
        if coupons >= 0:
            return float(coupons), float(
                coupons + _poisson(math.comb(coupons, 2) / SHARES, confidence)
            )
        z, square = NormalDist().inv_cdf((1.0 + confidence) / 2.0), self.error_rel**2
        low, high = (
            estimate * max(0.0, 1.0 - square / 9.0 + sign * self.error_rel / 3.0) ** 3
            for sign in (-z, z)
        )
        return max(float(least), low), max(float(least), high)

    @property
    def error_rel(self) -> float:
        """Relative standard error of the estimate once the sketch has registers, no unit."""
        return RSE_FACTOR / math.sqrt(1 << self.lg_k)

    def merge(self, other: HllSketch) -> None:
        """Add what another sketch saw, as if its values had come here.

        Args:
            other: Any sketch, left as it is. ``lg_k`` becomes the smaller one of those that have
                registers: the sketch with the larger is folded down, which loses nothing that a
                sketch made with the smaller would have kept.

        Raises:
            TypeError: ``other`` is no sketch.
        """
        if not isinstance(other, HllSketch):
            raise TypeError(f"can only merge an HllSketch, got {type(other).__name__}")
        self.add(other)

    def to_bytes(self, kind: Literal["hll4", "hll8"] = "hll4") -> bytes:
        """Return the compact form of Apache DataSketches, which C++, Java and Spark read.

        Equal sketches give equal bytes, whatever the order of their values. With registers the
        out-of-order flag is set: readers then estimate from the registers alone.

        Args:
            kind: "hll4" (small) or "hll8" (fast to read): what the registers take.

        Raises:
            ValueError: Another ``kind``.
        """
        if kind not in KINDS:
            raise ValueError(f'kind must be "hll4" or "hll8", got {kind!r}')
        return self.dump(KINDS[kind])

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, lg_k_max: int = LG_K_MAX) -> Self:
        """Return the sketch that bytes of Apache DataSketches hold.

        Lists, sets and registers of 4, 6 and 8 bits are read, compact or updatable. A writer's
        history (its HIP estimate) is not kept: the estimate is from the registers.

        Args:
            data: A sketch; whatever it is, memory is 2^lg_k bytes.
            lg_k_max: A sketch with a larger ``lg_k`` is refused, 4 to 21.

        Raises:
            TypeError: ``data`` is not bytes-like.
            SketchRecordError: Not such a sketch, or one that no stream gives; a ValueError. The
                hint says what was seen.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"a sketch is bytes, got {type(data).__name__}")
        data = bytes(data)
        lg_k, reason = peek(data)
        if not reason and lg_k > lg_k_max:
            reason = f"lg_k {lg_k} is above {lg_k_max}"
        if not reason:
            sketch = cls(lg_k)
            reason = sketch.load(data)
            if not reason:
                return sketch
        raise SketchRecordError(
            f"the bytes are no HLL sketch: {reason}",
            hint="the writer may be broken, or the bytes were damaged on their way",
        )


def _poisson(mean: float, confidence: float) -> int:
    """Return the smallest n that a Poisson number exceeds with at most 1 - confidence."""
    n, share = 0, math.exp(-mean)
    reached = share
    while reached < confidence and n < 10 * mean + 100:
        n += 1
        share *= mean / n
        reached += share
    return n
