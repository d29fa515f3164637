"""Find the items of a stream that come often, with guaranteed bounds of how often.

    items --update--> FrequentItems --to_bytes--> bytes of DataSketches --from_bytes, merge--> fleet

``FrequentItems`` counts int64 keys (the rules are in ``_frequent``), ``FrequentTexts`` strings by
the same rules, here. Axes: N items.
"""

from __future__ import annotations

import operator
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._frequent import LG_MAX, LG_MIN, TOTAL_MAX, Counters, peek
from .errors import SketchMismatchError, SketchRecordError

__all__ = [
    "LG_MAX",
    "LG_MIN",
    "TOTAL_MAX",
    "FrequentItems",
    "FrequentTexts",
    "SketchMismatchError",
    "SketchRecordError",
]

HEAD: Final = struct.Struct("<BBBBBBHIIQQ")
COUNT: Final = struct.Struct("<Q")
SIZE: Final = struct.Struct("<I")
TEXT_BYTES_MAX: Final = 65535
HINT: Final = "the writer may be broken, or the bytes were damaged on their way"
Item = TypeVar("Item", int, str)
FULL: Final = f"more than {TOTAL_MAX} in total; nothing was changed"


class FrequentItems(Counters):
    """Counts of the int64 items of a stream that come often.

    Guarantees, for every stream and every order of updates and merges: an item's weight lies
    within ``estimate(item)``; low and high differ by ``error_max``; an item with more weight than
    ``error_max`` is kept. Up to 3/4 * 2^lg_max different items are counted exactly. Beyond,
    ``error_max`` is at most 8/3 / 2^lg_max of the total, with the least lg_max of those merged.
    Above lg_max 10 the median is that of 1,024 counts only: 8/3 is then usual, not certain.

    RAM: 16 * 2^lg_max bytes, 1 KiB at lg_max 6 (48 counters). Bytes: 32 + 16 for each counter.

    Any thread may call any method: a lock makes each call whole.

    Sources: Misra, Gries, "Finding repeated elements", 1982; Anderson et al., "A high-performance
    algorithm for identifying frequent items in data streams", IMC 2017.
    """

    def __init__(self, lg_max: int = 6) -> None:
        """Make an empty sketch.

        Args:
            lg_max: Base-2 logarithm of the table's places, 3 to 16; 3/4 of them are used.

        Raises:
            TypeError: ``lg_max`` is not an int.
            ValueError: ``lg_max`` is out of range.

        >>> sketch = FrequentItems(lg_max=3)
        >>> sketch.update(np.array([7, 7, 7, 1, 2, 7, -5]))
        >>> sketch.items()[0], sketch.estimate(99), sketch.total
        ((7, 4, 4), (0, 0), 7)
        """

    def update(self, items: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> None:
        """Count items.

        Args:
            items: Shape (N,), int64; copied if it is not contiguous.
            weights: Shape (N,), int64, each at least 0: how often each item came. None: once.

        Raises:
            TypeError: Not int64 arrays.
            ValueError: Another shape, a negative weight, or more than ``TOTAL_MAX`` in total.
                Nothing was counted in either case.
        """
        items__n = _integers("items", items)
        weights__n = None if weights is None else _integers("weights", weights)
        if weights__n is not None:
            if weights__n.shape != items__n.shape:
                raise ValueError(f"{len(weights__n)} weights for {len(items__n)} items")
            if (weights__n < 0).any():
                raise ValueError("a weight is negative; nothing was counted")
        if not self.put(items__n, weights__n):
            raise ValueError(FULL)

    def estimate(self, item: int) -> tuple[int, int]:
        """Return (low, high), between which the weight of ``item`` lies: certain, not likely.

        Raises:
            TypeError: ``item`` is not an int.
            OverflowError: ``item`` is no int64.
        """
        count, offset, _ = self.read(operator.index(item))
        return count, count + offset

    def items(
        self, *, threshold: int | None = None, no_false_positives: bool = True
    ) -> list[tuple[int, int, int]]:
        """Return (item, low, high) of the frequent items, the largest first, equal ones by item.

        Args:
            threshold: A weight, at least 0; None: ``error_max``.
            no_false_positives: True: only items that certainly weigh more than the threshold.
                False: all kept items that may, with none missing if the threshold is
                ``error_max`` or more.
        """
        items, counts, offset, _ = self.read_all()
        return _above(items, counts, offset, threshold, no_false_positives)

    @property
    def total(self) -> int:
        """Weight of all that came."""
        return self.read(0)[2]

    @property
    def error_max(self) -> int:
        """The most that high exceeds low; an item that is not kept weighs no more."""
        return self.read(0)[1]

    def merge(self, other: FrequentItems) -> None:
        """Add what another sketch counted; the bounds hold for the union.

        Args:
            other: Any sketch, also with another ``lg_max``; left as it is.

        Raises:
            TypeError: ``other`` is no such sketch.
            SketchMismatchError: More than ``TOTAL_MAX`` together; a ValueError. Neither was
                changed.
        """
        if not isinstance(other, FrequentItems):
            raise TypeError(f"can only merge FrequentItems, got {type(other).__name__}")
        if not self.add(other):
            raise SketchMismatchError(FULL)

    def to_bytes(self) -> bytes:
        """Return the bytes of Apache DataSketches: of longs in Java, of int64 in C++."""
        return self.dump()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Return the sketch that bytes of Apache DataSketches hold.

        Args:
            data: A sketch of longs; whatever it is, memory is 16 * 2^lg_max bytes, which is
                1 MiB at the most.

        Raises:
            TypeError: ``data`` is not bytes-like.
            SketchRecordError: Not such a sketch, or one that no stream gives; a ValueError.
        """
        data = _bytes(data)
        lg_max, reason = peek(data)
        if not reason:
            sketch = cls(lg_max)
            reason = sketch.load(data)
            if not reason:
                return sketch
        raise SketchRecordError(f"the bytes are no sketch of int64 items: {reason}", hint=HINT)


class FrequentTexts:
    """Counts of the strings of a stream that come often.

    Guarantees and sources are those of ``FrequentItems``; 8/3 is certain here. RAM: at most
    3/4 * 2^lg_max strings of ``text_bytes_max``, and a batch's while it is counted. Bytes: 32, 12
    for each string, and its UTF-8.

    Any thread may call any method: a lock makes each call whole.
    """

    def __init__(self, lg_max: int = 6, *, text_bytes_max: int = 256) -> None:
        """Make an empty sketch.

        Args:
            lg_max: As for ``FrequentItems``.
            text_bytes_max: Longest string that is counted, in bytes of UTF-8, 1 to 65535.

        Raises:
            TypeError: An argument is not an int.
            ValueError: An argument is out of range.

        >>> sketch = FrequentTexts()
        >>> sketch.update(["dog", "cat", "dog"])
        >>> sketch.items()
        [('dog', 2, 2), ('cat', 1, 1)]
        """
        if isinstance(text_bytes_max, bool):
            raise TypeError("text_bytes_max is an int, got bool")
        self.lg_max: Final = operator.index(lg_max)
        self.text_bytes_max: Final = operator.index(text_bytes_max)
        if not LG_MIN <= lg_max <= LG_MAX:
            raise ValueError(f"lg_max must be {LG_MIN} to {LG_MAX}, got {lg_max}")
        if not 1 <= text_bytes_max <= TEXT_BYTES_MAX:
            raise ValueError(f"text_bytes_max must be 1 to {TEXT_BYTES_MAX}, got {text_bytes_max}")
        self._counts: dict[str, int] = {}
        self._total = self._offset = 0
        self._lock = threading.Lock()

    def update(self, items: Iterable[str], weights: Iterable[int] | None = None) -> None:
        """Count strings.

        Args:
            items: Strings; the empty one is a string as well. All are looked at before the first
                is counted, so they are held meanwhile.
            weights: As many, each an int of at least 0. None: 1 each.

        Raises:
            TypeError: ``items`` is itself a string, or something is no string or no int.
            ValueError: A string is longer than ``text_bytes_max`` or has no UTF-8 form, a weight
                is negative, there are more or fewer weights than items, or more than
                ``TOTAL_MAX`` in total. Nothing was counted in either case.
        """
        if isinstance(items, str | bytes):
            raise TypeError("items are many strings, got one")
        fresh: Counter[str] = Counter()
        if weights is None:
            fresh.update(items)
        else:
            for item, weight in zip(items, weights, strict=True):
                if operator.index(weight) < 0:
                    raise ValueError("a weight is negative; nothing was counted")
                fresh[item] += operator.index(weight)
        for item in fresh:
            if not isinstance(item, str):
                raise TypeError(f"an item is a str, got {type(item).__name__}")
            size = len(item) if item.isascii() else len(item.encode())
            if size > self.text_bytes_max:
                raise ValueError(
                    f"an item has {size} bytes, {self.text_bytes_max} at most; nothing was counted"
                )
        counts, total = {item: count for item, count in fresh.items() if count}, fresh.total()
        with self._lock:
            if total > TOTAL_MAX - self._total:
                raise ValueError(FULL)
            self._add(counts)
            self._total += total

    def estimate(self, item: str) -> tuple[int, int]:
        """Return (low, high), between which the weight of ``item`` lies: certain, not likely."""
        with self._lock:
            count = self._counts.get(item, 0)
            return count, count + self._offset

    def items(
        self, *, threshold: int | None = None, no_false_positives: bool = True
    ) -> list[tuple[str, int, int]]:
        """Return (item, low, high) of the frequent items, as ``FrequentItems.items`` does."""
        counts, offset, _ = self._read()
        return _above(list(counts), list(counts.values()), offset, threshold, no_false_positives)

    @property
    def total(self) -> int:
        """Weight of all that came."""
        return self._total

    @property
    def error_max(self) -> int:
        """The most that high exceeds low; an item that is not kept weighs no more."""
        return self._offset

    def merge(self, other: FrequentTexts) -> None:
        """Add what another sketch counted, as ``FrequentItems.merge`` does.

        Args:
            other: Any sketch, also with another ``lg_max``; left as it is. Its strings are kept
                even if they are longer than ours may be.

        Raises:
            TypeError: ``other`` is no such sketch.
            SketchMismatchError: More than ``TOTAL_MAX`` together; a ValueError. Neither was
                changed.
        """
        if not isinstance(other, FrequentTexts):
            raise TypeError(f"can only merge FrequentTexts, got {type(other).__name__}")
        counts, offset, total = other._read()
        with self._lock:
            if total > TOTAL_MAX - self._total:
                raise SketchMismatchError(FULL)
            self._add(counts)
            self._offset += offset
            self._total += total

    def reset(self) -> None:
        """Forget all items; keep the sizes."""
        with self._lock:
            self._counts = {}
            self._total = self._offset = 0

    def to_bytes(self) -> bytes:
        """Return the bytes of Apache DataSketches, of strings."""
        counts, offset, total = self._read()
        lg = LG_MIN
        while _capacity(lg) < len(counts):
            lg += 1
        if total == 0:
            return HEAD.pack(1, 1, 10, self.lg_max, lg, 5, 0, 0, 0, 0, 0)[:8]
        order = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
        out = [HEAD.pack(4, 1, 10, self.lg_max, lg, 0, 0, len(counts), 0, total, offset)]
        out += [COUNT.pack(count) for _, count in order]
        for text, _ in order:
            encoded = text.encode()
            out += [SIZE.pack(len(encoded)), encoded]
        return b"".join(out)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, text_bytes_max: int = 256) -> Self:
        """Return the sketch that bytes of Apache DataSketches hold.

        Args:
            data: A sketch of strings; whatever it is, memory is in proportion to its length.
            text_bytes_max: A sketch with a longer string is refused.

        Raises:
            TypeError: ``data`` is not bytes-like.
            SketchRecordError: Not such a sketch, or one that no stream gives; a ValueError.
        """
        data = _bytes(data)
        lg_max, reason = peek(data)
        if not reason:
            sketch = cls(lg_max, text_bytes_max=text_bytes_max)
            if data[5]:
                return sketch
            reason = sketch._fill(data)
            if not reason:
                return sketch
        raise SketchRecordError(f"the bytes are no sketch of strings: {reason}", hint=HINT)

    def _fill(self, data: bytes) -> str:
        """Take what bytes with a sound head hold, or return why not."""
        n, _, total, offset = HEAD.unpack_from(data)[7:]
        at = HEAD.size + COUNT.size * n
        if at + SIZE.size * n > len(data):
            return "cut off"
        if not 0 < total <= TOTAL_MAX or offset > total:
            return "a total that cannot be"
        counts = struct.unpack_from(f"<{n}Q", data, HEAD.size)
        if 0 in counts or sum(counts) > total - offset:
            return "counts that are not those of its total"
        for count in counts:
            if at + SIZE.size > len(data):
                return "cut off"
            (size,) = SIZE.unpack_from(data, at)
            at += SIZE.size
            if size > min(self.text_bytes_max, len(data) - at):
                return "a string too long"
            try:
                text = data[at : at + size].decode()
            except UnicodeDecodeError:
                return "a string that is not UTF-8"
            if text in self._counts:
                return "an item twice"
            self._counts[text] = count
            at += size
        self._total, self._offset = total, offset
        return "more than its strings" if at != len(data) else ""

    def _read(self) -> tuple[dict[str, int], int, int]:
        """Return (counts, offset, total) of one moment."""
        with self._lock:
            return self._counts.copy(), self._offset, self._total

    def _add(self, counts: dict[str, int]) -> None:
        """Add positive counts, in a dict that is now ours, but not their total."""
        for item, count in self._counts.items():  # the smaller side, after a batch
            counts[item] = counts.get(item, 0) + count
        self._counts = counts
        if len(counts) > _capacity(self.lg_max):
            self._purge()

    def _purge(self) -> None:
        """Take so much from each count that enough of them reach 0.

        That is the median, as in ``_frequent``; but after a batch with many strings the largest
        count that is one too many, which is less (Agarwal et al., "Mergeable summaries", 2012).
        """
        ordered = sorted(self._counts.values())
        n = len(ordered)
        amount = ordered[max(n // 2, n - 1 - _capacity(self.lg_max))]
        if ordered[-1] == amount:  # one stays, as in _frequent
            kept = min(item for item, count in self._counts.items() if count == amount)
            self._counts = {kept: 1}
        else:
            self._counts = {
                item: count - amount for item, count in self._counts.items() if count > amount
            }
        self._offset += amount


def _capacity(lg: int) -> int:
    return 3 << (lg - 2)


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    """Return a contiguous int64 array of one axis."""
    if not isinstance(values, np.ndarray) or values.dtype != np.int64:
        raise TypeError(f"{name} are an int64 array, got {getattr(values, 'dtype', type(values))}")
    if values.ndim != 1:
        raise ValueError(f"{name} have one axis, got {values.ndim}")
    return np.ascontiguousarray(values)


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"a sketch is bytes, got {type(data).__name__}")
    return bytes(data)


def _above(
    items: list[Item], counts: list[int], offset: int, threshold: int | None, certain: bool
) -> list[tuple[Item, int, int]]:
    """Return (item, low, high) above a threshold, the largest first."""
    least = offset if threshold is None else threshold
    rows = [
        (item, count, count + offset)
        for item, count in zip(items, counts, strict=True)
        if (count if certain else count + offset) > least
    ]
    return sorted(rows, key=lambda row: (-row[1], row[0]))
