"""Merge KLL sketches of groups of rows for good, or only to ask them.

    column of KLL bytes --merge--> one sketch of parameter k per group: hours, days, cohorts
    column of KLL bytes --Sketches.of--> a wide merger of one group: what a question gets

The certificate V of a merged sketch is the sum of those that went in and a bound of what merging
added: P(|rank error| n > t) <= 2 exp(-t^2 / 2V). The bound counts every compaction that the
reference's rules allow for the levels that are there, so it is larger than what happened.

The library's reader trusts its bytes. It gets none that others wrote: the server's own bank wrote
them, and the checksums of the pages say that they are as they were.

Axes: R rows, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import datasketches
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...ext.kll import K_WIDE, BulkMerger, read_kll


class Sketches:
    """The sketches of groups of rows, to be merged one group at a time. Immutable."""

    def __init__(
        self, kll: Any, variance__r: NDArray[np.float64], group__r: NDArray[np.int64]
    ) -> None:
        """Sort rows by group.

        Args:
            kll: KLL bytes, floats or doubles, R of them; null adds nothing.
            variance__r: V of each, squared counts; NaN: it is bounded from the bytes.
            group__r: Group of each row, from 0.
        """
        there = np.flatnonzero(kll.is_valid().to_numpy())
        order = there[np.argsort(group__r[there], kind="stable")]
        blobs = kll.to_pylist()  # taking them in order first would copy them twice
        self._blobs: list[bytes] = [blobs[row] for row in order.tolist()]
        self._variance__s = np.ascontiguousarray(variance__r[order])
        groups = group__r[order]
        borders = np.flatnonzero(np.diff(groups, prepend=-1, append=-1)).tolist()
        self._runs = {
            int(groups[begin]): slice(begin, end) for begin, end in itertools.pairwise(borders)
        }

    def groups(self) -> Sequence[int]:
        """Return the groups that have a sketch, ascending."""
        return list(self._runs)

    def rows(self, group: int) -> tuple[list[bytes], NDArray[np.float64]]:
        """Return the sketches of a group and V of each."""
        run = self._runs[group]
        return self._blobs[run], self._variance__s[run]

    def of(self, group: int, *, k_wide: int = K_WIDE) -> BulkMerger | None:
        """Return the sketches of a group merged, to be asked; None if it has none.

        Args:
            group: Its number.
            k_wide: Width of the merger, a power of 2 from 64 to 65536: 4096 adds no error to
                speak of, and its first answer takes a millisecond for 17,000 samples; 256 adds
                0.1 % (one standard deviation) and takes a third of that.

        Raises:
            SketchRecordError: The bytes of a row are damaged.
        """
        if group not in self._runs:
            return None
        merger = BulkMerger(k_wide)
        merger.add_many(*self.rows(group))
        return merger


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
