"""Merge KLL sketches of groups of rows for good, or only to ask them.

    column of KLL bytes --merge--> one sketch of parameter k per group: hours, days, cohorts
    column of KLL bytes --Sketches.of--> a wide merger of one group: what a question gets
    column of KLL bytes --Sketches.quantiles--> quantiles of every group, where groups are many

The certificate V of a merged sketch is the sum of those that went in and a bound of what merging
added: P(|rank error| n > t) <= 2 exp(-t^2 / 2V). The bound counts every compaction that the
reference's rules allow for the levels that are there, so it is larger than what happened.

The library's reader trusts its bytes. It gets none that others wrote: the server's own bank wrote
them, and the checksums of the pages say that they are as they were.

Axes: R rows, G groups.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import datasketches
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...ext.kll import K_WIDE, Blobs, BulkMerger, RunQuantiles, quantiles_of_runs, read_kll

THREADS: Final = min(4, os.cpu_count() or 1)


class Sketches:
    """The sketches of groups of rows, to be merged when they are asked for. Immutable."""

    def __init__(
        self, kll: Any, variance__r: NDArray[np.float64], group__r: NDArray[np.int64]
    ) -> None:
        """Sort rows by group. Their bytes stay where they are, in Arrow's buffers.

        Args:
            kll: KLL bytes, floats or doubles, R of them; null adds nothing.
            variance__r: V of each, squared counts; NaN: it is bounded from the bytes.
            group__r: Group of each row, from 0.
        """
        there = np.flatnonzero(kll.is_valid().to_numpy(zero_copy_only=False))
        order__s = there[np.argsort(group__r[there], kind="stable")]
        chunks = kll.chunks if isinstance(kll, pa.ChunkedArray) else [kll]
        self._blobs = Blobs([_part(each) for each in chunks if len(each)], order__s)
        self._variance__s = np.ascontiguousarray(variance__r[order__s])
        groups__s = group__r[order__s]
        borders = np.flatnonzero(np.diff(groups__s, prepend=-1, append=-1))
        self._runs = {
            int(groups__s[begin]): (begin, end)
            for begin, end in itertools.pairwise(borders.tolist())
        }
        self._starts = borders

    def groups(self) -> Sequence[int]:
        """Return the groups that have a sketch, ascending."""
        return list(self._runs)

    def rows(self, group: int) -> tuple[list[bytes], NDArray[np.float64]]:
        """Return copies of the sketches of a group and V of each."""
        begin, end = self._runs[group]
        return [self._blobs[s] for s in range(begin, end)], self._variance__s[begin:end]

    def of(self, group: int, *, k_wide: int = K_WIDE) -> BulkMerger | None:
        """Return the sketches of a group merged, to be asked; None if it has none.

        Args:
            group: Its number.
            k_wide: Width of the merger, a power of 2 from 64 to 65536: 4096 adds no error to
                speak of; 256 adds 0.1 % (one standard deviation) and is read faster.

        Raises:
            SketchRecordError: The bytes of a row are damaged.
            SketchMismatchError: Floats and doubles are mixed.
        """
        if group not in self._runs:
            return None
        begin, end = self._runs[group]
        merger = BulkMerger(k_wide)
        merger.add_blobs(self._blobs, begin, end, self._variance__s[begin:end])
        return merger

    def quantiles(
        self, groups: int, shares: Sequence[float], *, confidence: float, k_wide: int
    ) -> RunQuantiles:
        """Return quantiles of all groups at once, on all processors.

        Args:
            groups: G, groups 0 to G - 1.
            shares: Q of them.
            confidence: Of each pair of bounds by itself.
            k_wide: As in :meth:`of`.

        Returns:
            Arrays of G; a group without a sketch has n = 0 and NaN.

        Raises:
            SketchRecordError: The bytes of a row are damaged.
            SketchMismatchError: Floats and doubles are mixed in a group.
        """
        some = np.array(list(self._runs), np.int64)
        # Equal shares of the sketches, not of the groups.
        cuts = np.searchsorted(self._starts, np.linspace(0, len(self._blobs), THREADS + 1)[1:-1])
        ends = [0, *cuts.tolist(), len(some)]

        def ask(one: tuple[int, int]) -> RunQuantiles:
            return quantiles_of_runs(
                self._blobs,
                self._starts[one[0] : one[1] + 1],
                self._variance__s,
                shares,
                confidence=confidence,
                k_wide=k_wide,
            )

        parts: list[RunQuantiles] = []
        if len(some):
            with ThreadPoolExecutor(THREADS) as pool:  # the kernel lets the interpreter go
                parts = list(pool.map(ask, itertools.pairwise(ends)))
        n__g, variance__g = np.zeros(groups, np.int64), np.zeros(groups)
        three = [np.full((groups, len(shares)), np.nan) for _ in range(3)]
        for whole, name in zip((n__g, variance__g, *three), RunQuantiles._fields, strict=True):
            if parts:
                whole[some] = np.concatenate([getattr(part, name) for part in parts])
        return RunQuantiles(n__g, variance__g, *three)


def _part(chunk: Any) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the bytes of an Arrow array of binaries and where each value begins and ends."""
    _, offsets, data = chunk.buffers()
    offsets__r = np.frombuffer(offsets, np.int32, count=chunk.offset + len(chunk) + 1)
    bytes__b = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    return bytes__b, offsets__r[chunk.offset :]


def merge(
    kll: Any, variance__r: NDArray[np.float64], group__r: NDArray[np.int64], groups: int, *, k: int
) -> tuple[Any, NDArray[np.float64]]:
    """Return one sketch per group.

    Args:
        kll: KLL bytes, floats or doubles, R of them; null adds nothing.
        variance__r: V of each, squared counts.
        group__r: Group of each row, 0 to G - 1.
        groups: G.
        k: Parameter of the merged sketches, 8 to 65535: how many samples their top level holds.

    Returns:
        KLL bytes, G of them, null for a group without a sketch; and V of each.
    """
    sketches = Sketches(kll, variance__r, group__r)
    blobs: list[bytes | None] = [None] * groups
    variance__g = np.zeros(groups)
    for group in sketches.groups():
        part, variances = sketches.rows(group)
        blobs[group], variance__g[group] = part[0], np.nan_to_num(variances).sum()
        if len(part) > 1:
            blobs[group], added = _merged(part, k)
            variance__g[group] += added
    return pa.array(blobs, pa.binary()), variance__g


def _merged(blobs: Sequence[bytes], k: int) -> tuple[bytes, float]:
    """Return the sketches as one, and a bound of what that adds to V."""
    is_double = read_kll(blobs[0]).values.itemsize == 8
    kind = datasketches.kll_doubles_sketch if is_double else datasketches.kll_floats_sketch
    merged = kind(k)
    for blob in blobs:
        merged.merge(kind.deserialize(blob))
    found: bytes = merged.serialize()
    return found, read_kll(found).variance_bound
